"""Rendering of pages: templates, texts in the reader's language, times in the time zone of the inventory."""

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote
from weakref import WeakValueDictionary
from zoneinfo import ZoneInfo

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from console import charts, translation
from console.history import History, ServiceHistory
from console.languages import HTML_LANGUAGE, choose_language, load_texts
from fleet.inventory.model import Inventory, is_host_alert
from fleet.inventory.notify import Language
from remediator.http.views import may_read_evidence, remove_evidence
from remediator.notifications.content import annotations_in_language
from remediator.notifications.durations import format_duration
from remediator.notifications.phrases import name_kind, translate_failure
from remediator.notifications.rendering import describe_event, shipped_templates
from remediator.record.database import Database
from remediator.reports.availability import format_availability
from remediator.snapshot import ServiceRow
from runtime.access.control import find_identity, get_csrf_token
from runtime.access.roles import AccessRequirement, permits
from runtime.redaction import Redactor
from runtime.terminal import escape_controls, one_line
from runtime.web import name_caller, relative_path

P = ParamSpec("P")
T = TypeVar("T")
STATIC = Path(__file__).parent / "static"
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="pages")  # not those in which actions are prepared
EARLIEST, LATEST = 0.0, 253402128000.0  # Unix times that have a date in every time zone; a certificate may end later
LARGE = 64 * 1024  # bytes of a page that a thread compresses
THEME_COOKIE = "defib_theme"
THEMES = ("light", "dark")
NO_HISTORY = ServiceHistory()
# `same-origin`: without a referrer, browsers send forms with `Origin: null`.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action"
        " 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "Accept-Language, Cookie",
}
# Where a page shows how long something has lasted: rows are rendered once, and their pages later.
_AGE = re.compile("([\x02\x04])([0-9.]+)\x03")  # in words, and in seconds


@dataclass(frozen=True)
class Reader:
    """Who reads a page, as far as its looks depend on it."""

    language: Language
    theme: str = ""  # one of THEMES; empty: as the browser prefers

    @property
    def texts(self) -> Mapping[str, Any]:
        return load_texts(self.language)


class PageRenderer:
    def __init__(self, database: Database, redact: Redactor) -> None:
        self._database, self._redact = database, redact
        self._templates = Environment(
            loader=PackageLoader("console"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True, finalize=_escape,
            auto_reload=False,  # an upgrade replaces templates before the program is restarted
        )  # fmt: skip
        # The last rendering of each row, and what it was rendered from.
        self._rows: dict[tuple[str, Language], tuple[tuple[ServiceRow, ServiceHistory], Markup]] = {}
        self._rendered_for: Inventory | None = None
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by caller
        self._templates.filters["one_line"] = one_line
        self._templates.globals |= {
            "fill": _fill,
            "strip": charts.draw_strip,
            "sparkline": charts.draw_sparkline,
            "ratio": format_availability,
            "chart": charts.draw_chart,
            "state_band": charts.draw_states,
            "tabulate": charts.tabulate,
            "late_start": charts.find_late_start,
            "static_version": static_version(),
        }

    def find_reader(self, request: web.Request) -> Reader:
        theme = request.cookies.get(THEME_COOKIE, "")
        language = choose_language(request, self._database.inventory.notify.language)
        return Reader(language, theme if theme in THEMES else "")

    async def respond(
        self,
        request: web.Request,
        template: str,
        sent: Mapping[str, Any] = MappingProxyType({}),
        *,
        status: int = 200,
        **values: Any,
    ) -> web.Response:
        """Return a page, without secrets, and without evidence if the caller's role does not permit it.

        `sent` are more values, which the client has sent itself.
        """
        identity = find_identity(request)
        shows_evidence = identity is not None and may_read_evidence(request)
        reader = self.find_reader(request)

        def may(role: str) -> bool:
            return identity is not None and permits(identity.role, AccessRequirement[role.upper()])

        common = {
            "shows_evidence": shows_evidence, "identity": identity, "csrf": get_csrf_token(request), "may": may,
            "root": relative_path(request, ""), "here": request.path_qs.removeprefix("/"),
            "path": request.path, "has_gateway": bool(self._database.inventory.gateway.upstreams),
        }  # fmt: skip

        def render() -> bytes:
            visible = self._redact.redact_all(values if shows_evidence else remove_evidence(values))
            return self.render(template, reader, {**visible, **sent, **common}).encode()

        # One page of each caller at a time, so that many large ones delay only who has asked for them.
        turn = self._turns.setdefault(name_caller(request), asyncio.Lock())
        async with turn:
            body = await self.run(render)
        response = web.Response(
            body=body, status=status, content_type="text/html", charset="utf-8", headers=_HEADERS,
            zlib_executor=_THREADS, zlib_executor_size=LARGE,
        )  # fmt: skip
        response.enable_compression()
        return response

    @staticmethod
    async def run(render: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return `render(…)`, called in a thread for pages."""
        return await asyncio.get_running_loop().run_in_executor(_THREADS, partial(render, *args, **kwargs))

    def render(self, template: str, reader: Reader, values: Mapping[str, Any]) -> str:
        """Render a template. Values are not redacted."""
        return self.fill_ages(self._templates.get_template(template).render(**self._helpers(reader), **values), reader)

    def render_row(self, row: ServiceRow, reader: Reader, history: History) -> Markup:
        """Render a service of a list, with ages to be filled in; the same row is rendered once."""
        row = replace(row, probed_at=None)  # which changes with every probe, and lists do not show it
        key, past = (row.id, reader.language), history.services.get(row.id, NO_HISTORY)
        if self._rendered_for is not self._database.inventory:  # other secrets, another time zone
            self._rows.clear()
            self._rendered_for = self._database.inventory
        known = self._rows.get(key)
        if known is None or known[0] != (row, past):
            shown = self._redact.redact_all(asdict(row))
            html = self._templates.get_template("row.html").render(
                **self._helpers(reader), row=shown, past=past, history=history, root=""
            )
            text = Markup(html)  # noqa: S704 - escaped by the template
            known = self._rows[key] = ((row, past), text)
        return known[1]

    def render_fresh_row(self, row: ServiceRow, reader: Reader, history: History) -> str:
        return self.fill_ages(self.render_row(row, reader, history), reader)

    @staticmethod
    def respond_text(text: str, name: str) -> web.Response:
        """Return a text file to be saved."""
        quoted = quote(name)
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quoted}", "Cache-Control": "no-store"}
        return web.Response(text=text, content_type="text/plain", charset="utf-8", headers=headers)

    def fill_ages(self, text: str, reader: Reader) -> str:
        """Fill in how long ago the times are that `age` has left in the text."""
        words, now = shipped_templates(reader.language).words, self.unix_now()

        def fill(match: re.Match[str]) -> str:
            seconds = max(0.0, now - float(match[2]))
            return format_duration(words, seconds) if match[1] == "\x02" else f"{seconds:.1f}"

        return _AGE.sub(fill, text)

    def unix_now(self) -> float:
        clock = self._database.clock
        return clock.unix(clock.now())

    def _helpers(self, reader: Reader) -> dict[str, Any]:
        inventory, clock = self._database.inventory, self._database.clock
        templates, notify, texts = shipped_templates(reader.language), inventory.notify, reader.texts
        words = templates.words
        zone = ZoneInfo(notify.timezone)

        def format_unix(at: float | None) -> str:
            if at is None:
                return ""
            return datetime.fromtimestamp(max(EARLIEST, min(at, LATEST)), zone).strftime("%Y-%m-%d %H:%M:%S")

        def format_time(at: float | None) -> str:
            return "" if at is None else format_unix(clock.unix(at))

        def mark_time(at: float | None) -> Markup:
            """Return a Unix time as an element, which scripts know."""
            if at is None:
                return Markup("")
            return Markup('<time datetime="{}">{}</time>').format(f"{at:.0f}", format_unix(at))

        def mark_age(at: float | None) -> Markup:
            """Return how long ago a Unix time is as an element that scripts keep up to date."""
            if at is None:
                return Markup("")
            return Markup(
                '<span class="age" data-since="{}" data-age="\x04{}\x03" title="{}">\x02{}\x03</span>'
            ).format(f"{at:.1f}", f"{at:.1f}", format_unix(at), f"{at:.1f}")

        def format_length(incident: Mapping[str, Any]) -> str:
            ended = incident["closed_at"] or clock.now()
            return format_duration(words, ended - (incident["down_at"] or incident["opened_at"]))

        def name_service(service: str) -> str:
            subject = inventory.find_subject(service)
            return subject.title if subject is not None else service

        return {
            "words": words, "texts": texts, "language": HTML_LANGUAGE[reader.language], "reader": reader,
            "time": format_time, "unix_time": mark_time, "age": mark_age, "duration": format_length,
            "seconds": lambda seconds: format_duration(words, seconds), "zone": notify.timezone,
            "unix": lambda at: None if at is None else clock.unix(at), "service_name": name_service,
            "summary": lambda annotations: annotations_in_language(annotations, reader.language).get("summary", ""),
            "describe": lambda row, words=words: describe_event(
                words, row["event"], translation.translate_entry(texts, words, row["detail"])
            ),
            "host_alert_words": templates.host_alert_words, "is_host_alert": is_host_alert,
            "kind_name": partial(name_kind, words),
            "person": partial(translation.translate_person, texts),
            "failure": partial(translate_failure, words),
            "detail": partial(translation.translate_detail, texts, words),
            "translated": partial(translation.translate_event, texts, words),
        }  # fmt: skip


def _escape(value: object) -> object:
    """Escape characters that could hide or reorder text."""
    return escape_controls(value) if type(value) is str else value


def _fill(text: str, *values: object) -> Markup:
    """Return a text with values in it, which are escaped unless they are elements."""
    return escape(text).format(*map(_escape, values))


@lru_cache(maxsize=1)
def static_version() -> str:
    """Return a digest of all static files, which their addresses contain so that browsers may keep them."""
    digest = hashlib.sha256()
    for path in sorted(STATIC.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]

"""Rendering of pages: templates, words in the language of the inventory, times in its time zone."""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from remediator.http.views import may_read_evidence, remove_evidence
from remediator.notifications.content import annotations_in_language
from remediator.notifications.rendering import describe_event, format_duration, shipped_templates
from remediator.record.database import Database
from runtime.access.control import find_identity, get_csrf_token
from runtime.redaction import Redactor
from runtime.terminal import escape_controls
from runtime.web import relative_path

# The pages load nothing and run no scripts. `same-origin`: without a referrer, browsers send forms with `Origin: null`.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def _escape(value: object) -> object:
    """Escape characters that could hide or reorder text."""
    return escape_controls(value) if type(value) is str else value


class PageRenderer:
    def __init__(self, database: Database, redact: Redactor) -> None:
        self._database, self._redact = database, redact
        loader = PackageLoader("remediator", "console")
        self._templates = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_escape
        )

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
        visible = self._redact.redact_all(values if shows_evidence else remove_evidence(values))
        common = {
            "shows_evidence": shows_evidence, "identity": identity, "csrf": get_csrf_token(request),
            "root": relative_path(request, ""),
        }  # fmt: skip
        text = await asyncio.to_thread(self._render, template, {**visible, **sent, **common})
        return web.Response(text=text, status=status, content_type="text/html", headers=_HEADERS)

    def _render(self, template: str, values: Mapping[str, Any]) -> str:
        inventory, clock = self._database.inventory, self._database.clock
        notify, words = inventory.notify, shipped_templates(inventory).words
        zone = ZoneInfo(notify.timezone)

        def format_time(at: float | None) -> str:
            return "" if at is None else datetime.fromtimestamp(clock.unix(at), zone).strftime("%Y-%m-%d %H:%M:%S")

        def format_age(incident: Mapping[str, Any]) -> str:
            ended = incident["closed_at"] or clock.now()
            return format_duration(words, ended - (incident["down_at"] or incident["opened_at"]))

        def name_service(service: str) -> str:
            return inventory.services[service].title if service in inventory.services else service

        return self._templates.get_template(template).render(
            **values, words=words, language=notify.language, time=format_time, duration=format_age,
            service_name=name_service,
            summary=lambda annotations: annotations_in_language(annotations, notify.language).get("summary", ""),
            describe=lambda row: describe_event(words, row["event"], row["detail"]),
        )  # fmt: skip

"""The timeline of all events over HTTP, as JSON or CSV."""

import asyncio
import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import structlog
from aiohttp import hdrs, web

from remediator.http.views import format_times, may_read_evidence, read_record
from remediator.record.database import Database
from remediator.record.event_pages import EventPage, Position, page_of_events
from remediator.record.event_sources import KINDS, EventFilter
from runtime.access.control import AUTOMATIC, get_identity
from runtime.access.roles import AccessRequirement, permits
from runtime.clock import SteadyClock
from runtime.errors import ApiError
from runtime.redaction import Redactor
from runtime.terminal import escape_controls
from runtime.web import add_route

DEFAULT_PAGE, MAX_PAGE = 50, 1000
MAX_EXPORT = 10_000  # rows of a CSV file
MAX_VALUE = 200  # characters of a parameter
PARAMETERS = ("limit", "before", "kind", "host", "service", "text", "from", "to", "format")
COLUMNS = (
    "at", "last_at", "kind", "host", "name", "state", "operation", "detail", "by", "times", "incident", "action",
)  # fmt: skip
# How a spreadsheet recognizes a formula; full-width signs are those of some Asian versions.
_FORMULA = re.compile("[=+\\-@\t\r\n＝＋－＠]")
log = structlog.get_logger()


@dataclass(frozen=True)
class EventsQuery:
    wanted: EventFilter
    before: Position | None
    limit: int
    as_csv: bool


def add_routes(app: web.Application, database: Database, redact: Redactor) -> None:
    api = _EventsApi(database, redact)
    add_route(app, "GET", "/api/v1/events", api.read_events, AccessRequirement.VIEWER)


class _EventsApi:
    def __init__(self, database: Database, redact: Redactor) -> None:
        self._database, self._redact = database, redact

    async def read_events(self, request: web.Request) -> web.StreamResponse:
        query = parse_events_query(request, self._database.clock)
        page = await self._read(query, min(query.limit, MAX_PAGE))
        if query.as_csv:
            return await self._export(request, query, page)
        body = await asyncio.to_thread(self._render_json, page)
        return web.Response(body=body, content_type="application/json")

    async def _read(self, query: EventsQuery, limit: int) -> EventPage:
        return await read_record(self._database, page_of_events, query.wanted, query.before, limit)

    async def _export(self, request: web.Request, query: EventsQuery, page: EventPage) -> web.StreamResponse:
        """Send pages as one CSV file. The first is read before, so that an error is a response."""
        headers = {
            "Content-Type": "text/csv; charset=utf-8",
            "Content-Disposition": 'attachment; filename="events.csv"',
        }
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        if request.method == hdrs.METH_HEAD:
            return response
        # Excel takes a file without the mark for one in the encoding of the country.
        await response.write(b"\xef\xbb\xbf" + _format_csv([COLUMNS]))
        left = query.limit - len(page.rows)
        await response.write(await asyncio.to_thread(self._render_csv, page))
        while page.next is not None and left > 0:
            try:
                page = await self._read(replace(query, before=page.next), min(left, MAX_PAGE))
            except ApiError as error:
                log.warning("export_not_completed", error=error.message)
                if request.transport is not None:
                    request.transport.abort()  # so that the client does not take a part for the whole
                return response
            left -= len(page.rows)
            await response.write(await asyncio.to_thread(self._render_csv, page))
        await response.write_eof()
        return response

    def _render_json(self, page: EventPage) -> bytes:
        following = None if page.next is None else page.next.format()
        return json.dumps({"events": self._present(page), "next": following}).encode()

    def _render_csv(self, page: EventPage) -> bytes:
        rows = self._present(page)
        return _format_csv([[_format_cell(row[name]) for name in COLUMNS] for row in rows])

    def _present(self, page: EventPage) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._redact.redact_all(format_times(list(page.rows), self._database.clock))
        return rows


def _format_csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _format_cell(value: Any) -> Any:
    """Return a value for a cell that no spreadsheet evaluates, with control characters escaped."""
    if not isinstance(value, str):
        return value
    text = escape_controls(value)
    return f"'{text}" if _FORMULA.match(text) else text


def parse_events_query(request: web.Request, clock: SteadyClock) -> EventsQuery:
    """Return what the query of a request asks for. Empty parameters, as forms send them, count as absent."""
    values = {name: _get(request, name) for name in PARAMETERS if name != "kind"}
    unknown = sorted(set(request.query) - {*PARAMETERS, AUTOMATIC})
    if unknown:
        raise _bad(f"unknown parameter `{unknown[0][:MAX_VALUE]}`; there are {', '.join(PARAMETERS)}")
    if values["format"] not in ("", "json", "csv"):
        raise _bad("`format` must be json or csv")
    as_csv = values["format"] == "csv"
    wanted = EventFilter(
        kinds=_parse_kinds(request.query.getall("kind", [])),
        host=values["host"],
        service=values["service"],
        text=values["text"],
        since=_parse_time("from", values["from"], clock),
        until=_parse_time("to", values["to"], clock),
        with_audit=permits(get_identity(request).role, AccessRequirement.ADMIN),
        with_evidence=may_read_evidence(request),
    )
    if wanted.since is not None and wanted.until is not None and wanted.since >= wanted.until:
        raise _bad("`from` must be before `to`")
    limit = _parse_limit(values["limit"], *((MAX_EXPORT, MAX_EXPORT) if as_csv else (DEFAULT_PAGE, MAX_PAGE)))
    return EventsQuery(wanted, _parse_position(values["before"]), limit, as_csv)


def _get(request: web.Request, name: str) -> str:
    values = request.query.getall(name, [""])
    if len(values) > 1:
        raise _bad(f"`{name}` is given {len(values)} times")
    if len(values[0]) > MAX_VALUE:
        raise _bad(f"`{name}` has more than {MAX_VALUE} characters")
    return values[0]


def _parse_kinds(values: Sequence[str]) -> frozenset[str]:
    """Return the kinds of all parameters `kind`, each of which may have several, separated by commas."""
    kinds = {kind for value in values for kind in value.split(",") if kind}
    unknown = sorted(kinds.difference(KINDS))
    if unknown:
        raise _bad(f"unknown kind {unknown[0][:MAX_VALUE]!r}; there are {', '.join(KINDS)}")
    return frozenset(kinds)


def _parse_time(name: str, text: str, clock: SteadyClock) -> float | None:
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        example = "2026-11-24T18:00:00Z or 2026-11-24T18:00:00%2B08:00"
        raise _bad(f"`{name}` must be a time with its zone, such as {example}; a + must be written as %2B")
    return clock.from_unix(at.timestamp())


def _parse_position(text: str) -> Position | None:
    try:
        return Position.parse(text) if text else None
    except ValueError:
        raise _bad("`before` must be `next` of the page before") from None


def _parse_limit(text: str, default: int, maximum: int) -> int:
    if not text:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(maximum)) or not 0 < int(text) <= maximum:
        raise _bad(f"`limit` must be a number from 1 to {maximum}")
    return int(text)


def _bad(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)

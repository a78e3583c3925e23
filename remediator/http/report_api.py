"""Reports over HTTP, as JSON."""

import asyncio
import json

from aiohttp import web

from fleet.inventory.units import format_duration, parse_duration
from remediator.record.database import Database, StorageError
from remediator.reports.description import describe
from remediator.reports.reporter import Reporter
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.redaction import Redactor
from runtime.web import add_route

DEFAULT_SPAN, SHORTEST_SPAN = "7d", 60.0
MOST_CHARACTERS = 30  # of a parameter


def add_routes(app: web.Application, reporter: Reporter, database: Database, redact: Redactor) -> None:
    async def read_report(request: web.Request) -> web.Response:
        span = _parse_span(request, database.inventory.remediator.retention)
        try:
            report = await reporter.report_last(span)
        except StorageError as error:
            raise ApiError(503, "not_stored", "cannot read the record") from error
        except TimeoutError as error:
            raise ApiError(503, "busy", "other reports are being made; try again later") from error
        text = await asyncio.to_thread(lambda: json.dumps(redact.redact_all(describe(report))))
        return web.json_response(text=text)

    add_route(app, "GET", "/api/v1/report", read_report, AccessRequirement.VIEWER)


def _parse_span(request: web.Request, longest: float) -> float:
    """Return the span of a request in seconds. Raises ApiError."""
    unknown = [name for name in request.query if name != "since"]
    values = request.query.getall("since", [DEFAULT_SPAN])
    if unknown or len(values) > 1:
        raise ApiError(400, "bad_request", "the only parameter is `since`, once")
    try:
        span = parse_duration(values[0][:MOST_CHARACTERS])
    except ValueError as error:
        raise ApiError(400, "bad_request", f"`since`: {error}") from error
    if not SHORTEST_SPAN <= span <= longest:
        limits = f"from {format_duration(SHORTEST_SPAN)} to {format_duration(longest)} (remediator.retention)"
        raise ApiError(400, "bad_request", f"`since` must be {limits}")
    return span

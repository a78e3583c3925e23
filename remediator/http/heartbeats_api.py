"""Heartbeats as the exporter knows them, for pages, the API and commands; their URLs; pings of people."""

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from fleet.inventory.model import Inventory
from fleet.json_client import ClientError, HttpStatusError, parsing_response
from fleet.pings import PingBody
from remediator.http.views import respond
from remediator.http.write_api import translating_errors
from remediator.operations import Operations
from remediator.record.database import Database
from remediator.snapshot import SnapshotSource
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.redaction import Redactor
from runtime.request_bodies import parse_request
from runtime.times import format_rfc3339
from runtime.web import add_route

ORDER = ("failed", "late", "waiting", "up")  # of statuses in lists
NOT_FOUND = 404


def add_routes(
    app: web.Application, source: SnapshotSource, operations: Operations, database: Database, redact: Redactor
) -> None:
    api = _HeartbeatsApi(source, operations, database, redact)
    one = "/api/v1/heartbeats/{id}"
    add_route(app, "GET", "/api/v1/heartbeats", api.read_all, AccessRequirement.VIEWER)
    add_route(app, "GET", one, api.read_one, AccessRequirement.VIEWER)
    add_route(app, "DELETE", one, translating_errors(api.remove), AccessRequirement.OPERATOR)
    add_route(app, "GET", f"{one}/urls", translating_errors(api.read_urls), AccessRequirement.OPERATOR)
    add_route(app, "POST", f"{one}/ping", translating_errors(api.ping), AccessRequirement.OPERATOR)


async def read_heartbeats(source: SnapshotSource) -> Sequence[Mapping[str, Any]]:
    """Return all heartbeats, those that failed or are late first. Raises ClientError."""
    answer = await source.read_from_exporter("/api/v1/heartbeats")
    with parsing_response():
        return sorted(answer["heartbeats"], key=lambda each: (ORDER.index(each["status"]), each["service"]))


async def read_heartbeat(source: SnapshotSource, inventory: Inventory, service: str) -> Mapping[str, Any]:
    """Return a heartbeat with its last pings, newest first. Raises ApiError if there is none, and ClientError."""
    unknown = ApiError(404, "unknown_heartbeat", f"the inventory has no heartbeat {service!r}")
    if service not in inventory.services and not inventory.exporter.heartbeats.may_create(
        service
    ):  # which could be another path of the exporter's
        raise unknown
    try:
        return await source.read_from_exporter(f"/api/v1/heartbeats/{service}")
    except HttpStatusError as error:
        if error.status == NOT_FOUND:
            raise unknown from error
        raise


class _HeartbeatsApi:
    def __init__(self, source: SnapshotSource, operations: Operations, database: Database, redact: Redactor) -> None:
        self._source, self._operations, self._database, self._redact = source, operations, database, redact

    async def read_all(self, request: web.Request) -> web.Response:
        try:
            found = list(await read_heartbeats(self._source))
        except ClientError as error:
            raise _unreachable(error) from error
        clock = self._database.clock
        rows = {"at": format_rfc3339(clock.unix(clock.now())), "heartbeats": found}
        return await respond(request, rows, self._redact, clock)

    async def read_one(self, request: web.Request) -> web.Response:
        """Return a heartbeat with its pings; what they have sent is evidence."""
        try:
            found = await read_heartbeat(self._source, self._database.inventory, request.match_info["id"])
        except ClientError as error:
            raise _unreachable(error) from error
        return await respond(request, dict(found), self._redact, self._database.clock)

    async def read_urls(self, request: web.Request) -> web.Response:
        """Return the URLs of a heartbeat. They are not masked here: they are what was asked for."""
        return web.json_response(
            await self._operations.reveal_ping_urls(request.match_info["id"], get_identity(request))
        )

    async def remove(self, request: web.Request) -> web.Response:
        """Remove a heartbeat that a job has created."""
        name = request.match_info["id"]
        await self._operations.remove_heartbeat(name, get_identity(request))
        return web.json_response({"service": name})

    async def ping(self, request: web.Request) -> web.Response:
        service, body = request.match_info["id"], await parse_request(request, PingBody)
        sent = await self._operations.ping(service, body.kind, body.exit_status, body.message, get_identity(request))
        return web.json_response({"service": service, "kind": sent, "exit_status": body.exit_status})


def _unreachable(error: ClientError) -> ApiError:
    return ApiError(502, "exporter_unreachable", f"cannot read the exporter's heartbeats: {error}")

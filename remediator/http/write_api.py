"""Operations over HTTP: parse the request, call the operation, translate its errors to status codes."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field

from fleet.inventory.units import MAX_DURATION, PositiveDuration
from fleet.shells import CompletedCommand
from remediator.execution.controls.runner import Verb
from remediator.http.views import describe_automation, format_times, read_record
from remediator.operations import (
    ConflictError,
    HostUnreachableError,
    InvalidOperationError,
    NotFoundError,
    OperationError,
    Operations,
    UnavailableError,
)
from remediator.record import maintenance
from remediator.record.automation import AutomationSwitch, read_switch
from remediator.record.database import Database
from remediator.record.queries import Subject
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError, DefibError
from runtime.redaction import Redactor
from runtime.request_bodies import RequestBody, parse_request
from runtime.times import format_rfc3339
from runtime.web import add_route

VIEWER, OPERATOR, ADMIN = AccessRequirement.VIEWER, AccessRequirement.OPERATOR, AccessRequirement.ADMIN
STATUS_OF: dict[type[OperationError], int] = {
    InvalidOperationError: 400,
    NotFoundError: 404,
    ConflictError: 409,
    HostUnreachableError: 502,
    UnavailableError: 503,
}


Comment = Annotated[str, Field(max_length=300)]


class _ActionBody(RequestBody):
    overrule: list[str] = Field(default_factory=list)
    reason: Comment = ""


class _AutomationBody(RequestBody):
    enabled: bool
    reason: Comment = ""


class _ContinueBody(RequestBody):
    reason: Comment = ""


class _NoteBody(RequestBody):
    text: Annotated[str, Field(min_length=1, max_length=1000)]


class _SilenceBody(RequestBody):
    for_: PositiveDuration = Field(alias="for")
    comment: Comment = ""


class _MaintenanceBody(RequestBody):
    """Maintenance `for` a duration or `until` a time in RFC 3339.

    With `notify`, notifications mention people; with `pause_probing`, services are probed only on request.
    """

    scope: Literal["service", "host", "group"]
    name: Annotated[str, Field(max_length=200)]
    reason: Annotated[str, Field(min_length=1, max_length=300)]
    for_: PositiveDuration | None = Field(None, alias="for")
    until: datetime | None = None
    notify: bool = False
    pause_probing: bool = False


def add_routes(
    app: web.Application,
    operations: Operations,
    database: Database,
    redact: Redactor,
    reload: Callable[[], Awaitable[None]],
) -> None:
    api = _WriteApi(operations, database, redact, reload)
    service, action = "/api/v1/services/{id}", "/api/v1/actions/{number:[0-9]{1,15}}"
    subject = "/api/v1/{subject:incident|alert}s/{number:[0-9]{1,15}}"
    for method, path, handler, needs in (
        ("POST", "/-/reload", api.reload, ADMIN),
        ("POST", f"{service}/{{verb:start|stop|restart}}", api.start_action, OPERATOR),
        ("POST", f"{service}/components/{{component:[^/]+}}/restart", api.restart_component, OPERATOR),
        ("GET", f"{service}/{{verb:status|logs}}", api.read_from_host, OPERATOR),
        ("POST", f"{service}/reset", api.reset_attempts, OPERATOR),
        ("POST", f"{service}/continue-in-storm", api.continue_in_storm, OPERATOR),
        ("GET", f"{service}/explain", api.explain, VIEWER),
        ("POST", f"{action}/approve", api.approve, OPERATOR),
        ("POST", f"{subject}/acknowledge", api.acknowledge, OPERATOR),
        ("POST", f"{subject}/silence", api.silence, OPERATOR),
        ("POST", "/api/v1/incidents/{number:[0-9]{1,15}}/notes", api.add_note, OPERATOR),
        ("POST", "/api/v1/channels/{name}/test", api.test_channel, OPERATOR),
        ("GET", "/api/v1/automation", api.read_automation, VIEWER),
        ("PUT", "/api/v1/automation", api.switch_automation, ADMIN),
        ("GET", "/api/v1/maintenance", api.read_maintenance, VIEWER),
        ("POST", "/api/v1/maintenance", api.begin_maintenance, OPERATOR),
        ("DELETE", "/api/v1/maintenance/{number:[0-9]{1,15}}", api.end_maintenance, OPERATOR),
    ):
        add_route(app, method, path, translating_errors(handler), needs)


def translating_errors(
    handler: Callable[[web.Request], Awaitable[web.Response]],
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except OperationError as error:
            status = next(status for kind, status in STATUS_OF.items() if isinstance(error, kind))
            raise ApiError(status, error.code, str(error)) from error

    return handle


class _WriteApi:
    def __init__(
        self,
        operations: Operations,
        database: Database,
        redact: Redactor,
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._operations, self._database, self._redact, self._reload = operations, database, redact, reload

    async def reload(self, request: web.Request) -> web.Response:
        try:
            await self._operations.reload(self._reload, get_identity(request))
        except DefibError as error:
            message = f"the previous configuration stays in force: {error}"
            raise ApiError(400, "bad_configuration", message) from error
        return web.json_response({"services": len(self._database.inventory.services)})

    async def start_action(self, request: web.Request) -> web.Response:
        service, verb = request.match_info["id"], _verb(request)
        body = await parse_request(request, _ActionBody)
        claimed = await self._operations.start_action(service, verb, body.overrule, get_identity(request), body.reason)
        return web.json_response({"action": claimed.id, "service": service, "kind": verb}, status=202)

    async def restart_component(self, request: web.Request) -> web.Response:
        service, component = request.match_info["id"], request.match_info["component"]
        body = await parse_request(request, _ActionBody)
        claimed = await self._operations.restart_component(service, component, body.overrule, get_identity(request))
        return web.json_response({"action": claimed.id, "service": service, "kind": claimed.kind}, status=202)

    async def read_from_host(self, request: web.Request) -> web.Response:
        service, verb = request.match_info["id"], _verb(request)
        completed = await self._operations.read_from_host(service, verb, get_identity(request))
        return web.json_response(self._redact.redact_all(command_result(service, verb, completed)))

    async def reset_attempts(self, request: web.Request) -> web.Response:
        service = request.match_info["id"]
        number = await self._operations.reset_attempts(service, get_identity(request))
        return web.json_response({"action": number, "service": service})

    async def continue_in_storm(self, request: web.Request) -> web.Response:
        body = await parse_request(request, _ContinueBody)
        service = request.match_info["id"]
        group, until = await self._operations.continue_in_storm(service, get_identity(request), body.reason)
        return web.json_response(format_times({"group": group, "until": until}, self._database.clock))

    async def explain(self, request: web.Request) -> web.Response:
        explanation = await self._operations.explain(request.match_info["id"])
        return web.json_response(self._redact.redact_all(format_times(explanation, self._database.clock)))

    async def approve(self, request: web.Request) -> web.Response:
        number = _number(request)
        await self._operations.approve(number, get_identity(request))
        return web.json_response({"action": number, "approved": True})

    async def acknowledge(self, request: web.Request) -> web.Response:
        subject, number = _subject(request), _number(request)
        acknowledged = await self._operations.acknowledge(subject, number, get_identity(request))
        row = {"id": number, "acknowledged_by": acknowledged.by, "acknowledged_at": acknowledged.at}
        return web.json_response(format_times(row, self._database.clock))

    async def add_note(self, request: web.Request) -> web.Response:
        number, body = int(request.match_info["number"]), await parse_request(request, _NoteBody)
        await self._operations.add_note(number, body.text, get_identity(request))
        return web.json_response({"incident": number}, status=201)

    async def silence(self, request: web.Request) -> web.Response:
        subject, number = _subject(request), _number(request)
        body = await parse_request(request, _SilenceBody)
        until = await self._operations.silence(subject, number, body.for_, get_identity(request), body.comment)
        return web.json_response({"id": number, "until": format_rfc3339(until)})

    async def test_channel(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        result = await self._operations.test_channel(name, get_identity(request))
        row = {"channel": name, "sent": result.outcome == "sent", "response": result.response}
        return web.json_response(self._redact.redact_all(row))

    async def read_automation(self, _request: web.Request) -> web.Response:
        return web.json_response(self._automation(await read_record(self._database, read_switch)))

    async def switch_automation(self, request: web.Request) -> web.Response:
        body = await parse_request(request, _AutomationBody)
        switched = await self._operations.switch_automation(
            enabled=body.enabled, by=get_identity(request), reason=body.reason
        )
        return web.json_response(self._automation(switched))

    def _automation(self, switch: AutomationSwitch) -> dict[str, Any]:
        row = describe_automation(switch, self._database.inventory)
        return dict(format_times(row, self._database.clock))

    async def read_maintenance(self, _request: web.Request) -> web.Response:
        rows = await read_record(self._database, maintenance.current)
        return web.json_response({"maintenance": format_times(rows, self._database.clock)})

    async def begin_maintenance(self, request: web.Request) -> web.Response:
        body = await parse_request(request, _MaintenanceBody)
        number, until = await self._operations.begin_maintenance(
            body.scope, body.name, seconds=self._duration(body), reason=body.reason, by=get_identity(request),
            notify=body.notify, pause_probing=body.pause_probing,
        )  # fmt: skip
        return web.json_response(format_times({"id": number, "until": until}, self._database.clock), status=201)

    def _duration(self, body: _MaintenanceBody) -> float:
        """Return the seconds from now until the maintenance ends. Raises ApiError."""
        if body.for_ is not None and body.until is None:
            return body.for_
        if body.until is None or body.for_ is not None:
            raise ApiError(400, "bad_request", "set either `for` or `until`")
        if body.until.tzinfo is None:
            raise ApiError(400, "bad_request", "until: the time zone is missing (write 2026-11-24T18:00:00+08:00)")
        clock = self._database.clock
        try:
            at = body.until.timestamp()
        except OverflowError as error:
            raise ApiError(400, "bad_request", "until: the time is out of range") from error
        seconds = at - clock.unix(clock.now())
        if seconds <= 0:
            raise ApiError(400, "bad_request", "until: the time is in the past")
        if seconds > MAX_DURATION:
            raise ApiError(400, "bad_request", "until: the time is more than a year away")
        return seconds

    async def end_maintenance(self, request: web.Request) -> web.Response:
        number = _number(request)
        await self._operations.end_maintenance(number, get_identity(request))
        return web.json_response({"id": number})


def command_result(service: str, verb: Verb, completed: CompletedCommand) -> dict[str, Any]:
    """Return the result of a control's command as the API and the command line print it."""
    return {
        "service": service,
        "verb": verb,
        "exit_status": completed.status,
        "why": completed.why,
        "output": completed.output,
    }


def _verb(request: web.Request) -> Verb:
    verb: Verb = request.match_info["verb"]  # type: ignore[assignment] # the route matches only verbs
    return verb


def _subject(request: web.Request) -> Subject:
    subject: Subject = request.match_info["subject"]  # type: ignore[assignment] # the route matches only subjects
    return subject


def _number(request: web.Request) -> int:
    return int(request.match_info["number"])

"""What people may do over HTTP: controls by hand, approvals, switches, and asking why."""

import json
from collections.abc import Collection
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import structlog
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet.inventory.model import Service
from fleet.inventory.units import MAX_DURATION, PositiveDuration
from fleet.shells import Completed, ShellError
from remediator.engine.engine import Engine
from remediator.execution.controls.context import UnknownVerb, Verb
from remediator.incidents import actions, intake, lifecycle
from remediator.incidents.actions import Claim
from remediator.metrics import Metrics
from remediator.policy import FOR_PEOPLE, LOCKS, Decision
from remediator.record import queries, switches
from remediator.record.database import Database, StorageError
from runtime.redaction import Redactor
from runtime.web import ApiError, Requirement, add_route, get_caller

log = structlog.get_logger()


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Action(_Asked):
    overrule: list[str] = Field(default_factory=list)


Reason = Annotated[str, Field(max_length=300)]


class _Automation(_Asked):
    enabled: bool
    reason: Reason = ""


class _Maintenance(_Asked):
    """Of one service, host or group: `for` so long, or `until` a time in RFC 3339; with `notify` people are called."""

    scope: Literal["service", "host", "group"]
    name: str
    reason: Annotated[str, Field(min_length=1, max_length=300)]
    for_: PositiveDuration | None = Field(None, alias="for")
    until: datetime | None = None
    notify: bool = False


A = TypeVar("A", bound=_Asked)


def add_routes(app: web.Application, engine: Engine, database: Database, metrics: Metrics, redact: Redactor) -> None:
    people = _People(engine, database, metrics, redact)
    service, action = "/api/v1/services/{id}", "/api/v1/actions/{number:[0-9]{1,15}}"
    add_route(app, "POST", f"{service}/{{verb:start|stop|restart}}", people.act, Requirement.CREDENTIAL)
    add_route(app, "GET", f"{service}/{{verb:status|logs}}", people.ask, Requirement.CREDENTIAL)
    add_route(app, "POST", f"{service}/reset", people.reset, Requirement.CREDENTIAL)
    add_route(app, "GET", f"{service}/explain", people.explain, Requirement.CREDENTIAL)
    add_route(app, "POST", f"{action}/approve", people.approve, Requirement.CREDENTIAL)
    acknowledging = "/api/v1/{what:incidents|alerts}/{number:[0-9]{1,15}}/acknowledge"
    add_route(app, "POST", acknowledging, people.acknowledge, Requirement.CREDENTIAL)
    add_route(app, "GET", "/api/v1/automation", people.automation, Requirement.READ)
    add_route(app, "PUT", "/api/v1/automation", people.switch_automation, Requirement.CREDENTIAL)
    add_route(app, "GET", "/api/v1/maintenance", people.maintenances, Requirement.READ)
    add_route(app, "POST", "/api/v1/maintenance", people.begin_maintenance, Requirement.CREDENTIAL)
    add_route(app, "DELETE", "/api/v1/maintenance/{number:[0-9]{1,15}}", people.end_maintenance, Requirement.CREDENTIAL)


class _People:
    def __init__(self, engine: Engine, database: Database, metrics: Metrics, redact: Redactor) -> None:
        self._engine, self._database, self._metrics, self._redact = engine, database, metrics, redact

    async def act(self, request: web.Request) -> web.Response:
        verb: Verb = request.match_info["verb"]  # type: ignore[assignment] # the route admits only verbs
        service = self._controlled(request)
        asked = await _read(request, _Action)
        unknown = sorted({*asked.overrule} - FOR_PEOPLE)
        if unknown:
            may = ", ".join(sorted(FOR_PEOPLE))
            raise ApiError(400, "bad_request", f"{', '.join(unknown)} cannot be overruled (there are {may})")
        try:
            claimed = await self._engine.act_for_person(service, verb, asked.overrule, get_caller(request))
        except UnknownVerb as error:
            raise ApiError(400, "unknown_verb", str(error)) from error
        except StorageError as error:
            raise ApiError(503, "not_stored", "the record cannot be written: nothing was begun") from error
        if claimed == "stopping":
            raise ApiError(503, "stopping", "the remediator is being stopped")
        if isinstance(claimed, Decision):
            raise _held(claimed)
        assert isinstance(claimed, Claim)  # noqa: S101 - nothing else is left
        return web.json_response({"action": claimed.id, "service": service.id, "kind": verb}, status=202)

    async def ask(self, request: web.Request) -> web.Response:
        verb: Verb = request.match_info["verb"]  # type: ignore[assignment] # the route admits only verbs
        service = self._controlled(request)
        try:
            done = await self._engine.actor.command(service, verb)
        except UnknownVerb as error:
            raise ApiError(400, "unknown_verb", str(error)) from error
        except ShellError as error:
            raise ApiError(502, "unreachable", str(error)) from error
        return web.json_response(self._redact.redact_all(told(service.id, verb, done)))

    async def reset(self, request: web.Request) -> web.Response:
        service = self._controlled(request)
        number = await self._stored(actions.reset, service, get_caller(request), self._database.clock.now())
        log.info("attempts reset", service=service.id, by=get_caller(request))
        self._engine.wake()
        return web.json_response({"action": number, "service": service.id})

    async def explain(self, request: web.Request) -> web.Response:
        told = await self._engine.explain(self._service(request))
        for gate in told["gates"]:
            gate["until"] = queries.shown({"until": gate["until"]}, self._database.clock)["until"]
        return web.json_response(self._redact.redact_all(told))

    async def approve(self, request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        outcome = await self._stored(actions.approve, number, get_caller(request), self._database.clock.now())
        if outcome == "unknown":
            raise ApiError(404, "unknown_action", "there is no such action")
        if outcome == "not-queued":
            raise ApiError(409, "not_queued", "the action does not wait for approval (any more)")
        log.info("approved", action=number, by=get_caller(request))
        self._engine.wake()
        return web.json_response({"action": number, "approved": True})

    async def acknowledge(self, request: web.Request) -> web.Response:
        what, number = request.match_info["what"], int(request.match_info["number"])
        work = lifecycle.acknowledge if what == "incidents" else intake.acknowledge
        row = await self._stored(work, number, get_caller(request), self._database.clock.now())
        if row is None:
            raise ApiError(404, f"unknown_{what[:-1]}", f"there is no such {what[:-1]}")
        if row.acknowledged_by is None:
            raise ApiError(409, "over", f"the {what[:-1]} is over")
        log.info("acknowledged", what=what, number=number, by=row.acknowledged_by)
        self._engine.wake(())
        told = {"acknowledged_by": row.acknowledged_by, "acknowledged_at": row.acknowledged_at}
        return web.json_response({"id": number, **queries.shown(told, self._database.clock)})

    async def automation(self, _request: web.Request) -> web.Response:
        return web.json_response(self._told(await self._stored(switches.automation)))

    async def switch_automation(self, request: web.Request) -> web.Response:
        asked = await _read(request, _Automation)
        now, notify = self._database.clock.now(), self._engine.inventory.notify

        def switch(connection: Any) -> switches.Automation:
            return switches.switch_automation(
                connection, notify, enabled=asked.enabled, by=get_caller(request), reason=asked.reason, now=now
            )

        switched = await self._stored(switch)
        log.warning("automation", enabled=asked.enabled, by=get_caller(request), reason=asked.reason)
        self._engine.wake()
        return web.json_response(self._told(switched))

    def _told(self, switch: switches.Automation) -> dict[str, Any]:
        automatic = self._engine.inventory.remediation.automatic
        told = {
            "enabled": switch.enabled and automatic, "by_inventory": automatic, "by_switch": switch.enabled,
            "at": switch.at, "by": switch.by, "reason": switch.reason,
        }  # fmt: skip
        return dict(queries.shown(told, self._database.clock))

    async def maintenances(self, _request: web.Request) -> web.Response:
        rows = await self._stored(switches.maintenances, self._database.clock.now())
        return web.json_response({"maintenance": queries.shown(rows, self._database.clock)})

    async def begin_maintenance(self, request: web.Request) -> web.Response:
        asked = await _read(request, _Maintenance)
        self._known(asked)
        now = self._database.clock.now()
        until = now + self._lasts(asked)

        def begin(connection: Any) -> int:
            return switches.begin_maintenance(
                connection, asked.scope, asked.name, until=until, reason=asked.reason, by=get_caller(request), now=now,
                notify=asked.notify,
            )  # fmt: skip

        number = await self._stored(begin)
        log.warning("maintenance", scope=asked.scope, name=asked.name, by=get_caller(request), reason=asked.reason)
        self._engine.wake()
        return web.json_response({"id": number, **queries.shown({"until": until}, self._database.clock)}, status=201)

    def _known(self, asked: _Maintenance) -> None:
        inventory = self._engine.inventory
        there: dict[str, Collection[str]] = {
            "service": inventory.services, "host": inventory.hosts,
            "group": {host.group for host in inventory.hosts.values() if host.group},
        }  # fmt: skip
        if asked.name not in there[asked.scope]:
            raise ApiError(404, f"unknown_{asked.scope}", f"the inventory has no {asked.scope} {asked.name!r}")

    def _lasts(self, asked: _Maintenance) -> float:
        """Seconds from now."""
        if (asked.for_ is None) is (asked.until is None):
            raise ApiError(400, "bad_request", "wants `for` or `until`")
        if asked.for_ is not None:
            return asked.for_
        assert asked.until is not None  # noqa: S101 - one of the two is there
        if asked.until.tzinfo is None:
            raise ApiError(400, "bad_request", "until: says no time zone (write 2026-11-24T18:00:00+08:00)")
        clock = self._database.clock
        try:
            at = asked.until.timestamp()
        except OverflowError as error:
            raise ApiError(400, "bad_request", "until: is no time") from error
        left = at - clock.unix(clock.now())
        if left <= 0:
            raise ApiError(400, "bad_request", "until: is over")
        if left > MAX_DURATION:
            raise ApiError(400, "bad_request", "until: is more than a year away")
        return left

    async def end_maintenance(self, request: web.Request) -> web.Response:
        number = int(request.match_info["number"])
        if not await self._stored(switches.end_maintenance, number, self._database.clock.now()):
            raise ApiError(404, "unknown_maintenance", "there is no such maintenance under way")
        log.warning("maintenance ended", number=number, by=get_caller(request))
        self._engine.wake()
        return web.json_response({"id": number})

    async def _stored(self, work: Any, *args: Any) -> Any:
        try:
            return await self._database.run(work, *args)
        except StorageError as error:
            raise ApiError(503, "not_stored", "the record cannot be written") from error

    def _service(self, request: web.Request) -> Service:
        service = self._engine.inventory.services.get(request.match_info["id"])
        if service is None:
            raise ApiError(404, "unknown_service", "the inventory has no such service")
        return service

    def _controlled(self, request: web.Request) -> Service:
        service = self._service(request)
        if service.control is None:
            raise ApiError(400, "no-control", "the inventory gives this service no control")
        return service


def _held(decision: Decision) -> ApiError:
    reason = decision.reason or ""
    detail = f": {decision.detail}" if decision.detail else ""
    if reason in LOCKS:
        why = f"{reason}: an action is under way there{detail}, which may still be verified"
        return ApiError(409, reason, f"{why}; see /api/v1/actions")
    return ApiError(409, reason, f"held back by {reason}{detail}; it can be overruled by that name")


def told(service: str, verb: Verb, done: Completed) -> dict[str, Any]:
    """A verb's outcome as the API and the command line tell it."""
    return {
        "service": service,
        "verb": verb,
        "exit_status": done.status,
        "why": done.why,
        "output": done.output,
    }


async def _read(request: web.Request, model: type[A]) -> A:
    """The request's JSON body; none is an empty one. Raises Problem."""
    text = await request.read()
    try:
        return model.model_validate(json.loads(text or b"{}"))
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        raise ApiError(400, "bad_request", f"{where}: {wrong['msg'].removeprefix('Value error, ')}") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "bad_request", "the body is not JSON") from error

"""The remediator over HTTP: the webhook, the record, actions by people."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web
from prometheus_client import generate_latest

from fleet.model import Service
from fleet.shells import Completed, ShellError
from remediator import incidents, intake, pages
from remediator.actions import Claim
from remediator.controls.hands import UnknownVerb, Verb
from remediator.database import Database, StorageError
from remediator.engine import Engine
from remediator.metrics import Metrics
from remediator.notices import outbox
from remediator.webhook import NotADelivery, TooManyAlerts, parse
from runtime.errors import DefibError
from runtime.redaction import Redactor
from runtime.times import rfc3339
from runtime.web import Needs, Problem, add_route

WEBHOOK = "/webhook/alertmanager"
PAGE = 100
log = structlog.get_logger()


def tell_refusals(metrics: Metrics) -> Callable[[web.Request, Problem], None]:
    """Count and log the deliveries that were refused, the unauthorized ones too."""

    def refused(request: web.Request, problem: Problem) -> None:
        if request.path == WEBHOOK:
            metrics.refusals.labels(str(problem.status)).inc()
            log.warning("delivery refused", status=problem.status, why=problem.message)

    return refused


def add_routes(
    app: web.Application,
    engine: Engine,
    database: Database,
    metrics: Metrics,
    redact: Redactor,
    reload: Callable[[], Awaitable[None]],
) -> None:
    api = _Api(engine, database, metrics, redact, reload)
    add_route(app, "POST", WEBHOOK, api.webhook, Needs.TOKEN)
    add_route(app, "GET", "/metrics", api.metrics, Needs.TOKEN)
    add_route(app, "POST", "/-/reload", api.reload, Needs.USER)
    add_route(app, "GET", "/api/v1/incidents", api.incidents, Needs.USER)
    add_route(app, "GET", "/api/v1/incidents/{id:[0-9]{1,15}}", api.incident, Needs.USER)
    add_route(app, "GET", "/api/v1/actions", api.actions, Needs.USER)
    add_route(app, "POST", "/api/v1/services/{id}/{verb:start|stop|restart}", api.act, Needs.USER)
    add_route(app, "GET", "/api/v1/services/{id}/{verb:status|logs}", api.ask, Needs.USER)


class _Api:
    def __init__(
        self,
        engine: Engine,
        database: Database,
        metrics: Metrics,
        redact: Redactor,
        reload: Callable[[], Awaitable[None]],
    ) -> None:
        self._engine, self._database, self._metrics, self._redact, self._reload = (
            engine, database, metrics, redact, reload,
        )  # fmt: skip

    async def webhook(self, request: web.Request) -> web.Response:
        try:
            alerts = parse(await _body(request))
            now = time.time()
            await self._database.run(intake.receive, alerts, self._engine.inventory, now)
        except NotADelivery as error:
            raise Problem(400, "not_a_delivery", str(error)) from error
        except (web.HTTPRequestEntityTooLarge, TooManyAlerts) as error:
            said = str(error) if isinstance(error, TooManyAlerts) else "the delivery is longer than 10 MiB"
            raise Problem(413, "too_large", said) from error
        except StorageError as error:
            raise Problem(503, "not_stored", "the delivery could not be stored; send it again") from error
        for alert in alerts:
            self._metrics.received.labels(alert.status).inc()
            if alert.name == intake.WATCHDOG:
                self._metrics.watchdog.set(now)
        services = self._engine.inventory.services
        unknown = sum(1 for alert in alerts if alert.labels.get("service", "") not in services)
        log.info("delivery", alerts=len(alerts), of_no_service_of_ours=unknown)
        self._engine.wake()
        return web.json_response({"alerts": len(alerts)})

    async def metrics(self, _request: web.Request) -> web.Response:
        counts, oldest = await self._database.run(
            lambda connection: (incidents.counts_by_state(connection), outbox.oldest_pending(connection))
        )
        for state in ("open", "recovered", "unobserved"):
            self._metrics.incidents.labels(state).set(counts.get(state, 0))
        self._metrics.outbox_oldest.set(max(0.0, time.time() - oldest) if oldest is not None else 0.0)
        self._metrics.automation.set(int(self._engine.inventory.remediation.automatic))
        return web.Response(
            body=generate_latest(self._metrics.registry),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def reload(self, _request: web.Request) -> web.Response:
        try:
            await self._reload()
        except DefibError as error:
            raise Problem(400, "bad_configuration", f"the old configuration stays: {error}") from error
        return web.json_response({"services": len(self._engine.inventory.services)})

    async def incidents(self, request: web.Request) -> web.Response:
        rows = await self._database.run(pages.page_of_incidents, _before(request), PAGE)
        return web.json_response({"incidents": [_shown(row) for row in rows]})

    async def incident(self, request: web.Request) -> web.Response:
        whole = await self._database.run(pages.whole_incident, int(request.match_info["id"]))
        if whole is None:
            raise Problem(404, "unknown_incident", "there is no such incident")
        return web.json_response(self._redact.within(_shown(whole)))

    async def actions(self, request: web.Request) -> web.Response:
        rows = await self._database.run(pages.page_of_actions, _before(request), PAGE)
        return web.json_response({"actions": [self._redact.within(_shown(row)) for row in rows]})

    async def act(self, request: web.Request) -> web.Response:
        verb: Verb = request.match_info["verb"]  # type: ignore[assignment] # the route admits only verbs
        service = self._controlled(request)
        try:
            claimed = await self._engine.actor.act_for_person(service, verb)
        except UnknownVerb as error:
            raise Problem(400, "unknown_verb", str(error)) from error
        if claimed == "stopping":
            raise Problem(503, "stopping", "the remediator is being stopped")
        if not isinstance(claimed, Claim):
            raise Problem(409, claimed, "an action is under way there; see /api/v1/actions")
        return web.json_response({"action": claimed.id, "service": service.id, "kind": verb}, status=202)

    async def ask(self, request: web.Request) -> web.Response:
        verb: Verb = request.match_info["verb"]  # type: ignore[assignment] # the route admits only verbs
        service = self._controlled(request)
        try:
            done = await self._engine.actor.command(service, verb)
        except UnknownVerb as error:
            raise Problem(400, "unknown_verb", str(error)) from error
        except ShellError as error:
            raise Problem(502, "unreachable", str(error)) from error
        return web.json_response(self._redact.within(told(service.id, verb, done)))

    def _controlled(self, request: web.Request) -> Service:
        service = self._engine.inventory.services.get(request.match_info["id"])
        if service is None:
            raise Problem(404, "unknown_service", "the inventory has no such service")
        if service.control is None:
            raise Problem(400, "no-control", "the inventory gives this service no control")
        return service


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except (web.RequestPayloadError, ConnectionError) as error:
        raise NotADelivery("the body cannot be read") from error


def told(service: str, verb: Verb, done: Completed) -> dict[str, Any]:
    """A verb's outcome as the API and the command line tell it."""
    return {
        "service": service,
        "verb": verb,
        "exit_status": done.status,
        "why": done.why,
        "output": done.output,
    }


def _before(request: web.Request) -> int | None:
    text = request.query.get("before")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 15:  # noqa: PLR2004 - ids are that small
        raise Problem(400, "bad_request", "`before` is the id of an entry")
    return int(text)


_TIMES = ("at", "proof_at", "first_seen", "last_seen")


def _shown(value: Any) -> Any:
    """A row with its times in RFC 3339."""
    if isinstance(value, dict):
        return {key: rfc3339(item) if _is_time(key, item) else _shown(item) for key, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, list) else value


def _is_time(key: str, value: Any) -> bool:
    return isinstance(value, float) and (key in _TIMES or key.endswith("_at"))

"""The remediator over HTTP: the webhook, its metrics, and reading the record."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import web
from prometheus_client import generate_latest
from sqlalchemy import Connection

from remediator.clients.webhook import WEBHOOK, NotADelivery, TooManyAlerts, parse
from remediator.engine.engine import Engine
from remediator.http import people
from remediator.incidents import intake, lifecycle
from remediator.metrics import Metrics
from remediator.notifications import outbox
from remediator.policy import Present
from remediator.record import queries, situations, switches, timestamps
from remediator.record.database import Database, StorageError
from runtime.errors import DefibError
from runtime.redaction import Redactor
from runtime.web import ApiError, Requirement, add_route, is_authenticated

PAGE = 100
log = structlog.get_logger()


def tell_refusals(metrics: Metrics) -> Callable[[web.Request, ApiError], None]:
    """Count and log the deliveries that were refused, the unauthorized ones too."""

    def refused(request: web.Request, problem: ApiError) -> None:
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
    add_route(app, "POST", WEBHOOK, api.webhook, Requirement.WEBHOOK)
    add_route(app, "GET", "/metrics", api.metrics, Requirement.SCRAPE)
    add_route(app, "POST", "/-/reload", api.reload, Requirement.CREDENTIAL)
    add_route(app, "GET", "/api/v1/incidents", api.incidents, Requirement.READ)
    add_route(app, "GET", "/api/v1/incidents/{id:[0-9]{1,15}}", api.incident, Requirement.READ)
    add_route(app, "GET", "/api/v1/actions", api.actions, Requirement.READ)
    add_route(app, "GET", "/api/v1/alerts", api.alerts, Requirement.READ)
    add_route(app, "GET", "/api/v1/notices", api.notices, Requirement.READ)
    people.add_routes(app, engine, database, metrics, redact)


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
            delivery = parse(await _body(request))
            alerts = delivery.alerts
            now = self._database.clock.now()
            await self._database.run_first(intake.receive, alerts, self._engine.inventory, now, delivery.receiver)
        except NotADelivery as error:
            raise ApiError(400, "not_a_delivery", str(error)) from error
        except (web.HTTPRequestEntityTooLarge, TooManyAlerts) as error:
            self._engine.reconcile_soon()  # Alertmanager does not send it again, and lists what it held
            said = str(error) if isinstance(error, TooManyAlerts) else "the delivery is longer than 10 MiB"
            raise ApiError(413, "too_large", said) from error
        except StorageError as error:
            raise ApiError(503, "not_stored", "the delivery could not be stored; send it again") from error
        for alert in alerts:
            self._metrics.received.labels(alert.status).inc()
        services = self._engine.inventory.services
        strangers = sum(1 for alert in alerts if alert.labels.get("service", "") not in services)
        log.info("delivery", alerts=len(alerts), of_no_service_of_ours=strangers)
        if delivery.truncated:
            self._metrics.truncated.inc(delivery.truncated)
            log.warning("Alertmanager left alerts out of a delivery (max_alerts)", alerts=delivery.truncated)
            self._engine.reconcile_soon()
        # A host that is down matters to all that runs there.
        of_hosts = any("service" not in alert.labels for alert in alerts)
        self._engine.wake(None if of_hosts else {alert.labels["service"] for alert in alerts})
        return web.json_response({"alerts": len(alerts)})

    async def metrics(self, _request: web.Request) -> web.Response:
        inventory, clock = self._engine.inventory, self._database.clock
        metrics, now = self._metrics, clock.now()
        told = await self._database.run(_gauges, now)
        for state in ("open", "recovered", "unobserved"):
            metrics.incidents.labels(state).set(told.incidents.get(state, 0))
        metrics.outbox_oldest.set(max(0.0, now - told.unsent) if told.unsent is not None else 0.0)
        metrics.queue_oldest.set(max(0.0, now - told.queued) if told.queued is not None else 0.0)
        metrics.automation.set(int(inventory.remediation.automatic and told.automation))
        metrics.watchdog.set(clock.unix(told.watchdog) if told.watchdog is not None else 0.0)
        rules = inventory.remediation
        for budget, used, limit in (
            ("in_flight", told.present.in_flight, rules.actions_in_flight),
            ("10m", len(told.present.in_budget_window), rules.actions_per_10m),
        ):
            metrics.budget_used.labels(budget).set(used)
            metrics.budget_limit.labels(budget).set(limit)
        metrics.breaker.clear()
        for service in told.breakers:
            metrics.breaker.labels(service).set(1)
        return web.Response(
            body=generate_latest(metrics.registry),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def reload(self, _request: web.Request) -> web.Response:
        try:
            await self._reload()
        except DefibError as error:
            raise ApiError(400, "bad_configuration", f"the old configuration stays: {error}") from error
        return web.json_response({"services": len(self._engine.inventory.services)})

    async def incidents(self, request: web.Request) -> web.Response:
        rows = await self._database.run(queries.page_of_incidents, _before(request), PAGE)
        return self._answer(request, {"incidents": rows})

    async def incident(self, request: web.Request) -> web.Response:
        whole = await self._database.run(queries.whole_incident, int(request.match_info["id"]))
        if whole is None:
            raise ApiError(404, "unknown_incident", "there is no such incident")
        return self._answer(request, whole)

    async def actions(self, request: web.Request) -> web.Response:
        rows = await self._database.run(queries.page_of_actions, _before(request), PAGE)
        return self._answer(request, {"actions": rows})

    async def alerts(self, request: web.Request) -> web.Response:
        rows = await self._database.run(queries.page_of_alerts, _before(request), PAGE)
        return self._answer(request, {"alerts": rows})

    async def notices(self, request: web.Request) -> web.Response:
        rows = await self._database.run(queries.page_of_notices, _before(request), PAGE)
        return self._answer(request, {"notices": rows})

    def _answer(self, request: web.Request, rows: dict[str, Any]) -> web.Response:
        """Rows as JSON, masked; for callers without a credential without the texts that hosts and servers gave."""
        found = rows if is_authenticated(request) else queries.open_part(rows)
        return web.json_response(self._redact.redact_all(queries.shown(found, self._database.clock)))


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except (web.RequestPayloadError, ConnectionError) as error:
        raise NotADelivery("the body cannot be read") from error


@dataclass(frozen=True)
class _Gauges:
    """What the record says of now; times are of its clock."""

    incidents: Mapping[str, int]
    unsent: float | None
    queued: float | None
    automation: bool
    watchdog: float | None
    breakers: list[str]
    present: Present


def _gauges(connection: Connection, now: float) -> _Gauges:
    watchdog = timestamps.get(connection, "watchdog")
    return _Gauges(
        lifecycle.counts_by_state(connection),
        outbox.oldest_pending(connection),
        lifecycle.queued_since(connection),
        switches.automation(connection).enabled,
        watchdog.at if watchdog is not None else None,
        situations.breakers(connection),
        situations.present_of(connection, "", "", now),
    )


def _before(request: web.Request) -> int | None:
    text = request.query.get("before")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 15:  # noqa: PLR2004 - ids are that small
        raise ApiError(400, "bad_request", "`before` is the id of an entry")
    return int(text)

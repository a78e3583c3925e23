"""The part of the HTTP API that only reads: incidents, actions, alerts, notifications, and metrics."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from aiohttp import web
from prometheus_client import generate_latest

from remediator.http import views
from remediator.incidents import lifecycle
from remediator.metrics import RemediatorMetrics
from remediator.policy.situation import ActionsInProgress
from remediator.record import notifications, queries, situations, timestamps
from remediator.record.automation import read_switch
from remediator.record.database import Database, StorageError
from remediator.record.transaction import Transaction
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.redaction import Redactor
from runtime.web import Handler, add_route

PAGE_SIZE = 100
INCIDENT_STATES = ("open", "recovered", "unobserved")
PAGES = {
    "actions": queries.page_of_actions,
    "alerts": queries.page_of_alerts,
    "notifications": queries.page_of_notifications,
}


def add_routes(app: web.Application, database: Database, metrics: RemediatorMetrics, redact: Redactor) -> None:
    async def render_metrics() -> bytes:
        await _update(metrics, database)
        return generate_latest(metrics.registry)

    rendering: asyncio.Task[bytes] | None = None

    async def read_metrics(_request: web.Request) -> web.Response:
        # Requests that wait at the same time get the same page: many of them must not delay what the record is for.
        nonlocal rendering
        if rendering is None or rendering.done():
            rendering = asyncio.create_task(render_metrics(), name="metrics")
        body = await asyncio.shield(rendering)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def page_handler(name: str) -> Handler:
        async def read_page(request: web.Request) -> web.Response:
            rows = await views.read_record(database, PAGES[name], parse_before(request), PAGE_SIZE)
            return await views.respond(request, {name: rows}, redact, database.clock)

        return read_page

    add_route(app, "GET", "/metrics", read_metrics, AccessRequirement.SCRAPE)
    for name in PAGES:
        add_route(app, "GET", f"/api/v1/{name}", page_handler(name), AccessRequirement.VIEWER)
    _add_incident_routes(app, database, redact)


def _add_incident_routes(app: web.Application, database: Database, redact: Redactor) -> None:
    async def read_incidents(request: web.Request) -> web.Response:
        state, service = request.query.get("state", ""), request.query.get("service", "")
        if state not in ("", "open", "closed"):
            raise ApiError(400, "bad_request", "`state` must be open or closed")
        is_open = state == "open" if state else None
        page = partial(queries.page_of_incidents, is_open=is_open, service=service)
        rows = await views.read_record(database, page, parse_before(request), PAGE_SIZE)
        return await views.respond(request, {"incidents": rows}, redact, database.clock)

    async def read_incident(request: web.Request) -> web.Response:
        number = int(request.match_info["id"])
        incident = await views.read_record(database, queries.read_incident, number)
        if incident is None:
            raise ApiError(404, "unknown_incident", f"there is no incident {number}")
        return await views.respond(request, incident, redact, database.clock)

    add_route(app, "GET", "/api/v1/incidents", read_incidents, AccessRequirement.VIEWER)
    add_route(app, "GET", "/api/v1/incidents/{id:[0-9]{1,15}}", read_incident, AccessRequirement.VIEWER)


def parse_before(request: web.Request) -> int | None:
    """Return the id in the query before which a page starts. Raises ApiError."""
    text = request.query.get("before")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 15:  # noqa: PLR2004 - ids are smaller
        raise ApiError(400, "bad_request", "`before` must be an id")
    return int(text)


@dataclass(frozen=True)
class _Gauges:
    """The values of gauges that are read from the record; times are of its clock."""

    incidents: Mapping[str, int]
    oldest_pending: float | None
    oldest_queued: float | None
    queue: situations.Queue
    automation: bool
    watchdog: float | None
    services_without_attempts: list[str]
    in_progress: ActionsInProgress


def _read_gauges(tx: Transaction) -> _Gauges:
    watchdog = timestamps.get(tx, "watchdog")
    return _Gauges(
        lifecycle.count_incidents_by_state(tx),
        notifications.oldest_pending(tx),
        lifecycle.oldest_queued(tx),
        situations.read_queue(tx),
        read_switch(tx).enabled,
        watchdog.at if watchdog is not None else None,
        situations.services_without_attempts(tx),
        situations.read_actions_in_progress(tx, "", ""),
    )


async def _update(metrics: RemediatorMetrics, database: Database) -> None:
    """Set the gauges that are read from the record."""
    try:
        gauges = await database.read(_read_gauges)  # not behind what people look at
    except StorageError as error:
        raise ApiError(503, "not_stored", "cannot read the record") from error
    rules, now = database.inventory.remediation, database.clock.now()
    for state in INCIDENT_STATES:
        metrics.incidents.labels(state).set(gauges.incidents.get(state, 0))
    metrics.outbox_oldest.set(_age(gauges.oldest_pending, now))
    metrics.queue_oldest.set(_age(gauges.oldest_queued, now))
    metrics.queue_services.set(gauges.queue.waiting)
    metrics.queue_end.set(max(0.0, gauges.queue.ends - now) if gauges.queue.waiting else 0.0)
    metrics.automation.set(int(rules.automatic and gauges.automation))
    metrics.automation_configured.set(int(rules.automatic))
    metrics.watchdog.set(database.clock.unix(gauges.watchdog) if gauges.watchdog is not None else 0.0)
    for budget, used, limit in (
        ("in_flight", gauges.in_progress.in_flight, rules.actions_in_flight),
        ("10m", len(gauges.in_progress.in_budget_window), rules.actions_per_10m),
    ):
        metrics.budget_used.labels(budget).set(used)
        metrics.budget_limit.labels(budget).set(limit)
    metrics.breaker.clear()
    for service in gauges.services_without_attempts:
        metrics.breaker.labels(service).set(1)


def _age(since: float | None, now: float) -> float:
    return max(0.0, now - since) if since is not None else 0.0

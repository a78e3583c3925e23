"""The webhook that Alertmanager calls."""

from collections.abc import Callable

import structlog
from aiohttp import web

from remediator.clients.alerts import (
    MAX_BODY,
    WEBHOOK_PATH,
    InvalidPayloadError,
    PayloadTooLargeError,
    WebhookPayload,
    parse_webhook,
)
from remediator.engine.engine import Engine
from remediator.incidents import intake
from remediator.metrics import RemediatorMetrics
from remediator.record.database import Database, StorageError
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.logs import LimitedLog
from runtime.payloads import parse_body
from runtime.web import add_route

STORED_TOGETHER = 500  # alerts in one transaction: other writers wait meanwhile
log = structlog.get_logger()
limited_log = LimitedLog()


def count_refusals(metrics: RemediatorMetrics) -> Callable[[web.Request, ApiError], None]:
    """Return a function that counts refused requests, and counts and logs webhooks that are refused for any reason."""

    def on_error(request: web.Request, error: ApiError) -> None:
        metrics.count_refusal(error.status)
        if request.path == WEBHOOK_PATH:
            metrics.refusals.labels(str(error.status)).inc()
            limited_log.warning("alertmanager_webhook_refused", status=error.status, error=error.message)

    return on_error


def add_routes(app: web.Application, engine: Engine, database: Database, metrics: RemediatorMetrics) -> None:
    async def receive(request: web.Request) -> web.Response:
        try:
            payload = await parse_body(parse_webhook, await _read_body(request))
            refused = await _store(database, payload)
        except InvalidPayloadError as error:
            raise ApiError(400, "not_a_delivery", str(error)) from error
        except (web.HTTPRequestEntityTooLarge, PayloadTooLargeError) as error:
            # Alertmanager does not send it again, but its API has the alerts.
            engine.reconcile_soon()
            larger = f"the body is larger than {MAX_BODY // 1024**2} MiB; set max_alerts in Alertmanager"
            message = str(error) if isinstance(error, PayloadTooLargeError) else larger
            raise ApiError(413, "too_large", message) from error
        except StorageError as error:
            raise ApiError(503, "not_stored", "cannot store the alerts; send them again") from error
        _count(payload)
        _count_refused(metrics, refused)
        if payload.truncated:
            engine.reconcile_soon()
        # An alert of a host concerns every service that runs there.
        has_host_alert = any("service" not in alert.labels for alert in payload.alerts)
        engine.wake(None if has_host_alert else {alert.labels["service"] for alert in payload.alerts})
        return web.json_response({"alerts": len(payload.alerts)})

    def _count(payload: WebhookPayload) -> None:
        for alert in payload.alerts:
            metrics.received.labels(alert.status).inc()
        services = database.inventory.services
        unknown = sum(1 for alert in payload.alerts if alert.labels.get("service", "") not in services)
        log.info("alertmanager_webhook_received", alerts=len(payload.alerts), unknown_services=unknown)
        if payload.cut:
            limited_log.warning("alertmanager_webhook_alerts_cut", alerts=payload.cut)
        if payload.truncated:
            metrics.truncated.inc(payload.truncated)
            log.warning(
                "alertmanager_webhook_truncated", alerts=payload.truncated, hint="raise max_alerts in Alertmanager"
            )

    add_route(app, "POST", WEBHOOK_PATH, receive, AccessRequirement.WEBHOOK)


def _count_refused(metrics: RemediatorMetrics, refused: int) -> None:
    if refused:
        metrics.refused_alerts.inc(refused)
        limited_log.warning(
            "alertmanager_webhook_alerts_refused", alerts=refused, cause="too many alerts are open or new"
        )


async def _store(database: Database, payload: WebhookPayload) -> int:
    """Store the alerts; returns how many were refused because too many are open.

    Raises StorageError; then all are sent again, and some are received twice.
    """
    refused = 0
    for start in range(0, max(len(payload.alerts), 1), STORED_TOGETHER):
        alerts = payload.alerts[start : start + STORED_TOGETHER]
        refused += await database.write_with_priority(intake.receive_alerts, alerts, payload.receiver)
    return refused


async def _read_body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except (web.RequestPayloadError, ConnectionError) as error:
        raise InvalidPayloadError("cannot read the body") from error

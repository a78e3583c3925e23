"""Whether the gateway works, for callers without a credential; and an address for this and metrics alone."""

from typing import Any

import structlog
from aiohttp import web
from prometheus_client import generate_latest

from gateway.metrics import GatewayMetrics
from gateway.upstreams import Upstream, Upstreams
from runtime.access.control import AccessControl
from runtime.access.roles import AccessRequirement
from runtime.further_listener import FurtherListener
from runtime.web import add_route, create_base_application
from runtime.webconfig import WebConfigFile

READY_BELOW = 0.9  # of the queue
_UNAVAILABLE = 503
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
log = structlog.get_logger()


def is_ready(upstreams: Upstreams) -> bool:
    """Whether an upstream takes requests, and its queue has room."""
    return any(_takes_requests(each) and _has_room(each) for each in upstreams)


def _takes_requests(upstream: Upstream) -> bool:
    return not upstream.admission.breaker.is_open


def _has_room(upstream: Upstream) -> bool:
    admission = upstream.admission
    return sum(admission.depths) <= READY_BELOW * admission.queue.size


def describe_health(upstreams: Upstreams) -> dict[str, Any]:
    """Return whether the gateway is ready, and why; a busy one, which has no request available now, is."""
    return {
        "status": "ready" if is_ready(upstreams) else "not_ready",
        "upstream": any(map(_takes_requests, upstreams)),
        "queue": any(map(_has_room, upstreams)),
        "requests_available": any(each.describe().available >= 1 for each in upstreams),
    }


def add_health_routes(app: web.Application, upstreams: Upstreams, metrics: GatewayMetrics) -> None:
    """Add `/health`, `/health/ready` and `/metrics`."""

    async def show_health(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def show_readiness(_request: web.Request) -> web.Response:
        health = describe_health(upstreams)
        return web.json_response(health, status=200 if health["status"] == "ready" else _UNAVAILABLE)

    async def show_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": _TEXT})

    add_route(app, "GET", "/health", show_health, AccessRequirement.UNCHECKED)
    add_route(app, "GET", "/health/ready", show_readiness, AccessRequirement.UNCHECKED)
    add_route(app, "GET", "/metrics", show_metrics, AccessRequirement.SCRAPE)


async def listen_for_scrapes(
    address: str, access: AccessControl, web_config: WebConfigFile, upstreams: Upstreams, metrics: GatewayMetrics
) -> FurtherListener:
    """Serve `/metrics` and `/health` on an address of their own, if it is not empty. Raises StartError."""
    app = create_base_application(
        access, web_config, on_error=lambda _request, error: metrics.count_refusal(error.status)
    )
    add_health_routes(app, upstreams, metrics)
    listener = FurtherListener("gateway.metrics_listen", app, metrics, lambda: web_config.tls)
    if (opened := await listener.listen(address)) is not None:
        log.info("metrics_listening", host=opened[0], port=opened[1])
    return listener

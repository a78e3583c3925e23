"""The exporter over HTTP: `/metrics`, the services, probe-now, reload."""

import asyncio
import gzip
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from exporter.metrics import Metrics
from exporter.results import Result
from exporter.watch import Watch, Watcher
from fleet.documents import ConfigurationError
from runtime.times import rfc3339
from runtime.web import Needs, Problem, add_route

TEXT = "text/plain; version=0.0.4; charset=utf-8"


def add_routes(app: web.Application, watcher: Watcher, metrics: Metrics, reload: Callable[[], Awaitable[None]]) -> None:
    api = _Api(watcher, metrics, reload)
    add_route(app, "GET", "/metrics", api.metrics, Needs.READER)
    add_route(app, "GET", "/api/v1/services", api.services, Needs.READER)
    add_route(app, "GET", "/api/v1/services/{id}", api.service, Needs.READER)
    add_route(app, "POST", "/api/v1/services/{id}/probe", api.probe, Needs.TOKEN)
    add_route(app, "POST", "/-/reload", api.reload, Needs.TOKEN)


class _Api:
    def __init__(self, watcher: Watcher, metrics: Metrics, reload: Callable[[], Awaitable[None]]) -> None:
        self._watcher, self._metrics, self._reload = watcher, metrics, reload

    async def metrics(self, request: web.Request) -> web.Response:
        openmetrics = "application/openmetrics-text" in request.headers.get("Accept", "")
        connections = self._watcher.ssh_connections()
        for state in ("connecting", "connected"):
            self._metrics.ssh_connections.labels(state).set(connections.get(state, 0))
        own = generate_openmetrics if openmetrics else generate_latest
        body = self._watcher.page.render(openmetrics=openmetrics).encode() + own(self._metrics.registry)
        headers = {"Content-Type": OPENMETRICS if openmetrics else TEXT, "Vary": "Accept, Accept-Encoding"}
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)

    async def services(self, _request: web.Request) -> web.Response:
        return web.json_response({"services": [summary(watch) for watch in self._watcher.watches.values()]})

    async def service(self, request: web.Request) -> web.Response:
        watch = self._watch(request)
        return web.json_response({**summary(watch), "failures": [outcome(each) for each in watch.recent]})

    async def probe(self, request: web.Request) -> web.Response:
        watch = self._watch(request)
        result = await self._watcher.probe_now(watch)
        return web.json_response({"service": watch.service.id, "up": watch.state.up, **outcome(result)})

    async def reload(self, _request: web.Request) -> web.Response:
        try:
            await self._reload()
        except ConfigurationError as error:
            raise Problem(400, "bad_configuration", f"the old configuration stays: {error}") from error
        return web.json_response({"services": len(self._watcher.watches)})

    def _watch(self, request: web.Request) -> Watch:
        watch = self._watcher.watches.get(request.match_info["id"])
        if watch is None:
            raise Problem(404, "unknown_service", "the inventory has no such service")
        return watch


def summary(watch: Watch) -> dict[str, Any]:
    """One service as the API tells it; `since` is when `up` was decided or last changed."""
    service, state = watch.service, watch.state
    return {
        "id": service.id,
        "name": service.title,
        "host": service.host,
        "provider": service.provider,
        "category": service.category,
        "up": state.up,
        "since": rfc3339(state.last_change),
        "last_success": rfc3339(state.last_success),
        "consecutive_failures": state.failures_in_a_row,
        "last": None if watch.last is None else outcome(watch.last),
    }


def outcome(result: Result) -> dict[str, Any]:
    return {
        "success": result.success,
        "reason": result.reason,
        "message": result.message,
        "duration_seconds": result.duration,
        "phases": result.seen.phases,
        "started_at": rfc3339(result.started_at),
    }

"""The exporter over HTTP: `/metrics`, the services, probe-now, reload."""

import asyncio
import itertools
import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from exporter.metrics import Metrics
from exporter.results import Result
from exporter.scheduler.watcher import Watch, Watcher
from runtime.errors import DefibError
from runtime.times import format_rfc3339
from runtime.web import ApiError, Requirement, add_route, is_authenticated

TOLD_AT_ONCE = 200  # services
TEXT = "text/plain; version=0.0.4; charset=utf-8"


def add_routes(app: web.Application, watcher: Watcher, metrics: Metrics, reload: Callable[[], Awaitable[None]]) -> None:
    api = _Api(watcher, metrics, reload)
    add_route(app, "GET", "/metrics", api.metrics, Requirement.SCRAPE)
    add_route(app, "GET", "/api/v1/sd/node-exporter", api.node_exporters, Requirement.SCRAPE)
    add_route(app, "GET", "/api/v1/services", api.services, Requirement.READ)
    add_route(app, "GET", "/api/v1/services/{id}", api.service, Requirement.READ)
    add_route(app, "POST", "/api/v1/services/{id}/probe", api.probe, Requirement.CREDENTIAL)
    add_route(app, "POST", "/-/reload", api.reload, Requirement.CREDENTIAL)


class _Api:
    def __init__(self, watcher: Watcher, metrics: Metrics, reload: Callable[[], Awaitable[None]]) -> None:
        self._watcher, self._metrics, self._reload = watcher, metrics, reload

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        openmetrics = "application/openmetrics-text" in request.headers.get("Accept", "")
        connections = self._watcher.ssh_connections()
        for state in ("connecting", "connected"):
            self._metrics.ssh_connections.labels(state).set(connections.get(state, 0))
        own = generate_openmetrics if openmetrics else generate_latest
        headers = {"Content-Type": OPENMETRICS if openmetrics else TEXT, "Vary": "Accept, Accept-Encoding"}
        compressor = None
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            compressor = zlib.compressobj(level=1, wbits=31)
            headers["Content-Encoding"] = "gzip"
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        # Piece by piece: of 10,000 services it is many megabytes, and the probes must not wait for them.
        for chunk in itertools.chain(
            self._watcher.page.chunks(openmetrics=openmetrics), map(own, [self._metrics.registry])
        ):
            await response.write(await asyncio.to_thread(compressor.compress, chunk) if compressor else chunk)
            await asyncio.sleep(0)
        if compressor:
            await response.write(compressor.flush())
        await response.write_eof()
        return response

    async def node_exporters(self, _request: web.Request) -> web.Response:
        """Every host, as Prometheus' HTTP service discovery wants it."""
        groups = [
            {
                "targets": [f"[{host.address}]:9100" if ":" in host.address else f"{host.address}:9100"],
                "labels": {**host.labels, "host": host.name, "group": host.group},
            }
            for host in self._watcher.hosts.values()
        ]
        return web.json_response(groups)

    async def services(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        await response.write(b'{"services": [')
        messages = is_authenticated(request)
        watches = list(self._watcher.watches.values())
        for start in range(0, len(watches), TOLD_AT_ONCE):
            told = ", ".join(
                json.dumps(self._summary(watch, messages=messages)) for watch in watches[start : start + TOLD_AT_ONCE]
            )
            await response.write(f"{', ' if start else ''}{told}".encode())
            await asyncio.sleep(0)
        await response.write(b"]}")
        await response.write_eof()
        return response

    async def service(self, request: web.Request) -> web.Response:
        watch, messages = self._watch(request), is_authenticated(request)
        failures = [outcome(each, messages=messages) for each in watch.recent]
        return web.json_response({**self._summary(watch, messages=messages), "failures": failures})

    async def probe(self, request: web.Request) -> web.Response:
        watch = self._watch(request)
        result = await self._watcher.probe_now(watch)
        known = {"digest": watch.digest, "host_up": self._watcher.host_up(watch.service.host)}
        told = {**outcome(result, messages=True), **known}
        return web.json_response({"service": watch.service.id, "up": watch.state.up, **told})

    async def reload(self, _request: web.Request) -> web.Response:
        try:
            await self._reload()
        except DefibError as error:
            raise ApiError(400, "bad_configuration", f"the old configuration stays: {error}") from error
        return web.json_response({"services": len(self._watcher.watches)})

    def _summary(self, watch: Watch, *, messages: bool) -> dict[str, Any]:
        return summary(watch, self._watcher.host_up(watch.service.host), messages=messages)

    def _watch(self, request: web.Request) -> Watch:
        watch = self._watcher.watches.get(request.match_info["id"])
        if watch is None:
            raise ApiError(404, "unknown_service", "the inventory has no such service")
        return watch


def summary(watch: Watch, host_up: bool | None, *, messages: bool) -> dict[str, Any]:
    """One service as the API tells it.

    `since` is when `up` was decided or last changed, and `unchanged_for_seconds` how long ago that is, which no change
    of a clock changes. `host_up` is whether its host's shell answered last, None where that is not known.
    """
    service, state = watch.service, watch.state
    now = asyncio.get_running_loop().time()
    return {
        "id": service.id,
        "name": service.title,
        "host": service.host,
        "provider": service.provider,
        "category": service.category,
        "up": state.up,
        "since": format_rfc3339(state.last_change),
        "unchanged_for_seconds": None if watch.changed is None else now - watch.changed,
        "last_success": format_rfc3339(state.last_success),
        "consecutive_failures": state.failures_in_a_row,
        "last": None if watch.last is None else outcome(watch.last, messages=messages),
        "digest": watch.digest if watch.last is not None else service.digest,
        "host_up": host_up,
    }


def outcome(result: Result, *, messages: bool) -> dict[str, Any]:
    """One probe as the API tells it; a message may quote what the service or a command said, so not all may see it."""
    return {
        "success": result.success,
        "reason": result.reason,
        "message": result.message if messages else None,
        "duration_seconds": result.duration,
        "phases": result.seen.phases,
        "started_at": format_rfc3339(result.started_at),
    }

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

from exporter.metrics import ExporterMetrics
from exporter.results import ProbeResult
from exporter.scheduler.probe_scheduler import ProbedService, ProbeScheduler
from fleet.inventory.documents import ConfigurationError
from runtime.times import rfc3339
from runtime.web import Needs, Problem, add_route, is_authenticated

TOLD_AT_ONCE = 200  # services
TEXT = "text/plain; version=0.0.4; charset=utf-8"


def add_routes(
    app: web.Application, scheduler: ProbeScheduler, metrics: ExporterMetrics, reload: Callable[[], Awaitable[None]]
) -> None:
    api = _ExporterApi(scheduler, metrics, reload)
    add_route(app, "GET", "/metrics", api.metrics, Needs.SCRAPE)
    add_route(app, "GET", "/api/v1/sd/node-exporter", api.node_exporters, Needs.SCRAPE)
    add_route(app, "GET", "/api/v1/services", api.services, Needs.READ)
    add_route(app, "GET", "/api/v1/services/{id}", api.service, Needs.READ)
    add_route(app, "POST", "/api/v1/services/{id}/probe", api.probe, Needs.CREDENTIAL)
    add_route(app, "POST", "/-/reload", api.reload, Needs.CREDENTIAL)


class _ExporterApi:
    def __init__(
        self, scheduler: ProbeScheduler, metrics: ExporterMetrics, reload: Callable[[], Awaitable[None]]
    ) -> None:
        self._scheduler, self._metrics, self._reload = scheduler, metrics, reload

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        openmetrics = "application/openmetrics-text" in request.headers.get("Accept", "")
        connections = self._scheduler.ssh_connections()
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
            self._scheduler.page.chunks(openmetrics=openmetrics), map(own, [self._metrics.registry])
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
            for host in self._scheduler.hosts.values()
        ]
        return web.json_response(groups)

    async def services(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        await response.write(b'{"services": [')
        messages = is_authenticated(request)
        services = list(self._scheduler.services.values())
        for start in range(0, len(services), TOLD_AT_ONCE):
            told = ", ".join(
                json.dumps(self._summary(probed, messages=messages))
                for probed in services[start : start + TOLD_AT_ONCE]
            )
            await response.write(f"{', ' if start else ''}{told}".encode())
            await asyncio.sleep(0)
        await response.write(b"]}")
        await response.write_eof()
        return response

    async def service(self, request: web.Request) -> web.Response:
        probed, messages = self._service(request), is_authenticated(request)
        failures = [outcome(each, messages=messages) for each in probed.recent_failures]
        return web.json_response({**self._summary(probed, messages=messages), "failures": failures})

    async def probe(self, request: web.Request) -> web.Response:
        probed = self._service(request)
        result = await self._scheduler.probe_now(probed)
        known = {"digest": probed.digest, "host_up": self._scheduler.host_up(probed.service.host)}
        told = {**outcome(result, messages=True), **known}
        return web.json_response({"service": probed.service.id, "up": probed.state.up, **told})

    async def reload(self, _request: web.Request) -> web.Response:
        try:
            await self._reload()
        except ConfigurationError as error:
            raise Problem(400, "bad_configuration", f"the old configuration stays: {error}") from error
        return web.json_response({"services": len(self._scheduler.services)})

    def _summary(self, probed: ProbedService, *, messages: bool) -> dict[str, Any]:
        return summary(probed, self._scheduler.host_up(probed.service.host), messages=messages)

    def _service(self, request: web.Request) -> ProbedService:
        probed = self._scheduler.services.get(request.match_info["id"])
        if probed is None:
            raise Problem(404, "unknown_service", "the inventory has no such service")
        return probed


def summary(probed: ProbedService, host_up: bool | None, *, messages: bool) -> dict[str, Any]:
    """One service as the API tells it.

    `since` is when `up` was decided or last changed, and `unchanged_for_seconds` how long ago that is, which no change
    of a clock changes. `host_up` is whether its host's shell answered last, None where that is not known.
    """
    service, state = probed.service, probed.state
    now = asyncio.get_running_loop().time()
    return {
        "id": service.id,
        "name": service.title,
        "host": service.host,
        "provider": service.provider,
        "category": service.category,
        "up": state.up,
        "since": rfc3339(state.last_change),
        "unchanged_for_seconds": None if probed.changed_at is None else now - probed.changed_at,
        "last_success": rfc3339(state.last_success),
        "consecutive_failures": state.failures_in_a_row,
        "last": None if probed.last is None else outcome(probed.last, messages=messages),
        "digest": probed.digest if probed.last is not None else service.digest,
        "host_up": host_up,
    }


def outcome(result: ProbeResult, *, messages: bool) -> dict[str, Any]:
    """One probe as the API tells it; a message may quote what the service or a command said, so not all may see it."""
    return {
        "success": result.success,
        "reason": result.reason,
        "message": result.message if messages else None,
        "duration_seconds": result.duration,
        "phases": result.details.phases,
        "started_at": rfc3339(result.started_at),
    }

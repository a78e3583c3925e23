"""HTTP routes of the exporter: `/metrics`, service discovery, services, probe now, reload."""

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
from exporter.scheduler.probe_scheduler import ProbeScheduler
from exporter.scheduler.probed_service import ProbedService
from fleet.inventory.documents import ConfigurationError
from runtime.access.audit import AuditEntry, Outcome, write_to_log
from runtime.access.control import get_identity
from runtime.access.roles import AccessRequirement
from runtime.errors import ApiError
from runtime.times import format_rfc3339
from runtime.web import add_route

SERVICES_PER_CHUNK = 200
REMEDIATOR = "remediator"  # the name of that caller with the local token
TEXT = "text/plain; version=0.0.4; charset=utf-8"


def add_routes(
    app: web.Application, scheduler: ProbeScheduler, metrics: ExporterMetrics, reload: Callable[[], Awaitable[None]]
) -> None:
    api = _ExporterApi(scheduler, metrics, reload)
    add_route(app, "GET", "/metrics", api.metrics, AccessRequirement.SCRAPE)
    add_route(app, "GET", "/api/v1/sd/node-exporter", api.node_exporters, AccessRequirement.SCRAPE)
    add_route(app, "GET", "/api/v1/services", api.services, AccessRequirement.VIEWER)
    add_route(app, "GET", "/api/v1/services/{id}", api.service, AccessRequirement.VIEWER)
    add_route(app, "POST", "/api/v1/services/{id}/probe", api.probe, AccessRequirement.OPERATOR)
    add_route(app, "POST", "/-/reload", api.reload, AccessRequirement.ADMIN)


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
        generate = generate_openmetrics if openmetrics else generate_latest
        headers = {"Content-Type": OPENMETRICS if openmetrics else TEXT, "Vary": "Accept, Accept-Encoding"}
        compressor = None
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            compressor = zlib.compressobj(level=1, wbits=31)
            headers["Content-Encoding"] = "gzip"
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        # In chunks: with 10,000 services the page has many megabytes, and writing it must not delay probes.
        for chunk in itertools.chain(
            self._scheduler.page.chunks(openmetrics=openmetrics), map(generate, [self._metrics.registry])
        ):
            await response.write(await asyncio.to_thread(compressor.compress, chunk) if compressor else chunk)
            await asyncio.sleep(0)
        if compressor:
            await response.write(compressor.flush())
        await response.write_eof()
        return response

    async def node_exporters(self, _request: web.Request) -> web.Response:
        """Return all hosts in the format of Prometheus' HTTP service discovery."""
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
        services = list(self._scheduler.services.values())
        for start in range(0, len(services), SERVICES_PER_CHUNK):
            chunk = ", ".join(
                json.dumps(self._summary(probed)) for probed in services[start : start + SERVICES_PER_CHUNK]
            )
            await response.write(f"{', ' if start else ''}{chunk}".encode())
            await asyncio.sleep(0)
        await response.write(b"]}")
        await response.write_eof()
        return response

    async def service(self, request: web.Request) -> web.Response:
        probed = self._find_service(request)
        failures = [result_json(failure) for failure in probed.recent_failures]
        return web.json_response({**self._summary(probed), "failures": failures})

    async def probe(self, request: web.Request) -> web.Response:
        probed = self._find_service(request)
        result = await self._scheduler.probe_now(probed)
        if get_identity(request).claimed_user != REMEDIATOR:  # which probes before and after each of its actions
            await self._audit(request, "probe", probed.service.id)
        return web.json_response(
            {
                "service": probed.service.id,
                "up": probed.state.up,
                **result_json(result),
                "digest": probed.digest,
                "host_up": self._scheduler.host_up(probed.service.host),
            }
        )

    async def reload(self, request: web.Request) -> web.Response:
        try:
            await self._reload()
        except ConfigurationError as error:
            await self._audit(request, "reload", outcome="refused")
            raise ApiError(400, "bad_configuration", f"the previous configuration stays in force: {error}") from error
        await self._audit(request, "reload")
        return web.json_response({"services": len(self._scheduler.services)})

    @staticmethod
    async def _audit(request: web.Request, event: str, target: str = "", *, outcome: Outcome = "done") -> None:
        await write_to_log(AuditEntry.of(get_identity(request), event, target, outcome=outcome))

    def _summary(self, probed: ProbedService) -> dict[str, Any]:
        return service_json(probed, self._scheduler.host_up(probed.service.host))

    def _find_service(self, request: web.Request) -> ProbedService:
        probed = self._scheduler.services.get(request.match_info["id"])
        if probed is None:
            raise ApiError(404, "unknown_service", f"the inventory has no service {request.match_info['id']!r}")
        return probed


def service_json(probed: ProbedService, host_up: bool | None) -> dict[str, Any]:
    """Return the JSON representation of a service.

    `since` is the time at which `up` was first determined or last changed; `unchanged_for_seconds` is the time elapsed
    since then, unaffected by clock changes. `host_up` is whether the host's shell answered last, None if unknown.
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
        "since": format_rfc3339(state.last_change),
        "unchanged_for_seconds": None if probed.changed_at is None else now - probed.changed_at,
        "last_success": format_rfc3339(state.last_success),
        "consecutive_failures": state.failures_in_a_row,
        "last": None if probed.last is None else result_json(probed.last),
        "digest": probed.digest if probed.last is not None else service.digest,
        "host_up": host_up,
    }


def result_json(result: ProbeResult) -> dict[str, Any]:
    """Return the JSON representation of a probe result."""
    return {
        "success": result.success,
        "reason": result.reason,
        "message": result.message,
        "duration_seconds": result.duration,
        "phases": result.details.phases,
        "started_at": format_rfc3339(result.started_at),
    }

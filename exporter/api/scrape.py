"""What Prometheus reads: `/metrics`, also as other programs name it, and the discovery of hosts for node_exporter."""

import asyncio
import itertools
import zlib
from collections.abc import Iterable, Iterator

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from exporter.exposition.metrics_page import CHUNK
from exporter.heartbeats.foreign_series import Check, Families, render_agents, render_healthchecks
from exporter.metrics import ExporterMetrics
from exporter.scheduler.probe_scheduler import ProbeScheduler
from runtime.addresses import bracket

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class ScrapeApi:
    def __init__(self, scheduler: ProbeScheduler, metrics: ExporterMetrics) -> None:
        self._scheduler, self._metrics = scheduler, metrics

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        openmetrics = "application/openmetrics-text" in request.headers.get("Accept", "")
        connections = self._scheduler.ssh_connections()
        for state in ("connecting", "connected"):
            self._metrics.ssh_connections.labels(state).set(connections.get(state, 0))
        generate = generate_openmetrics if openmetrics else generate_latest
        own = map(generate, [self._metrics.registry])
        chunks = itertools.chain(self._scheduler.page.chunks(openmetrics=openmetrics), own)
        return await _stream(request, chunks, OPENMETRICS if openmetrics else TEXT)

    async def healthchecks(self, request: web.Request) -> web.StreamResponse:
        """Return the heartbeats as the metrics of healthchecks."""
        heartbeats, services = self._scheduler.heartbeats, self._scheduler.services
        checks: list[Check] = []
        for number, heartbeat in enumerate(heartbeats.list_all(), 1):
            name = heartbeat.service.id
            if name in services and (uuid := heartbeats.registry.find_uuid(name)) is not None:
                checks.append(Check.of(heartbeat, uuid, heartbeats.now(), is_paused=services[name].is_paused))
            if number % CHUNK == 0:
                await asyncio.sleep(0)  # as below
        return await _stream(request, _join(render_healthchecks(checks)), TEXT)

    async def agents(self, request: web.Request) -> web.StreamResponse:
        """Return the agents as the metrics of an earlier exporter."""
        heartbeats = self._scheduler.heartbeats
        agents = [each for each in heartbeats.list_all() if each.service.agent is not None]
        return await _stream(request, _join(render_agents(agents, heartbeats.now())), TEXT)

    async def node_exporters(self, _request: web.Request) -> web.Response:
        """Return all hosts in the format of Prometheus' HTTP service discovery."""
        groups = [
            {
                "targets": [f"{bracket(host.address)}:9100"],
                "labels": {**host.labels, "host": host.name, "group": host.group},
            }
            for host in self._scheduler.hosts.values()
        ]
        return web.json_response(groups)


def _join(families: Families) -> Iterator[bytes]:
    """Yield a page in small chunks of complete lines."""
    for family, lines in families:
        if lines:
            yield family.header(openmetrics=False).encode()
        for start in range(0, len(lines), CHUNK):
            yield "".join(lines[start : start + CHUNK]).encode("utf-8", "replace")


async def _stream(request: web.Request, chunks: Iterable[bytes], content_type: str) -> web.StreamResponse:
    """Send a page in chunks: with 10,000 services it has many megabytes, and writing it must not delay probes."""
    headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
    compressor = None
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        compressor = zlib.compressobj(level=1, wbits=31)
        headers["Content-Encoding"] = "gzip"
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    for chunk in chunks:
        if chunk:
            await response.write(await asyncio.to_thread(compressor.compress, chunk) if compressor else chunk)
        await asyncio.sleep(0)
    if compressor:
        await response.write(compressor.flush())
    await response.write_eof()
    return response

"""What Prometheus reads: `/metrics`, and the service discovery of hosts for node_exporter."""

import asyncio
import itertools
import zlib

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

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
                "targets": [f"{bracket(host.address)}:9100"],
                "labels": {**host.labels, "host": host.name, "group": host.group},
            }
            for host in self._scheduler.hosts.values()
        ]
        return web.json_response(groups)

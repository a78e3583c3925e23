"""Hosts: what their collectors have published."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aiohttp import web

from exporter.api.host_report import describe_excerpt, describe_host, summarize_host
from exporter.scheduler.probe_scheduler import MonitoredHost, ProbeScheduler
from runtime.errors import ApiError
from runtime.streaming import render_object, stream_texts

LONG = 100_000  # characters of a host's lines, from which they are read in a thread

Report = Callable[[MonitoredHost, Mapping[str, str], float], dict[str, Any]]


class HostsApi:
    """Keeps the entries of the list: a client that polls costs the reading of those hosts whose collectors have run."""

    def __init__(self, scheduler: ProbeScheduler) -> None:
        self._scheduler = scheduler
        self._entries: dict[str, tuple[tuple[int, int], str]] = {}  # by name: the version of the host, and its JSON

    async def list_hosts(self, request: web.Request) -> web.StreamResponse:
        hosts = self._scheduler.hosts
        for removed in self._entries.keys() - hosts.keys():
            del self._entries[removed]
        return await stream_texts(request, {}, "hosts", self._list_entries(list(hosts)))

    async def show_host(self, request: web.Request) -> web.Response:
        text = await self._report(describe_host, self._find(request))
        return web.Response(text=text, content_type="application/json")

    async def show_logs(self, request: web.Request) -> web.Response:
        monitored = self._find(request)
        excerpts = [describe_excerpt(each) for each in self._scheduler.excerpts_of(monitored.host)]
        return web.Response(text=render_object({"logs": excerpts}), content_type="application/json")

    def _find(self, request: web.Request) -> MonitoredHost:
        name = request.match_info["name"]
        monitored = self._scheduler.find_host(name)
        if monitored is None:
            raise ApiError(404, "unknown_host", f"the inventory has no host {name!r}")
        return monitored

    async def _list_entries(self, names: list[str]) -> AsyncIterator[str]:
        for name in names:
            monitored = self._scheduler.find_host(name)
            if monitored is None:  # a reload has removed it
                continue
            version, text = self._entries.get(name, (None, ""))
            if version != monitored.version:
                text = await self._report(summarize_host, monitored)
                self._entries[name] = monitored.version, text
                await asyncio.sleep(0)
            yield text

    async def _report(self, report: Report, monitored: MonitoredHost) -> str:
        lines = self._scheduler.lines_of(monitored.host)

        def render() -> str:
            return render_object(report(monitored, lines, time.time()))

        # What a host has printed may have megabytes, and must not delay probes.
        return await asyncio.to_thread(render) if sum(map(len, lines.values())) > LONG else render()

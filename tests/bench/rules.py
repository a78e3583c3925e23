"""What the alert rules cost Prometheus, at 10,000 services on 500 hosts: its CPU with them, less that without.

Two Prometheus servers scrape the same page: the series of the simulated week, copied to so many services and hosts, as
they are on a normal day. Their number and Prometheus' memory are shown, too.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvloop
import yaml
from aiohttp import web

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.bench import peers
from tests.metric_names import RULES
from tests.simulated_week import events, hosts, services
from tests.simulated_week.scrapes import EXPORTER_LABELS, Scrapes
from tests.simulated_week.store import Labels

SERVICES, HOSTS = 10_000, 500
MINUTE = 600  # of the week: what was published then
EVERY = 15  # seconds between two scrapes, and two evaluations
WARM_UP, MEASURED = 300.0, 180.0  # seconds
CORES = 0.35  # at most
PROBED_AT, NOW = "service_last_probe_timestamp_seconds", b"<now>"
COPIED = ("host", "service")  # labels
TIMES_WITHIN = 3e8  # seconds around the week: what is in it is a time


def run() -> bool:
    return uvloop.run(_run())


async def _run() -> bool:
    async with peers.workplace() as (launcher, folder):
        return await _measure(launcher, folder)


async def _measure(launcher: Launcher, folder: Path) -> bool:
    page = b"".join(_list_lines(folder / "week"))
    runner = web.AppRunner(web.Application(), access_log=None)

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=page.replace(NOW, f"{time.time():.3f}".encode()), content_type="text/plain")

    runner.app.router.add_get("/metrics", answer)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    target = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        pids, urls = [], []
        for name, rules in (("with", [str(path) for path in RULES]), ("without", [])):
            (port,) = reserve_ports(1)
            pids.append(await _start_prometheus(launcher, folder / name, port, target, rules))
            urls.append(f"http://127.0.0.1:{port}")
        async with httpx.AsyncClient(trust_env=False, timeout=30, base_url=urls[0]) as client:
            await peers.answers(client, "/-/ready")
            await asyncio.sleep(WARM_UP)
            before, began = [peers.cpu(pid) for pid in pids], time.monotonic()
            costs = []
            while time.monotonic() - began < MEASURED:
                await asyncio.sleep(EVERY)
                costs.append(await _read_cost(client))
            seconds = time.monotonic() - began
            spent = [peers.cpu(pid) - was for pid, was in zip(pids, before, strict=True)]
            fired, series = await _count_firing(client), await _count_series(client)
            memory = peers.resident(pids[0], "VmRSS")
    finally:
        await runner.cleanup()
    lines = page.count(b"\n")
    cores = (spent[0] - spent[1]) / seconds
    print(
        f"rules: {lines} series of {SERVICES} services and {HOSTS} hosts: {cores:.2f} cores (at most {CORES}),"
        f" {statistics.median(costs):.2f} by Prometheus' own times; without rules {spent[1] / seconds:.2f};"
        f" {fired} alerts fire; {series} head series and {memory:.0f} MB after {WARM_UP + seconds:.0f} s"
    )
    return cores <= CORES


def _list_lines(folder: Path) -> Iterator[bytes]:
    """Yield the lines of the page."""
    week = events.plan(folder, seed=1)
    scrapes = Scrapes(week)
    later = time.time() - events.START - MINUTE * 60
    for host in week.inventory.hosts:
        for labels, values in hosts.list_series(week, host, scrapes, 1, lambda name: True):
            yield from _copy(labels, values[MINUTE], HOSTS // events.HOSTS, later)
    for service in week.inventory.services.values():
        for labels, values in services.list_series(week, service, scrapes, 1, None, lambda name: True):
            yield from _copy(labels, values[MINUTE], SERVICES // events.SERVICES, later)


def _copy(labels: Labels, value: float | None, copies: int, later: float) -> Iterator[bytes]:
    """Yield the lines of a series for as many hosts or services; times are so much later than in the week."""
    if value is None:
        return
    if abs(value - events.START) < TIMES_WITHIN:
        value += later
    named = dict(labels)
    name = named.pop("__name__")
    for copy in range(copies):
        own = {
            label: f"{text}-{copy % (HOSTS // events.HOSTS) if label == 'host' else copy}" if label in COPIED else text
            for label, text in named.items()
            if label not in EXPORTER_LABELS
        }
        written = ",".join(f'{label}="{text}"' for label, text in own.items())
        shown = NOW if name == PROBED_AT else repr(value).encode()
        yield f"{name}{{{written}}} ".encode() + shown + b"\n"


async def _start_prometheus(launcher: Launcher, folder: Path, port: int, target: str, rules: list[str]) -> int:
    folder.mkdir()
    scraped = {"job_name": "defib-exporter", "honor_labels": True, "static_configs": [{"targets": [target]}]}
    config = {
        "global": {"scrape_interval": f"{EVERY}s", "evaluation_interval": f"{EVERY}s"},
        "rule_files": rules,
        "scrape_configs": [scraped],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    argv = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    return await launcher.start([*argv, f"--web.listen-address=127.0.0.1:{port}"], folder / "log")


async def _read_cost(client: httpx.AsyncClient) -> float:
    """Return the seconds of each second that the last evaluations of all groups took."""
    groups: list[dict[str, float]] = (await client.get("/api/v1/rules")).json()["data"]["groups"]
    return sum(group["evaluationTime"] / group["interval"] for group in groups)


async def _count_firing(client: httpx.AsyncClient) -> int:
    alerts = (await client.get("/api/v1/alerts")).json()["data"]["alerts"]
    return sum(alert["state"] == "firing" for alert in alerts)


async def _count_series(client: httpx.AsyncClient) -> int:
    status: dict[str, Any] = (await client.get("/api/v1/status/tsdb")).json()["data"]
    return int(status["headStats"]["numSeries"])

"""10,000 services every 15 s from one exporter on one core: when it is ready, how late its probes are, what it holds.

A client reads what has changed once per second, as a console does.
"""

import asyncio
import os
import statistics
import sys
import time
from pathlib import Path

import httpx
import uvloop
import yaml

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from runtime.tasks import cancel_and_wait
from tests.bench import peers

SERVICES = 10_000
WINDOWS = 5
TOKEN = {"Authorization": "Bearer t0ken"}
SECONDS = 15.0
READY, LAG, RESPONSE, RESIDENT = 10.0, 0.05, 0.1, 320.0  # at most: seconds, seconds, seconds, megabytes


def run() -> bool:
    return uvloop.run(_run())


async def _run() -> bool:
    async with peers.workplace() as (launcher, folder):
        return await _measure(launcher, folder)


async def _measure(launcher: Launcher, folder: Path) -> bool:
    nginx, port = reserve_ports(2)
    await peers.start_nginx(launcher, folder, nginx, "http")
    _configure(folder / "config", nginx)
    argv = [sys.executable, "-m", "defib", "exporter", "--config", str(folder / "config"), "--listen"]
    core = str(max(os.sched_getaffinity(0)))
    began = time.monotonic()
    pid = await launcher.start(["taskset", "-c", core, *argv, f"127.0.0.1:{port}"], folder / "exporter.log")
    async with httpx.AsyncClient(trust_env=False, timeout=30, base_url=f"http://127.0.0.1:{port}") as client:
        await peers.answers(client, "/-/ready")
        ready = time.monotonic() - began
        await asyncio.sleep(2 * SECONDS)  # the first turn of each, and the second
        read: list[int] = []
        times: list[float] = []
        clients = [asyncio.create_task(each) for each in (_poll(port, read), _time_requests(port, times))]
        before, lags, done = await peers.probe_lags(client), [], []
        for _ in range(WINDOWS):
            await asyncio.sleep(SECONDS)
            after = await peers.probe_lags(client)
            lags.append(peers.quantile(0.99, before, after))
            done.append(after[float("inf")] - before[float("inf")])
            before = after
        await cancel_and_wait(clients)
    resident = peers.resident(pid)
    lag, response = statistics.median(lags), statistics.quantiles(times, n=100)[-1]
    good = ready <= READY and lag <= LAG and response <= RESPONSE and resident <= RESIDENT
    print(
        f"{SERVICES} services at {SECONDS:g} s on one core: ready in {ready:.1f} s (at most {READY:g});"
        f" p99 lag at most {lag:g} s, median of {WINDOWS} (worst {max(lags):g}; at most {LAG:g});"
        f" p99 response in {response:.3f} s (at most {RESPONSE:g}), with {len(read)} polls of"
        f" {statistics.median(read):.0f} changed services;"
        f" {resident:.0f} MB resident (at most {RESIDENT:g}); {statistics.median(done) / SECONDS:.0f} probes/s:"
        f" {'good' if good else 'NOT GOOD ENOUGH'}"
    )
    return good


async def _poll(port: int, read: list[int]) -> None:
    """Follow the changes of services for ever; `read` gets how many there were each time."""
    cursor = ""
    async with httpx.AsyncClient(trust_env=False, timeout=30, base_url=f"http://127.0.0.1:{port}") as client:
        while True:
            answer = (await client.get("/api/v1/services", params={"after": cursor}, headers=TOKEN)).json()
            cursor = answer["cursor"]
            read.append(len(answer["services"]))
            await asyncio.sleep(1.0)


async def _time_requests(port: int, times: list[float]) -> None:
    """Make the cheapest request for ever: how long it takes is how late the event loop is."""
    async with httpx.AsyncClient(trust_env=False, timeout=30, base_url=f"http://127.0.0.1:{port}") as client:
        while True:
            began = time.perf_counter()
            await client.get("/-/healthy")
            times.append(time.perf_counter() - began)
            await asyncio.sleep(0.05)


def _configure(directory: Path, port: int) -> None:
    directory.mkdir()
    probe = {
        "every": "15s",
        "timeout": "5s",
        "http": {"url": f"http://127.0.0.1:{port}/", "expect": {"body_matches": "heart"}},
    }
    providers = ("vllm", "mineru", "nginx", "other")
    services = {
        f"service-{number}": {"provider": providers[number % 4], "category": "web", "team": "a team", "probe": probe}
        for number in range(SERVICES)
    }
    yaml.Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    written = {"exporter": {"token": "t0ken"}, "services": services}
    (directory / "services.yaml").write_text(yaml.dump(written))

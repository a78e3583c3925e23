"""Heartbeats: durable pings per second, the memory of 10,000, how soon 5,000 late ones are noticed, and probes beside.

The exporter runs on one core, the senders of pings on another one.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import uvloop
import yaml

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.bench import peers

KEY = "the-ping-key-of-the-bench"
ROUNDS = 3
SECONDS = 8.0
SENDERS = 50  # connections
MANY, DUE = 10_000, 5_000
BESIDE, PROBED = 300, 500  # pings per second, and services that are probed every second
PINGS, LATENCY, MEMORY, NOTICED, LAG = 1000.0, 0.1, 80.0, 1.0, 0.1  # per second, seconds, megabytes, seconds, seconds


def run() -> bool:
    return uvloop.run(_run())


async def _run() -> bool:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # the exporter gets the last one
    try:
        return all([await measure() for measure in (_pings, _memory, _due, _probes)])
    finally:
        os.sched_setaffinity(0, cores)


class _Exporter:
    """An exporter on one core, with its port and that for pings."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        self.port, self.ping_port = reserve_ports(2)
        self.log = folder / "exporter.log"
        self.pid = 0

    async def start(self, services: dict[str, Any], core: int) -> None:
        directory = self.folder / "config"
        directory.mkdir()
        heartbeats = {"listen": f"127.0.0.1:{self.ping_port}", "database": "../heartbeats.db", "ping_key": KEY}
        (directory / "a.yaml").write_text(
            yaml.safe_dump({"exporter": {"heartbeats": heartbeats}, "services": services})
        )
        argv = ["taskset", "-c", str(core), sys.executable, "-m", "defib", "exporter", "--config", str(directory)]
        self.pid = await self.launcher.start([*argv, "--listen", f"127.0.0.1:{self.port}"], self.log)
        async with self.client() as client:
            await peers.answers(client, "/-/ready", 120)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(trust_env=False, timeout=30, base_url=f"http://127.0.0.1:{self.port}")


def _last_core() -> int:
    return (os.cpu_count() or 1) - 1


def _heartbeats(count: int, **options: Any) -> dict[str, Any]:
    probe = {"heartbeat": {"every": "1h", **options}}
    return {f"job-{number}": {"probe": probe} for number in range(count)}


class _Sender:
    """A connection on which pings are sent, one after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> "_Sender":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ping(self, job: int, body: bytes = b"") -> None:
        method = "POST" if body else "GET"
        head = f"{method} /ping/{KEY}/job-{job} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        await self._reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].split()[0]))
        assert answer.startswith(b"HTTP/1.1 200 "), answer

    def close(self) -> None:
        self._writer.close()


async def _send(port: int, body: bytes, heartbeats: int) -> tuple[int, float, float]:
    """Send pings of different heartbeats for a while; return how many, in how many seconds, and the p99 of the answers."""
    senders = [await _Sender.connect(port) for _ in range(SENDERS)]
    times: list[float] = []
    began = time.perf_counter()

    async def send(own: int, sender: _Sender) -> None:
        number = own
        while time.perf_counter() < began + SECONDS:
            before = time.perf_counter()
            await sender.ping(number % heartbeats, body)
            times.append(time.perf_counter() - before)
            number += SENDERS

    await asyncio.gather(*(send(own, sender) for own, sender in enumerate(senders)))
    took = time.perf_counter() - began
    for sender in senders:
        sender.close()
    return len(times), took, statistics.quantiles(times, n=100)[-1]


async def _pings() -> bool:
    """Pings without a body, and with 1,000 bytes."""
    good = True
    for body in (b"", b"x" * 999 + b"\n"):
        rates, latencies, costs = [], [], []
        for _ in range(ROUNDS):
            async with peers.workplace() as (launcher, folder):
                exporter = _Exporter(launcher, folder)
                await exporter.start(_heartbeats(MANY), _last_core())
                cpu = peers.cpu(exporter.pid)
                count, took, latency = await _send(exporter.ping_port, body, MANY)
                costs.append((peers.cpu(exporter.pid) - cpu) / count)
                rates.append(count / took)
                latencies.append(latency)
        is_good = statistics.median(rates) >= PINGS and statistics.median(latencies) <= LATENCY
        good &= is_good
        print(
            f"durable pings of {len(body)} bytes: {statistics.median(rates):.0f}/s, median of {ROUNDS}"
            f" ({min(rates):.0f} to {max(rates):.0f}; at least {PINGS:g});"
            f" p99 {statistics.median(latencies) * 1000:.0f} ms ({min(latencies) * 1000:.0f} to"
            f" {max(latencies) * 1000:.0f}; at most {LATENCY * 1000:g}); CPU {min(costs) * 1000:.2f} to"
            f" {max(costs) * 1000:.2f} ms each: {'good' if is_good else 'TOO SLOW'}"
        )
    return good


async def _memory() -> bool:
    """Megabytes that are resident, with heartbeats that have all been pinged, and without heartbeats."""
    differences = []
    for _ in range(ROUNDS):
        sizes = []
        for services in (_heartbeats(MANY), {"page": {"probe": {"tcp": {"address": "127.0.0.1:1"}}}}):
            async with peers.workplace() as (launcher, folder):
                exporter = _Exporter(launcher, folder)
                await exporter.start(services, _last_core())
                if len(services) > 1:
                    await _ping_all(exporter.ping_port, MANY)
                async with exporter.client() as client:
                    await client.get("/metrics")
                sizes.append(peers.resident(exporter.pid, "VmRSS"))
        differences.append(sizes[0] - sizes[1])
    difference = statistics.median(differences)
    print(
        f"{MANY} heartbeats: {difference:.0f} MB more than without, median of {ROUNDS} ({min(differences):.0f} to"
        f" {max(differences):.0f}; at most {MEMORY:g}): {'good' if difference <= MEMORY else 'TOO LARGE'}"
    )
    return difference <= MEMORY


async def _ping_all(port: int, count: int) -> None:
    senders = [await _Sender.connect(port) for _ in range(SENDERS)]

    async def ping(own: int, sender: _Sender) -> None:
        for number in range(own, count, SENDERS):
            await sender.ping(number)

    await asyncio.gather(*(ping(own, sender) for own, sender in enumerate(senders)))
    for sender in senders:
        sender.close()


async def _due() -> bool:
    """Seconds after which all of many heartbeats that are due in the same second are down."""
    took = []
    for _ in range(ROUNDS):
        async with peers.workplace() as (launcher, folder):
            exporter = _Exporter(launcher, folder)
            minute = time.localtime(time.time() + 90).tm_min  # pings come before it
            await exporter.start(_heartbeats(DUE, every=None, cron=f"{minute} * * * *", grace="0s"), _last_core())
            await _ping_all(exporter.ping_port, DUE)
            took.append(await _wait_until_down(exporter, minute))
    median = statistics.median(took)
    print(
        f"{DUE} heartbeats due in the same second: all down after {median:.2f} s, median of {ROUNDS} ({min(took):.2f} to"
        f" {max(took):.2f}; at most {NOTICED:g}): {'good' if median <= NOTICED else 'TOO LATE'}"
    )
    return median <= NOTICED


async def _wait_until_down(exporter: _Exporter, minute: int) -> float:
    """Return how many seconds after the beginning of a minute the log has the last heartbeat that is down.

    They are down on /metrics then. To read that page again and again would take the time that is measured.
    """
    now = time.time()
    due = now - now % 60
    while time.localtime(due).tm_min != minute:
        due += 60
    await asyncio.sleep(max(0.0, due - time.time()))
    times: list[str] = []
    while len(times) < DUE:
        await asyncio.sleep(0.2)
        lines = exporter.log.read_text().splitlines()
        times = [json.loads(line)["timestamp"] for line in lines if '"reason": "late"' in line]
    async with exporter.client() as client:
        page = (await client.get("/metrics")).text.splitlines()
    assert sum(line.startswith("service_up{") and line.endswith(" 0") for line in page) == DUE
    return datetime.fromisoformat(max(times)).timestamp() - due


async def _probes() -> bool:
    """Seconds by which probes are late while pings arrive, as the 99th percentile."""
    lags, sent = [], 0.0
    for _ in range(ROUNDS):
        async with peers.workplace() as (launcher, folder):
            exporter = _Exporter(launcher, folder)
            nginx = reserve_ports(1)[0]
            await peers.start_nginx(launcher, folder, nginx, "http")
            probe = {"every": "1s", "http": {"url": f"http://127.0.0.1:{nginx}/"}}
            pages = {f"page-{number}": {"probe": probe} for number in range(PROBED)}
            await exporter.start(_heartbeats(MANY) | pages, _last_core())
            async with exporter.client() as client:
                await asyncio.sleep(3)
                before = await peers.probe_lags(client)
                sent = await _send_steadily(exporter.ping_port)
                lags.append(peers.quantile(0.99, before, await peers.probe_lags(client)))
    median = statistics.median(lags)
    print(
        f"{PROBED} probes per second beside {sent:.0f} pings per second: p99 lag at most {median * 1000:g} ms, median of"
        f" {ROUNDS} (worst {max(lags) * 1000:g}; at most {LAG * 1000:g}): {'good' if median <= LAG else 'TOO LATE'}"
    )
    return median <= LAG


async def _send_steadily(port: int) -> float:
    """Send `BESIDE` pings per second for a while, and return how many per second were answered."""
    senders = [await _Sender.connect(port) for _ in range(SENDERS)]
    began = time.perf_counter()
    sent = 0

    async def send(own: int, sender: _Sender) -> None:
        nonlocal sent
        for turn in range(int(SECONDS * BESIDE / SENDERS)):
            at = began + (turn + own / SENDERS) * SENDERS / BESIDE
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            await sender.ping((own + turn * SENDERS) % MANY, b"output of a job\n")
            sent += 1

    await asyncio.gather(*(send(own, sender) for own, sender in enumerate(senders)))
    took = time.perf_counter() - began
    for sender in senders:
        sender.close()
    return sent / took

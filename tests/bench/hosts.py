"""200 `container` services over 20 SSH hosts every 15 s: how many round trips, over how many connections."""

import asyncio
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import httpx
import uvloop
import yaml

from defib.demo import service, sshd
from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.bench import peers
from tests.docker import running_docker

HOSTS, CONTAINERS, INTERVALS = 20, 10, 5
SECONDS = 15.0


def run() -> bool:
    if os.geteuid() != 0:
        print("hosts: left out, since dockerd wants root")
        return True
    with running_docker():
        return uvloop.run(_run())


async def _run() -> bool:
    names = [f"bench-{number}" for number in range(CONTAINERS)]
    for name in names:
        await service.run_container(name, name, ["/bin/sleep", "1000"])
    async with peers.workplace() as (launcher, folder):
        return await _measure(launcher, folder, names)


async def _measure(launcher: Launcher, folder: Path, names: list[str]) -> bool:
    ssh_port, port = reserve_ports(2)
    environment = {"PATH": os.environ["PATH"], "DOCKER_HOST": os.environ["DOCKER_HOST"]}
    host = await sshd.start(launcher, folder / "sshd", ssh_port, environment)
    _configure(folder / "config", host, names)
    argv = [sys.executable, "-m", "defib", "exporter", "--config", str(folder / "config")]
    await launcher.start([*argv, "--listen", f"127.0.0.1:{port}"], folder / "exporter.log")
    log = folder / "sshd" / "log"
    logins = log.read_text().count("Accepted publickey")
    async with httpx.AsyncClient(trust_env=False, timeout=30, base_url=f"http://127.0.0.1:{port}") as client:
        await peers.answers(client, "/-/ready")
        await asyncio.sleep(2 * SECONDS)
        trips, probes = [], []
        for _ in range(INTERVALS):
            before = log.read_text().count("Starting session"), await _probes(client)
            await asyncio.sleep(SECONDS)
            trips.append((log.read_text().count("Starting session") - before[0]) / HOSTS)
            probes.append(await _probes(client) - before[1])
        up = (await client.get("/metrics")).text.count('category="other"} 1\n')
    connections = log.read_text().count("Accepted publickey") - logins
    median, done = statistics.median(trips), statistics.median(probes)
    good = median <= 1 and connections == HOSTS and done >= HOSTS * CONTAINERS and up >= HOSTS * CONTAINERS
    print(
        f"{HOSTS * CONTAINERS} container services over {HOSTS} SSH hosts at {SECONDS:g} s: {median:.2f} round trips per host"
        f" and interval, median of {INTERVALS} (at most {max(trips):.2f}; must be 1), over {connections} connections, for"
        f" {done:.0f} probes: {'good' if good else 'NOT GOOD ENOUGH'}"
    )
    return good


def _configure(directory: Path, host: sshd.Sshd, names: list[str]) -> None:
    directory.mkdir()
    keys = {"key_file": str(host.key_file), "known_hosts": str(host.known_hosts)}
    ssh: dict[str, Any] = {"user": host.user, "port": host.port, **keys}
    hosts = {f"host-{number}": {"address": "127.0.0.1", "ssh": dict(ssh)} for number in range(HOSTS)}
    services = {
        f"{name}.{each}": {"host": each, "probe": {"every": "15s", "container": {"name": name}}}
        for each in hosts
        for name in names
    }
    (directory / "all.yaml").write_text(yaml.safe_dump({"hosts": hosts, "services": services}))


async def _probes(client: httpx.AsyncClient) -> float:
    page = (await client.get("/metrics")).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("service_probes_total"))

"""CPU per HTTP and HTTPS probe of the whole exporter, against blackbox_exporter on the same nginx in the same run.

Both probe at the same rate, evenly spaced, over a fresh connection each. Ours probes on its own schedule and is scraped
as Prometheus would; blackbox_exporter probes when it is scraped, here over kept-alive connections, which favours it.
"""

import asyncio
import os
import signal
import ssl
import statistics
import sys
from pathlib import Path
from urllib.parse import quote

import httpx
import uvloop
import yaml

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.bench import peers
from tests.bench.load import send_steadily

ROUNDS = 3
SECONDS = 15.0  # of a round, in which ours is scraped once
SERVICES = 500
RATE = SERVICES  # probes in a second, of each of the two
AT_MOST = {"http": 0.35, "https": 0.55}


def run() -> bool:
    return uvloop.run(_run())


async def _run() -> bool:
    return all([await _compare(scheme) for scheme in AT_MOST])


async def _compare(scheme: str) -> bool:
    async with peers.workplace() as (launcher, folder):
        ours, theirs = await _measure(launcher, folder, scheme)
    at_most = AT_MOST[scheme]
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"{scheme} probe: CPU {statistics.median(ours) * 1000:.3f} ms, blackbox_exporter"
        f" {statistics.median(theirs) * 1000:.3f} ms; ratio {ratio:.2f}, median of {ROUNDS}"
        f" ({min(ratios):.2f} to {max(ratios):.2f}; at most {at_most}): {'good' if ratio <= at_most else 'TOO SLOW'}"
    )
    return ratio <= at_most


async def _measure(launcher: Launcher, folder: Path, scheme: str) -> tuple[list[float], list[float]]:
    """CPU seconds per probe of ours and of blackbox_exporter, round by round."""
    nginx, exporter, blackbox = reserve_ports(3)
    target = f"{scheme}://127.0.0.1:{nginx}/"
    peers.write_certificate(folder)
    await peers.start_nginx(launcher, folder, nginx, scheme)
    ours = await _start_exporter(launcher, folder, exporter, target)
    theirs = await _start_blackbox(launcher, folder, blackbox)
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    async with httpx.AsyncClient(trust_env=False, timeout=10, verify=context) as client:
        for url in (target, f"http://127.0.0.1:{exporter}/-/ready", f"http://127.0.0.1:{blackbox}/-/healthy"):
            await peers.answers(client, url)
        await asyncio.sleep(2)
        costs: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            costs[0].append(await _cost_of_ours(client, f"http://127.0.0.1:{exporter}", ours))
            os.kill(ours, signal.SIGSTOP)  # two CPUs are not enough for both
            costs[1].append(await _cost_of_blackbox(blackbox, theirs, target))
            os.kill(ours, signal.SIGCONT)
            await asyncio.sleep(3)  # until it probes at its rate again
    return costs


async def _start_exporter(launcher: Launcher, folder: Path, port: int, target: str) -> int:
    directory = folder / "config"
    directory.mkdir()
    http = {"url": target, "expect": {"body_matches": "heart"}, "tls": {"ca_file": str(folder / "ca.pem")}}
    probe = {"every": "1s", "http": http}
    services = {f"service-{number}": {"probe": probe} for number in range(SERVICES)}
    (directory / "services.yaml").write_text(yaml.safe_dump({"services": services}))
    argv = [sys.executable, "-m", "defib", "exporter", "--config", str(directory), "--listen", f"127.0.0.1:{port}"]
    return await launcher.start(argv, folder / "exporter.log")


async def _start_blackbox(launcher: Launcher, folder: Path, port: int) -> int:
    module = {
        "prober": "http",
        "http": {
            "preferred_ip_protocol": "ip4",
            "fail_if_body_not_matches_regexp": ["heart"],
            "tls_config": {"ca_file": str(folder / "ca.pem")},
        },
    }
    (folder / "blackbox.yml").write_text(yaml.safe_dump({"modules": {"page": module}}))
    argv = [
        "prometheus-blackbox-exporter",
        f"--config.file={folder}/blackbox.yml",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    return await launcher.start(argv, folder / "blackbox.log")


async def _cost_of_ours(client: httpx.AsyncClient, url: str, pid: int) -> float:
    async def probes() -> float:
        page = (await client.get(f"{url}/metrics")).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("service_probes_total"))

    count, cpu = await probes(), peers.cpu(pid)
    await asyncio.sleep(SECONDS)
    done = await probes() - count
    return (peers.cpu(pid) - cpu) / done


async def _cost_of_blackbox(port: int, pid: int, target: str) -> float:
    path = f"/probe?module=page&target={quote(target, safe='')}"
    cpu = peers.cpu(pid)
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    sent = await send_steadily(port, request, RATE, SECONDS, b"probe_success 1")
    return (peers.cpu(pid) - cpu) / len(sent)

"""CPU per HTTP probe of the whole exporter, against blackbox_exporter on the same nginx in the same run.

Both probe over a fresh connection each. Ours probes on its own schedule and is scraped as Prometheus would;
blackbox_exporter probes when it is scraped, here over kept-alive connections, which favours it.
"""

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

import httpx
import uvloop
import yaml

from defib.demo.keeper import Keeper
from defib.demo.stack import free_ports

ROUNDS = 5
SECONDS = 6.0
SERVICES = 500
AT_MOST = 0.7
TICKS = os.sysconf("SC_CLK_TCK")


def run() -> bool:
    return uvloop.run(_run())


async def _run() -> bool:
    keeper = await Keeper.begin()
    try:
        with tempfile.TemporaryDirectory() as name:
            ours, theirs = await _measure(keeper, Path(name))
    finally:
        await keeper.end()
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"http probe: CPU {statistics.median(ours) * 1000:.3f} ms, blackbox_exporter"
        f" {statistics.median(theirs) * 1000:.3f} ms; ratio {ratio:.2f}, median of {ROUNDS}"
        f" ({min(ratios):.2f} to {max(ratios):.2f}; at most {AT_MOST}): {'good' if ratio <= AT_MOST else 'TOO SLOW'}"
    )
    return ratio <= AT_MOST


async def _measure(keeper: Keeper, folder: Path) -> tuple[list[float], list[float]]:
    """CPU seconds per probe of ours and of blackbox_exporter, round by round."""
    nginx, exporter, blackbox = free_ports(3)
    target = f"http://127.0.0.1:{nginx}/"
    await _start_nginx(keeper, folder, nginx)
    ours = await _start_exporter(keeper, folder, exporter, target)
    theirs = await _start_blackbox(keeper, folder, blackbox)
    async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
        for url in (target, f"http://127.0.0.1:{exporter}/-/ready", f"http://127.0.0.1:{blackbox}/-/healthy"):
            await _answers(client, url)
        await asyncio.sleep(2)
        costs: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            costs[0].append(await _cost_of_ours(client, f"http://127.0.0.1:{exporter}", ours))
            costs[1].append(await _cost_of_blackbox(client, f"http://127.0.0.1:{blackbox}", theirs, target))
    return costs


async def _start_nginx(keeper: Keeper, folder: Path, port: int) -> None:
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr warn;"
        "events { worker_connections 4096; }"
        f"http {{ access_log off; {places} server {{ listen 127.0.0.1:{port} backlog=4096;"
        ' location / { default_type text/plain; return 200 "the heart beats\\n"; } } }'
    )
    await keeper.start(["nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)], folder / "nginx.log")


async def _start_exporter(keeper: Keeper, folder: Path, port: int, target: str) -> int:
    directory = folder / "config"
    directory.mkdir()
    probe = {"every": "1s", "http": {"url": target, "expect": {"body_matches": "heart"}}}
    services = {f"service-{number}": {"probe": probe} for number in range(SERVICES)}
    (directory / "services.yaml").write_text(yaml.safe_dump({"services": services}))
    argv = [sys.executable, "-m", "defib", "exporter", "--config", str(directory), "--listen", f"127.0.0.1:{port}"]
    return await keeper.start(argv, folder / "exporter.log")


async def _start_blackbox(keeper: Keeper, folder: Path, port: int) -> int:
    module = {
        "prober": "http",
        "http": {"preferred_ip_protocol": "ip4", "fail_if_body_not_matches_regexp": ["heart"]},
    }
    (folder / "blackbox.yml").write_text(yaml.safe_dump({"modules": {"page": module}}))
    argv = [
        "prometheus-blackbox-exporter",
        f"--config.file={folder}/blackbox.yml",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    return await keeper.start(argv, folder / "blackbox.log", {**os.environ, "GOMAXPROCS": "1"})


async def _answers(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url)).is_success:
                    return
            await asyncio.sleep(0.1)


def _cpu(pid: int) -> float:
    """CPU seconds of a process so far, all threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def _cost_of_ours(client: httpx.AsyncClient, url: str, pid: int) -> float:
    async def probes() -> float:
        page = (await client.get(f"{url}/metrics")).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("service_probes_total"))

    count, cpu = await probes(), _cpu(pid)
    await asyncio.sleep(SECONDS)
    return (_cpu(pid) - cpu) / (await probes() - count)


async def _cost_of_blackbox(client: httpx.AsyncClient, url: str, pid: int, target: str) -> float:
    cpu, count = _cpu(pid), 0
    ends = asyncio.get_running_loop().time() + SECONDS
    while asyncio.get_running_loop().time() < ends:
        answer = await client.get(f"{url}/probe", params={"module": "page", "target": target})
        assert "probe_success 1" in answer.text
        count += 1
    return (_cpu(pid) - cpu) / count

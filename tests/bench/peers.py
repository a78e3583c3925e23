"""What the benches have in common: where they run, a web server to be probed, and waiting until something answers."""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import trustme
from prometheus_client.parser import text_string_to_metric_families

from defib.demo.launcher import Launcher

TICKS = os.sysconf("SC_CLK_TCK")


def write_certificate(folder: Path) -> None:
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    own = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    own.private_key_and_cert_chain_pem.write_to_path(folder / "own.pem")


async def start_nginx(launcher: Launcher, folder: Path, port: int, scheme: str) -> None:
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    tls = f" ssl; ssl_certificate {folder}/own.pem; ssl_certificate_key {folder}/own.pem" if scheme == "https" else ""
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr warn;"
        "events { worker_connections 4096; }"
        f"http {{ access_log off; {places} server {{ listen 127.0.0.1:{port} backlog=4096{tls};"
        ' location / { default_type text/plain; return 200 "the heart beats\\n"; } } }'
    )
    await launcher.start(["nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)], folder / "nginx.log")


@contextlib.asynccontextmanager
async def workplace() -> AsyncIterator[tuple[Launcher, Path]]:
    """A launcher of programs and an empty folder, for one bench."""
    launcher = await Launcher.begin()
    try:
        with tempfile.TemporaryDirectory() as name:
            yield launcher, Path(name)
    finally:
        await launcher.end()


async def answers(client: httpx.AsyncClient, url: str, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url)).is_success:
                    return
            await asyncio.sleep(0.1)


def cpu(pid: int) -> float:
    """CPU seconds of a process so far, all threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(pid: int, field: str = "VmHWM") -> float:
    """The most megabytes of a process that were ever resident; with `VmRSS`, those that are."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


async def probe_lags(client: httpx.AsyncClient) -> dict[float, float]:
    """Probes so far by the upper bound of how late they began; the scrape is as Prometheus makes it."""
    page = (await client.get("/metrics")).text
    own = page[page.index("# HELP defib_exporter_schedule_lag_seconds") :]
    (family,) = (
        each for each in text_string_to_metric_families(own) if each.name == "defib_exporter_schedule_lag_seconds"
    )
    return {float(each.labels["le"]): each.value for each in family.samples if each.name.endswith("_bucket")}


def quantile(share: float, before: dict[float, float], after: dict[float, float]) -> float:
    """The bound of the first bucket that holds `share` of what came between."""
    infinite = float("inf")
    wanted = share * (after[infinite] - before[infinite])
    return next(bound for bound in sorted(after) if after[bound] - before[bound] >= wanted)

"""A real Prometheus that has samples of the past."""

import asyncio
import subprocess
from collections.abc import Iterable
from pathlib import Path

import httpx

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.support import NO_TLS, eventually


async def start_prometheus(launcher: Launcher, folder: Path, lines: Iterable[str], lookback: str) -> str:
    """Start a Prometheus that has these samples; returns its URL."""
    (folder / "samples").write_text("\n".join(lines) + "\n")
    (folder / "prometheus.yml").write_text("")
    create = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(folder / "samples"), str(folder / "data")]
    await asyncio.to_thread(subprocess.run, create, check=True, capture_output=True)
    (port,) = reserve_ports(1)
    url = f"http://127.0.0.1:{port}"
    await launcher.start(
        [
            "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", f"--query.lookback-delta={lookback}",
        ],
        folder / "prometheus.log",
    )  # fmt: skip
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:

        async def is_ready() -> bool:
            try:
                return (await client.get(f"{url}/-/ready")).is_success
            except httpx.HTTPError:
                return False

        await eventually(is_ready)
    return url

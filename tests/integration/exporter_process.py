"""A running exporter, as its clients see it."""

import sys
from pathlib import Path
from typing import Any

import httpx
import yaml

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.support import NO_TLS, eventually

TOKEN = {"Authorization": "Bearer t0ken"}


class Exporter:
    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        (self.port,) = reserve_ports(1)
        base = f"http://127.0.0.1:{self.port}"
        self.client = httpx.AsyncClient(verify=NO_TLS, base_url=base, headers=TOKEN, trust_env=False, timeout=60)

    def configure(self, services: dict[str, Any], **more: Any) -> None:
        (self.folder / "config").mkdir(exist_ok=True)
        written = {"exporter": {"token": "t0ken"}, "services": services, **more}
        (self.folder / "config" / "a.yaml").write_text(yaml.safe_dump(written))

    async def start(self, *arguments: str) -> None:
        argv = [sys.executable, "-m", "defib", "exporter", "--config", str(self.folder / "config")]
        argv += ["--listen", f"127.0.0.1:{self.port}", *arguments]
        self.pid = await self.launcher.start(argv, self.folder / "log")
        await eventually(self.is_ready)

    async def is_ready(self) -> bool:
        try:
            return (await self.client.get("/-/ready")).is_success
        except httpx.HTTPError:
            return False

    async def value(self, series: str) -> float | None:
        page = (await self.client.get("/metrics")).text
        return next((float(line.split(" ")[-1]) for line in page.splitlines() if line.startswith(series)), None)

    async def service(self, name: str) -> dict[str, Any]:
        return dict((await self.client.get(f"/api/v1/services/{name}")).json())

"""What a command loads when it starts: the libraries that it needs, and not those of the others."""

import asyncio
import signal
import sys
from pathlib import Path

import httpx
import pytest

from defib.demo.stack import reserve_ports
from tests.support import eventually, write

SERVER = {"sqlalchemy", "alembic", "lark_oapi", "jinja2", "mako"}
LIBRARIES = SERVER | {"aiohttp", "asyncssh", "dns", "grpc", "httpx", "prometheus_client"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(
        tmp_path / "config",
        defib="""
        hosts: {web-01: {address: 127.0.0.1, ssh: {user: defib}, collect: {system: 30s, docker: 30s}}}
        services:
          wiki:
            host: web-01
            probe: {every: 200ms, retry_every: 200ms, http: {url: "http://127.0.0.1:1/"}}
            control: {docker: {container: wiki}}
            on_failure: restart
        notify:
          channels:
            ops: {feishu: {webhook: "https://chat.example/hook/secret"}}
            app: {feishu_app: {app_id: cli_1, app_secret: secret, chat_id: oc_1, long_connection: true}}
          routes: [{channels: [ops, app]}]
        """,
    )


def imported(stderr: str) -> set[str]:
    """The top-level packages of what `python -X importtime` lists."""
    return {
        line.rsplit("|", 1)[1].strip().partition(".")[0]
        for line in stderr.splitlines()
        if line.startswith("import time:")
    }


async def ran(*arguments: str, status: int = 0) -> set[str]:
    argv = [sys.executable, "-X", "importtime", "-m", "defib", *arguments]
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert process.returncode == status, stderr.decode()[-2000:]
    return imported(stderr.decode())


@pytest.mark.parametrize("arguments", [["--help"], ["probe", "--help"], ["completion", "bash"]])
async def test_help_loads_no_library(arguments: list[str]) -> None:
    assert await ran(*arguments) & (LIBRARIES | {"pydantic", "structlog", "uvloop", "defib.kinds"}) == set()


async def test_checking_loads_what_the_configuration_names(config: Path) -> None:
    loaded = await ran("check", "--config", str(config))
    assert loaded & LIBRARIES == {"httpx"}  # of the channels
    assert "uvloop" not in loaded


async def test_a_probe_loads_its_own_kind(config: Path) -> None:
    assert await ran("probe", "wiki", "--config", str(config), status=1) & LIBRARIES == {"httpx"}


async def test_the_exporter_loads_nothing_of_the_record(config: Path, tmp_path: Path) -> None:
    (port,) = reserve_ports(1)
    argv = [sys.executable, "-X", "importtime", "-m", "defib", "exporter", "--config", str(config)]
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*argv, "--listen", f"127.0.0.1:{port}", stderr=log)
    try:
        async with httpx.AsyncClient() as client:

            async def probed() -> bool:
                try:
                    return "service_up{" in (await client.get(f"http://127.0.0.1:{port}/metrics")).text
                except httpx.HTTPError:
                    return False

            await eventually(probed)
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
    loaded = imported((tmp_path / "log").read_text())
    assert "aiohttp" in loaded
    assert loaded & SERVER == set()

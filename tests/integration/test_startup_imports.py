"""Imports at startup: each command imports only the libraries that it needs."""

import asyncio
import signal
import sys
from pathlib import Path

import httpx
import pytest

from defib.demo.stack import reserve_ports
from tests.support import eventually, write

SERVER = {"sqlalchemy", "alembic", "lark_oapi", "jinja2", "mako"}
LIBRARIES = SERVER | {"aiohttp", "asyncssh", "dns", "h2", "httpx", "prometheus_client"}


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


def parse_imports(stderr: str) -> set[str]:
    """Return the top-level packages that `python -X importtime` lists."""
    return {
        line.rsplit("|", 1)[1].strip().partition(".")[0]
        for line in stderr.splitlines()
        if line.startswith("import time:")
    }


async def imports_of(*arguments: str, status: int = 0) -> set[str]:
    argv = [sys.executable, "-X", "importtime", "-m", "defib", *arguments]
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    assert process.returncode == status, stderr.decode()[-2000:]
    return parse_imports(stderr.decode())


@pytest.mark.parametrize("arguments", [["--help"], ["probe", "--help"], ["completion", "bash"]])
async def test_help_imports_no_library(arguments: list[str]) -> None:
    assert await imports_of(*arguments) & (LIBRARIES | {"pydantic", "structlog", "uvloop", "defib.kinds"}) == set()


async def test_check_imports_only_the_configured_kinds(config: Path) -> None:
    packages = await imports_of("check", "--config", str(config))
    assert packages & LIBRARIES == {"httpx"}  # for the channels
    assert "uvloop" not in packages


async def test_a_probe_imports_only_its_own_kind(config: Path) -> None:
    assert await imports_of("probe", "wiki", "--config", str(config), status=1) & LIBRARIES == {"httpx"}


async def test_the_exporter_does_not_import_the_database(config: Path, tmp_path: Path) -> None:
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
    packages = parse_imports((tmp_path / "log").read_text())
    assert "aiohttp" in packages
    assert packages & SERVER == set()

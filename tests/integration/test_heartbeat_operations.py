"""The doctor's checks of heartbeats, and their backups."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from defib.demo.launcher import Launcher
from tests.forked_defib import run_defib
from tests.integration.test_heartbeats import Heartbeats


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Heartbeats]:
    made = Heartbeats(launcher, tmp_path)
    made.write()
    await made.start()
    yield made
    await made.client.aclose()
    await made.jobs.aclose()


async def examine(exporter: Heartbeats) -> dict[str, tuple[str, str]]:
    """Return the doctor's findings about heartbeats: result and detail by check."""
    config = str(exporter.folder / "config")
    done = await asyncio.to_thread(run_defib, "doctor", "--for", "exporter", "--json", "--config", config)
    assert "Traceback" not in done.stderr, done.stderr
    findings = json.loads(done.stdout)["findings"]
    return {each["check"]: (each["result"], each["detail"]) for each in findings if each["subject"] == "heartbeats"}


async def test_the_doctor_checks_the_database_and_the_listener(exporter: Heartbeats) -> None:
    address, database = f"127.0.0.1:{exporter.ping_port}", exporter.folder / "config" / ".." / "heartbeats.db"
    assert await examine(exporter) == {
        "database": ("pass", str(database)),
        "URLs": ("pass", f"http://{address}"),
        "listener": ("pass", f"http://{address}"),
    }
    await exporter.stop()
    findings = await examine(exporter)
    assert findings["listener"][0] == "fail"
    with socket.create_server(("127.0.0.1", exporter.ping_port)) as server:
        server.settimeout(60)
        asking = asyncio.create_task(examine(exporter))
        for _ in range(2):  # with http and https
            client, _ = await asyncio.to_thread(server.accept)
            client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            client.close()
        findings = await asking
    assert findings["listener"][0] == "fail"


async def test_without_heartbeats_the_doctor_checks_none(exporter: Heartbeats) -> None:
    exporter.write({})
    assert await examine(exporter) == {}


async def test_an_address_that_leads_nowhere_is_a_warning(exporter: Heartbeats) -> None:
    file = exporter.folder / "config" / "a.yaml"
    file.write_text(file.read_text().replace("127.0.0.1:" + str(exporter.ping_port), f"0.0.0.0:{exporter.ping_port}"))
    findings = await examine(exporter)
    assert findings["URLs"] == (
        "warn", f"URLs of pings begin with http://0.0.0.0:{exporter.ping_port}, which leads nowhere",
    )  # fmt: skip
    assert findings["listener"] == ("pass", f"http://127.0.0.1:{exporter.ping_port}")

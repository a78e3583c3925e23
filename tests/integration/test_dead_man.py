"""The watcher outside: the remediator's pings, and `defib deadman` on another machine."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from aiohttp import web

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.integration.loop import Loop, alert, delivery
from tests.integration.peers import web_server
from tests.support import NO_TLS, eventually

MISSING, BACK = "Defib does not respond", "Defib responds again"


async def read_pings(loop: Loop) -> dict[str, float]:
    """The remediator's pings by outcome, from its metrics."""
    text = (await loop.ask("GET", "/metrics")).text
    found = re.findall(r'^defib_remediator_dead_man_pings_total\{outcome="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {outcome: float(count) for outcome, count in found}


async def test_the_remediator_pings_while_its_pipeline_works(loop: Loop) -> None:
    """Until the Watchdog arrives, and while the exporter does not answer, it withholds the ping."""
    pings: list[str] = []
    status = 200

    async def receive(request: web.Request) -> web.Response:
        pings.append(f"{request.method} {request.path}")
        return web.Response(text="OK", status=status)

    async with web_server(receive) as port:
        url = f"http://127.0.0.1:{port}/0f1c-secret-uuid"
        await loop.start({"web": loop.service("web")}, remediator={"dead_man": {"url": url, "every": "1s"}})

        async def count(outcome: str, above: float = 0.0) -> float | None:
            found = (await read_pings(loop)).get(outcome, 0.0)
            return found if found > above else None

        await eventually(lambda: count("withheld"))
        assert pings == []
        await loop.post(delivery(alert("", "Watchdog")))
        await eventually(lambda: count("sent"))
        assert set(pings) == {"GET /0f1c-secret-uuid"}
        status = 500
        await eventually(lambda: count("failed"))
        status = 200
        await loop.launcher.kill(loop.stack.pids["exporter"], signal.SIGKILL)
        withheld = await count("withheld")
        await eventually(lambda: count("withheld", withheld or 0.0))
        received = len(pings)
        await eventually(lambda: count("withheld", (withheld or 0.0) + 2))
        assert len(pings) == received
        await loop.stack.start_program("exporter")
        sent = await count("sent")
        await eventually(lambda: count("sent", sent or 0.0))
    log = (loop.folder / "remediator.log").read_text()
    assert "dead_man_ping_failed" in log
    assert "secret-uuid" not in log


class Watcher:
    """A `defib deadman`, and the webhook channel that it notifies."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder = launcher, folder
        self.received: list[dict[str, Any]] = []
        self.accepts = True
        self.options = ["--channel", "ops", "--within", "2s"]
        (self.port,) = reserve_ports(1)
        self.pid = 0

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not self.accepts:
            return web.Response(status=503)
        self.received.append(body)
        return web.Response()

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.received]

    async def start(self) -> None:
        state, config = str(self.folder / "state"), str(self.folder / "config")
        argv = [
            sys.executable, "-m", "defib", "deadman", "--listen", f"127.0.0.1:{self.port}", *self.options,
            "--directory", state, "--config", config,
        ]  # fmt: skip
        self.pid = await self.launcher.start(argv, self.folder / "log")
        await eventually(self.is_healthy)

    async def is_healthy(self) -> bool:
        try:
            return (await self.ask("/-/healthy")).status_code == 200
        except httpx.HTTPError:
            return False

    async def ask(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=60) as client:
            return await client.get(f"http://127.0.0.1:{self.port}{path}")

    @property
    def token(self) -> str:
        return (self.folder / "state" / "token").read_text().strip()

    async def ping(self) -> int:
        return (await self.ask(f"/ping/{self.token}")).status_code

    async def until(self, *titles: str) -> None:
        async def received() -> bool:
            return self.titles == list(titles)

        await eventually(received)


@pytest.fixture
async def watcher(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Watcher]:
    made = Watcher(launcher, tmp_path)
    async with web_server(made.receive) as port:
        channels = {
            "ops": {"webhook": {"url": f"http://127.0.0.1:{port}/"}},
            "other": {"webhook": {"url": "${NOT_SET_HERE}"}},
        }
        (tmp_path / "config").mkdir()
        text = yaml.safe_dump({"notify": {"language": "en", "channels": channels}})
        (tmp_path / "config" / "defib.yaml").write_text(text)
        yield made


async def test_the_watcher_notifies_when_pings_stop_and_when_they_return(watcher: Watcher) -> None:
    await watcher.start()
    assert (watcher.folder / "state" / "token").stat().st_mode & 0o777 == 0o600
    assert await watcher.ping() == 200
    assert (await watcher.ask("/ping/wrong")).status_code == 404
    await watcher.until(MISSING)
    assert watcher.received[0]["state"] == "watchdog_missing"
    assert watcher.received[0]["text"][0].startswith("Last ping: 20")
    await watcher.ask("/ping/wrong")
    assert await watcher.ping() == 200
    await watcher.until(MISSING, BACK)
    assert watcher.received[1]["notifications"][0]["duration_seconds"] >= 2.0
    await watcher.until(MISSING, BACK, MISSING)
    assert watcher.token not in (watcher.folder / "log").read_text()


async def test_optional_pings_are_missing_only_once_one_has_arrived(watcher: Watcher) -> None:
    watcher.options.append("--pings-optional")
    await watcher.start()
    await asyncio.sleep(4)  # twice the time in which one must arrive
    assert watcher.titles == []
    await watcher.ping()
    await watcher.until(MISSING)


async def test_a_ping_that_has_never_arrived_is_missing_too(watcher: Watcher) -> None:
    await watcher.start()
    await watcher.until(MISSING)
    assert "none since the watcher was started" in watcher.received[0]["text"][0]


async def test_a_deadline_that_passes_while_the_watcher_is_down_is_noticed(watcher: Watcher) -> None:
    """And what it has notified of, it does not repeat after a restart."""
    await watcher.start()
    await watcher.ping()
    await watcher.launcher.kill(watcher.pid, signal.SIGKILL)
    await asyncio.sleep(2.5)  # the deadline itself
    assert watcher.titles == []
    await watcher.start()
    await watcher.until(MISSING)

    async def is_stored() -> bool:
        return bool(json.loads((watcher.folder / "state" / "state.json").read_text())["notified"])

    await eventually(is_stored)
    await watcher.launcher.kill(watcher.pid, signal.SIGKILL)
    await watcher.start()
    await watcher.ping()
    await watcher.until(MISSING, BACK)


async def test_a_channel_that_fails_is_tried_again(watcher: Watcher) -> None:
    watcher.accepts = False
    await watcher.start()

    async def was_refused() -> bool:
        return "notification_retry" in (watcher.folder / "log").read_text()

    await eventually(was_refused)
    watcher.accepts = True
    await watcher.until(MISSING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--channel", "opps"], "the inventory has no channel 'opps'; did you mean ops?"),
        (["--channel", "other"], "NOT_SET_HERE is not set"),
        (["--channel", "ops", "--within", "soon"], "argument --within: "),
    ],
)
async def test_a_watcher_that_cannot_notify_does_not_start(
    watcher: Watcher, arguments: list[str], message: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "defib", "deadman", "--listen", "127.0.0.1:0", *arguments,
        "--directory", str(watcher.folder / "state"), "--config", str(watcher.folder / "config"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output = (await process.communicate())[0].decode()
    assert process.returncode == 1
    assert message in output


async def test_a_damaged_state_is_not_replaced(watcher: Watcher) -> None:
    (watcher.folder / "state").mkdir()
    (watcher.folder / "state" / "state.json").write_text('{"since": "now"}')
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "defib", "deadman", "--listen", "127.0.0.1:0", "--channel", "ops",
        "--directory", str(watcher.folder / "state"), "--config", str(watcher.folder / "config"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output = (await process.communicate())[0].decode()
    assert process.returncode == 1
    assert "is damaged" in output

"""Heartbeats as jobs and operators see them: pings over HTTP, and the state of the service that they lead to."""

import asyncio
import contextlib
import re
import signal
import socket
import sqlite3
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.integration.exporter_process import Exporter
from tests.support import NO_TLS, eventually

KEY = "the-ping-key-of-the-tests"
RUN = str(uuid.UUID(int=1))
OTHER_RUN = str(uuid.UUID(int=2))
CHECK = "4a1b6d0e-8f0f-4a5c-9f3c-0e6c1f4e7d21"
SECRET = "s3cret-of-the-backup"
SERVICES: dict[str, Any] = {
    "backup": {"probe": {"heartbeat": {"every": "1h"}}},
    "quick": {"probe": {"heartbeat": {"every": "1s", "grace": "500ms"}}},
    "moved": {"probe": {"heartbeat": {"cron": "0 3 * * *", "uuid": CHECK}}},
    "checked": {"probe": {"heartbeat": {"every": "1h", "expect": {"body_lacks": "0 files", "json": {"$.ok": True}}}}},
    "one": {"probe": {"heartbeat": {"every": "1h", "slug": "twice"}}},
    "two": {"probe": {"heartbeat": {"every": "1h", "slug": "twice"}}},
    "web": {"probe": {"tcp": {"address": "127.0.0.1:1", "source": "127.0.0.1"}}},
}


class Heartbeats(Exporter):
    """A running exporter, and a client for its pings."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        super().__init__(launcher, folder)
        (self.ping_port,) = reserve_ports(1)
        self.connect_jobs()

    def connect_jobs(self) -> None:
        self.jobs = httpx.AsyncClient(
            verify=NO_TLS, base_url=f"http://127.0.0.1:{self.ping_port}", trust_env=False, timeout=60
        )

    def write(self, services: dict[str, Any] = SERVICES) -> None:
        heartbeats = {"listen": f"127.0.0.1:{self.ping_port}", "database": "../heartbeats.db", "ping_key": KEY}
        self.configure(services, exporter={"token": "t0ken", "heartbeats": heartbeats})

    async def ping(self, path: str, method: str = "GET", **more: Any) -> httpx.Response:
        return await self.jobs.request(method, path, **more)

    async def heartbeat(self, name: str) -> dict[str, Any]:
        answer = await self.client.get(f"/api/v1/heartbeats/{name}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def reload(self) -> None:
        assert (await self.client.post("/-/reload")).is_success

    async def until(self, name: str, *, up: bool | None, reason: str | None = None) -> dict[str, Any]:
        """Wait until a service is up or down, and return it."""

        async def reached() -> dict[str, Any] | None:
            service = await self.service(name)
            is_reached = service["up"] is up and (reason is None or service["last"]["reason"] == reason)
            return service if is_reached else None

        return await eventually(reached) or {}

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, launcher: Launcher, folder: Path, services: dict[str, Any] = SERVICES
    ) -> "AsyncIterator[Heartbeats]":
        """Start an exporter with these services; its clients are closed at the end."""
        made = cls(launcher, folder)
        made.write(services)
        await made.start()
        yield made
        await made.client.aclose()
        await made.jobs.aclose()

    async def stop(self, number: int = signal.SIGTERM) -> None:
        await self.launcher.kill(self.pid, signal.Signals(number))


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Heartbeats]:
    async with Heartbeats.running(launcher, tmp_path) as made:
        yield made


async def test_answers_are_those_of_healthchecks(exporter: Heartbeats) -> None:
    for method in ("GET", "HEAD", "POST"):
        for path in (f"/ping/{CHECK}", f"/{CHECK}", f"/ping/{KEY}/moved", f"/{KEY}/moved/0", f"/ping/{CHECK}/start"):
            answer = await exporter.ping(path, method)
            assert (answer.status_code, answer.text) == (200, "" if method == "HEAD" else "OK"), (method, path)
            assert answer.headers["Ping-Body-Limit"] == "10000"
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
    for path, status, text in (
        (f"/ping/{RUN}", 404, "not found"),
        ("/ping/wrong-key-of-the-tests/backup", 404, "not found"),
        (f"/ping/{KEY}/none", 404, "not found"),
        (f"/ping/{KEY}/web", 404, "not found"),
        (f"/ping/{KEY}/twice", 409, "ambiguous slug"),
        ("/ping/123", 400, "invalid uuid format"),
        (f"/ping/{CHECK}/256", 400, "invalid url format"),
        (f"/ping/{CHECK}/start/now", 400, "invalid url format"),
        (f"/ping/{CHECK}?rid=1", 400, "invalid uuid format"),
    ):
        answer = await exporter.ping(path)
        assert (answer.status_code, answer.text) == (status, text), path
        assert answer.headers["Ping-Body-Limit"] == "10000"
    assert (await exporter.ping(f"/ping/{CHECK}", "PUT")).status_code == 405


async def test_pings_decide_the_state(exporter: Heartbeats) -> None:
    assert (await exporter.service("backup"))["up"] is None
    assert (await exporter.heartbeat("backup"))["status"] == "waiting"
    probed = (await exporter.client.post("/api/v1/services/backup/probe")).json()
    assert (probed["up"], probed["reason"]) == (None, "error")
    await exporter.ping(f"/{KEY}/backup")
    await exporter.until("backup", up=True)
    await exporter.ping(f"/{KEY}/backup/3", "POST", content="12 files\ndisk full")
    service = await exporter.until("backup", up=False, reason="failed")
    assert service["last"]["message"] == "exit status 3; its output ends with: 12 files disk full"
    assert await exporter.value('service_probe_failures_total{service="backup"') == 1
    assert await exporter.value('service_heartbeat_exit_status{service="backup"') == 3
    await exporter.ping(f"/{KEY}/backup")
    await exporter.until("backup", up=True)
    page = (await exporter.client.get("/metrics")).text
    assert 'service_probe_interval_seconds{service="backup"' not in page
    assert 'service_heartbeat_exit_status{service="backup"' not in page
    assert re.search(r'service_info\{service="backup".*probe="heartbeat"\} 1', page)


async def test_a_late_ping_is_noticed_and_has_the_time_at_which_it_was_due(exporter: Heartbeats) -> None:
    await exporter.ping(f"/{KEY}/quick")
    service = await exporter.until("quick", up=False, reason="late")
    heartbeat = await exporter.heartbeat("quick")
    due = _seconds(heartbeat["deadline"])
    assert abs(_seconds(service["last"]["started_at"]) - due) < 0.01
    assert abs(_seconds(heartbeat["since"]) - due) < 0.01
    assert service["last"]["message"] == "no ping in time: expected every 1s, at most 500ms late"
    events = (await exporter.client.get("/api/v1/events")).json()["events"]
    assert [each["state"] for each in events if each["name"] == "quick"][:2] == ["up", "down"]


async def test_a_heartbeat_that_is_never_pinged_is_late_once_one_is_due(exporter: Heartbeats) -> None:
    service = await exporter.until("quick", up=False, reason="late")
    assert service["last"]["message"] == "no ping has been received: expected every 1s, at most 500ms late"


async def test_after_a_restart_it_is_late_once_a_ping_is_due(exporter: Heartbeats) -> None:
    """Whether or not it was pinged before; the time of the restart does not begin anew."""
    exporter.write({name: {"probe": {"heartbeat": {"every": "20s", "grace": "0s"}}} for name in ("pinged", "never")})
    await exporter.reload()
    assert (await exporter.ping(f"/{KEY}/pinged")).status_code == 200
    before = {name: await exporter.heartbeat(name) for name in ("pinged", "never")}
    await exporter.stop()
    await exporter.start()
    for name, known in before.items():
        again = await exporter.heartbeat(name)
        assert abs(_seconds(again["deadline"]) - _seconds(known["deadline"])) < 0.1
        await exporter.until(name, up=False, reason="late")


async def test_starts_and_ends(exporter: Heartbeats) -> None:
    await exporter.ping(f"/{KEY}/backup/start?rid={RUN}")
    assert await exporter.value('service_heartbeat_started{service="backup"') == 1
    assert (await exporter.service("backup"))["up"] is None
    await exporter.ping(f"/{KEY}/backup?rid={OTHER_RUN}")
    await exporter.until("backup", up=True)
    assert (await exporter.heartbeat("backup"))["started_at"] is not None
    await exporter.ping(f"/{KEY}/backup?rid={RUN}")
    heartbeat = await exporter.heartbeat("backup")
    assert heartbeat["started_at"] is None
    assert heartbeat["duration_seconds"] > 0
    await exporter.ping(f"/{KEY}/backup/log", "POST", content="half way")
    pings = (await exporter.heartbeat("backup"))["pings"]
    assert [each["kind"] for each in pings] == ["log", "success", "success", "start"]
    assert pings[0]["body"] == "half way"
    assert pings[0]["client"].startswith("POST 127.0.0.1 python-httpx/")


async def test_an_unexpected_body_is_a_failure(exporter: Heartbeats) -> None:
    await exporter.ping(f"/{KEY}/checked", "POST", content='{"ok": true}')
    await exporter.until("checked", up=True)
    await exporter.ping(f"/{KEY}/checked", "POST", content='{"ok": false}')
    service = await exporter.until("checked", up=False, reason="failed")
    assert service["last"]["message"] == "$.ok is false, expected true"


async def test_bodies_are_masked_and_cut(exporter: Heartbeats) -> None:
    services = {**SERVICES, "page": {"probe": {"http": {"url": "http://127.0.0.1:1", "auth": {"bearer": SECRET}}}}}
    exporter.write(services)
    await exporter.reload()
    urls = (await exporter.client.get("/api/v1/heartbeats/backup/urls")).json()
    assert urls["url"].startswith(f"http://127.0.0.1:{exporter.ping_port}/ping/")
    assert urls["slug_url"] == f"http://127.0.0.1:{exporter.ping_port}/ping/{KEY}/backup"
    body = f"password {SECRET}, {urls['url']}, \xff\x00 ".encode("latin-1") + b"x" * 1_000_000
    assert (await exporter.ping(urls["url"], "POST", content=body)).text == "OK"
    (ping,) = (await exporter.heartbeat("backup"))["pings"]
    assert ping["is_cut"] is True
    assert len(ping["body"]) <= 10_100
    own = urls["url"].rpartition("/")[2]
    for each in (str(await exporter.heartbeat("backup")), (exporter.folder / "log").read_text()):
        assert SECRET not in each
        assert own not in each
        assert KEY not in each
    stored = (
        sqlite3.connect(exporter.folder / "heartbeats.db").execute("SELECT group_concat(body) FROM pings").fetchone()[0]
    )
    assert SECRET not in stored


async def test_what_looks_like_a_credential_is_masked(exporter: Heartbeats) -> None:
    """Viewers and chats see the end of a failed job's output."""
    shown = "DATABASE_URL=postgres://app:pg-pass@db/prod token: tok-en " + "x" * 250 + " password=pass-word"
    hidden = ("pg-pass", "tok-en", "pass-word")
    await exporter.ping(f"/{KEY}/backup/fail", "POST", content=shown)
    service = await exporter.until("backup", up=False)
    assert service["last"]["message"].endswith(f" {'x' * 250} password=***")
    found = str(await exporter.heartbeat("backup")) + str(service) + (exporter.folder / "log").read_text()
    assert not [each for each in hidden if each in found]


async def test_a_secret_at_the_end_of_what_is_stored_is_masked(exporter: Heartbeats) -> None:
    services = {**SERVICES, "page": {"probe": {"http": {"url": "http://127.0.0.1:1", "auth": {"bearer": SECRET}}}}}
    exporter.write(services)
    await exporter.reload()
    await exporter.ping(f"/{KEY}/backup", "POST", content="x" * (10_000 - len(SECRET) // 2) + SECRET + "y" * 20_000)
    (ping,) = (await exporter.heartbeat("backup"))["pings"]
    assert SECRET[:4] not in ping["body"]
    assert ping["is_cut"] is True
    assert ping["body"] == "x" * (10_000 - len(SECRET) // 2) + "***"


async def test_pings_of_one_heartbeat_are_limited(exporter: Heartbeats) -> None:
    answers = await asyncio.gather(*(exporter.ping(f"/{KEY}/backup") for _ in range(200)))
    statuses = [answer.status_code for answer in answers]
    assert 60 <= statuses.count(200) < 150
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.text == "rate limit exceeded"
    assert int(refused.headers["Retry-After"]) >= 1
    assert (await exporter.ping(f"/{KEY}/moved")).status_code == 200


async def test_a_slow_sender_counts_with_what_it_has_sent(exporter: Heartbeats) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", exporter.ping_port)
    head = f"POST /{KEY}/backup/fail HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf a body"
    writer.write(head.encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    service = await exporter.until("backup", up=False)
    assert service["last"]["message"].endswith("half a body")


async def test_what_was_answered_survives_a_kill(exporter: Heartbeats) -> None:
    await exporter.ping(f"/{KEY}/quick")
    await exporter.until("quick", up=False, reason="late")
    late = await exporter.heartbeat("quick")
    await exporter.ping(f"/{KEY}/backup/7", "POST", content="no space left")
    await exporter.stop(signal.SIGKILL)
    await exporter.start()
    failed = await exporter.until("backup", up=False, reason="failed")
    assert failed["last"]["message"] == "exit status 7; its output ends with: no space left"
    again = await exporter.until("quick", up=False, reason="late")
    assert abs(_seconds(again["since"]) - _seconds(late["since"])) < 0.01
    assert (await exporter.service("moved"))["up"] is None


async def test_nobody_is_late_for_the_time_in_which_pings_could_not_be_received(exporter: Heartbeats) -> None:
    services = {"job": {"probe": {"heartbeat": {"every": "8s", "grace": "1s"}}}}
    exporter.write(services)
    await exporter.reload()
    assert (await exporter.ping(f"/{KEY}/job")).status_code == 200
    before = await exporter.heartbeat("job")
    await exporter.stop(signal.SIGSTOP)
    await asyncio.sleep(10)  # its ping is due in this time, and could not be received
    await exporter.stop(signal.SIGCONT)

    async def continues() -> bool:
        return bool((await exporter.heartbeat("job"))["deadline"] != before["deadline"])

    await eventually(continues)
    assert (await exporter.heartbeat("job"))["status"] == "up"
    await exporter.until("job", up=False, reason="late")


async def test_reloads(exporter: Heartbeats) -> None:
    await exporter.ping(f"/{KEY}/backup")
    await exporter.until("backup", up=True)
    services = {name: service for name, service in SERVICES.items() if name != "backup"}
    exporter.write(services)
    await exporter.reload()
    assert (await exporter.ping(f"/{KEY}/backup")).status_code == 404
    assert 'service="backup"' not in (await exporter.client.get("/metrics")).text
    exporter.write()
    await exporter.reload()
    assert (await exporter.service("backup"))["up"] is None  # what was known is forgotten
    assert (await exporter.ping(f"/{KEY}/backup")).status_code == 200
    exporter.write({"web": SERVICES["web"]})
    await exporter.reload()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", exporter.ping_port)
    exporter.write()
    await exporter.reload()
    assert (await exporter.ping(f"/{KEY}/backup")).status_code == 200


async def test_a_port_in_use_refuses_the_reload(exporter: Heartbeats) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        exporter.ping_port, before = other.getsockname()[1], exporter.ping_port
        exporter.write()
        refused = await exporter.client.post("/-/reload")
        exporter.ping_port = before
    assert refused.status_code >= 400
    assert (await exporter.ping(f"/{KEY}/backup")).status_code == 200


async def test_a_full_disk_refuses_pings_and_loses_nothing(exporter: Heartbeats) -> None:
    await exporter.ping(f"/{KEY}/backup")
    await exporter.until("backup", up=True)
    (exporter.folder / "heartbeats.db").rename(exporter.folder / "moved.db")
    answer = await exporter.ping(f"/{KEY}/backup/fail")
    assert (answer.status_code, answer.text) == (503, "cannot store the ping")
    assert (await exporter.service("backup"))["up"] is True
    (exporter.folder / "moved.db").rename(exporter.folder / "heartbeats.db")
    assert (await exporter.ping(f"/{KEY}/backup/fail")).status_code == 200
    await exporter.until("backup", up=False, reason="failed")


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()

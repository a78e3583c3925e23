"""Heartbeats that jobs create with their first ping, as jobs and operators see them."""

import asyncio
import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from defib.demo.launcher import Launcher
from fleet.inventory.model import Inventory
from remediator.record.database import Database
from tests.forked_defib import run_defib
from tests.integration.loop import Loop
from tests.integration.test_commands import on_loop
from tests.integration.test_heartbeat_commands import as_user, start_with_heartbeats
from tests.integration.test_heartbeats import KEY, SERVICES, Heartbeats
from tests.support import NO_TLS, eventually

RUN = "00000000-0000-0000-0000-000000000001"


class Creating(Heartbeats):
    """An exporter whose configuration lets jobs create heartbeats."""

    services: dict[str, Any] = SERVICES
    create: dict[str, Any] | None = {"slugs": "job-[a-z0-9-]+", "at_most": 3, "category": "backup", "team": "ops"}

    def write(self, services: dict[str, Any] | None = None) -> None:
        super().write(self.services if services is None else services)
        file = self.folder / "config" / "a.yaml"
        written = yaml.safe_load(file.read_text())
        if self.create is not None:
            written["exporter"]["heartbeats"]["create"] = self.create
        file.write_text(yaml.safe_dump(written))

    async def apply(self, services: dict[str, Any] | None = None, **create: Any) -> None:
        """Reload with these services, and with other settings of what jobs may create."""
        if create:
            self.create = {**(self.create or {}), **create}
        self.write(services)
        await self.reload()

    async def listed(self) -> dict[str, dict[str, Any]]:
        """Return the heartbeats that jobs have created."""
        answer = (await self.client.get("/api/v1/heartbeats")).json()
        return {each["service"]: each for each in answer["heartbeats"] if each["created"]}

    async def ask(self, path: str, method: str = "GET", **more: Any) -> tuple[int, str]:
        answer = await self.ping(path, method, **more)
        return answer.status_code, answer.text


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Creating]:
    made = Creating(launcher, tmp_path)
    made.write()
    await made.start()
    yield made
    await made.client.aclose()
    await made.jobs.aclose()


async def test_the_first_ping_creates_a_heartbeat(exporter: Creating) -> None:
    assert await exporter.ask(f"/ping/{KEY}/job-1") == (404, "not found")
    answer = await exporter.ping(f"/ping/{KEY}/job-1?create=1")
    assert (answer.status_code, answer.text) == (201, "Created")
    assert answer.headers["Ping-Body-Limit"] == "10000"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert await exporter.ask(f"/ping/{KEY}/job-1?create=1") == (200, "OK")
    assert await exporter.ask(f"/{KEY}/job-1", "POST", content="12 files") == (200, "OK")
    assert await exporter.ask(f"/ping/{KEY}/job-2/3?create=1&rid={RUN}", "POST", content="disk full") == (
        201,
        "Created",
    )
    assert await exporter.ask(f"/{KEY}/job-3/start?create=1", "HEAD") == (201, "")
    await exporter.until("job-1", up=True)
    failed = await exporter.until("job-2", up=False, reason="failed")
    assert failed["last"]["message"] == "exit status 3; its output ends with: disk full"
    assert (failed["severity"], failed["category"], failed["team"]) == ("warning", "backup", "ops")
    assert (failed["created"], failed["automatic"]) == (True, False)
    assert {name: each["status"] for name, each in (await exporter.listed()).items()} == {
        "job-1": "up", "job-2": "failed", "job-3": "waiting",
    }  # fmt: skip
    shown = await exporter.heartbeat("job-1")
    assert (shown["every_seconds"], shown["grace_seconds"]) == (86400, 3600)
    assert len(shown["pings"]) == 3
    labels = 'service="job-2",host="",provider="other",category="backup"'
    page = (await exporter.client.get("/metrics")).text
    assert f"service_up{{{labels}}} 0\n" in page
    assert f'service_info{{{labels},name="job-2",severity="warning",team="ops",on_failure="notify"' in page
    assert f"service_heartbeat_exit_status{{{labels}}} 3\n" in page
    assert await exporter.value("defib_exporter_created_heartbeats") == 3
    own = (await exporter.client.get("/api/v1/heartbeats/job-1/urls")).json()["url"]
    assert (await exporter.ping(own)).text == "OK"
    assert own.rpartition("/")[2] not in (exporter.folder / "log").read_text()


async def test_what_creates_none(exporter: Creating) -> None:
    for path, status, text in (
        (f"/ping/{KEY}/other?create=1", 404, "not found"),
        (f"/ping/{KEY}/my-job-1?create=1", 404, "not found"),  # the pattern is for the whole slug
        (f"/ping/{KEY}/job-1?create=0", 404, "not found"),
        ("/ping/wrong-key-of-the-tests/job-1?create=1", 404, "not found"),
        (f"/ping/{RUN}?create=1", 404, "not found"),
        (f"/ping/{KEY}/Job-1?create=1", 400, "invalid slug"),
        (f"/ping/{KEY}/job-{'x' * 60}?create=1", 400, "invalid slug"),
        (f"/ping/{KEY}/job-%0a?create=1", 400, "invalid slug"),
        (f"/ping/{KEY}/job.1?create=1", 400, "invalid slug"),
        (f"/ping/{KEY}/job-1/256?create=1", 400, "invalid url format"),
        (f"/ping/{KEY}/job-1?create=1&rid=1", 400, "invalid uuid format"),
        (f"/ping/{KEY}/twice?create=1", 409, "ambiguous slug"),
        (f"/ping/{KEY}/backup?create=1", 200, "OK"),
    ):
        assert await exporter.ask(path) == (status, text), path
    assert (await exporter.ping(f"/ping/{KEY}/job-1?create=1", "PUT")).status_code == 405
    assert await exporter.listed() == {}
    await exporter.apply({**SERVICES, "job-web": SERVICES["web"]})
    assert await exporter.ask(f"/ping/{KEY}/job-web?create=1") == (409, "another service has this name")
    exporter.create = None
    await exporter.apply()
    assert await exporter.ask(f"/ping/{KEY}/job-1?create=1") == (404, "not found")
    assert await exporter.ask(f"/ping/{KEY}/Job-1?create=1") == (404, "not found")


async def test_no_more_than_permitted_are_created(exporter: Creating) -> None:
    for name in ("job-1", "job-2", "job-3"):
        assert (await exporter.ping(f"/{KEY}/{name}?create=1")).status_code == 201
    refused = 403, "the limit of 3 created heartbeats is reached"
    assert await exporter.ask(f"/{KEY}/job-4?create=1") == refused
    assert await exporter.ask(f"/{KEY}/job-1?create=1") == (200, "OK")
    assert await exporter.value("defib_exporter_created_heartbeats_refused_total") == 1
    (line,) = (each for each in (exporter.folder / "log").read_text().splitlines() if "heartbeat_not_created" in each)
    assert {"slug": "job-4", "level": "warning"}.items() <= json.loads(line).items()
    assert (await exporter.client.delete("/api/v1/heartbeats/job-1")).json() == {"service": "job-1"}
    assert await exporter.ask(f"/{KEY}/job-1") == (404, "not found")
    assert (await exporter.client.get("/api/v1/services/job-1")).status_code == 404
    assert "job-1" not in (await exporter.client.get("/metrics")).text
    assert await exporter.ask(f"/{KEY}/job-4?create=1") == (201, "Created")
    for name, status, code in (("job-1", 404, "unknown_heartbeat"), ("backup", 409, "in_inventory")):
        answer = await exporter.client.delete(f"/api/v1/heartbeats/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    await exporter.apply(at_most=1)  # those that exist remain
    assert set(await exporter.listed()) == {"job-2", "job-3", "job-4"}
    assert (await exporter.ask(f"/{KEY}/job-5?create=1"))[0] == 403


async def test_one_of_many_pings_at_the_same_time_creates_it(exporter: Creating) -> None:
    answers = await asyncio.gather(*(exporter.ask(f"/{KEY}/job-{n % 2}?create=1") for n in range(20)))
    assert sorted(answers) == [(200, "OK")] * 18 + [(201, "Created")] * 2


async def test_creation_is_limited_too(exporter: Creating) -> None:
    await exporter.apply(at_most=1000)
    answers = await asyncio.gather(*(exporter.ping(f"/{KEY}/job-{n}?create=1") for n in range(200)))
    statuses = [answer.status_code for answer in answers]
    assert 60 <= statuses.count(201) < 150
    refused = next(answer for answer in answers if answer.status_code != 201)
    assert (refused.status_code, refused.text) == (429, "rate limit exceeded")
    assert int(refused.headers["Retry-After"]) >= 1


async def test_what_was_created_survives_a_kill(exporter: Creating) -> None:
    assert await exporter.ask(f"/{KEY}/job-1/7?create=1", "POST", content="no space left") == (201, "Created")
    await exporter.stop(signal.SIGKILL)
    await exporter.start()
    failed = await exporter.until("job-1", up=False, reason="failed")
    assert failed["created"] is True
    assert set(await exporter.listed()) == {"job-1"}
    assert await exporter.value("defib_exporter_created_heartbeats") == 1
    assert (await exporter.client.delete("/api/v1/heartbeats/job-1")).is_success
    await exporter.stop(signal.SIGKILL)
    await exporter.start()
    assert await exporter.listed() == {}


async def test_without_heartbeats_in_the_inventory_jobs_create_the_first_one(exporter: Creating) -> None:
    await exporter.stop()
    exporter.write({})
    await exporter.start()
    assert await exporter.ask(f"/{KEY}/job-1?create=1") == (201, "Created")
    await exporter.until("job-1", up=True)
    await exporter.apply({})
    assert await exporter.ask(f"/{KEY}/job-1") == (200, "OK")


async def test_a_full_disk_creates_none(exporter: Creating) -> None:
    (exporter.folder / "heartbeats.db").rename(exporter.folder / "moved.db")
    assert await exporter.ask(f"/{KEY}/job-1?create=1") == (503, "cannot store the ping")
    assert await exporter.listed() == {}
    (exporter.folder / "moved.db").rename(exporter.folder / "heartbeats.db")
    assert await exporter.ask(f"/{KEY}/job-1?create=1") == (201, "Created")


async def test_the_inventory_wins(exporter: Creating) -> None:
    for name in ("job-1", "job-2"):
        assert (await exporter.ping(f"/{KEY}/{name}/fail?create=1")).status_code == 201
    url = (await exporter.client.get("/api/v1/heartbeats/job-1/urls")).json()["url"]
    probe = {"heartbeat": {"every": "2h"}}
    services = {
        **SERVICES,
        "job-1": {"probe": probe},
        "other": {"probe": {"heartbeat": {"every": "1h", "slug": "job-2"}}},
    }
    await exporter.apply(services)
    assert await exporter.listed() == {}
    taken = await exporter.heartbeat("job-1")
    assert (taken["status"], taken["every_seconds"], len(taken["pings"])) == ("failed", 7200, 1)  # its state is kept
    assert (await exporter.service("job-1"))["severity"] == "critical"
    assert (await exporter.ping(url)).status_code == 200
    assert await exporter.ask(f"/{KEY}/job-2?create=1") == (200, "OK")
    assert (await exporter.heartbeat("other"))["status"] == "up"
    await exporter.apply()  # it has left the inventory, and is not created any more
    assert await exporter.listed() == {}
    assert await exporter.ask(f"/{KEY}/job-1") == (404, "not found")


async def test_what_the_configuration_no_longer_permits_is_forgotten(exporter: Creating) -> None:
    for name in ("job-1", "job-2"):
        assert (await exporter.ping(f"/{KEY}/{name}?create=1")).status_code == 201
    await exporter.apply(slugs="job-2", every="2h", severity="info")
    assert set(await exporter.listed()) == {"job-2"}
    service = await exporter.service("job-2")
    assert (service["up"], service["severity"]) == (True, "info")
    assert (await exporter.heartbeat("job-2"))["every_seconds"] == 7200
    exporter.create = None
    await exporter.apply()
    assert await exporter.listed() == {}
    exporter.create = Creating.create
    await exporter.apply()
    assert await exporter.listed() == {}


async def test_those_that_are_down_for_long_are_forgotten(exporter: Creating) -> None:
    await exporter.apply(every="1s", grace="0s", forget_after="3s")
    assert await exporter.ask(f"/{KEY}/job-1?create=1") == (201, "Created")
    assert await exporter.ask(f"/{KEY}/job-2/fail?create=1") == (201, "Created")
    await exporter.until("job-1", up=False, reason="late")

    async def are_forgotten() -> bool:
        return await exporter.listed() == {}

    await eventually(are_forgotten)
    assert await exporter.ask(f"/{KEY}/job-1") == (404, "not found")
    assert "job-1" not in (await exporter.client.get("/metrics")).text
    states = sqlite3.connect(exporter.folder / "heartbeats.db").execute("SELECT service FROM heartbeats").fetchall()
    assert {"job-1", "job-2"}.isdisjoint(name for (name,) in states)
    assert "forget_after" in (exporter.folder / "log").read_text()


async def test_backups_have_what_was_created(exporter: Creating) -> None:
    record = f"sqlite:///{exporter.folder}/record.db"
    await asyncio.to_thread(lambda: Database(record, Inventory()).close())
    file = exporter.folder / "config" / "a.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "remediator": {"database": record}}))
    assert await exporter.ask(f"/{KEY}/job-1/7?create=1") == (201, "Created")
    config, backup = ("--config", str(exporter.folder / "config")), exporter.folder / "kept.db"
    done = await asyncio.to_thread(run_defib, "backup", str(backup), *config)
    assert done.returncode == 0, done.stderr
    assert (await exporter.client.delete("/api/v1/heartbeats/job-1")).is_success
    await exporter.stop()
    done = await asyncio.to_thread(run_defib, "restore", str(backup.with_name("kept.heartbeats.db")), *config)
    assert done.returncode == 0, done.stderr
    await exporter.start()
    await exporter.until("job-1", up=False, reason="failed")
    assert set(await exporter.listed()) == {"job-1"}


@pytest.mark.needs("sshd")
async def test_people_are_notified_and_nothing_is_restarted(loop: Loop) -> None:
    pings = await start_with_heartbeats(loop, create={"slugs": "job-.*", "every": "2s", "grace": "0s"})
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as jobs:
        assert (await jobs.get(f"{pings}/{KEY}/job-1?create=1")).status_code == 201

        async def status() -> str:
            listed = (await as_user(loop, "viewer", "GET", "")).json()["heartbeats"]
            return next((each["status"] for each in listed if each["service"] == "job-1"), "")

        async def is_late() -> bool:
            return await status() == "late"

        await eventually(is_late)
        await loop.fire("job-1")
        await loop.until_cards("Alert: ServiceDown · job-1")
        assert f"{loop.stack.url('remediator')}/heartbeats/job-1" in loop.feishu.received[0].text
        table = (await on_loop(loop, "heartbeat", "list")).stdout
        assert "created by a ping; no ping in time: expected every 2s, at most 0s late" in table
        findings = json.loads((await on_loop(loop, "doctor", "--for", "exporter", "--json")).stdout)["findings"]
        exporter = {each["check"]: each["result"] for each in findings if each["subject"] == "exporter"}
        assert exporter["reachable"] == "pass"  # it is no difference between the programs
        url = (await on_loop(loop, "heartbeat", "url", "job-1")).stdout.strip()
        assert (await jobs.get(url)).text == "OK"
        await loop.fire("job-1", status="resolved")
        await loop.until_cards("Alert: ServiceDown · job-1", "Alert resolved: ServiceDown · job-1")
    assert (await loop.ask("GET", "/api/v1/incidents")).json()["incidents"] == []
    assert (await loop.ask("GET", "/api/v1/actions")).json()["actions"] == []
    assert (await on_loop(loop, "heartbeat", "ping", "job-1")).stdout == "job-1: success\n"
    assert (await as_user(loop, "viewer", "DELETE", "/job-1")).status_code == 403
    removed = await on_loop(loop, "heartbeat", "remove", "job-1")
    assert (removed.returncode, removed.stdout) == (0, "job-1: removed\n")
    for name, message in (
        ("job-1", "the exporter has no such heartbeat"),
        ("backup", "the inventory has the heartbeat 'backup': remove it there"),
        ("none", "the inventory has no service 'none'"),
    ):
        refused = await on_loop(loop, "heartbeat", "remove", name)
        assert (refused.returncode, message in refused.stderr) == (1, True), refused.stderr
    audit = (await loop.ask("GET", "/api/v1/audit")).json()["audit"]
    entries = {(each["event"], each["target"], each["outcome"]) for each in audit}
    assert {("remove heartbeat", "job-1", "done"), ("remove heartbeat", "backup", "refused")} <= entries

"""Heartbeats for operators: the remediator's API, and `defib heartbeat` with a remediator and an exporter."""

import json
import re
import signal
from typing import Any

import httpx
import pytest

from defib.demo.stack import reserve_ports
from tests.integration.loop import Loop
from tests.integration.test_access import basic, start_with_users
from tests.integration.test_commands import on_loop
from tests.support import NO_TLS, eventually

pytestmark = pytest.mark.needs("sshd")
KEY = "the-ping-key-of-the-tests"
CHECK = "4a1b6d0e-8f0f-4a5c-9f3c-0e6c1f4e7d21"


async def start_with_heartbeats(loop: Loop, services: dict[str, Any] | None = None, **settings: Any) -> str:
    """Start both programs with heartbeats and a user of each role; returns the address for pings."""
    (port,) = reserve_ports(1)
    heartbeats = {
        "backup": {"probe": {"heartbeat": {"every": "1h"}}},
        "moved": {"probe": {"heartbeat": {"cron": "0 3 * * *", "uuid": CHECK}}},
        "sync": {"probe": {"heartbeat": {"every": "1s", "grace": "500ms"}}},
    }
    database = str(loop.folder / "heartbeats.db")
    settings = {"listen": f"127.0.0.1:{port}", "database": database, "ping_key": KEY, **settings}
    services = {"web": loop.service("web"), **heartbeats, **(services or {})}
    await start_with_users(loop, services, exporter={"heartbeats": settings})
    return f"http://127.0.0.1:{port}"


async def as_user(loop: Loop, user: str, method: str, path: str, body: Any = None) -> httpx.Response:
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=120) as client:
        return await client.request(
            method, f"{loop.stack.url('remediator')}/api/v1/heartbeats{path}", json=body, headers=basic(user, user)
        )


async def test_the_api(loop: Loop) -> None:
    pings = await start_with_heartbeats(loop)
    async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as jobs:
        await jobs.post(f"{pings}/{KEY}/backup/3", content="disk full")
        await jobs.get(f"{pings}/{KEY}/sync")

    async def is_late() -> bool:
        listed = (await as_user(loop, "viewer", "GET", "")).json()["heartbeats"]
        return [(each["service"], each["status"]) for each in listed] == [
            ("backup", "failed"), ("sync", "late"), ("moved", "waiting"),
        ]  # fmt: skip

    await eventually(is_late)
    late = (await as_user(loop, "viewer", "GET", "/sync")).json()
    assert late["problem"] == "no ping in time: expected every 1s, at most 500ms late"
    assert (await as_user(loop, "viewer", "GET", "/moved")).json()["timezone"] == "Asia/Shanghai"
    for user, body in (("viewer", None), ("operator", "disk full")):
        (ping,) = (await as_user(loop, user, "GET", "/backup")).json()["pings"]
        assert (ping["body"], ping["exit_status"]) == (body, 3)
    urls = await as_user(loop, "operator", "GET", "/moved/urls")
    badge_url, category_badge_url = (urls.json()[name] for name in ("badge_url", "category_badge_url"))
    assert urls.json() == {
        "url": f"{pings}/ping/{CHECK}", "slug_url": f"{pings}/ping/{KEY}/moved",
        "push_url": f"{pings}/api/push/{CHECK}", "badge_url": badge_url,
        "category_badge_url": category_badge_url,
    }  # fmt: skip
    assert urls.headers["Cache-Control"] == "no-store"
    sent = await as_user(loop, "operator", "POST", "/backup/ping", {"message": "repaired by hand"})
    assert sent.json() == {"service": "backup", "kind": "success", "exit_status": None}
    found = (await as_user(loop, "operator", "GET", "/backup")).json()
    assert (found["status"], found["pings"][0]["body"], found["pings"][0]["client"]) == (
        "up", "repaired by hand", "operator",
    )  # fmt: skip
    for user, method, path, sent_body, status, code in (
        ("viewer", "GET", "/moved/urls", None, 403, "forbidden"),
        ("viewer", "POST", "/moved/ping", {}, 403, "forbidden"),
        ("operator", "GET", "/none", None, 404, "unknown_heartbeat"),
        ("operator", "GET", "/web", None, 404, "unknown_heartbeat"),
        ("operator", "GET", "/..%2fservices", None, 404, "unknown_heartbeat"),
        ("operator", "GET", "/none/urls", None, 404, "unknown_service"),
        ("operator", "GET", "/web/urls", None, 404, "unknown_heartbeat"),
        ("operator", "POST", "/backup/ping", {"kind": "other"}, 400, "bad_request"),
        ("operator", "POST", "/backup/ping", {"kind": "log", "exit_status": 1}, 400, "bad_request"),
        ("operator", "POST", "/backup/ping", {"exit_status": 256}, 400, "bad_request"),
    ):
        answer = await as_user(loop, user, method, path, sent_body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (path, answer.text)
    audit = (await loop.ask("GET", "/api/v1/audit")).json()["audit"]
    entries = {(each["event"], each["name"], each["target"], each["outcome"]) for each in audit}
    assert {
        ("read ping URL", "operator", "moved", "done"), ("read ping URL", "operator", "web", "refused"),
        ("ping", "operator", "backup", "done"), ("ping", "operator", "backup", "refused"),
    } <= entries  # fmt: skip
    for program in ("exporter", "remediator"):
        log = loop.stack.log_path(program).read_text()
        assert CHECK not in log
        assert KEY not in log
    await loop.launcher.kill(loop.stack.pids["exporter"], signal.SIGKILL)
    assert (await as_user(loop, "viewer", "GET", "")).status_code == 502
    assert (await as_user(loop, "operator", "GET", "/moved/urls")).status_code == 503
    assert (await as_user(loop, "operator", "POST", "/moved/ping", {})).status_code == 503


async def test_the_commands(loop: Loop) -> None:
    pings = await start_with_heartbeats(loop)
    shown = await on_loop(loop, "heartbeat", "url", "moved")
    assert (shown.returncode, shown.stdout) == (0, f"{pings}/ping/{CHECK}\n")
    for option, expected in (
        ("--slug", f"{pings}/ping/{KEY}/moved"), ("--push", f"{pings}/api/push/{CHECK}"),
        ("--badge", rf"{pings}/badge/[0-9a-f]{{32}}/moved\.svg"),
        ("--category-badge", rf"{pings}/badge/[0-9a-f]{{32}}/other\.svg"),
    ):  # fmt: skip
        shown = await on_loop(loop, "heartbeat", "url", "moved", option)
        assert re.fullmatch(expected, shown.stdout.strip()), option
    for options, status in (
        (["--start"], None), (["--log", "--message", "half way"], None), (["--exit-status", "0"], "up"),
        (["--fail", "--message", "not mounted"], "failed"), (["--exit-status", "7", "--message", "no space"], "failed"),
        ([], "up"),
    ):  # fmt: skip
        sent = await on_loop(loop, "heartbeat", "ping", "backup", *options)
        assert (sent.returncode, sent.stderr) == (0, ""), options
        if status is not None:
            listed = json.loads((await on_loop(loop, "--json", "heartbeat", "list")).stdout)["heartbeats"]
            assert {each["service"]: each["status"] for each in listed}["backup"] == status
    table = (await on_loop(loop, "heartbeat", "list")).stdout.splitlines()
    assert re.split(r"\s{2,}", table[0])[0] == "STATE"
    (row,) = (line for line in table if "  backup  " in line)
    assert re.fullmatch(r"up +backup +\d+s +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row), row
    assert any(re.match(r"waiting +moved .* no ping has been received yet; expected at '0 3 ", line) for line in table)
    pinged = (await as_user(loop, "operator", "GET", "/backup")).json()["pings"]
    assert [each["kind"] for each in pinged] == ["success", "fail", "fail", "success", "log", "start"]
    assert pinged[0]["client"].startswith("local (")
    for arguments, message in (
        (["url", "mvoed"], "the inventory has no service 'mvoed'; did you mean moved?"),
        (["ping", "web"], "service 'web' has another probe than `heartbeat`"),
    ):
        refused = await on_loop(loop, "heartbeat", *arguments)
        assert (refused.returncode, message in refused.stderr) == (1, True), refused.stderr


async def test_a_job_asks_the_remediator_for_its_url(loop: Loop) -> None:
    await start_with_heartbeats(loop)
    done = await on_loop(loop, "heartbeat", "run", "moved", "--", "sh", "-c", "echo done; exit 2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "done\n", "")
    found = (await as_user(loop, "operator", "GET", "/moved")).json()
    assert [each["kind"] for each in found["pings"]] == ["fail", "start"]
    assert found["exit_status"] == 2

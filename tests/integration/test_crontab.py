"""A crontab is moved as docs/heartbeats.md says: each of its lines is run by a shell, and is seen by the exporter."""

import asyncio
import re
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from tests.integration.test_created_heartbeats import Creating
from tests.integration.test_heartbeats import CHECK, KEY

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "heartbeats.md").read_text()
SECTION = PAGE.partition("## Move a crontab\n")[2].partition("\n## ")[0]
LINES = [line for line in SECTION.split("```")[1].splitlines() if line[:1].isdigit()]
# By the name of the job's script.
SCRIPTS = {"backup": "echo 12 files", "sync": "exit 5", "dump": "echo disk full; exit 3", "clean": "exit 0", "report": "echo done"}  # fmt: skip
BASE = "http://10.0.0.5:9998"
CURL = "curl -fsS -m 10 --retry 5 -o /dev/null"
# By service: its probe, and the line that reports it.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "moved": ({"cron": "*/5 * * * *", "uuid": CHECK}, f"{CURL} {BASE}/{CHECK.upper()}"),
    "slug": ({"every": "1h", "slug": "my-check"}, f"{CURL} {BASE}/{KEY}/my-check"),
    "pushed": ({"every": "1h"}, f"{CURL} '{BASE}/api/push/UUID?status=up&msg=OK&ping=1500'"),
    "weekly": ({"cron": "0 8 * * 1", "timezone": "Asia/Shanghai"}, f"{CURL} {BASE}/ping/UUID"),
    "monthly": ({"cron": "0 6 31 * *"}, f"{CURL} {BASE}/ping/UUID"),
    "checked": ({"every": "1h", "expect": {"body_lacks": "0 rows"}}, f"echo 0 rows | {CURL} -d @- {BASE}/ping/UUID"),
}
CREATED = f"{CURL} '{BASE}/ping/{KEY}/job-7?create=1'"


def name_of(line: str) -> str:
    """Return the job of a line of the page: the name of its script."""
    found = re.search(r"/usr/local/bin/(\w+)", line)
    assert found is not None, line
    return found[1]


def service_of(name: str) -> dict[str, Any]:
    """Return a heartbeat that is due when the page's line is run."""
    (line,) = (line for line in LINES if name_of(line) == name)
    return {"probe": {"heartbeat": {"cron": " ".join(line.split()[:5])}}}


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Creating]:
    made = Creating(launcher, tmp_path)
    made.services = {
        **{name: service_of(name) for name in SCRIPTS},
        **{name: {"probe": {"heartbeat": options}} for name, (options, _) in OTHERS.items()},
    }
    made.write()
    await made.start()
    yield made
    await made.client.aclose()
    await made.jobs.aclose()


async def run_line(exporter: Creating, command: str, folder: Path, name: str = "") -> None:
    """Run what cron would run, with this machine's paths and the URL of the service `name`."""
    url = (await exporter.client.get(f"/api/v1/heartbeats/{name}/urls")).json()["url"] if name else ""
    (folder / "ping-url").touch(0o600)
    (folder / "ping-url").write_text(url)
    for given, own in {
        "/usr/local/bin": str(folder), "/var/log": str(folder), "/etc/report": str(folder), BASE: str(exporter.jobs.base_url),
        "UUID": url.rpartition("/")[2], "defib ": f"{shlex.quote(sys.executable)} -m defib ",
    }.items():  # fmt: skip
        command = command.replace(given, own)
    process = await asyncio.create_subprocess_exec("sh", "-c", command, cwd=ROOT)
    await process.wait()


async def test_a_crontab_is_moved_by_the_page(exporter: Creating, tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    for name, script in SCRIPTS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    for line in LINES:
        await run_line(exporter, line.split(maxsplit=5)[5], folder, name_of(line))
    for name, (_, command) in OTHERS.items():
        await run_line(exporter, command, folder, name)
    await run_line(exporter, CREATED, folder)
    answer = (await exporter.client.get("/api/v1/heartbeats")).json()
    seen = {each["service"]: each for each in answer["heartbeats"]}
    assert len(seen) == 12
    assert {name for name, each in seen.items() if each["status"] == "up"} == {*seen} - {"sync", "dump", "checked"}
    assert seen["sync"]["fault"] == "exit status 5"
    assert seen["dump"]["fault"] == "exit status 3; its output ends with: disk full"
    assert "0 rows" in seen["checked"]["fault"]
    timed = {name for name, each in seen.items() if each["duration_seconds"] is not None}
    assert timed == {"clean", "report", "pushed"}
    assert (await exporter.heartbeat("report"))["pings"][0]["body"] == "done\n"

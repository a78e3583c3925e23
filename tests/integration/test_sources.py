"""Services from targets: files and servers, while the programs run."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from defib.demo.launcher import Launcher
from tests.integration import peers
from tests.integration.exporter_process import Exporter
from tests.integration.loop import Loop
from tests.support import eventually

TEMPLATES = {"port": {"service": {"category": "port", "probe": {"every": "1s", "tcp": {"address": "{target}"}}}}}


def targets(*addresses: str) -> str:
    return json.dumps([{"targets": addresses}])


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Exporter]:
    made = Exporter(launcher, tmp_path)
    yield made
    await made.client.aclose()


async def wait_for(exporter: Exporter, *names: str) -> None:
    async def is_so() -> bool:
        listed = (await exporter.client.get("/api/v1/services")).json()["services"]
        return sorted(each["id"] for each in listed) == sorted(names)

    await eventually(is_so, 60)


def replace(path: Path, text: str) -> None:
    """Write a file as a program does that others read."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.rename(path)


async def test_files_are_read_again_when_they_change(exporter: Exporter) -> None:
    folder = exporter.folder / "config" / "targets"
    folder.mkdir(parents=True)
    replace(folder / "a.json", targets("127.0.0.1:1"))
    exporter.configure({}, templates=TEMPLATES, services_from={"ports": {"file": "targets/*", "template": "port"}})
    await exporter.start()
    await wait_for(exporter, "port-127.0.0.1-1")

    replace(folder / "b.yaml", "- targets: ['127.0.0.1:2']")
    await wait_for(exporter, "port-127.0.0.1-1", "port-127.0.0.1-2")

    (folder / "a.json").write_text("")  # somebody has begun to write it

    async def is_refused() -> bool:
        return await exporter.value("defib_config_last_reload_successful") == 0

    await eventually(is_refused)
    await wait_for(exporter, "port-127.0.0.1-1", "port-127.0.0.1-2")
    assert f"{folder}/a.json: is empty" in (exporter.folder / "log").read_text()
    (folder / "a.json").write_text(targets("127.0.0.1:3"))
    await wait_for(exporter, "port-127.0.0.1-2", "port-127.0.0.1-3")
    (folder / "a.json").unlink()
    await wait_for(exporter, "port-127.0.0.1-2")


async def test_the_answer_of_a_server_outlives_it(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(exporter.folder / "cache"))
    answer: Any = [{"targets": ["127.0.0.1:1"], "labels": {"__meta_x": "y"}}]
    asked: list[Any] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append((request.path_qs, request.headers.get("Authorization")))
        return web.json_response(answer)

    async with peers.web_server(handle) as port:
        http = {"url": f"http://127.0.0.1:{port}/targets?zone=a", "auth": {"bearer": "s3cret-of-sd"}}
        source = {"http": http, "refresh": "1s", "template": "port"}
        exporter.configure({}, templates=TEMPLATES, services_from={"sd": source})
        await exporter.start()
        await wait_for(exporter, "port-127.0.0.1-1")
        assert asked[0] == ("/targets?zone=a", "Bearer s3cret-of-sd")
        answer[0]["targets"].append("127.0.0.1:2")
        await wait_for(exporter, "port-127.0.0.1-1", "port-127.0.0.1-2")
        assert await exporter.value('defib_service_source_success{source="sd"}') == 1

        good = answer

        async def has_failed() -> bool:
            return await exporter.value('defib_service_source_success{source="sd"}') == 0

        async def has_succeeded() -> bool:
            return await exporter.value('defib_service_source_success{source="sd"}') == 1

        # Neither what is no list of targets, nor what the template cannot use.
        for wrong in ({"error": "out of order"}, [{"targets": ["a b"]}]):
            answer = wrong
            await eventually(has_failed)
            assert await exporter.value("defib_config_last_reload_successful") == 1
            answer = good
            await eventually(has_succeeded)
        answer = [{"targets": ["a b"]}]
        await eventually(has_failed)
    await exporter.launcher.kill(exporter.pid, signal.SIGKILL)
    await exporter.start()
    await wait_for(exporter, "port-127.0.0.1-1", "port-127.0.0.1-2")
    log = (exporter.folder / "log").read_text()
    assert "source_failed" in log
    assert "s3cret-of-sd" not in log
    assert {path.stat().st_mode & 0o777 for path in (exporter.folder / "cache").iterdir()} == {0o600}


async def test_without_an_answer_the_rest_is_probed(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(exporter.folder / "cache"))
    service = {"probe": {"tcp": {"address": "127.0.0.1:1"}}}
    answer = targets("127.0.0.1:2")

    async def handle(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=answer, content_type="application/json")

    async with peers.web_server(handle) as port:
        free = port
    source = {"http": f"http://127.0.0.1:{free}/", "refresh": "1s", "template": "port"}
    exporter.configure({"own": service}, templates=TEMPLATES, services_from={"sd": source})
    argv = [sys.executable, "-m", "defib", "check", "--config", str(exporter.folder / "config")]
    checked = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert f"warning: services_from.sd: http://127.0.0.1:{free}/: cannot connect: Connection refused" in checked.stderr
    await exporter.start()
    await wait_for(exporter, "own")
    assert await exporter.value('defib_service_source_success{source="sd"}') == 0


async def test_an_answer_that_cannot_be_used_holds_up_no_other(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a server blamed for another mistake, and a source that is removed is no longer reported."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(exporter.folder / "cache"))
    answers = {"/bad": targets("127.0.0.1:1"), "/good": targets("127.0.0.1:2")}

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(text=answers[request.path], content_type="application/json")

    async def success(source: str) -> float | None:
        return await exporter.value(f'defib_service_source_success{{source="{source}"}}')

    async with peers.web_server(handle) as port:
        source = {"refresh": "1s", "template": "port"}
        sources = {name: {"http": f"http://127.0.0.1:{port}/{name}", **source} for name in ("bad", "good")}
        exporter.configure({}, templates=TEMPLATES, services_from=sources)
        await exporter.start()
        await wait_for(exporter, "port-127.0.0.1-1", "port-127.0.0.1-2")
        answers |= {"/bad": targets("not an address"), "/good": targets("127.0.0.1:3")}
        await wait_for(exporter, "port-127.0.0.1-1", "port-127.0.0.1-3")

        async def is_reported() -> bool:
            return (await success("bad"), await success("good")) == (0, 1)

        await eventually(is_reported)
        del sources["bad"]
        exporter.configure({}, templates=TEMPLATES, services_from=sources)
        os.kill(exporter.pid, signal.SIGHUP)

        async def is_gone() -> bool:
            return await success("bad") is None

        await eventually(is_gone)
        assert await success("good") == 1


@pytest.mark.needs("sshd")
async def test_the_remediator_follows_the_files_too(loop: Loop) -> None:
    path = loop.folder / "config" / "targets.json"
    path.parent.mkdir(exist_ok=True)
    replace(path, targets("127.0.0.1:1"))
    sources = {"ports": {"file": "targets.json", "template": "port"}}
    path.with_name("more.yaml").write_text(yaml.safe_dump({"templates": TEMPLATES, "services_from": sources}))
    await loop.start({})
    replace(path, targets("127.0.0.1:2"))

    async def is_known() -> bool:
        page = (await loop.ask("GET", "/")).text
        return re.findall(r'id="s-(\S+)" class="(\w+)"', page) == [("port-127.0.0.1-2", "down")]

    await eventually(is_known, 60)

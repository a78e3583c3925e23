"""Heartbeats with real clients, and with those that send too much, too fast, or at the wrong time."""

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from tests.integration.loop import Loop
from tests.integration.test_heartbeats import CHECK, KEY, SERVICES, Heartbeats
from tests.support import eventually

JOBS = 20


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Heartbeats]:
    async with Heartbeats.running(launcher, tmp_path) as made:
        yield made


async def curl(*arguments: str) -> tuple[int, str]:
    """Run curl, and return its exit status and output."""
    argv = ["curl", "--noproxy", "*", "-sS", *arguments]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode("utf-8", "replace")


async def run(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(*argv)
    assert await process.wait() == 0


@pytest.mark.needs("curl")
async def test_curl_gets_the_same_answer_with_each_method(exporter: Heartbeats, tmp_path: Path) -> None:
    base = f"http://127.0.0.1:{exporter.ping_port}"
    (tmp_path / "output").write_text("12 files\n")
    ways: dict[str, tuple[str, ...]] = {
        "GET": (), "HEAD": ("--head",), "POST": ("--data-binary", f"@{tmp_path}/output"), "empty": ("--data", ""),
        "chunked": ("-T", f"{tmp_path}/output", "-X", "POST", "-H", "Transfer-Encoding: chunked"),
        "1.0": ("--http1.0",), "raw": ("--data-raw", "all is well"),
    }  # fmt: skip
    for way, arguments in ways.items():
        for path in (f"/ping/{CHECK}", f"/{CHECK}/start", f"/ping/{KEY}/moved/0", f"/{KEY}/moved/log"):
            status, output = await curl("-f", *arguments, f"{base}{path}")
            assert (status, output == "OK" or way == "HEAD") == (0, True), (way, path, output)
            if way == "HEAD":
                assert output.startswith("HTTP/1.1 200 OK")
    # As the documentation of healthchecks shows it.
    assert await curl("-fsS", "-m", "10", "--retry", "5", "-o", "/dev/null", f"{base}/ping/{CHECK}") == (0, "")
    status, output = await curl("-f", f"{base}/ping/{KEY}/none")
    assert (status, "404" in output) == (22, True)
    bodies = {each["body"] for each in (await exporter.heartbeat("moved"))["pings"]}
    assert bodies == {"", "12 files\n", "all is well"}


@pytest.mark.needs("curl")
async def test_curl_repeats_a_ping_until_the_exporter_is_back(exporter: Heartbeats) -> None:
    base = f"http://127.0.0.1:{exporter.ping_port}/{KEY}"
    await exporter.ping(f"/{KEY}/backup")
    await exporter.stop()
    retry = ("--retry", "60", "--retry-delay", "1", "--retry-connrefused", "-m", "120", "-f")
    job = asyncio.create_task(curl(*retry, "--data-raw", "disk full", f"{base}/backup/3"))
    await asyncio.sleep(0)
    await exporter.start()
    status, output = await job
    assert (status, output.endswith("OK")) == (0, True), output
    failed = await exporter.until("backup", up=False, reason="failed")
    assert failed["last"]["message"] == "exit status 3; its output ends with: disk full"


@pytest.mark.needs("sshd", "curl")
async def test_a_failed_backup_becomes_a_card_with_the_end_of_its_output(loop: Loop) -> None:
    (port,) = reserve_ports(1)
    settings = {"listen": f"127.0.0.1:{port}", "database": "../heartbeats.db", "ping_key": KEY}
    base = f"http://127.0.0.1:{port}/{KEY}/backup"
    output = "".join(f"copied {number} files\n" for number in range(1000)) + "rsync: no space left on device\n"
    retry = ("--retry", "60", "--retry-delay", "1", "--retry-connrefused", "-f")
    service = {"host": "h", "probe": {"heartbeat": {"every": "1h"}}}
    _, first = await asyncio.gather(
        loop.start({"backup": service}, exporter={"heartbeats": settings}), curl(*retry, base)
    )
    assert first[0] == 0, first
    # A backup that fails, and reports its exit status with its output, as the documentation shows.
    script = f"""printf '%s' "$OUTPUT" | curl --noproxy '*' -fsS --data-binary @- {base}/$STATUS"""
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", script, env={"PATH": "/usr/bin:/bin", "STATUS": "3", "OUTPUT": output}
    )
    assert await process.wait() == 0

    async def is_up(wanted: bool) -> bool:
        return bool((await loop.stack.get("exporter", "/api/v1/services/backup") or {}).get("up") is wanted)

    await eventually(lambda: is_up(False))
    await loop.fire("backup")
    await loop.until_card("Service down: backup")
    (card,) = loop.feishu.received
    assert "exit status 3" in card.text
    assert "rsync: no space left on device" in card.text
    assert "copied 1 files" not in card.text
    assert (await curl("-f", base))[0] == 0
    await eventually(lambda: is_up(True))
    await loop.fire("backup", status="resolved")
    await loop.until("recovered")
    await loop.until_cards("Service down: backup", "Recovered: backup")


async def test_invalid_utf_8_is_stored_and_shown(exporter: Heartbeats) -> None:
    body = b"\xff\xfe\x00 caf\xc3\xa9 \x1b[31m \xe2\x82"
    assert (await exporter.ping(f"/{KEY}/backup/1", "POST", content=body)).status_code == 200
    failed = await exporter.until("backup", up=False)
    assert "café" in failed["last"]["message"]
    (ping,) = (await exporter.heartbeat("backup"))["pings"]
    assert "\x1b" not in ping["body"]


@pytest.mark.needs("root")
async def test_a_full_disk_refuses_pings_and_keeps_what_was_answered(launcher: Launcher, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    await run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk))
    exporter = Heartbeats(launcher, tmp_path)
    try:
        jobs = {f"job-{number}": {"probe": {"heartbeat": {"every": "1h"}}} for number in range(100)}
        exporter.write(jobs)
        file = exporter.folder / "config" / "a.yaml"
        file.write_text(file.read_text().replace("../heartbeats.db", "../disk/heartbeats.db"))
        await exporter.start()
        (disk / "filler").write_bytes(bytes(10**6))
        stored: dict[str, int] = {}
        turns = ((name, turn) for turn in range(1, 40) for name in jobs)
        for name, turn in turns:
            answer = await exporter.ping(f"/{KEY}/{name}/{turn}", "POST", content=b"y" * 9000)
            if answer.status_code != 200:
                break
            stored[name] = turn
        else:
            raise AssertionError("the disk is not full")
        assert (answer.status_code, answer.text) == (503, "cannot store the ping")
        assert answer.headers["Retry-After"]
        (disk / "filler").unlink()
        assert (await exporter.ping(f"/{KEY}/{name}/99")).status_code == 200
        stored[name] = 99
        await exporter.stop(signal.SIGKILL)
        await exporter.start()
        for each, exit_status in stored.items():
            assert (await exporter.heartbeat(each))["exit_status"] == exit_status
        await exporter.stop()
    finally:
        await exporter.client.aclose()
        await exporter.jobs.aclose()
        await run("umount", "--lazy", str(disk))


async def test_no_ping_that_was_answered_is_lost_in_reloads(exporter: Heartbeats) -> None:
    """Each job reports a new exit status with each ping, while the configuration is reloaded."""
    jobs: dict[str, Any] = {f"job-{number}": {"probe": {"heartbeat": {"every": "1h"}}} for number in range(JOBS)}
    exporter.write(SERVICES | jobs)
    await exporter.reload()
    answered: dict[str, int] = {}
    is_over = asyncio.Event()

    async def send(name: str) -> None:
        for exit_status in range(1, 50):
            if is_over.is_set():
                return
            answer = await exporter.ping(f"/{KEY}/{name}/{exit_status}")
            assert answer.status_code == 200, answer.text
            answered[name] = exit_status

    senders = [asyncio.create_task(send(name)) for name in jobs]
    for number in range(5):
        changed = {name: {**each, "name": f"Job {number}"} for name, each in jobs.items()}  # each heartbeat is another
        exporter.write(SERVICES | changed)
        await exporter.reload()
    is_over.set()
    await asyncio.gather(*senders)
    for name, exit_status in answered.items():
        heartbeat = await exporter.heartbeat(name)
        assert heartbeat["exit_status"] == exit_status
        assert len(heartbeat["pings"]) == exit_status
    await exporter.stop(signal.SIGKILL)
    await exporter.start()
    assert [(await exporter.heartbeat(name))["exit_status"] for name in answered] == list(answered.values())


async def test_a_job_that_pings_too_often_costs_the_others_nothing(exporter: Heartbeats) -> None:
    is_over = asyncio.Event()
    refused = 0

    async def flood() -> None:
        nonlocal refused
        while not is_over.is_set():
            refused += (await exporter.ping(f"/{KEY}/backup")).status_code == 429

    floods = [asyncio.create_task(flood()) for _ in range(20)]
    await eventually(lambda: _is(refused > 500))
    began = time.monotonic()
    assert (await exporter.ping(f"/{KEY}/moved")).status_code == 200
    assert time.monotonic() - began < 5.0
    is_over.set()
    await asyncio.gather(*floods)
    assert len((await exporter.heartbeat("backup"))["pings"]) == 50
    await exporter.until("moved", up=True)


async def _is(value: bool) -> bool:
    return value


async def test_1000_jobs_that_are_due_at_the_same_time_are_all_noticed(exporter: Heartbeats) -> None:
    jobs = {f"job-{number}": {"probe": {"heartbeat": {"every": "8s", "grace": "0s"}}} for number in range(1000)}
    exporter.write(jobs)
    await exporter.reload()
    for chunk in range(0, 1000, 50):
        await asyncio.gather(*(exporter.ping(f"/{KEY}/job-{number}") for number in range(chunk, chunk + 50)))

    async def all_down() -> bool:
        page = (await exporter.client.get("/metrics")).text
        return sum(line.startswith("service_up{") and line.endswith(" 0") for line in page.splitlines()) == 1000

    await eventually(all_down)
    services = (await exporter.client.get("/api/v1/services")).json()["services"]
    assert {each["last"]["reason"] for each in services} == {"late"}

"""`defib heartbeat run` runs a job as if it were not there, and reports it to a real exporter."""

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from defib.demo.launcher import Launcher
from tests.integration import peers
from tests.integration.test_heartbeats import KEY, SECRET, Heartbeats
from tests.support import eventually

SERVICES: dict[str, Any] = {
    "backup": {"probe": {"heartbeat": {"every": "1h"}}},
    "page": {"probe": {"http": {"url": "http://127.0.0.1:1", "auth": {"bearer": SECRET}}}},
}


@pytest.fixture
async def exporter(launcher: Launcher, tmp_path: Path) -> AsyncIterator[Heartbeats]:
    async with Heartbeats.running(launcher, tmp_path, SERVICES) as made:
        yield made


def url_of(exporter: Heartbeats) -> dict[str, str]:
    return {"DEFIB_PING_URL": f"http://127.0.0.1:{exporter.ping_port}/ping/{KEY}/backup"}


@dataclass(frozen=True)
class Done:
    status: int
    stdout: str
    stderr: str


async def start(*arguments: str, env: Mapping[str, str], **files: Any) -> asyncio.subprocess.Process:
    """Start `defib heartbeat run` without a terminal, with pipes unless `files` say otherwise."""
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "defib", "heartbeat", "run", *arguments, start_new_session=True,
        env={**os.environ, "DEFIB_CONFIG": "/nonexistent", **env},
        **{"stdin": pipe, "stdout": pipe, "stderr": pipe, **files},
    )  # fmt: skip


async def finish(process: asyncio.subprocess.Process, given: bytes = b"") -> Done:
    stdout, stderr = await process.communicate(given)
    return Done(process.returncode or 0, (stdout or b"").decode(), (stderr or b"").decode())


async def run(command: Sequence[str], env: Mapping[str, str], given: bytes = b"", options: Sequence[str] = ()) -> Done:
    return await finish(await start("backup", *options, "--", *command, env=env), given)


async def test_start_end_and_output_are_reported(exporter: Heartbeats) -> None:
    script = 'read line; echo "$line"; echo problem >&2; echo "url ${DEFIB_PING_URL:-none}"; exit 3'
    done = await run(["sh", "-c", script], url_of(exporter), b"given\n")
    assert done == Done(3, "given\nurl none\n", "problem\n")
    end, begin = (await exporter.heartbeat("backup"))["pings"]
    assert (begin["kind"], end["kind"], end["exit_status"]) == ("start", "fail", 3)
    assert begin["run_id"] == end["run_id"] != ""
    assert sorted(end["body"].splitlines()) == ["given", "problem", "url none"]
    assert " defib/" in end["client"]
    assert (await exporter.heartbeat("backup"))["duration_seconds"] > 0
    assert KEY not in (exporter.folder / "log").read_text()


async def test_one_file_receives_the_output_in_order(exporter: Heartbeats, tmp_path: Path) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do echo o$i; echo e$i >&2; done"
    with (tmp_path / "out").open("wb") as file:
        process = await start("backup", "--", "sh", "-c", script, env=url_of(exporter), stdout=file, stderr=file)
        assert (await finish(process)).status == 0
    expected = "".join(f"o{i}\ne{i}\n" for i in range(1, 9))
    assert (tmp_path / "out").read_text() == expected
    assert (await exporter.heartbeat("backup"))["pings"][0]["body"] == expected


async def test_the_end_of_a_long_output_is_reported_without_secrets(exporter: Heartbeats) -> None:
    script = (
        f"import sys; sys.stdout.write('x' * 99 + '\\n'); sys.stdout.write(('{SECRET} ' + 'y' * 80 + '\\n') * 30000)"
    )
    done = await run([sys.executable, "-c", script], url_of(exporter))
    assert (done.status, len(done.stdout)) == (0, 100 + 30000 * (len(SECRET) + 82))
    body = (await exporter.heartbeat("backup"))["pings"][0]["body"]
    assert 5000 < len(body) <= 10_000
    assert "cret-of" not in body
    assert body.startswith("*** y")
    assert body.endswith("y\n")


async def test_url_from_a_file(exporter: Heartbeats, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"{url_of(exporter)['DEFIB_PING_URL']}/\n")
    file.chmod(0o600)
    own = {"DEFIB_PING_URL": "http://127.0.0.1:1/"}  # of the job, such as an agent
    done = await run(["printenv", "DEFIB_PING_URL"], own, options=["--url-file", str(file)])
    assert done == Done(0, "http://127.0.0.1:1/\n", "")
    assert [each["kind"] for each in (await exporter.heartbeat("backup"))["pings"]] == ["success", "start"]
    file.chmod(0o644)
    done = await run(["true"], {}, options=["--url-file", str(file)])
    assert done == Done(0, "", f"defib: warning: others may read {file}, which has a secret: chmod 600\n")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT")])
async def test_signals_go_to_the_job(exporter: Heartbeats, number: int, name: str) -> None:
    script = f"trap 'echo caught; exit 9' {name}; echo ready; while :; do sleep 0.1; done"
    process = await start("backup", "--", "sh", "-c", script, env=url_of(exporter))
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert await finish(process) == Done(9, "caught\n", "")
    assert (await exporter.heartbeat("backup"))["pings"][0]["exit_status"] == 9


async def test_a_signal_that_interrupts_no_system_call_goes_to_the_job_at_once(exporter: Heartbeats) -> None:
    script = "trap 'echo caught; exit 9' TERM; sleep 1; echo ready; while :; do sleep 0.1; done"
    process = await start("backup", "--", "sh", "-c", script, env=url_of(exporter))
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    threads = {int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()} - {process.pid}
    assert ctypes.CDLL(None).tgkill(process.pid, threads.pop(), signal.SIGTERM) == 0
    assert await finish(process) == Done(9, "caught\n", "")


async def test_an_interrupt_at_a_terminal_reaches_the_job_once(exporter: Heartbeats) -> None:
    job = """
import signal
interrupt = {signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, interrupt)
print("ready", flush=True)
signal.sigwait(interrupt)
print("caught", flush=True)
input()
print("interrupts:", 1 + len(signal.sigpending()))
"""
    spawn = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", spawn, sys.executable, "-m", "defib", "heartbeat", "run", "backup", "--",
        sys.executable, "-c", job, env={**os.environ, **url_of(exporter)}, start_new_session=True,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    for wanted, typed in ((b"ready\r\n", b"\x03"), (b"caught\r\n", b"go\n")):
        try:
            await process.stdout.readuntil(wanted)
        except asyncio.IncompleteReadError as error:
            raise AssertionError(error.partial) from error
        process.stdin.write(typed)
    assert b"interrupts: 1\r\n" in await process.stdout.read()
    assert await process.wait() == 0
    assert "interrupts: 1" in (await exporter.heartbeat("backup"))["pings"][0]["body"]


async def test_a_killed_job(exporter: Heartbeats) -> None:
    assert await run(["sh", "-c", "kill -KILL $$"], url_of(exporter)) == Done(137, "", "")
    assert (await exporter.heartbeat("backup"))["exit_status"] == 137


async def test_a_command_that_cannot_be_started(exporter: Heartbeats) -> None:
    done = await run(["/nonexistent/backup", "--all"], url_of(exporter))
    message = "cannot start /nonexistent/backup: No such file or directory"
    assert done == Done(127, "", f"defib: {message}\n")
    ping = (await exporter.heartbeat("backup"))["pings"][0]
    assert (ping["exit_status"], ping["body"]) == (127, message)


async def test_what_runs_in_the_background_neither_delays_nor_loses_output(
    exporter: Heartbeats, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    script = f"(while [ ! -e {go} ]; do sleep 0.1; done; echo later; echo more) & echo now"
    process = await start("backup", "--", "sh", "-c", script, env=url_of(exporter))
    assert await process.wait() == 0
    assert (await exporter.heartbeat("backup"))["pings"][0]["body"] == "now\n"
    go.touch()
    assert await finish(process) == Done(0, "now\nlater\nmore\n", "")


async def test_a_reader_that_goes_away_ends_the_job_as_without_us(exporter: Heartbeats) -> None:
    process = await start("backup", "--", "sh", "-c", "yes; echo $? >&2", env=url_of(exporter))
    assert process.stdout is not None
    assert await process.stdout.readline() == b"y\n"
    process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined] # asyncio has no other way
    assert (await finish(process)).stderr == "141\n"  # by SIGPIPE


@pytest.mark.parametrize(
    ("env", "options", "warning"),
    [
        ({}, [], "defib: warning: heartbeat backup: cannot report its end: "),
        ({"DEFIB_PING_URL": "hunter2"}, [], "DEFIB_PING_URL has no URL that begins with http:// or https://"),
        ({}, ["--url-file", "/nonexistent"], "cannot read /nonexistent: No such file or directory"),
    ],
)
async def test_without_a_url_the_job_runs(env: dict[str, str], options: list[str], warning: str) -> None:
    done = await run(["sh", "-c", "echo done; exit 4"], env, options=options)
    assert (done.status, done.stdout) == (4, "done\n")
    assert warning in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "hunter2" not in done.stderr


async def test_without_defib_the_job_runs_and_its_end_is_tried_again(exporter: Heartbeats) -> None:
    away = {"DEFIB_PING_URL": "http://127.0.0.1:1/ping/s3cret-uuid"}
    done = await run(["sh", "-c", "echo done; exit 5"], away)
    assert (done.status, done.stdout) == (5, "done\n")
    assert done.stderr == (
        "defib: warning: heartbeat backup: cannot report its end: cannot connect to 127.0.0.1:1: Connection refused\n"
    )
    await exporter.stop(signal.SIGTERM)
    process = await start("backup", "--", "sh", "-c", "echo ready; read line", env=url_of(exporter))
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    await exporter.start()
    done = await finish(process, b"\n")
    assert done.status == 0
    assert "cannot report its start" in done.stderr
    assert (await exporter.heartbeat("backup"))["pings"][0]["kind"] == "success"


async def test_a_wrong_url_is_not_tried_again(exporter: Heartbeats) -> None:
    wrong = {"DEFIB_PING_URL": f"http://127.0.0.1:{exporter.ping_port}/ping/{KEY}/none"}
    begin = time.monotonic()
    done = await run(["true"], wrong)
    assert done.status == 0
    assert f"127.0.0.1:{exporter.ping_port} has answered HTTP 404 Not Found" in done.stderr
    assert KEY not in done.stderr
    assert time.monotonic() - begin < 60


async def test_a_silent_server_does_not_delay_the_start() -> None:
    async def answer_nothing(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with peers.raw_server(answer_nothing) as port:
        url = f"http://127.0.0.1:{port}/ping/x"
        process = await start("backup", "--", "sh", "-c", "echo started", env={"DEFIB_PING_URL": url})
        assert process.stdout is not None
        assert await process.stdout.readline() == b"started\n"  # while nothing was answered

        async def has_ended() -> bool:
            return not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

        await eventually(has_ended)
        process.send_signal(signal.SIGTERM)  # nobody has to wait for reports
        done = await finish(process)
        assert (done.status, len(done.stderr.splitlines())) == (0, 1), done


@pytest.mark.parametrize("arguments", [["backup"], ["backup", "--"], ["backup", "--json", "--", "true"]])
async def test_usage(arguments: list[str]) -> None:
    assert (await finish(await start(*arguments, env={}))).status == 2

"""The collector `logs` with real files, journald, docker and nginx: what is counted, once, and what is reported."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from defib.demo.launcher import Launcher
from defib.demo.stack import reserve_ports
from fleet.host import logs as host_logs
from tests.integration.loop import Loop
from tests.integration.test_access import write_users
from tests.integration.test_collectors import Collected, asked_of_the_wrapper, hardened, over_ssh
from tests.journald import Journal
from tests.support import eventually

SECRET = "hunter2hunter2"
LOCAL = {"address": "127.0.0.1", "shell": "local"}
PATTERNS = {"error": "ERROR|exception", "slow": r"(?i)took \d{4,} ms"}


@pytest.fixture
async def collected(tmp_path: Path) -> AsyncIterator[Collected]:
    made = Collected(tmp_path / "config")
    yield made
    await made.scheduler.close()


def logs(**options: Any) -> dict[str, Any]:
    return {"logs": {"every": "200ms", "patterns": PATTERNS, **options}}


def matches(source: object, pattern: str = "error") -> tuple[str, ...]:
    return "host_log_matches_total", str(source), pattern


def append(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.writelines(lines)


async def has_read(collected: Collected) -> None:
    """Wait for a run that begins later."""
    runs = collected.scheduler._collectors.runs
    before = runs["h"]

    async def ran() -> bool:
        return runs["h"] >= before + 2

    await eventually(ran)


async def starts(collected: Collected, host: dict[str, Any]) -> None:
    await collected.of({"h": host})
    await collected.becomes(1, "host_collect_success", "logs")


def excerpt(collected: Collected, source: object, pattern: str) -> list[str]:
    host = collected.scheduler.hosts["h"]
    return next(
        list(each.lines)
        for each in collected.scheduler.excerpts_of(host)
        if (each.source, each.pattern) == (str(source), pattern)
    )


@pytest.mark.needs("sshd")
@pytest.mark.parametrize("over", ["ssh", "wrapper", "local"])
async def test_a_file_that_is_rotated_and_truncated_is_counted_once(
    launcher: Launcher, tmp_path: Path, collected: Collected, over: str
) -> None:
    path = tmp_path / "app.log"
    path.write_text("ERROR of yesterday\n")
    host: dict[str, Any] = dict(LOCAL)
    if over != "local":
        made, host = await over_ssh(launcher, tmp_path, os.environ["PATH"])
        if over == "wrapper":
            hardened(made, os.environ["PATH"], f"log-files {path}\n")
            host = {**host, "ssh": {**host["ssh"], "wrapper": True}}
    await starts(collected, {**host, "collect": logs(files=[str(path)])})
    await collected.shows({matches(path): 0, matches(path, "slow"): 0})
    append(path, "ERROR one\nit took 1234 ms\nwell\nan exc")
    await collected.shows({matches(path): 1, matches(path, "slow"): 1})
    append(path, "eption\n")
    await collected.becomes(2, *matches(path))
    append(path, "ERROR last words\n")
    path.rename(tmp_path / "app.log.1")
    path.write_text("ERROR of the new file\n")
    await collected.becomes(4, *matches(path))
    append(path, "ERROR before the copy\n")
    shutil.copy(path, tmp_path / "app.log.1")
    path.write_text("ERROR after it\n")
    await collected.becomes(6, *matches(path))
    path.write_text("")
    append(path, "an exception in the emptied file\n")
    await collected.becomes(7, *matches(path))
    path.unlink()
    await collected.becomes(0, "host_collect_success", "logs")
    path.write_text("ERROR in a file that was created again\n")
    await collected.shows({matches(path): 8, ("host_collect_success", "logs"): 1})
    assert excerpt(collected, path, "error")[-2:] == [
        "an exception in the emptied file", "ERROR in a file that was created again",
    ]  # fmt: skip


async def test_what_cannot_be_read_does_not_affect_other_logs(tmp_path: Path, collected: Collected) -> None:
    well, later, link, pipe = (tmp_path / name for name in ("well.log", "later.log", "link.log", "pipe.log"))
    well.touch()
    link.symlink_to(well)
    os.mkfifo(pipe)
    files = [str(each) for each in (well, later, link, pipe)]
    await collected.of({"h": {**LOCAL, "collect": logs(files=files)}})
    await collected.shows({("host_collect_success", "logs"): 0, matches(well): 0})
    (status,) = collected.scheduler._collectors.collectors_of(collected.scheduler.hosts["h"])
    assert status.run is not None
    assert status.run.error is not None
    assert f"{later}: there is no such file" in status.run.error
    assert f"{pipe}: it is not a regular file" in status.run.error
    if os.geteuid() == 0:  # others could let root read what they may not
        assert f"{link}: it is reached through a symbolic link: write {well}" in status.run.error
    append(well, "ERROR\n")
    later.write_text("ERROR in a file that is created later\n")
    await collected.shows({matches(well): 1, matches(later): 1})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reports where a link leads to")
def test_the_name_of_a_link_s_target_cannot_imitate_other_logs(tmp_path: Path) -> None:
    link, other = tmp_path / "a.log", tmp_path / "b.log"
    target = tmp_path / f"x\n!source {other}\n!position 1.1.aaaaaaaaaaaaaaaa\nforged".replace("/", "_")
    target.write_text("")
    other.write_text("true\n")
    link.symlink_to(target)
    argv = ["sh", "-c", host_logs.SCRIPTS[host_logs.FILES], "sh", f"none/{link}", f"none/{other}"]
    output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert len([line for line in output.splitlines() if line.startswith(("!source", "!position"))]) == 3
    assert "\nforged" not in output


async def test_too_much_is_cut_and_reported(tmp_path: Path, collected: Collected) -> None:
    path = tmp_path / "app.log"
    path.touch()
    await starts(collected, {**LOCAL, "collect": logs(files=[str(path)], every="1s")})
    with path.open("ab") as file:
        file.truncate(10**9)  # takes no space
        file.seek(0, os.SEEK_END)
        file.write(b"\nERROR: \0 \xff\n" + b"x" * 300_000 + b" exception\n")
    await collected.shows({matches(path): 1, ("host_collect_truncated", "logs"): 1})
    # Once read, nothing is left out. The end of the long line is not shown.
    await collected.shows({("host_collect_truncated", "logs"): 0, ("host_collect_success", "logs"): 1})
    append(path, *(f"ERROR {number}\n" for number in range(50_000)))
    await has_read(collected)
    await collected.shows({("host_collect_truncated", "logs"): 0, ("host_collect_success", "logs"): 1})
    assert 10_001 <= collected.samples[matches(path)] < 50_001
    assert excerpt(collected, path, "error")[-1] == "ERROR 49999"


@pytest.mark.needs("journald", "logger", "sshd")
@pytest.mark.parametrize("over", ["ssh", "wrapper"])
async def test_the_journal_of_a_unit(
    launcher: Launcher, tmp_path: Path, journal: Journal, collected: Collected, over: str
) -> None:
    path = f"{journal.path}:{os.environ['PATH']}"
    journal.write("web.service", "ERROR of yesterday")
    made, host = await over_ssh(launcher, tmp_path, path)
    if over == "wrapper":
        hardened(made, path, "log-units web.service\nlog-units new.service\n")
        host = {**host, "ssh": {**host["ssh"], "wrapper": True}}
    await starts(collected, {**host, "collect": logs(units=["web", "new"])})
    await collected.shows({matches("web.service"): 0, matches("new.service"): 0})
    journal.write("web.service", "ERROR one", "well", "-- cursor: s=0;i=0", b"two \xff exception")
    journal.write("new.service", "ERROR: it begins")
    journal.write("other.service", "ERROR")
    await collected.shows({matches("web.service"): 2, matches("new.service"): 1})
    await has_read(collected)
    journal.read_as(65534)
    await collected.becomes(0, "host_collect_success", "logs")
    journal.write("web.service", "ERROR meanwhile")
    journal.read_as(None)
    await collected.shows({matches("web.service"): 3, matches("new.service"): 1, ("host_collect_success", "logs"): 1})


@pytest.mark.needs("journald", "logger")
async def test_a_journal_that_may_not_be_read(
    journal: Journal, collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{journal.path}:{os.environ['PATH']}")
    journal.read_as(65534)
    await collected.of({"h": {**LOCAL, "collect": logs(units=["web"])}})
    await collected.becomes(0, "host_collect_success", "logs")

    async def says_why() -> bool:  # on a busy machine, a run may also be late
        (status,) = collected.scheduler._collectors.collectors_of(collected.scheduler.hosts["h"])
        why = "web.service: No journal files were opened due to insufficient permissions"
        return status.run is not None and why in str(status.run.error)

    await eventually(says_why)


@pytest.mark.needs("dockerd", "busybox")
async def test_the_log_of_a_container_that_is_created_again(container: str, collected: Collected) -> None:
    name = f"{container}-logs"

    def docker(*argv: str) -> None:
        subprocess.run(["docker", *argv], check=True, capture_output=True)

    def run(script: str) -> None:
        docker("run", "--detach", "--name", name, "--network", "host", container, "/bin/busybox", "sh", "-c", script)

    def write(text: str) -> None:
        docker("exec", name, "/bin/busybox", "sh", "-c", f"echo '{text}' >/proc/1/fd/1")

    run("echo ERROR of yesterday; exec /bin/busybox sleep 1000")
    try:
        await starts(collected, {**LOCAL, "collect": logs(containers=[name])})
        await has_read(collected)
        await collected.shows({matches(name): 0})
        write("ERROR one")
        write("took 2000 ms")
        await collected.shows({matches(name): 1, matches(name, "slow"): 1})
        await has_read(collected)
        docker("rm", "--force", name)
        await collected.becomes(0, "host_collect_success", "logs")
        run("echo ERROR at its start; echo exception >&2; exec /bin/busybox sleep 1000")
        await collected.shows({matches(name): 3, ("host_collect_success", "logs"): 1})
        await has_read(collected)
        assert collected.samples[matches(name)] == 3
        assert excerpt(collected, name, "slow") == ["took 2000 ms"]
    finally:
        docker("rm", "--force", name)


@pytest.mark.needs("nginx")
async def test_the_access_log_of_nginx(launcher: Launcher, tmp_path: Path, collected: Collected) -> None:
    path = tmp_path / "access.log"
    path.write_text('127.0.0.1 - - [x] "GET / HTTP/1.1" 500 0 "-" "-"\n')
    (port,) = reserve_ports(1)
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/nginx.pid; error_log stderr warn; events {{}}"
        f"http {{ access_log {path}; {folders} server {{ listen 127.0.0.1:{port};"
        " location /well { return 200; } location /ill { return 502; } location /none { return 404; } } }"
    )
    await starts(collected, {**LOCAL, "collect": {"logs": {"every": "200ms", "access": [str(path)]}}})
    requests = "host_http_requests_total"
    await collected.shows({(requests, str(path), "500"): 0, (requests, str(path), "404"): None})
    await launcher.start(
        ["nginx", "-e", "stderr", "-p", str(tmp_path), "-c", f"{tmp_path}/nginx.conf"], tmp_path / "nginx.log"
    )

    async def answers() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    await eventually(answers)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for page, number in (("/well", 5), ("/ill", 2), ('/none" 500 ', 3)):
            for _ in range(number):
                await client.get(page, headers={"User-Agent": '" 503 "'})
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"no request\r\n\r\n")
    await writer.drain()
    expected = {"200": 5, "502": 2, "404": 3, "400": 1, "500": 0, "503": 0}
    await collected.shows({(requests, str(path), code): number for code, number in expected.items()})
    writer.close()
    assert [" 502 " in line for line in excerpt(collected, path, "5xx")] == [True, True]


async def test_lines_are_masked_and_cut(tmp_path: Path, collected: Collected) -> None:
    path = tmp_path / "app.log"
    path.touch()
    collected.scheduler._redact.add([SECRET])
    await starts(collected, {**LOCAL, "collect": logs(files=[str(path)])})
    append(path, f"ERROR with {SECRET}\n", f"ERROR {'x' * 3000}{SECRET}\n")
    append(path, "ERROR: GET /hook?token=abc&x=1\n")
    await collected.becomes(3, *matches(path))
    expected = ["ERROR with ***", f"ERROR {'x' * 494}", "ERROR: GET /hook?token=***&x=1"]
    assert excerpt(collected, path, "error") == expected


async def test_only_operators_may_read_lines(loop: Loop) -> None:
    path = loop.folder / "app.log"
    path.touch()
    users = write_users(loop.folder, {role: role for role in ("viewer", "operator")})
    loop.stack.options = {program: ["--web.config.file", str(users)] for program in ("exporter", "remediator")}
    await loop.start({"web": loop.service("web")}, collect=logs(files=[str(path)]))
    exporter, remediator = loop.stack.url("exporter"), loop.stack.url("remediator")

    async def read(url: str, role: str) -> httpx.Response:
        async with httpx.AsyncClient(auth=(role, role)) as client:
            return await client.get(url)

    async def is_counted() -> bool:
        append(path, "ERROR: <b>it failed</b> \x1b[1m\n")
        return '"source": "' in (await read(f"{exporter}/api/v1/hosts/h/logs", "operator")).text

    await eventually(is_counted)
    (found,) = (await read(f"{exporter}/api/v1/hosts/h/logs", "operator")).json()["logs"]
    assert (found["source"], found["pattern"]) == (str(path), "error")
    assert set(found["lines"]) == {"ERROR: <b>it failed</b> \\x1b[1m"}
    assert (await read(f"{exporter}/api/v1/hosts/h/logs", "viewer")).status_code == 403
    assert (await read(f"{exporter}/api/v1/hosts/nothing/logs", "operator")).status_code == 404
    assert "it failed" not in (await read(f"{exporter}/api/v1/hosts/h", "operator")).text
    line = "ERROR: &lt;b&gt;it failed&lt;/b&gt;"
    assert line in (await read(f"{remediator}/hosts/h", "operator")).text
    assert "it failed" not in (await read(f"{remediator}/hosts/h", "viewer")).text


def test_the_wrapper_reads_only_logs_that_are_listed(tmp_path: Path) -> None:
    listed, other = tmp_path / "listed.log", tmp_path / "other.log"
    listed.write_text("a\n")
    other.write_text("b\n")
    (tmp_path / "allowed").write_text(f"log-files {listed}\n")
    asked = f"read @m log-files:5:none/{other},none/{listed},none/{listed}/../other.log log-access:5:none/{listed}"
    done = asked_of_the_wrapper(tmp_path, asked, tmp_path)
    assert f"!source {listed}\n!position" in done.stdout
    assert "+a\n" in done.stdout
    assert "+b\n" not in done.stdout
    for section, path in (("log-files", other), ("log-files", f"{listed}/../other.log"), ("log-access", listed)):
        assert f"!source {path}\n!error defib-shell: {section} {path} is not in" in done.stdout

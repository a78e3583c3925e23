"""`defib demo` as a new user runs it, and what it leaves behind."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from defib.demo import service, stack
from defib.demo.launcher import Launcher
from runtime.errors import StartError
from tests.support import NO_TLS, eventually

pytestmark = [pytest.mark.needs("prometheus", "prometheus-alertmanager", "sshd"), pytest.mark.timeout(600)]
DEMO = [sys.executable, "-m", "defib", "demo"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """The folder for temporary files; the demo must leave it empty."""
    path = Path(tempfile.mkdtemp(prefix="t"))  # short: the path of a socket has at most 108 characters
    yield path
    for left in path.iterdir():
        raise AssertionError(f"left behind: {left}")
    path.rmdir()


def environment(folder: Path, docker: str = "unix:///nowhere") -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder), "DOCKER_HOST": docker}


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of all processes that name the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in line:
            lines.append(line)
    return lines


def events(output: str) -> list[tuple[str, float]]:
    parsed = json.loads(output.splitlines()[-1])["events"]
    assert all(isinstance(event["t"], float) for event in parsed)
    return [(event["event"], event["t"]) for event in parsed]


def check(done: "subprocess.CompletedProcess[str]", folder: Path) -> None:
    assert done.returncode == 0, done.stderr
    timeline = events(done.stdout)
    names = [name for name, _ in timeline]
    assert names[0] == "killed"
    assert [name for name in names if name != "notification"][1:] == [
        "down",
        "firing",
        "action",
        "recovered",
        "resolved",
    ]
    assert names.count("notification") == 3
    assert dict(timeline)["action"] <= 60  # 3 on an idle machine: `make bench ARGS=loop`
    assert not processes_of(folder)


def test_under_supervisor(folder: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--once", "--json"], env=environment(folder), capture_output=True, text=True, check=False
    )
    check(done, folder)
    assert "a program of supervisor" in done.stderr


@pytest.mark.needs("dockerd", "busybox")
@pytest.mark.usefixtures("docker")
def test_in_a_container(folder: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--once", "--json"],
        env=environment(folder, os.environ["DOCKER_HOST"]),
        capture_output=True,
        text=True,
        check=False,
    )
    check(done, folder)
    assert "a docker container" in done.stderr
    left = subprocess.run(["docker", "ps", "--all", "--quiet"], capture_output=True, text=True, check=True).stdout
    left += subprocess.run(["docker", "images", "--quiet"], capture_output=True, text=True, check=True).stdout
    assert left == ""


def test_experiments_are_reported_live(folder: Path) -> None:
    """The addresses answer; a service that is stopped on purpose stays so; one that is killed in maintenance waits."""
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        process = subprocess.Popen(DEMO, env=environment(folder), stdout=log, stderr=log, text=True)

        def shown(pattern: str) -> bool:
            return re.search(pattern, Path(log.name).read_text()) is not None

        _until(lambda: shown("3. Break it"), 300, "suggestions")
        text = Path(log.name).read_text()
        for url in re.findall(r"^  \S+ +(http://\S+)", text, re.MULTILINE):
            page = {"Accept": "text/html, */*;q=0.1"}  # the console shows its page for signing in
            assert httpx.get(url, headers=page, follow_redirects=True, trust_env=False).is_success, url
        console, user, password = re.findall(r"^  console +(\S+) \(user (\S+), password (\S+)\)", text, re.MULTILINE)[0]
        assert httpx.get(console, auth=(user, password), trust_env=False).is_success
        config = re.findall(r"export DEFIB_CONFIG=(\S+)", text)[0]
        (kill,) = re.findall(r"^ +(.* signal KILL web)$", text, re.MULTILINE)

        def defib(*arguments: str) -> None:
            argv = [sys.executable, "-m", "defib", *arguments]
            subprocess.run(argv, env={**environment(folder), "DEFIB_CONFIG": config}, check=True, capture_output=True)

        defib("control", "web", "stop")
        _until(lambda: shown("incident 2: .*stopped"), 60, "the decision to leave it stopped")
        defib("control", "web", "start")
        _until(lambda: shown("incident 2 is recovered"), 60, "the end of the stop")
        defib("maintenance", "begin", "service", "web", "--for", "10m", "--reason", "a try")
        subprocess.run(shlex.split(kill), check=True, capture_output=True)
        _until(lambda: shown(r"incident \d: .*maintenance.*a try"), 60, "the decision to wait")
        defib("maintenance", "end", "1")
        _until(lambda: shown("maintenance ends") and shown("incident 3 is recovered"), 90, "the restart")
        process.send_signal(signal.SIGINT)
        process.wait(120)
    Path(log.name).unlink()
    _until(lambda: not processes_of(folder) and not list(folder.iterdir()), 120, "everything to be gone")


def test_missing_files_and_programs_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = subprocess.run(DEMO, env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("defib: not found on PATH: prometheus, ")) == (1, True), done.stderr
    assert "make demo" in done.stderr
    monkeypatch.setattr(stack, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setattr(stack, "INSTALLED", tmp_path / "share")
    with pytest.raises(StartError, match=r"cannot find the alert rules of Defib .* in a checkout"):
        stack.check_requirements()
    (tmp_path / "share" / "alerts").mkdir(parents=True)
    (tmp_path / "share" / "alerts" / "prometheus.yml").touch()
    assert stack.find_alert_files() == tmp_path / "share" / "alerts"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_remains_after_it_ends(folder: Path, number: signal.Signals) -> None:
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        process = subprocess.Popen(DEMO, env=environment(folder), stdout=log, stderr=log, text=True)
        _until(lambda: "killing it" in Path(log.name).read_text(), 300, "the demo to be under way")
        process.send_signal(number)
        process.wait(120)
    Path(log.name).unlink()
    _until(lambda: not processes_of(folder) and not list(folder.iterdir()), 120, "everything to be gone")


def _until(condition: Callable[[], bool], within: float, what: str) -> None:
    ends = time.monotonic() + within
    while not condition():
        assert time.monotonic() < ends, what
        time.sleep(0.1)


@pytest.mark.needs("dockerd", "busybox")
@pytest.mark.usefixtures("docker")
async def test_a_broken_container_stays_broken_after_a_restart(launcher: Launcher, tmp_path: Path) -> None:
    (port,) = stack.reserve_ports(1)
    demo_service = await service.start(launcher, tmp_path, port, f"defib-demo-test-{os.getpid()}")
    assert demo_service.kind == "a docker container"
    container = demo_service.control["docker"]["container"]

    async def page() -> str:
        async with httpx.AsyncClient(verify=NO_TLS, trust_env=False) as client:
            try:
                return (await client.get(f"http://127.0.0.1:{port}/")).text
            except httpx.HTTPError:
                return ""

    async def shows(text: str) -> bool:
        return await page() == text

    assert await service.run(*demo_service.break_command) == (0, "")
    assert await shows(service.BROKEN_PAGE)
    await demo_service.kill()
    await eventually(lambda: shows(""))
    await service.run("docker", "restart", container)
    await eventually(lambda: shows(service.BROKEN_PAGE))
    assert await service.run(*demo_service.repair_command) == (0, "")
    assert await shows(service.PAGE)

"""`defib demo` as a stranger runs it, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.needs("prometheus", "prometheus-alertmanager", "sshd"), pytest.mark.timeout(600)]
DEMO = [sys.executable, "-m", "defib", "demo"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demo puts its folder."""
    made = Path(tempfile.mkdtemp(prefix="t"))  # short: a socket's path is no longer than 108 characters
    yield made
    for left in made.iterdir():
        raise AssertionError(f"left behind: {left}")
    made.rmdir()


def environment(folder: Path, docker: str = "unix:///nowhere") -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder), "DOCKER_HOST": docker}


def of_the_demo(folder: Path) -> list[str]:
    """Command lines of processes that have to do with the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def events(output: str) -> list[tuple[str, float]]:
    told = json.loads(output.splitlines()[-1])["events"]
    assert all(isinstance(event["t"], float) for event in told)
    return [(event["event"], event["t"]) for event in told]


def check(done: "subprocess.CompletedProcess[str]", folder: Path) -> None:
    assert done.returncode == 0, done.stderr
    told = events(done.stdout)
    names = [name for name, _ in told]
    assert names[0] == "killed"
    assert [name for name in names if name != "notice"][1:] == ["down", "firing", "action", "recovered", "resolved"]
    assert names.count("notice") == 3
    assert dict(told)["action"] <= 60  # 3 on an idle machine: `make bench ARGS=loop`
    assert not of_the_demo(folder)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(folder: Path, number: signal.Signals) -> None:
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        process = subprocess.Popen(DEMO, env=environment(folder), stdout=log, stderr=log, text=True)
        _until(lambda: "now it is killed" in Path(log.name).read_text(), 300, "the demo to be under way")
        process.send_signal(number)
        process.wait(120)
    Path(log.name).unlink()
    _until(lambda: not of_the_demo(folder) and not list(folder.iterdir()), 120, "everything to be gone")


def _until(condition: Callable[[], bool], within: float, what: str) -> None:
    ends = time.monotonic() + within
    while not condition():
        assert time.monotonic() < ends, what
        time.sleep(0.1)

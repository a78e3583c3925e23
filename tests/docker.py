"""A docker daemon of the tests' own."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cgroups import remove


@pytest.fixture(scope="session")
def dockerd() -> Iterator[str]:
    """The address of a docker daemon."""
    with _running() as address:
        yield address


@pytest.fixture(scope="module")
def docker(dockerd: str) -> Iterator[None]:
    """A docker daemon that the client finds."""
    with _found(dockerd):
        yield


@contextlib.contextmanager
def running_docker() -> Iterator[None]:
    """Start a docker daemon that the client finds."""
    with _running() as address, _found(address):
        yield


@contextlib.contextmanager
def _found(address: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", address)
        yield


@contextlib.contextmanager
def _running() -> Iterator[str]:
    """Start dockerd in namespaces of its own, so that nothing of it is left whatever happens; gives its address."""
    folder = Path(tempfile.mkdtemp(prefix="defib-docker-"))
    socket, group = folder / "docker.sock", f"/defib-{os.getpid()}"
    (folder / "daemon.json").write_text("{}")
    dockerd = [
        "dockerd", "--config-file", f"{folder}/daemon.json", "--data-root", f"{folder}/data",
        "--exec-root", f"{folder}/exec", "-H", f"unix://{socket}", "--pidfile", f"{folder}/pid",
        "--cgroup-parent", group, "--iptables=false", "--ip6tables=false", "--bridge=none", "--ip-forward=false",
    ]  # fmt: skip
    namespaces = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child=KILL",
        "--mount-proc",
    ]
    mounted = ["sh", "-c", 'mount -n -t tmpfs -o mode=755 tmpfs /run && exec "$@"', "sh", "tini", "-s", "-g", "--"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*namespaces, *mounted, *dockerd], stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for_docker(f"unix://{socket}", folder / "log")
        yield f"unix://{socket}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for cgroup in Path("/sys/fs/cgroup").glob(f"*{group}"):
            remove(cgroup)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_docker(address: str, log: Path) -> None:
    ends = time.monotonic() + 120
    while subprocess.run(["docker", "--host", address, "version"], capture_output=True, check=False).returncode:
        assert time.monotonic() < ends, log.read_text()[-2000:]
        time.sleep(0.1)

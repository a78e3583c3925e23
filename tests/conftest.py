"""What every test may use: real programs, or word that they are missing."""

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import socket
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import pytest
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx

from defib.cli import ensure_user_name
from defib.demo.launcher import Launcher
from tests import preloaded_launcher
from tests.docker import docker, dockerd
from tests.journald import JOURNALD, journal
from tests.systemd import UNPACKED, manager, systemd

__all__ = ["docker", "dockerd", "journal", "systemd"]  # fixtures, for every test to use

# grpc reads them when it is loaded: its fork handlers break child processes, and it would write lines to stderr.
os.environ.update({"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "NONE"})
TIMEOUT_REPEATS = 60.0  # seconds
hypothesis.settings.register_profile("any machine", deadline=None)  # on a busy one, any example may take long
hypothesis.settings.load_profile("any machine")
LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()


def _missing(program: str) -> bool:
    if program == "root":
        return os.geteuid() != 0
    if program == "sudo":
        return not any(path.is_file() for path in (Path("/usr/bin/sudo"), UNPACKED / "usr/bin/sudo"))
    if program in ("systemd", "journald"):
        found = manager() is not None if program == "systemd" else JOURNALD.is_file() and shutil.which("journalctl")
        return not found or os.geteuid() != 0
    if program == "ping sockets":
        return not _may_ping()
    if program == "dockerd":
        return shutil.which("dockerd") is None or os.geteuid() != 0
    return shutil.which(program) is None


def _may_ping() -> bool:
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        with contextlib.suppress(PermissionError), socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP):
            return True
    return False


def pytest_configure() -> None:
    ensure_user_name()


@pytest.hookimpl(trylast=True)  # after what was not asked for is gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run on this machine, and remember it."""
    left_out: dict[str, list[str]] = {}
    kept, dropped = [], []
    for item in items:
        wanted = [program for mark in item.iter_markers("needs") for program in mark.args]
        missing = sorted({program for program in wanted if _missing(program)})
        if missing:
            left_out.setdefault(", ".join(missing), []).append(item.nodeid)
            dropped.append(item)
        else:
            kept.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    config.stash[LEFT_OUT] = left_out


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of items live until the end: looking through them again and again takes long


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker of pytest-xdist has left out: each collects all tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    left_out = session.config.stash.get(LEFT_OUT, {})
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = left_out
    elif left_out and os.environ.get("CI"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED  # CI must run every test


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for missing, tests in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.section(f"left out, for want of {missing}")
        for test in tests:
            terminalreporter.line(test)
        if os.environ.get("CI"):
            terminalreporter.line("CI must run every test.", red=True)


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item) -> Iterator[None]:
    """End what runs in an event loop, too: an event loop only logs what a signal handler raises, or a task swallows it.

    What does not end then, such as a fixture, is interrupted again and again.
    """
    timer = yield
    fail = signal.getsignal(signal.SIGALRM)
    assert callable(fail)

    def end(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_REPEATS)
        with contextlib.suppress(RuntimeError):  # no event loop runs
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(_cancel_tasks, loop, f"Timeout of {item.nodeid}")
        fail(number, frame)

    signal.signal(signal.SIGALRM, end)
    return timer


def _cancel_tasks(loop: asyncio.AbstractEventLoop, reason: str) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel(reason)


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run on the event loop that our programs run on."""
    return {"uvloop": ClosingLoop}


class ClosingLoop(uvloop.Loop):
    """An event loop that ends although warnings are errors: raised in the midst of its end, they leave it waiting."""

    def close(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().close()
        for each in caught:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@pytest.fixture(autouse=True)
def blocking_calls() -> Iterator[BlockBuster]:
    """Blocking calls in the event loop are errors, in our own packages."""
    with blockbuster_ctx(scanned_modules=["exporter", "gateway", "remediator", "fleet", "runtime"]) as blockbuster:
        blockbuster.functions["os.stat"].deactivate()  # a traceback in the log looks at its source files
        yield blockbuster


@pytest.fixture(scope="session")
def preloading() -> Iterator[Path]:
    """The socket of the process that forks launchers."""
    with preloaded_launcher.running() as path:
        yield path


@pytest.fixture
async def launcher(preloading: Path) -> AsyncIterator[Launcher]:
    """Starts processes that end with the test."""
    made = await preloaded_launcher.begin(preloading)
    yield made
    await made.end()


@pytest.fixture
def shared() -> Path:
    """Captures that are kept beside the project; tests that need them are for where they are."""
    return Path(__file__).parents[2] / "shared"

"""Launchers that fork `defib` programs from a process that has already imported all modules.

Importing a server's modules takes 0.6 to 0.8 s of CPU, and the tests start hundreds of servers. Other programs are
started as usual. `python -m tests.preloaded_launcher DESCRIPTOR` forks a launcher for each connection.
"""

import asyncio
import atexit
import contextlib
import gc
import importlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from defib.demo import launcher
from defib.demo.launcher import Launcher

DEFIB = [sys.executable, "-P", "-m", "defib"]


@contextlib.contextmanager
def running() -> Iterator[Path]:
    """Run the process that forks launchers; yield the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="defib-preloaded-") as folder:
        path = Path(folder) / "socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(100)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.preloaded_launcher", str(listener.fileno())],
                pass_fds=[listener.fileno()], stdin=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        try:
            yield path
        finally:
            process.communicate()


async def begin(path: Path) -> Launcher:
    """Return a launcher of the process that listens on a socket."""
    answers, requests = await asyncio.open_unix_connection(str(path))

    return Launcher(requests, answers, answers.read)


class ForkedProcess:
    """A forked child, with the interface of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        ends = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


class LauncherServer(launcher.LauncherServer):
    """Forks `defib` programs, and starts all others."""

    def launch(self, request: Mapping[str, Any]) -> launcher.Process:
        if request["start"][: len(DEFIB)] != DEFIB:
            return super().launch(request)
        pid = os.fork()
        return ForkedProcess(pid) if pid else _run_defib(request)


def _run_defib(request: Mapping[str, Any]) -> NoReturn:
    """Run `defib` with the arguments of a request in this process."""

    def prepare() -> None:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(file, number)
        os.closerange(3, 1024)

    run_defib(request["start"][len(DEFIB) :], request["env"], request["cwd"], prepare)


def run_defib(
    arguments: Sequence[str], env: Mapping[str, str], cwd: str | None, prepare: Callable[[], None]
) -> NoReturn:
    """Run `defib` in this process, which was forked for it; `prepare` sets its files and its user."""
    status = 1
    try:
        prepare()
        os.environ.clear()
        os.environ.update(env)
        if cwd is not None:
            os.chdir(cwd)
        random.seed()
        sys.argv = ["defib", *arguments]
        from defib import cli

        cli.main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else ended.code is not None
    except BaseException:  # noqa: BLE001 - print it, as the interpreter does
        traceback.print_exc()
    finally:
        # As the interpreter does when it exits: wait for threads, then call the exit functions.
        threading._shutdown()  # type: ignore[attr-defined] # the interpreter calls it
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def preload() -> None:
    """Import everything that `defib` imports for its servers, for the processes that are forked from this one."""
    from defib.kinds import KINDS

    # httpcore imports the last one with the first request.
    for module in ("exporter.app", "remediator.app", "anyio._backends._asyncio"):
        importlib.import_module(module)
    for table in (KINDS.probes, KINDS.controls, KINDS.channels, KINDS.collectors):
        list(table.values())
    gc.collect()
    gc.freeze()


def fork_for_each(
    listener: socket.socket, serve: Callable[[socket.socket], None], *, until_stdin_ends: bool = True
) -> None:
    """Serve each connection in a process of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps those that have ended
    while True:
        ready, _, _ = select.select([listener.fileno(), *([0] if until_stdin_ends else [])], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        with connection:
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                serve(connection)
                os._exit(0)


def serve_launcher(connection: socket.socket) -> None:
    os.setsid()
    os.dup2(connection.fileno(), 0)
    os.dup2(connection.fileno(), 1)
    connection.close()
    launcher.main(LauncherServer())


def main(listener: socket.socket) -> None:
    """Import everything, then fork a launcher for each connection until stdin is closed."""
    preload()
    fork_for_each(listener, serve_launcher)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))

"""Keepers whose `defib` programs are forked from a process that has loaded them already.

A server of ours takes 0.6 to 0.8 s of CPU to load, and the tests start hundreds. Other programs are started as usual.
`python -m tests.preloaded SOCKET` forks a keeper for each connection.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from defib.demo import keeper
from defib.demo.keeper import Keeper

DEFIB = [sys.executable, "-m", "defib"]


@contextlib.contextmanager
def running() -> Iterator[Path]:
    """Run the process that forks keepers; gives its socket. It ends with us."""
    with tempfile.TemporaryDirectory(prefix="defib-preloaded-") as folder:
        path = Path(folder) / "socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(100)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.preloaded", str(listener.fileno())],
                pass_fds=[listener.fileno()], stdin=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        try:
            yield path
        finally:
            process.communicate()


async def begin(path: Path) -> Keeper:
    """A keeper of that process."""
    answers, orders = await asyncio.open_unix_connection(str(path))

    return Keeper(orders, answers, answers.read)


class Forked:
    """A child that was forked, as subprocess.Popen has one that was started."""

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


class Kept(keeper.Kept):
    """Forks what is ours, and starts the rest."""

    def launch(self, order: Mapping[str, Any]) -> keeper.Process:
        if order["start"][: len(DEFIB)] != DEFIB:
            return super().launch(order)
        pid = os.fork()
        return Forked(pid) if pid else _defib(order)


def _defib(order: Mapping[str, Any]) -> NoReturn:
    """Become `defib` with the arguments of an order."""
    status = 1
    try:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(file, number)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(order["env"])
        if order["cwd"] is not None:
            os.chdir(order["cwd"])
        random.seed()
        sys.argv = ["defib", *order["start"][len(DEFIB) :]]
        from defib import cli

        cli.main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else ended.code is not None
    except BaseException:  # noqa: BLE001 - as the interpreter does it
        traceback.print_exc()
    finally:
        # What the interpreter does at its end: wait for threads, then call what was registered.
        threading._shutdown()  # type: ignore[attr-defined] # the interpreter calls it
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def main(listener: socket.socket) -> None:
    """Load everything, then fork a keeper for each connection until standard input ends."""
    from defib.kinds import KINDS

    # httpcore imports the last with a program's first request.
    for module in ("exporter.app", "remediator.app", "anyio._backends._asyncio"):
        importlib.import_module(module)
    for table in (KINDS.probes, KINDS.controls, KINDS.channels, KINDS.collectors):
        list(table.values())
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers that end need nobody to wait for them
    while True:
        ready, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        with connection:
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                os.setsid()
                os.dup2(connection.fileno(), 0)
                os.dup2(connection.fileno(), 1)
                connection.close()
                keeper.main(Kept())
                os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))

"""Owns every process, container and folder of a demo, and removes them when the demo ends, however it ends.

`python -m defib.demo.keeper` reads one JSON order a line on stdin and answers each with one line. At the end of stdin,
which also comes when whoever holds the other end is killed, it undoes everything in reverse order.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import DefibError

STOP_WITHIN = 10.0


class KeeperError(DefibError):
    """The keeper could not carry out an order."""


class Keeper:
    """The demo's end: orders to the keeper's process over its standard input, answers from its standard output."""

    def __init__(
        self, orders: asyncio.StreamWriter, answers: asyncio.StreamReader, ended: Callable[[], Awaitable[object]]
    ) -> None:
        self._orders, self._answers, self._ended = orders, answers, ended
        self._lock = asyncio.Lock()

    @classmethod
    async def begin(cls) -> "Keeper":
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "defib.demo.keeper",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None  # noqa: S101 - asked for above
        assert process.stdout is not None  # noqa: S101
        return cls(process.stdin, process.stdout, process.wait)

    async def start(
        self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> int:
        """Start a process in a session of its own, its output appended to `log`; returns its process id."""
        order = {"start": list(argv), "log": str(log), "env": dict(env or os.environ), "cwd": str(cwd) if cwd else None}
        return int((await self._order(order))["pid"])

    async def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process that the keeper started, and wait for its end if that is meant by it."""
        await self._order({"kill": pid, "signal": int(number)})

    async def own_folder(self, path: Path) -> None:
        """Remove this folder at the end."""
        await self._order({"folder": str(path)})

    async def own_docker(self, kind: str, name: str) -> None:
        """Remove this container or image at the end."""
        await self._order({"docker": kind, "name": name, "env": dict(os.environ)})

    async def end(self) -> None:
        """Undo everything."""
        self._orders.write_eof()
        await self._ended()
        self._orders.close()

    async def _order(self, order: Mapping[str, Any]) -> Any:
        async with self._lock:
            self._orders.write(json.dumps(order).encode() + b"\n")
            answer = json.loads(await self._answers.readline() or b'{"error": "the keeper died"}')
        if "error" in answer:
            raise KeeperError(answer["error"])
        return answer


class Process(Protocol):
    """A child process, as subprocess.Popen has it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


class Kept:
    """The keeper's end: what it was told to undo, in order."""

    def __init__(self) -> None:
        self._processes: dict[int, Process] = {}
        self._undo: list[Mapping[str, Any]] = []

    def obey(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        if "start" in order:
            process = self.launch(order)
            self._processes[process.pid] = process
            self._undo.append({"stop": process.pid})
            return {"pid": process.pid}
        if "kill" in order:
            process = self._processes[order["kill"]]
            process.send_signal(order["signal"])
            if order["signal"] in (signal.SIGKILL, signal.SIGTERM):
                process.wait(STOP_WITHIN)
            return {}
        self._undo.append(order)
        return {}

    def launch(self, order: Mapping[str, Any]) -> Process:
        """Start the program of an order: `start` is its argv, `log` the file that takes its output."""
        with Path(order["log"]).open("ab") as log:
            return subprocess.Popen(
                order["start"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=order["env"], cwd=order["cwd"], start_new_session=True,
            )  # fmt: skip

    def undo(self) -> None:
        for order in reversed(self._undo):
            if "stop" in order:
                _stop(self._processes[order["stop"]])
            elif "docker" in order:
                verb = ["rm", "--force"] if order["docker"] == "container" else ["image", "rm", "--force"]
                subprocess.run(
                    ["docker", *verb, order["name"]],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=order["env"], check=False,
                )  # fmt: skip
            else:
                shutil.rmtree(order["folder"], ignore_errors=True)


def _stop(process: Process) -> None:
    """End a process and its session's group; politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_WITHIN)


def main(kept: Kept) -> None:
    """Obey orders until standard input ends, then undo everything."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        for line in sys.stdin:
            try:
                answer = kept.obey(json.loads(line))
            except (OSError, subprocess.SubprocessError) as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        sys.stdout = None
    finally:
        kept.undo()


if __name__ == "__main__":
    main(Kept())

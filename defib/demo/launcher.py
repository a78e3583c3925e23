"""Launcher: starts the processes of a demo or test, and removes everything when it ends, even if it is killed.

`python -m defib.demo.launcher` reads one JSON request per line from stdin and answers each with one line of JSON. When
stdin is closed, which also happens when the client is killed, it undoes all requests in reverse order.
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

STOP_WITHIN = 10.0  # seconds


class LauncherError(DefibError):
    """The launcher could not carry out a request."""


class Launcher:
    """The client: sends requests to the launcher's process and reads its answers."""

    def __init__(
        self, requests: asyncio.StreamWriter, answers: asyncio.StreamReader, wait: Callable[[], Awaitable[object]]
    ) -> None:
        self._requests, self._answers, self._wait = requests, answers, wait
        self._lock = asyncio.Lock()

    @classmethod
    async def begin(cls) -> "Launcher":
        """Start the launcher's process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "defib.demo.launcher",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None  # noqa: S101 - for mypy: it is a pipe
        assert process.stdout is not None  # noqa: S101 - for mypy: it is a pipe
        return cls(process.stdin, process.stdout, process.wait)

    async def start(
        self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> int:
        """Start a process in its own session and append its output to `log`; return its process ID."""
        env = dict(env or os.environ)
        answer = await self._send({"start": list(argv), "log": str(log), "env": env, "cwd": str(cwd) if cwd else None})
        return int(answer["pid"])

    async def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process of the launcher; after SIGTERM or SIGKILL, wait until it has ended."""
        await self._send({"kill": pid, "signal": int(number)})

    async def remove_folder_at_end(self, path: Path) -> None:
        """Remove this folder at the end."""
        await self._send({"folder": str(path)})

    async def remove_docker_at_end(self, kind: str, name: str) -> None:
        """Remove this container or image at the end."""
        await self._send({"docker": kind, "name": name, "env": dict(os.environ)})

    async def end(self) -> None:
        """Stop all processes and remove all folders, containers and images."""
        self._requests.write_eof()
        await self._wait()
        self._requests.close()

    async def _send(self, request: Mapping[str, Any]) -> Any:
        async with self._lock:
            self._requests.write(json.dumps(request).encode() + b"\n")
            answer = json.loads(await self._answers.readline() or b'{"error": "the launcher has ended"}')
        if "error" in answer:
            raise LauncherError(answer["error"])
        return answer


class Process(Protocol):
    """A child process, with the interface of subprocess.Popen."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


class LauncherServer:
    """The launcher's process: carries out requests and remembers how to undo them."""

    def __init__(self) -> None:
        self._processes: dict[int, Process] = {}
        self._undo: list[Mapping[str, Any]] = []

    def handle(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry out a request and return the answer."""
        if "start" in request:
            process = self.launch(request)
            self._processes[process.pid] = process
            self._undo.append({"stop": process.pid})
            return {"pid": process.pid}
        if "kill" in request:
            process = self._processes[request["kill"]]
            process.send_signal(request["signal"])
            if request["signal"] in (signal.SIGKILL, signal.SIGTERM):
                process.wait(STOP_WITHIN)
            return {}
        self._undo.append(request)
        return {}

    def launch(self, request: Mapping[str, Any]) -> Process:
        """Start the program of a request: `start` is its argv, `log` the file for its output."""
        with Path(request["log"]).open("ab") as log:
            return subprocess.Popen(
                request["start"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=request["env"], cwd=request["cwd"], start_new_session=True,
            )  # fmt: skip

    def undo(self) -> None:
        """Undo all requests, the latest first."""
        for request in reversed(self._undo):
            if "stop" in request:
                _stop(self._processes[request["stop"]])
            elif "docker" in request:
                command = ["rm", "--force"] if request["docker"] == "container" else ["image", "rm", "--force"]
                subprocess.run(
                    ["docker", *command, request["name"]],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=request["env"], check=False,
                )  # fmt: skip
            else:
                shutil.rmtree(request["folder"], ignore_errors=True)


def _stop(process: Process) -> None:
    """Stop a process and its process group: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_WITHIN)


def main(server: LauncherServer) -> None:
    """Handle requests until stdin is closed, then undo everything."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        for line in sys.stdin:
            try:
                answer = server.handle(json.loads(line))
            except (OSError, subprocess.SubprocessError) as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        sys.stdout = None
    finally:
        server.undo()


if __name__ == "__main__":
    main(LauncherServer())

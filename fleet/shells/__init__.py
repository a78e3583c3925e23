"""How commands are run on hosts: as local processes or over SSH, alike to whoever asks."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.errors import DefibError

KILL_AFTER = 5.0  # seconds between the polite and the impolite end of a command
OUTPUT_LIMIT = 1024 * 1024
REST_WITHIN = 1.0  # seconds for the rest of the output of a command that has ended, but left something running


class ShellError(DefibError):
    """The host's shell could not be reached: nothing was run."""

    retryable = True


class HostKeyRefused(ShellError):  # noqa: N818 - what happened, in the words of the field
    """The host showed a key that is not the pinned one: nothing was sent."""

    retryable = False


class LoginRefused(ShellError):  # noqa: N818
    """The host does not let us in."""

    retryable = False


@dataclass(frozen=True, slots=True)
class Completed:
    """What became of a command.

    `status` is its exit status, or None where that is unknown: the connection died or the deadline passed, and the
    command may have done its work, part of it, or none. `why` then says so.
    """

    status: int | None
    stdout: str
    stderr: str
    why: str = ""

    @property
    def output(self) -> str:
        return "\n".join(part.strip() for part in (self.stdout, self.stderr) if part.strip())


class Shell(Protocol):
    """A way to run commands on one host."""

    async def run(self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"") -> Completed:
        """Run `argv` without a shell's interpretation, for at most `timeout` seconds; raises ShellError."""

    async def close(self) -> None:
        """Let go of whatever the shell holds."""


class Tail:
    """Reads a stream in a task of its own and keeps its last `limit` bytes."""

    def __init__(self, stream: "Readable", limit: int = OUTPUT_LIMIT) -> None:
        self._stream, self._limit = stream, limit
        self._kept = bytearray()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while chunk := await self._stream.read(65536):
            self._kept += chunk
            if len(self._kept) > 2 * self._limit:
                del self._kept[: -self._limit]

    @property
    def text(self) -> str:
        """What came so far."""
        return bytes(self._kept[-self._limit :]).decode("utf-8", "replace")


class Readable(Protocol):
    async def read(self, n: int) -> bytes: ...


async def cancelled(*tails: Tail) -> None:
    for tail in tails:
        tail.task.cancel()
    await asyncio.gather(*(tail.task for tail in tails), return_exceptions=True)

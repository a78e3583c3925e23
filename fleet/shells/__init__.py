"""How commands are run on hosts: as local processes or over SSH, alike to whoever asks."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.errors import DefibError

KILL_AFTER = 5.0  # seconds between the polite and the impolite end of a command
OUTPUT_LIMIT = 1024 * 1024


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


async def tail_of(stream: "Readable", limit: int = OUTPUT_LIMIT) -> bytes:
    """Read to the end; keep the last `limit` bytes."""
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk
        if len(kept) > 2 * limit:
            del kept[:-limit]
    return bytes(kept[-limit:])


class Readable(Protocol):
    async def read(self, n: int) -> bytes: ...


def decode(output: bytes) -> str:
    return output.decode("utf-8", "replace")


async def cancelled(*tasks: "asyncio.Task[bytes]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

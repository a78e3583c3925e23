"""Shells: commands on hosts, as local processes or over SSH, with the same interface."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.errors import DefibError

CONNECT_TIMEOUT = 10.0  # seconds of a connection and its login
KILL_DELAY = 5.0  # seconds between SIGTERM and SIGKILL
ENDED_BY_TIMEOUT = (124, 137, 143)  # exit statuses of commands that `timeout` ended, in coreutils and busybox
WRAPPER_REFUSED = 126  # exit status of a wrapper that refuses a command
REFUSAL = "defib-shell: "  # the beginning of its message then
OUTPUT_LIMIT = 1024 * 1024  # bytes of an output that are kept
READ_LIMIT = 32 * OUTPUT_LIMIT  # bytes after which a command that only reads is ended
TRAILING_OUTPUT_TIMEOUT = (
    1.0  # seconds for the rest of the output of a command that has ended, but left something running
)


class ShellError(DefibError):
    """The host's shell cannot be reached: nothing was run."""

    retryable = True


class HostKeyError(ShellError):
    """The host's key is not pinned: nothing was sent. `changed`: another key is pinned."""

    retryable = False

    def __init__(self, message: str, *, changed: bool = False) -> None:
        super().__init__(message)
        self.changed = changed


class LoginError(ShellError):
    """The host refused the login."""

    retryable = False


class CommandNotRunError(ShellError):
    """The login succeeded, but the login shell did not run the command."""

    retryable = False


class WrapperOutdatedError(ShellError):
    """The host's wrapper is too old for the command: nothing was run."""

    retryable = False


@dataclass(frozen=True, slots=True)
class CompletedCommand:
    """The result of a command.

    `status` is its exit status. It is None where that is unknown: the connection was lost, the deadline passed
    (`late`), it printed too much (`too_long`) or a signal ended the command, which may have done all of its work, a
    part or nothing. `why` has the reason then.
    """

    status: int | None
    stdout: str
    stderr: str
    why: str = ""
    late: bool = False
    too_long: bool = False

    @property
    def output(self) -> str:
        return "\n".join(part.strip() for part in (self.stdout, self.stderr) if part.strip())


def get_wrapper_refusal(done: CompletedCommand) -> str:
    """Return the message of a wrapper that refused a command; empty where the command ran."""
    message = done.stderr.strip()
    return message if done.status == WRAPPER_REFUSED and message.startswith(REFUSAL) else ""


OutputCallback = Callable[[bytes], None]


class Shell(Protocol):
    """A shell on one host. Where it is `wrapped`, the host's wrapper runs only the commands that it knows."""

    @property
    def wrapped(self) -> bool: ...

    async def run(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", on_output: OutputCallback | None = None
    ) -> CompletedCommand:
        """Run `argv` without interpretation by a shell, for at most `timeout` seconds.

        `on_output` is called with each part of stdout. Raises ShellError where nothing was run.
        """

    async def close(self) -> None:
        """Close the shell's connection."""


class OutputTail:
    """The last `limit` bytes of a stream; `on_output` is called with all of it."""

    def __init__(self, on_output: OutputCallback | None = None, limit: int = OUTPUT_LIMIT) -> None:
        self._on_output, self._limit = on_output, limit
        self._tail = bytearray()

    def add(self, chunk: bytes) -> None:
        if self._on_output is not None:
            self._on_output(chunk)
        self._tail += chunk
        if len(self._tail) > 2 * self._limit:
            del self._tail[: -self._limit]

    @property
    def text(self) -> str:
        """The tail so far."""
        return bytes(self._tail[-self._limit :]).decode("utf-8", "replace")

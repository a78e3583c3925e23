"""How commands are run on hosts: as local processes or over SSH, alike to whoever asks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.errors import DefibError

KILL_DELAY = 5.0  # seconds between the polite and the impolite end of a command
ENDED_BY_TIMEOUT = (124, 137, 143)  # exit statuses of what `timeout` ended, coreutils' and busybox's
WRAPPER_REFUSED = 126  # exit status of a wrapper that does not run what it was sent
REFUSAL = "defib-shell: "  # what a wrapper says then begins with this
OUTPUT_LIMIT = 1024 * 1024
TRAILING_OUTPUT_TIMEOUT = (
    1.0  # seconds for the rest of the output of a command that has ended, but left something running
)


class ShellError(DefibError):
    """The host's shell could not be reached: nothing was run."""

    retryable = True


class HostKeyError(ShellError):
    """The host showed a key that is not pinned: nothing was sent. `changed`: another one is."""

    retryable = False

    def __init__(self, message: str, *, changed: bool = False) -> None:
        super().__init__(message)
        self.changed = changed


class LoginError(ShellError):
    """The host does not let us in."""

    retryable = False


class CommandNotRunError(ShellError):
    """The host let us in, but its login shell did not run what it was sent."""

    retryable = False


class WrapperOutdatedError(ShellError):
    """The host's wrapper is of an earlier version, and was asked for what it does not know: nothing was run."""

    retryable = False


@dataclass(frozen=True, slots=True)
class Completed:
    """What became of a command.

    `status` is its exit status, or None where that is unknown: the connection died or the deadline passed, and the
    command may have done its work, part of it, or none. `why` then says so, and `late` whether it was the deadline. A
    signal that was meant for the command from outside leaves it unknown, too.
    """

    status: int | None
    stdout: str
    stderr: str
    why: str = ""
    late: bool = False

    @property
    def output(self) -> str:
        return "\n".join(part.strip() for part in (self.stdout, self.stderr) if part.strip())


def get_wrapper_refusal(done: Completed) -> str:
    """What a wrapper said in place of running a command, or nothing where it ran."""
    said = done.stderr.strip()
    return said if done.status == WRAPPER_REFUSED and said.startswith(REFUSAL) else ""


OutputCallback = Callable[[bytes], None]


class Shell(Protocol):
    """A way to run commands on one host; `wrapped` is one that only takes what a wrapper on the host knows."""

    @property
    def wrapped(self) -> bool: ...

    async def run(
        self, argv: Sequence[str], *, timeout: float, stdin: bytes = b"", on_output: OutputCallback | None = None
    ) -> Completed:
        """Run `argv` without a shell's interpretation, for at most `timeout` seconds.

        `on_output` is given the standard output as it comes. Raises ShellError where nothing was run.
        """

    async def close(self) -> None:
        """Let go of whatever the shell holds."""


class OutputTail:
    """The last `limit` bytes of a stream; `on_output` is given all of it."""

    def __init__(self, on_output: OutputCallback | None = None, limit: int = OUTPUT_LIMIT) -> None:
        self._on_output, self._limit = on_output, limit
        self._kept = bytearray()

    def add(self, chunk: bytes) -> None:
        if self._on_output is not None:
            self._on_output(chunk)
        self._kept += chunk
        if len(self._kept) > 2 * self._limit:
            del self._kept[: -self._limit]

    @property
    def text(self) -> str:
        """What came so far."""
        return bytes(self._kept[-self._limit :]).decode("utf-8", "replace")

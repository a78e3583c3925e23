"""Proof that a command ran: a POSIX sh script that prints random marks around both outputs, and a parser of them.

What a login shell prints itself is outside the marks. The script contains the two halves of a mark only apart, so that
a peer that echoes the script, instead of running it, proves nothing.
"""

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fleet.shells import KILL_DELAY, REFUSAL, CompletedCommand, OutputCallback, OutputTail

_PREFIX_LIMIT = 4096  # bytes kept of the output before the marks
_STATUS_LIMIT = 4  # bytes of an exit status and its newline
_MESSAGE_LIMIT = 200  # characters of that output in an error
# Exit statuses after HUP, INT, KILL and TERM, which come from outside: the command's own result is unknown.
_ENDED_BY_SIGNAL = (129, 130, 137, 143)
_SIGNALS = 128  # a shell's exit status after a signal is this plus the signal's number

# A command with a timeout; arguments: KILL_DELAY SECONDS COMMAND… busybox's timeout has no -k before 1.35 (it exits 1
# without running anything), and takes whole seconds after -t before 1.30. With any other one there is no timeout.
TIMEOUT_FUNCTIONS = """\
alone() { (exec "$@"); }
limited() { if command -v timeout >/dev/null 2>&1; then timeout -k "$@"; else shift 2; alone "$@"; fi; }
old_timeout() { timeout -k 9 9 sh -c : >/dev/null 2>&1; [ $? -eq 1 ]; }
limited_by_old() {
    seconds=${2%%.*}
    case $2 in *.*) seconds=$((seconds + 1)) ;; esac
    shift
    if timeout 9 sh -c : >/dev/null 2>&1; then timeout "$@"; return; fi
    shift
    if timeout -t 9 sh -c : >/dev/null 2>&1; then timeout -t "$seconds" "$@"; else alone "$@"; fi
}
"""

# `marked COMMAND…` prints the marks. `kept marked COMMAND…` also keeps the outputs of processes that the command leaves
# running: they write to pipes whose readers last until the last writer has ended, and pass the data to the session,
# then drop it, so that no file grows. These shells survive a signal that is meant for the command.
MARK_FUNCTIONS = """\
begin() { printf '%s%s\\n' "$first" "$second"; printf '%s%s\\n' "$first" "$second" >&2; }
bounded() {
    limited "$@"
    status=$?
    if [ "$status" -eq 1 ] && old_timeout; then begin; limited_by_old "$@"; status=$?; fi
    return "$status"
}
marked() {
    trap : HUP INT TERM
    begin
    "$@"
    status=$?
    printf '%s%s %s\\n' "$second" "$first" "$status"
    printf '%s%s %s\\n' "$second" "$first" "$status" >&2
}
drained() { trap '' HUP INT PIPE TERM; cat || exec cat >/dev/null; }
kept() {
    trap : HUP INT TERM
    exec 3>&1 4>&2
    {
        "$@" 2>&1 >&5 3>&- 4>&- 5>&- | { drained <&6 >&4 2>/dev/null 3>&- 4>&- 5>&- 6<&- & } 6<&0
    } 5>&1 | { drained <&6 >&3 2>/dev/null 3>&- 4>&- 6<&- & } 6<&0
}
"""


def _half() -> str:
    return f"@defib-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class CommandMarkers:
    """The halves of one command's marks."""

    first: str = field(default_factory=_half)
    second: str = field(default_factory=_half)

    @cached_property
    def begin(self) -> bytes:
        return f"{self.first}{self.second}\n".encode()

    @cached_property
    def end(self) -> bytes:
        return f"{self.second}{self.first} ".encode()


def build_script(
    argv: Sequence[str], marks: CommandMarkers, *, timeout: float | None, keep_output: bool, read_stdin: bool
) -> bytes:
    """Return the script that runs `argv`.

    With `keep_output`, processes that it leaves running keep their outputs. With `read_stdin`, the command reads what
    is sent after the start mark: the shell might read earlier input itself. It reads it from a pipe, since the shell's
    stdin may be a socket, which cannot be opened as /dev/stdin. Otherwise its stdin is empty.
    """
    prefix = ["kept"] if keep_output else []
    prefix += ["marked", *(["alone"] if timeout is None else ["bounded", f"{KILL_DELAY:g}", f"{timeout:g}"])]
    command = shlex.join([*prefix, *argv])
    command = f"trap : HUP INT TERM\ncat | {command}" if read_stdin else f"{command} </dev/null"
    # One compound command, which the shell reads to its end before it runs any of it.
    text = (
        f"{{\nLC_ALL=C; export LC_ALL\nfirst={shlex.quote(marks.first)} second={shlex.quote(marks.second)}\n"
        f"{TIMEOUT_FUNCTIONS}{MARK_FUNCTIONS}{command}\nexit\n}}\n"
    )
    return text.encode("utf-8", "surrogateescape")


class MarkedOutput:
    """One output of a command: the part between its marks, or all of it without marks.

    `on_output` is called with each part of it.
    """

    def __init__(self, marks: CommandMarkers | None, on_output: OutputCallback | None = None) -> None:
        self._marks, self._on_output = marks, on_output
        self._tail = OutputTail(on_output)
        self._rest = b""  # may be the start of a mark
        self._prefix = b""
        self.started = marks is None
        self.status: int | None = None  # from the end mark
        self.size = 0  # bytes received

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self._marks is None:
            self._tail.add(chunk)
        elif self.status is None:
            self._parse(self._rest + chunk, self._marks)

    def _parse(self, data: bytes, marks: CommandMarkers) -> None:
        before, mark, after = data.rpartition(marks.begin)
        if mark:
            # A second start mark follows a first try that ran nothing: the output before it is not the command's.
            self._prefix = (self._prefix + before.replace(marks.begin, b""))[-_PREFIX_LIMIT:]
            self.started, self._tail = True, OutputTail(self._on_output)
            data = after
        at, status = _find_end_mark(data, marks) if self.started else (-1, None)
        if status is not None:
            self._rest, self.status = b"", status
        else:
            at = at if at >= 0 else _find_mark_start(data, marks)
            self._rest = data[at:]
        if self.started and at:
            self._tail.add(data[:at])
        elif not self.started:
            self._prefix = (self._prefix + data[:at])[-_PREFIX_LIMIT:]

    @property
    def text(self) -> str:
        """The output so far."""
        return self._tail.text

    @property
    def prefix(self) -> str:
        """The end of the output before the marks, or without any."""
        return (self._prefix if self.started else self._prefix + self._rest).decode("utf-8", "replace")


def _find_end_mark(data: bytes, marks: CommandMarkers) -> tuple[int, int | None]:
    """Return the offset of the end mark and the status after it; None where that is incomplete, -1 without a mark.

    Text that no status follows is not a mark: waiting for its end would hold back all later output.
    """
    at = data.find(marks.end)
    while at >= 0:
        after = data[at + len(marks.end) : at + len(marks.end) + _STATUS_LIMIT]
        status, newline, _ = after.partition(b"\n")
        if newline and status.isdigit():
            return at, int(status)
        if not newline and len(after) < _STATUS_LIMIT and (status.isdigit() or not status):
            return at, None
        at = data.find(marks.end, at + 1)
    return -1, None


def _find_mark_start(data: bytes, marks: CommandMarkers) -> int:
    """Return the offset of a possible start of a mark at the end of `data`, or its length."""
    known = (marks.begin, marks.end)
    at = data.find(b"@", max(0, len(data) - max(map(len, known))))
    while at >= 0 and not any(mark.startswith(data[at:]) for mark in known):
        at = data.find(b"@", at + 1)
    return at if at >= 0 else len(data)


class CommandOutputs:
    """Both outputs of a command, of at most `limit` bytes if it is set."""

    def __init__(
        self, marks: CommandMarkers | None, on_output: OutputCallback | None, limit: int | None = None
    ) -> None:
        self._marks, self._limit = marks, limit
        self.out, self.err = MarkedOutput(marks, on_output), MarkedOutput(marks)

    @property
    def started(self) -> bool:
        """Whether the command has started."""
        return self.out.started

    @property
    def is_echo(self) -> bool:
        """Whether the peer sent back the script."""
        return self._marks is not None and self._marks.first in f"{self.out.prefix}{self.err.prefix}"

    @property
    def too_long(self) -> bool:
        """Whether the limit is exceeded."""
        return self._limit is not None and self.out.size + self.err.size > self._limit

    def status_or(self, exit_status: int | None) -> int | None:
        """Return the status from the end mark, or `exit_status` without marks."""
        return exit_status if self._marks is None else self.out.status

    @property
    def ended(self) -> bool:
        """Whether both end marks have arrived."""
        return self.out.status is not None and self.err.status is not None

    def build_result(self, status: int | None) -> CompletedCommand:
        """Return the result of the command that ended with `status`, which is unknown after a signal from outside."""
        out, err = self.out.text, self.err.text
        if self.too_long:
            return CompletedCommand(None, out, err, f"the output is longer than {self._limit} bytes", too_long=True)
        if status is None:
            return CompletedCommand(None, out, err, "the connection was lost, or a signal ended the command")
        status = _SIGNALS - status if status < 0 else status  # from a process's to a shell's form
        if status in _ENDED_BY_SIGNAL:
            return CompletedCommand(None, out, err, f"signal {status - _SIGNALS} ended the command")
        return CompletedCommand(status, out, err)

    @property
    def refusal(self) -> str:
        """The message of a wrapper that refused the command, or empty."""
        lines = (line.strip() for line in self.err.prefix.splitlines())
        return next((line for line in lines if line.startswith(REFUSAL)), "")

    @property
    def message(self) -> str:
        """The last line of a shell that did not run the script, for an error."""
        if self.is_echo:
            return "it sent the script back"
        lines = [line.strip() for line in f"{self.out.prefix}\n{self.err.prefix}".splitlines() if line.strip()]
        return lines[-1][:_MESSAGE_LIMIT] if lines else "no output"

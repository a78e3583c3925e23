"""Proof that a command ran: a POSIX sh script that prints random marks around both its outputs, and what reads them.

What a login shell prints of its own stands outside the marks. The script holds a mark's two halves only apart, so that
whoever sends it back, in place of running it, proves nothing.
"""

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from fleet.shells import KILL_DELAY, REFUSAL, Completed, OutputCallback, OutputTail

_SAID = 4096  # bytes kept of what came before the marks
_STATUS_LIMIT = 4  # bytes of an exit status and its newline
_QUOTED = 200  # characters of it that an error quotes
# What ended such a command is somebody else: HUP, INT, KILL, TERM. What it would have come to is not known.
_ENDED_BY_SIGNAL = (129, 130, 137, 143)
_SIGNALS = 128  # a shell's status of a command that a signal ended is this, and the signal's number

# A command with its deadline. busybox's timeout has no -k before 1.35 (it then runs nothing, and exits 1), and before
# 1.30 takes other arguments altogether: such a host keeps no deadline. Arguments: KILL_AFTER SECONDS COMMAND…
TIMEOUT_FUNCTIONS = """\
alone() { (exec "$@"); }
limited() { if command -v timeout >/dev/null 2>&1; then timeout -k "$@"; else shift 2; alone "$@"; fi; }
old_timeout() { timeout -k 9 9 sh -c : >/dev/null 2>&1; [ $? -eq 1 ]; }
limited_by_old() { shift; if timeout 9 sh -c : >/dev/null 2>&1; then timeout "$@"; else shift; alone "$@"; fi; }
"""

# `marked COMMAND…` prints the marks; `kept marked COMMAND…` also has what the command leaves running write into pipes
# that are read until the last writer is gone, whoever else has gone before: at first into the session, then into
# nothing. No file could grow from it. These shells outlive a signal that is meant for the command.
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
class Marks:
    """The halves of one command's marks."""

    first: str = field(default_factory=_half)
    second: str = field(default_factory=_half)

    @property
    def begin(self) -> bytes:
        return f"{self.first}{self.second}\n".encode()

    @property
    def end(self) -> bytes:
        return f"{self.second}{self.first} ".encode()


def build_script(argv: Sequence[str], marks: Marks, *, timeout: float | None, stays: bool, reads: bool) -> bytes:
    """The script that runs `argv`; with `stays`, what it leaves running keeps its outputs.

    Without `reads` the command finds the end of its input. Else it reads what is sent behind the script, after the mark
    that it has begun: the shell, which reads all that is there, may have read on otherwise.
    """
    how = ["kept"] if stays else []
    how += ["marked", *(["alone"] if timeout is None else ["bounded", f"{KILL_DELAY:g}", f"{timeout:g}"])]
    command = f"{shlex.join([*how, *argv])}{'' if reads else ' </dev/null'}"
    # In one piece, which is read to its end before any of it is run.
    text = (
        f"{{\nLC_ALL=C; export LC_ALL\nfirst={shlex.quote(marks.first)} second={shlex.quote(marks.second)}\n"
        f"{TIMEOUT_FUNCTIONS}{MARK_FUNCTIONS}{command}\nexit\n}}\n"
    )
    return text.encode("utf-8", "surrogateescape")


class MarkedOutput:
    """One output of a command: what stands between its marks, or all of it where there are none.

    `on_output` is given it as it comes.
    """

    def __init__(self, marks: Marks | None, on_output: OutputCallback | None = None) -> None:
        self._marks, self._on_output = marks, on_output
        self._kept = OutputTail(on_output)
        self._rest = b""  # may become a mark
        self._said = b""
        self.begun = marks is None
        self.status: int | None = None  # as the end mark has it

    def add(self, chunk: bytes) -> None:
        if self._marks is None:
            self._kept.add(chunk)
        elif self.status is None:
            self._judge(self._rest + chunk, self._marks)

    def _judge(self, data: bytes, marks: Marks) -> None:
        while (at := data.find(marks.begin)) >= 0:
            # Once more where the first try has run nothing: what came before is not the command's.
            self._said, self.begun, self._kept = (self._said + data[:at])[-_SAID:], True, OutputTail(self._on_output)
            data = data[at + len(marks.begin) :]
        at, status = _end_mark(data, marks) if self.begun else (-1, None)
        if status is not None:
            self._rest, self.status = b"", status
        else:
            at = at if at >= 0 else _start_of_a_mark(data, marks)
            self._rest = data[at:]
        if self.begun and at:
            self._kept.add(data[:at])
        elif not self.begun:
            self._said = (self._said + data[:at])[-_SAID:]

    @property
    def text(self) -> str:
        """What came so far."""
        return self._kept.text

    @property
    def said(self) -> str:
        """The end of what came before the marks, or in place of them."""
        return (self._said if self.begun else self._said + self._rest).decode("utf-8", "replace")


def _end_mark(data: bytes, marks: Marks) -> tuple[int, int | None]:
    """Where the end mark is, or may be, and the status that follows it; -1 where there is none.

    What no status follows is no mark: kept as one, it would hold all that comes after it.
    """
    at = data.find(marks.end)
    while at >= 0:
        after = data[at + len(marks.end) :][:_STATUS_LIMIT]
        status, newline, _ = after.partition(b"\n")
        if newline and status.isdigit():
            return at, int(status)
        if not newline and len(after) < _STATUS_LIMIT and (status.isdigit() or not status):
            return at, None
        at = data.find(marks.end, at + 1)
    return -1, None


def _start_of_a_mark(data: bytes, marks: Marks) -> int:
    """Where the end of `data` may be the start of a mark, or its length."""
    known = (marks.begin, marks.end)
    at = data.find(b"@", max(0, len(data) - max(map(len, known))))
    while at >= 0 and not any(mark.startswith(data[at:]) for mark in known):
        at = data.find(b"@", at + 1)
    return at if at >= 0 else len(data)


class CommandOutputs:
    """Both outputs of a command."""

    def __init__(self, marks: Marks | None, on_output: OutputCallback | None) -> None:
        self._marks = marks
        self.out, self.err = MarkedOutput(marks, on_output), MarkedOutput(marks)

    @property
    def begun(self) -> bool:
        return self.out.begun

    @property
    def sent_back(self) -> bool:
        """Whether what was sent to be run came back instead."""
        return self._marks is not None and self._marks.first in f"{self.out.said}{self.err.said}"

    def status_or(self, exit_status: int | None) -> int | None:
        """The status that the end mark has; `exit_status` where there are no marks."""
        return exit_status if self._marks is None else self.out.status

    @property
    def ended(self) -> bool:
        """Whether both end marks are here."""
        return self.out.status is not None and self.err.status is not None

    def completed(self, status: int | None) -> Completed:
        """What became of the command that ended with `status`; a signal from outside leaves that unknown."""
        out, err = self.out.text, self.err.text
        if status is None:
            return Completed(None, out, err, "the connection was lost, or a signal ended the command")
        status = _SIGNALS - status if status < 0 else status  # as processes have it, and as shells do
        if status in _ENDED_BY_SIGNAL:
            return Completed(None, out, err, f"signal {status - _SIGNALS} ended the command")
        return Completed(status, out, err)

    @property
    def refusal(self) -> str:
        """What a wrapper said in place of running the command, if it did."""
        lines = (line.strip() for line in self.err.said.splitlines())
        return next((line for line in lines if line.startswith(REFUSAL)), "")

    @property
    def instead(self) -> str:
        """What a shell that did not run the script said, as an error has it."""
        said = f"{self.out.said}\n{self.err.said}"
        if self.sent_back:
            return "it sent back what it was sent"
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return lines[-1][:_QUOTED] if lines else "it said nothing"

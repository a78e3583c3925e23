"""What became of a host's setup, and how it is shown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from defib.host_setup.script import CHANGED, UNCHANGED
from defib.output import format_count, parenthesized
from fleet.shells import CompletedCommand

SHOWN_LINES = 20  # of a host's output, the last ones
SHOWN_CHARACTERS = 500  # of a line
Outcome = Literal["changed", "unchanged", "failed", "not run"]
_NAMES: dict[Outcome, str] = {
    "changed": "changed",
    "unchanged": "already set up",
    "failed": "failed",
    "not run": "not set up",
}
_UNKNOWN_KEY = "Host key verification failed"


@dataclass(frozen=True)
class HostResult:
    """The outcome of a host's setup: why, if it failed or was not run, and the host's output, which is not trusted."""

    host: str
    outcome: Outcome
    why: str = ""
    output: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.host}: {_NAMES[self.outcome]}{parenthesized(self.why)}"


def judge(host: str, completed: CompletedCommand) -> HostResult:
    """Return what became of a host from the output of its script and the exit status of ssh."""
    lines = [line for line in completed.stdout.splitlines() if line.strip()]
    errors = [line for line in completed.stderr.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if completed.status == 0 and last in (CHANGED, UNCHANGED):
        return HostResult(host, "changed" if last == CHANGED else "unchanged", output=_cut([*lines[:-1], *errors]))
    if completed.status == 0:
        why = "the script was not run to its end, although ssh ended with status 0"
    elif completed.status is None:
        why = completed.why
    else:
        why = _cut([*lines, *errors])[-1] if lines or errors else f"ssh ended with status {completed.status}"
    if any(_UNKNOWN_KEY in line for line in errors):
        why += f"; to pin the host's key: defib discover --known-hosts {host}"
    return HostResult(host, "failed", why, _cut([*lines, *errors]))


def _cut(lines: Sequence[str]) -> list[str]:
    dropped = len(lines) - SHOWN_LINES
    shown = [line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…" for line in lines[-SHOWN_LINES:]]
    return [f"… {format_count(dropped, 'line')} before", *shown] if dropped > 0 else shown


def summarize(results: Sequence[HostResult]) -> Iterator[str]:
    """Yield the lines of the summary: the numbers, then the hosts by outcome, and why those that failed did."""
    by_outcome = {outcome: [each for each in results if each.outcome == outcome] for outcome in _NAMES}
    counts = ", ".join(f"{len(those)} {_NAMES[outcome]}" for outcome, those in by_outcome.items() if those)
    yield f"{format_count(len(results), 'host')}: {counts}"
    for outcome, those in by_outcome.items():
        if those and outcome in ("changed", "unchanged"):
            yield f"  {_NAMES[outcome]}: {', '.join(each.host for each in those)}"
        elif those:
            yield f"  {_NAMES[outcome]}:"
            yield from (f"    {each.host}: {each.why}" for each in those)

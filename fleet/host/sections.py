"""Reading a host in one round trip: one shell script, whose output has a delimited section for each thing to read.

POSIX sh, busybox included. The sections run in parallel, each with its own timeout, so that one that hangs does not
hold up the others.
"""

import asyncio
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fleet.shells import OUTPUT_LIMIT, Shell, ShellError
from fleet.shells.proof import TIMEOUT_FUNCTIONS

T = TypeVar("T")
LINES_LIMIT = 5000  # of a section
LINE_LIMIT = 4096  # bytes
WRAPPER_LIMIT = 59.0  # seconds: the wrapper's maximum for a section
SCRIPT_SHARE = 0.8  # of a section's timeout that its script may take


@dataclass(frozen=True, slots=True)
class Section:
    """One thing to read; `script` is POSIX sh, and `names` are its arguments."""

    name: str
    script: str
    names: tuple[str, ...] = ()
    timeout: float = 10.0  # seconds, of which the script may take `SCRIPT_SHARE`
    rank: int = 0  # sections that are more likely to hang have a higher rank, and are printed later
    max_lines: int = LINES_LIMIT  # further lines are left out
    max_bytes: int = OUTPUT_LIMIT  # the same


NOT_READ = -1  # the status of a section without an end; its text is the reason


@dataclass(frozen=True, slots=True)
class SectionOutput:
    """The output of a section's script, stderr included, and its exit status.

    `truncated` is how many lines were left out or shortened, because a limit was exceeded.
    """

    status: int
    text: str
    truncated: int = 0

    @property
    def last_line(self) -> str:
        return self.text.strip().rpartition("\n")[2].strip() or "no output"


class HostReading:
    """One reading of a host, in progress or done; its sections arrive one by one."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self.requested_at = asyncio.get_running_loop().time()
        self.started_at = time.time()
        self._started = time.perf_counter()
        self._futures = {each.name: asyncio.get_running_loop().create_future() for each in sections}
        self._parsed: dict[tuple[str, Callable[[str], Any]], Any] = {}

    async def section(self, name: str, parse: Callable[[str], T]) -> tuple[SectionOutput, T, float]:
        """Return a section's output, its parsed form, and the seconds since the start of the reading.

        The output is parsed once for all callers. Raises ShellError where the section was not read.
        """
        # Cancelling one caller must not cancel the others.
        output, took = await asyncio.shield(self._futures[name])
        if isinstance(output, ShellError):
            raise output
        if (name, parse) not in self._parsed:
            self._parsed[name, parse] = parse(output.text)
        return output, self._parsed[name, parse], took

    def set_output(self, name: str, output: SectionOutput | ShellError) -> None:
        """Set a section's output, unless it is set already."""
        future = self._futures.get(name)
        if future is not None and not future.done():
            future.set_result((output, time.perf_counter() - self._started))

    @property
    def is_complete(self) -> bool:
        return all(
            future.done() and not isinstance(future.result()[0], ShellError) for future in self._futures.values()
        )

    def fail(self, error: ShellError) -> None:
        """Set the error of all sections without output."""
        for name in self._futures:
            self.set_output(name, error)


_MARK = re.compile(rb"^(@defib-[0-9a-f]+) (\S+)(?: (\d{1,3}))?\n", re.MULTILINE)
_MARK_LIMIT = 200  # bytes of a line with a mark
SectionCallback = Callable[[str, SectionOutput], None]


def merge_sections(sections: Iterable[Section]) -> tuple[Section, ...]:
    """Return the sections with those of the same name merged: all their `names`, and the longest timeout."""
    by_name: dict[str, Section] = {}
    for section in sections:
        other = by_name.get(section.name, section)
        names = tuple(sorted({*section.names, *other.names})) if other is not section else section.names
        by_name[section.name] = replace(section, names=names, timeout=max(section.timeout, other.timeout))
    return tuple(sorted(by_name.values(), key=lambda section: (section.rank, section.name)))


# The functions of every script. `section` runs one section with a timeout, and prints it between its marks in a single
# write, so that it takes few packets. `in_order` runs all in parallel; their outputs wait in pipes for their turn.
LIBRARY = (
    TIMEOUT_FUNCTIONS
    + """\
section() {
    section=$1 limit=$2 script=$3
    export limit
    shift 3
    output=$(limited 1 "$limit" sh -c "$script" sh "$@" </dev/null 2>&1)
    status=$?
    if [ "$status" -eq 1 ] && old_timeout; then
        output=$(limited_by_old 1 "$limit" sh -c "$script" sh "$@" </dev/null 2>&1)
        status=$?
    fi
    printf '\\n%s %s\\n%s\\n%s %s %s\\n' "$mark" "$section" "$output$more" "$mark" "$section" "$status"
}
in_order() {
    first=$1
    shift
    if [ $# -eq 0 ]; then one "$first"; else one "$first" | { exec 3<&0; in_order "$@" | { cat <&3; cat; }; }; fi
}
"""
)


class IncompleteReadingError(ShellError):
    """The shell answered, but some sections are missing: they timed out (`late`), or followed too much output."""

    def __init__(self, message: str, *, late: bool, too_long: bool = False) -> None:
        super().__init__(message)
        self.late, self.too_long = late, too_long


async def read_sections(
    shell: Shell, sections: Sequence[Section], *, timeout: float, on_section: SectionCallback
) -> ShellError:
    """Read `sections`, and call `on_section` as each ends.

    Return the error of the sections that did not end. Raises ShellError where nothing was read.
    """
    marker = f"@defib-{secrets.token_hex(8)}"
    parser = SectionParser(marker, sections, on_section)
    if shell.wrapped:
        argv = ["read", marker, *(format_wrapper_item(section) for section in sections)]
        done = await shell.run(argv, timeout=timeout, on_output=parser.feed)
    else:
        done = await shell.run(["sh", "-c", build_script(sections, marker)], timeout=timeout, on_output=parser.feed)
    reason = done.why or (done.stderr.strip().splitlines() or ["the output is incomplete"])[-1]
    if done.status is None and not done.stdout and not done.late:
        return ShellError(reason)
    return IncompleteReadingError(reason, late=done.late, too_long=done.too_long)


def build_script(sections: Sequence[Section], marker: str) -> str:
    """Return the script that reads all sections."""
    cases = "".join(
        f"{number}) {shlex.join(['section', each.name, format_limit(each), each.script, *each.names])} ;;\n"
        for number, each in enumerate(sections)
    )
    numbers = " ".join(map(str, range(len(sections))))
    return f"mark={shlex.quote(marker)} more=\n{LIBRARY}one() {{ case $1 in\n{cases}esac; }}\nin_order {numbers}\n"


def format_wrapper_item(section: Section) -> str:
    """Return the argument that asks a host's wrapper for a section (deploy/ssh/defib-shell)."""
    limit = min(max(SCRIPT_SHARE * section.timeout, 0.1), WRAPPER_LIMIT)
    return f"{section.name}:{limit:.3g}:{','.join(section.names)}"


def format_limit(section: Section) -> str:
    """Return the seconds that a section's script may take."""
    return f"{SCRIPT_SHARE * section.timeout:g}"


class SectionParser:
    """Parses a script's output as it arrives, and calls `on_section` for each complete section, once.

    Text between sections, such as login banners, and sections that were not requested are ignored. The beginning of a
    section is kept: `max_bytes` bytes and `max_lines` lines, each of at most `LINE_LIMIT` bytes.
    """

    def __init__(self, marker: str, sections: Iterable[Section], on_section: SectionCallback) -> None:
        self._marker = marker.encode()
        self._on_section = on_section
        self._missing = {section.name: section for section in sections}
        self._name: str | None = None  # of the section that is being received
        self._max_bytes = 0
        self._text = bytearray()
        self._dropped_lines = 0
        self._rest = b""  # the beginning of a line, which may become a mark
        self._within_line = False  # whether the rest of a line that is no mark follows

    def feed(self, chunk: bytes) -> None:
        """Parse the next part of the output."""
        data = self._rest + chunk
        processed, at = 0, 0
        if self._within_line:
            at = data.find(b"\n") + 1 or len(data)
        for mark in _MARK.finditer(data, at):
            if mark[1] == self._marker:
                self._keep(data[processed : mark.start()])
                self._handle_mark(mark[2].decode("utf-8", "replace"), mark[3])
                processed = mark.end()
        line = data.rfind(b"\n") + 1
        is_complete = len(data) - line > _MARK_LIMIT or (not line and self._within_line)
        end = len(data) if is_complete else max(processed, line)
        self._keep(data[processed:end])
        self._rest = data[end:]
        self._within_line = end > line

    def _keep(self, data: bytes) -> None:
        if self._name is None:
            return
        room = self._max_bytes - len(self._text)
        self._text += data[:room]
        dropped = data[room:]
        if dropped:
            self._dropped_lines += dropped.count(b"\n")

    def _handle_mark(self, name: str, status: bytes | None) -> None:
        if status is not None and name == self._name:
            output = _cut(bytes(self._text), int(status), self._missing.pop(name).max_lines, self._dropped_lines)
            self._on_section(name, output)
        self._name = name if status is None and name in self._missing else None
        self._max_bytes = self._missing[name].max_bytes if self._name is not None else 0
        self._text.clear()
        self._dropped_lines = 0


def _cut(data: bytes, status: int, max_lines: int, dropped: int) -> SectionOutput:
    """Return the output of a section, of which `dropped` lines are missing at the end, within the limits of lines."""
    if dropped:
        data = data[: data.rfind(b"\n") + 1 or len(data)]
    lines = data.removesuffix(b"\n").split(b"\n", max_lines)
    if len(lines) > max_lines:
        dropped += lines.pop().count(b"\n") + 1
    long = [number for number, line in enumerate(lines) if len(line) > LINE_LIMIT]
    for number in long:
        lines[number] = lines[number][:LINE_LIMIT]
    return SectionOutput(status, b"\n".join(lines).decode("utf-8", "replace"), dropped + len(long))

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


NOT_READ = -1  # the status of a section without an end; its text is the reason


@dataclass(frozen=True, slots=True)
class SectionOutput:
    """The output of a section's script, stderr included, and its exit status."""

    status: int
    text: str

    @property
    def last_line(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1].strip() if lines else "no output"


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
    """The shell answered, but some sections are missing; `late`: they timed out."""

    def __init__(self, message: str, *, late: bool) -> None:
        super().__init__(message)
        self.late = late


async def read_sections(
    shell: Shell, sections: Sequence[Section], *, timeout: float, on_section: SectionCallback
) -> ShellError:
    """Read `sections`, and call `on_section` as each ends.

    Return the error of the sections that did not end. Raises ShellError where nothing was read.
    """
    marker = f"@defib-{secrets.token_hex(8)}"
    parser = SectionParser(marker, on_section)
    if shell.wrapped:
        argv = ["read", marker, *(format_wrapper_item(section) for section in sections)]
        done = await shell.run(argv, timeout=timeout, on_output=parser.feed)
    else:
        done = await shell.run(["sh", "-c", build_script(sections, marker)], timeout=timeout, on_output=parser.feed)
    reason = done.why or (done.stderr.strip().splitlines() or ["the output is incomplete"])[-1]
    if done.status is None and not done.stdout and not done.late:
        return ShellError(reason)
    return IncompleteReadingError(reason, late=done.late)


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
    """Parses a script's output as it arrives, and calls `on_section` for each complete section.

    Text between sections, such as login banners, is ignored.
    """

    def __init__(self, marker: str, on_section: SectionCallback) -> None:
        self._marker = marker.encode()
        self._on_section = on_section
        self._text = bytearray()
        self._name: str | None = None
        self._searched = 0  # no mark starts before this offset

    def feed(self, chunk: bytes) -> None:
        """Parse the next part of the output."""
        self._text += chunk
        at = self._searched
        while mark := _MARK.search(self._text, at):
            if mark[1] != self._marker:
                at = mark.end()
                continue
            name, status = mark[2].decode("utf-8", "replace"), mark[3]
            if status is not None and name == self._name:
                text = bytes(self._text[: mark.start()]).decode("utf-8", "replace")
                self._on_section(name, SectionOutput(int(status), text.removesuffix("\n")))
            self._name = name if status is None else None
            del self._text[: mark.end()]
            at = 0
        line = self._text.rfind(b"\n", at) + 1 or at
        self._searched = line if len(self._text) - line <= _MARK_LIMIT else len(self._text)
        over = len(self._text) - OUTPUT_LIMIT
        if over > 0:
            del self._text[:over]
            self._searched = max(0, self._searched - over)

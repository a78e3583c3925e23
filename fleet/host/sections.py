"""Reading several things of a host in one round trip: one shell script, its output in delimited sections.

POSIX sh, busybox included. The sections run side by side, each with its own deadline, so that one that hangs costs the
others no more than that.
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
WRAPPER_LIMIT = 59.0  # seconds that it gives a section at most
SHARE = 0.8  # of a section's time that its script may take


@dataclass(frozen=True, slots=True)
class Section:
    """One thing to read; `build_script` is POSIX sh, and `names` its arguments, of all who ask for it."""

    name: str
    script: str
    names: tuple[str, ...] = ()
    timeout: float = 10.0  # seconds, of which the script may take most
    rank: int = 0  # those that are more likely to hang come later, so that the others need not wait for them


NOT_READ = -1  # the status of a section whose end did not come; its text is why


@dataclass(frozen=True, slots=True)
class SectionOutput:
    """What a section's script printed, stderr included, and its exit status."""

    status: int
    text: str

    @property
    def last_line(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1].strip() if lines else "it said nothing"


class HostReading:
    """One reading of a host, under way or done; its sections come one by one. Times are Unix time and seconds."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self.requested_at = asyncio.get_running_loop().time()
        self.started_at = time.time()
        self._started = time.perf_counter()
        self._futures = {each.name: asyncio.get_running_loop().create_future() for each in sections}
        self._parsed: dict[tuple[str, Callable[[str], Any]], Any] = {}

    async def section(self, name: str, parse: Callable[[str], T]) -> tuple[SectionOutput, T, float]:
        """A section's output, the same as `parse` reads it, once for all who ask, and how long it took.

        Raises ShellError where it was not read.
        """
        # Who gives up waiting does not end the waiting of the others.
        output, took = await asyncio.shield(self._futures[name])
        if isinstance(output, ShellError):
            raise output
        if (name, parse) not in self._parsed:
            self._parsed[name, parse] = parse(output.text)
        return output, self._parsed[name, parse], took

    def set_output(self, name: str, output: SectionOutput | ShellError) -> None:
        """What came of a section; the first word counts."""
        future = self._futures.get(name)
        if future is not None and not future.done():
            future.set_result((output, time.perf_counter() - self._started))

    def fail(self, error: ShellError) -> None:
        """Nothing more comes."""
        for name in self._futures:
            self.set_output(name, error)


_MARK = re.compile(rb"^(@defib-[0-9a-f]+) (\S+)(?: (\d{1,3}))?\n", re.MULTILINE)
_MARK_LIMIT = 200  # bytes of a line with a mark
SectionCallback = Callable[[str, SectionOutput], None]


def merge_sections(sections: Iterable[Section]) -> tuple[Section, ...]:
    """Sections of one name become one, with the names of all."""
    by_name: dict[str, Section] = {}
    for section in sections:
        before = by_name.get(section.name)
        if before is not None:
            names = tuple(sorted({*section.names, *before.names}))
            timeout = max(section.timeout, before.timeout)
            section = replace(section, names=names, timeout=timeout)  # noqa: PLW2901
        by_name[section.name] = section
    return tuple(sorted(by_name.values(), key=lambda section: (section.rank, section.name)))


# The parts of every script: a section with its deadline and its marks, written in one piece so that it travels in few
# packets, and sections side by side whose outputs wait in pipes of their own until those before them are printed.
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
    """The shell answered, but not all that was asked came; `late`: not in time."""

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
        asked = ["read", marker, *(format_wrapper_item(section) for section in sections)]
        done = await shell.run(asked, timeout=timeout, on_output=parser.feed)
    else:
        done = await shell.run(["sh", "-c", build_script(sections, marker)], timeout=timeout, on_output=parser.feed)
    why = done.why or (done.stderr.strip().splitlines() or ["it was cut short"])[-1]
    if done.status is None and not done.stdout and not done.late:
        return ShellError(why)
    return IncompleteReadingError(why, late=done.late)


def build_script(sections: Sequence[Section], marker: str) -> str:
    """The script that reads all sections."""
    cases = "".join(
        f"{number}) {shlex.join(['section', each.name, format_limit(each), each.script, *each.names])} ;;\n"
        for number, each in enumerate(sections)
    )
    numbers = " ".join(map(str, range(len(sections))))
    return f"mark={shlex.quote(marker)} more=\n{LIBRARY}one() {{ case $1 in\n{cases}esac; }}\nin_order {numbers}\n"


def format_wrapper_item(section: Section) -> str:
    """A section as the wrapper on a host is asked for it (deploy/ssh/defib-shell)."""
    limit = min(max(SHARE * section.timeout, 0.1), WRAPPER_LIMIT)
    return f"{section.name}:{limit:.3g}:{','.join(section.names)}"


def format_limit(section: Section) -> str:
    return f"{SHARE * section.timeout:g}"


class SectionParser:
    """Takes a script's output as it comes, and tells of each section once its end has come.

    Banners around them and an end that is missing do no harm.
    """

    def __init__(self, marker: str, on_section: SectionCallback) -> None:
        self._marker = marker.encode()
        self._on_section = on_section
        self._text = bytearray()
        self._name: str | None = None
        self._searched = 0  # up to where there is no mark

    def feed(self, chunk: bytes) -> None:
        self._text += chunk
        at = self._searched
        while found := _MARK.search(self._text, at):
            if found[1] != self._marker:
                at = found.end()
                continue
            name, status = found[2].decode("utf-8", "replace"), found[3]
            if status is not None and name == self._name:
                text = bytes(self._text[: found.start()]).decode("utf-8", "replace")
                self._on_section(name, SectionOutput(int(status), text.removesuffix("\n")))
            self._name = name if status is None else None
            del self._text[: found.end()]
            at = 0
        line = self._text.rfind(b"\n", at) + 1 or at
        self._searched = line if len(self._text) - line <= _MARK_LIMIT else len(self._text)
        over = len(self._text) - OUTPUT_LIMIT
        if over > 0:
            del self._text[:over]
            self._searched = max(0, self._searched - over)

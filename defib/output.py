"""What commands print: text, tables and JSON that are safe for a terminal, and times in the configured time zone."""

import json
import re
import shutil
import struct
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, tzinfo
from typing import Any, TextIO
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from fleet.inventory.model import Inventory
from fleet.inventory.units import format_duration
from runtime.terminal import UNSAFE, escape_controls, one_line

GAP = "  "  # between columns
LEAST_WIDTH = 20  # of a column that is cut


def print_text(text: str, file: TextIO | None = None) -> None:
    """Print text, by default to stdout, with all characters escaped that could control a terminal."""
    print(escape_controls(text), file=file, flush=True)


def print_lines(lines: Iterable[str], file: TextIO | None = None) -> None:
    r"""Print each text as one line, with line breaks as `\n`: a name or a reason cannot look like another line."""
    for line in lines:
        print_text(one_line(line), file)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    print(UNSAFE.sub(_escape_in_json, json.dumps(value, ensure_ascii=False)))


def _escape_in_json(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{unit:04x}" for (unit,) in struct.iter_unpack(">H", units))


def terminal_width() -> int | None:
    """Return the width of the terminal that stdout is; None if it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def format_table(rows: Sequence[Sequence[str]], width: int | None = None, *, cut: int = 0) -> str:
    """Return rows with aligned columns, one line for each; within `width`, if given.

    If the lines are too long, texts in the column `cut` are cut first.
    """
    cells = [[_to_cell(text) for text in row] for row in rows]
    widths = [max(map(_width_of, column)) for column in zip(*cells, strict=True)]
    if width is not None and widths:
        excess = max(0, sum(widths) + len(GAP) * (len(widths) - 1) - width)
        widths[cut] = max(widths[cut] - excess, min(widths[cut], LEAST_WIDTH))
    lines = (GAP.join(map(_fit, row, widths)).rstrip() for row in cells)
    return "\n".join(line if width is None else _cut(line, width) for line in lines)


def wrap(text: str, width: int) -> list[str]:
    """Return a text as lines of at most `width` columns, broken at spaces where there are any."""
    lines = []
    while (end := _count_fitting(text, width)) < len(text):
        space = text.rfind(" ", 1, end + 1)
        end = space if space > 0 else end
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text]


def _to_cell(text: str) -> str:
    """Return a text without what would move the text after it: a line break would look like another row."""
    return escape_controls(text).replace("\n", "\\n").replace("\t", "\\t")


def _width_of(text: str) -> int:
    """Return the number of a terminal's columns that a text takes."""
    return len(text) if text.isascii() else sum(map(_width_of_character, text))


def _width_of_character(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):  # over the character before
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fit(text: str, width: int) -> str:
    """Return a text cut or filled up to a width."""
    shown = _cut(text, width)
    return shown + " " * (width - _width_of(shown))


def _cut(text: str, width: int) -> str:
    return text if _width_of(text) <= width else f"{text[: _count_fitting(text, width - 1)]}…"


def _count_fitting(text: str, width: int) -> int:
    """Return how many characters of a text take at most `width` columns."""
    used = 0
    for number, character in enumerate(text):
        used += _width_of_character(character)
        if used > width:
            return number
    return len(text)


def time_zone(inventory: Inventory) -> tzinfo | None:
    """Return the zone of `notify.timezone`; None, for this machine's zone, if the setting is not resolved."""
    try:
        return ZoneInfo(inventory.notify.timezone)
    except (ZoneInfoNotFoundError, ValueError):
        return None


def format_time(time: str | float, zone: tzinfo | None) -> str:
    """Format an RFC 3339 or Unix time as `2026-11-24 18:00:00` in a zone, rounded to seconds."""
    at = datetime.fromtimestamp(time, zone) if isinstance(time, float) else datetime.fromisoformat(time)
    return (at.astimezone(zone) + timedelta(microseconds=500_000)).strftime("%Y-%m-%d %H:%M:%S")


def format_age(since: str | None, at: str) -> str:
    """Return how long before `at` a time in RFC 3339 was, in at most two units, such as `2h5m`; empty without one."""
    if since is None:
        return ""
    seconds = max(0, round((datetime.fromisoformat(at) - datetime.fromisoformat(since)).total_seconds()))
    unit = 3600 if seconds >= 86400 else 60 if seconds >= 3600 else 1  # noqa: PLR2004 - seconds of a day, of an hour
    return format_duration(seconds - seconds % unit)


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 host`, `2 hosts`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_size(inventory: Inventory) -> str:
    """Return the numbers of hosts and services of an inventory, and of upstreams and clients of its gateway, if any."""
    counts = {"host": len(inventory.hosts), "service": len(inventory.services)}
    if upstreams := inventory.gateway.upstreams:
        counts |= {"upstream": len(upstreams), "client": len(inventory.gateway.clients)}
    return ", ".join(format_count(number, name) for name, number in counts.items())


def parenthesized(detail: str) -> str:
    """Return ` (detail)`, or nothing if there is no detail."""
    return f" ({detail})" if detail else ""

"""What commands print: text and JSON that are safe for a terminal, and times in the configured time zone."""

import json
import re
import struct
from datetime import datetime, timedelta, tzinfo
from typing import Any, TextIO
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from fleet.inventory.model import Inventory
from runtime.terminal import UNSAFE, escape_controls


def print_text(text: str, file: TextIO | None = None) -> None:
    """Print text, by default to stdout, with all characters escaped that could control a terminal."""
    print(escape_controls(text), file=file, flush=True)


def one_line(text: str) -> str:
    r"""Return text with line breaks as `\n`, so that it cannot look like the lines of other entries."""
    return text.replace("\r\n", "\n").replace("\n", "\\n")


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    print(UNSAFE.sub(_escape_in_json, json.dumps(value, ensure_ascii=False)))


def _escape_in_json(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{unit:04x}" for (unit,) in struct.iter_unpack(">H", units))


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


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 host`, `2 hosts`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_size(inventory: Inventory) -> str:
    """Return the numbers of hosts and services of an inventory."""
    return f"{format_count(len(inventory.hosts), 'host')}, {format_count(len(inventory.services), 'service')}"


def parenthesized(detail: str) -> str:
    """Return ` (detail)`, or nothing if there is no detail."""
    return f" ({detail})" if detail else ""

"""The `startsAt` values of one alert. Pure.

An alert is identified by its fingerprint. Several Prometheus servers may fire it with a `startsAt` each; it is resolved
when the last of them is.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from remediator.clients.alerts import Status

MAX_STARTS = 20  # of an alert


def normalize_starts_at(starts_at: str) -> str:
    """Return a `startsAt` in the form in which it is compared: webhooks have nanoseconds, the API milliseconds."""
    time = _parse(starts_at)
    return starts_at if time is None else time.isoformat(timespec="milliseconds")


def read_starts(row: Row[Any]) -> Mapping[str, bool]:
    """Return whether an alert fires, by its starts."""
    return row.starts or {normalize_starts_at(row.starts_at): row.status == "firing"}


def add_received_copy(starts: Mapping[str, bool], start: str, status: Status) -> dict[str, bool]:
    """Return the starts after another copy of the alert was received.

    Alertmanager merges the copies of an alert under the earliest start. A copy with an earlier start than all that fire
    therefore replaces them.
    """
    firing = [each for each, fires in starts.items() if fires]
    is_merged = start not in starts and bool(firing) and all(_is_before(start, each) for each in firing)
    return limit_starts({**(dict.fromkeys(starts, False) if is_merged else starts), start: status == "firing"})


def limit_starts(starts: Mapping[str, bool]) -> dict[str, bool]:
    """Return the newest starts, those that fire before others: nobody has so many servers, and each copy reads all."""
    kept = sorted(starts, key=lambda each: starts[each])[-MAX_STARTS:] if len(starts) > MAX_STARTS else list(starts)
    return {each: fires for each, fires in starts.items() if each in kept}


def _is_before(one: str, other: str) -> bool:
    first, second = _parse(one), _parse(other)
    return first is not None and second is not None and first < second


def _parse(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is not None else None

"""Scheduled maintenance: the windows of the inventory at a given time. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

from fleet.inventory.model import Host, Inventory, MaintenanceWindow
from fleet.inventory.units import DAYS

DAY = 86400.0


@dataclass(frozen=True)
class Maintenance:
    """Maintenance that a service or host is in: why, and for how many more seconds.

    With `notify`, notifications in it mention people as usual.
    """

    why: str
    remaining: float
    notify: bool


def find_window(inventory: Inventory, service: str, host: Host | None, unix: float) -> Maintenance | None:
    """Return the scheduled maintenance that a service, or a host if `service` is empty, is in at a Unix time."""
    windows = inventory.remediation.maintenance
    if not windows:
        return None
    return find_window_at(windows, service, host, datetime.fromtimestamp(unix, ZoneInfo(inventory.notify.timezone)))


def find_window_at(
    windows: Sequence[MaintenanceWindow], service: str, host: Host | None, at: datetime
) -> Maintenance | None:
    """As `find_window`, at a local time of the fleet's time zone."""
    names = {"service": service, "host": host.name if host else "", "group": host.group if host else ""}
    for window in windows:
        if window.options == names[window.kind] and _is_open(window, at):
            reason = f": {window.reason}" if window.reason else ""
            why = f"{window.kind} {window.options}, {window.from_} to {window.to}{reason}"
            return Maintenance(why, _remaining(window, at), window.notify)
    return None


def find_intervals(
    window: MaintenanceWindow, start: float, end: float, zone: ZoneInfo
) -> Iterator[tuple[float, float]]:
    """Yield the intervals between two Unix times in which a window is open."""
    date, last = (datetime.fromtimestamp(at, zone).date() for at in (start - DAY, end))
    begins, ends = time.fromisoformat(window.from_), time.fromisoformat(window.to)
    while date <= last:
        if DAYS[date.weekday()] in window.days:
            until = date if ends > begins else date + timedelta(days=1)
            opens = max(start, datetime.combine(date, begins, zone).timestamp())
            closes = min(end, datetime.combine(until, ends, zone).timestamp())
            if opens < closes:
                yield opens, closes
        date += timedelta(days=1)


def _remaining(window: MaintenanceWindow, at: datetime) -> float:
    """Return the seconds until an open window ends."""
    hour, minute = map(int, window.to.split(":"))
    ends = at.replace(hour=hour, minute=minute, second=0, microsecond=0, fold=0)
    if f"{at:%H:%M}" >= window.to:
        ends += timedelta(days=1)
    return ends.timestamp() - at.timestamp()


def _is_open(window: MaintenanceWindow, at: datetime) -> bool:
    now, begins, ends = f"{at:%H:%M}", window.from_, window.to
    if begins < ends:
        return _includes_day(window.days, at) and begins <= now < ends
    # Over midnight: it ends on the day after the one that it is listed for.
    begun_today = _includes_day(window.days, at) and now >= begins
    begun_yesterday = _includes_day(window.days, at - timedelta(days=1)) and now < ends
    return begun_today or begun_yesterday


def _includes_day(days: Iterable[str], at: datetime) -> bool:
    return DAYS[at.weekday()] in days

"""The record's clock, which does not jump when the system time is set, and continues over restarts.

Back-offs, budgets and windows use it. Times are shown in system time as it is now, so that a corrected system time also
corrects the times of earlier events.
"""

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, insert, select, update

from remediator.record.schema import clock

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def seconds_since_boot() -> float:
    """Return the seconds since the machine was started, including suspended time."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """Return the ID of the machine's current boot; empty if it has none, and then every start counts as a reboot."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class SteadyClock:
    """A monotonic clock in seconds, which was set to Unix time when the record was created."""

    def __init__(
        self,
        offset: float,
        running: Callable[[], float] = seconds_since_boot,
        calendar: Callable[[], float] = time.time,
    ) -> None:
        self._offset, self._running, self._calendar = offset, running, calendar

    def now(self) -> float:
        return self._running() + self._offset

    def unix(self, at: float) -> float:
        """Convert a time of this clock to Unix time, by the system time as it is now."""
        return self._calendar() - (self.now() - at)

    def from_unix(self, unix: float) -> float:
        """Convert Unix time to a time of this clock, by the system time as it is now."""
        now = self.now()
        return now - (self.unix(now) - unix)


def resume_clock(connection: Connection, boot: str, running: float, calendar: float) -> float:
    """Return the offset with which the clock continues; it never goes back.

    After a reboot, only the system time shows how long the machine was off.
    """
    stored = connection.execute(select(clock)).first()
    if stored is None:
        connection.execute(insert(clock).values(id=1, boot=boot, running=running, calendar=calendar, steady=calendar))
        return calendar - running
    if boot and stored.boot == boot:
        return float(stored.steady - stored.running)
    steady = float(stored.steady + max(0.0, calendar - stored.calendar))
    connection.execute(update(clock).values(boot=boot, running=running, calendar=calendar, steady=steady))
    return steady - running


def store_clock(connection: Connection, now: float, running: float, calendar: float) -> None:
    """Store the time, for after the next reboot."""
    connection.execute(update(clock).values(running=running, calendar=calendar, steady=now))

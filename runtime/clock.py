"""A clock that does not jump when the system time is set, and that a program can continue after a restart.

Times are shown in system time as it is now, so that a corrected system time also corrects the times of earlier events.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    """A monotonic clock in seconds, which was set to Unix time when it was first started."""

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


@dataclass(frozen=True)
class StoredClock:
    """A time of a steady clock, as a program stores it: `boot` is the ID of the boot in which `running` was read."""

    boot: str
    running: float
    calendar: float
    steady: float

    def compute_offset(self, boot: str, running: float, calendar: float) -> float:
        """Return the offset with which the clock continues; it never goes back.

        After a reboot, only the system time shows how long the machine was off.
        """
        if boot and self.boot == boot:
            return self.steady - self.running
        return self.steady + max(0.0, calendar - self.calendar) - running

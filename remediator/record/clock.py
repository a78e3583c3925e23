"""The record's clock: it runs on through every change of the calendar's, and through our own restarts.

Back-offs, budgets and windows are reckoned by it. People are told the calendar's time of what happened, as it is
reckoned back from now, so that a clock that was set right sets right what was recorded before, too.
"""

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, insert, select, update

from remediator.record.schema import clock

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def since_boot() -> float:
    """Seconds since the machine was started, suspended ones included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """What names this run of the machine; without one, every start of ours counts as a start of the machine's."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class SteadyClock:
    """Seconds that nobody can set. They began as Unix time, when the record was made."""

    def __init__(
        self, offset: float, running: Callable[[], float] = since_boot, calendar: Callable[[], float] = time.time
    ) -> None:
        self._offset, self._running, self._calendar = offset, running, calendar

    def now(self) -> float:
        return self._running() + self._offset

    def unix(self, at: float) -> float:
        """The Unix time of what happened at `at`, by the calendar's clock as it is now."""
        return self._calendar() - (self.now() - at)


def take_up(connection: Connection, boot: str, running: float, calendar: float) -> float:
    """The offset with which the record's clock goes on where it was; it never goes back.

    While the machine was off, only the calendar's clock can say how long that was.
    """
    kept = connection.execute(select(clock)).first()
    if kept is None:
        connection.execute(insert(clock).values(id=1, boot=boot, running=running, calendar=calendar, steady=calendar))
        return calendar - running
    if boot and kept.boot == boot:
        return float(kept.steady - kept.running)
    steady = float(kept.steady + max(0.0, calendar - kept.calendar))
    connection.execute(update(clock).values(boot=boot, running=running, calendar=calendar, steady=steady))
    return steady - running


def keep(connection: Connection, now: float, running: float, calendar: float) -> None:
    """Keep how late it is, for after the machine's next start."""
    connection.execute(update(clock).values(running=running, calendar=calendar, steady=now))

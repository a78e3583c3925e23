"""The record's clock, which continues over restarts. Back-offs, budgets and windows use it."""

from sqlalchemy import Connection, insert, select, update

from remediator.record.schema import clock
from runtime.clock import StoredClock


def resume_clock(connection: Connection, boot: str, running: float, calendar: float) -> float:
    """Return the offset with which the clock continues."""
    row = connection.execute(select(clock)).first()
    if row is None:
        connection.execute(insert(clock).values(id=1, boot=boot, running=running, calendar=calendar, steady=calendar))
        return calendar - running
    stored = StoredClock(row.boot, row.running, row.calendar, row.steady)
    offset = stored.compute_offset(boot, running, calendar)
    if not boot or boot != stored.boot:
        connection.execute(update(clock).values(boot=boot, running=running, calendar=calendar, steady=running + offset))
    return offset


def store_clock(connection: Connection, now: float, running: float, calendar: float) -> None:
    """Store the time, for after the next reboot."""
    connection.execute(update(clock).values(running=running, calendar=calendar, steady=now))

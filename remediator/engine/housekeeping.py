"""What is to be done now and then: watch the Watchdog, remind people, keep the clock, forget what is old."""

import asyncio
from collections.abc import Callable

import structlog
from sqlalchemy import Connection, and_, delete, or_, select

from fleet.inventory.model import Inventory
from fleet.inventory.notify import Notify
from remediator.incidents import resolution
from remediator.notifications import escalation, outbox
from remediator.record import stops, switches, timestamps
from remediator.record.database import Database, StorageError
from remediator.record.schema import (
    actions,
    alerts,
    evidence,
    incidents,
    maintenance,
    notices,
    presses,
    sends,
    timeline,
)

EVERY = 5.0
KEEP_TIME_EVERY = 60.0
FORGET_EVERY = 3600.0
AT_ONCE = 500  # incidents, alerts or notices that one transaction forgets
MISSING = {"alertname": "WatchdogMissing", "severity": "critical"}
log = structlog.get_logger()


async def keep_house(database: Database, inventory: Callable[[], Inventory], told: Callable[[], None]) -> None:
    """Do it until cancelled; `told` is called when there is something to send."""
    started = database.clock.now()
    kept = forgot = float("-inf")
    while True:
        now = database.clock.now()
        known = inventory()
        try:
            if await database.run(_look_after, known, started, now):
                told()
            if now - kept >= KEEP_TIME_EVERY:
                await database.keep_time()
                kept = now
            if now - forgot >= FORGET_EVERY:
                await _forget_all(database, now - known.remediator.retention)
                await database.run(stops.forget, known.services, now - known.remediator.retention)
                forgot = now
        except StorageError as error:
            log.warning("housekeeping is put off", error=str(error))
        await asyncio.sleep(EVERY)


def _look_after(connection: Connection, inventory: Inventory, started: float, now: float) -> bool:
    notify, automatic = inventory.notify, inventory.remediation.automatic
    watched = watch(connection, notify, inventory.remediator.watchdog, started, now)
    told_again = escalation.look_after(connection, notify, now)
    return switches.remind(connection, notify, now, automatic=automatic) or watched or told_again


def watch(connection: Connection, notify: Notify, within: float, started: float, now: float) -> bool:
    """Tell people, once, when the Watchdog has ended or not come `within` seconds, and when it comes again."""
    if not within:
        return False
    seen = timestamps.get(connection, "watchdog")
    missed = timestamps.get(connection, "watchdog-missed")
    # While we did not run, it could not come.
    last = max(seen.at if seen is not None else started, started)
    if now - last >= within or (seen is not None and resolution.watchdog_is_over(connection)):
        if missed is None:
            timestamps.put(connection, "watchdog-missed", now)
            content = {"since": seen.at} if seen is not None else {}
            outbox.tell(connection, notify, "watchdog_missing", f"watchdog missing {now}", MISSING, content, now)
            log.error("the Watchdog does not come: Prometheus, Alertmanager or the way here is broken")
            return True
    elif missed is not None and seen is not None and seen.at > missed.at:
        timestamps.remove(connection, "watchdog-missed")
        content = {"opened_at": missed.at, "closed_at": now}
        outbox.tell(connection, notify, "watchdog_back", f"watchdog back {now}", MISSING, content, now)
        log.info("the Watchdog comes again")
        return True
    return False


async def _forget_all(database: Database, before: float) -> None:
    """A little at a time, since what is to be done now comes first."""
    while forgotten := await database.run(forget, before):
        log.info("forgotten", rows=forgotten)
        await asyncio.sleep(0)


def forget(connection: Connection, before: float) -> int:
    """Delete some of what ended before a time, with all that belongs to it; how many rows of the record that were."""
    gone = connection.scalars(
        select(incidents.c.id).where(incidents.c.closed_at < before).order_by(incidents.c.id).limit(AT_ONCE)
    ).all()
    of_gone = or_(actions.c.incident_id.in_(gone), actions.c.incident_id.is_(None) & (actions.c.ended_at < before))
    acted = connection.scalars(select(actions.c.id).where(of_gone).limit(AT_ONCE * 10)).all()
    # Those of what still goes on are what its end is told by.
    lasting = select(incidents.c.id).where(incidents.c.state == "open")
    firing = select(alerts.c.id).where(alerts.c.status == "firing")
    over = and_(
        or_(notices.c.incident_id.is_(None), notices.c.incident_id.not_in(lasting)),
        or_(notices.c.alert_id.is_(None), notices.c.alert_id.not_in(firing)),
    )
    told = connection.scalars(
        select(notices.c.id)
        .where(or_(notices.c.incident_id.in_(gone), notices.c.ended_at < before), notices.c.state != "pending", over)
        .limit(AT_ONCE * 10)
    ).all()
    counts = [
        connection.execute(delete(evidence).where(evidence.c.action_id.in_(acted))).rowcount,
        connection.execute(delete(actions).where(actions.c.id.in_(acted))).rowcount,
        connection.execute(delete(timeline).where(timeline.c.incident_id.in_(gone))).rowcount,
        connection.execute(delete(sends).where(sends.c.notice_id.in_(told))).rowcount,
        connection.execute(delete(notices).where(notices.c.id.in_(told))).rowcount,
        connection.execute(
            delete(alerts).where(
                # Its number may be given to another: what refers to it goes first.
                alerts.c.id.not_in(select(notices.c.alert_id).where(notices.c.alert_id.is_not(None))),
                alerts.c.status == "resolved",
                or_(alerts.c.incident_id.in_(gone), alerts.c.incident_id.is_(None) & (alerts.c.last_seen < before)),
            )
        ).rowcount,
        connection.execute(delete(maintenance).where(maintenance.c.until < before)).rowcount,
        connection.execute(delete(presses).where(presses.c.at < before)).rowcount,
    ]
    # What still refers to an incident, such as a notice that was never sent, keeps it.
    referring = [
        select(table.c.incident_id).where(table.c.incident_id.in_(gone)) for table in (actions, alerts, notices)
    ]
    kept = {row for query in referring for row in connection.scalars(query)}
    counts.append(connection.execute(delete(incidents).where(incidents.c.id.in_(set(gone) - kept))).rowcount)
    return sum(counts)

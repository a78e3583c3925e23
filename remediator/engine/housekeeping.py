"""Periodic work: reminders, escalation, the record's clock and retention."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from remediator.engine import reminders
from remediator.notifications import escalation
from remediator.record import audit, events, retention, stops
from remediator.record.database import Database, StorageError
from remediator.record.transaction import Transaction

EVERY = 5.0
STORE_TIME_EVERY = 60.0
DELETE_EVERY = 3600.0
log = structlog.get_logger()


async def run_housekeeping(
    database: Database, notified: Callable[[], None], store_token_uses: Callable[[], Awaitable[None]]
) -> None:
    """Run until cancelled; call `notified` when a notification was added."""
    started = database.clock.now()
    stored = deleted = float("-inf")
    while True:
        now = database.clock.now()
        try:
            if await database.write(_notify, started):
                notified()
            if now - stored >= STORE_TIME_EVERY:
                await database.store_time()
                await store_token_uses()
                stored = now
            if now - deleted >= DELETE_EVERY:
                await _delete_old(database, now - database.inventory.remediator.retention)
                deleted = now
        except StorageError as error:
            log.warning("housekeeping_failed", error=str(error))
        await asyncio.sleep(EVERY)


def _notify(tx: Transaction, started: float) -> bool:
    """Add the notifications that are due; returns whether there were any."""
    added = [
        reminders.check_watchdog(tx, tx.inventory.remediator.watchdog, started),
        escalation.add_escalations_and_reminders(tx),
        reminders.remind_automation_off(tx),
    ]
    return any(added)


async def _delete_old(database: Database, before: float) -> None:
    """Delete in small transactions, so that other writers do not wait."""
    while rows := await database.write(retention.delete_before, before):
        log.info("old_rows_deleted", rows=rows)
        await asyncio.sleep(0)
    settings = database.inventory.access.audit
    while rows := await database.write(
        audit.delete_old, database.clock.now() - settings.retention, settings.max_entries
    ):
        log.info("old_audit_entries_deleted", rows=rows)
        await asyncio.sleep(0)
    limits = database.inventory.remediator.events
    while rows := await database.write(events.delete_old, database.clock.now() - limits.retention, limits.max_entries):
        log.info("old_events_deleted", rows=rows)
        await asyncio.sleep(0)
    await database.write(stops.delete_removed, database.inventory.services, before)

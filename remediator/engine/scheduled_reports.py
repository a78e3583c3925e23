"""Send reports at the times of `notify.reports`, each once, also over restarts."""

import asyncio
from collections.abc import Callable
from typing import Any
from zoneinfo import ZoneInfo

import structlog

from fleet.inventory.report_times import DueReport
from remediator.record import notifications, timestamps
from remediator.record.database import Database, StorageError
from remediator.record.transaction import Transaction
from remediator.reports.description import summarize
from remediator.reports.report import Report
from remediator.reports.reporter import Reporter

EVERY = 10.0
SEND_WITHIN = 12 * 3600.0  # seconds after it was due; the next one is near then
log = structlog.get_logger()


async def run_scheduled_reports(database: Database, reporter: Reporter, notified: Callable[[], None]) -> None:
    """Run until cancelled; call `notified` when a notification was added."""
    while True:
        try:
            await send_due_reports(database, reporter, notified)
        except StorageError as error:
            log.warning("reports_failed", error=str(error))
        except Exception:  # the next round may succeed
            log.exception("reports_failed")
        await asyncio.sleep(EVERY)


async def send_due_reports(database: Database, reporter: Reporter, notified: Callable[[], None]) -> None:
    """Add the notifications of the reports that are due. Raises StorageError."""
    longest = database.inventory.remediator.retention
    for due, is_sent in await database.read(find_due_reports):
        if not is_sent:
            await database.write(record_report, due)
            continue
        report = await reporter.report(max(due.start, due.end - longest), due.end)
        if await database.write(add_report, due, report):
            log.info("report_added", report=due.name, date=due.date)
            notified()


def find_due_reports(tx: Transaction) -> list[tuple[DueReport, bool]]:
    """Return the reports that were not recorded yet, and whether each is to be sent.

    The first one, also after its time was changed, and one that is too late, are only recorded.
    """
    settings, now = tx.inventory.notify.reports, tx.clock.unix(tx.now)
    if settings is None:
        return []
    recorded, found = _read_recorded(tx), []
    for due in settings.find_due(now, ZoneInfo(tx.inventory.notify.timezone)):
        known = recorded.get(due.name)
        if known is None or known["time"] != due.time:
            found.append((due, False))
        elif known["end"] < due.end:
            is_late = now - due.end > SEND_WITHIN
            if is_late:
                log.warning("report_too_late", report=due.name, date=due.date)
            found.append((due, not is_late))
    return found


def add_report(tx: Transaction, due: DueReport, report: Report) -> int:
    """Add the notifications of a report, and record it; returns how many were added."""
    record_report(tx, due)
    times = {"since": tx.clock.from_unix(report.start), "until": tx.clock.from_unix(report.end)}
    content = {"report": {"name": due.name, **summarize(report)}, **times}
    channels = tx.inventory.notify.report_channels()
    return notifications.add(tx, channels, "report", f"report {due.name} {due.date}", {}, content)


def record_report(tx: Transaction, due: DueReport) -> None:
    """Record that a report was sent, or needs to be sent no more."""
    timestamps.put(tx, "reports", tx.now, **{**_read_recorded(tx), due.name: {"time": due.time, "end": due.end}})


def _read_recorded(tx: Transaction) -> dict[str, dict[str, Any]]:
    stored = timestamps.get(tx, "reports")
    return dict(stored.detail) if stored is not None else {}

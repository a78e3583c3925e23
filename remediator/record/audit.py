"""The audit log: entries are added and, by age and number, deleted; they are never changed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import delete, func, insert, select

from remediator.record.database import Database, StorageError
from remediator.record.schema import actions, audit
from remediator.record.transaction import Transaction
from runtime.access.audit import AuditEntry, Outcome, write_to_log
from runtime.access.roles import Identity
from runtime.errors import DefibError
from runtime.redaction import Redactor

READING = ("status", "logs", "read ping URL")  # operations that change nothing
BATCH = 5000  # entries deleted by one transaction
log = structlog.get_logger()


class AuditLog:
    """Writes entries in transactions of their own; those of a change are added by the transaction that makes it."""

    def __init__(self, database: Database, redact: Redactor) -> None:
        self._database, self._redact = database, redact

    def mask(self, entry: AuditEntry) -> AuditEntry:
        """Return an entry without secrets."""
        return replace(entry, target=self._redact(entry.target), detail=self._redact(entry.detail))

    async def write(self, entry: AuditEntry) -> None:
        """Store an entry. With a full disk, it is in the program's log only."""
        entry = self.mask(entry)
        try:
            await self._database.write_with_priority(add, entry)
        except StorageError as error:
            log.warning("audit_entry_not_stored", error=str(error))
            await write_to_log(entry)

    @asynccontextmanager
    async def recording_refusal(self, by: Identity, event: str, target: str, detail: str = "") -> AsyncIterator[None]:
        """Store an entry if the operation is refused, or fails: if the block raises an error.

        The error follows `detail` in the entry.
        """
        before = f"{detail}; " if detail else ""
        try:
            yield
        except DefibError as error:
            outcome: Outcome = "failed" if error.retryable else "refused"
            await self.write(AuditEntry.of(by, event, target, outcome=outcome, detail=f"{before}{error}"))
            raise
        except Exception as error:
            await self.write(AuditEntry.of(by, event, target, outcome="failed", detail=before + type(error).__name__))
            raise


def add(tx: Transaction, entry: AuditEntry) -> None:
    row = {
        "at": tx.now if entry.at is None else entry.at,
        "event": entry.event,
        "name": entry.name[:200],
        "verified": int(entry.verified),
        "means": entry.means,
        "address": entry.address[:100],
        "target": entry.target[:200],
        "outcome": entry.outcome,
        "detail": entry.detail[:1000],
        "count": entry.count,
        "action_id": entry.action,
    }
    tx.execute(insert(audit).values(**row))


def page(tx: Transaction, before: int | None, limit: int) -> list[dict[str, Any]]:
    """Return the newest entries, or the newest before an id; `action_state` is the present state of its action."""
    query = (
        select(audit, actions.c.state.label("action_state"))
        .join(actions, audit.c.action_id == actions.c.id, isouter=True)
        .order_by(audit.c.id.desc())
        .limit(limit)
    )
    rows = tx.execute(query if before is None else query.where(audit.c.id < before)).mappings()
    return [{**row, "verified": bool(row["verified"])} for row in rows]


def delete_old(tx: Transaction, before: float, max_entries: int) -> int:
    """Delete a batch of entries that are older than `before`, or too many; returns their number, 0 when none is left.

    Refused requests, reading and changes may each fill a third of the log, and a name with more than a tenth of a third
    loses its own entries first: nobody can remove the record of what others did.
    """
    refused, reading = audit.c.outcome == "refused", audit.c.event.in_(READING)
    deleted = tx.execute(
        delete(audit).where(audit.c.id.in_(select(audit.c.id).where(audit.c.at < before).limit(BATCH)))
    ).rowcount
    for condition in (refused, reading & ~refused, ~reading & ~refused):
        excess = (tx.scalar(select(func.count()).select_from(audit).where(condition)) or 0) - max_entries // 3
        if excess > 0:
            share = max_entries // 30
            entries = func.count().label("entries")
            counts = tx.execute(select(audit.c.name, entries).where(condition).group_by(audit.c.name))
            most = max(counts, key=lambda row: row.entries)
            oldest = select(audit.c.id).where(condition).order_by(audit.c.id).limit(min(excess, BATCH))
            if most.entries > share:  # nobody can remove the entries of others by many of their own
                oldest = oldest.where(audit.c.name == most.name).limit(min(excess, BATCH, most.entries - share))
            deleted += tx.execute(delete(audit).where(audit.c.id.in_(oldest))).rowcount
    return deleted

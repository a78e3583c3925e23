"""The audit log: entries are added and, by age and number, deleted; they are never changed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from sqlalchemy import delete, func, insert, select

from remediator.record.database import Database, StorageError
from remediator.record.schema import actions, audit
from remediator.record.transaction import Transaction
from runtime.access.audit import AuditEntry
from runtime.access.roles import Identity
from runtime.errors import DefibError

BATCH = 5000  # entries deleted by one transaction
log = structlog.get_logger()


class AuditLog:
    """Writes entries in transactions of their own; those of a change are added by the transaction that makes it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, entry: AuditEntry) -> None:
        """Store an entry. With a full disk, it is in the program's log only."""
        try:
            await self._database.write_with_priority(add, entry)
        except StorageError as error:
            log.warning("audit_entry_not_stored", error=str(error), entry=entry)

    @asynccontextmanager
    async def recording_refusal(self, by: Identity, event: str, target: str) -> AsyncIterator[None]:
        """Store an entry if the operation is refused: if the block raises a DefibError."""
        try:
            yield
        except DefibError as error:
            await self.write(AuditEntry.of(by, event, target, outcome="refused", detail=str(error)))
            raise


def add(tx: Transaction, entry: AuditEntry) -> None:
    row = {
        "at": tx.now, "event": entry.event, "name": entry.name, "verified": int(entry.verified), "means": entry.means,
        "address": entry.address, "target": entry.target, "outcome": entry.outcome, "detail": entry.detail[:1000],
        "count": entry.count, "action_id": entry.action,
    }  # fmt: skip
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

    Refused requests may fill half of the log: whoever sends them cannot remove the record of anything else.
    """
    refused = audit.c.outcome == "refused"
    deleted = tx.execute(
        delete(audit).where(audit.c.id.in_(select(audit.c.id).where(audit.c.at < before).limit(BATCH)))
    ).rowcount
    for condition, limit in ((refused, max_entries // 2), (~refused, max_entries // 2)):
        excess = (tx.scalar(select(func.count()).select_from(audit).where(condition)) or 0) - limit
        if excess > 0:
            oldest = select(audit.c.id).where(condition).order_by(audit.c.id).limit(min(excess, BATCH))
            deleted += tx.execute(delete(audit).where(audit.c.id.in_(oldest))).rowcount
    return deleted

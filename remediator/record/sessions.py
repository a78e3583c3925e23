"""Sessions in the record, which outlast a restart. They are held in memory: see `runtime.access.sessions.Sessions`."""

from collections.abc import Iterable
from dataclasses import asdict

import structlog
from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert

from remediator.record.database import Database, StorageError
from remediator.record.schema import sessions
from remediator.record.transaction import Transaction
from runtime.access.sessions import Session

log = structlog.get_logger()


class StoredSessions:
    """A `runtime.access.sessions.SessionStorage`: with a full disk, people can still sign in."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ended: set[str] = set()  # digests of sessions that are not deleted yet

    async def load(self) -> list[Session]:
        """Return the stored sessions. Raises StorageError."""
        return await self._database.read(_read_all)

    async def save(self, session: Session) -> None:
        try:
            await self._database.write_with_priority(_save, session)
            await self._delete_ended()
        except StorageError as error:
            log.warning("session_not_stored", error=str(error), effect="it ends with this process")

    async def delete(self, digests: Iterable[str]) -> None:
        self._ended.update(digests)
        try:
            await self._delete_ended()
        except StorageError as error:
            log.warning("session_not_deleted", error=str(error), effect="it is back if the process ends now")

    async def _delete_ended(self) -> None:
        if ended := set(self._ended):
            await self._database.write_with_priority(_delete, list(ended))
            self._ended -= ended


def _read_all(tx: Transaction) -> list[Session]:
    rows = tx.execute(select(sessions)).mappings()
    return [Session(**{**row, "groups": tuple(row["groups"])}) for row in rows]


def _save(tx: Transaction, session: Session) -> None:
    row = {**asdict(session), "groups": list(session.groups)}
    tx.execute(insert(sessions).values(**row).on_conflict_do_update(index_elements=["digest"], set_=row))


def _delete(tx: Transaction, digests: list[str]) -> None:
    tx.execute(delete(sessions).where(sessions.c.digest.in_(digests)))

"""The record's database: one owner, one thread, durable transactions."""

import asyncio
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, DBAPIError

from fleet.inventory.model import Inventory
from remediator.record import clock
from remediator.record.clock import SteadyClock
from remediator.record.transaction import Transaction
from runtime.errors import DefibError, StartError

P = ParamSpec("P")
T = TypeVar("T")
WAITING_WRITERS = 2  # in the writer's queue: what is urgent waits for no more than these
READERS = 2
MIGRATIONS = Path(__file__).parent / "migrations"
_MEND = (
    "nothing was changed. Move what there is of it away, {path}-wal and {path}-shm too; then put a backup in its place,"
    " or move {path}.lock away as well to begin an empty record: then no one knows any more what was tried, nor which"
    " incidents were open"
)
_ROOM = "it is as it was. Look at the room on its disk and at who may write there, and start again"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class StorageError(DefibError):
    """The database did not take it: nothing was stored."""

    retryable = True


class Database:
    """Runs functions of a transaction off the event loop: writers one after another, readers beside them.

    `inventory` is the one in force, which a reload replaces. One process owns the file; a second one that opens it is
    refused.
    """

    def __init__(self, url: str, inventory: Inventory, calendar: Callable[[], float] = time.time) -> None:
        path = Path(url.removeprefix("sqlite:///"))
        self.inventory = inventory
        self._lock = _lock_existing(path)
        self._waiting = asyncio.Semaphore(WAITING_WRITERS)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="record writer")
        self._readers = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="record reader")
        self._write_engine = _engine(url, _configure_writer, "BEGIN IMMEDIATE")
        self._read_engine = _engine(f"sqlite:///file:{quote(str(path))}?mode=ro&uri=true", _configure_reader, "BEGIN")
        try:
            self.clock = self._writer.submit(self._open, calendar).result()
        except DBAPIError as error:
            self._release()
            code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            mend = _MEND.format(path=path) if code in _DAMAGED else _ROOM
            raise StartError(f"the database {path} cannot be used: {error.orig}; {mend}") from error
        except CommandError as error:
            self._release()
            raise StartError(f"the database {path} was written by another version of Defib: {error}") from error
        mark_begun(self._lock)
        self._path, self._file = path, _file_at(path)

    async def write(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in one transaction, which is durable when this returns. Raises StorageError."""
        async with self._waiting:
            return await self.write_first(work, *args, **kwargs)

    async def write_first(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `write`, ahead of its queue: webhooks and actions come before decisions. Raises StorageError."""
        return await self._run(self._writer, self._write_engine, work, *args, **kwargs)

    async def read(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` on a read-only connection, without waiting for writers. Raises StorageError."""
        return await self._run(self._readers, self._read_engine, work, *args, **kwargs)

    async def _run(
        self,
        threads: ThreadPoolExecutor,
        engine: Engine,
        work: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        def transaction() -> T:
            if (lost := self.lost()) is not None:
                raise StorageError(lost)
            with engine.begin() as connection:
                return work(Transaction(connection, self.clock, self.clock.now(), self.inventory), *args, **kwargs)

        try:
            # The thread finishes the transaction even if the caller is cancelled.
            return await asyncio.get_running_loop().run_in_executor(threads, transaction)
        except DBAPIError as error:
            raise StorageError(f"the database refused: {error.orig}") from error

    def lost(self) -> str | None:
        """Return what is wrong if the file that was opened is no longer at its path, since writes would be lost."""
        found = _file_at(self._path)
        if found == self._file:
            return None
        how = "deleted" if found is None else "replaced"
        return (
            f"the database {self._path} was {how} while the remediator is running: it accepts no alerts and takes no"
            " actions;"
            " stop the remediator, restore a backup (defib restore) and start it again"
        )

    async def store_time(self) -> None:
        """Keep how late it is. Raises StorageError."""
        await self.write(_store_time)

    def close(self) -> None:
        self._readers.shutdown()
        self._read_engine.dispose()
        self._writer.submit(self._write_engine.dispose).result()
        self._release()

    def _release(self) -> None:
        self._readers.shutdown()
        self._writer.shutdown()
        os.close(self._lock)

    def _open(self, calendar: Callable[[], float]) -> SteadyClock:
        """See that the file is whole, bring it up to date, and take up its clock."""
        with self._write_engine.begin() as connection:
            said = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if said != "ok":
                raise DatabaseError("PRAGMA quick_check", None, ValueError(str(said)))
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self._write_engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            offset = clock.resume(connection, clock.boot_id(), clock.since_boot(), calendar())
        return SteadyClock(offset, calendar=calendar)


def _store_time(tx: Transaction) -> None:
    clock.store(tx.connection, tx.now, clock.since_boot(), time.time())


def _file_at(path: Path) -> tuple[int, int] | None:
    """The device and the inode of a file, None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _lock_existing(path: Path) -> int:
    """Lock the database; what its lock's file holds tells whether there must be one. Raises StartError."""
    used = Path(f"{path}.lock")
    if used.is_file() and used.stat().st_size and not (path.is_file() and path.stat().st_size):
        raise StartError(f"the database {path} is {'empty' if path.is_file() else 'gone'}; {_MEND.format(path=path)}")
    return lock(path)


def mark_begun(held: int) -> None:
    """Note in a lock's file that there is a record from now on."""
    os.pwrite(held, b"the record was begun\n", 0)


def lock(path: Path) -> int:
    """Own the database at `path`, there or not, until what is returned is closed. Raises StartError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # It holds what hosts and commands said; SQLite's other files take its mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        held = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"the database {path} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise StartError(f"another remediator uses the database {path}") from None
    return held


def _engine(url: str, configure: Callable[[Any, Any], None], begin: str) -> Engine:
    engine = create_engine(url, connect_args={"check_same_thread": False})
    event.listen(engine, "connect", configure)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def _configure_writer(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # Python's sqlite3 would begin the transaction too late
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _configure_reader(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    for pragma in ("query_only=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")

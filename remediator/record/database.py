"""The record's database: an SQLite file with one owner, one writing thread and read-only connections for readers."""

import asyncio
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, DBAPIError

from fleet.inventory.model import Inventory
from remediator.record import clock
from remediator.record.arrivals import Arrivals, NewArrivals
from remediator.record.transaction import Transaction
from remediator.record.workers import TransactionWorkers, begin
from runtime.clock import SteadyClock, boot_id, seconds_since_boot
from runtime.errors import DefibError, StartError

P = ParamSpec("P")
T = TypeVar("T")
WAITING_WRITERS = 8  # in the writer's queue, so that `write_with_priority` waits for no more than these
READERS = 2
PAGE_READS = 2  # in the readers' queue, so that decisions wait for no more than these
READS_TOGETHER = 4  # in one transaction: a slow one delays the others
MIN_SQLITE = (3, 35)  # drops columns
MIGRATIONS = Path(__file__).parent / "migrations"
_RESTORE_HINT = (
    "nothing was changed. Restore a backup with `defib restore`, which keeps the present files under another name. To"
    " start with an empty database instead, move {path}, {path}-wal, {path}-shm and {path}.lock away; earlier attempts"
    " and open incidents are then lost"
)
_DISK_HINT = "nothing was changed. Check the free space and the permissions, then start again"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class StorageError(DefibError):
    """The database cannot be read or written; nothing was stored."""

    retryable = True


class Database:
    """Runs functions of a transaction off the event loop: writers one after another, readers beside them.

    `inventory` is the one in force, which a reload replaces. One process owns the file; another one cannot open it.
    """

    def __init__(self, url: str, inventory: Inventory, calendar: Callable[[], float] = time.time) -> None:
        path = Path(url.removeprefix("sqlite:///"))
        if sqlite3.sqlite_version_info < MIN_SQLITE:
            wanted = ".".join(map(str, MIN_SQLITE))
            raise StartError(f"SQLite {wanted} or newer is required; this Python has {sqlite3.sqlite_version}")
        self.inventory = inventory
        self.arrivals = Arrivals()
        self._lock = _lock_existing(path)
        self._waiting, self._page_reads = asyncio.Semaphore(WAITING_WRITERS), asyncio.Semaphore(PAGE_READS)
        self._write_engine = _engine(url, _configure_writer)
        self._read_engine = _engine(f"sqlite:///file:{quote(str(path))}?mode=ro&uri=true", _configure_reader)
        turn = threading.Lock()
        self._writer = TransactionWorkers(self._write_engine, "BEGIN IMMEDIATE", "record writer", turn)
        self._readers = TransactionWorkers(
            self._read_engine, "BEGIN", "record reader", turn, threads=READERS, group_limit=READS_TOGETHER
        )
        try:
            self.clock: SteadyClock = self._writer.run_blocking(lambda: self._open(calendar))
        except DBAPIError as error:
            self._release()
            code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            hint = _RESTORE_HINT.format(path=path) if code in _DAMAGED else _DISK_HINT
            raise StartError(f"cannot open the database {path}: {error.orig}; {hint}") from error
        except CommandError as error:
            self._release()
            message = f"the database {path} was written by a newer version of Defib, install that version: {error}"
            raise StartError(message) from error
        mark_created(self._lock)
        self._path, self._file = path, _file_at(path)

    async def write(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in one transaction, which is durable when this returns. Raises StorageError."""
        async with self._waiting:
            return await self.write_with_priority(work, *args, **kwargs)

    async def write_with_priority(
        self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `write`, ahead of its queue: webhooks and actions come before decisions. Raises StorageError."""
        return await self._run(self._writer, work, *args, **kwargs)

    async def read(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` on a read-only connection, without waiting for writers. Raises StorageError."""
        return await self._run(self._readers, work, *args, **kwargs)

    async def read_for_page(
        self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `read`, behind the reads of decisions, for what people and programs look at. Raises StorageError."""
        async with self._page_reads:
            return await self.read(work, *args, **kwargs)

    async def _run(
        self,
        workers: TransactionWorkers,
        work: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        tx: Transaction | None = None  # of the last execution

        def execute(connection: Connection) -> T:
            if (problem := self.describe_lost_file()) is not None:
                raise StorageError(problem)
            nonlocal tx
            now = self.clock.now()
            tx = Transaction(connection, self.clock, now, self.inventory, NewArrivals(self.arrivals, now))
            return work(tx, *args, **kwargs)

        try:
            result: T = await workers.execute(execute)
        except DBAPIError as error:
            raise StorageError(f"database error: {error.orig}") from error
        if tx is not None:
            self.arrivals.commit(tx.arrivals)
        return result

    def describe_lost_file(self) -> str | None:
        """Return an error message if the opened file is no longer at its path, since writes would be lost."""
        found = _file_at(self._path)
        if found == self._file:
            return None
        how = "deleted" if found is None else "replaced"
        return (
            f"the database {self._path} was {how} while the remediator is running: it accepts no alerts and takes no"
            " actions; stop the remediator, restore a backup (defib restore) and start it again"
        )

    async def store_time(self) -> None:
        """Store the time of the clock. Raises StorageError."""
        await self.write(_store_time)

    def close(self) -> None:
        self._readers.close()
        self._read_engine.dispose()
        self._writer.run_blocking(self._write_engine.dispose)
        self._release()

    def _release(self) -> None:
        self._readers.close()
        self._writer.close()
        os.close(self._lock)

    def _open(self, calendar: Callable[[], float]) -> SteadyClock:
        """Check the file, apply migrations, and return the clock, which continues."""
        with begin(self._write_engine, "BEGIN IMMEDIATE") as connection:
            result = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if result != "ok":
                raise DatabaseError("PRAGMA quick_check", None, ValueError(str(result)))
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with begin(self._write_engine, "BEGIN IMMEDIATE") as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            offset = clock.resume_clock(connection, boot_id(), seconds_since_boot(), calendar())
        return SteadyClock(offset, calendar=calendar)


def _store_time(tx: Transaction) -> None:
    clock.store_clock(tx.connection, tx.now, seconds_since_boot(), time.time())


def _file_at(path: Path) -> tuple[int, int] | None:
    """Return the device and the inode of a file; None if it does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _lock_existing(path: Path) -> int:
    """Lock the database. Raises StartError if its lock file says that it was created, and it is missing or empty."""
    lock_file = Path(f"{path}.lock")
    if lock_file.is_file() and lock_file.stat().st_size and not (path.is_file() and path.stat().st_size):
        problem = "is empty" if path.is_file() else "is missing"
        raise StartError(f"the database {path} {problem}; {_RESTORE_HINT.format(path=path)}")
    return lock_database(path)


def mark_created(lock_file: int) -> None:
    """Write to the lock file, given by its descriptor, that the database exists from now on."""
    os.pwrite(lock_file, b"the database was created\n", 0)


def lock_database(path: Path) -> int:
    """Lock the database at `path`, which need not exist, until the returned descriptor is closed. Raises StartError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # It contains the output of hosts and commands. SQLite's other files get the same mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        lock_file = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"cannot open the database {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_file)
        raise StartError(f"another remediator uses the database {path}") from None
    return lock_file


def _engine(url: str, configure: Callable[[Any, Any], None]) -> Engine:
    engine = create_engine(url, connect_args={"check_same_thread": False})
    event.listen(engine.pool, "connect", configure)
    return engine


def _configure_writer(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # Python's sqlite3 would begin the transaction too late
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _configure_reader(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    for pragma in ("query_only=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")

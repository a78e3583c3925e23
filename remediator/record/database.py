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

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DatabaseError, DBAPIError

from remediator.record import clock
from remediator.record.clock import SteadyClock
from runtime.errors import DefibError, StartError

P = ParamSpec("P")
T = TypeVar("T")
PLACES = 2  # transactions that may wait for the thread at once: what comes first has no more than these before it
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
    """Runs functions of a connection, each in one transaction, one after another, off the event loop.

    One process owns the file; a second that opens it is refused.
    """

    def __init__(self, url: str, calendar: Callable[[], float] = time.time) -> None:
        path = Path(url.removeprefix("sqlite:///"))
        self._lock = _own(path)
        self._places = asyncio.Semaphore(PLACES)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._engine = create_engine(url, connect_args={"check_same_thread": False})
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        try:
            self.clock = self._thread.submit(self._begin, calendar).result()
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

    async def run(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `work` in one transaction, durable when this returns, soon. Raises StorageError."""
        async with self._places:
            return await self.run_first(work, *args, **kwargs)

    async def run_first(self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `run`, before what waits there: deliveries and actions come before decisions. Raises StorageError."""

        def transaction() -> T:
            if (lost := self.lost()) is not None:
                raise StorageError(lost)
            with self._engine.begin() as connection:
                return work(connection, *args, **kwargs)

        try:
            # A cancelled caller must not cut a transaction in two: the thread ends it either way.
            return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)
        except DBAPIError as error:
            raise StorageError(f"the database refused: {error.orig}") from error

    def lost(self) -> str | None:
        """What is wrong where the file that we opened is not in its place any more: all that we wrote would be lost."""
        found = _file_at(self._path)
        if found == self._file:
            return None
        how = "deleted" if found is None else "replaced"
        return (
            f"the database {self._path} was {how} while the remediator runs: nothing is taken in and nothing is done;"
            " stop the remediator, put a backup in its place (defib restore) and start it again"
        )

    async def keep_time(self) -> None:
        """Keep how late it is. Raises StorageError."""
        await self.run(clock.keep, self.clock.now(), clock.since_boot(), time.time())

    def close(self) -> None:
        self._thread.submit(self._engine.dispose).result()
        self._release()

    def _release(self) -> None:
        self._thread.shutdown()
        os.close(self._lock)

    def _begin(self, calendar: Callable[[], float]) -> SteadyClock:
        """See that the file is whole, bring it up to date, and take up its clock."""
        with self._engine.begin() as connection:
            said = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if said != "ok":
                raise DatabaseError("PRAGMA quick_check", None, ValueError(str(said)))
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self._engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            offset = clock.take_up(connection, clock.boot_id(), clock.since_boot(), calendar())
        return SteadyClock(offset, calendar=calendar)


def _file_at(path: Path) -> tuple[int, int] | None:
    """The device and the inode of a file, None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _own(path: Path) -> int:
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


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: Python's sqlite3 would say it too late
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")

"""Copies of SQLite databases, by SQLite's backup API (https://www.sqlite.org/backup.html), and their replacement."""

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from runtime.errors import DefibError
from runtime.files import sync

LOCKED_TIMEOUT = 30.0  # seconds without progress after which a backup of a locked database fails
PART = ".defib.db.part"  # always the same name, so that a later backup removes an incomplete file
_SUFFIXES = ("", "-wal", "-shm", "-journal")  # of the files of a SQLite database


class BackupError(DefibError):
    """The backup or restore failed. The database was not changed unless the message says so."""


class DatabaseBusyError(BackupError):
    """Another program has locked the database."""

    retryable = True


@contextlib.contextmanager
def translate_os_errors() -> Iterator[None]:
    """Raise BackupError for any OSError."""
    try:
        yield
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise BackupError(f"{file}{error.strerror}") from error


@contextlib.contextmanager
def acting_as_owner(folder: Path) -> Iterator[None]:
    """Let root have only the rights of a folder's owner, and create files that are the owner's.

    An account of a service could have put links to files of others into its folder. Raises OSError.
    """
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    owner = existing.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    group, groups = os.getegid(), os.getgroups()
    os.setgroups([owner.st_gid])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


@contextlib.contextmanager
def open_source(source: Path) -> Iterator[sqlite3.Connection]:
    """Open a database to copy it, which may be in use, with the rights of its folder's owner. Raises BackupError."""
    with contextlib.ExitStack() as opened:
        with acting_as_owner(source.parent):
            if not source.is_file():
                raise BackupError(f"there is no database {source}")
            try:
                original = opened.enter_context(open_read_only(source))
                original.execute(f"PRAGMA busy_timeout={LOCKED_TIMEOUT * 1000:.0f}")
                original.execute("SELECT 1 FROM sqlite_master").fetchone()  # opens all its files
            except sqlite3.Error as error:
                raise BackupError(f"cannot read {source}: {describe(error)}") from error
        yield original


def copy_database(
    original: sqlite3.Connection,
    path: Path,
    check: Callable[[Path], int],
    change: Callable[[sqlite3.Connection], object] = lambda _copy: None,
) -> int:
    """Copy a database, which may be in use, and return what `check` returns for the copy.

    The copy gets its name when it is complete, changed, checked and on the disk. Raises BackupError.
    """
    part = path.with_name(PART)
    try:
        _unlink(part)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with contextlib.closing(sqlite3.connect(part)) as copy:
            original.backup(copy, progress=_raise_if_locked())
            copy.execute("PRAGMA journal_mode=DELETE")
            with copy:
                change(copy)
        found = check(part)
        sync(part)
        part.replace(path)
        sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise BackupError(f"cannot copy the database to {path}: {describe(error)}") from error
    finally:
        _unlink(part)
    return found


def replace_database(part: Path, path: Path, on_replaced: Callable[[], object] = lambda: None) -> Path | None:
    """Give a restored database its name; return where the previous one is now, if any.

    The database is locked, by a file beside it. Raises BackupError.
    """
    sync(part)
    previous = move_away(path)
    try:
        part.replace(path)
        sync(path.parent)
        on_replaced()
    except OSError as error:
        moved = f"; the previous database is now {previous}" if previous else ""
        raise BackupError(f"cannot restore {path}: {error.strerror}{moved}") from error
    return previous


def move_away(path: Path) -> Path | None:
    """Rename a database and its other files; returns its new name, None if it did not exist or was empty.

    A write-ahead log without its database is renamed, too: SQLite would apply it to the restored one.
    """
    new_path = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
    moved = False
    for each in (Path(f"{path}{suffix}") for suffix in _SUFFIXES):
        if each.is_file():
            moved |= each.stat().st_size > 0
            each.rename(f"{new_path}{str(each).removeprefix(str(path))}")
    return new_path if moved else None


def _unlink(part: Path) -> None:
    for suffix in ("", "-journal"):
        Path(f"{part}{suffix}").unlink(missing_ok=True)


def _raise_if_locked() -> Callable[[int, int, int], None]:
    """Return a callback that ends a backup without progress: SQLite waits forever while the source is locked."""
    last_remaining, since = -1, time.monotonic()

    def progress(_status: int, remaining: int, _total: int) -> None:
        nonlocal last_remaining, since
        if remaining != last_remaining:
            last_remaining, since = remaining, time.monotonic()
        elif time.monotonic() - since > LOCKED_TIMEOUT:
            raise sqlite3.OperationalError("database is locked")

    return progress


@contextlib.contextmanager
def checking(path: Path, what: str) -> Iterator[sqlite3.Connection]:
    """Open an intact database to check whether it is `what`. Raises BackupError; DatabaseBusyError if it is locked."""
    if not path.is_file():
        raise BackupError(f"there is no file {path}")
    try:
        with open_read_only(path) as database:
            result = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if result != "ok":
                raise BackupError(f"{path} is damaged: {result}")
            yield database
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_CANTOPEN:
            raise BackupError(f"cannot open {path}") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DatabaseBusyError(f"{path} is locked by another program: {describe(error)}") from error
        raise BackupError(f"{path} is not {what}: {describe(error)}") from error


def read_schema(database: sqlite3.Connection) -> Mapping[tuple[str, str], str]:
    """Return the SQL of all tables, indexes, triggers and views, by type and name.

    Versions of SQLite write spaces and quotation marks differently.
    """
    rows = database.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    rows = [row for row in rows if row[1] not in ("sqlite_sequence", "sqlite_stat1", "sqlite_stat4")]
    return {(kind, name): re.sub(r'[\s"`\[\]]', "", str(sql)) for kind, name, sql in rows}


@contextlib.contextmanager
def open_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        yield database


def describe(error: Exception) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)

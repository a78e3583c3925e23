"""Backup and restore of the record's database with SQLite's backup API (https://www.sqlite.org/backup.html)."""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from remediator.record.database import MIGRATIONS, lock_database, mark_created
from runtime.errors import DefibError

LOCKED_TIMEOUT = 30.0  # seconds without progress after which a backup of a locked database fails
_SUFFIXES = ("", "-wal", "-shm", "-journal")  # of the files of a SQLite database


class BackupError(DefibError):
    """The backup or restore failed. The database was not changed unless the message says so."""


class RecordBusyError(BackupError):
    """Another program has locked the database."""

    retryable = True


@dataclass(frozen=True)
class Backup:
    """A written file, its size in bytes, and the number of incidents in it."""

    path: Path
    size: int
    incidents: int


@contextlib.contextmanager
def _translate_os_errors() -> Iterator[None]:
    """Raise BackupError for any OSError."""
    try:
        yield
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise BackupError(f"{file}{error.strerror}") from error


@_translate_os_errors()
def back_up(database: str, to: Path) -> Backup:
    """Write the database to a new file; in a folder, its name is the time. The remediator may be running.

    Raises BackupError.
    """
    if not to.is_dir() and to.suffix != ".db":
        raise BackupError(f"there is no folder {to}; the name of a file must end in .db")
    path = to / f"defib-{time.strftime('%Y%m%dT%H%M%S')}.db" if to.is_dir() else to
    if path.exists():
        raise BackupError(f"{path} already exists; choose another name")
    return _copy(_path_of(database), path)


@_translate_os_errors()
def restore(database: str, source: Path) -> tuple[Backup, Path | None]:
    """Replace the database by a backup; returns it, and where the previous database is now, if there was one.

    Raises BackupError, and StartError while a remediator uses the database.
    """
    path = _path_of(database)
    check(source)  # before anything is changed
    lock_file = lock_database(path)
    try:
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        restored = _copy(source, part)
        previous = _move_away(path)
        try:
            part.replace(path)
            _sync(path.parent)
            mark_created(lock_file)
            _set_owner(path)
        except OSError as error:
            moved = f"; the previous database is now {previous}" if previous else ""
            raise BackupError(f"cannot restore {path}: {error.strerror}{moved}") from error
    finally:
        os.close(lock_file)
    return Backup(path, restored.size, restored.incidents), previous


def _path_of(database: str) -> Path:
    return Path(database.removeprefix("sqlite:///"))


def _set_owner(path: Path) -> None:
    """Give files that root restored to the owner of their folder."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        for each in (path, Path(f"{path}.lock")):
            os.chown(each, owner.st_uid, owner.st_gid)


def _move_away(path: Path) -> Path | None:
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


def _copy(source: Path, path: Path) -> Backup:
    """Copy a database and check the copy, which gets its name when it is complete and on the disk."""
    if not source.is_file():
        raise BackupError(f"there is no database {source}")
    part = path.with_name(".defib.db.part")  # always the same name, so that a later backup removes an incomplete file
    try:
        _unlink(part)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with _open(source) as original, contextlib.closing(sqlite3.connect(part)) as copy:
            original.backup(copy, progress=_raise_if_locked())
            copy.execute("PRAGMA journal_mode=DELETE")
        incidents = check(part)
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise BackupError(f"cannot copy {source} to {path}: {_describe(error)}") from error
    finally:
        _unlink(part)
    return Backup(path, path.stat().st_size, incidents)


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


def check(path: Path) -> int:
    """Check that a file is an intact database that this version can read; returns the number of its incidents.

    Raises BackupError, and RecordBusyError if it is locked.
    """
    if not path.is_file():
        raise BackupError(f"there is no file {path}")
    try:
        with _open(path) as database:
            result = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if result != "ok":
                raise BackupError(f"{path} is damaged: {result}")
            (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
            if not revision:
                raise BackupError(f"{path} is not a database of Defib: it has no schema version")
            (incidents,) = database.execute("SELECT count(*) FROM incidents").fetchone()
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_CANTOPEN:
            raise BackupError(f"cannot open {path}") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise RecordBusyError(f"{path} is locked by another program: {_describe(error)}") from error
        raise BackupError(f"{path} is not a database of Defib: {_describe(error)}") from error
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    try:
        ScriptDirectory.from_config(config).get_revision(revision)
    except CommandError:
        message = f"{path} was written by a newer version of Defib (schema {revision}); install that version"
        raise BackupError(message) from None
    return int(incidents)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        yield database


def _describe(error: Exception) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Backup and restore of the record's database with SQLite's backup API (https://www.sqlite.org/backup.html)."""

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import create_engine

from remediator.record.database import MIGRATIONS, lock_database, mark_created
from runtime.errors import DefibError
from runtime.files import sync

LOCKED_TIMEOUT = 30.0  # seconds without progress after which a backup of a locked database fails
PART = ".defib.db.part"  # always the same name, so that a later backup removes an incomplete file
_SUFFIXES = ("", "-wal", "-shm", "-journal")  # of the files of a SQLite database


class BackupError(DefibError):
    """The backup or restore failed. The database was not changed unless the message says so."""


class RecordBusyError(BackupError):
    """Another program has locked the database."""

    retryable = True


@dataclass(frozen=True)
class Backup:
    """A written file, its size in bytes, and the number of incidents in it.

    After a restore, `tokens` are its API tokens in force.
    """

    path: Path
    size: int
    incidents: int
    tokens: tuple[str, ...] = ()


@contextlib.contextmanager
def translate_os_errors() -> Iterator[None]:
    """Raise BackupError for any OSError."""
    try:
        yield
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise BackupError(f"{file}{error.strerror}") from error


@translate_os_errors()
def back_up(database: str, path: Path) -> Backup:
    """Write the database to a new file. The remediator may be running. Raises BackupError."""
    if path.exists():
        raise BackupError(f"{path} already exists; choose another name")
    return _copy(path_of(database), path)


@translate_os_errors()
def restore(database: str, source: Path) -> tuple[Backup, Path | None]:
    """Replace the database by a backup; returns it, and where the previous database is now, if there was one.

    Nobody is signed in afterwards, and API tokens that have been revoked since the backup stay revoked. Raises
    BackupError, and StartError while a remediator uses the database.
    """
    path = path_of(database)
    check(source)  # before anything is changed
    lock_file = lock_database(path)
    try:
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        restored = _copy(source, part)
        tokens = _end_access(part, path)
        sync(part)
        previous = _move_away(path)
        try:
            part.replace(path)
            sync(path.parent)
            mark_created(lock_file)
            _set_owner(path)
        except OSError as error:
            moved = f"; the previous database is now {previous}" if previous else ""
            raise BackupError(f"cannot restore {path}: {error.strerror}{moved}") from error
    finally:
        os.close(lock_file)
    return Backup(path, restored.size, restored.incidents, tokens), previous


def path_of(database: str) -> Path:
    """Return the file of a database's URL."""
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
    part = path.with_name(PART)
    try:
        _unlink(part)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with _open(source) as original, contextlib.closing(sqlite3.connect(part)) as copy:
            original.backup(copy, progress=_raise_if_locked())
            copy.execute("PRAGMA journal_mode=DELETE")
        incidents = check(part)
        sync(part)
        part.replace(path)
        sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise BackupError(f"cannot copy {source} to {path}: {_describe(error)}") from error
    finally:
        _unlink(part)
    return Backup(path, path.stat().st_size, incidents)


def _end_access(restored: Path, replaced: Path) -> tuple[str, ...]:
    """End all sessions, and remove the API tokens that are revoked in the replaced database, if it is readable.

    Returns the names of the tokens in force.
    """
    revoked: set[str] = set()
    if replaced.is_file() and replaced.stat().st_size:  # SQLite would delete the log beside an empty file
        with contextlib.suppress(sqlite3.Error), _open(replaced) as database:
            query = "SELECT digest FROM api_tokens WHERE revoked_at IS NOT NULL"
            revoked = {digest for (digest,) in database.execute(query)}
    try:
        with contextlib.closing(sqlite3.connect(restored)) as database, database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'api_tokens'").fetchone():
                return ()  # of a version without access control
            database.execute("DELETE FROM sessions")
            tokens = database.execute("SELECT name, digest FROM api_tokens WHERE revoked_at IS NULL").fetchall()
            database.executemany("DELETE FROM api_tokens WHERE digest = ?", [(digest,) for digest in revoked])
            return tuple(sorted(name for name, digest in tokens if digest not in revoked))
    except sqlite3.Error as error:
        raise BackupError(f"cannot end the sessions of the backup: {_describe(error)}") from error


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
            revisions = [each for (each,) in database.execute("SELECT version_num FROM alembic_version")]
            if len(revisions) != 1:
                raise BackupError(f"{path} is not a database of Defib: it has {len(revisions)} schema versions")
            (incidents,) = database.execute("SELECT count(*) FROM incidents").fetchone()
            schema = _read_schema(database)
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_CANTOPEN:
            raise BackupError(f"cannot open {path}") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise RecordBusyError(f"{path} is locked by another program: {_describe(error)}") from error
        raise BackupError(f"{path} is not a database of Defib: {_describe(error)}") from error
    try:
        expected = _create_schema(revisions[0])
    except CommandError:
        message = f"{path} was written by a newer version of Defib (schema {revisions[0]}); install that version"
        raise BackupError(message) from None
    if differing := sorted(name for (_, name), _ in schema.items() ^ expected.items()):
        raise BackupError(f"{path} is not a database of Defib: its {differing[0]} is not that of the schema")
    return int(incidents)


def _read_schema(database: sqlite3.Connection) -> dict[tuple[str, str], str]:
    """Return the SQL of all tables, indexes, triggers and views, by type and name.

    Versions of SQLite write spaces and quotation marks differently.
    """
    rows = database.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    rows = [row for row in rows if row[1] not in ("sqlite_sequence", "sqlite_stat1", "sqlite_stat4")]
    return {(kind, name): re.sub(r'[\s"`\[\]]', "", str(sql)) for kind, name, sql in rows}


@cache
def _create_schema(revision: str) -> dict[tuple[str, str], str]:
    """Return what a database of a revision consists of. Raises CommandError if the revision is unknown."""
    config, engine = Config(), create_engine("sqlite://")
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        database: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # of SQLite
        schema = _read_schema(database)
    engine.dispose()
    return schema


@contextlib.contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        yield database


def _describe(error: Exception) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)

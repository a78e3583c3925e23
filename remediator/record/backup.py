"""Backup and restore of the record, as whole and checked files (https://www.sqlite.org/backup.html)."""

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

from remediator.record.database import MIGRATIONS, lock, mark_begun
from runtime.errors import DefibError

PATIENCE = 30.0  # seconds for which a locked record is waited for
_BESIDE = ("", "-wal", "-shm", "-journal")  # what SQLite may have beside a database, and the database


class BackupError(DefibError):
    """Nothing was backed up or restored; all is as it was."""


class RecordBusyError(BackupError):
    """Somebody holds the database; it may be had later."""


@dataclass(frozen=True)
class Backup:
    """A file that was written: where, its size in bytes, and how many incidents it has on record."""

    path: Path
    size: int
    incidents: int


@contextlib.contextmanager
def _os_errors_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise BackupError(f"{where}{error.strerror}") from error


@_os_errors_named()
def back_up(database: str, to: Path) -> Backup:
    """Write all of the record to a new file, while the remediator runs or not; into a folder by a name of today.

    Raises BackupError.
    """
    if not to.is_dir() and to.suffix != ".db":
        raise BackupError(f"there is no folder {to}, and a file's name would end in .db")
    path = to / f"defib-{time.strftime('%Y%m%dT%H%M%S')}.db" if to.is_dir() else to
    if path.exists():
        raise BackupError(f"{path} exists already; nothing was overwritten")
    return _copied(_path_of(database), path)


@_os_errors_named()
def restore(database: str, source: Path) -> tuple[Backup, Path | None]:
    """Put a backup in the record's place, and tell where what stood there is kept.

    Raises BackupError, and StartError while a remediator has the record.
    """
    path = _path_of(database)
    check(source)  # before anything is touched
    held = lock(path)
    try:
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        restored = _copied(source, part)
        kept = _put_aside(path)
        try:
            part.replace(path)
            _sync(path.parent)
            mark_begun(held)
            _give(path)
        except OSError as error:
            was = f"; what was there is {kept}" if kept else ""
            raise BackupError(f"{path} may not be restored: {error.strerror}{was}") from error
    finally:
        os.close(held)
    return Backup(path, restored.size, restored.incidents), kept


def _path_of(database: str) -> Path:
    return Path(database.removeprefix("sqlite:///"))


def _give(path: Path) -> None:
    """Have what root restored belong to whom the folder belongs to."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        for each in (path, Path(f"{path}.lock")):
            os.chown(each, owner.st_uid, owner.st_gid)


def _put_aside(path: Path) -> Path | None:
    """Move what is there out of the way, with what belongs to it; tells where it is now.

    A log goes even where its database is gone: SQLite would play it into whatever lies there next.
    """
    kept = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
    moved = False
    for each in (Path(f"{path}{ending}") for ending in _BESIDE):
        if each.is_file():
            moved |= each.stat().st_size > 0
            each.rename(f"{kept}{str(each).removeprefix(str(path))}")
    return kept if moved else None


def _copied(source: Path, path: Path) -> Backup:
    """A copy of a database, checked, and on the disk before it has its name."""
    if not source.is_file():
        raise BackupError(f"there is no database {source}")
    part = path.with_name(".defib.db.part")  # one name: what a kill left is not left for ever
    try:
        _unlink(part)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with _opened(source) as there, contextlib.closing(sqlite3.connect(part)) as copy:
            there.backup(copy, progress=_not_for_ever())
            copy.execute("PRAGMA journal_mode=DELETE")
        incidents = check(part)
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise BackupError(f"{source} could not be copied to {path}: {_said(error)}") from error
    finally:
        _unlink(part)
    return Backup(path, path.stat().st_size, incidents)


def _unlink(part: Path) -> None:
    for ending in ("", "-journal"):
        Path(f"{part}{ending}").unlink(missing_ok=True)


def _not_for_ever() -> Callable[[int, int, int], None]:
    """Ends a backup that gets no further: SQLite waits without end where the source is locked."""
    got, since = -1, time.monotonic()

    def progress(_status: int, remaining: int, _total: int) -> None:
        nonlocal got, since
        if remaining != got:
            got, since = remaining, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            raise sqlite3.OperationalError("database is locked")

    return progress


def check(path: Path) -> int:
    """See that a file is a whole record which this version can read; gives the number of its incidents.

    Raises BackupError, and RecordBusyError where it is held just now.
    """
    if not path.is_file():
        raise BackupError(f"there is no file {path}")
    try:
        with _opened(path) as database:
            said = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if said != "ok":
                raise BackupError(f"{path} is damaged: {said}")
            (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
            if not revision:
                raise BackupError(f"{path} is no record of Defib: it has no schema's number")
            (incidents,) = database.execute("SELECT count(*) FROM incidents").fetchone()
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_CANTOPEN:
            raise BackupError(f"{path} cannot be read") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise RecordBusyError(f"{path} is held by another program: {_said(error)}") from error
        raise BackupError(f"{path} is no record of Defib: {_said(error)}") from error
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    try:
        ScriptDirectory.from_config(config).get_revision(revision)
    except CommandError:
        raise BackupError(f"{path} was written by a newer version of Defib (its schema is {revision})") from None
    return int(incidents)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        yield database


def _said(error: Exception) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def _sync(path: Path) -> None:
    """See that a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

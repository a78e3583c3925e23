"""Backup and restore of the record's database."""

import contextlib
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import create_engine

from remediator.record.database import MIGRATIONS, lock_database, mark_created
from runtime.database_files import (
    BackupError,
    acting_as_owner,
    checking,
    copy_database,
    describe,
    open_read_only,
    open_source,
    read_schema,
    replace_database,
    translate_os_errors,
)


@dataclass(frozen=True)
class Backup:
    """A written file, its size in bytes, and the number of incidents in it.

    After a restore, `tokens` are its API tokens in force.
    """

    path: Path
    size: int
    incidents: int
    tokens: tuple[str, ...] = ()


@translate_os_errors()
def back_up(database: str, path: Path) -> Backup:
    """Write the database to a new file. The remediator may be running. Raises BackupError."""
    if path.exists():
        raise BackupError(f"{path} already exists; choose another name")
    with open_source(path_of(database)) as original:
        incidents = copy_database(original, path, check)
    return Backup(path, path.stat().st_size, incidents)


@translate_os_errors()
def restore(database: str, source: Path) -> tuple[Backup, Path | None]:
    """Replace the database by a backup; returns it, and where the previous database is now, if there was one.

    Nobody is signed in afterwards, and API tokens that have been revoked since the backup stay revoked. Raises
    BackupError, and StartError while a remediator uses the database.
    """
    path = path_of(database)
    check(source)  # before anything is changed
    with open_read_only(source) as original, acting_as_owner(path.parent):
        lock_file = lock_database(path)
        try:
            part = path.with_name(f"{path.name}.part")
            part.unlink(missing_ok=True)
            incidents = copy_database(original, part, check)
            size = part.stat().st_size
            tokens = _end_access(part, path)
            previous = replace_database(part, path, partial(mark_created, lock_file))
        finally:
            os.close(lock_file)
    return Backup(path, size, incidents, tokens), previous


def path_of(database: str) -> Path:
    """Return the file of a database's URL."""
    return Path(database.removeprefix("sqlite:///"))


def _end_access(restored: Path, replaced: Path) -> tuple[str, ...]:
    """End all sessions, and remove the API tokens that are revoked in the replaced database, if it is readable.

    Returns the names of the tokens in force.
    """
    revoked: set[str] = set()
    if replaced.is_file() and replaced.stat().st_size:  # SQLite would delete the log beside an empty file
        with contextlib.suppress(sqlite3.Error), open_read_only(replaced) as database:
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
        raise BackupError(f"cannot end the sessions of the backup: {describe(error)}") from error


def check(path: Path) -> int:
    """Check that a file is an intact database that this version can read; returns the number of its incidents.

    Raises BackupError, and DatabaseBusyError if it is locked.
    """
    with checking(path, "a database of Defib") as database:
        revisions = [each for (each,) in database.execute("SELECT version_num FROM alembic_version")]
        if len(revisions) != 1:
            raise BackupError(f"{path} is not a database of Defib: it has {len(revisions)} schema versions")
        (incidents,) = database.execute("SELECT count(*) FROM incidents").fetchone()
        schema = read_schema(database)
    try:
        expected = _create_schema(revisions[0])
    except CommandError:
        message = f"{path} was written by a newer version of Defib (schema {revisions[0]}); install that version"
        raise BackupError(message) from None
    if differing := sorted(name for (_, name), _ in schema.items() ^ expected.items()):
        raise BackupError(f"{path} is not a database of Defib: its {differing[0]} is not that of the schema")
    return int(incidents)


@cache
def _create_schema(revision: str) -> Mapping[tuple[str, str], str]:
    """Return what a database of a revision consists of. Raises CommandError if the revision is unknown."""
    config, engine = Config(), create_engine("sqlite://")
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        database: sqlite3.Connection = connection.connection.driver_connection  # type: ignore[assignment]  # of SQLite
        schema = read_schema(database)
    engine.dispose()
    return schema

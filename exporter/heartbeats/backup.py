"""Backup and restore of the database of heartbeats, with the ping key that is beside it.

Without that key, a restored exporter would have other URLs. A backup has it in a table of its own.
"""

import contextlib
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from exporter.heartbeats.store import SCHEMA, VERSION, lock_database, ping_key_file, read_states
from fleet.inventory.heartbeats import check_ping_key
from runtime.database_files import (
    BackupError,
    acting_as_owner,
    checking,
    copy_database,
    open_read_only,
    open_source,
    read_schema,
    replace_database,
    translate_os_errors,
)
from runtime.files import create_file
from runtime.tokens import read_token

_KEY_TABLE = "backup_ping_key"
_WHAT = "a database of heartbeats"


@dataclass(frozen=True)
class HeartbeatBackup:
    """A written file, its size in bytes, and the number of heartbeats in it."""

    path: Path
    size: int
    heartbeats: int


@dataclass(frozen=True)
class Restored:
    """A restored database, and where the previous database and the previous ping key are now, if they were replaced."""

    backup: HeartbeatBackup
    previous: Path | None
    previous_key: Path | None


@translate_os_errors()
def back_up(database: Path, path: Path, *, has_key_file: bool) -> HeartbeatBackup:
    """Write the database to a new file. The exporter may be running.

    `has_key_file` says that the ping key is in the file beside the database, and not in the configuration. Raises
    BackupError and TokenError.
    """
    if path.exists():
        raise BackupError(f"{path} already exists; choose another name")
    with acting_as_owner(database.parent):
        key = read_token(ping_key_file(database)).get_secret_value() if has_key_file else None

    def add_key(copy: sqlite3.Connection) -> None:
        if key is not None:
            copy.execute(f"CREATE TABLE {_KEY_TABLE} (ping_key TEXT NOT NULL)")
            copy.execute(f"INSERT INTO {_KEY_TABLE} VALUES (?)", (key,))  # noqa: S608 - a constant

    with open_source(database) as original:
        heartbeats = copy_database(original, path, check, add_key)
    return HeartbeatBackup(path, path.stat().st_size, heartbeats)


@translate_os_errors()
def restore(database: Path, source: Path, *, has_key_file: bool) -> Restored:
    """Replace the database by a backup, and the ping key if it is in a file.

    Raises BackupError, and StartError while an exporter uses the database.
    """
    check(source)  # before anything is changed
    with open_read_only(source) as original, acting_as_owner(database.parent):
        lock_file = lock_database(database)
        try:
            key = _read_key(original)
            part = database.with_name(f"{database.name}.part")
            part.unlink(missing_ok=True)
            heartbeats = copy_database(
                original, part, check, lambda copy: copy.execute(f"DROP TABLE IF EXISTS {_KEY_TABLE}")
            )
            size = part.stat().st_size
            previous = replace_database(part, database)
            previous_key = _replace_key(ping_key_file(database), key) if has_key_file and key is not None else None
        finally:
            os.close(lock_file)
    return Restored(HeartbeatBackup(database, size, heartbeats), previous, previous_key)


def _read_key(backup: sqlite3.Connection) -> str | None:
    """Return the ping key in a backup; None if that has none. Raises BackupError if it is unusable."""
    if (("table", _KEY_TABLE)) not in read_schema(backup):
        return None
    row = backup.execute(f"SELECT ping_key FROM {_KEY_TABLE}").fetchone()  # noqa: S608 - a constant
    if row is None:
        raise BackupError(f"the backup is damaged: it has no ping key in {_KEY_TABLE}")
    try:
        return check_ping_key(SecretStr(str(row[0]))).get_secret_value()
    except ValueError as error:
        raise BackupError(f"the backup is damaged: its ping key {error}") from None


def _replace_key(path: Path, key: str) -> Path | None:
    """Write the ping key, unless it is there; return where the previous one is now, if it was another one."""
    previous = None
    if os.path.lexists(path):
        if path.is_file() and path.read_text("ascii", "replace").strip() == key:
            return None
        previous = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        path.rename(previous)
    create_file(path, f"{key}\n".encode())
    return previous


def is_database(path: Path) -> bool:
    """Whether a file is a database of heartbeats, of any version."""
    with contextlib.suppress(sqlite3.Error, OSError):
        if path.is_file():
            with open_read_only(path) as database:
                return ("table", "heartbeats") in read_schema(database)
    return False


def check(path: Path) -> int:
    """Check that a file is an intact database that this version can read; returns the number of its heartbeats.

    Raises BackupError, and DatabaseBusyError if it is locked.
    """
    with checking(path, _WHAT) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise BackupError(
                f"{path} was written by a newer version of Defib (schema {version}); install that version"
            )
        schema = dict(read_schema(database))
    schema.pop(("table", _KEY_TABLE), None)
    with contextlib.closing(sqlite3.connect(":memory:")) as created:
        created.executescript(SCHEMA)
        expected = read_schema(created)
    if differing := sorted(name for (_, name), _ in schema.items() ^ expected.items()):
        raise BackupError(f"{path} is not {_WHAT}: its {differing[0]} is not that of the schema")
    with checking(path, _WHAT) as database:
        _read_key(database)
        return sum(1 for _ in read_states(database))

"""Backup and restore of the state file. What was sent in the last minute is not in a backup: that is soon over."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.ledger import open_locked
from gateway.state import VERSION, sent_path
from runtime.database_files import BackupError, acting_as_owner, move_away, translate_os_errors
from runtime.files import create_file

MAX_SIZE = 16 * 2**20  # bytes


@dataclass(frozen=True)
class StateBackup:
    """A written file, its size in bytes, and for how many clients it has what they have used."""

    path: Path
    size: int
    clients: int


@dataclass(frozen=True)
class Restored:
    """A restored state file, and where the previous one is now, if there was one."""

    backup: StateBackup
    previous: Path | None


@translate_os_errors()
def back_up(state_file: Path, path: Path) -> StateBackup:
    """Write the state to a new file. The gateway may be running. Raises BackupError."""
    with acting_as_owner(state_file.parent):
        content = _read(state_file)
    clients = _check(state_file, content)
    try:
        create_file(path, content)
    except FileExistsError as error:
        raise BackupError(f"{path} already exists; choose another name") from error
    return StateBackup(path, len(content), clients)


@translate_os_errors()
def restore(state_file: Path, source: Path) -> Restored:
    """Replace the state by that of a backup. Raises BackupError, and StartError while a gateway uses the file."""
    content = _read(source)
    clients = _check(source, content)
    with acting_as_owner(state_file.parent):
        lock = open_locked(sent_path(state_file))
        try:
            previous = move_away(state_file)
            create_file(state_file, content)
        finally:
            os.close(lock)
    return Restored(StateBackup(state_file, len(content), clients), previous)


def is_state(path: Path) -> bool:
    """Whether a file may be a gateway's state: no database begins so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"{"


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_SIZE + 1)


def _check(path: Path, content: bytes) -> int:
    """Check that a state is one that this version can use; return the number of clients in it. Raises BackupError."""
    try:
        stored: Any = json.loads(content) if len(content) <= MAX_SIZE else None
    except (ValueError, RecursionError):
        stored = None
    used = stored.get("budgets", {}).get("used") if isinstance(stored, dict) else None
    if not isinstance(used, dict) or not isinstance(stored.get("rates"), dict):
        raise BackupError(f"{path} is not the state of a gateway")
    if stored.get("version") != VERSION:
        raise BackupError(f"{path} was written by another version of Defib; install that version")
    return len(used)

"""`defib backup`: the files of a backup, their names, and which old ones are removed.

A further database is one more pattern of names in `NAMES`, and a function that writes it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from defib import config_archive
from defib.config_archive import ConfigArchive
from remediator.record import backup
from remediator.record.backup import Backup, BackupError, path_of, translate_os_errors

MIN_KEPT = 3  # newest files of each kind that are never removed, so that a clock that is wrong cannot remove all
RECORD, CONFIGURATION = NAMES = ("defib-%Y%m%dT%H%M%S.db", "config-%Y%m%dT%H%M%S.tar.gz")  # in a folder
MISSING_SHOWN = 10


@dataclass(frozen=True)
class Written:
    """The files of a backup, and those that were too old and are removed; `problem` is why it is not complete."""

    record: Backup
    configuration: ConfigArchive | None
    removed: tuple[Path, ...]
    problem: str


@translate_os_errors()
def back_up(database: str, directory: Path, to: Path, keep: float | None = None) -> Written:
    """Write the database and the configuration to new files; in a folder, their names are the time.

    The remediator may be running. Afterwards, files in the folder whose names are more than `keep` seconds old are
    removed, except the newest `MIN_KEPT` of each kind, and except those of a kind that is not complete this time.
    Raises BackupError if the database is not written.
    """
    if keep is not None and not to.is_dir():
        raise BackupError(f"there is no folder {to}; old backups are removed from a folder only")
    if not to.is_dir() and to.suffix != ".db":
        raise BackupError(f"there is no folder {to}; the name of a file must end in .db")
    now = time.time()
    path, archive_path = _name_files(to, now)
    if archive_path.exists():
        raise BackupError(f"{archive_path} already exists; choose another name")
    record = backup.back_up(database, path)
    configuration, problem = _back_up_configuration(directory, archive_path, _leave_out(database, path, archive_path))
    complete = NAMES if not problem else (RECORD,)
    removed = [] if keep is None else [each for name in complete for each in _remove_older(to, name, now - keep)]
    return Written(record, configuration, tuple(sorted(removed)), problem)


def _name_files(to: Path, now: float) -> tuple[Path, Path]:
    """Return the paths of the database and of the configuration."""
    if to.is_dir():
        record, configuration = (to / time.strftime(name, time.localtime(now)) for name in NAMES)
        return record, configuration
    return to, to.with_suffix(".config.tar.gz")


def _back_up_configuration(
    directory: Path, path: Path, is_left_out: Callable[[Path], bool]
) -> tuple[ConfigArchive | None, str]:
    """Return the archive, if it could be written, and why it is not complete."""
    try:
        written = config_archive.archive(directory, path, is_left_out)
    except BackupError as error:
        return None, str(error)
    if not written.missing:
        return written, ""
    shown = list(written.missing[:MISSING_SHOWN])
    if len(written.missing) > MISSING_SHOWN:
        shown.append(f"{len(written.missing) - MISSING_SHOWN} more")
    return written, f"{path} lacks what cannot be read ({'; '.join(shown)}): run the command as a user who can, or root"


def _leave_out(database: str, *written: Path) -> Callable[[Path], bool]:
    """Return a function that finds the files of the database, which has a backup of its own, and earlier backups."""
    record, folder = path_of(database).resolve(), written[0].parent.resolve()
    names = {path.name for path in written} | {backup.PART, config_archive.PART}

    def is_left_out(path: Path) -> bool:
        parent = path.parent.resolve()
        if parent == record.parent and path.name.startswith(record.name):
            return True
        return parent == folder and (path.name in names or any(_read_time(path, name) is not None for name in NAMES))

    return is_left_out


def _remove_older(folder: Path, name: str, limit: float) -> Iterator[Path]:
    """Remove the files of a kind whose names are times before a Unix time, except the newest ones; yields them."""
    found = sorted(
        ((at, path) for path in folder.iterdir() if (at := _read_time(path, name)) is not None), reverse=True
    )
    for at, path in found[MIN_KEPT:]:
        if at < limit:
            path.unlink(missing_ok=True)
            yield path


def _read_time(path: Path, name: str) -> float | None:
    """Return the Unix time in a file's name; None for any other file."""
    try:
        at = time.strptime(path.name, name)
        return time.mktime(at) if time.strftime(name, at) == path.name and path.is_file() else None
    except (ValueError, OverflowError):
        return None

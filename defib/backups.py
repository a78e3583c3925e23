"""`defib backup` and `defib restore`: the files of a backup, their names, and which old ones are removed.

A further database is one more pattern of names in `NAMES`, and a function that writes it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from defib import config_archive
from defib.config_archive import ConfigArchive
from exporter.heartbeats import backup as heartbeat_backup
from exporter.heartbeats.backup import HeartbeatBackup
from fleet.inventory.model import Inventory
from gateway import backup as gateway_backup
from gateway.backup import StateBackup
from remediator.record import backup
from remediator.record.backup import Backup, path_of
from runtime.database_files import PART, BackupError, translate_os_errors
from runtime.errors import DefibError

MIN_KEPT = 3  # newest files of each kind that are never removed, so that a clock that is wrong cannot remove all
RECORD, HEARTBEATS, STATE, CONFIGURATION = NAMES = (
    "defib-%Y%m%dT%H%M%S.db", "heartbeats-%Y%m%dT%H%M%S.db",
    "gateway-%Y%m%dT%H%M%S.json", "config-%Y%m%dT%H%M%S.tar.gz",
)  # fmt: skip
MISSING_SHOWN = 10


@dataclass(frozen=True)
class Sources:
    """What is backed up: the remediator's database, the exporter's, the gateway's state, and the configuration.

    What is None is left out. `has_heartbeats` says that the exporter's database must exist; `has_key_file` that its
    ping key is beside it.
    """

    record: str | None
    heartbeats: Path | None
    configuration: Path | None
    state: Path | None = None
    has_heartbeats: bool = False
    has_key_file: bool = True

    @classmethod
    def of(cls, inventory: Inventory, directory: Path, program: str | None) -> "Sources":
        """Return what belongs to a program, or to all. Raises BackupError if the program has nothing."""
        settings, gateway = inventory.exporter.heartbeats, inventory.gateway
        if program == "gateway" and gateway.state_file is None:
            raise BackupError("gateway.state_file is not set: the gateway stores nothing")
        for_remediator = program in (None, "remediator")
        for_gateway = program == "gateway" or (program is None and bool(gateway.upstreams))
        return cls(
            inventory.remediator.database if for_remediator else None,
            settings.database if program in (None, "exporter") else None,
            directory if for_remediator else None,
            gateway.state_file if for_gateway else None,
            inventory.has_heartbeats,
            settings.ping_key is None,
        )

    @property
    def databases(self) -> Sequence[Path]:
        record = None if self.record is None else path_of(self.record)
        return [each for each in (record, self.heartbeats, self.state) if each is not None]


@dataclass(frozen=True)
class Written:
    """The files of a backup, and those that were too old and are removed; `problems` are why it is not complete."""

    record: Backup | None
    heartbeats: HeartbeatBackup | None
    state: StateBackup | None
    configuration: ConfigArchive | None
    removed: tuple[Path, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Paths:
    """The files that are written."""

    record: Path
    heartbeats: Path
    state: Path
    configuration: Path


@translate_os_errors()
def back_up(sources: Sources, to: Path, keep: float | None = None) -> Written:
    """Write databases and the configuration to new files; in a folder, their names are the time.

    The programs may be running. Afterwards, files in the folder whose names are more than `keep` seconds old are
    removed, except the newest `MIN_KEPT` of each kind, and except those of a kind that is not complete this time.
    Raises BackupError if the remediator's database is not written.
    """
    if keep is not None and not to.is_dir():
        raise BackupError(f"there is no folder {to}; old backups are removed from a folder only")
    suffix = ".db" if sources.record is not None or sources.heartbeats is not None else ".json"
    if not to.is_dir() and to.suffix != suffix:
        raise BackupError(f"there is no folder {to}; the name of a file must end in {suffix}")
    now = time.time()
    paths = _name_files(to, now, has_record=sources.record is not None)
    for path in (paths.heartbeats, paths.state, paths.configuration):
        if path.exists():
            raise BackupError(f"{path} already exists; choose another name")
    record = None if sources.record is None else backup.back_up(sources.record, paths.record)
    heartbeats, heartbeats_problem = _back_up_heartbeats(sources, paths.heartbeats)
    state, state_problem = _back_up_state(sources, paths.state)
    configuration, problem = _back_up_configuration(sources, paths)
    complete = [
        name
        for name, is_complete in (
            (RECORD, record is not None),
            (HEARTBEATS, heartbeats is not None),
            (STATE, state is not None),
            (CONFIGURATION, configuration is not None and not problem),
        )
        if is_complete
    ]
    removed = [] if keep is None else [each for name in complete for each in _remove_older(to, name, now - keep)]
    problems = tuple(each for each in (heartbeats_problem, state_problem, problem) if each)
    return Written(record, heartbeats, state, configuration, tuple(sorted(removed)), problems)


def _name_files(to: Path, now: float, *, has_record: bool) -> _Paths:
    """Return the paths of the files. The given name is that of the record, or without one, of the program's file."""
    if to.is_dir():
        return _Paths(*(to / time.strftime(name, time.localtime(now)) for name in NAMES))
    heartbeats = to.with_suffix(".heartbeats.db") if has_record else to
    state = to.with_suffix(".gateway.json") if has_record else to
    return _Paths(to, heartbeats, state, to.with_suffix(".config.tar.gz"))


def _back_up_heartbeats(sources: Sources, path: Path) -> tuple[HeartbeatBackup | None, str]:
    """Return the backup of the exporter's database, if there is one, and why it could not be written."""
    database = sources.heartbeats
    if database is None:
        return None, ""
    try:
        if not database.exists():
            where = "the exporter has not created it, or runs on another machine: then use --for remediator here"
            return None, f"there is no database of heartbeats {database}; {where}" if sources.has_heartbeats else ""
        return heartbeat_backup.back_up(database, path, has_key_file=sources.has_key_file), ""
    except PermissionError:  # of a folder that others may not read
        reason = f"{database} cannot be read"
        is_expected = not sources.has_heartbeats
    except DefibError as error:
        reason, is_expected = str(error), False
    fix = "run the command as root, or as the exporter's user with --for exporter"
    return None, "" if is_expected else f"the heartbeats were not backed up: {reason}; {fix}"


def _back_up_state(sources: Sources, path: Path) -> tuple[StateBackup | None, str]:
    """Return the backup of the gateway's state, if it has one, and why it could not be written."""
    if sources.state is None:
        return None, ""
    try:
        if not sources.state.exists():
            where = "the gateway has not created it, or runs on another machine: then use --for remediator here"
            return None, f"there is no state of the gateway {sources.state}; {where}"
        return gateway_backup.back_up(sources.state, path), ""
    except PermissionError:  # of a folder that others may not read
        reason = f"{sources.state} cannot be read"
    except DefibError as error:
        reason = str(error)
    fix = "run the command as root, or as the gateway's user with --for gateway"
    return None, f"the gateway's state was not backed up: {reason}; {fix}"


def _back_up_configuration(sources: Sources, paths: _Paths) -> tuple[ConfigArchive | None, str]:
    """Return the archive, if it could be written, and why it is not complete."""
    path = paths.configuration
    if sources.configuration is None:
        return None, ""
    try:
        written = config_archive.archive(sources.configuration, path, _leave_out(sources, paths))
    except BackupError as error:
        return None, str(error)
    if not written.missing:
        return written, ""
    shown = list(written.missing[:MISSING_SHOWN])
    if len(written.missing) > MISSING_SHOWN:
        shown.append(f"{len(written.missing) - MISSING_SHOWN} more")
    return written, f"{path} lacks what cannot be read ({'; '.join(shown)}): run the command as a user who can, or root"


def _leave_out(sources: Sources, paths: _Paths) -> Callable[[Path], bool]:
    """Return a function that finds the files of the databases, which have backups of their own, and earlier backups."""
    databases, folder = [path.resolve() for path in sources.databases], paths.record.parent.resolve()
    written = (paths.record, paths.heartbeats, paths.state, paths.configuration)
    names = {each.name for each in written} | {PART, config_archive.PART}

    def is_left_out(path: Path) -> bool:
        parent = path.parent.resolve()
        if any(parent == each.parent and path.name.startswith(each.name) for each in databases):
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

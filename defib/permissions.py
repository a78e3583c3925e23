"""Files that users other than their owner can read or change, although they hold keys, secrets or configuration."""

import grp
import os
import pwd
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fleet.inventory.loading import LoadedInventory

_DATA = ("database", "state_file")  # keys of files that Defib's own accounts write
SERVICE_ACCOUNTS = range(1, 1000)  # user IDs of accounts that are no people, as in Debian's login.defs


@dataclass(frozen=True)
class Exposure:
    """What is wrong with the permissions of a file, and how to fix it; `severe` if every user can make use of it."""

    path: Path
    detail: str
    fix: str
    severe: bool = True


def find_exposures(loaded: LoadedInventory) -> list[Exposure]:
    """Check the files of the configuration, the secrets in it, and the keys and other files that it names."""
    named = set(_find_paths(loaded.inventory))
    keys = {path for name, path in named if name == "key_file"}
    data = {path for name, path in named if name in _DATA}
    contents = {path for name, path in named if name != "key_file"} - data | set(loaded.files)
    # What systemd reads for `${NAME}`.
    programs = ("exporter", "remediator", "gateway")
    variables = {path.parent / f"{program}.env" for path in loaded.files for program in programs}
    found = [
        *map(check_key, sorted(keys)),
        *map(check_secret, sorted(loaded.secret_files | variables)),
        *map(check_content, sorted(contents)),
        *map(check_data, sorted(data)),
    ]
    return [each for each in found if each is not None]


def check_key(path: Path) -> Exposure | None:
    """Check a private key, as strictly as ssh does; a key of root may be readable by a group."""
    status = _stat(path)
    if status is None:
        return None
    mode = stat.S_IMODE(status.st_mode)
    if mode & (0o037 if status.st_uid == 0 else 0o077):
        return Exposure(path, f"other users can read it ({mode:o})", f"chmod 600 {path}")
    return _check_writers(path, service_accounts=False)


def check_secret(path: Path) -> Exposure | None:
    """Check the file of a secret: not everybody may read it."""
    status = _stat(path)
    if status is None:
        return None
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o004 and all(_others_may_enter(folder) for folder in path.resolve().parents):
        return Exposure(path, f"every user can read this secret ({mode:o})", f"chmod o-rwx {path}")
    return _check_writers(path, service_accounts=False)


def check_content(path: Path) -> Exposure | None:
    """Check a file or directory that Defib obeys, such as known_hosts: other users and Defib's own cannot change it."""
    return _check_writers(path, service_accounts=True) if _stat(path) is not None else None


def check_data(path: Path) -> Exposure | None:
    """Check a file that a program of Defib writes: no other users can change it."""
    return _check_writers(path, service_accounts=False) if _stat(path) is not None else None


def _check_writers(path: Path, *, service_accounts: bool) -> Exposure | None:
    real = path.resolve()
    for place in (real, *real.parents):
        status = _stat(place)
        if status is None:
            return None
        what = "it" if place == real else str(place)
        mode, name = status.st_mode, _user_name(status.st_uid)
        # In a sticky directory, users can replace their own files only.
        if mode & stat.S_IWOTH and not (mode & stat.S_ISVTX and place != real):
            return Exposure(path, f"every user can change {what} ({stat.S_IMODE(mode):o})", f"chmod o-w {place}")
        if mode & stat.S_IWGRP and not _is_private_group(status.st_uid, status.st_gid):
            detail = f"the group {_group_name(status.st_gid)} can change {what} ({stat.S_IMODE(mode):o})"
            return Exposure(path, detail, f"chmod g-w {place}", severe=False)
        if service_accounts and status.st_uid in SERVICE_ACCOUNTS and place in (real, real.parent):
            detail = f"the service account {name} can change {what}"
            return Exposure(path, detail, f"chown root {place}", severe=False)
    return None


def _find_paths(value: Any, name: str = "") -> Iterator[tuple[str, Path]]:
    """Yield every path in a model, with the name of its key."""
    if isinstance(value, Path):
        yield name, value
    elif isinstance(value, BaseModel):
        for key, item in value:
            yield from _find_paths(item, key)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _find_paths(item, name)
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for item in value:
            yield from _find_paths(item, name)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None  # another check reports it, where it is needed


def _others_may_enter(folder: Path) -> bool:
    status = _stat(folder)
    return status is not None and bool(status.st_mode & stat.S_IXOTH)


def _is_private_group(user: int, group: int) -> bool:
    """Return whether a group has one member, as the first group of a person has on most systems."""
    try:
        return group == pwd.getpwuid(user).pw_gid
    except KeyError:
        return group == user  # in a container


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _group_name(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)

"""An archive of the configuration directory: a compressed tar file, whose names are relative to the directory."""

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.database_files import BackupError
from runtime.files import sync

SIZE_LIMIT = 100 * 2**20  # bytes of the archive before it is compressed
PART = ".config.tar.gz.part"  # always the same name, so that a later backup removes an incomplete file


@dataclass(frozen=True)
class ConfigArchive:
    """A written archive: its size in bytes, how many files and links it has, and what could not be read, and why."""

    path: Path
    size: int
    files: int
    missing: tuple[str, ...] = ()


def archive(directory: Path, path: Path, is_left_out: Callable[[Path], bool]) -> ConfigArchive:
    """Write what is in a directory to a new file, with owners and modes; nobody else may read it.

    Links are stored as links, and never followed. Sockets, named pipes and devices are left out, as is everything
    that `is_left_out` says. What cannot be read is in `missing`. Raises BackupError.
    """
    part = path.with_name(PART)
    missing: list[str] = []
    try:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with (
            os.fdopen(descriptor, "wb") as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            files = sum(_add(tar, directory, each, missing) for each in _walk(directory, is_left_out, missing))
        sync(part)
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        raise BackupError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return ConfigArchive(path, path.stat().st_size, files, tuple(missing))


def _walk(directory: Path, is_left_out: Callable[[Path], bool], missing: list[str]) -> Iterator[Path]:
    """Yield everything below a directory, in the order of names, without following links."""
    left = [directory]
    while left:
        path = left.pop()
        if path != directory:
            yield path
        try:
            # The directory itself may be a link.
            if path.is_dir() if path == directory else stat.S_ISDIR(path.lstat().st_mode):
                inside = [each for each in path.iterdir() if not is_left_out(each)]
                left += sorted(inside, reverse=True)
        except OSError as error:
            missing.append(_describe(directory, path, error))


def _add(tar: tarfile.TarFile, directory: Path, path: Path, missing: list[str]) -> int:
    """Add a file, link or folder to an archive; returns how many files and links that are."""
    try:
        entry = tar.gettarinfo(path, str(path.relative_to(directory)))
        if entry is None or not (entry.isreg() or entry.islnk() or entry.issym() or entry.isdir()):
            return 0
        if entry.islnk():  # the second name of a file: it is stored twice
            entry.type, entry.linkname = tarfile.REGTYPE, ""
        fits = tar.offset + entry.size <= SIZE_LIMIT
        content = _read(path, tar.offset) if entry.isreg() and fits else b""
    except OSError as error:
        missing.append(_describe(directory, path, error))
        return 0
    if not fits or tar.offset + len(content) > SIZE_LIMIT:  # it may have grown
        raise BackupError(
            f"the configuration was not backed up: {directory} has more than {SIZE_LIMIT // 2**20} MiB, which "
            f"{path.relative_to(directory)} exceeds; move what is not configuration out of that directory"
        )
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
    return int(not entry.isdir())


def _read(path: Path, used: int) -> bytes:
    """Return the content of a file, or more than the archive can take if it is larger."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(SIZE_LIMIT - used + 1)


def _describe(directory: Path, path: Path, error: OSError) -> str:
    return f"{path.relative_to(directory)}: {error.strerror}"

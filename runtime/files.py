"""Files that are on the disk as a whole, or not at all."""

import os
import secrets
from pathlib import Path


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file in place of an earlier one. Raises OSError."""
    part = _write_part(path, content, mode, None)
    try:
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def create_file(path: Path, content: bytes, mode: int = 0o600, owner: tuple[int, int] | None = None) -> None:
    """Write a new file, for a user and group. Raises OSError, and FileExistsError where there is one already.

    Of two processes that create it at the same time, one succeeds.
    """
    part = _write_part(path, content, mode, owner)
    try:
        os.link(part, path)
    finally:
        part.unlink()
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_part(path: Path, content: bytes, mode: int, owner: tuple[int, int] | None) -> Path:
    """Write a file next to `path` under another name, which nobody else may read before it has its mode and owner."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)  # whatever the umask is
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return part

"""Adding keys to known_hosts files."""

import contextlib
import fcntl
import io
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from fleet.shells.host_keys import KeyState, find_pins, known_hosts_name, parse_known_hosts
from runtime.errors import DefibError

MODE = 0o644  # the programs that read the file run as other users
LOCK_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class HostKey:
    """A key to pin for an address and a port."""

    address: str
    port: int
    key: asyncssh.SSHKey

    @property
    def line(self) -> str:
        """The line of known_hosts."""
        public = self.key.export_public_key().decode().split()
        return f"{known_hosts_name(self.address, self.port)} {public[0]} {public[1]}\n"


def add_keys(path: Path, keys: Sequence[HostKey]) -> list[KeyState]:
    """Add the keys that are still new to a file, and return the states in which they were found.

    The file is created if it does not exist. What it has is not changed, and other writers lose nothing. Raises
    DefibError.
    """
    try:
        with _open_locked(path) as file:
            text = file.read().decode("utf-8", "surrogateescape")
            known, _ = parse_known_hosts(text)
            states: list[KeyState] = []
            lines: list[str] = []
            for each in keys:
                states.append(find_pins(known, each.address, each.port).judge(each.key))
                if states[-1] == "new":
                    lines.append(each.line)
                    known.load(each.line)
            if lines:
                _append(file, ("" if not text or text.endswith("\n") else "\n") + "".join(lines))
            return states
    except FileNotFoundError as error:
        folder = path.parent
        fix = f"create it, such as with `install -d -m 755 {folder}`"
        raise DefibError(f"{path}: the directory {folder} does not exist: {fix}") from error
    except OSError as error:
        raise DefibError(f"{path}: cannot be written: {error.strerror}; run this as a user who may write it") from error
    except ValueError as error:
        raise DefibError(f"{path}: cannot be read: {error}") from error


@contextlib.contextmanager
def _open_locked(path: Path) -> Iterator[io.FileIO]:
    """Open a file to append to, locked against other runs of this command."""
    with _open(path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DefibError(f"{path}: is not a regular file: keys cannot be pinned in it")
        _lock(path, file)
        yield file


def _open(path: Path) -> io.FileIO:
    try:
        return io.FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC), "r+")
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_CREAT, MODE)
        os.fchmod(descriptor, MODE)  # whatever the umask
        return io.FileIO(descriptor, "r+")


def _lock(path: Path, file: io.FileIO) -> None:
    """Lock a file; everybody who may read it could lock it forever. Raises DefibError."""
    ends = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > ends:
                raise DefibError(f"{path}: another program has locked it for {LOCK_TIMEOUT:g} s: try again") from None
            time.sleep(0.05)


def _append(file: io.FileIO, text: str) -> None:
    """Append a text in one write, which readers see whole; nothing of it remains if it does not fit."""
    data, size = text.encode(), os.fstat(file.fileno()).st_size
    written = file.write(data)
    if written != len(data):
        os.ftruncate(file.fileno(), size)
        raise OSError(28, "No space left on device")
    os.fsync(file.fileno())

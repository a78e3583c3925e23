"""What was sent in the last minute, in a file that a killed process leaves complete.

The file is mapped into memory: what is written there survives the process, without a system call for each request.
After a header, it has slots of fixed size, one for each request: the upstream, when it was sent, tokens, client.
"""

import fcntl
import hashlib
import math
import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from gateway.window import MARGIN, SPAN
from runtime.clock import boot_id
from runtime.errors import StartError

MAGIC = b"defib-sent-2"
FIRST_SLOTS = 1024
KEPT = SPAN + MARGIN  # seconds
_HEADER = struct.Struct("<16s40sd")  # magic, ID of the boot, Unix time minus monotonic time
_SLOT = struct.Struct("<16sdd64s")  # upstream, when it was sent (0: free, infinity: not known yet), tokens, client
log = structlog.get_logger()


@dataclass(frozen=True)
class SentRequest:
    """A request that an earlier process has sent, at a time of this process' clock."""

    at: float
    tokens: float
    client: str


def key_of(url: str, api_key: str) -> bytes:
    """Return what identifies an upstream: what its limits belong to, and not its name, which may change."""
    return hashlib.sha256(f"{url}\0{api_key}".encode()).digest()[:16]


class SentFile:
    """The file with the requests of all upstreams. One process owns it."""

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        """Open or create the file. Raises StartError."""
        self._now = now
        self._file = open_locked(path)
        try:
            self._map = _map(self._file, path)
        except BaseException:
            os.close(self._file)
            raise
        self._free: list[int] = []
        self._used: deque[tuple[float, int]] = deque()  # when, and the slot; by time
        self._earlier: dict[bytes, list[SentRequest]] = {}
        self._is_full = False
        self._read()

    def _read(self) -> None:
        """Read what an earlier process has sent. Of what it was sending, it is unknown when it arrived."""
        magic, boot, offset = _HEADER.unpack_from(self._map)
        now = self._now()
        is_ours = magic.rstrip(b"\0") == MAGIC
        own_boot = boot_id().encode()[:40]
        shift = 0.0 if boot.rstrip(b"\0") == own_boot else offset - (time.time() - now)
        _HEADER.pack_into(self._map, 0, MAGIC, own_boot, time.time() - now)
        for slot in range(self._count_slots()):
            key, at, tokens, client = _SLOT.unpack_from(self._map, _offset(slot))
            at = min(at + shift, now) if is_ours and at > 0 else 0.0
            if at + KEPT > now and at > 0:
                name = client.rstrip(b"\0").decode("ascii", "replace")
                self._earlier.setdefault(key, []).append(SentRequest(at, tokens, name))
                self.mark_sent(slot, key, at, tokens, client)
            else:
                self.cancel(slot)
        self._used = deque(sorted(self._used))

    def take_earlier(self, key: bytes) -> Sequence[SentRequest]:
        """Return what earlier processes have sent to an upstream in the last minute, by time; only once."""
        return sorted(self._earlier.pop(key, []), key=lambda request: request.at)

    def begin(self, key: bytes, tokens: float, client: bytes) -> int | None:
        """Note a request that is about to be sent, and return its slot, None if the disk is full."""
        now = self._now()
        while self._used and self._used[0][0] + KEPT < now:
            self._free.append(self._used.popleft()[1])
        if not self._free:
            self._grow()
        if not self._free:
            return None
        slot = self._free.pop()
        self._write(slot, key, math.inf, tokens, client)
        return slot

    def _grow(self) -> None:
        slots = self._count_slots()
        size = _offset(2 * slots)
        try:
            _allocate(self._file, size)
        except OSError as error:
            if not self._is_full:
                effect = "requests are sent; if the gateway is killed, the rate may be exceeded for a minute"
                log.error("sent_not_stored", error=error.strerror, effect=effect)  # noqa: TRY400 - no crash
            self._is_full = True
            return
        self._is_full = False
        self._map.resize(size)
        self._free.extend(range(slots, 2 * slots))

    def mark_sent(self, slot: int, key: bytes, at: float, tokens: float, client: bytes) -> None:
        self._write(slot, key, at, tokens, client)
        self._used.append((at, slot))

    def cancel(self, slot: int) -> None:
        """Remove a request that was not sent."""
        self._write(slot, b"", 0.0, 0.0, b"")
        self._free.append(slot)

    def _write(self, slot: int, key: bytes, at: float, tokens: float, client: bytes) -> None:
        _SLOT.pack_into(self._map, _offset(slot), key, at, tokens, client)

    def _count_slots(self) -> int:
        return (len(self._map) - _HEADER.size) // _SLOT.size

    def close(self) -> None:
        self._map.close()
        os.close(self._file)


def _offset(slot: int) -> int:
    return _HEADER.size + slot * _SLOT.size


def open_locked(path: Path) -> int:
    """Open or create the file for one process alone, and return its descriptor. Raises StartError."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StartError(f"gateway.state_file: cannot write {path}: {_explain(error, path)}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise StartError(f"gateway.state_file: another gateway uses {path}") from error
    return file


def _explain(error: OSError, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no folder {path.parent}; create it for the gateway's user"
    return str(error.strerror)


def _allocate(file: int, size: int) -> None:
    """Give a file its size on the disk: writing to a hole of a full one would end the process."""
    os.posix_fallocate(file, 0, size)


def _map(file: int, path: Path) -> mmap.mmap:
    try:
        size = max(os.fstat(file).st_size, _offset(FIRST_SLOTS))
        _allocate(file, size)
        return mmap.mmap(file, size)
    except OSError as error:
        raise StartError(f"gateway.state_file: cannot write {path}: {error.strerror}") from error


class Ledger:
    """The part of one upstream; without a file, nothing is remembered."""

    def __init__(self, file: SentFile | None = None, key: bytes = b"") -> None:
        self._file, self._key = file, key

    def take_earlier(self) -> Sequence[SentRequest]:
        return self._file.take_earlier(self._key) if self._file is not None else ()

    def begin(self, tokens: float, client: str) -> "Record":
        """Note a request of a client that is about to be sent."""
        name = client.encode()
        slot = self._file.begin(self._key, tokens, name) if self._file is not None else None
        return Record(self._file, slot, self._key, tokens, name)


@dataclass(frozen=True, slots=True)
class Record:
    """A request in the file, if it has a slot there."""

    _file: SentFile | None
    _slot: int | None
    _key: bytes
    _tokens: float
    _client: bytes

    def mark_sent(self, at: float) -> None:
        if self._file is not None and self._slot is not None:
            self._file.mark_sent(self._slot, self._key, at, self._tokens, self._client)

    def cancel(self) -> None:
        if self._file is not None and self._slot is not None:
            self._file.cancel(self._slot)

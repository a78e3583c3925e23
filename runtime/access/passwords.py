"""Passwords of the web configuration's users, checked in threads of their own."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import bcrypt

from runtime.access.throttle import Throttle, ThrottledError
from runtime.addresses import group_address

THREADS = 2
MAX_WAITING = 16  # checks that wait for a thread
BUSY_WAIT = 2.0  # seconds after which to try again while that many wait
BCRYPT_LIMIT = 72  # bytes of a password that bcrypt reads
CACHED_LOGINS = 1000
_NO_USER_HASH = bcrypt.hashpw(b"", bcrypt.gensalt(4)).decode()


class Passwords:
    """Checks passwords, slowly on purpose; failed attempts are throttled. `hashes` returns the users' bcrypt hashes."""

    def __init__(self, hashes: Callable[[], Mapping[str, str]], throttle: Throttle) -> None:
        self._hashes, self._throttle = hashes, throttle
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="password")
        self._waiting = 0
        self._accepted: dict[tuple[str, str], bytes] = {}  # by user and address

    async def check(self, user: str, password: str, address: str) -> bool:
        """Whether the password is the user's. Raises ThrottledError."""
        hashes = self._hashes()
        # All take as long as the user whose hash takes the longest: otherwise the time would tell which users exist.
        slowest = max(hashes.values(), key=_cost, default=_NO_USER_HASH)
        hashed = hashes.get(user) or slowest
        # Requests that bring a password each time are not slowed down: a digest of the last accepted login of a user at
        # an address is cached. It passes while other attempts are refused, so these must count there, and elsewhere the
        # right password must be refused, too: else the answers would tell which one is right.
        place = user, group_address(address)
        login = hashlib.sha256(b"\0".join(each.encode() for each in (hashed, user, password))).digest()
        self._throttle.check_pair(user, address)
        if self._accepted.get(place) == login:
            return True
        if self._waiting >= MAX_WAITING:
            raise ThrottledError(BUSY_WAIT)
        try:
            attempt = self._throttle.begin(user, address)
        except ThrottledError:
            if place in self._accepted:
                self._throttle.count_refused(user, address)
            raise
        self._waiting += 1
        try:
            is_correct = await asyncio.get_running_loop().run_in_executor(
                self._threads, _check_slowly, password.encode()[:BCRYPT_LIMIT], hashed, _cost(slowest)
            )
        finally:
            self._waiting -= 1
        if not is_correct or self._hashes().get(user) != hashed:
            return False
        attempt.succeed()
        if len(self._accepted) >= CACHED_LOGINS:
            self._accepted.clear()
        self._accepted[place] = login
        return True

    def credential_of(self, user: str) -> str | None:
        """Return a digest of the user's password hash, which changes with the password; None for an unknown user."""
        hashed = self._hashes().get(user)
        return None if hashed is None else hashlib.sha256(hashed.encode()).hexdigest()


def _check_slowly(password: bytes, hashed: str, cost: int) -> bool:
    """Whether a password has this hash, found in the time that a hash of `cost` takes: each step doubles it."""
    is_correct = bcrypt.checkpw(password, hashed.encode())
    for more in range(_cost(hashed), cost):
        bcrypt.hashpw(b"", f"$2b${more:02}${_NO_USER_HASH[7:29]}".encode())
    return is_correct


def _cost(hashed: str) -> int:
    return int(hashed[4:6])  # of `$2y$10$…`

"""Throttling of failed sign-ins: per user and address, per user, and per address."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from runtime.addresses import group_address

FIRST_DELAY, MAX_DELAY = 5.0, 300.0  # seconds between attempts
FORGET_AFTER = 900.0  # seconds without an attempt
MAX_KEYS, MAX_NAME = 10_000, 100

Key = tuple[str, ...]


@dataclass(frozen=True)
class Limit:
    """After `free` failures, the next attempts must wait 5, 10, 20 … seconds."""

    free: int
    max_delay: float = MAX_DELAY


PAIR = Limit(5)
# One address may be a network's, and many addresses may guess for one user. These limits are wider, and a user's delays
# are short, so that nobody can lock somebody else out.
ADDRESS = Limit(30)
USER = Limit(50, max_delay=5.0)


class ThrottledError(Exception):
    """Too many failed attempts; the next one is possible after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"try again in {math.ceil(seconds)} s")
        self.seconds = seconds

    @property
    def retry_after(self) -> str:
        """The value of the header Retry-After."""
        return str(max(1, math.ceil(self.seconds)))


@dataclass
class _Failures:
    count: int = 0
    not_before: float = 0.0
    last: float = 0.0


@dataclass
class Attempt:
    """An attempt, which counts as failed until it succeeds, so that parallel ones are limited, too."""

    failures: dict[Key, tuple[_Failures, float]]  # with the `not_before` that each had

    def succeed(self) -> None:
        """Forget the failures of this user at this address, and take the attempt back from the other counters."""
        for key, (failures, previous) in self.failures.items():
            failures.count = 0 if key[0] == "pair" else max(0, failures.count - 1)
            failures.not_before = previous


class Throttle:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._failures: OrderedDict[Key, _Failures] = OrderedDict()

    def check_pair(self, user: str, address: str) -> None:
        """Raise ThrottledError while this user must wait at this address."""
        found = self._failures.get(_keys(user, address)[0][0])
        if found is not None and found.not_before > self._now():
            raise ThrottledError(found.not_before - self._now())

    def begin(self, user: str, address: str) -> Attempt:
        """Count an attempt. Raises ThrottledError."""
        now = self._now()
        keys = _keys(user, address)
        # A refused attempt adds nothing, or it could push out the counters of others.
        wait = max(self._failures[key].not_before - now if key in self._failures else 0.0 for key, _ in keys)
        if wait > 0:
            raise ThrottledError(wait)
        found = [(key, limit, self._find(key)) for key, limit in keys]
        attempt = Attempt({key: (failures, failures.not_before) for key, _, failures in found})
        for _, limit, failures in found:
            _count(failures, limit, now)
        return attempt

    def count_refused(self, user: str, address: str) -> None:
        """Count an attempt that was refused, for this user at this address only."""
        key, limit = _keys(user, address)[0]
        _count(self._find(key), limit, self._now())

    def _find(self, key: Key) -> _Failures:
        found = self._failures.setdefault(key, _Failures())
        self._failures.move_to_end(key)
        if len(self._failures) > MAX_KEYS:
            self._failures.popitem(last=False)
        return found


def _count(failures: _Failures, limit: Limit, now: float) -> None:
    if now - failures.last > FORGET_AFTER:
        failures.count = 0
    failures.count += 1
    failures.last = now
    if failures.count >= limit.free:
        delay = FIRST_DELAY * 2.0 ** min(failures.count - limit.free, 30)
        failures.not_before = now + min(limit.max_delay, delay)


def _keys(user: str, address: str) -> list[tuple[Key, Limit]]:
    user, network = user[:MAX_NAME], group_address(address)
    return [(("pair", user, network), PAIR), (("address", network), ADDRESS), (("user", user), USER)]

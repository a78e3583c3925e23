"""When a probe or collector runs next. All times are seconds of the event loop's clock."""

import hashlib
import random
from dataclasses import dataclass

FIRST_WITHIN = 60.0
PHASE_SPAN = 86400.0  # seconds
JITTER = 0.05
JITTER_LIMIT = 1.0


def phase_offset(key: str) -> float:
    """Return a fraction of the interval, in [0, 1), that depends on `key` alone and so survives restarts."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) / 2**32


@dataclass(frozen=True, slots=True)
class Schedule:
    """Due times: `anchor + n × every` while the service is stable, otherwise every `retry_every`."""

    anchor: float
    every: float
    retry_every: float

    @classmethod
    def for_key(cls, key: str, every: float, retry_every: float) -> "Schedule":
        """Return the schedule of `key`, which is the same after a restart.

        Equal keys give the same due times, as far as their intervals are multiples of each other.
        """
        return cls(phase_offset(key) * PHASE_SPAN % every, every, retry_every)

    def first_due(self, now: float) -> float:
        """Return the first due time after a start or a suspension: on schedule, but at most a minute from now."""
        turns = (now - self.anchor) // self.every + 1
        return min(self.anchor + turns * self.every, now + self.anchor / self.every * FIRST_WITHIN)

    def next_due(self, due: float, now: float, *, stable: bool) -> tuple[float, int]:
        """Return the due time after a probe that was due at `due` and ended at `now`, and how many were missed.

        Missed probes are not made up for, so that a resumed machine does not start a burst.
        """
        if not stable:
            interval = min(self.retry_every, self.every)
            if now <= due + interval:
                return due + interval, 0
            # A probe that takes longer than its interval is followed by a pause, to spare an overloaded service.
            return now + interval, int((now - due) / interval)
        turns = int((max(now, due) - self.anchor) // self.every)
        next_due = self.anchor + (turns + 1) * self.every
        return next_due, max(0, int((next_due - due) / self.every + 1e-9) - 1)


def add_jitter(due: float, every: float, randomness: random.Random) -> float:
    """Return `due` plus a random delay of up to 5 % of the interval and 1 s, so that probes spread."""
    return due + randomness.uniform(0, min(every * JITTER, JITTER_LIMIT))

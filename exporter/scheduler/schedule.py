"""When a service is probed next. Pure; times are seconds of the event loop's clock."""

import hashlib
import random
from dataclasses import dataclass

FIRST_WITHIN = 60.0
JITTER = 0.05
JITTER_LIMIT = 1.0


def phase_offset(service: str) -> float:
    """A fraction of the interval, in [0, 1), that is the same at every start."""
    return int.from_bytes(hashlib.blake2b(service.encode(), digest_size=4).digest()) / 2**32


@dataclass(frozen=True, slots=True)
class Schedule:
    """Probes at `anchor + n × every`, and every `retry_every` while a service is failing or undecided."""

    anchor: float
    every: float
    retry_every: float

    @classmethod
    def for_key(cls, key: str, every: float, retry_every: float) -> "Schedule":
        """The schedule of all that share a key: the same whenever they were added, and after a restart."""
        return cls(phase_offset(key) * every, every, retry_every)

    def first_due(self, now: float) -> float:
        """When to begin at `now`, or to begin again after time was lost: its own time, but within a minute."""
        turns = (now - self.anchor) // self.every + 1
        return min(self.anchor + turns * self.every, now + self.anchor / self.every * FIRST_WITHIN)

    def next_due(self, due: float, now: float, *, settled: bool) -> tuple[float, int]:
        """When the next probe is due after the one of `due` ended at `now`, and how many were missed meanwhile.

        What was missed is not made up for: after a suspended machine wakes there is no burst.
        """
        if not settled:
            interval = min(self.retry_every, self.every)
            if now <= due + interval:
                return due + interval, 0
            # A probe that outlasts its interval gets a pause: hammering helps nobody who is struggling.
            return now + interval, int((now - due) / interval)
        turns = int((max(now, due) - self.anchor) // self.every)
        following = self.anchor + (turns + 1) * self.every
        return following, max(0, int((following - due) / self.every + 1e-9) - 1)


def add_jitter(due: float, every: float, randomness: random.Random) -> float:
    """A little later, so that those of one phase spread."""
    return due + randomness.uniform(0, min(every * JITTER, JITTER_LIMIT))

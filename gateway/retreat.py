"""The effective rate of an upstream: it falls while the upstream refuses requests, and then returns step by step.

Of the answers of the last minute, the share of 429 decides. One cut is followed by a whole window before the next
one, so that a bad second cuts once: answers to requests of the time before the cut say nothing about the new rate.
"""

from collections import deque
from typing import Literal

from fleet.inventory.gateway import RetreatSettings

WINDOW = 60.0  # seconds between cuts, and whose answers decide
MIN_ANSWERS = 20  # from which on the rate may fall to the floor: a few refusals show no share
State = Literal["steady", "recovering", "retreating", "floor"]
STATES: tuple[State, ...] = ("steady", "recovering", "retreating", "floor")  # the worst last


class _Answers:
    """The answers of a span of time, in parts: thousands a second need no more memory than a few."""

    def __init__(self, span: float) -> None:
        self._span, self._part = span, span / 60
        self._parts: deque[list[float]] = deque()  # start, answers, refused ones

    def add(self, now: float, *, refused: bool) -> None:
        if not self._parts or now >= self._parts[-1][0] + self._part:
            self._parts.append([now, 0, 0])
        self._parts[-1][1] += 1
        self._parts[-1][2] += refused

    def count(self, now: float) -> tuple[int, int]:
        """Return how many there were, and how many of them refused."""
        while self._parts and self._parts[0][0] <= now - self._span:
            self._parts.popleft()
        return int(sum(part[1] for part in self._parts)), int(sum(part[2] for part in self._parts))

    def clear(self) -> None:
        self._parts.clear()


class Retreat:
    """The state of one upstream. `base` is its configured rate, `rate` the effective one."""

    def __init__(self, base: float, rules: RetreatSettings, now: float) -> None:
        self.base, self.rules = base, rules
        self.rate = base
        self.state: State = "steady"
        self.cuts = 0
        self.judged = 0, 0  # how many answers led to the last change, and how many of them refused
        self._changed_at = now
        self._cut_at = float("-inf")
        self._minute, self._long = _Answers(WINDOW), _Answers(rules.recover_after)

    def note_answer(self, now: float, *, refused: bool) -> State | None:
        """Note an answer of the upstream, and return the new state if that changes the rate."""
        self._minute.add(now, refused=refused)
        self._long.add(now, refused=refused)
        if refused and now >= self._cut_at + WINDOW:
            return self._cut(now)
        if self.rate < self.base and now >= self._changed_at + self.rules.recover_after:
            return self._recover(now)
        return None

    def _cut(self, now: float) -> State | None:
        answers, refused = self._minute.count(now)
        share, self.judged = refused / answers, (answers, refused)
        floor = min(self.rules.floor, self.base)
        if share < self.rules.cut_at or self.rate <= floor:
            return None
        to_floor = share > self.rules.floor_at and answers >= MIN_ANSWERS
        self.rate = floor if to_floor else max(floor, self.rate * self.rules.factor)
        self.state = "floor" if self.rate <= floor else "retreating"
        self.cuts += 1
        self._changed_at = self._cut_at = now
        self._minute.clear()
        return self.state

    def _recover(self, now: float) -> State | None:
        answers, refused = self.judged = self._long.count(now)
        if refused / answers >= self.rules.recover_below:
            return None
        self.rate = min(self.base, self.rate + self.rules.step)
        self.state = "steady" if self.rate >= self.base else "recovering"
        self._changed_at = now
        return self.state

    def configure(self, base: float, rules: RetreatSettings, now: float) -> None:
        """Put other settings in force. A rate that was cut stays, unless it exceeds the base rate."""
        if rules.recover_after != self.rules.recover_after:
            self._long = _Answers(rules.recover_after)
        was_cut = self.rate < self.base
        self.base, self.rules = base, rules
        self.restore(self.rate if was_cut else base, now)

    def restore(self, rate: float, now: float) -> None:
        """Continue with a rate that was learned before."""
        self.rate = min(self.base, max(rate, min(self.rules.floor, self.base)))
        self._changed_at = now
        if self.rate >= self.base:
            self.state = "steady"
        elif self.state == "steady":
            self.state = "recovering"

    def reset(self, now: float) -> None:
        """Return to the base rate."""
        self.rate, self.state = self.base, "steady"
        self._changed_at, self._cut_at = now, float("-inf")
        self._minute.clear()
        self._long.clear()

"""The requests that wait for an upstream: who is next, and who goes when there are too many.

Priorities come first. So that none of them waits for ever, a priority gets one turn before a higher one, if its oldest
request arrived before that of the higher one by the ageing time for each step between them, and it had no turn for as
long. Within a priority, clients take turns by their shares (stride scheduling), and the requests of one client are
first come, first served.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiter(Generic[T]):
    """A request that waits. `rank` is its priority, 0 the highest; `number` grows with each."""

    number: int
    rank: int
    client: str
    arrived_at: float
    item: T


@dataclass
class _Line(Generic[T]):
    """The waiters of one client and priority."""

    waiters: OrderedDict[int, Waiter[T]] = field(default_factory=OrderedDict)
    passed: float = 0.0  # turns that the client had, divided by its share

    @property
    def first(self) -> Waiter[T]:
        return next(iter(self.waiters.values()))

    @property
    def last(self) -> Waiter[T]:
        return next(reversed(self.waiters.values()))


class _Level(Generic[T]):
    """The waiters of one priority."""

    def __init__(self) -> None:
        self.lines: dict[str, _Line[T]] = {}
        self.count = 0
        self.served_at = float("-inf")
        self._passed = 0.0  # of the client that had the last turn
        self._absent: dict[str, float] = {}  # clients whose turns are ahead of that, but who have no waiters

    def add(self, waiter: Waiter[T]) -> None:
        line = self.lines.get(waiter.client)
        if line is None:  # a client that was absent has neither saved turns, nor lost what it had too many
            passed = max(self._passed, self._absent.pop(waiter.client, 0.0))
            line = self.lines[waiter.client] = _Line(passed=passed)
        line.waiters[waiter.number] = waiter
        self.count += 1

    def remove(self, waiter: Waiter[T]) -> bool:
        line = self.lines.get(waiter.client)
        if line is None or line.waiters.pop(waiter.number, None) is None:
            return False
        self.count -= 1
        if not line.waiters:
            del self.lines[waiter.client]
        return True

    def oldest(self) -> float:
        return min(line.first.arrived_at for line in self.lines.values())

    def next(self) -> Waiter[T]:
        return min(self.lines.values(), key=lambda line: (line.passed, line.first.number)).first

    def newest(self) -> Waiter[T]:
        return max((line.last for line in self.lines.values()), key=lambda waiter: waiter.number)

    def take(self, waiter: Waiter[T], share: float, now: float) -> None:
        """Give a waiter its turn."""
        line = self.lines[waiter.client]
        self._passed = line.passed
        line.passed += 1 / share
        self.served_at = now
        self.remove(waiter)
        if waiter.client not in self.lines:
            self._absent = {name: passed for name, passed in self._absent.items() if passed > self._passed}
            self._absent[waiter.client] = line.passed


class WaitingLine(Generic[T]):
    """All waiters of an upstream. A waiter that leaves frees its place at once."""

    def __init__(self, ranks: int, ageing: float) -> None:
        self.ageing = ageing
        self._levels: list[_Level[T]] = [_Level() for _ in range(ranks)]
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(level.count for level in self._levels)

    def __iter__(self) -> Iterator[Waiter[T]]:
        for level in self._levels:
            for line in level.lines.values():
                yield from line.waiters.values()

    def depths(self) -> list[int]:
        """Return the number of waiters of each rank."""
        return [level.count for level in self._levels]

    def count_by_client(self) -> dict[str, list[int]]:
        """Return the number of waiters of each client and rank."""
        counts: dict[str, list[int]] = {}
        for rank, level in enumerate(self._levels):
            for client, line in level.lines.items():
                counts.setdefault(client, [0] * len(self._levels))[rank] = len(line.waiters)
        return counts

    def add(self, rank: int, client: str, item: T, now: float) -> Waiter[T]:
        waiter = Waiter(next(self._numbers), rank, client, now, item)
        self._levels[rank].add(waiter)
        return waiter

    def remove(self, waiter: Waiter[T]) -> bool:
        """Remove a waiter that leaves; return whether it was there."""
        return self._levels[waiter.rank].remove(waiter)

    def next(self) -> Waiter[T] | None:
        """Return who is next."""
        waiting = [(rank, level) for rank, level in enumerate(self._levels) if level.count]
        if not waiting:
            return None
        best_rank, best = waiting[0]
        for rank, level in waiting[1:]:
            waits_since = max(level.oldest(), level.served_at)
            if waits_since + (rank - best_rank) * self.ageing < best.oldest():
                best_rank, best = rank, level
        return best.next()

    def take(self, waiter: Waiter[T], share: float, now: float) -> None:
        """Remove a waiter whose turn it is; its client has this share."""
        self._levels[waiter.rank].take(waiter, share, now)

    def find_lowest(self, below: int) -> Waiter[T] | None:
        """Return the newest waiter of the lowest priority, if that is lower than rank `below`."""
        level = next((each for each in reversed(self._levels[below + 1 :]) if each.count), None)
        return level.newest() if level is not None else None

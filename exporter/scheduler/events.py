"""The last changes of state of services, hosts and what runs on them."""

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.scheduler.cursors import Cursors

LIMIT = 10_000
SOURCE_LIMIT = 1000  # events of one host, or of one service without a host: the ring is for all of them
DETAIL_LIMIT = 300  # characters

EventKind = Literal["service", "host", "container", "unit", "program", "gpu"]


@dataclass(frozen=True, slots=True)
class Event:
    """A change of state; `at` is Unix time. `first`: the state was not known before."""

    id: int
    at: float
    kind: EventKind
    host: str
    name: str
    state: str
    detail: str
    first: bool


@dataclass(frozen=True)
class EventPage:
    """Events, oldest first, and the cursor after them. `gap`: events before them have left the ring."""

    cursor: str
    gap: bool
    events: Sequence[Event]


class EventRing:
    """Keeps the last `LIMIT` events in memory."""

    def __init__(self, cursors: Cursors) -> None:
        self._cursors = cursors
        self._events: deque[Event] = deque()
        self._of_source: Counter[str] = Counter()
        self._last = 0
        self._last_dropped = 0

    def record(
        self, at: float, kind: EventKind, host: str, name: str, state: str, detail: str = "", *, first: bool = False
    ) -> None:
        self._last += 1
        event = Event(self._last, at, kind, host, name, state, detail[:DETAIL_LIMIT], first)
        source = _source(event)
        if self._of_source[source] == SOURCE_LIMIT:
            self._thin_out(source)
        elif len(self._events) == LIMIT:
            self._drop(self._events.popleft())
        self._events.append(event)
        self._of_source[source] += 1

    def page(self, after: str | None, limit: int) -> EventPage:
        """Return up to `limit` events after a cursor, or the oldest ones without a valid cursor."""
        number = self._cursors.parse(after) if after is not None else 0
        valid = number is not None and number <= self._last
        start = number if number is not None and valid else 0
        newer = list(itertools.takewhile(lambda event: event.id > start, reversed(self._events)))
        events = newer[: -limit - 1 : -1]
        gap = after is not None and (not valid or start < self._last_dropped)
        return EventPage(self._cursors.format(events[-1].id if events else self._last), gap, events)

    def _drop(self, event: Event) -> None:
        self._last_dropped = max(self._last_dropped, event.id)
        source = _source(event)
        self._of_source[source] -= 1
        if not self._of_source[source]:
            del self._of_source[source]

    def _thin_out(self, source: str) -> None:
        """Drop the older half of a source's events: one by one, each would cost a pass through the ring."""
        events = [event for event in self._events if _source(event) == source]
        dropped = events[: len(events) // 2]
        for event in dropped:
            self._drop(event)
        ids = {event.id for event in dropped}
        self._events = deque(event for event in self._events if event.id not in ids)


def _source(event: Event) -> str:
    return event.host or event.name

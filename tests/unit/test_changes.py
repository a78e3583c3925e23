"""Cursors, the changes of services, and the ring of events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.scheduler.changes import ServiceChanges
from exporter.scheduler.cursors import Cursors
from exporter.scheduler.events import DETAIL_LIMIT, LIMIT, SOURCE_LIMIT, EventRing

RELOAD = ""


@given(st.lists(st.sampled_from(["a", "b", "c", "d", RELOAD])))
def test_a_cursor_gives_exactly_what_changed_after_it(steps: list[str]) -> None:
    changes = ServiceChanges(Cursors())
    cursors = [(0, changes.cursor)]
    for number, step in enumerate(steps, start=1):
        if step == RELOAD:
            changes.reload()
        else:
            changes.record(step)
        cursors.append((number, changes.cursor))
    for number, cursor in cursors:
        later = steps[number:]
        changed = changes.since(cursor)
        assert changed is None if RELOAD in later else sorted(changed or []) == sorted(set(later))


def test_invalid_cursors_give_everything() -> None:
    changes, others = ServiceChanges(Cursors()), ServiceChanges(Cursors())
    changes.record("a")
    others.record("a")
    process = changes.cursor.rpartition("-")[0]
    ahead = f"{process}-2"
    for cursor in (
        "",
        "x",
        others.cursor,
        ahead,
        f"{process}-",
        f"{process}-{'9' * 5000}",
        f"{process}-1\n",
        f"{process}-١",
    ):
        assert changes.since(cursor) is None, cursor
    assert changes.since(changes.cursor) == []


@pytest.fixture
def ring() -> EventRing:
    return EventRing(Cursors())


def record(ring: EventRing, count: int, *, host: str = "", detail: str = "") -> None:
    """Record events of hosts `h0`, `h1`, … or of one host."""
    for number in range(count):
        ring.record(1.8e9, "container", host or f"h{number}", "c", "down", detail)


def test_pages_give_every_event_once_and_in_order(ring: EventRing) -> None:
    record(ring, 25)
    seen: list[int] = []
    cursor = None
    while True:
        page = ring.page(cursor, 10)
        assert not page.gap
        if not page.events:
            break
        seen += [event.id for event in page.events]
        cursor = page.cursor
    assert seen == list(range(1, 26))
    record(ring, 1)
    assert [event.id for event in ring.page(cursor, 10).events] == [26]


def test_the_oldest_events_leave_the_ring(ring: EventRing) -> None:
    start = ring.page(None, 1).cursor
    record(ring, 5)
    early = ring.page(start, 5).cursor
    record(ring, LIMIT - 5)
    assert not ring.page(start, 1).gap
    record(ring, 1)
    assert ring.page(start, 1).gap
    assert not ring.page(early, 1).gap
    assert ring.page(None, 1).events[0].id == 2
    assert not ring.page(None, 1).gap


def test_a_cursor_of_another_process_has_a_gap(ring: EventRing) -> None:
    record(ring, 2)
    other = EventRing(Cursors()).page(None, 1).cursor
    for cursor in (other, "x", "", ring.page(None, 2).cursor.replace("-2", "-3")):
        page = ring.page(cursor, 10)
        assert (page.gap, len(page.events)) == (True, 2), cursor


def test_one_host_does_not_displace_the_events_of_others(ring: EventRing) -> None:
    record(ring, 100)
    record(ring, 3 * LIMIT, host="noisy")
    events = [event for number in range(100) for event in ring.page(None, LIMIT).events if event.host == f"h{number}"]
    assert len(events) == 100
    noisy = [event for event in ring.page(None, LIMIT).events if event.host == "noisy"]
    assert SOURCE_LIMIT / 2 <= len(noisy) <= SOURCE_LIMIT
    assert noisy[-1].id == 3 * LIMIT + 100


def test_details_are_cut(ring: EventRing) -> None:
    record(ring, 1, detail="x" * 5000)
    assert len(ring.page(None, 1).events[0].detail) == DETAIL_LIMIT

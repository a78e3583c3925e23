"""The sliding window: no 60 seconds ever hold more than the limit, and little of it is left unused."""

import random

from hypothesis import given
from hypothesis import strategies as st

from gateway.window import MARGIN, SPAN, Window

DELAY = st.floats(0, MARGIN, exclude_max=True)  # between sending and arrival


def largest(times: list[float], span: float = SPAN) -> int:
    """The most that any span holds: spans that end with one of the times are enough."""
    ordered = sorted(times)
    return max((sum(end - span < each <= end for each in ordered) for end in ordered), default=0)


def run(arrivals: list[float], limit: float, window: Window | None = None) -> list[float]:
    """Send requests in the order of their arrivals, each as soon as it fits; returns when."""
    window, sent, now = window or Window(), [], 0.0
    for arrival in sorted(arrivals):
        now = max(now, arrival)
        now = max(now, window.next_time(1, limit, now))
        window.mark_sent(window.reserve(1), now)
        sent.append(now)
    return sent


@given(st.lists(st.floats(0, 300), max_size=120), st.integers(1, 40), st.data())
def test_no_minute_exceeds_the_rate_as_the_upstream_receives_it(
    arrivals: list[float], limit: int, data: st.DataObject
) -> None:
    sent = run(arrivals, limit)
    delays = data.draw(st.lists(DELAY, min_size=len(sent), max_size=len(sent)))
    assert largest([at + delay for at, delay in zip(sent, delays, strict=True)]) <= limit


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(1, 40)), min_size=1, max_size=150))
def test_no_minute_exceeds_the_rate_at_its_end_while_the_rate_changes(steps: list[tuple[float, float]]) -> None:
    window, sent, now = Window(), [], 0.0
    for pause, rate in steps:
        now += pause
        if window.next_time(1, rate, now) <= now:
            window.mark_sent(window.reserve(1), now)
            sent.append(now)
            assert sum(now - SPAN < each <= now for each in sent) <= rate


@given(st.lists(st.floats(0, 200), max_size=80), st.integers(1, 40), st.floats(0, 100))
def test_a_restart_changes_nothing(arrivals: list[float], limit: int, restart: float) -> None:
    before = run([each for each in arrivals if each <= restart], limit)
    before = [each for each in before if each <= restart]
    window = Window()
    for at in before:
        window.add_sent(1, at)
    after = run([max(each, restart) for each in arrivals[len(before) :]], limit, window)
    assert largest(before + after) <= limit


def test_a_hundred_at_once_at_forty_a_minute() -> None:
    sent = run([0.0] * 100, 40)
    assert [sent.count(at) for at in sorted(set(sent))] == [40, 40, 20]
    assert largest(sent) == 40


def test_constant_load_uses_the_rate() -> None:
    generator = random.Random(1)
    arrivals = [generator.uniform(0, 3600) for _ in range(3600)]
    sent = [at for at in run(arrivals, 40) if at <= 3600]
    assert len(sent) >= 0.98 * 40 * 60
    assert largest(sent) <= 40


def test_what_is_not_yet_sent_counts_at_any_later_time() -> None:
    window = Window()
    numbers = [window.reserve(1) for _ in range(2)]
    assert window.next_time(1, 2, 0.0) == float("inf")
    window.mark_sent(numbers[0], 50.0)
    assert window.next_time(1, 2, 60.0) == 50.0 + SPAN + MARGIN
    window.cancel(numbers[1])
    assert window.next_time(1, 2, 60.0) == 60.0


def test_a_burst_smaller_than_the_rate() -> None:
    window, sent, now = Window(), [], 0.0
    for _ in range(9):
        now = max(now, window.next_time(1, 40, now), window.next_in_burst(3, 40, now))
        window.mark_sent(window.reserve(1), now)
        sent.append(now)
    assert [round(at, 2) for at in sent[::3]] == [0.0, 4.58, 9.15]
    assert largest(sent, 60 * 3 / 40) == 3


def test_the_room_in_a_burst() -> None:
    window = Window()
    for at in (0.0, 1.0):
        window.add_sent(1, at)
    assert window.room_in_burst(3, 40, 1.0) == 1
    number = window.reserve(1)
    assert window.room_in_burst(3, 40, 1.0) == 0
    window.mark_sent(number, 2.0)
    assert [window.room_in_burst(3, 40, at) for at in (4.5, 4.6, 5.6, 6.6)] == [0, 1, 2, 3]


def test_amounts_are_corrected_while_the_window_has_them() -> None:
    window = Window()
    number = window.reserve(100)
    window.mark_sent(number, 0.0)
    assert window.next_time(1, 100, 1.0) == 61.0
    window.correct(number, 60)
    assert window.used(1.0) == 60
    assert window.next_time(40, 100, 1.0) == 1.0
    assert window.next_time(41, 100, 1.0) == 61.0
    window.correct(number, 500)
    assert window.used(61.0) == 0
    window.correct(number, 1)
    assert window.used(61.0) == 0


def test_an_amount_above_the_limit_waits_for_an_empty_window() -> None:
    window = Window()
    window.add_sent(1, 0.0)
    assert window.next_time(1000, 100, 1.0) == 61.0
    assert window.next_time(1000, 100, 61.0) == 61.0

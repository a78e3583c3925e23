import random

from hypothesis import given
from hypothesis import strategies as st

from exporter.scheduler.collector_scheduler import retry_pause
from exporter.scheduler.schedule import Schedule, add_jitter, phase_offset

EVERY = st.floats(0.5, 7200)


@given(st.text(st.characters(codec="utf-8"), min_size=1), EVERY)
def test_the_first_probe_is_due_within_a_minute_and_at_a_stable_phase(service: str, every: float) -> None:
    schedule = Schedule.for_key(service, every, every)
    for now in (0.0, 1000.0, 12345.6):
        first = schedule.first_due(now)
        assert 0 <= first - now <= min(every, 60) + 1e-6
        following, _ = schedule.next_due(first, first, stable=True)
        turns = (following - schedule.anchor) / every
        assert abs(turns - round(turns)) < 1e-6


def test_equal_keys_are_due_together_whenever_they_were_added() -> None:
    one, other = Schedule.for_key("host", 15.0, 15.0), Schedule.for_key("host", 30.0, 15.0)
    first = one.first_due(100.0)
    assert abs((one.first_due(107.0) - first) % 15.0) < 1e-6
    assert 0 <= other.first_due(100.0) - 100.0 <= 30.0
    assert abs(other.anchor % 15.0 - one.anchor) < 1e-6  # each second time


def test_phases_are_spread() -> None:
    phases = sorted(phase_offset(f"service-{number}") for number in range(1000))
    tenths = [sum(1 for phase in phases if tenth / 10 <= phase < (tenth + 1) / 10) for tenth in range(10)]
    assert min(tenths) > 70


@given(EVERY, st.floats(0, 1e6), st.floats(0, 1e5))
def test_next_due_is_on_schedule_and_missed_probes_are_skipped(every: float, anchor: float, late: float) -> None:
    schedule = Schedule(anchor, every, every)
    due, missed = schedule.next_due(anchor, anchor + late, stable=True)
    now = anchor + late
    assert now - 1e-6 * now < due <= now + every * (1 + 1e-6)
    assert missed <= late / every + 1
    assert (missed > 0) <= (late >= every)


def test_a_failing_service_is_retried_and_then_back_on_schedule() -> None:
    schedule = Schedule(10.0, 60.0, 5.0)
    assert schedule.next_due(10.0, 10.2, stable=False) == (15.0, 0)
    assert schedule.next_due(15.0, 15.2, stable=True) == (70.0, 0)


def test_a_probe_longer_than_its_interval_is_followed_by_a_pause() -> None:
    schedule = Schedule(0.0, 60.0, 5.0)
    assert schedule.next_due(0.0, 12.0, stable=False) == (17.0, 2)


def test_no_burst_after_a_suspension() -> None:
    schedule = Schedule(0.0, 10.0, 5.0)
    due, missed = schedule.next_due(20.0, 3601.0, stable=True)
    assert (due, missed) == (3610.0, 358)


@given(EVERY, st.integers())
def test_jitter_is_small_and_never_early(every: float, seed: int) -> None:
    assert 0 <= add_jitter(100.0, every, random.Random(seed)) - 100.0 <= min(every * 0.05, 1.0) + 1e-9


@given(EVERY)
def test_a_failed_collector_is_run_again_soon_and_then_ever_more_rarely(every: float) -> None:
    pauses = [retry_pause(every, failed) for failed in range(1, 20)]
    assert pauses[0] == min(every, 30)
    assert pauses == sorted(pauses)
    assert pauses[-1] <= 600

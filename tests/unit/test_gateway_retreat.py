"""How the rate follows refusals, and when a failing upstream gets no requests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.inventory.gateway import RetreatSettings
from gateway.breaker import FAILURES, OPEN_FOR, Breaker
from gateway.retreat import Retreat


def retreat(base: float = 40.0) -> Retreat:
    return Retreat(base, RetreatSettings(), 0.0)


def answer(state: Retreat, now: float, ok: int, refused: int = 0) -> None:
    for _ in range(ok):
        state.note_answer(now, refused=False)
    for _ in range(refused):
        state.note_answer(now, refused=True)


def test_a_bad_second_cuts_once() -> None:
    state, rates = retreat(), []
    for minute in range(12):
        for number in range(8):
            state.note_answer(minute * 61 + number / 8, refused=True)
        rates.append(round(state.rate, 2))
    assert rates[:4] == [30.0, 22.5, 16.88, 12.66]
    assert rates[-1] == min(rates) == 5.0
    assert state.state == "floor"


@pytest.mark.parametrize(
    ("ok", "refused", "rate"), [(100, 0, 40.0), (96, 4, 40.0), (95, 5, 30.0), (32, 8, 30.0), (10, 5, 30.0)]
)
def test_the_share_of_refusals_decides(ok: int, refused: int, rate: float) -> None:
    state = retreat()
    answer(state, 1.0, ok)
    answer(state, 2.0, 0, refused)
    assert state.rate == rate


def test_many_refusals_lead_to_the_floor() -> None:
    state = retreat()
    answer(state, 1.0, 30, 2)
    assert (state.rate, state.state) == (30.0, "retreating")
    answer(state, 30.0, 0, 30)
    assert state.rate == 30.0
    answer(state, 61.0, 0, 20)
    assert (state.rate, state.state, state.cuts) == (5.0, "floor", 2)


def test_recovery_needs_clean_traffic() -> None:
    state = retreat()
    answer(state, 0.0, 0, 1)
    assert state.rate == 30.0
    answer(state, 119.0, 10)
    assert state.rate == 30.0
    answer(state, 120.0, 1)
    assert (state.rate, state.state) == (32.0, "recovering")
    answer(state, 200.0, 50)
    assert state.rate == 32.0
    answer(state, 240.0, 1)
    assert state.rate == 34.0
    answer(state, 86_400.0, 1)  # after a day without traffic
    assert state.rate == 36.0
    for minute in range(1, 10):
        answer(state, 86_400.0 + minute * 120, 1)
    assert (state.rate, state.state) == (40.0, "steady")


def test_two_percent_of_refusals_stop_the_recovery() -> None:
    state = retreat()
    answer(state, 0.0, 0, 1)
    answer(state, 100.0, 49, 1)
    answer(state, 121.0, 0)
    state.note_answer(121.0, refused=False)
    assert state.rate == 32.0  # 1 of 51
    answer(state, 230.0, 40, 1)
    state.note_answer(241.0, refused=False)
    assert state.rate == 32.0


def test_a_reset_returns_to_the_base_rate() -> None:
    state = retreat()
    answer(state, 0.0, 0, 1)
    state.reset(1.0)
    assert (state.rate, state.state) == (40.0, "steady")
    answer(state, 2.0, 0, 1)
    assert state.rate == 30.0


def test_settings_change_while_the_rate_is_cut() -> None:
    state = retreat()
    answer(state, 0.0, 0, 1)
    state.configure(60.0, RetreatSettings(), 1.0)
    assert (state.base, state.rate, state.state) == (60.0, 30.0, "retreating")
    state.configure(20.0, RetreatSettings(), 1.0)
    assert (state.rate, state.state) == (20.0, "steady")
    state.configure(50.0, RetreatSettings.model_validate({"recover_after": "60s"}), 1.0)
    assert state.rate == 50.0
    state.restore(12.0, 2.0)
    assert (state.rate, state.state) == (12.0, "recovering")
    answer(state, 62.0, 1)
    assert state.rate == 14.0


@given(st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=300), st.floats(1, 100))
def test_the_rate_stays_between_the_floor_and_the_base(answers: list[tuple[float, bool]], base: float) -> None:
    state, now, cuts = retreat(base), 0.0, [float("-inf")]
    for pause, refused in answers:
        now += pause
        before = state.cuts
        state.note_answer(now, refused=refused)
        assert min(5.0, base) <= state.rate <= base
        if state.cuts > before:
            assert now - cuts[-1] >= 60
            cuts.append(now)


def test_repeated_failures_open_the_breaker_and_one_trial_closes_it() -> None:
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        assert not breaker.fail(0.0, trial=breaker.begin())
    assert breaker.next_time(0.0) == 0.0
    assert breaker.fail(1.0, trial=breaker.begin())
    assert breaker.next_time(2.0) == 1.0 + OPEN_FOR
    assert breaker.next_time(40.0) == 40.0
    assert breaker.begin()
    assert breaker.next_time(40.0) == float("inf")
    assert not breaker.fail(41.0, trial=False)  # of a request that was sent before
    assert breaker.fail(42.0, trial=True)
    assert breaker.next_time(43.0) == 42.0 + OPEN_FOR
    assert breaker.begin()
    breaker.abandon(trial=True)
    assert breaker.next_time(80.0) == 80.0
    breaker.begin()
    breaker.succeed()
    assert not breaker.is_open


def test_an_answer_between_failures_starts_the_count_again() -> None:
    breaker = Breaker()
    for _ in range(3):
        for _ in range(FAILURES - 1):
            assert not breaker.fail(0.0, trial=breaker.begin())
        breaker.succeed()
    assert not breaker.is_open

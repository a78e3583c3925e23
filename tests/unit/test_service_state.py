from hypothesis import given
from hypothesis import strategies as st

from exporter.results import ProbeDetails, ProbeResult
from exporter.service_state import ServiceState


def result(success: bool, at: float = 0.0) -> ProbeResult:
    return ProbeResult(success, None if success else "connect", "", at, 1.0, ProbeDetails())


def run(outcomes: list[bool], fail_after: int, recover_after: int) -> list[ServiceState]:
    state, states = ServiceState(), []
    for at, success in enumerate(outcomes):
        state = state.after_result(result(success, at), fail_after=fail_after, recover_after=recover_after)
        states.append(state)
    return states


def test_up_is_undetermined_before_enough_results() -> None:
    assert [state.up for state in run([False, True, False, False], 2, 2)] == [None, None, None, False]
    assert [state.up for state in run([True], 2, 1)] == [True]


def test_a_single_failure_does_not_bring_a_service_down() -> None:
    states = run([True, False, True, False, False, True], 2, 1)
    assert [state.up for state in states] == [True, True, True, True, False, True]
    assert states[-1].changes == 2
    assert states[-1].last_change == 6.0


def test_is_stable() -> None:
    assert [state.is_steadily_up for state in run([True, False, True], 2, 1)] == [True, False, True]


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_up_follows_the_last_sufficient_run(outcomes: list[bool], fail_after: int, recover_after: int) -> None:
    states = run(outcomes, fail_after, recover_after)
    up: bool | None = None
    changes = 0
    for index, state in enumerate(states):
        row = 1
        while row <= index and outcomes[index - row] == outcomes[index]:
            row += 1
        before = up
        if row >= (recover_after if outcomes[index] else fail_after):
            up = outcomes[index]
        changes += before is not None and up is not before
        assert (state.up, state.changes) == (up, changes)
        assert state.successes + state.failures == index + 1

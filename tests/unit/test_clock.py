"""The record's clock runs on, whatever is done to the calendar's."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine

from fleet.inventory.model import Remediation, Service
from remediator.policy.decisions import decide
from remediator.policy.situation import Observation, Past, Present, Situation
from remediator.record import clock
from remediator.record.clock import SteadyClock
from remediator.record.schema import metadata
from tests.unit.test_policy import _services

HOUR = 3600.0


@pytest.fixture
def connection() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.begin() as made:
        metadata.create_all(made)
        yield made
    engine.dispose()


def test_it_begins_as_unix_time_and_goes_on_in_the_same_run_of_the_machine(connection: Connection) -> None:
    offset = clock.resume(connection, "boot-1", running=100.0, calendar=1_000_000.0)
    assert SteadyClock(offset, lambda: 100.0).now() == 1_000_000.0
    # An hour is taken off the calendar while we do not run, of which ten seconds have passed.
    offset = clock.resume(connection, "boot-1", running=110.0, calendar=1_000_010.0 - HOUR)
    assert SteadyClock(offset, lambda: 110.0).now() == 1_000_010.0


def test_after_the_machine_s_next_start_the_calendar_says_how_long_it_was_off(connection: Connection) -> None:
    clock.resume(connection, "boot-1", running=100.0, calendar=1_000_000.0)
    clock.store(connection, now=1_000_060.0, running=160.0, calendar=1_000_060.0)
    offset = clock.resume(connection, "boot-2", running=5.0, calendar=1_000_360.0)
    assert SteadyClock(offset, lambda: 5.0).now() == 1_000_360.0
    clock.store(connection, now=1_000_360.0, running=5.0, calendar=1_000_360.0)
    offset = clock.resume(connection, "boot-3", running=5.0, calendar=1_000_360.0 - HOUR)
    assert SteadyClock(offset, lambda: 5.0).now() == 1_000_360.0  # it never goes back


def test_what_happened_is_told_by_the_calendar_as_it_is_now() -> None:
    calendar = [1_000_000.0]
    made = SteadyClock(0.0, lambda: 500.0, lambda: calendar[0])
    assert made.unix(440.0) == 999_940.0
    calendar[0] += HOUR  # it was wrong, and was set right
    assert made.unix(440.0) == 999_940.0 + HOUR


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return _services(tmp_path_factory.mktemp("config"))["web"]


@given(jump=st.floats(-1e6, 1e6), elapsed=st.floats(0, 1000))
def test_a_calendar_that_jumps_neither_skips_nor_stretches_a_back_off(
    web: Service, jump: float, elapsed: float
) -> None:
    running, calendar = [1000.0], [2e9]
    made = SteadyClock(0.0, lambda: running[0], lambda: calendar[0])
    ended = made.now()
    calendar[0] += jump + elapsed
    running[0] += elapsed
    past = Past({"restart": 1}, tries=1, last_ended=ended)
    down = Observation(up=False, success=False, reason="connect")
    decision = decide(web, Remediation(), Situation(made.now(), frozenset({"ServiceDown"}), past, Present(), down))
    assert (decision.reason == "backing-off") is (running[0] - 1000.0 < 60.0)

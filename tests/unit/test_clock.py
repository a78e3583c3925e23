"""The record's clock is independent of changes of the system time."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine

from fleet.inventory.model import Remediation, Service
from remediator.policy.decisions import decide
from remediator.policy.situation import ActionHistory, ActionsInProgress, Observation, Situation
from remediator.record import clock
from remediator.record.schema import metadata
from runtime.clock import SteadyClock
from tests.unit.test_policy import load_services

HOUR = 3600.0


@pytest.fixture
def connection() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.begin() as new_connection:
        metadata.create_all(new_connection)
        yield new_connection
    engine.dispose()


def test_it_starts_at_unix_time_and_continues_until_the_next_boot(connection: Connection) -> None:
    offset = clock.resume_clock(connection, "boot-1", running=100.0, calendar=1_000_000.0)
    assert SteadyClock(offset, lambda: 100.0).now() == 1_000_000.0
    # The remediator is stopped for ten seconds, in which the system time is set back by an hour.
    offset = clock.resume_clock(connection, "boot-1", running=110.0, calendar=1_000_010.0 - HOUR)
    assert SteadyClock(offset, lambda: 110.0).now() == 1_000_010.0


def test_after_a_reboot_the_system_time_shows_how_long_the_machine_was_off(connection: Connection) -> None:
    clock.resume_clock(connection, "boot-1", running=100.0, calendar=1_000_000.0)
    clock.store_clock(connection, now=1_000_060.0, running=160.0, calendar=1_000_060.0)
    offset = clock.resume_clock(connection, "boot-2", running=5.0, calendar=1_000_360.0)
    assert SteadyClock(offset, lambda: 5.0).now() == 1_000_360.0
    clock.store_clock(connection, now=1_000_360.0, running=5.0, calendar=1_000_360.0)
    offset = clock.resume_clock(connection, "boot-3", running=5.0, calendar=1_000_360.0 - HOUR)
    assert SteadyClock(offset, lambda: 5.0).now() == 1_000_360.0  # it does not go back


def test_earlier_times_are_shown_in_the_current_system_time() -> None:
    calendar = [1_000_000.0]
    steady_clock = SteadyClock(0.0, lambda: 500.0, lambda: calendar[0])
    assert steady_clock.unix(440.0) == 999_940.0
    calendar[0] += HOUR  # the system time is corrected
    assert steady_clock.unix(440.0) == 999_940.0 + HOUR


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return load_services(tmp_path_factory.mktemp("config"))["web"]


@given(jump=st.floats(-1e6, 1e6), elapsed=st.floats(0, 1000))
def test_a_jump_of_the_system_time_does_not_change_a_back_off(web: Service, jump: float, elapsed: float) -> None:
    running, calendar = [1000.0], [2e9]
    steady_clock = SteadyClock(0.0, lambda: running[0], lambda: calendar[0])
    ended = steady_clock.now()
    calendar[0] += jump + elapsed
    running[0] += elapsed
    past = ActionHistory({"restart": 1}, tries=1, last_ended=ended)
    down = Observation(up=False, success=False, reason="connect")
    decision = decide(
        web, Remediation(), Situation(steady_clock.now(), frozenset({"ServiceDown"}), past, ActionsInProgress(), down)
    )
    assert (decision.reason == "backing-off") is (running[0] - 1000.0 < 60.0)

"""When a heartbeat is up, late or failed, as a function of its pings and of the time."""

import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.api.pings import PingError, parse_ping_path
from exporter.heartbeats.agent import AgentReport, AgentState, describe_stuck, parse_report
from exporter.heartbeats.badges import BadgeState, render_shields, render_svg
from exporter.heartbeats.bodies import END_LIMIT, HEAD_LIMIT, SentBody
from exporter.heartbeats.schedule import EARLY, Cron, Interval
from exporter.heartbeats.state import HeartbeatState, Ping, Timing
from exporter.heartbeats.store import BODIES_LIMIT, PINGS_LIMIT, HeartbeatStore, HeartbeatStoreError, ReceivedPing
from fleet.inventory.agents import Agent
from fleet.inventory.heartbeats import derive_uuid, is_uuid
from fleet.pings import PingKind
from runtime.clock import StoredClock
from runtime.errors import StartError

EVERY, GRACE, START_GRACE = 600.0, 60.0, 120.0
TIMING = Timing(Interval(EVERY), GRACE, START_GRACE)
UUID = "f4e0a5f0-4b7e-4c39-8f52-1d2f6a4f5c10"
CLOCK = StoredClock("boot", 1.0, 1.0, 1.0)
KEY = "a-ping-key-of-the-team"


def receive(*pings: Ping, known_since: float = 0.0) -> HeartbeatState:
    state = HeartbeatState(known_since)
    for ping in pings:
        state = state.after_ping(ping, TIMING)
    return state


def test_it_is_unknown_until_the_first_ping_is_overdue() -> None:
    state = HeartbeatState(known_since=1000.0)
    assert state.status(TIMING, 1659.0) == ("waiting", 1000.0)
    assert state.status(TIMING, 1660.0) == ("late", 1660.0)


def test_it_is_late_from_its_deadline_on_whenever_that_is_noticed() -> None:
    state = receive(Ping(1000.0, "success"))
    assert state.status(TIMING, 1659.0) == ("up", 1000.0)
    assert state.status(TIMING, 1660.0) == ("late", 1660.0)
    assert state.status(TIMING, 9000.0) == ("late", 1660.0)


def test_a_failure_lasts_until_the_next_success() -> None:
    state = receive(Ping(1000.0, "success"), Ping(1100.0, "fail", 3, fault="exit status 3"))
    assert state.status(TIMING, 1_000_000.0) == ("failed", 1100.0)
    again = state.after_ping(Ping(1200.0, "fail", 4), TIMING)
    assert (again.status(TIMING, 1300.0), again.exit_status) == (("failed", 1100.0), 4)
    assert again.after_ping(Ping(1400.0, "success"), TIMING).status(TIMING, 1500.0) == ("up", 1400.0)


def test_a_ping_after_the_deadline_begins_a_new_time_in_which_it_is_up() -> None:
    state = receive(Ping(1000.0, "success"), Ping(5000.0, "success"))
    assert state.status(TIMING, 5100.0) == ("up", 5000.0)


def test_a_start_changes_neither_the_state_nor_the_last_ping() -> None:
    for state in (HeartbeatState(0.0), receive(Ping(10.0, "success")), receive(Ping(10.0, "fail", 1))):
        started = state.after_ping(Ping(20.0, "start"), TIMING)
        assert started.status(TIMING, 21.0) == state.status(TIMING, 21.0)
        assert started.last_ping == state.last_ping


def test_a_log_entry_changes_nothing() -> None:
    state = receive(Ping(10.0, "success"), Ping(20.0, "start"))
    assert state.after_ping(Ping(30.0, "log"), TIMING) == state


def test_a_started_job_must_end_in_time() -> None:
    state = receive(Ping(1000.0, "success"), Ping(1100.0, "start"))
    assert state.status(TIMING, 1219.0)[0] == "up"
    assert state.status(TIMING, 1220.0) == ("late", 1220.0)
    ended = state.after_ping(Ping(1300.0, "success"), TIMING)
    assert (ended.last_duration, ended.started_at) == (200.0, None)


def test_a_start_does_not_move_the_deadline_of_the_schedule() -> None:
    state = receive(Ping(1000.0, "success"), Ping(1650.0, "start"))
    assert state.deadline(TIMING) == 1660.0


@pytest.mark.parametrize(
    ("run_id", "kind", "is_started", "duration"),
    [
        ("one", "success", False, 5.0),
        ("two", "success", True, None),  # another run's
        ("", "success", False, None),
        ("two", "fail", False, None),
        ("one", "fail", False, 5.0),
    ],
)
def test_run_ids_tie_a_start_to_its_end(run_id: str, kind: PingKind, is_started: bool, duration: float | None) -> None:
    state = receive(Ping(10.0, "start", run_id="one"), Ping(15.0, kind, run_id=run_id))
    assert (state.started_at is not None, state.last_duration) == (is_started, duration)


def test_of_two_starts_the_last_one_counts() -> None:
    state = receive(Ping(10.0, "start", run_id="one"), Ping(20.0, "start", run_id="two"))
    assert (state.started_at, state.run_id) == (20.0, "two")
    assert state.after_ping(Ping(30.0, "success", run_id="two"), TIMING).last_duration == 10.0


def test_who_was_late_before_an_absence_is_late_after_it() -> None:
    state = receive(Ping(1000.0, "success"))
    assert state.after_absence(TIMING, 1660.0, 5000.0).status(TIMING, 5000.0) == ("late", 1660.0)


def test_an_absence_before_the_next_ping_is_due_changes_nothing() -> None:
    state = receive(Ping(1000.0, "success"))
    assert state.after_absence(TIMING, 1100.0, 1500.0) == state


def test_a_ping_that_may_have_been_lost_in_an_absence_is_waited_for_once_more() -> None:
    state = receive(Ping(1000.0, "success")).after_absence(TIMING, 1590.0, 1610.0)
    assert state.deadline(TIMING) == 1610.0 + EVERY + GRACE
    # Another absence grants no further period: only its own time does not count.
    again = state.after_absence(TIMING, 2200.0, 2230.0)
    assert again.deadline(TIMING) == 1610.0 + EVERY + GRACE + 30.0
    pinged = again.after_ping(Ping(2240.0, "success"), TIMING)
    assert (pinged.deadline(TIMING), pinged.has_grant) == (2240.0 + EVERY + GRACE, False)


def test_a_daily_restart_does_not_hide_a_daily_job_that_has_ended() -> None:
    day = 86400.0
    timing = Timing(Interval(day), 3600.0, START_GRACE)
    state = HeartbeatState(0.0).after_ping(Ping(0.0, "success"), timing)
    for number in range(1, 4):
        state = state.after_absence(timing, number * day, number * day + 10.0)
    assert state.status(timing, 3 * day + 10.0)[0] == "late"


def test_a_job_that_ran_when_the_absence_began_may_have_ended_in_it() -> None:
    state = receive(Ping(1000.0, "success"), Ping(1100.0, "start")).after_absence(TIMING, 1150.0, 1300.0)
    assert state.status(TIMING, 1300.0)[0] == "up"


pings = st.builds(
    Ping,
    at=st.floats(0, 10_000),
    kind=st.sampled_from(["start", "success", "fail", "log"]),
    run_id=st.sampled_from(["", "one", "two"]),
)
absences = st.tuples(st.floats(0, 10_000), st.floats(5, 2000)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(st.one_of(pings, absences), max_size=12), st.floats(0, 12_000))
def test_no_absence_makes_anybody_late(events: list[Ping | tuple[float, float]], later: float) -> None:
    """The state with absences is never worse than that without them, and a failure is never forgotten."""
    plain = state = HeartbeatState(0.0)
    now = 0.0
    for event in sorted(events, key=lambda each: each.at if isinstance(each, Ping) else each[0]):
        if isinstance(event, Ping):
            at = max(now, event.at)
            plain, state = (
                plain.after_ping(replace(event, at=at), TIMING),
                state.after_ping(replace(event, at=at), TIMING),
            )
            now = at
        else:
            begin = max(now, event[0])
            now = begin + event[1] - event[0]
            was_late = state.status(TIMING, begin)[0] == "late"
            state = state.after_absence(TIMING, begin, now)
            assert (state.status(TIMING, now)[0] == "late") is was_late
        assert state.last_ping == plain.last_ping
        assert state.exit_status == plain.exit_status
    at = now + later
    if plain.status(TIMING, at)[0] in ("up", "failed", "waiting"):
        assert state.status(TIMING, at)[0] == plain.status(TIMING, at)[0]


@given(st.lists(st.tuples(st.floats(0, 3000), st.booleans()), min_size=1, max_size=20), st.floats(0, 100))
def test_it_becomes_late_in_the_end(steps: list[tuple[float, bool]], away: float) -> None:
    """However often pings cannot be received for a while, a job that no longer pings is noticed."""
    state, now = receive(Ping(0.0, "success")), 0.0
    for pause, was_absent in steps:
        now += pause
        if was_absent:
            state = state.after_absence(TIMING, now, now + away)
            now += away
    deadline = state.deadline(TIMING)
    assert deadline is not None
    assert deadline <= 2 * (EVERY + GRACE) + 20 * away + now
    assert state.status(TIMING, deadline)[0] == "late"


def _cron(expression: str, zone: str, after: str) -> str:
    """Return when a ping is due, in the local time of the zone."""
    start = datetime.fromisoformat(after).replace(tzinfo=ZoneInfo(zone)).timestamp()
    due = Cron(expression, zone, lambda at: at, lambda at: at).next_due(start)
    return datetime.fromtimestamp(due, ZoneInfo(zone)).isoformat(timespec="minutes")


@pytest.mark.parametrize(
    ("expression", "zone", "after", "due"),
    [
        ("0 3 * * *", "Asia/Shanghai", "2026-12-01T03:00:30", "2026-12-02T03:00+08:00"),
        ("*/10 * * * *", "UTC", "2026-12-01T03:00:30", "2026-12-01T03:10+00:00"),
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00", "2026-03-29T03:00+02:00"),  # there is no 02:30
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00", "2026-10-25T02:30+02:00"),  # there are two
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T02:30:10", "2026-10-26T02:30+01:00"),
        ("0 4 29 2 *", "UTC", "2026-12-01T00:00:00", "2028-02-29T04:00+00:00"),  # a leap day
        ("0 0 1 1 *", "Asia/Shanghai", "2026-12-31T23:59:00", "2027-01-01T00:00+08:00"),
    ],
)
def test_cron_expressions_are_of_their_time_zone(expression: str, zone: str, after: str, due: str) -> None:
    assert _cron(expression, zone, after) == due


def test_a_ping_shortly_before_its_time_counts_for_it() -> None:
    cron = Cron("0 3 * * *", "UTC", lambda at: at, lambda at: at)
    due = datetime(2026, 12, 1, 3, tzinfo=ZoneInfo("UTC")).timestamp()
    assert cron.next_due(due - EARLY + 1) == due + 86400
    assert cron.next_due(due - EARLY - 1) == due


def test_a_corrected_system_time_makes_no_cron_job_late() -> None:
    shift = [0.0]
    cron = Cron("0 3 * * *", "UTC", lambda at: at + shift[0], lambda unix: unix - shift[0])
    due = datetime(2026, 12, 1, 3, tzinfo=ZoneInfo("UTC")).timestamp()
    state = HeartbeatState(due).after_ping(Ping(due + 10, "success"), TIMING)
    timing = Timing(cron, GRACE, START_GRACE)
    for shift[0] in (0.0, 5 * 86400.0, -5 * 86400.0, 3600.0):
        assert state.status(timing, due + 60)[0] == "up"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"/ping/{UUID}", (UUID, "", "", "success", None)),
        (f"/{UUID}", (UUID, "", "", "success", None)),
        (f"/ping/{UUID}/start", (UUID, "", "", "start", None)),
        (f"/ping/{UUID}/fail", (UUID, "", "", "fail", None)),
        (f"/ping/{UUID}/log", (UUID, "", "", "log", None)),
        (f"/ping/{UUID}/0", (UUID, "", "", "success", 0)),
        (f"/ping/{UUID}/1", (UUID, "", "", "fail", 1)),
        (f"/ping/{UUID}/255", (UUID, "", "", "fail", 255)),
        (f"/ping/{UUID.upper()}", (UUID.upper(), "", "", "success", None)),
        (f"/ping/{KEY}/backup", ("", KEY, "backup", "success", None)),
        (f"/{KEY}/backup/start", ("", KEY, "backup", "start", None)),
        (f"/ping/{KEY}/backup/7", ("", KEY, "backup", "fail", 7)),
    ],
)
def test_paths(path: str, expected: tuple[str, str, str, PingKind, int | None]) -> None:
    target = parse_ping_path(path)
    assert (target.uuid, target.ping_key, target.slug, target.kind, target.exit_status) == expected


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/", 404, "not found"),
        ("/ping", 404, "not found"),
        ("/ping/", 404, "not found"),
        ("/ping/123", 400, "invalid uuid format"),
        (f"/ping/{UUID}/256", 400, "invalid url format"),
        (f"/ping/{UUID}/-1", 400, "invalid url format"),
        (f"/ping/{UUID}/stop", 400, "invalid url format"),
        (f"/ping/{UUID}/start/1", 400, "invalid url format"),
        (f"/ping/{UUID}/٣", 400, "invalid url format"),
        (f"/ping/{KEY}/backup/start/1", 400, "invalid url format"),
    ],
)
def test_wrong_paths(path: str, status: int, text: str) -> None:
    with pytest.raises(PingError) as raised:
        parse_ping_path(path)
    assert (raised.value.status, raised.value.text) == (status, text)


@given(st.text(max_size=80))
def test_any_path_is_parsed_or_refused(path: str) -> None:
    try:
        parse_ping_path(f"/{path}")
    except PingError as error:
        assert error.status in (400, 404)


def test_uuids_depend_on_the_key_and_the_service_alone() -> None:
    one = derive_uuid(KEY, "backup")
    assert is_uuid(one)
    assert one == derive_uuid(KEY, "backup")
    assert len({one, derive_uuid(KEY, "other"), derive_uuid(f"{KEY}2", "backup")}) == 3


def _ping(service: str, at: float, body: str = "") -> ReceivedPing:
    return ReceivedPing(service, at, "success", None, "", "", body, is_cut=False, client="GET")


def test_old_pings_and_bodies_are_removed(tmp_path: Path) -> None:
    store = HeartbeatStore(tmp_path / "heartbeats.db")
    for number in range(200):
        store.commit([_ping("backup", float(number), "x" * 9000), _ping("other", float(number))], {}, CLOCK)
    pings = store.read_pings("backup")
    assert [each.at for each in pings] == [float(number) for number in range(199, 199 - PINGS_LIMIT, -1)]
    assert 0 < sum(len(each.body) for each in pings) <= BODIES_LIMIT
    assert pings[0].body
    assert len(store.read_pings("other")) == PINGS_LIMIT
    store.close()


def test_states_survive_the_process(tmp_path: Path) -> None:
    store = HeartbeatStore(tmp_path / "heartbeats.db")
    state = receive(Ping(10.0, "start", run_id="one"), Ping(15.0, "fail", 3, "one", "exit status 3"))
    store.commit([_ping("backup", 15.0)], {"backup": state}, CLOCK)
    store.close()
    again = HeartbeatStore(tmp_path / "heartbeats.db")
    assert (again.read_states(), again.read_clock()) == ({"backup": state}, CLOCK)
    again.forget(["backup"])
    assert (again.read_states(), again.read_pings("backup")) == ({}, [])
    again.close()


def test_two_processes_do_not_share_a_database(tmp_path: Path) -> None:
    store = HeartbeatStore(tmp_path / "heartbeats.db")
    with pytest.raises(StartError, match="another exporter uses"):
        HeartbeatStore(tmp_path / "heartbeats.db")
    store.close()


def test_a_damaged_database_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "heartbeats.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StartError, match=f"cannot open the database of heartbeats {path}: file is not a database"):
        HeartbeatStore(path)


def test_a_replaced_database_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "heartbeats.db"
    store = HeartbeatStore(path)
    path.rename(tmp_path / "moved.db")
    with pytest.raises(HeartbeatStoreError, match="was deleted or replaced"):
        store.commit([], {}, CLOCK)
    store.close()


AGENT = Agent.model_validate({"stuck_after": "20m", "confirm_after": "30m"})


def report(at: float, **values: Any) -> tuple[float, bytes]:
    return at, json.dumps(values).encode()


def run_agent(*reports: tuple[float, bytes]) -> AgentState:
    state: AgentState | None = None
    for at, body in reports:
        parsed = parse_report(body)
        assert parsed is not None
        state = (state or AgentState(at)).after_report(parsed, at)
    assert state is not None
    return state


@pytest.mark.parametrize(
    ("values", "progress_at"),
    [
        ({"task": "T-1", "progress": 3}, 0.0),
        ({"task": "T-1", "progress": 4}, 600.0),
        ({"task": "T-1", "progress": "reading"}, 600.0),
        ({"task": "T-2", "progress": 3}, 600.0),
        ({"progress": True}, 600.0),
        ({"progress": False}, 0.0),
        ({}, 0.0),
        ({"pending": 0}, 600.0),  # idle
        ({"pending": {"chat": 0, "board": 0}}, 600.0),
        ({"pending": 2}, 0.0),
    ],
)
def test_progress_is_what_changes(values: dict[str, Any], progress_at: float) -> None:
    state = run_agent(report(0.0, task="T-1", progress=3), report(600.0, **values))
    assert state.last_progress == progress_at


def test_an_agent_is_suspected_and_then_confirmed_to_be_stuck() -> None:
    state = run_agent(report(0.0, task="T-1", progress=1), report(600.0, task="T-1", progress=1))
    assert [state.status(AGENT, at) for at in (1199.0, 1200.0, 1799.0, 1800.0)] == [
        "working", "suspected", "suspected", "confirmed",
    ]  # fmt: skip
    assert describe_stuck(AGENT, "confirmed") == "alive, but no progress for 30m"


def test_an_agent_that_waits_or_is_idle_is_not_stuck() -> None:
    waiting = run_agent(
        report(0.0, task="T-1"), report(10.0, waiting_for=["review", "data"]), report(20.0, waiting_for="x")
    )
    assert (waiting.status(AGENT, 1e6), waiting.waiting_since, waiting.waiting_for) == ("waiting", 10.0, "x")
    again = waiting.after_report(AgentReport(), 30.0)
    assert (again.waiting_since, again.status(AGENT, 1e6)) == (None, "confirmed")
    idle = run_agent(report(0.0, task="T-1"), report(10.0, pending=0))
    assert (idle.status(AGENT, 1e6), idle.task) == ("idle", "")


def test_requests_are_added_up_and_other_numbers_replaced() -> None:
    state = run_agent(
        report(0.0, llm_requests={"ok": 3, "429": 1}, rounds=5, rounds_limit=40, response_seconds=1.5),
        report(1.0, llm_requests={"ok": 2}, pending={"chat": 2, "board": 3}),
    )
    assert (state.requests_ok, state.requests_rate_limited, state.pending) == (5, 1, 5)
    assert (state.rounds, state.rounds_limit, state.response_seconds) == (None, None, None)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('{"pending": -1}', "pending: must be at least 0"),
        ('{"rounds": 1.5}', "rounds: must be a whole number"),
        ('{"rounds": true}', "rounds: must be a whole number"),
        ('{"response_seconds": NaN}', "response_seconds: must be a finite number"),
        ('{"pending": 1', "the report is not valid JSON"),
        ('{"a":' * 100_000, "the report is not valid JSON"),
    ],
)
def test_reports_that_are_not_understood(body: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        parse_report(body.encode())


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: f"{{{text}".encode()))
def test_any_body_is_understood_or_refused(body: bytes) -> None:
    try:
        found = parse_report(body)
    except ValueError:
        return
    if found is not None:
        AgentState(0.0).after_report(found, 1.0)


def test_an_absence_makes_no_agent_stuck() -> None:
    state = HeartbeatState(0.0).after_ping(Ping(0.0, "success"), TIMING).after_report(AgentReport(task="T"), 0.0)
    away = state.after_absence(TIMING, 100.0, 3700.0)
    assert away.agent is not None
    assert away.agent.last_progress == 3600.0
    assert away.status(TIMING, 3700.0)[0] == "up"


@given(label=st.text(), counts=st.tuples(*[st.integers(0, 3)] * 3))
def test_any_label_makes_a_well_formed_badge(label: str, counts: tuple[int, int, int]) -> None:
    grace, down, waiting = counts
    state = BadgeState(grace + down + waiting, grace, down, waiting)
    image = ET.fromstring(render_svg(label, state))  # noqa: S314 - our own
    texts = [each for each in image if each.tag.endswith("}g")][1]
    assert texts[1].text == state.status
    assert int(image.get("width", "")) == sum(int(each.get("textLength", "")) + 12 for each in texts)
    json.dumps(render_shields(label, state)).encode()


@pytest.mark.parametrize(
    ("grace", "down", "waiting", "total", "status"),
    [
        (0, 0, 0, 2, "up"), (1, 0, 0, 2, "late"), (1, 1, 0, 2, "down"), (0, 1, 1, 2, "down"), (0, 0, 2, 2, "unknown"),
        (0, 0, 1, 2, "up"), (0, 0, 0, 0, "unknown"),
    ],
)  # fmt: skip
def test_a_badge_shows_the_worst(grace: int, down: int, waiting: int, total: int, status: str) -> None:
    assert BadgeState(total, grace, down, waiting).status == status


def test_overdue_is_due_and_not_late_yet() -> None:
    state = receive(Ping(1000.0, "success"))
    assert [state.is_overdue(TIMING, at) for at in (1599.0, 1600.0, 1659.0, 1660.0)] == [False, True, True, False]
    assert not HeartbeatState(1000.0).is_overdue(TIMING, 1601.0)


def test_a_job_may_say_how_long_it_took() -> None:
    assert receive(Ping(100.0, "start"), Ping(130.0, "success", duration=2.5)).last_duration == 2.5
    assert receive(Ping(100.0, "start"), Ping(130.0, "success")).last_duration == 30.0


def test_pending_tasks_of_many_sources_are_added_up() -> None:
    report = AgentReport.model_validate({"pending": {f"source {number}": 1 for number in range(50)}})
    state = AgentState(0).after_report(report, 0)
    assert (state.pending, sum(state.pending_by_source.values()), len(state.pending_by_source)) == (50, 50, 21)


@given(st.lists(st.binary(max_size=50).map(lambda part: part * 1000), max_size=6))
def test_the_beginning_and_the_end_of_a_body_are_kept(parts: list[bytes]) -> None:
    body, whole = SentBody(), b"".join(parts)
    for part in parts:
        body.add(part)
    assert (body.head, body.end, body.is_cut) == (whole[:HEAD_LIMIT], whole[-END_LIMIT:], len(whole) > 10_000)
    body.is_complete = False
    assert body.is_cut

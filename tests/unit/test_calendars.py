"""Who is on call: rotations, overrides, time zones, clocks that are changed."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.inventory.calendars import Calendar
from fleet.inventory.notify import Notify
from tests.support import inventory_of, load_problems, write

PEOPLE = ("ann", "bob", "eve")
SHANGHAI, BERLIN, NEW_YORK = ZoneInfo("Asia/Shanghai"), ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York")
WEEKLY = {"rotation": PEOPLE, "starts": "2026-11-30 09:00"}


def calendar(**written: Any) -> Calendar:
    return Calendar.model_validate({**WEEKLY, **written})


def override(begin: str, end: str, person: str) -> dict[str, str]:
    return {"from": begin, "to": end, "person": person}


def unix(text: str, zone: ZoneInfo, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def local(at: float | None, zone: ZoneInfo) -> str:
    return "never" if at is None else f"{datetime.fromtimestamp(at, zone):%Y-%m-%d %H:%M}"


@pytest.mark.parametrize(
    ("zone", "written", "at", "person", "until"),
    [
        (SHANGHAI, {}, "2026-11-30 09:00", "ann", "2026-12-07 09:00"),
        (SHANGHAI, {}, "2026-12-07 08:59", "ann", "2026-12-07 09:00"),
        (SHANGHAI, {}, "2026-12-07 09:00", "bob", "2026-12-14 09:00"),
        (SHANGHAI, {}, "2026-12-21 09:00", "ann", "2026-12-28 09:00"),
        (SHANGHAI, {}, "2026-11-30 08:59", "eve", "2026-11-30 09:00"),
        (SHANGHAI, {}, "2026-11-10 00:00", "ann", "2026-11-16 09:00"),
        (SHANGHAI, {"starts": "2026-11-30"}, "2026-12-06 23:59", "ann", "2026-12-07 00:00"),
        (SHANGHAI, {"every": "1d"}, "2026-12-02 10:00", "eve", "2026-12-03 09:00"),
        (SHANGHAI, {"rotation": ["ann", "ann", "bob"]}, "2026-12-01 00:00", "ann", "2026-12-14 09:00"),
        (SHANGHAI, {"rotation": ["ann"]}, "2026-12-01 00:00", "ann", "never"),
        # The shift in which clocks are changed still ends at 09:00.
        (BERLIN, {"starts": "2026-10-19 09:00"}, "2026-10-26 08:59", "ann", "2026-10-26 09:00"),
        (BERLIN, {"starts": "2026-10-19 09:00"}, "2026-10-26 09:00", "bob", "2026-11-02 09:00"),
        (BERLIN, {"starts": "2026-03-23 09:00"}, "2026-03-30 08:59", "ann", "2026-03-30 09:00"),
        (BERLIN, {"starts": "2026-03-23 09:00"}, "2026-03-30 09:00", "bob", "2026-04-06 09:00"),
        # 02:30 does not exist on 2026-03-29.
        (BERLIN, {"starts": "2026-03-28 02:30", "every": "1d"}, "2026-03-29 03:29", "ann", "2026-03-29 03:30"),
        (BERLIN, {"starts": "2026-03-28 02:30", "every": "1d"}, "2026-03-29 03:30", "bob", "2026-03-30 02:30"),
        (NEW_YORK, {"starts": "2026-03-02 09:00"}, "2026-03-09 09:00", "bob", "2026-03-16 09:00"),
    ],
)
def test_a_rotation(zone: ZoneInfo, written: dict[str, Any], at: str, person: str, until: str) -> None:
    shift = calendar(**written).find_shift(unix(at, zone), zone)
    assert (shift.person, local(shift.until, zone)) == (person, until)


def test_a_handover_at_a_time_that_occurs_twice_is_at_the_first() -> None:
    daily = calendar(starts="2026-10-24 02:30", every="1d")
    assert [daily.find_person(unix(f"2026-10-25 {time}", BERLIN, fold), BERLIN) for time, fold in (
        ("02:29", 0), ("02:30", 0), ("02:15", 1), ("02:45", 1), ("03:00", 0),
    )] == ["ann", "bob", "bob", "bob", "bob"]  # fmt: skip


OVERRIDES = [
    override("2026-12-01", "2026-12-05", "bob"),  # at 09:00
    override("2026-12-02 18:00", "2026-12-03", "eve"),
    override("2026-12-03 12:00", "2026-12-03 13:00", "ann"),
    override("2026-12-13", "2026-12-15", "bob"),  # over a handover from bob to eve
]


@pytest.mark.parametrize(
    ("at", "person", "until"),
    [
        ("2026-12-01 08:59", "ann", "2026-12-01 09:00"),
        ("2026-12-01 09:00", "bob", "2026-12-02 18:00"),
        ("2026-12-02 18:00", "eve", "2026-12-03 09:00"),
        ("2026-12-03 09:00", "bob", "2026-12-03 12:00"),
        ("2026-12-03 12:30", "ann", "2026-12-03 13:00"),
        ("2026-12-03 13:00", "bob", "2026-12-05 09:00"),
        ("2026-12-05 09:00", "ann", "2026-12-07 09:00"),
        ("2026-12-07 09:00", "bob", "2026-12-15 09:00"),
        ("2026-12-15 09:00", "eve", "2026-12-21 09:00"),
    ],
)
def test_the_last_override_in_the_list_decides(at: str, person: str, until: str) -> None:
    shift = calendar(overrides=OVERRIDES).find_shift(unix(at, SHANGHAI), SHANGHAI)
    assert (shift.person, local(shift.until, SHANGHAI)) == (person, until)


LOCAL_TIMES = st.datetimes(datetime(2020, 1, 1), datetime(2032, 1, 1)).map(lambda at: f"{at:%Y-%m-%d %H:%M}")  # noqa: DTZ001 - local times
ZONES = st.sampled_from([SHANGHAI, BERLIN, NEW_YORK, ZoneInfo("Australia/Lord_Howe"), ZoneInfo("UTC")])
SPANS = st.tuples(LOCAL_TIMES, LOCAL_TIMES, st.sampled_from(PEOPLE))
CALENDARS = st.builds(
    lambda rotation, starts, days, spans: calendar(
        rotation=rotation, starts=starts, every=f"{days}d",
        overrides=[override(min(one, other), max(one, other), person) for one, other, person in spans if one != other],
    ),
    st.lists(st.sampled_from(PEOPLE), min_size=1, max_size=4), LOCAL_TIMES, st.integers(1, 30),
    st.lists(SPANS, max_size=3),
)  # fmt: skip


@given(CALENDARS, ZONES, LOCAL_TIMES)
def test_a_shift_lasts_until_another_person_s_begins(made: Calendar, zone: ZoneInfo, at: str) -> None:
    shift = made.find_shift(unix(at, zone), zone)
    assert shift.person in PEOPLE
    if shift.until is not None:
        assert shift.until > unix(at, zone)
        assert made.find_person(shift.until - 0.001, zone) == shift.person
        assert made.find_shift(shift.until, zone).person != shift.person


@given(ZONES, LOCAL_TIMES, st.integers(1, 30), st.integers(-200, 200))
def test_handovers_are_whole_days_apart_at_the_same_time_of_day(
    zone: ZoneInfo, starts: str, days: int, number: int
) -> None:
    made = calendar(starts=starts, every=f"{days}d")
    begins = datetime.fromisoformat(starts) + number * timedelta(days=days)
    handover = begins.replace(tzinfo=zone).timestamp()
    assert made.find_person(handover, zone) == PEOPLE[number % 3]
    assert made.find_person(handover - 1, zone) == PEOPLE[(number - 1) % 3]


def notify_of(folder: Path, *on_call: str) -> Notify:
    written = {
        "people": {name: {"open_id": f"ou_{name}", **({"name": "Ann"} if name == "ann" else {})} for name in PEOPLE},
        "calendars": {
            "weekly": {"rotation": ["ann", "bob"], "starts": "2026-11-30 09:00"},
            "nights": {"rotation": ["ann", "eve"], "starts": "2026-11-30"},
        },
        "channels": {"a": {"feishu": {"webhook": "http://f/"}}},
        "routes": [{"channels": ["a"], "on_call": list(on_call)}],
    }
    return inventory_of(folder, {"notify": written}).inventory.notify


def test_routes_name_people_and_calendars(tmp_path: Path) -> None:
    notify = notify_of(tmp_path, "weekly", "bob", "nights")
    first, second = unix("2026-12-01 00:00", SHANGHAI), unix("2026-12-07 10:00", SHANGHAI)
    assert [each.open_id for each in notify.on_call({}, "down", first)] == ["ou_ann", "ou_bob"]
    assert [each.open_id for each in notify.on_call({}, "down", second)] == ["ou_bob", "ou_eve"]
    assert {name: shift.person for name, shift in notify.find_shifts(second).items()} == {
        "weekly": "bob", "nights": "eve",
    }  # fmt: skip
    assert [notify.name_of(name) for name in ("ann", "bob")] == ["Ann", "bob"]


def test_dates_can_be_written_with_and_without_quotes(tmp_path: Path) -> None:
    """YAML reads a date, and a time with seconds, as such, and anything else as text."""
    for number, starts in enumerate(("2026-11-30", "'2026-11-30'", "2026-11-30 00:00", "2026-11-30 00:00:00")):
        text = (
            f"notify: {{people: {{ann: {{open_id: ou_a}}}}, calendars: {{c: {{rotation: [ann], starts: {starts}}}}}}}"
        )
        folder = write(tmp_path / str(number), a=text)
        assert load_problems(folder) == []


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("rotation: [], starts: 2026-11-30", "3: notify.calendars.c.rotation: must not be empty"),
        ("starts: 2026-11-30", "3: notify.calendars.c.rotation: is missing"),
        ("rotation: [ann]", "3: notify.calendars.c.starts: is missing"),
        ("rotation: [ann, amn], starts: 2026-11-30", "[1]: there is no person 'amn'; did you mean ann?"),
        ("rotation: [ann], starts: monday", "starts: 'monday' is not a date or local time; write 2026-11-30, or '"),
        ("rotation: [ann], starts: '2026-02-30'", "starts: '2026-02-30' is not a date or local time"),
        ("rotation: [ann], starts: '1026-11-30'", "starts: '1026-11-30' is not a date or local time"),
        ("rotation: [ann], starts: 2026-11-30T09:00:00Z", "+00:00' is not a date or local time"),
        ("rotation: [ann], starts: 7", "starts: 7 is not a date or local time"),
        ("rotation: [ann], starts: 2026-11-30, every: 36h", "every: must be whole days, such as 7d, not 1d12h"),
        ("rotation: [ann], starts: 2026-11-30, every: 0d", "every: must be greater than 0"),
        ("rotation: [ann], starts: 2026-11-30, evry: 7d", "unknown key; did you mean every?"),
        (
            "rotation: [ann], starts: 2026-11-30, overrides: [{from: 2026-12-24, to: 2026-12-27, person: bob}]",
            "overrides[0].person: there is no person 'bob'",
        ),
        (
            "rotation: [ann], starts: '2026-11-30 09:00', overrides: [{from: '2026-12-24 10:00', to: 2026-12-24, person: ann}]",
            "overrides[0]: to (2026-12-24) is not after from (2026-12-24 10:00)",
        ),
        ("rotation: [ann], starts: 2026-11-30, overrides: [{from: 2026-12-24, person: ann}]", "[0].to: is missing"),
    ],
)  # fmt: skip
def test_a_calendar_that_is_wrong(tmp_path: Path, written: str, message: str) -> None:
    text = f"notify:\n  people: {{ann: {{open_id: ou_a}}}}\n  calendars: {{c: {{{written}}}}}\n"
    problems = load_problems(write(tmp_path, a=text))
    assert any(each.startswith("a.yaml:3: notify.calendars.c") and message in each for each in problems), problems


def test_names_of_people_and_calendars_differ_and_exist(tmp_path: Path) -> None:
    text = """
        notify:
          people: {ann: {open_id: ou_a}}
          calendars:
            ann: {rotation: [ann], starts: 2026-11-30}
            weekly: {rotation: [ann], starts: 2026-11-30}
          routes:
            - {channels: [], on_call: [weekyl]}
        """
    assert load_problems(write(tmp_path, a=text)) == [
        "a.yaml:4: notify.calendars.ann: a person has the same name; rename one of them",
        "a.yaml:7: notify.routes[0].on_call[0]: there is no person or calendar 'weekyl'; did you mean weekly?",
    ]

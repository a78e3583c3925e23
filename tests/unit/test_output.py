"""Tables and ages as commands print them."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defib.hosts import describe_problems
from defib.output import format_age, format_table
from defib.services import table_row
from runtime.terminal import escape_controls


def width_of(text: str) -> int:
    """The columns of a terminal, counted in another way than `format_table` does."""
    shown = [
        each for each in text if not unicodedata.category(each).startswith("M") or unicodedata.category(each) == "Mc"
    ]
    return len(shown) + sum(unicodedata.east_asian_width(each) in ("W", "F") for each in shown)


def test_columns_are_aligned_and_the_last_has_no_spaces_after_it() -> None:
    assert format_table([("STATE", "SERVICE"), ("down", "a"), ("degraded", "b")]) == (
        "STATE     SERVICE\ndown      a\ndegraded  b"
    )


@pytest.mark.parametrize("name", ["门户网站", "ＷＥＢ", "cafe\u0301", "ok✅", "한국어", "plain"])
def test_wide_and_combining_characters_keep_columns_aligned(name: str) -> None:
    first, second = format_table([(name, "x"), ("a name of some length", "x")]).splitlines()
    assert width_of(first) == width_of(second)


@pytest.mark.parametrize("width", [10, 40, 60])
def test_a_table_is_cut_to_a_terminal_and_the_long_column_first(width: int) -> None:
    rows = [("down", "文档" * 40, "12 ms"), ("up", "", "1.2 s")]
    lines = format_table(rows, width, cut=1).splitlines()
    assert all(width_of(line) <= width for line in lines)
    assert "…" in lines[0]
    assert lines[0].endswith("12 ms") is (width > 30)
    assert "文档" * 40 in format_table(rows)


HOSTILE = "up\x1b[2K\r\u202egnp\n2  down\tx\ud800"


def test_hostile_text_stays_in_its_cell() -> None:
    (line,) = format_table([(HOSTILE, "next")]).splitlines()
    assert line == r"up\x1b[2K\r\u202egnp\n2  down\tx\ud800  next"


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=1), st.integers(1, 100), st.integers(0, 2))
def test_any_table_fits_and_is_safe(rows: list[tuple[str, str, str]], width: int, cut: int) -> None:
    for printed in (format_table(rows), fitted := format_table(rows, width, cut=cut)):
        assert printed.count("\n") == len(rows) - 1
        assert escape_controls(printed) == printed
    assert all(width_of(line) <= width for line in fitted.split("\n"))


@pytest.mark.parametrize(
    ("since", "age"),
    [
        (None, ""),
        ("2026-11-24T18:00:05Z", "0s"),
        ("2026-11-24T17:59:18Z", "42s"),
        ("2026-11-24T17:00:00+00:00", "1h"),
        ("2026-11-24T17:55:00Z", "5m"),
        ("2026-11-24T23:54:55+08:00", "2h5m"),
        ("2026-11-22T12:34:56Z", "2d5h"),
    ],
)
def test_ages_have_two_units(since: str | None, age: str) -> None:
    assert format_age(since, "2026-11-24T18:00:00Z") == age


def test_problems_of_a_host() -> None:
    problems = [
        {"kind": "filesystem_full", "severity": "critical", "name": "/data", "message": "95%"},
        {"kind": "host_down", "severity": "critical", "name": "", "message": None},
    ]
    host = {"problems": problems, "problem_count": 7}
    assert describe_problems(host, 1) == "filesystem full /data (95%), 6 more"
    assert describe_problems(host) == "filesystem full /data (95%), host down, 5 more"


SERVICE: dict[str, Any] = {
    "id": "web", "name": "web", "host": "h", "state": "up", "since": None, "latency_seconds": None, "recent": "",
    "reason": "", "failure": "", "alerts": [], "verb": "", "decision": "", "detail": "", "acknowledged_by": "",
    "action": "", "phase": "", "maintenance": "", "stopped_by": "", "stop_reason": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "seen"),
    [
        ({}, ""),
        ({"state": "down", "reason": "connect", "failure": "refused", "alerts": ["A"]}, "connect: refused"),
        ({"state": "degraded", "alerts": ["A", "B"]}, "firing: A, B"),
        ({"state": "down", "verb": "wait", "decision": "storm", "detail": "9 of 10"}, "wait storm (9 of 10)"),
        ({"action": "restart", "phase": "running", "verb": "act"}, "restart is in progress"),
        ({"state": "stopped", "stopped_by": "ann", "stop_reason": "disks"}, "stopped by ann: disks"),
        ({"acknowledged_by": "ann", "maintenance": "bob: disks"}, "acknowledged by ann; maintenance by bob: disks"),
    ],
)
def test_what_is_seen_of_a_service(changed: dict[str, Any], seen: str) -> None:
    assert table_row({**SERVICE, **changed}, "2026-11-24T18:00:00Z")[4] == seen


def test_latency_and_the_last_checks() -> None:
    row = table_row({**SERVICE, "latency_seconds": 0.0123, "recent": "+" * 30 + "-?"}, "2026-11-24T18:00:00Z")
    assert row[5:] == ["12 ms", "+" * 18 + "-?"]
    assert table_row({**SERVICE, "latency_seconds": 1.26}, "2026-11-24T18:00:00Z")[5] == "1.3 s"

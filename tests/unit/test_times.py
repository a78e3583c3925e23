"""Dates of headers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.times import parse_http_date


@pytest.mark.parametrize(
    ("text", "unix"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777.0),
        ("Sun, 06 Nov 1994 08:49:37 -0000", 784111777.0),  # in UTC, not in the time of this machine
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 0001 00:00:00 +9999", None),
        ("", None),
        ("now", None),
    ],
)
def test_dates(text: str, unix: float | None) -> None:
    found = parse_http_date(text)
    assert found == unix or (unix is None and found is not None and found < 0)


@given(st.text() | st.from_regex(r"Mon, [0-9]{1,3} (Jan|Feb) [0-9]{1,6} [0-9:]{1,9} [+-][0-9]{1,6}"))
def test_no_date_is_an_error(text: str) -> None:
    parse_http_date(text)

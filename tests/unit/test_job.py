"""What is reported of a job's output, and where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defib.job import TAIL_LIMIT, OutputTail
from defib.job_report import PingUrl, ReportError

URL = "https://ann:s3cret@10.0.0.5:9998/ping/01234567"


def tail_of(*parts: bytes) -> bytes:
    tail = OutputTail()
    for part in parts:
        tail.add(part)
    return tail.read()


@pytest.mark.parametrize(
    ("parts", "tail"),
    [
        ([], b""),
        ([b"a", b"b\n"], b"ab\n"),
        ([b"x" * TAIL_LIMIT], b"x" * TAIL_LIMIT),
        ([b"secret", b"x" * TAIL_LIMIT], b"x" * TAIL_LIMIT),
        ([b"x" * TAIL_LIMIT, b"\n"], b"x" * (TAIL_LIMIT - 1) + b"\n"),
        ([b"x" * TAIL_LIMIT, b"one\ntwo\n"], b"two\n"),
    ],
)
def test_the_tail_begins_at_a_line_where_it_is_cut(parts: list[bytes], tail: bytes) -> None:
    assert tail_of(*parts) == tail


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(0, 3 * TAIL_LIMIT))
def test_the_tail_is_the_end(parts: list[bytes], long: int) -> None:
    parts = [b"y" * long, *parts]
    tail = tail_of(*parts)
    assert len(tail) <= TAIL_LIMIT
    assert b"".join(parts).endswith(tail)


def test_urls_of_pings() -> None:
    url = PingUrl.parse(f" {URL}/ \n", "a file")
    assert url.of("3", "a-run") == f"{URL}/3?rid=a-run"
    assert url.server == "10.0.0.5:9998"
    assert PingUrl.parse(f"{URL}?create=1", "a file").of("start", "a-run") == f"{URL}/start?create=1&rid=a-run"
    assert "s3cret" not in repr(url)
    assert "0123" not in repr(url)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hunter2",
        "ftp://h/x",
        "http://",
        "http:///x",
        "http://h:x/",
        "http://h/a b",
        "http://h/\x1b[0m",
        "http://[::1/",
    ],
)
def test_what_is_no_url_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ReportError) as refused:
        PingUrl.parse(text, "DEFIB_PING_URL")
    assert str(refused.value) == "DEFIB_PING_URL has no URL that begins with http:// or https://"

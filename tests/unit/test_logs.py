"""Log events that other machines cause are limited."""

import asyncio
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from runtime.logs import LimitedLog
from tests.support import eventually

Lines = list[MutableMapping[str, Any]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    with capture_logs() as captured:
        yield captured


async def test_events_beyond_the_limit_are_counted_in_one_line(lines: Lines) -> None:
    log = LimitedLog(limit=2, interval=0.3)
    for _ in range(1000):
        log.warning("refused", client="c")
    log.warning("other")
    assert [line["event"] for line in lines] == ["refused", "refused", "other"]

    async def is_reported() -> bool:
        return len(lines) == 4

    await eventually(is_reported)
    assert lines[3] == {
        "event": "events_suppressed", "suppressed": "refused", "count": 998, "seconds": 0.3, "log_level": "warning",
    }  # fmt: skip
    log.warning("refused")
    assert [line["event"] for line in lines[4:]] == ["refused"]


async def test_nothing_is_reported_where_nothing_was_suppressed(lines: Lines) -> None:
    log = LimitedLog(limit=2, interval=0.0)
    log.warning("refused")
    ended = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, ended.set)  # after the interval's timer
    await ended.wait()
    assert [line["event"] for line in lines] == ["refused"]

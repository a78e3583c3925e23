from pathlib import Path
from typing import Any

import pytest

from exporter.results import ProbeFailure, Reason, Result, Seen
from exporter.scheduler.watcher import Watch
from fleet.inventory.model import Service
from tests.support import inventory_of


@pytest.fixture
def service(tmp_path: Path) -> Service:
    written: dict[str, Any] = {"probe": {"fail_after": 1, "http": {"url": "http://h/"}}}
    return inventory_of(tmp_path, {"services": {"web": written}}).inventory.services["web"]


def result(reason: Reason | None) -> Result:
    return Result(reason is None, reason, "", 0.0, 0.1, Seen(evidence={"body": b"x"}, overdue=ProbeFailure("tls", "")))


async def test_a_failure_is_logged_when_it_changes_and_then_every_ten_minutes(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(service)
    told = []
    for now, reason in (
        (0, "connect"), (30, "connect"), (599, "connect"), (600, "connect"), (601, "timeout"), (1200, "timeout"),
        (1201, "timeout"), (1800, None), (9999, None),
    ):  # fmt: skip
        watch.record(result(reason), now, "")  # type: ignore[arg-type]
        if capsys.readouterr().out:
            told.append(now)
    assert told == [0, 600, 601, 1201, 1800]


async def test_the_last_twenty_failures_are_kept_without_their_evidence(service: Service) -> None:
    watch = Watch(service)
    for now in range(30):
        watch.record(result("connect"), now, "")
    assert len(watch.recent) == 20
    assert not any(each.seen.evidence or each.seen.overdue for each in watch.recent)

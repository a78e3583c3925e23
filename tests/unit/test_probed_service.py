from pathlib import Path
from typing import Any

import pytest

from exporter.results import Component, FailureReason, ProbeDetails, ProbeFailure, ProbeResult
from exporter.scheduler.probed_service import ProbedService
from fleet.inventory.model import Service
from tests.support import inventory_of


@pytest.fixture
def service(tmp_path: Path) -> Service:
    written: dict[str, Any] = {"probe": {"fail_after": 1, "http": {"url": "http://h/"}}}
    return inventory_of(tmp_path, {"services": {"web": written}}).inventory.services["web"]


def result(reason: FailureReason | None) -> ProbeResult:
    return ProbeResult(
        reason is None,
        reason,
        "",
        0.0,
        0.1,
        ProbeDetails(evidence={"body": b"x"}, timeout_failure=ProbeFailure("tls", "")),
    )


async def test_a_failure_is_logged_when_it_changes_and_then_every_ten_minutes(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    probed = ProbedService(service)
    told = []
    for now, reason in (
        (0, "connect"), (30, "connect"), (599, "connect"), (600, "connect"), (601, "timeout"), (1200, "timeout"),
        (1201, "timeout"), (1800, None), (9999, None),
    ):  # fmt: skip
        probed.apply_result(result(reason), now, "")  # type: ignore[arg-type] # a str, not a literal
        if capsys.readouterr().out:
            told.append(now)
    assert told == [0, 600, 601, 1201, 1800]


async def test_recent_failures_are_limited_and_without_evidence(service: Service) -> None:
    probed = ProbedService(service)
    for now in range(30):
        probed.apply_result(result("connect"), now, "")
    assert len(probed.recent_failures) == 20
    assert not any(each.details.evidence or each.details.timeout_failure for each in probed.recent_failures)


async def test_only_the_last_result_keeps_components(service: Service) -> None:
    probed = ProbedService(service)
    for now in range(3):
        failure = result("state")
        failure.details.components["ch1"] = Component(up=False, values={"cpu": 1})
        probed.apply_result(failure, now, "")
    assert [len(each.details.components) for each in probed.recent_failures] == [0, 0, 1]
    probed.apply_result(result("connect"), 3, "")
    assert not any(each.details.components for each in probed.recent_failures)

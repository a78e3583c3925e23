"""What the policy would have done, over a made history."""

from pathlib import Path
from typing import Any

import pytest

from remediator.replay import POINTS, STEP, History, moments, replay
from tests.support import inventory_of

Values = dict[float, float]


def run(begin: int, end: int, value: float = 1.0) -> Values:
    return {number * STEP: value for number in range(begin, end)}


def replayed(folder: Path, known: dict[str, Any], **remediation: Any) -> list[tuple[int, str, str, str]]:
    control = {"command": {"restart": ["true"]}, "start_within": "1m"}
    service = {"host": "h", "probe": {"http": {"url": "http://h/"}}, "control": control, "on_failure": "restart"}
    inventory = inventory_of(folder, {
        "hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"web": service, "db": service},
        "remediation": {"automatic": False, "backoff": {"first": "60s", "factor": 1}, "attempts": 2, **remediation},
    }).inventory  # fmt: skip
    empty: dict[str, Any] = {"alerts": {}, "hosts_down": {}, "up": {}, "success": {}, "failures": {}}
    events = replay(inventory, History([number * STEP for number in range(30)], **{**empty, **known}))
    return [(round(event.at / STEP), event.service, event.verb, event.reason) for event in events]


FAILURES = {number * STEP: float(number) for number in range(4, 20)}
DOWN = {
    "alerts": {("ServiceDown", "web"): run(5, 20)},
    "up": {("web",): {**run(0, 5), **run(5, 20, 0.0), **run(20, 30)}},
    "success": {("web",): {**run(0, 4), **run(4, 20, 0.0), **run(20, 30)}},
    "failures": {("web", "connect"): FAILURES},
}


def test_attempts_back_offs_and_the_end(tmp_path: Path) -> None:
    assert replayed(tmp_path, DOWN) == [
        (5, "web", "act", "restart"), (7, "web", "wait", "backing-off"), (9, "web", "act", "restart"),
        (11, "web", "refuse", "attempts-used-up"), (20, "web", "nothing", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rules", "verb", "reason"),
    [
        ({"hosts_down": {("h",): run(0, 30)}}, {}, "wait", "host-down"),
        ({"failures": {("web", "tls"): FAILURES}}, {}, "refuse", "not-restartable"),
        ({}, {"storm": {"at_least": 1, "ratio": 0.4}}, "wait", "storm"),
        ({"up": {}, "success": {}}, {}, "wait", "blind"),
        ({}, {"maintenance": [{"host": "h", "from": "00:00", "to": "00:00"}]}, "wait", "maintenance"),
    ],
)  # fmt: skip
def test_what_would_have_held_it_back(
    tmp_path: Path, change: dict[str, Any], rules: dict[str, Any], verb: str, reason: str
) -> None:
    assert replayed(tmp_path, {**DOWN, **change}, **rules)[0] == (5, "web", verb, reason)


def test_a_service_that_came_up_by_itself_is_not_restarted_again(tmp_path: Path) -> None:
    known = {**DOWN, "alerts": {("ServiceDown", "web"): run(5, 8)}, "up": {("web",): {**run(5, 7, 0.0), **run(7, 30)}}}
    assert replayed(tmp_path, known)[0] == (5, "web", "act", "restart")
    assert [event[2] for event in replayed(tmp_path, known)].count("act") == 1


@pytest.mark.parametrize(
    ("span", "step"), [(300, 1.0), (POINTS - 1, 1.0), (POINTS, 2.0), (86_400, 9.0), (7 * 86_400, STEP)]
)
def test_a_short_time_is_looked_at_more_closely(span: float, step: float) -> None:
    at = list(moments(1_000_000.0, 1_000_000.0 + span))
    assert at[1] - at[0] == step
    assert step == STEP or len(at) <= POINTS + 1

"""The replay of the policy over a constructed history."""

from pathlib import Path
from typing import Any

import pytest

from remediator.replay import MAX_STEP, POINTS, History, evaluation_times, replay
from tests.support import inventory_of

Samples = dict[float, float]
STEP = 30.0  # seconds between the evaluation times of these tests


def samples(begin: int, end: int, value: float = 1.0) -> Samples:
    return {number * STEP: value for number in range(begin, end)}


def replay_history(folder: Path, series: dict[str, Any], **remediation: Any) -> list[tuple[int, str, str, str]]:
    control = {"command": {"restart": ["true"]}, "start_within": "1m"}
    service = {"host": "h", "probe": {"http": {"url": "http://h/"}}, "control": control, "on_failure": "restart"}
    inventory = inventory_of(folder, {
        "hosts": {"h": {"address": "h", "shell": "local"}}, "services": {"web": service, "db": service},
        "remediation": {"automatic": False, "backoff": {"first": "60s", "factor": 1}, "attempts": 2, **remediation},
    }).inventory  # fmt: skip
    empty: dict[str, Any] = {"alerts": {}, "hosts_down": {}, "up": {}, "success": {}, "failures": {}}
    events = replay(inventory, History([number * STEP for number in range(30)], **{**empty, **series}))
    return [(round(event.at / STEP), event.service, event.verb, event.reason) for event in events]


FAILURES = {number * STEP: float(number) for number in range(4, 20)}
DOWN = {
    "alerts": {("ServiceDown", "web"): samples(5, 20)},
    "up": {("web",): {**samples(0, 5), **samples(5, 20, 0.0), **samples(20, 30)}},
    "success": {("web",): {**samples(0, 4), **samples(4, 20, 0.0), **samples(20, 30)}},
    "failures": {("web", "connect"): FAILURES},
}


def test_attempts_back_off_until_they_are_used_up(tmp_path: Path) -> None:
    assert replay_history(tmp_path, DOWN) == [
        (5, "web", "act", "restart"), (7, "web", "wait", "backing-off"), (9, "web", "act", "restart"),
        (11, "web", "refuse", "attempts-used-up"), (20, "web", "nothing", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rules", "verb", "reason"),
    [
        ({"hosts_down": {("h",): samples(0, 30)}}, {}, "wait", "host-down"),
        ({"failures": {("web", "tls"): FAILURES}}, {}, "refuse", "not-restartable"),
        ({}, {"storm": {"at_least": 1, "ratio": 0.4}}, "wait", "storm"),
        ({"up": {}, "success": {}}, {}, "wait", "blind"),
        ({}, {"maintenance": [{"host": "h", "from": "00:00", "to": "00:00"}]}, "wait", "maintenance"),
    ],
)  # fmt: skip
def test_gates_that_would_have_held_the_restart(
    tmp_path: Path, change: dict[str, Any], rules: dict[str, Any], verb: str, reason: str
) -> None:
    assert replay_history(tmp_path, {**DOWN, **change}, **rules)[0] == (5, "web", verb, reason)


def test_a_service_that_recovered_is_not_restarted_again(tmp_path: Path) -> None:
    series = {
        **DOWN,
        "alerts": {("ServiceDown", "web"): samples(5, 8)},
        "up": {("web",): {**samples(5, 7, 0.0), **samples(7, 30)}},
    }
    assert replay_history(tmp_path, series)[0] == (5, "web", "act", "restart")
    assert [event[2] for event in replay_history(tmp_path, series)].count("act") == 1


@pytest.mark.parametrize(
    ("span", "step"), [(300, 1.0), (POINTS - 1, 1.0), (POINTS, 2.0), (86_400, 9.0), (7 * 86_400, MAX_STEP)]
)
def test_a_short_period_is_evaluated_in_smaller_steps(span: float, step: float) -> None:
    times = list(evaluation_times(1_000_000.0, 1_000_000.0 + span))
    assert times[1] - times[0] == step
    assert step == MAX_STEP or len(times) <= POINTS + 1

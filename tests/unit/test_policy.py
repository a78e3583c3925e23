"""The policy: every gate, back-off and attempts, and properties that hold for all situations."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.inventory.model import Backoff, Remediation, Service
from remediator.policy.attempts import backoff_delay, count_in_a_row, counted_since, next_step
from remediator.policy.decisions import decide, explain, find_closed_gate
from remediator.policy.gates import GATES
from remediator.policy.situation import (
    ActionHistory,
    ActionsInProgress,
    ComponentHistory,
    Decision,
    Observation,
    PastAction,
    Refusal,
    Situation,
    Wait,
)
from remediator.policy.storm import is_storm, services_in_group
from tests.support import inventory_of

NOW = 1_000_000.0
DOWN = Observation(up=False, success=False, reason="connect", message="refused")
LADDER = {"steps": ["restart", {"recreate": {"command": ["remake"]}}]}
SUCCEEDED = PastAction(NOW - 80, NOW - 60, succeeded=True)
FAILED = replace(SUCCEEDED, succeeded=False)
AFTER_FAILURE = replace(FAILED, after_failure=True)
FAILED_IN_INCIDENT = ActionHistory(actions=(replace(AFTER_FAILURE, of_incident=True),))
SITUATION = Situation(NOW, frozenset({"ServiceDown"}), ActionHistory(), ActionsInProgress(), DOWN)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Service]:
    return load_services(tmp_path_factory.mktemp("config"))


def load_services(folder: Path) -> dict[str, Service]:
    probe = {"http": {"url": "http://h/"}}
    control = {"command": {"restart": ["true"]}}
    host = {"h": {"address": "h", "shell": "local"}}
    return inventory_of(
        folder,
        {
            "hosts": host,
            "services": {
                "web": {"host": "h", "probe": probe, "control": control, "on_failure": "restart"},
                "notify_only": {"host": "h", "probe": probe, "control": control},
                "bare": {"probe": probe, "on_failure": "restart"},
                "channels": _with_components(automatic=True),
                "both": _with_components(automatic=True, restart=True),
                "manual": _with_components(automatic=False),
            },
        },
    ).inventory.services


def _with_components(*, automatic: bool, restart: bool = False) -> dict[str, Any]:
    listed = {"each": "$.c[*]", "name": "$.name", "up": {"$.state": "running"}}
    component = {"restart": {"url": "http://h/{component}"}, "automatic": automatic}
    control = {"components": ["ch1", "ch2"], "component": component} | ({"restart": "http://h/all"} if restart else {})
    probe = {"status": {"url": "http://h/", "components": listed}}
    return {"probe": probe, "control": {"http": control}, "on_failure": "restart"}


@pytest.mark.parametrize(
    ("service", "rules", "change", "verb", "reason"),
    [
        ("web", {}, {}, "act", None),
        ("web", {}, {"firing": frozenset()}, "nothing", None),
        ("gone", {}, {}, "nothing", None),
        ("web", {}, {"firing": frozenset({"ServiceSlow"})}, "refuse", "not-an-alert-to-act-on"),
        ("web", {"alerts": ["ServiceSlow"]}, {"firing": frozenset({"ServiceSlow"})}, "act", None),
        ("notify_only", {}, {}, "refuse", "notify-only"),
        ("bare", {}, {}, "refuse", "no-control"),
        ("web", {}, {"observed": Observation(True, True, None)}, "refuse", "already-up"),
        ("web", {}, {"observed": Observation(False, True, None)}, "refuse", "already-up"),
        ("web", {}, {"observed": Observation(True, False, "connect")}, "refuse", "already-up"),
        ("web", {}, {"observed": replace(DOWN, reason="tls")}, "refuse", "not-restartable"),
        ("web", {"never_for": []}, {"observed": replace(DOWN, reason="tls")}, "act", None),
        ("web", {}, {"history": ActionHistory({"restart": 3})}, "refuse", "attempts-used-up"),
        ("web", {"attempts": 4}, {"history": ActionHistory({"restart": 3})}, "act", None),
        ("web", {"automatic": False}, {}, "wait", "automation-off"),
        ("web", {}, {"automation": False}, "wait", "automation-off"),
        ("web", {}, {"maintenance": "host h, by ann: disks"}, "wait", "maintenance"),
        ("web", {}, {"scheduled": "group gpu, 02:00 to 04:00"}, "wait", "maintenance"),
        ("web", {}, {"silenced": "silenced by 1"}, "wait", "silenced"),
        ("web", {}, {"gone": True}, "wait", "alert-gone"),
        ("web", {}, {"healing": "docker is restarting it"}, "wait", "healing-itself"),
        (
            "web",
            {},
            {"healing": "docker …", "history": ActionHistory(healing_since=NOW - 299)},
            "wait",
            "healing-itself",
        ),
        ("web", {}, {"healing": "docker …", "history": ActionHistory(healing_since=NOW - 300)}, "act", None),
        ("web", {}, {"stopped": "by ann"}, "wait", "stopped"),
        ("web", {"respect_stop": False}, {"stopped": "by ann"}, "wait", "stopped"),
        (
            "web",
            {},
            {"stopped": "by ann", "history": ActionHistory({"restart": 3}), "observed": None},
            "wait",
            "stopped",
        ),
        ("web", {}, {"stopped": "by ann", "approved": True}, "act", None),
        ("web", {}, {"stopped_by_hand": "s"}, "wait", "stopped-by-hand"),
        ("web", {"respect_stop": False}, {"stopped_by_hand": "s"}, "act", None),
        ("web", {}, {"stopped_by_hand": "s", "approved": True}, "act", None),
        ("web", {}, {"withheld": "it is paused"}, "wait", "stopped-by-hand"),
        ("web", {"respect_stop": False}, {"withheld": "it is paused"}, "act", None),
        (
            "web",
            {},
            {"withheld": "it is masked", "stopped_for": 70.0, "history": FAILED_IN_INCIDENT},
            "wait",
            "stopped-by-hand",
        ),
        # A stop that was observed earlier holds until the target has another run.
        (
            "web",
            {},
            {"run": "t1", "history": ActionHistory(stopped_run="t1", stopped_why="s")},
            "wait",
            "stopped-by-hand",
        ),
        ("web", {}, {"run": "t2", "history": ActionHistory(stopped_run="t1", stopped_why="s")}, "act", None),
        (
            "web",
            {},
            {"unseen": "no answer", "history": ActionHistory(stopped_run="t1", stopped_why="s")},
            "wait",
            "stopped-by-hand",
        ),
        ("web", {}, {"run": "t1", "history": ActionHistory(stopped_why="it is paused")}, "act", None),
        (
            "web",
            {},
            {"unseen": "no answer", "history": ActionHistory(stopped_why="it is paused")},
            "wait",
            "stopped-by-hand",
        ),
        ("web", {}, {"unseen": "no answer"}, "act", None),
        # Without permission to read the state, a stop cannot be respected.
        ("web", {}, {"refused": "docker is not in the list"}, "refuse", "sudo-refused"),
        ("web", {"respect_stop": False}, {"refused": "docker is not in the list"}, "act", None),
        # An action reset the failure and could not start the target: an end before it, or at an unknown time, is no stop.
        ("web", {}, {"stopped_by_hand": "s", "stopped_for": 200.0, "history": FAILED_IN_INCIDENT}, "act", None),
        ("web", {}, {"stopped_by_hand": "s", "history": FAILED_IN_INCIDENT}, "act", None),
        (
            "web",
            {},
            {"stopped_by_hand": "s", "stopped_for": 5.0, "history": FAILED_IN_INCIDENT},
            "wait",
            "stopped-by-hand",
        ),
        # The target has run since, or the action was for another incident.
        (
            "web",
            {},
            {"stopped_by_hand": "s", "history": ActionHistory(actions=(SUCCEEDED, *FAILED_IN_INCIDENT.actions))},
            "wait",
            "stopped-by-hand",
        ),
        (
            "web",
            {},
            {"stopped_by_hand": "s", "history": ActionHistory(actions=(AFTER_FAILURE,))},
            "wait",
            "stopped-by-hand",
        ),
        # A failed restart stopped the target. A stop before or after it, or after a successful restart, is a manual one.
        (
            "web",
            {},
            {"stopped_by_hand": "s", "stopped_for": 70.0, "history": ActionHistory(actions=(FAILED, SUCCEEDED))},
            "act",
            None,
        ),
        (
            "web",
            {},
            {"stopped_by_hand": "s", "stopped_for": 200.0, "history": ActionHistory(actions=(SUCCEEDED, FAILED))},
            "wait",
            "stopped-by-hand",
        ),
        (
            "web",
            {},
            {"stopped_by_hand": "s", "stopped_for": 5.0, "history": ActionHistory(actions=(SUCCEEDED, FAILED))},
            "wait",
            "stopped-by-hand",
        ),
        (
            "web",
            {},
            {"stopped_by_hand": "s", "stopped_for": None, "history": ActionHistory(actions=(SUCCEEDED, FAILED))},
            "wait",
            "stopped-by-hand",
        ),
        (
            "web",
            {},
            {"stopped_by_hand": "s", "stopped_for": 70.0, "history": ActionHistory(actions=(SUCCEEDED,))},
            "wait",
            "stopped-by-hand",
        ),
        ("web", {}, {"age": 299.0}, "wait", "starting"),
        ("web", {}, {"age": 300.0}, "act", None),
        ("web", {}, {"age": 70.0, "history": ActionHistory(actions=(SUCCEEDED,))}, "act", None),
        ("web", {}, {"age": 40.0, "history": ActionHistory(actions=(SUCCEEDED,))}, "wait", "starting"),
        ("web", {}, {"age": 100.0, "history": ActionHistory(actions=(SUCCEEDED,))}, "wait", "starting"),
        ("web", {}, {"age": 5.0, "history": ActionHistory(starting_since=NOW - 299)}, "wait", "starting"),
        ("web", {}, {"age": 5.0, "history": ActionHistory(starting_since=NOW - 300)}, "act", None),
        ("web", {}, {"history": ActionHistory(blocked="host-key-changed")}, "refuse", "host-key-changed"),
        ("web", {}, {"history": ActionHistory(blocked="sudo-refused")}, "refuse", "sudo-refused"),
        ("web", LADDER, {"history": ActionHistory({"restart": 3})}, "wait", "approval"),
        ("web", LADDER, {"history": ActionHistory({"restart": 3}), "approved": True}, "act", None),
        ("web", LADDER, {"history": ActionHistory({"restart": 3, "recreate": 1})}, "refuse", "attempts-used-up"),
        ("web", {"steps": [{"recreate": {}}]}, {}, "refuse", "attempts-used-up"),
        ("web", {"steps": [{"restart": {"approve": True}}]}, {}, "wait", "approval"),
        ("web", {}, {"host_down": True}, "wait", "host-down"),
        ("web", {}, {"dependencies_down": ("db",)}, "wait", "dependency-down"),
        ("web", {}, {"storm": (3, 5)}, "wait", "storm"),
        ("web", {}, {"history": ActionHistory({"restart": 1}, 1, NOW - 59)}, "wait", "backing-off"),
        ("web", {}, {"history": ActionHistory({"restart": 1}, 1, NOW - 60)}, "act", None),
        ("web", {}, {"history": ActionHistory({"restart": 1}, 0, NOW - 1)}, "act", None),
        ("web", {}, {"in_progress": ActionsInProgress(target_busy=True)}, "wait", "target-busy"),
        ("web", {}, {"in_progress": ActionsInProgress(on_host=1)}, "wait", "host-busy"),
        ("web", {}, {"in_progress": ActionsInProgress(in_flight=5)}, "wait", "fleet-busy"),
        ("web", {}, {"in_progress": ActionsInProgress(in_budget_window=(NOW,) * 20)}, "wait", "fleet-busy"),
        ("web", {}, {"observed": None}, "wait", "blind"),
        ("web", {}, {"observed": Observation(None, False, "connect")}, "wait", "blind"),
    ],
)
def test_decisions(
    services: dict[str, Service],
    service: str,
    rules: dict[str, Any],
    change: dict[str, Any],
    verb: str,
    reason: str | None,
) -> None:
    decision = decide(services.get(service), Remediation(**rules), replace(SITUATION, **change))
    assert (decision.verb, decision.reason) == (verb, reason)
    if service == "web":
        # The first closed gate of `explain` is the reason of the decision.
        closed = [
            each.name
            for each in explain(services["web"], Remediation(**rules), replace(SITUATION, **change))
            if each.closed
        ]
        assert verb == "nothing" or (closed[0] if closed else None) == reason


def _restarted(component: str, **more: Any) -> dict[str, Any]:
    return {"history": ActionHistory(components={component: ComponentHistory(**more)})}


PAGE = Observation(
    False, False, "state", "3 of 4", components_up=frozenset({"ch4"}),
    components_down=frozenset({"ch1", "ch2", "unlisted"}),
)  # fmt: skip
COMPONENTS = replace(
    SITUATION,
    observed=PAGE,
    alerting_components=frozenset({"ch2", "unlisted"}),
)
ONLY_COMPONENTS: dict[str, Any] = {
    "firing": frozenset({"ServiceComponentDown"}), "observed": replace(PAGE, up=True, success=True)
}  # fmt: skip
USED_UP = ActionHistory(components={"ch1": ComponentHistory(3, 3, NOW), "ch2": ComponentHistory(3, 3, NOW)})


@pytest.mark.parametrize(
    ("service", "rules", "change", "result"),
    [
        ("channels", {}, {}, ("act", None, "ch1")),
        ("manual", {}, {}, ("refuse", "no-control", "")),
        ("channels", {}, _restarted("ch1", attempts=3, tries=3, last_ended=NOW), ("act", None, "ch2")),
        ("channels", {}, _restarted("ch1", attempts=1, tries=1, last_ended=NOW - 1), ("act", None, "ch2")),
        ("channels", {}, _restarted("ch1", attempts=1, tries=1, last_ended=NOW - 60), ("act", None, "ch1")),
        ("channels", {}, {"history": USED_UP}, ("refuse", "no-control", "")),
        ("both", {}, {"history": USED_UP}, ("act", None, "")),
        ("both", {}, {}, ("act", None, "ch1")),
        ("both", {"steps": [{"restart": {"approve": True}}]}, {}, ("act", None, "ch1")),
        ("both", {}, {"observed": replace(PAGE, components_down=frozenset())}, ("act", None, "")),
        ("both", {}, {"automation": False}, ("wait", "automation-off", "")),
        # Of a page without any component that is up, the service itself is restarted, if that is possible.
        ("both", {}, {"observed": replace(PAGE, components_up=frozenset())}, ("act", None, "")),
        ("channels", {}, {"observed": replace(PAGE, components_up=frozenset())}, ("act", None, "ch1")),
        # A service that responds is never restarted.
        ("both", {}, {"observed": replace(PAGE, up=True, success=True), "history": USED_UP},
         ("refuse", "already-up", "")),
        ("both", {"alerts": ["ServiceDown", "ServiceComponentDown"]}, ONLY_COMPONENTS | {"history": USED_UP},
         ("refuse", "already-up", "")),
        # Without an alert about the service, only components with an alert are restarted, and never the service.
        ("channels", {}, ONLY_COMPONENTS, ("act", None, "ch2")),
        ("manual", {}, ONLY_COMPONENTS, ("refuse", "not-an-alert-to-act-on", "")),
        ("both", {}, ONLY_COMPONENTS | {"alerting_components": frozenset({"unlisted"})},
         ("refuse", "not-an-alert-to-act-on", "")),
        ("both", {}, ONLY_COMPONENTS | {"history": USED_UP}, ("refuse", "attempts-used-up", "")),
        ("channels", {}, ONLY_COMPONENTS | {"history": USED_UP}, ("refuse", "attempts-used-up", "")),
        ("both", {}, ONLY_COMPONENTS | _restarted("ch2", attempts=1, tries=1, last_ended=NOW - 1),
         ("wait", "backing-off", "")),
        ("both", {}, ONLY_COMPONENTS | {"silenced": "by 1"}, ("wait", "silenced", "")),
        ("both", {}, ONLY_COMPONENTS | {"muted_components": frozenset({"ch2"})},
         ("refuse", "not-an-alert-to-act-on", "")),
    ],
)  # fmt: skip
def test_components_are_restarted_before_their_service(
    services: dict[str, Service], service: str, rules: dict[str, Any], change: dict[str, Any], result: tuple[str, ...]
) -> None:
    decision = decide(services[service], Remediation(**rules), replace(COMPONENTS, **change))
    assert (decision.verb, decision.reason, decision.component) == result


@pytest.mark.parametrize(
    ("restarts", "number"),
    [
        ([], 0), ([(90, 95)], 1), ([(90, None)], 1), ([(80, 90)], 0), ([(90, 95), (80, 85), (70, 75)], 3),
        ([(90, 95), (70, 75), (65, 70)], 1),
    ],
)  # fmt: skip
def test_restarts_in_a_row_are_less_than_the_window_apart(
    restarts: list[tuple[float, float | None]], number: int
) -> None:
    assert count_in_a_row(restarts, 10, 100) == number


def test_every_refusal_and_wait_has_a_gate() -> None:
    assert set(GATES) == {*get_args(Refusal), *get_args(Wait)}


def test_the_next_step_follows_when_the_attempts_of_a_step_are_used_up(services: dict[str, Service]) -> None:
    rules = Remediation(**LADDER)
    steps = [
        next_step(services["web"], rules, ActionHistory({"restart": n, "recreate": m}))
        for n, m in ((0, 0), (2, 0), (3, 0), (3, 1))
    ]
    assert [step.kind if step else None for step in steps] == ["restart", "restart", "recreate", None]


@pytest.mark.parametrize(
    ("change", "overruled", "reason"),
    [
        ({}, [], None), ({"storm": (3, 4)}, [], "storm"), ({"storm": (3, 4)}, ["storm"], None),
        ({"maintenance": "m", "storm": (3, 4)}, ["storm"], "maintenance"), ({"automation": False}, [], None),
        ({"in_progress": ActionsInProgress(target_busy=True)}, ["target-busy"], "target-busy"),
        ({"in_progress": ActionsInProgress(on_host=1)}, ["host-busy"], "host-busy"),
        ({"observed": None}, [], None), ({"observed": Observation(True, True, None)}, [], None),
        ({"history": ActionHistory({"restart": 9}, 9, NOW)}, [], None),
        ({"stopped": "by ann", "stopped_by_hand": "s", "withheld": "it is paused", "age": 1.0}, [], None),
    ],
)  # fmt: skip
def test_gates_that_hold_an_operator_s_action(
    services: dict[str, Service], change: dict[str, Any], overruled: list[str], reason: str | None
) -> None:
    held = find_closed_gate(services["web"], Remediation(), replace(SITUATION, **change), overruled)
    assert (held.reason if held else None) == reason


def test_a_wait_ends_at_its_known_end_or_is_decided_again(services: dict[str, Service]) -> None:
    rules = Remediation()
    decision = decide(services["web"], rules, replace(SITUATION, history=ActionHistory({"restart": 1}, 1, NOW - 50)))
    assert decision.until == NOW + 10
    decision = decide(services["web"], rules, replace(SITUATION, history=ActionHistory({"restart": 2}, 2, NOW - 50)))
    assert decision.until == NOW + 30
    assert decide(services["web"], rules, replace(SITUATION, age=290.0)).until == NOW + 10


situations = st.builds(
    Situation,
    now=st.floats(0, 2e9),
    firing=st.frozensets(st.sampled_from(["ServiceDown", "ServiceSlow"])),
    history=st.builds(
        ActionHistory, attempts=st.fixed_dictionaries({}, optional={"restart": st.integers(0, 5), "recreate": st.integers(0, 2)}),
        tries=st.integers(0, 5), last_ended=st.none() | st.floats(0, 2e9),
        blocked=st.sampled_from([None, None, "sudo-refused"]),
    ),
    in_progress=st.builds(
        ActionsInProgress, target_busy=st.booleans(), on_host=st.integers(0, 2), in_flight=st.integers(0, 6),
        in_budget_window=st.lists(st.floats(0, 2e9), max_size=25).map(lambda times: tuple(sorted(times))),
    ),
    observed=st.none() | st.builds(
        Observation, up=st.none() | st.booleans(), success=st.none() | st.booleans(),
        reason=st.none() | st.sampled_from(["connect", "timeout", "tls", "error", "status"]),
    ),
    automation=st.booleans(), maintenance=st.sampled_from(["", "m"]), scheduled=st.sampled_from(["", "s"]),
    silenced=st.sampled_from(["", "s"]), gone=st.booleans(), healing=st.sampled_from(["", "h"]), approved=st.booleans(),
    host_down=st.booleans(),
    dependencies_down=st.sampled_from([(), ("db",)]),
    storm=st.none() | st.just((3, 4)),
    age=st.none() | st.floats(0, 600),
    stopped=st.sampled_from(["", "", "s"]),
    stopped_by_hand=st.sampled_from(["", "", "s"]),
    withheld=st.sampled_from(["", "", "it is paused"]),
    refused=st.sampled_from(["", "", "not in the list"]),
)  # fmt: skip


@given(
    situation=situations, automatic=st.booleans(), service=st.sampled_from(["web", "notify_only", "bare", "removed"])
)
def test_an_action_meets_all_conditions_of_safety(
    services: dict[str, Service], situation: Situation, automatic: bool, service: str
) -> None:
    rules = Remediation(automatic=automatic, **LADDER)
    decision = decide(services.get(service), rules, situation)
    assert isinstance(decision, Decision)
    if decision.verb == "wait":
        assert decision.until is not None
        assert decision.until <= situation.now + 30
    if decision.verb != "act":
        return
    assert service == "web"
    assert automatic
    assert "ServiceDown" in situation.firing
    assert situation.observed is not None
    assert situation.observed.up is False
    assert not situation.observed.success
    assert situation.observed.reason not in rules.never_for
    assert not situation.in_progress.target_busy
    assert situation.in_progress.on_host < 1
    assert decision.step is not None
    used = situation.history.attempts.get(decision.step.kind, 0)
    assert used < (3 if decision.step.kind == "restart" else 1)
    assert decision.step.kind == "restart" or situation.approved
    assert situation.automation
    assert not any((situation.maintenance, situation.scheduled, situation.silenced, situation.gone))
    assert situation.history.blocked is None
    assert situation.approved or not situation.refused
    assert situation.approved or not (situation.stopped or situation.stopped_by_hand or situation.withheld)
    assert situation.age is None or situation.age >= 300
    assert not situation.host_down
    assert situation.storm is None
    assert len(situation.in_progress.in_budget_window) < 20


def test_back_off_grows_to_its_cap() -> None:
    rules = Backoff()
    assert [backoff_delay(rules, tries) for tries in (1, 2, 3, 4, 5, 1000)] == [60, 120, 240, 480, 900, 900]


@pytest.mark.parametrize(
    ("attempts", "outages", "count"),
    [
        ([], [], 0),
        ([10, 20, 30], [(5, None)], 3),
        ([10, 5000], [(5, 100), (4000, None)], 1),  # up for more than an hour in between
        ([10, 2000], [(5, 100), (1000, None)], 2),
        ([10, 2000, 9000], [(5, 100), (1000, 2100), (8000, None)], 1),
    ],
)
def test_attempts_are_available_again_after_the_service_was_up_for_an_hour(
    attempts: list[float], outages: list[tuple[float, float | None]], count: int
) -> None:
    since = counted_since(outages, 3600.0, outages[-1][0] if outages else 0.0)
    assert len([at for at in attempts if at > since]) == count


@pytest.mark.parametrize(("now", "count"), [(3000.0, 1), (3700.0, 0)])
def test_attempts_are_available_again_while_the_service_is_still_up(now: float, count: int) -> None:
    since = counted_since([(5, 100)], 3600.0, now)
    assert len([at for at in [10] if at > since]) == count


@pytest.mark.parametrize(("failing", "total", "storm"), [(2, 2, False), (3, 6, False), (4, 6, True), (3, 3, True)])
def test_a_storm_is_more_than_half_and_at_least_three(failing: int, total: int, storm: bool) -> None:
    assert is_storm(Remediation(), failing, total) is storm


def test_the_group_of_a_service_without_a_group_is_the_fleet() -> None:
    groups = {"a": "gpu", "b": "gpu", "c": ""}
    assert services_in_group("a", groups) == ["a", "b"]
    assert services_in_group("c", groups) == ["a", "b", "c"]

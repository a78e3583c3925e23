"""What to do about an incident. Pure: the same situation gives the same decision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fleet.model import Backoff, Remediation, Service

DECIDE_AGAIN = 30.0
BUDGET_WINDOW = 600.0
Refusal = Literal[
    "not-an-alert-to-act-on", "notify-only", "no-control", "already-up", "not-restartable", "attempts-used-up"
]
Wait = Literal[
    "automation-off", "host-down", "dependency-down", "storm", "backing-off",
    "target-busy", "host-busy", "fleet-busy", "blind",
]  # fmt: skip


@dataclass(frozen=True)
class Observation:
    """What the exporter says of one service; `success` and `reason` are its last probe's, None before the first."""

    up: bool | None
    success: bool | None
    reason: str | None
    message: str = ""
    since: float | None = None  # Unix time of the last change of `up`


@dataclass(frozen=True)
class Past:
    """What was done to a target. Times are Unix seconds."""

    attempts: int = 0  # of the budget: since the last `window` of continuous up
    tries: int = 0  # in this incident, the ones that never reached the host too
    last_ended: float | None = None
    last_action: int = 0  # the record's number of the last one


@dataclass(frozen=True)
class Present:
    """What is under way in the fleet."""

    target_busy: bool = False
    on_host: int = 0
    in_flight: int = 0
    in_budget_window: Sequence[float] = ()  # when each action of the last ten minutes was claimed, oldest first


@dataclass(frozen=True)
class Situation:
    """All that a decision depends on."""

    now: float
    firing: frozenset[str]  # names of the alerts that fire for the target
    past: Past
    present: Present
    observed: Observation | None  # None: the exporter cannot be asked
    host_down: bool = False
    dependencies_down: tuple[str, ...] = ()
    storm: tuple[int, int] | None = None  # failing and all services of the group, where that is a storm


@dataclass(frozen=True)
class Decision:
    """`act`, `wait` (until a Unix time), `refuse` or `nothing`, and why."""

    verb: Literal["act", "wait", "refuse", "nothing"]
    reason: Refusal | Wait | None = None
    until: float | None = None
    detail: str = ""


def decide(service: Service | None, rules: Remediation, situation: Situation) -> Decision:
    """The decision about a target whose inventory entry is `service`; `rules` are those that hold for it."""
    if service is None or not situation.firing:
        return Decision("nothing")
    return (
        _by_inventory(service, rules, situation)
        or _by_observation(rules, situation)
        or _by_past(rules, situation)
        or _by_fleet(situation)
        or _by_load(rules, situation)
        or Decision("act")
    )


def _by_inventory(service: Service, rules: Remediation, situation: Situation) -> Decision | None:
    if not situation.firing & set(rules.alerts):
        return Decision("refuse", "not-an-alert-to-act-on", detail=", ".join(sorted(situation.firing)))
    if service.on_failure == "notify":
        return Decision("refuse", "notify-only")
    if service.control is None or "restart" not in service.control.options.verbs:
        return Decision("refuse", "no-control")
    return None


def _by_observation(rules: Remediation, situation: Situation) -> Decision | None:
    if situation.present.target_busy:
        return _wait(situation, "target-busy")
    seen = situation.observed
    if seen is None:
        return _wait(situation, "blind", "the exporter cannot be asked")
    if seen.success or seen.up:
        return Decision("refuse", "already-up")
    if seen.up is None:
        return _wait(situation, "blind", "the exporter has not decided yet")
    if seen.reason in rules.never_for:
        return Decision("refuse", "not-restartable", detail=f"{seen.reason}: {seen.message}")
    return None


def _by_past(rules: Remediation, situation: Situation) -> Decision | None:
    past = situation.past
    if past.attempts >= rules.attempts:
        return Decision("refuse", "attempts-used-up", detail=f"{past.attempts} of {rules.attempts}")
    if not rules.automatic:
        return _wait(situation, "automation-off")
    if past.tries and past.last_ended is not None:
        until = past.last_ended + backoff(rules.backoff, past.tries)
        if situation.now < until:
            return _wait(situation, "backing-off", f"after {past.tries} tries", until)
    return None


def _by_fleet(situation: Situation) -> Decision | None:
    if situation.host_down:
        return _wait(situation, "host-down")
    if situation.dependencies_down:
        return _wait(situation, "dependency-down", ", ".join(situation.dependencies_down))
    if situation.storm:
        failing, total = situation.storm
        return _wait(situation, "storm", f"{failing} of {total} services of its group are failing")
    return None


def _by_load(rules: Remediation, situation: Situation) -> Decision | None:
    present = situation.present
    if present.on_host >= rules.actions_per_host:
        return _wait(situation, "host-busy")
    if present.in_flight >= rules.actions_in_flight:
        return _wait(situation, "fleet-busy", f"{present.in_flight} commands are running")
    if len(present.in_budget_window) >= rules.actions_per_10m:
        oldest = present.in_budget_window[-rules.actions_per_10m]
        return _wait(situation, "fleet-busy", "the actions of ten minutes are used up", oldest + BUDGET_WINDOW)
    return None


def _wait(situation: Situation, reason: Wait, detail: str = "", until: float | None = None) -> Decision:
    again = situation.now + DECIDE_AGAIN
    return Decision("wait", reason, min(until, again) if until else again, detail)


def backoff(rules: Backoff, tries: int) -> float:
    """Seconds between the end of try number `tries` and the next."""
    # The exponent is bounded, since a float is not.
    return min(rules.cap, rules.first * rules.factor ** min(tries - 1, 64))


def is_storm(rules: Remediation, failing: int, total: int) -> bool:
    return failing >= rules.storm.at_least and failing > rules.storm.ratio * total


def attempts_since_refill(
    attempts: Sequence[float], outages: Sequence[tuple[float, float | None]], window: float
) -> int:
    """How many of `attempts` count against the budget: those since the last `window` of continuous up.

    `outages` are the target's incidents as (opened, closed) in order; between two of them it was up.
    """
    since = float("-inf")
    closed: float | None = None
    for opened, ended in outages:
        if closed is not None and opened - closed >= window:
            since = closed
        closed = ended
    return sum(1 for at in attempts if at > since)


def group_of(service: str, groups: Mapping[str, str]) -> list[str]:
    """The services that share a host group with `service`; those without a group are one with the whole fleet."""
    group = groups.get(service, "")
    return [name for name, other in groups.items() if other == group] if group else list(groups)

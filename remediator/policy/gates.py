"""The gates: each holds an action for one reason, or lets it pass. They are checked in the order of `GATES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from fleet.inventory.digests import digests_differ
from fleet.inventory.model import HostAlert, Remediable, Remediation, WakeStep
from fleet.inventory.units import format_duration
from remediator.policy.attempts import max_attempts, next_step, next_try_at, supported_steps
from remediator.policy.components import (
    backing_off_until,
    concerns_only_components,
    find_down,
    find_restartable,
    is_about_components,
    next_component,
)
from remediator.policy.situation import STUCK, GateName, PastAction, Situation
from remediator.policy.storm import step_size

BUDGET_WINDOW = 600.0  # seconds
START_TOLERANCE = 5.0  # seconds by which a host's start time may differ from ours
BOOT_PATIENCE = 180.0  # seconds in which the services of a host that was down start without Defib
STOP_TOLERANCE = 45.0  # seconds for a stop, which supervisor reports to the minute


@dataclass(frozen=True)
class ClosedGate:
    """Why a gate is closed, and until when if that is known."""

    detail: str = ""
    until: float | None = None


def _not_an_alert(service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    if situation.firing & set(rules.alerts):
        return None
    if find_down(service, rules, situation):
        return None
    return ClosedGate(", ".join(sorted(situation.firing)))


def _notify_only(service: Remediable, _rules: Remediation, _situation: Situation) -> ClosedGate | None:
    return ClosedGate() if service.on_failure == "notify" else None


def _no_control(service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    if is_about_components(service, rules, situation) or (service.agent is not None and service.agent.wake):
        return None
    return None if service.control is not None and "restart" in service.control.options.verbs else ClosedGate()


def _stopped(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    return ClosedGate(situation.stopped) if situation.stopped and not situation.approved else None


def _target_busy(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    return ClosedGate() if situation.in_progress.target_busy else None


def _blind(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    seen = situation.observed
    if seen is None:
        return ClosedGate("cannot connect to the exporter")
    if seen.is_up is not None or seen.paused:  # the maintenance holds the action then
        return None
    return ClosedGate("the exporter has no result yet")


def _config_mismatch(service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    seen = situation.observed
    if seen is None or not digests_differ(service.digest, seen.digest):
        return None
    return ClosedGate("the exporter and the remediator have different configurations of it: reload both")


def _already_up(service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    seen = situation.observed
    if is_about_components(service, rules, situation):
        return None
    return ClosedGate() if seen is not None and seen.is_up else None


def _not_restartable(_service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    seen = situation.observed
    return ClosedGate(f"{seen.reason}: {seen.message}") if seen is not None and seen.reason in rules.never_for else None


def _host_key_changed(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    return ClosedGate() if situation.history.blocked == "host-key-changed" else None


def _sudo_refused(_service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    """Defib may not act, or may not read whether somebody stopped the target on purpose."""
    if situation.history.blocked == "sudo-refused":
        return ClosedGate()
    return (
        ClosedGate(situation.refused) if situation.refused and rules.respect_stop and not situation.approved else None
    )


def _attempts_used_up(service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    if find_restartable(service, rules, situation):
        return None
    if concerns_only_components(rules, situation) and (down := find_down(service, rules, situation)):
        return ClosedGate(", ".join(f"restart component {name}: {rules.attempts} of {rules.attempts}" for name in down))
    if next_step(service, rules, situation.history) is not None:
        return None
    used = situation.history.attempts
    steps = supported_steps(service, rules)
    if not steps and service.control is None:
        return None  # there are no attempts
    return ClosedGate(
        ", ".join(f"{step.kind}: {used.get(step.kind, 0)} of {max_attempts(step, rules)}" for step in steps)
    )


def _automation_off(_service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    if not rules.automatic:
        return ClosedGate("remediation.automatic is false")
    return None if situation.automation else ClosedGate("an operator switched it off")


def _maintenance(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    why = situation.maintenance or situation.scheduled
    return ClosedGate(why, situation.maintenance_ends) if why else None


def _silenced(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    return ClosedGate(situation.silenced) if situation.silenced else None


def _alert_gone(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    return ClosedGate() if situation.gone else None


def _backing_off(service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    if components := find_restartable(service, rules, situation):
        if next_component(service, rules, situation):
            return None
        until = min(backing_off_until(name, rules, situation) for name in components)
        return ClosedGate(f"components {', '.join(components)}", until)
    history = situation.history
    next_try = next_try_at(rules.backoff, history)
    if next_try is None or situation.now >= next_try:
        return None
    return ClosedGate("after 1 try" if history.tries == 1 else f"after {history.tries} tries", next_try)


def _healing_itself(service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    """The target restarts without Defib: wait for it, but only for `start_within`."""
    patience = service.control.start_within if service.control is not None else 0.0
    since = situation.history.healing_since
    ends = since + patience if since is not None else None
    long_enough = ends is not None and situation.now >= ends
    return ClosedGate(situation.healing, ends) if situation.healing and not long_enough else None


def _stopped_by_hand(_service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    """Do not start what somebody stopped. A failed action that left the target stopped does not count as a stop."""
    if situation.approved or not rules.respect_stop:
        return None
    if situation.withheld:
        return ClosedGate(situation.withheld)
    history = situation.history
    if not situation.stopped_by_hand:
        # An earlier observation is valid until the target has run again.
        still = bool(situation.unseen) if not situation.run else situation.run == history.stopped_run
        return ClosedGate(history.stopped_why) if history.stopped_why and still else None
    since = situation.stopped_for
    at = situation.now - since if since is not None else None
    failed = takewhile(lambda action: not action.succeeded, history.actions)
    return None if any(_may_have_stopped(action, at) for action in failed) else ClosedGate(situation.stopped_by_hand)


def _may_have_stopped(action: PastAction, at: float | None) -> bool:
    """Whether a failed action may be what stopped the target at a time."""
    if at is not None and action.covers(at, STOP_TOLERANCE):
        return True
    # The action reset the unit's failed state without starting it.
    stopped_before = at is None or (action.ended is not None and at <= action.ended)
    return action.after_failure and action.of_incident and stopped_before


def _starting(service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    """Somebody else has just started the target: wait for `start_within`, once per incident."""
    patience = service.control.start_within if service.control is not None else 0.0
    now, age, history = situation.now, situation.age, situation.history
    waited = 0.0 if history.starting_since is None else now - history.starting_since
    booting = min(patience, BOOT_PATIENCE)
    if situation.host_up_for is not None and max(situation.host_up_for, waited) < booting:
        why = f"its host was down until {situation.host_up_for:.0f} s ago; its services have {booting:g} s to come up"
        return ClosedGate(why, now + booting - max(situation.host_up_for, waited))
    if age is None or age >= patience or any(action.covers(now - age, START_TOLERANCE) for action in history.actions):
        return None
    if history.starting_since is not None and now - history.starting_since >= patience:
        return None
    return ClosedGate(f"started {age:.0f} s ago; it has {patience:g} s to come up", now + patience - age)


def _host_down(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    return ClosedGate() if situation.host_down else None


def _dependency_down(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    return ClosedGate(", ".join(situation.dependencies_down)) if situation.dependencies_down else None


def _storm(_service: Remediable, _rules: Remediation, situation: Situation) -> ClosedGate | None:
    if situation.storm is None:
        return None
    failing, total = situation.storm
    if not situation.storm_steps:
        return ClosedGate(f"{failing} of {total} services in its group are failing")
    if situation.in_progress.in_group < step_size(total):
        return None
    return ClosedGate(f"{failing} of {total} services in its group are failing; they are restarted one after the other")


def _unconfirmed(service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    """An agent that may be stuck is woken, and not yet restarted."""
    seen, step = situation.observed, next_step(service, rules, situation.history)
    if seen is None or seen.reason != STUCK or seen.confirmed or isinstance(step, WakeStep) or service.agent is None:
        return None
    return ClosedGate(f"it is restarted after {format_duration(service.agent.confirm_after)} without progress")


def _approval(service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    if next_component(service, rules, situation):
        return None
    step = next_step(service, rules, situation.history)
    return ClosedGate(step.kind) if step is not None and step.needs_approval and not situation.approved else None


def _host_busy(_service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    in_progress = situation.in_progress
    if in_progress.on_host >= rules.actions_per_host:
        return ClosedGate()
    if in_progress.on_host + in_progress.ahead_on_host >= rules.actions_per_host:
        return ClosedGate(_describe_ahead(in_progress.ahead_on_host))
    return None


def _fleet_busy(_service: Remediable, rules: Remediation, situation: Situation) -> ClosedGate | None:
    in_progress = situation.in_progress
    if in_progress.in_flight >= rules.actions_in_flight:
        return ClosedGate(f"{in_progress.in_flight} commands are running")
    if len(in_progress.in_budget_window) >= rules.actions_per_10m:
        oldest = in_progress.in_budget_window[-rules.actions_per_10m]
        return ClosedGate("the limit of actions in ten minutes is reached", oldest + BUDGET_WINDOW)
    free = min(
        rules.actions_in_flight - in_progress.in_flight, rules.actions_per_10m - len(in_progress.in_budget_window)
    )
    return ClosedGate(_describe_ahead(in_progress.ahead_in_fleet)) if in_progress.ahead_in_fleet >= free else None


def _describe_ahead(services: int) -> str:
    """Say that services with fewer tries, which a restart is more likely to help, go first."""
    return (
        "1 service with fewer tries goes first" if services == 1 else f"{services} services with fewer tries go first"
    )


Gate = Callable[[Remediable, Remediation, Situation], ClosedGate | None]
GATES: Mapping[GateName, Gate] = {
    "not-an-alert-to-act-on": _not_an_alert,
    "stopped": _stopped,
    "notify-only": _notify_only,
    "no-control": _no_control,
    "target-busy": _target_busy,
    "blind": _blind,
    "config-mismatch": _config_mismatch,
    "already-up": _already_up,
    "host-down": _host_down,  # before the gates that depend on the probe's reason
    "not-restartable": _not_restartable,
    "host-key-changed": _host_key_changed,
    "sudo-refused": _sudo_refused,
    "attempts-used-up": _attempts_used_up,
    "automation-off": _automation_off,
    "maintenance": _maintenance,
    "silenced": _silenced,
    "alert-gone": _alert_gone,
    "backing-off": _backing_off,
    "dependency-down": _dependency_down,
    "storm": _storm,
    "stopped-by-hand": _stopped_by_hand,
    "healing-itself": _healing_itself,
    "starting": _starting,
    "unconfirmed": _unconfirmed,
    "approval": _approval,
    "host-busy": _host_busy,
    "fleet-busy": _fleet_busy,
}
# A runbook depends on no probe and has no target that somebody could stop or start.
_NOT_OF_HOST_ALERTS: frozenset[GateName] = frozenset(
    {
        "stopped", "notify-only", "no-control", "blind", "config-mismatch", "already-up", "not-restartable",
        "dependency-down", "stopped-by-hand", "healing-itself", "starting", "unconfirmed",
    }
)  # fmt: skip
_GATES_OF_HOST_ALERTS = {name: gate for name, gate in GATES.items() if name not in _NOT_OF_HOST_ALERTS}


def gates_for(service: Remediable) -> Mapping[GateName, Gate]:
    """Return the gates of actions on a service, or of the runbooks of an alert, in the order of `GATES`."""
    return _GATES_OF_HOST_ALERTS if isinstance(service, HostAlert) else GATES

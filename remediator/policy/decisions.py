"""Decide what to do about an incident: the first gate that is closed holds the action."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import get_args

from fleet.inventory.model import Remediable, Remediation, RemediationStep
from remediator.policy.attempts import next_step
from remediator.policy.components import next_component
from remediator.policy.gates import ClosedGate, gates_for
from remediator.policy.situation import LOCKS, OVERRULABLE, Decision, GateName, Refusal, Situation

DECIDE_AGAIN = 30.0  # seconds
RESTART = RemediationStep.model_validate("restart")


@dataclass(frozen=True)
class GateState:
    """A gate as `explain` shows it; `closed` is None if it is open."""

    name: GateName
    closed: ClosedGate | None


def decide(service: Remediable | None, rules: Remediation, situation: Situation) -> Decision:
    """Decide about a service or an alert of a host, None if the inventory does not have it.

    `rules` are those in force for it.
    """
    if service is None or not situation.firing:
        return Decision("nothing")
    for name, gate in gates_for(service).items():
        closed = gate(service, rules, situation)
        if closed is not None:
            return _decide_by(name, closed, situation.now)
    if component := next_component(service, rules, situation):
        return Decision("act", step=RESTART, component=component)
    return Decision("act", step=next_step(service, rules, situation.history))


def explain(service: Remediable, rules: Remediation, situation: Situation) -> list[GateState]:
    """Return the state of every gate, in the order in which they are checked."""
    return [GateState(name, gate(service, rules, situation)) for name, gate in gates_for(service).items()]


def find_closed_gate(
    service: Remediable, rules: Remediation, situation: Situation, overruled: Collection[str]
) -> Decision | None:
    """Return what holds an operator's action: a lock, or an overrulable gate that is not in `overruled`."""
    # A person does not queue behind automatic actions.
    in_progress = replace(situation.in_progress, ahead_on_host=0, ahead_in_fleet=0)
    situation = replace(situation, in_progress=in_progress)
    for name, gate in gates_for(service).items():
        if name in LOCKS or (name in OVERRULABLE and name not in overruled):
            closed = gate(service, rules, situation)
            if closed is not None:
                return _decide_by(name, closed, situation.now)
    return None


def _decide_by(name: GateName, closed: ClosedGate, now: float) -> Decision:
    if name in get_args(Refusal):
        return Decision("refuse", name, detail=closed.detail)
    again = now + DECIDE_AGAIN
    until = min(closed.until, again) if closed.until is not None else again
    return Decision("wait", name, until, closed.detail, ends=closed.until)

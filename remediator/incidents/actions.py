"""Actions: claimed together with their budget in one transaction, and ended with their outcome."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import insert, select, update

from fleet.inventory.model import Remediable, Remediation, RemediationStep, Service, is_host_alert
from remediator.incidents.decisions import notify_status_unknown, record_decision
from remediator.incidents.lifecycle import (
    cancel_queued_actions,
    find_open,
    is_in_crash_loop,
    notify_of_incident,
    record_automation_resumed,
    set_person_needed,
)
from remediator.incidents.timeline import add_event
from remediator.policy.approvals import describe_request
from remediator.policy.attempts import max_attempts, next_step
from remediator.policy.decisions import decide, find_closed_gate
from remediator.policy.situation import OVERRULABLE, ActionHistory, Blocked, Decision, Refusal, Situation
from remediator.record import stops
from remediator.record.schema import actions, evidence
from remediator.record.situations import add_recorded_facts, read_action_history
from remediator.record.transaction import Transaction

CRASHES = 2  # tries in an incident after which a target that exits within seconds is in a crash loop
CommandOutcome = Literal["succeeded", "failed", "unknown"]


@dataclass(frozen=True)
class Claim:
    """A running action: it holds its target and one of the host's places until it ends."""

    id: int
    incident_id: int | None
    service: str
    host: str
    kind: str
    claimed_at: float
    command: CommandOutcome | None = None
    command_ended_at: float | None = None
    up_at: float | None = None
    output: str = ""
    why: str = ""
    component: str = ""  # that is restarted; empty: the whole service


@dataclass(frozen=True)
class Ending:
    """How an action ended.

    An action that did not reach the host, or whose result could not be seen (`verified`), does not count as an attempt.
    `recovered` says that what the action is for is up: the service, or its component. `crashed` says that the host
    reported that the target exited within seconds.
    """

    state: CommandOutcome
    why: str = ""
    reached: bool = True
    verified: bool = True
    recovered: bool = False
    blocked: Blocked | None = None
    crashed: bool = False


@dataclass(frozen=True)
class Evidence:
    """What was collected before a command: facts of the target, and texts by name that the command may destroy.

    `caution` is what could not be checked and did not hold the action.
    """

    facts: Mapping[str, Any] | None = None
    texts: Mapping[str, str] | None = None
    caution: str = ""


def claim_action(
    tx: Transaction, incident: int, service: Remediable, situation: Situation, *, probed_at: float, evidence: Evidence
) -> Claim | str:
    """Claim the next step if the policy still allows it; otherwise return why not.

    `situation` is of before the failed probe was requested, at `probed_at`: no action may have run since.
    """
    rules = tx.inventory.remediation.for_service(service)
    current = add_recorded_facts(tx, incident, service.id, situation)
    decision = decide(service, rules, current)
    if decision.verb != "act" or decision.step is None:
        return decision.reason or "nothing to act on"
    if current.history.last_action != situation.history.last_action:
        return "another action ran since the probe"
    record_decision(tx, incident, decision, situation.observed)
    kind, component = decision.step.kind, decision.component
    claimed = None if component else _claim_approved(tx, incident, service, kind, probed_at)
    if claimed is None:
        if not component:
            cancel_queued_actions(tx, incident)  # an action that waits for approval is another step
        firing = ", ".join(sorted(current.firing))
        claimed = _insert(tx, incident, service, kind, "alert", firing, probed_at=probed_at, component=component)
    _store_evidence(tx, claimed, evidence)
    return claimed


def _claim_approved(tx: Transaction, incident: int, service: Remediable, kind: str, probed_at: float) -> Claim | None:
    """Start the queued action that an operator approved, if there is one."""
    row = tx.execute(
        select(actions).where(
            actions.c.incident_id == incident,
            actions.c.kind == kind,
            actions.c.state == "queued",
            actions.c.approved_at.is_not(None),
        )
    ).first()
    if row is None:
        return None
    # The inventory may have moved the service since the action was queued.
    started = {
        "state": "running", "claimed_at": tx.now, "proof_at": probed_at, "host": service.host, "target": service.target,
    }  # fmt: skip
    tx.execute(update(actions).where(actions.c.id == row.id).values(**started))
    add_event(tx, incident, "action_started", action=row.id, kind=kind, by="alert", approved_by=row.approved_by)
    return Claim(row.id, incident, row.service, service.host, kind, tx.now)


def _store_evidence(tx: Transaction, action: Claim, collected: Evidence) -> None:
    if collected.facts is not None:
        tx.execute(update(actions).where(actions.c.id == action.id).values(before=dict(collected.facts)))
    if collected.caution and action.incident_id is not None:
        add_event(tx, action.incident_id, "caution", action=action.id, message=collected.caution)
    add_evidence(tx, action, collected.texts or {})


def add_evidence(tx: Transaction, action: Claim, texts: Mapping[str, str]) -> None:
    """Add texts, by name, to the evidence of an action."""
    for name, text in texts.items():
        tx.execute(insert(evidence).values(action_id=action.id, name=name, at=tx.now, text=text))


def claim_operator_action(
    tx: Transaction,
    service: Service,
    kind: str,
    situation: Situation,
    *,
    overruled: Collection[str],
    by: str,
    evidence: Evidence,
    reason: str = "",
    component: str = "",
) -> Claim | Decision:
    """Claim an action that an operator requested; otherwise return what holds it."""
    incident = find_open(tx, service.id)
    current = add_recorded_facts(tx, incident or 0, service.id, situation)
    # Only locks hold a stop.
    overruled_gates = OVERRULABLE if kind == "stop" else overruled
    held = find_closed_gate(service, tx.inventory.remediation.for_service(service), current, overruled_gates)
    if held is not None:
        return held
    claimed = _insert(tx, incident, service, kind, "person", by, overruled=overruled, component=component)
    _store_evidence(tx, claimed, evidence)
    if kind == "stop":
        if incident is not None:
            cancel_queued_actions(tx, incident)
        stops.add(tx, tx.inventory.services_sharing_target(service), claimed.id, by, reason)
    return claimed


def _insert(
    tx: Transaction,
    incident: int | None,
    service: Remediable,
    kind: str,
    requested_by: str,
    asked_by: str,
    *,
    state: Literal["running", "queued", "succeeded"] = "running",
    probed_at: float | None = None,
    overruled: Collection[str] = (),
    component: str = "",
) -> Claim:
    row = {
        "incident_id": incident,
        "service": service.id,
        "host": service.host,
        "target": service.target,
        "kind": kind,
        "component": component,
        "requested_by": requested_by,
        "asked_by": asked_by,
        "overruled": sorted(overruled),
        "state": state,
        "counts": int(requested_by == "alert"),
        "proof_at": probed_at,
        "claimed_at": tx.now,
    }
    action = int(tx.execute(insert(actions).values(**row)).lastrowid)
    if incident is not None:
        events: Any = {"running": "action_started", "queued": "action_queued", "succeeded": "attempts_reset"}
        optional: dict[str, Any] = {"overruled": sorted(overruled)} if overruled else {}
        optional |= {"component": component} if component else {}
        add_event(tx, incident, events[state], action=action, kind=kind, by=requested_by, who=asked_by, **optional)
    return Claim(action, incident, service.id, service.host, kind, tx.now, component=component)


def queue_action(
    tx: Transaction, incident: int, service: Remediable, step: RemediationStep, situation: Situation
) -> bool:
    """Queue a step for an operator's approval and notify of it; False if it is queued already."""
    queued = tx.execute(
        select(actions.c.step).where(actions.c.incident_id == incident, actions.c.state == "queued")
    ).first()
    request = describe_request(service, step)
    if queued is not None and queued.step == request:
        return False
    cancel_queued_actions(tx, incident)
    firing = ", ".join(sorted(situation.firing))
    claimed = _insert(tx, incident, service, step.kind, "alert", firing, state="queued")
    tx.execute(update(actions).where(actions.c.id == claimed.id).values(step=request))
    content = {"service": service.id, "kind": step.kind, "action": claimed.id}
    notify_of_incident(tx, incident, "approval", content, f"approval action {claimed.id}")
    return True


def approve_action(tx: Transaction, number: int, by: str) -> Literal["approved", "unknown", "not-queued"]:
    """Approve a queued action."""
    row = tx.execute(select(actions).where(actions.c.id == number)).first()
    if row is None:
        return "unknown"
    if row.state != "queued":
        return "not-queued"
    if row.approved_at is None:
        tx.execute(update(actions).where(actions.c.id == number).values(approved_by=by, approved_at=tx.now))
        add_event(tx, row.incident_id, "action_approved", action=number, by=by)
    return "approved"


def reset_attempts(tx: Transaction, service: Remediable, by: str) -> int:
    """Give a service all its attempts again; returns the id of the reset."""
    incident = find_open(tx, service.id)
    reset = _insert(tx, incident, service, "reset", "person", by, state="succeeded")
    tx.execute(update(actions).where(actions.c.id == reset.id).values(ended_at=tx.now))
    if incident is not None:
        record_automation_resumed(tx, incident)
    return reset.id


def running_actions(tx: Transaction) -> list[Claim]:
    rows = tx.execute(select(actions).where(actions.c.state == "running").order_by(actions.c.id))
    return [
        Claim(
            row.id, row.incident_id, row.service, row.host, row.kind, row.claimed_at, row.command, row.command_ended_at,
            row.up_at, row.output or "", row.why or "", row.component,
        )
        for row in rows
    ]  # fmt: skip


def record_command_end(
    tx: Transaction, action: Claim, outcome: CommandOutcome, status: int | None, output: str, why: str, *, at: float
) -> Claim:
    """Record the outcome of the command, which ended `at` a time. The action is running until it is verified."""
    values = {
        "command": outcome, "command_ended_at": at, "exit_status": status, "output": output, "why": why or None,
    }  # fmt: skip
    tx.execute(update(actions).where(actions.c.id == action.id).values(**values))
    if action.incident_id is not None:
        detail = {"action": action.id, "outcome": outcome, "exit_status": status, "why": why}
        add_event(tx, action.incident_id, "command_ended", **detail)
        if _is_automatic(tx, action) and not is_in_crash_loop(tx, action.incident_id):
            record_automation_resumed(tx, action.incident_id)
    if outcome == "failed":
        stops.remove_of_action(tx, action.id)
    return replace(action, command=outcome, command_ended_at=at, output=output, why=why)


def store_facts_after(tx: Transaction, action: Claim, facts: Mapping[str, Any]) -> None:
    """Record the target's state after the command."""
    tx.execute(update(actions).where(actions.c.id == action.id).values(after=dict(facts)))


def record_up(tx: Transaction, action: Claim, *, at: float) -> None:
    """Record the first probe after the command that saw the service or the component up; notify of a service.

    After a runbook, it is the end of the alert, with which its incident ends.
    """
    tx.execute(update(actions).where(actions.c.id == action.id).values(up_at=at))
    if action.incident_id is not None and is_host_alert(action.service):
        add_event(tx, action.incident_id, "alert_over", action=action.id)
    elif action.incident_id is not None and not action.component:
        add_event(tx, action.incident_id, "service_up", action=action.id)
        content = _attempt_content(tx, action, _read_history(tx, action)) | {"seconds": at - action.claimed_at}
        notify_of_incident(tx, action.incident_id, "restarted", content, f"restarted action {action.id}")


def end_action(tx: Transaction, action: Claim, ending: Ending) -> bool:
    """End an action, which releases its locks, and notify if the service did not recover.

    Returns False if it has ended before.
    """
    values: dict[str, Any] = {
        "state": ending.state, "ended_at": tx.now, "why": ending.why or None, "blocked": ending.blocked,
    }  # fmt: skip
    if not ending.reached:
        values |= {"counts": 0, "command": "failed", "command_ended_at": tx.now}
    if not ending.verified:
        values["counts"] = 0
    is_running = (actions.c.id == action.id) & (actions.c.state == "running")
    if not tx.execute(update(actions).where(is_running).values(**values)).rowcount:
        return False
    if not ending.reached:
        stops.remove_of_action(tx, action.id)
    if ending.recovered and not action.component:
        service = tx.inventory.find_subject(action.service)
        stops.remove(tx, tx.inventory.services_sharing_target(service) if service is not None else [action.service])
    if action.incident_id is None:
        return True
    add_event(tx, action.incident_id, "action_ended", action=action.id, state=ending.state, why=ending.why)
    if not ending.verified:
        notify_status_unknown(tx, action.incident_id, {"service": action.service, "why": ending.why})
    elif not ending.recovered and action.kind != "stop":
        _notify_not_recovered(tx, action, action.incident_id, ending)
    return True


def _notify_not_recovered(tx: Transaction, action: Claim, incident: int, ending: Ending) -> None:
    if action.component and ending.reached and _is_automatic(tx, action):
        return  # when its attempts are used up, a person is needed
    history = _read_history(tx, action)
    why = f"component {action.component}: {ending.why}" if action.component else ending.why
    content = _attempt_content(tx, action, history) | {"why": why, "output": action.output[-1000:]}
    reason = ending.blocked or (None if action.component else _used_up(tx, action, history))
    if reason is None and ending.crashed and history.tries >= CRASHES:
        reason = "crash-loop"
    if reason is not None and _is_automatic(tx, action):
        set_person_needed(tx, incident, content | {"reason": reason})
        return
    # A host that cannot be reached is tried many times and notified once.
    once = f"unreached incident {incident} {ending.blocked or ''}".strip()
    key = f"could_not_restart action {action.id}" if ending.reached else once
    notify_of_incident(tx, incident, "could_not_restart", content, key)


def _read_history(tx: Transaction, action: Claim) -> ActionHistory:
    rules = tx.inventory.remediation.for_service(tx.inventory.find_subject(action.service))
    return read_action_history(tx, action.service, action.incident_id or 0, rules.window)


def _attempt_content(tx: Transaction, action: Claim, history: ActionHistory) -> dict[str, Any]:
    rules = tx.inventory.remediation.for_service(tx.inventory.find_subject(action.service))
    step = next((step for step in rules.steps if step.kind == action.kind), None)
    return {
        "service": action.service,
        "kind": action.kind,
        "command": action.command,
        "attempt": history.attempts.get(action.kind, 0),
        "attempts": max_attempts(step, rules) if step is not None else 0,
    } | (_component_attempts(action, history, rules) if action.component else {})


def _component_attempts(action: Claim, history: ActionHistory, rules: Remediation) -> dict[str, int]:
    known = history.components.get(action.component)
    return {"attempt": known.attempts if known is not None else 0, "attempts": rules.attempts}


def _used_up(tx: Transaction, action: Claim, history: ActionHistory) -> Refusal | None:
    """Return `attempts-used-up` if no step is left for the action's service."""
    service = tx.inventory.find_subject(action.service)
    if service is None:
        return None
    rules = tx.inventory.remediation.for_service(service)
    return "attempts-used-up" if next_step(service, rules, history) is None else None


def _is_automatic(tx: Transaction, action: Claim) -> bool:
    """Whether an alert, not an operator, requested the action."""
    return bool(tx.scalar(select(actions.c.requested_by).where(actions.c.id == action.id)) == "alert")

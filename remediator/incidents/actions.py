"""Actions: claimed with their budget in one transaction, ended with what came of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection, insert, select, update

from fleet.inventory.model import Inventory, RemediationStep, Service
from fleet.inventory.notify import Notify
from remediator.incidents.lifecycle import (
    automation_goes_on,
    cancel_queued,
    decided,
    note,
    open_of,
    person_needed,
    tell_of,
    tell_of_blindness,
)
from remediator.policy import (
    FOR_PEOPLE,
    Blocked,
    Decision,
    Refusal,
    Situation,
    allowed,
    decide,
    held_for_person,
    next_step,
)
from remediator.record import stops
from remediator.record.schema import actions, evidence
from remediator.record.situations import past_of, situation_now

CommandOutcome = Literal["succeeded", "failed", "unknown"]


@dataclass(frozen=True)
class Claim:
    """An action that was claimed: it holds the target and a place on the host until it has ended."""

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


@dataclass(frozen=True)
class Seen:
    """What was seen before a command: facts of the target, and texts by name that the command may destroy."""

    facts: Mapping[str, Any] | None = None
    texts: Mapping[str, str] | None = None
    said: str = ""  # what speaks for caution, and did not hold the action back


def claim(
    connection: Connection,
    incident: int,
    service: Service,
    situation: Situation,
    inventory: Inventory,
    *,
    proof_at: float,
    before: Seen,
    now: float,
) -> Claim | str:
    """Claim the next step and its budget, if the policy still says so with what is in the record now.

    `situation` is from before the failed probe was asked for, at `proof_at`: nothing may have been done to the target
    since.
    """
    again = situation_now(connection, incident, service.id, inventory, situation, now)
    decision = decide(service, inventory.remediation.for_service(service), again)
    if decision.verb != "act" or decision.step is None:
        return decision.reason or "nothing to act on"
    # Whatever was done since the probe was asked for has made it old.
    if again.past.last_action != situation.past.last_action:
        return "something was done since the probe"
    decided(connection, inventory.notify, incident, decision, now, situation.observed)
    claimed = _approved(connection, incident, service, decision.step.kind, proof_at, now)
    if claimed is None:
        cancel_queued(connection, incident, now)  # what waits for an approval is another step than this
        claimed = _insert(
            connection, incident, service, decision.step.kind, "alert", ", ".join(sorted(again.firing)), now,
            proof_at=proof_at,
        )  # fmt: skip
    _keep(connection, claimed, before, now)
    return claimed


def _approved(
    connection: Connection, incident: int, service: Service, kind: str, proof_at: float, now: float
) -> Claim | None:
    """Begin the action that a person has approved, if there is one."""
    row = connection.execute(
        select(actions).where(
            actions.c.incident_id == incident,
            actions.c.kind == kind,
            actions.c.state == "queued",
            actions.c.approved_at.is_not(None),
        )
    ).first()
    if row is None:
        return None
    # It may have moved since it was queued.
    place = {"host": service.host, "target": service.target}
    begun = {"state": "running", "claimed_at": now, "proof_at": proof_at, **place}
    connection.execute(update(actions).where(actions.c.id == row.id).values(**begun))
    note(connection, incident, now, "action", action=row.id, kind=kind, by="alert", approved_by=row.approved_by)
    return Claim(row.id, incident, row.service, service.host, kind, now)


def _keep(connection: Connection, action: Claim, before: Seen, now: float) -> None:
    if before.facts is not None:
        connection.execute(update(actions).where(actions.c.id == action.id).values(before=dict(before.facts)))
    if before.said and action.incident_id is not None:
        note(connection, action.incident_id, now, "caution", action=action.id, said=before.said)
    keep_evidence(connection, action, before.texts or {}, now)


def keep_evidence(connection: Connection, action: Claim, texts: Mapping[str, str], now: float) -> None:
    """Keep what was seen around an action, by name."""
    for name, text in texts.items():
        connection.execute(insert(evidence).values(action_id=action.id, name=name, at=now, text=text))


def claim_for_person(
    connection: Connection,
    service: Service,
    kind: str,
    inventory: Inventory,
    situation: Situation,
    *,
    overruled: Collection[str],
    by: str,
    before: Seen,
    now: float,
) -> Claim | Decision:
    """Claim what a person asked for; what holds it back otherwise: a lock, or a wait that was not overruled."""
    incident = open_of(connection, service.id)
    again = situation_now(connection, incident or 0, service.id, inventory, situation, now)
    # What speaks against a start does not speak against a stop.
    rules, waits = inventory.remediation.for_service(service), FOR_PEOPLE if kind == "stop" else overruled
    held = held_for_person(service, rules, again, waits)
    if held is not None:
        return held
    claimed = _insert(connection, incident, service, kind, "person", by, now, overruled=overruled)
    _keep(connection, claimed, before, now)
    if kind == "stop":
        if incident is not None:
            cancel_queued(connection, incident, now)  # what was approved before is overtaken
        stops.put(connection, inventory.services_sharing_target(service), claimed.id, by, now)
    return claimed


def _insert(
    connection: Connection,
    incident: int | None,
    service: Service,
    kind: str,
    by: str,
    who: str,
    now: float,
    *,
    state: str = "running",
    proof_at: float | None = None,
    overruled: Collection[str] = (),
) -> Claim:
    made = connection.execute(
        insert(actions).values(
            incident_id=incident,
            service=service.id,
            host=service.host,
            target=service.target,
            kind=kind,
            requested_by=by,
            asked_by=who,
            overruled=sorted(overruled),
            state=state,
            counts=int(by == "alert"),
            proof_at=proof_at,
            claimed_at=now,
        )
    )
    action = int(made.lastrowid)
    if incident is not None:
        event = "action" if state == "running" else state
        more = {"overruled": sorted(overruled)} if overruled else {}
        note(connection, incident, now, event, action=action, kind=kind, by=by, who=who, **more)
    return Claim(action, incident, service.id, service.host, kind, now)


def queue(
    connection: Connection, notify: Notify, incident: int, service: Service, step: RemediationStep, situation: Situation
) -> bool:
    """Have a step wait for a person's approval, and ask people for it; False where it waits already."""
    waiting = connection.execute(
        select(actions.c.step).where(actions.c.incident_id == incident, actions.c.state == "queued")
    ).first()
    if waiting is not None and waiting.step == step.model_dump():
        return False
    cancel_queued(connection, incident, situation.now)
    claimed = _insert(
        connection, incident, service, step.kind, "alert", ", ".join(sorted(situation.firing)), situation.now,
        state="queued",
    )  # fmt: skip
    connection.execute(update(actions).where(actions.c.id == claimed.id).values(step=step.model_dump()))
    content = {"service": service.id, "kind": step.kind, "action": claimed.id}
    tell_of(connection, notify, incident, "approval", content, situation.now, f"approval action {claimed.id}")
    return True


def approve(connection: Connection, number: int, by: str, now: float) -> Literal["approved", "unknown", "not-queued"]:
    """Take a person's word that a queued action may be carried out."""
    row = connection.execute(select(actions).where(actions.c.id == number)).first()
    if row is None:
        return "unknown"
    if row.state != "queued":
        return "not-queued"
    if row.approved_at is None:
        connection.execute(update(actions).where(actions.c.id == number).values(approved_by=by, approved_at=now))
        note(connection, row.incident_id, now, "approved", action=number, by=by)
    return "approved"


def reset(connection: Connection, service: Service, by: str, now: float) -> int:
    """Give a target all its attempts anew, at a person's word; the reset's number in the record."""
    incident = open_of(connection, service.id)
    done = _insert(connection, incident, service, "reset", "person", by, now, state="succeeded")
    connection.execute(update(actions).where(actions.c.id == done.id).values(ended_at=now))
    if incident is not None:
        automation_goes_on(connection, incident)
    return done.id


def running_actions(connection: Connection) -> list[Claim]:
    rows = connection.execute(select(actions).where(actions.c.state == "running").order_by(actions.c.id))
    return [
        Claim(
            row.id, row.incident_id, row.service, row.host, row.kind, row.claimed_at, row.command, row.command_ended_at,
            row.up_at, row.output or "", row.why or "",
        )
        for row in rows
    ]  # fmt: skip


def command_ended(
    connection: Connection,
    action: Claim,
    outcome: CommandOutcome,
    status: int | None,
    output: str,
    why: str,
    now: float,
) -> Claim:
    """Keep how the command ended; the action goes on until it is verified."""
    connection.execute(
        update(actions)
        .where(actions.c.id == action.id)
        .values(command=outcome, command_ended_at=now, exit_status=status, output=output, why=why or None)
    )
    if action.incident_id is not None:
        detail = {"action": action.id, "outcome": outcome, "exit_status": status, "why": why}
        note(connection, action.incident_id, now, "command", **detail)
        if _is_automatic(connection, action):
            automation_goes_on(connection, action.incident_id)
    if outcome == "failed":
        stops.withdraw(connection, action.id)
    return replace(action, command=outcome, command_ended_at=now, output=output, why=why)


def facts_after(connection: Connection, action: Claim, facts: Mapping[str, Any]) -> None:
    """Keep how the target stood after its command."""
    connection.execute(update(actions).where(actions.c.id == action.id).values(after=dict(facts)))


def came_up(connection: Connection, action: Claim, inventory: Inventory, at: float) -> None:
    """The first successful probe after the command: tell that the restart helped, so far."""
    connection.execute(update(actions).where(actions.c.id == action.id).values(up_at=at))
    if action.incident_id is not None:
        note(connection, action.incident_id, at, "up", action=action.id)
        content = _told(connection, action, inventory) | {"seconds": at - action.claimed_at}
        about = f"restarted action {action.id}"
        tell_of(connection, inventory.notify, action.incident_id, "restarted", content, at, about)


def action_ended(
    connection: Connection,
    action: Claim,
    state: CommandOutcome,
    why: str,
    inventory: Inventory,
    now: float,
    *,
    reached: bool = True,
    seen: bool = True,
    came_back: bool = False,
    blocked: Blocked | None = None,
) -> bool:
    """End an action, which frees its locks; that a service did not come back is told, and whether a person is needed.

    False where it has ended before.

    Not having reached the host costs no attempt, nor does it where nobody could see what came of it.
    """
    values: dict[str, Any] = {"state": state, "ended_at": now, "why": why or None, "blocked": blocked}
    if not reached:
        values |= {"counts": 0, "command": "failed", "command_ended_at": now}
    if not seen:
        values["counts"] = 0
    running = (actions.c.id == action.id) & (actions.c.state == "running")
    if not connection.execute(update(actions).where(running).values(**values)).rowcount:
        return False
    if not reached:
        stops.withdraw(connection, action.id)
    if came_back:
        service = inventory.services.get(action.service)
        stops.remove(
            connection, inventory.services_sharing_target(service) if service is not None else [action.service]
        )
    if action.incident_id is None:
        return True
    note(connection, action.incident_id, now, "action-ended", action=action.id, state=state, why=why)
    if not seen:
        content = {"service": action.service, "why": why}
        tell_of_blindness(connection, inventory.notify, action.incident_id, content, now)
    elif not came_back and action.kind != "stop":
        content = _told(connection, action, inventory) | {"why": why, "output": action.output[-1000:]}
        reason = blocked or _used_up(connection, action, inventory)
        if reason is not None and _is_automatic(connection, action):
            person_needed(connection, inventory.notify, action.incident_id, content | {"reason": reason}, now)
            return True
        # A host that cannot be reached is tried again and again, and told of once.
        once = f"unreached incident {action.incident_id} {blocked or ''}".strip()
        about = f"could_not_restart action {action.id}" if reached else once
        tell_of(connection, inventory.notify, action.incident_id, "could_not_restart", content, now, about)
    return True


def _told(connection: Connection, action: Claim, inventory: Inventory) -> dict[str, Any]:
    service = inventory.services.get(action.service)
    rules = inventory.remediation.for_service(service)
    past = past_of(connection, action.service, action.incident_id or 0, rules.window)
    step = next((step for step in rules.steps if step.kind == action.kind), None)
    return {
        "service": action.service,
        "kind": action.kind,
        "command": action.command,
        "attempt": past.attempts.get(action.kind, 0),
        "attempts": allowed(step, rules) if step is not None else 0,
    }


def _used_up(connection: Connection, action: Claim, inventory: Inventory) -> Refusal | None:
    """`attempts-used-up` where nothing is left to be tried on an action's service; one that was removed has none."""
    service = inventory.services.get(action.service)
    if service is None:
        return None
    rules = inventory.remediation.for_service(service)
    past = past_of(connection, action.service, action.incident_id or 0, rules.window)
    return "attempts-used-up" if next_step(service, rules, past) is None else None


def _is_automatic(connection: Connection, action: Claim) -> bool:
    """Whether no person is at it: what one has asked for, one looks after."""
    return connection.scalar(select(actions.c.requested_by).where(actions.c.id == action.id)) == "alert"

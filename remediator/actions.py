"""Actions: claimed with their budget in one transaction, ended with what came of them."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection, insert, select, update

from fleet.model import Inventory, Remediation, Service
from remediator.incidents import decided, firing_names, host_is_down, note, tell_of
from remediator.policy import BUDGET_WINDOW, Past, Present, Situation, attempts_since_refill, decide
from remediator.schema import actions, incidents

CommandOutcome = Literal["succeeded", "failed", "unknown"]
HISTORY = 100  # incidents and actions of a target that are looked back over for its budget


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


def past_of(connection: Connection, service: str, incident: int, window: float) -> Past:
    """What was tried on a target, for its budget and its back-off."""
    outages = connection.execute(
        select(incidents.c.opened_at, incidents.c.closed_at, incidents.c.state)
        .where(incidents.c.service == service, incidents.c.labels.is_not(None))
        .order_by(incidents.c.opened_at.desc())
        .limit(HISTORY)
    ).all()
    tried = connection.execute(
        select(
            actions.c.id,
            actions.c.incident_id,
            actions.c.counts,
            actions.c.claimed_at,
            actions.c.ended_at,
            actions.c.requested_by,
        )
        .where(actions.c.service == service)
        .order_by(actions.c.claimed_at.desc())
        .limit(HISTORY)
    ).all()
    ended = [row.ended_at for row in tried if row.ended_at is not None]
    return Past(
        attempts=attempts_since_refill(
            [row.claimed_at for row in tried if row.counts],
            # Where nobody saw it up, nothing says that it was.
            [(row.opened_at, row.closed_at if row.state == "recovered" else None) for row in reversed(outages)],
            window,
        ),
        tries=sum(1 for row in tried if row.incident_id == incident and row.requested_by == "alert"),
        last_ended=max(ended, default=None),
        last_action=max((row.id for row in tried), default=0),
    )


def present_of(connection: Connection, service: str, host: str, now: float) -> Present:
    """What is under way, as far as it matters to an action on `service` at `host`."""
    running = connection.execute(
        select(actions.c.service, actions.c.host, actions.c.command).where(actions.c.state == "running")
    ).all()
    recent = connection.scalars(
        select(actions.c.claimed_at)
        .where(actions.c.claimed_at > now - BUDGET_WINDOW, actions.c.counts == 1)
        .order_by(actions.c.claimed_at)
    ).all()
    return Present(
        target_busy=any(row.service == service for row in running),
        on_host=sum(1 for row in running if row.host == host),
        in_flight=sum(1 for row in running if row.command is None),
        in_budget_window=tuple(recent),
    )


def claim(
    connection: Connection,
    incident: int,
    service: Service,
    situation: Situation,
    inventory: Inventory,
    *,
    proof_at: float,
    now: float,
) -> Claim | str:
    """Claim a restart and its budget, if the policy still says so with what is in the record now.

    `situation` is from before the failed probe was asked for, at `proof_at`: nothing may have been done to the target
    since.
    """
    rules = inventory.remediation.of(service)
    again = situation_now(connection, incident, service.id, service.host, situation, rules, now)
    decision = decide(service, rules, again)
    if decision.verb != "act":
        return decision.reason or "nothing to act on"
    # Whatever was done since the probe was asked for has made it old; order does not depend on any clock.
    if again.past.last_action != situation.past.last_action:
        return "something was done since the probe"
    decided(connection, incident, decision, now)
    return _insert_action(connection, incident, service, "restart", "alert", proof_at, now)


def situation_now(
    connection: Connection, incident: int, service: str, host: str, situation: Situation, rules: Remediation, now: float
) -> Situation:
    """`situation` with everything that the record knows brought up to date."""
    return replace(
        situation,
        now=now,
        firing=firing_names(connection, incident, rules.alerts),
        past=past_of(connection, service, incident, rules.window),
        present=present_of(connection, service, host, now),
        host_down=bool(host) and host_is_down(connection, host),
    )


def claim_for_person(
    connection: Connection, service: Service, kind: str, inventory: Inventory, now: float
) -> Claim | str:
    """Claim what a person asked for: waits do not hold it back, locks do. The busy lock's name where one holds."""
    present = present_of(connection, service.id, service.host, now)
    if present.target_busy:
        return "target-busy"
    if present.on_host >= inventory.remediation.actions_per_host:
        return "host-busy"
    incident = connection.scalar(
        select(incidents.c.id).where(incidents.c.service == service.id, incidents.c.state == "open")
    )
    return _insert_action(connection, incident, service, kind, "person", None, now)


def _insert_action(
    connection: Connection,
    incident: int | None,
    service: Service,
    kind: str,
    by: str,
    proof_at: float | None,
    now: float,
) -> Claim:
    made = connection.execute(
        insert(actions).values(
            incident_id=incident,
            service=service.id,
            host=service.host,
            kind=kind,
            requested_by=by,
            state="running",
            counts=int(by == "alert"),
            proof_at=proof_at,
            claimed_at=now,
        )
    )
    action = int(made.lastrowid)
    if incident is not None:
        note(connection, incident, now, "action", action=action, kind=kind, by=by)
    return Claim(action, incident, service.id, service.host, kind, now)


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
        note(
            connection,
            action.incident_id,
            now,
            "command",
            action=action.id,
            outcome=outcome,
            exit_status=status,
            why=why,
        )
    return replace(action, command=outcome, command_ended_at=now, output=output, why=why)


def came_up(connection: Connection, action: Claim, inventory: Inventory, at: float) -> None:
    """The first successful probe after the command: tell that the restart helped, so far."""
    connection.execute(update(actions).where(actions.c.id == action.id).values(up_at=at))
    if action.incident_id is not None:
        note(connection, action.incident_id, at, "up", action=action.id)
        content = _told(connection, action, inventory) | {"seconds": at - action.claimed_at}
        about = f"restarted action {action.id}"
        tell_of(connection, action.incident_id, "restarted", content, at, about)


def action_ended(
    connection: Connection,
    action: Claim,
    state: CommandOutcome,
    why: str,
    inventory: Inventory,
    now: float,
    *,
    reached: bool = True,
    came_back: bool = False,
) -> None:
    """End an action, which frees its locks; that a service did not come back is told.

    Not having reached the host costs no attempt.
    """
    values: dict[str, Any] = {"state": state, "ended_at": now, "why": why or None}
    if not reached:
        values |= {"counts": 0, "command": "failed", "command_ended_at": now}
    connection.execute(update(actions).where(actions.c.id == action.id).values(**values))
    if action.incident_id is None:
        return
    note(connection, action.incident_id, now, "action-ended", action=action.id, state=state, why=why)
    if not came_back and action.kind != "stop":
        content = _told(connection, action, inventory) | {"why": why, "output": action.output[-1000:]}
        # A host that cannot be reached is tried again and again, and told of once.
        about = f"could_not_restart action {action.id}" if reached else f"unreached incident {action.incident_id}"
        tell_of(connection, action.incident_id, "could_not_restart", content, now, about)


def _told(connection: Connection, action: Claim, inventory: Inventory) -> dict[str, Any]:
    service = inventory.services.get(action.service)
    rules = inventory.remediation.of(service)
    past = past_of(connection, action.service, action.incident_id or 0, rules.window)
    return {
        "service": action.service,
        "kind": action.kind,
        "command": action.command,
        "attempt": past.attempts,
        "attempts": rules.attempts,
    }

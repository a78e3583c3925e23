"""What the record knows that a decision depends on."""

from dataclasses import replace

from sqlalchemy import Connection, select

from fleet.model import Inventory
from remediator import switches
from remediator.incidents import firing_names, host_is_down
from remediator.policy import BUDGET_WINDOW, Past, Present, Situation, since_refill
from remediator.schema import actions, incidents

HISTORY = 100  # incidents and actions of a target that are looked back over for its budget


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
            actions.c.id, actions.c.incident_id, actions.c.kind, actions.c.counts, actions.c.claimed_at,
            actions.c.ended_at, actions.c.requested_by, actions.c.blocked,
        )
        .where(actions.c.service == service, actions.c.state.not_in(("queued", "cancelled")))
        .order_by(actions.c.id.desc())
        .limit(HISTORY)
    ).all()  # fmt: skip
    # Where nobody saw it up, nothing says that it was.
    up_between = [(row.opened_at, row.closed_at if row.state == "recovered" else None) for row in reversed(outages)]
    reset = max((row.id for row in tried if row.kind == "reset"), default=0)
    since = since_refill(up_between, window)
    counted = [row.kind for row in tried if row.counts and row.claimed_at > since and row.id > reset]
    of_incident = [row for row in tried if row.incident_id == incident and row.id > reset]
    ended = [row.ended_at for row in tried if row.ended_at is not None and row.kind != "reset"]
    last = next((row for row in tried if row.kind != "reset"), None)
    return Past(
        attempts={kind: counted.count(kind) for kind in counted},
        tries=sum(1 for row in of_incident if row.requested_by == "alert"),
        last_ended=max(ended, default=None),
        last_action=max((row.id for row in tried), default=0),
        blocked=last.blocked if last is not None and last in of_incident else None,
        healing_since=connection.scalar(select(incidents.c.healing_since).where(incidents.c.id == incident)),
    )


def present_of(connection: Connection, service: str, host: str, now: float) -> Present:
    """What is under way, as far as it matters to an action on `service` at `host`."""
    running = connection.execute(
        select(actions.c.service, actions.c.host, actions.c.command).where(actions.c.state == "running")
    ).all()
    recent = connection.scalars(
        select(actions.c.claimed_at)
        .where(actions.c.claimed_at > now - BUDGET_WINDOW, actions.c.counts == 1, actions.c.state != "queued")
        .order_by(actions.c.claimed_at)
    ).all()
    return Present(
        target_busy=any(row.service == service for row in running),
        # What needs no host is held by its own lock alone.
        on_host=sum(1 for row in running if host and row.host == host),
        in_flight=sum(1 for row in running if row.command is None),
        in_budget_window=tuple(recent),
    )


def situation_now(
    connection: Connection, incident: int, service: str, inventory: Inventory, situation: Situation, now: float
) -> Situation:
    """`situation` with everything that the record knows brought up to date."""
    known = inventory.services.get(service)
    rules = inventory.remediation.of(known)
    host = inventory.host_of(known) if known is not None else None
    name, group = (host.name, host.group) if host is not None else ("", "")
    return replace(
        situation,
        now=now,
        firing=firing_names(connection, incident, rules.alerts),
        past=past_of(connection, service, incident, rules.window),
        present=present_of(connection, service, name, now),
        automation=switches.automation(connection).enabled,
        maintenance=switches.maintenance_of(connection, service, name, group, now),
        approved=_approved(connection, incident),
        host_down=bool(name) and host_is_down(connection, name),
    )


def _approved(connection: Connection, incident: int) -> bool:
    found = connection.scalar(
        select(actions.c.id).where(
            actions.c.incident_id == incident, actions.c.state == "queued", actions.c.approved_at.is_not(None)
        )
    )
    return found is not None

"""Incidents: one open record of trouble per target, with a timeline of all that was decided and done."""

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import Connection, func, insert, select, update

from fleet.model import Inventory, Service
from remediator.notices import outbox
from remediator.policy import Decision
from remediator.schema import actions, alerts, incidents, timeline

Closed = Literal["recovered", "unobserved"]


def note(connection: Connection, incident: int, at: float, event: str, **detail: Any) -> None:
    """Add an event to an incident's timeline."""
    connection.execute(insert(timeline).values(incident_id=incident, at=at, event=event, detail=detail))


def open_or_new(connection: Connection, service: Service, now: float) -> int:
    found = connection.scalar(
        select(incidents.c.id).where(incidents.c.service == service.id, incidents.c.state == "open")
    )
    if found is not None:
        return int(found)
    made = connection.execute(insert(incidents).values(service=service.id, state="open", opened_at=now))
    incident = int(made.lastrowid)
    note(connection, incident, now, "opened")
    return incident


def open_incidents(connection: Connection) -> list[tuple[int, str]]:
    """(id, service) of every open incident."""
    rows = connection.execute(select(incidents.c.id, incidents.c.service).where(incidents.c.state == "open"))
    return [(row.id, row.service) for row in rows]


def firing_names(connection: Connection, incident: int) -> frozenset[str]:
    rows = connection.scalars(
        select(alerts.c.name).where(alerts.c.incident_id == incident, alerts.c.status == "firing")
    )
    return frozenset(rows)


def host_is_down(connection: Connection, host: str) -> bool:
    rows = connection.scalars(select(alerts.c.labels).where(alerts.c.status == "firing", alerts.c.name == "HostDown"))
    return any(labels.get("host") == host for labels in rows)


def decided(connection: Connection, incident: int, decision: Decision, inventory: Inventory, now: float) -> bool:
    """Keep a decision; True, and an entry on the timeline, when it differs from the one before."""
    before = connection.execute(select(incidents).where(incidents.c.id == incident)).one()
    if (before.verb, before.reason) == (decision.verb, decision.reason):
        return False
    connection.execute(
        update(incidents).where(incidents.c.id == incident).values(verb=decision.verb, reason=decision.reason)
    )
    if decision.verb != "nothing":
        note(connection, incident, now, decision.verb, reason=decision.reason, detail=decision.detail)
    if decision.reason == "attempts-used-up" and not _was_tried(connection, incident):
        # Where this incident had attempts, the card of the last one has said so.
        content = {"service": before.service, "why": decision.detail}
        tell_of(connection, incident, "gave_up", inventory, content, now)
    return True


def _was_tried(connection: Connection, incident: int) -> bool:
    return connection.scalar(select(actions.c.id).where(actions.c.incident_id == incident).limit(1)) is not None


def quiet_since(connection: Connection, incident: int) -> float:
    """When the last alert of an incident was seen."""
    return float(connection.scalar(select(func.max(alerts.c.last_seen)).where(alerts.c.incident_id == incident)) or 0.0)


def close(connection: Connection, incident: int, state: Closed, inventory: Inventory, now: float) -> bool:
    """Close an incident, and tell of it those who were told of its beginning; False where something came between."""
    row = connection.execute(select(incidents).where(incidents.c.id == incident)).one()
    busy = connection.scalar(select(actions.c.id).where(actions.c.service == row.service, actions.c.state == "running"))
    if row.state != "open" or busy is not None or firing_names(connection, incident):
        return False
    by = _recovered_by(connection, incident) if state == "recovered" else None
    connection.execute(
        update(incidents).where(incidents.c.id == incident).values(state=state, closed_at=now, recovered_by=by)
    )
    note(connection, incident, now, state, **({"by": by} if by else {}))
    content = {"service": row.service, "opened_at": row.opened_at, "closed_at": now, "by": by}
    tell_of(connection, incident, state, inventory, content, now)
    return True


def _recovered_by(connection: Connection, incident: int) -> str:
    who = connection.scalar(
        select(actions.c.requested_by)
        .where(actions.c.incident_id == incident, actions.c.up_at.is_not(None))
        .order_by(actions.c.id.desc())
        .limit(1)
    )
    return {"alert": "defib", "person": "person"}.get(who or "", "self")


def tell_of(
    connection: Connection,
    incident: int,
    kind: str,
    inventory: Inventory,
    content: Mapping[str, Any],
    now: float,
    about: str = "",
) -> None:
    """Tell how an incident goes on, through the routes of the alert that began it."""
    row = connection.execute(
        select(alerts.c.labels).where(alerts.c.incident_id == incident).order_by(alerts.c.id).limit(1)
    ).first()
    labels = row.labels if row is not None else {}
    if outbox.was_told(connection, f"down incident {incident}"):
        outbox.tell(
            connection, inventory.notify, kind, about or f"{kind} incident {incident}", labels, content, now, incident
        )


def counts_by_state(connection: Connection) -> dict[str, int]:
    rows = connection.execute(select(incidents.c.state, func.count()).group_by(incidents.c.state))
    return {state: count for state, count in rows}  # noqa: C416 - rows are tuples only to a reader

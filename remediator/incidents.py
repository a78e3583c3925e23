"""Incidents: one open record of trouble per target, with a timeline of all that was decided and done."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, and_, bindparam, func, insert, select, update

from fleet.model import Service
from fleet.notify import Notify, Told
from remediator import stops
from remediator.notices import outbox
from remediator.policy import QUEUED, Decision
from remediator.schema import actions, alerts, incidents, timeline

_NOTE = insert(timeline)
_OPEN = select(incidents.c.id).where(incidents.c.service == bindparam("of"), incidents.c.state == "open")
_BECAME_DOWN = (
    update(incidents)
    .where(incidents.c.id == bindparam("of"), incidents.c.labels.is_(None))
    .values(labels=bindparam("said"), acknowledged_by=None, acknowledged_at=None)
)
ENDS: tuple[Told, ...] = ("recovered", "unobserved", "alert_over")
Closed = Literal["recovered", "unobserved"]


def note(connection: Connection, incident: int, at: float, event: str, **detail: Any) -> None:
    """Add an event to an incident's timeline; its cards show it."""
    connection.execute(_NOTE, {"incident_id": incident, "at": at, "event": event, "detail": detail})
    outbox.changed(connection, at, incident=incident)


def open_or_new(connection: Connection, service: Service, now: float) -> int:
    found = open_of(connection, service.id)
    if found is not None:
        return found
    made = connection.execute(insert(incidents).values(service=service.id, state="open", opened_at=now))
    incident = int(made.lastrowid)
    note(connection, incident, now, "opened")
    return incident


def open_of(connection: Connection, service: str) -> int | None:
    """The open incident of a service, if any."""
    found: int | None = connection.scalar(_OPEN, {"of": service})
    return found


def open_incidents(connection: Connection, services: Collection[str] | None = None) -> list[tuple[str, int]]:
    """(service, id) of every open incident, or of those of these services."""
    query = select(incidents.c.service, incidents.c.id).where(incidents.c.state == "open")
    if services is not None:
        query = query.where(incidents.c.service.in_(services))
    return [(row.service, row.id) for row in connection.execute(query)]


def became_down(connection: Connection, incident: int, labels: Mapping[str, str]) -> None:
    """An alert to act on joined: from now on only those keep the incident open.

    Who acknowledged what was milder has not acknowledged this.
    """
    connection.execute(_BECAME_DOWN, {"of": incident, "said": dict(labels)})


def keep_quiet(connection: Connection, incident: int, service: str) -> bool:
    """Whether an alert that fires now is not told, since a person stopped the service."""
    stopped = bool(stops.of(connection, service))
    quiet = stopped and not outbox.is_told(connection, incident)
    connection.execute(update(incidents).where(incidents.c.id == incident).values(quiet=int(quiet)))
    return stopped


def is_quiet(connection: Connection, incident: int, kind: Told) -> bool:
    """Whether nobody is told of an incident, since a person stopped its service.

    Who was told of its beginning, before the stop, is told of its end.
    """
    row = connection.execute(select(incidents.c.service, incidents.c.quiet).where(incidents.c.id == incident)).one()
    return bool(row.quiet) or (kind not in ENDS and bool(stops.of(connection, row.service)))


def firing_names(connection: Connection, incident: int, to_act_on: Collection[str]) -> frozenset[str]:
    """The alerts that keep an incident open: those to act on, or any where none of those ever joined."""
    rows = connection.scalars(
        select(alerts.c.name).where(alerts.c.incident_id == incident, alerts.c.status == "firing")
    )
    was_down = connection.scalar(select(incidents.c.labels.is_not(None)).where(incidents.c.id == incident))
    return frozenset(name for name in rows if not was_down or name in to_act_on)


def host_is_down(connection: Connection, host: str) -> bool:
    rows = connection.scalars(select(alerts.c.labels).where(alerts.c.status == "firing", alerts.c.name == "HostDown"))
    return any(labels.get("host") == host for labels in rows)


def decided(connection: Connection, notify: Notify, incident: int, decision: Decision, now: float) -> bool:
    """Keep a decision; True, and an entry on the timeline, when it differs from the one before."""
    before = connection.execute(select(incidents).where(incidents.c.id == incident)).one()
    if (before.verb, before.reason) == (decision.verb, decision.reason):
        return False
    queued = decision.reason in QUEUED
    values: dict[str, Any] = {
        "verb": decision.verb,
        "reason": decision.reason,
        "detail": decision.detail or None,
        "queued_since": (before.queued_since or now) if queued else None,
    }
    since = {"healing-itself": "healing_since", "starting": "starting_since"}.get(decision.reason or "")
    if since is not None and getattr(before, since) is None:
        values[since] = now
    connection.execute(update(incidents).where(incidents.c.id == incident).values(**values))
    if decision.verb == "nothing":
        outbox.changed(connection, now, incident=incident)  # no event, and yet its cards show it
    else:
        note(connection, incident, now, decision.verb, reason=decision.reason, detail=decision.detail)
    if decision.reason == "attempts-used-up" and not _last_one_failed(connection, incident):
        # Where the last attempt failed, its own card has said so.
        tell_of(connection, notify, incident, "gave_up", {"service": before.service, "why": decision.detail}, now)
    if decision.reason == "stopped-by-hand":
        content = {"service": before.service, "why": decision.detail}
        tell_of(connection, notify, incident, "stopped_by_hand", content, now)
    return True


def tell_of_blindness(connection: Connection, notify: Notify, incident: int, before: float, now: float) -> bool:
    """Tell people, once, where nobody has been able to see for long how a service is."""
    row = connection.execute(select(incidents).where(incidents.c.id == incident)).one()
    since = connection.scalar(
        select(func.max(timeline.c.at)).where(timeline.c.incident_id == incident, timeline.c.event == "wait")
    )
    if since is None or since > before:
        return False
    content = {"service": row.service, "why": row.detail or ""}
    return tell_of(connection, notify, incident, "blind", content, now)


def queued_since(connection: Connection) -> float | None:
    """Since when the action that has waited longest waits for a place, or for a person's approval."""
    oldest: float | None = connection.scalar(
        select(func.min(incidents.c.queued_since)).where(incidents.c.state == "open")
    )
    return oldest


def _last_one_failed(connection: Connection, incident: int) -> bool:
    last = connection.scalar(
        select(actions.c.state)
        .where(actions.c.incident_id == incident, actions.c.counts == 1)
        .order_by(actions.c.id.desc())
        .limit(1)
    )
    return last in ("failed", "unknown")


def cancel_queued(connection: Connection, incident: int, now: float) -> None:
    """What waits for an approval is not needed any more."""
    queued = (actions.c.incident_id == incident) & (actions.c.state == "queued")
    for number in connection.scalars(select(actions.c.id).where(queued)).all():
        connection.execute(update(actions).where(actions.c.id == number).values(state="cancelled", ended_at=now))
        note(connection, incident, now, "cancelled", action=number)


@dataclass(frozen=True)
class Ended:
    """How long an incident lasted, in seconds, and who brought its service back, if it came back."""

    lasted: float
    by: str | None


def close(
    connection: Connection, notify: Notify, incident: int, state: Closed, to_act_on: Collection[str], now: float
) -> Ended | None:
    """Close an incident, and tell of it those who were told of its beginning; None where something came between."""
    row = connection.execute(select(incidents).where(incidents.c.id == incident)).one()
    busy = connection.scalar(select(actions.c.id).where(actions.c.service == row.service, actions.c.state == "running"))
    if row.state != "open" or busy is not None or firing_names(connection, incident, to_act_on):
        return None
    by = _recovered_by(connection, incident) if state == "recovered" else None
    cancel_queued(connection, incident, now)
    connection.execute(
        update(incidents).where(incidents.c.id == incident).values(state=state, closed_at=now, recovered_by=by)
    )
    note(connection, incident, now, state, **({"by": by} if by else {}))
    content = {"service": row.service, "opened_at": row.opened_at, "closed_at": now, "by": by}
    outbox.outgrown(connection, now, incident=incident)
    tell_of(connection, notify, incident, state, content, now)
    _carry_over(connection, incident, row.service, now)
    return Ended(now - row.opened_at, by)


def _carry_over(connection: Connection, incident: int, service: str, now: float) -> None:
    """Alerts that fire on, without being any to act on, are an incident of their own."""
    left = and_(alerts.c.incident_id == incident, alerts.c.status == "firing")
    if connection.scalar(select(alerts.c.id).where(left).limit(1)) is None:
        return
    made = connection.execute(insert(incidents).values(service=service, state="open", opened_at=now))
    connection.execute(update(alerts).where(left).values(incident_id=made.lastrowid))
    note(connection, int(made.lastrowid), now, "opened", after=incident)


def _recovered_by(connection: Connection, incident: int) -> str:
    who = connection.scalar(
        select(actions.c.requested_by)
        .where(actions.c.incident_id == incident, actions.c.up_at.is_not(None))
        .order_by(actions.c.id.desc())
        .limit(1)
    )
    return {"alert": "defib", "person": "person"}.get(who or "", "self")


def acknowledge(connection: Connection, incident: int, by: str, now: float) -> Row[Any] | None:
    """Take a person's word that they look after it; the incident as it is then, or None where there is none."""
    mine = and_(incidents.c.id == incident, incidents.c.state == "open", incidents.c.acknowledged_at.is_(None))
    values = {"acknowledged_by": by, "acknowledged_at": now}
    if connection.execute(update(incidents).where(mine).values(**values)).rowcount:
        note(connection, incident, now, "acknowledged", by=by)
        for alert in connection.scalars(select(alerts.c.id).where(alerts.c.incident_id == incident)).all():
            outbox.changed(connection, now, alert=alert)
    return connection.execute(select(incidents).where(incidents.c.id == incident)).first()


def tell_of(
    connection: Connection,
    notify: Notify,
    incident: int,
    kind: Told,
    content: Mapping[str, Any],
    now: float,
    about: str = "",
) -> bool:
    """Tell how an incident goes on; False where everybody has been told before, or nobody is to be."""
    if is_quiet(connection, incident, kind):
        return False
    labels = connection.scalar(select(incidents.c.labels).where(incidents.c.id == incident)) or {}
    channels = notify.channels_after(outbox.told(connection, outbox.about_incident(incident)), labels, kind)
    about = about or f"{kind} incident {incident}"
    return outbox.put(connection, notify, channels, kind, about, labels, content, now, incident=incident) > 0


def counts_by_state(connection: Connection) -> dict[str, int]:
    rows = connection.execute(select(incidents.c.state, func.count()).group_by(incidents.c.state))
    return {state: count for state, count in rows}  # noqa: C416 - rows are tuples only to a reader

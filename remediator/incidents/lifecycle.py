"""Incidents: one open record of trouble per target, with a timeline of all that was decided and done."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, get_args

from sqlalchemy import Connection, Row, and_, bindparam, func, insert, select, update

from fleet.inventory.model import Service
from fleet.inventory.notify import NotificationKind, Notify
from remediator.notifications import outbox
from remediator.policy import GATES, NEEDS_PERSON, QUEUED, Decision, Observation
from remediator.record import stops
from remediator.record.schema import actions, alerts, incidents, timeline

_NOTE = insert(timeline)
_OPEN = select(incidents.c.id).where(incidents.c.service == bindparam("of"), incidents.c.state == "open")
_BECAME_DOWN = (
    update(incidents)
    .where(incidents.c.id == bindparam("of"), incidents.c.labels.is_(None))
    .values(
        labels=bindparam("said"),
        down_at=bindparam("now"),
        acknowledged_by=None,
        acknowledged_at=None,
        # What was decided and seen before is not of this outage.
        verb=None,
        reason=None,
        detail=None,
        queued_since=None,
        healing_since=None,
        probe=None,
        person_needed_at=None,
        stopped_run=None,
        stopped_why=None,
    )
)
ENDS: tuple[NotificationKind, ...] = ("recovered", "unobserved", "alert_over")
WAIT_TOO_LONG = 120.0  # seconds of one wait after which people are told of it
# What is told otherwise, or not at all: an approval is asked for at once, and the action itself is on the card.
_TOLD_OTHERWISE = ("approval", "target-busy", "stopped", "stopped-by-hand")
# Refusals that may pass by themselves; a try that sudo refused has called a person already.
_MAY_PASS = ("not-restartable", "sudo-refused")
# What is decided before it matters what the exporter sees.
_WITHOUT_SIGHT = [*takewhile(lambda name: name != "blind", GATES), "blind"]
PROBE_KEPT = 1000  # characters
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


def became_down(connection: Connection, incident: int, labels: Mapping[str, str], now: float) -> None:
    """An alert to act on joined: the outage begins, and from now on only those alerts keep the incident open.

    Who acknowledged what was milder has not acknowledged this.
    """
    connection.execute(_BECAME_DOWN, {"of": incident, "said": dict(labels), "now": now})


def keep_quiet(connection: Connection, incident: int, service: str) -> bool:
    """Whether an alert that fires now is not told, since a person stopped the service."""
    stopped = bool(stops.of(connection, service))
    quiet = stopped and not outbox.is_told(connection, incident)
    connection.execute(update(incidents).where(incidents.c.id == incident).values(quiet=int(quiet)))
    return stopped


def is_quiet(connection: Connection, incident: int, kind: NotificationKind) -> bool:
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


def decided(
    connection: Connection,
    notify: Notify,
    incident: int,
    decision: Decision,
    now: float,
    observed: Observation | None = None,
) -> bool:
    """Keep a decision, and what was `observed`; True where it differs from the one before, or people are told of it."""
    before = connection.execute(select(incidents).where(incidents.c.id == incident)).one()
    _keep_probe(connection, before, observed)
    if (before.verb, before.reason) == (decision.verb, decision.reason):
        if decision.reason in NEEDS_PERSON:
            return _tell_of_need(connection, notify, before, decision, now)
        return decision.verb == "wait" and _tell_of_wait(connection, notify, before, decision, now)
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
    if decision.reason == "stopped-by-hand":
        content = {"service": before.service, "why": decision.detail}
        tell_of(connection, notify, incident, "stopped_by_hand", content, now)
    if decision.reason in NEEDS_PERSON:
        _tell_of_need(connection, notify, before, decision, now)
    return True


def _tell_of_need(connection: Connection, notify: Notify, row: Row[Any], decision: Decision, now: float) -> bool:
    """Tell that a person is needed, unless that is known; a reason that may pass by itself must have lasted."""
    if row.person_needed_at is not None:
        return False
    if decision.reason in _MAY_PASS:
        since = _since(connection, row, "refuse")
        if since is None or now - since < WAIT_TOO_LONG:
            return False
    content = {"service": row.service, "reason": decision.reason, "why": decision.detail}
    person_needed(connection, notify, row.id, content, now)
    return True


def _since(connection: Connection, row: Row[Any], event: str) -> float | None:
    """When the last event of this kind was noted."""
    at: float | None = connection.scalar(
        select(func.max(timeline.c.at)).where(timeline.c.incident_id == row.id, timeline.c.event == event)
    )
    return at


def _keep_probe(connection: Connection, before: Row[Any], observed: Observation | None) -> None:
    """Keep how the last failed probe failed."""
    if observed is None or not observed.reason:
        return
    probe = f"{observed.reason}: {observed.message}"[:PROBE_KEPT]
    if probe != before.probe:
        connection.execute(update(incidents).where(incidents.c.id == before.id).values(probe=probe))


def person_needed(
    connection: Connection, notify: Notify, incident: int, content: Mapping[str, Any], now: float
) -> None:
    """Automation has ended without recovery: keep that, and tell people, once until it goes on again."""
    goes_on = and_(incidents.c.id == incident, incidents.c.state == "open", incidents.c.person_needed_at.is_(None))
    if connection.execute(update(incidents).where(goes_on).values(person_needed_at=now)).rowcount:
        note(connection, incident, now, "person-needed", reason=content["reason"])
        about = outbox.about_person_needed(incident, now)
        tell_of(connection, notify, incident, "person_needed", content, now, about)


def keep_stop(connection: Connection, incident: int, run: str, why: str) -> None:
    """Keep that somebody stopped a target after a run of it; without one, only until its host tells of it again."""
    seen = {"stopped_run": run, "stopped_why": why}
    connection.execute(update(incidents).where(incidents.c.id == incident).values(**seen))


def forget_stop(connection: Connection, services: Collection[str]) -> None:
    """The target of these services has run again."""
    mine = incidents.c.service.in_(list(services)) & (incidents.c.state == "open")
    connection.execute(update(incidents).where(mine).values(stopped_run=None, stopped_why=None))


def automation_goes_on(connection: Connection, incident: int) -> None:
    """A command has run, or a person has given it new attempts: nobody is needed until those have failed too."""
    connection.execute(update(incidents).where(incidents.c.id == incident).values(person_needed_at=None))


def _tell_of_wait(connection: Connection, notify: Notify, row: Row[Any], decision: Decision, now: float) -> bool:
    """Tell people, once, of a wait that has become long, and until when it lasts where that is known."""
    if decision.reason in _TOLD_OTHERWISE:
        return False
    since = _since(connection, row, "wait")
    if since is None or now - since < WAIT_TOO_LONG:
        return False
    content = {"service": row.service, "reason": decision.reason, "why": decision.detail, "until": decision.ends}
    if decision.reason == "blind":
        return tell_of_blindness(connection, notify, row.id, content, now)
    # After each attempt it is another wait; what ran nothing was none.
    begun = (actions.c.incident_id == row.id) & actions.c.state.not_in(("queued", "cancelled"))
    attempts = begun & (actions.c.counts == 1)
    tried = connection.scalar(select(func.count()).select_from(actions).where(attempts))
    about = f"waiting incident {row.id} {decision.reason} {tried}"
    return tell_of(connection, notify, row.id, "waiting", content, now, about)


def tell_of_blindness(
    connection: Connection, notify: Notify, incident: int, content: Mapping[str, Any], now: float
) -> bool:
    """Tell people that nobody can see how a service is: once, until it was seen again."""
    held = timeline.c.event.in_(("wait", "refuse"))
    of_sight = timeline.c.event.in_(("act", "up")) | (
        held & timeline.c.detail["reason"].as_string().not_in(_WITHOUT_SIGHT)
    )
    seen = connection.scalar(select(func.max(timeline.c.id)).where(timeline.c.incident_id == incident, of_sight))
    return tell_of(connection, notify, incident, "blind", content, now, f"blind incident {incident} {seen or 0}")


def tell_of_unseen_end(connection: Connection, notify: Notify, incident: int, before: float, now: float) -> bool:
    """Tell people that nobody has been able to see since `before` how a service is whose alerts are over."""
    row = connection.execute(select(incidents).where(incidents.c.id == incident)).one()
    since = _since(connection, row, "wait")
    if since is None or since > before:
        return False
    return tell_of_blindness(connection, notify, incident, {"service": row.service, "why": row.detail or ""}, now)


def queued_since(connection: Connection) -> float | None:
    """Since when the action that has waited longest waits for a place, or for a person's approval."""
    oldest: float | None = connection.scalar(
        select(func.min(incidents.c.queued_since)).where(incidents.c.state == "open")
    )
    return oldest


def cancel_queued(connection: Connection, incident: int, now: float) -> None:
    """What waits for an approval is not needed any more."""
    queued = (actions.c.incident_id == incident) & (actions.c.state == "queued")
    for number in connection.scalars(select(actions.c.id).where(queued)).all():
        connection.execute(update(actions).where(actions.c.id == number).values(state="cancelled", ended_at=now))
        note(connection, incident, now, "cancelled", action=number)


def began_at(row: Row[Any]) -> float:
    """When what an incident is about began: its outage, where there was one."""
    return float(row.down_at if row.down_at is not None else row.opened_at)


@dataclass(frozen=True)
class Ended:
    """How long an incident's outage lasted, in seconds, and who brought its service back, if it came back."""

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
    began = began_at(row)
    content = {"service": row.service, "opened_at": began, "closed_at": now, "by": by}
    outbox.outgrown(connection, now, incident=incident)
    tell_of(connection, notify, incident, state, content, now)
    _carry_over(connection, incident, row.service, now)
    return Ended(now - began, by)


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
    kind: NotificationKind,
    content: Mapping[str, Any],
    now: float,
    about: str = "",
) -> bool:
    """Tell how an incident goes on; False where everybody has been told before, or nobody is to be."""
    if is_quiet(connection, incident, kind):
        return False
    labels = connection.scalar(select(incidents.c.labels).where(incidents.c.id == incident)) or {}
    begun = outbox.told(connection, outbox.about_incident(incident))
    if kind in get_args(Closed):  # who was told that a person is needed is told that nobody is any more
        begun += outbox.told_of_incident(connection, incident, "person_needed")
    channels = notify.follow_up_channels(begun, labels, kind)
    if kind == "person_needed":  # whoever has heard of it, or has not: those of today's routes hear this
        channels = list(dict.fromkeys([*notify.channels_for(labels, kind), *channels]))
    about = about or f"{kind} incident {incident}"
    return outbox.put(connection, notify, channels, kind, about, labels, content, now, incident=incident) > 0


def counts_by_state(connection: Connection) -> dict[str, int]:
    rows = connection.execute(select(incidents.c.state, func.count()).group_by(incidents.c.state))
    return {state: count for state, count in rows}  # noqa: C416 - rows are tuples only to a reader

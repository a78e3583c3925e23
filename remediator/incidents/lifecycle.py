"""Incidents: at most one is open per service, from its first firing alert until its recovery is seen.

An alert of a host that has runbooks has incidents as a service has, until it is resolved.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import and_, bindparam, func, insert, select, update

from fleet.inventory.model import Remediable, is_host_alert
from fleet.inventory.notify import NotificationKind
from remediator.incidents.timeline import add_event
from remediator.record import notifications, stops
from remediator.record.schema import actions, alerts, incidents, timeline
from remediator.record.situations import firing_names, outage_began_at
from remediator.record.transaction import Transaction

ClosedState = Literal["recovered", "unobserved"]
END_KINDS: tuple[NotificationKind, ...] = ("recovered", "unobserved", "alert_over")
_SELECT_OPEN = select(incidents.c.id).where(incidents.c.service == bindparam("of"), incidents.c.state == "open")
_SELECT_OPEN_IDS = select(incidents.c.service, incidents.c.id).where(incidents.c.state == "open")
_SELECT_OPEN_OF = _SELECT_OPEN_IDS.where(incidents.c.service.in_(bindparam("services", expanding=True)))
_INSERT = insert(incidents)
_SET_QUIET = update(incidents).where(incidents.c.id == bindparam("of")).values(quiet=bindparam("is_quiet"))
_MARK_DOWN = (
    update(incidents)
    .where(incidents.c.id == bindparam("of"), incidents.c.labels.is_(None))
    .values(
        labels=bindparam("alert_labels"),
        down_at=bindparam("now"),
        acknowledged_by=None,
        acknowledged_at=None,
        # What was decided and observed before the outage does not apply to it.
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


@dataclass(frozen=True)
class ClosedIncident:
    """How long the outage lasted, in seconds, and who recovered the service: defib, person, self or None."""

    duration: float
    recovered_by: str | None


def open_or_create(tx: Transaction, service: Remediable) -> int:
    """Return the id of the service's open incident, which is created if there is none."""
    incident = find_open(tx, service.id)
    return incident if incident is not None else _create(tx, service.id)


def _create(tx: Transaction, service: str, **detail: Any) -> int:
    row = tx.execute(_INSERT, {"service": service, "state": "open", "opened_at": tx.now})
    incident = int(row.lastrowid)
    add_event(tx, incident, "incident_opened", **detail)
    return incident


def find_open(tx: Transaction, service: str) -> int | None:
    """Return the id of the service's open incident."""
    incident: int | None = tx.scalar(_SELECT_OPEN, {"of": service})
    return incident


def open_incidents(tx: Transaction, services: Collection[str] | None = None) -> dict[str, int]:
    """Return the ids of the open incidents by service, of all services or of these."""
    if services is None:
        rows = tx.execute(_SELECT_OPEN_IDS)
    else:
        rows = tx.execute(_SELECT_OPEN_OF, {"services": list(services)})
    return {row.service: row.id for row in rows}


def begin_outage(tx: Transaction, incident: int, labels: Mapping[str, str]) -> None:
    """Begin the outage: the first of the alerts to act on fires, and only those keep the incident open from now on.

    Earlier alerts were less severe, so an acknowledgement of them is removed.
    """
    tx.execute(_MARK_DOWN, {"of": incident, "alert_labels": dict(labels), "now": tx.now})


def mute_if_stopped(tx: Transaction, incident: int, service: str) -> bool:
    """Whether an operator stopped the service. If nobody was notified of the incident yet, nobody is from now on."""
    is_stopped = bool(stops.describe_stop(tx, service))
    is_muted = is_stopped and not notifications.has_notifications(tx, incident)
    tx.execute(_SET_QUIET, {"of": incident, "is_quiet": int(is_muted)})
    return is_stopped


def is_muted(tx: Transaction, incident: int, kind: NotificationKind) -> bool:
    """Whether a notification of this kind is not sent because an operator stopped the service.

    If the beginning of the incident was notified before the stop, its end is notified, too.
    """
    row = tx.execute(select(incidents.c.service, incidents.c.quiet).where(incidents.c.id == incident)).one()
    return bool(row.quiet) or (kind not in END_KINDS and bool(stops.describe_stop(tx, row.service)))


def set_person_needed(tx: Transaction, incident: int, content: Mapping[str, Any]) -> None:
    """Record that automation ended without recovery, and notify once until `record_automation_resumed`."""
    is_due = and_(incidents.c.id == incident, incidents.c.state == "open", incidents.c.person_needed_at.is_(None))
    if tx.execute(update(incidents).where(is_due).values(person_needed_at=tx.now)).rowcount:
        add_event(tx, incident, "person_needed", reason=content["reason"])
        key = notifications.person_needed_key(incident, tx.now)
        notify_of_incident(tx, incident, "person_needed", content, key)


def is_in_crash_loop(tx: Transaction, incident: int) -> bool:
    """Whether a person is needed because of a crash loop, which another command does not end."""
    is_match = (timeline.c.incident_id == incident) & (timeline.c.event == "person_needed")
    detail = tx.scalar(select(timeline.c.detail).where(is_match).order_by(timeline.c.id.desc()).limit(1)) or {}
    return detail.get("reason") == "crash-loop"


def record_automation_resumed(tx: Transaction, incident: int) -> None:
    """Record that automation acts again: a command was run, or an operator reset the attempts."""
    tx.execute(update(incidents).where(incidents.c.id == incident).values(person_needed_at=None))


def cancel_queued_actions(tx: Transaction, incident: int) -> bool:
    """Cancel the actions that wait for approval, or are approved and wait; returns whether there were any."""
    is_queued = (actions.c.incident_id == incident) & (actions.c.state == "queued")
    queued = tx.scalars(select(actions.c.id).where(is_queued)).all()
    for number in queued:
        tx.execute(update(actions).where(actions.c.id == number).values(state="cancelled", ended_at=tx.now))
        add_event(tx, incident, "action_cancelled", action=number)
    return bool(queued)


def close(
    tx: Transaction,
    incident: int,
    state: ClosedState,
    alerts_to_act_on: Collection[str],
    up_for: float | None = None,
) -> ClosedIncident | None:
    """Close an incident and notify the channels that were notified of its beginning.

    `up_for` is for how many seconds the exporter has seen the service up. Returns None, and changes nothing, if an
    action is running or an alert is firing again.
    """
    row = tx.execute(select(incidents).where(incidents.c.id == incident)).one()
    is_busy = tx.scalar(select(actions.c.id).where(actions.c.service == row.service, actions.c.state == "running"))
    if row.state != "open" or is_busy is not None or firing_names(tx, incident, alerts_to_act_on):
        return None
    by = _recovered_by(tx, incident) if state == "recovered" else None
    cancel_queued_actions(tx, incident)
    tx.execute(
        update(incidents).where(incidents.c.id == incident).values(state=state, closed_at=tx.now, recovered_by=by)
    )
    began = outage_began_at(row)
    watched = None if up_for is None else min(up_for, tx.now - began)
    optional = {"by": by, "watched": watched}
    add_event(
        tx, incident, "incident_closed", state=state,
        **{name: value for name, value in optional.items() if value is not None},
    )  # fmt: skip
    content = {"service": row.service, "opened_at": began, "closed_at": tx.now, "by": by}
    notifications.drop_follow_ups(tx, incident=incident)
    notify_of_incident(tx, incident, state, content)
    _move_firing_alerts(tx, incident, row.service)
    return ClosedIncident(tx.now - began, by)


def _move_firing_alerts(tx: Transaction, incident: int, service: str) -> None:
    """Move alerts that are still firing, which are none to act on, to a new incident."""
    is_firing = and_(alerts.c.incident_id == incident, alerts.c.status == "firing")
    if is_host_alert(service):  # the inventory has no runbook for it any more: it is only notified
        tx.execute(update(alerts).where(is_firing).values(incident_id=None))
    elif tx.scalar(select(alerts.c.id).where(is_firing).limit(1)) is not None:
        new_incident = _create(tx, service, after=incident)
        tx.execute(update(alerts).where(is_firing).values(incident_id=new_incident))


def _recovered_by(tx: Transaction, incident: int) -> str:
    requested_by = tx.scalar(
        select(actions.c.requested_by)
        .where(actions.c.incident_id == incident, actions.c.up_at.is_not(None))
        .order_by(actions.c.id.desc())
        .limit(1)
    )
    return {"alert": "defib", "person": "person"}.get(requested_by or "", "self")


def notify_of_incident(
    tx: Transaction, incident: int, kind: NotificationKind, content: Mapping[str, Any], key: str = ""
) -> bool:
    """Notify of an incident's progress; False if this was notified before, or is not to be notified."""
    if is_muted(tx, incident, kind):
        return False
    labels = _find_labels(tx, incident)
    notified = notifications.notified_channels(tx, notifications.incident_key(incident))
    if kind in get_args(ClosedState):
        notified += notifications.channels_notified_of(tx, incident, "person_needed")
    channels = tx.inventory.notify.follow_up_channels(notified, labels, kind)
    if kind == "person_needed":  # also channels that the routes select now and that were not notified before
        channels = list(dict.fromkeys([*tx.inventory.notify.channels_for(labels, kind), *channels]))
    key = key or f"{kind} incident {incident}"
    return notifications.add(tx, channels, kind, key, labels, content, incident=incident) > 0


def _find_labels(tx: Transaction, incident: int) -> Mapping[str, str]:
    """Return the labels by which an incident is routed: of its outage, or of its newest alert if there was none."""
    labels: Mapping[str, str] | None = tx.scalar(select(incidents.c.labels).where(incidents.c.id == incident))
    if labels is None:
        newest = select(alerts.c.labels).where(alerts.c.incident_id == incident).order_by(alerts.c.id.desc()).limit(1)
        labels = tx.scalar(newest)
    return labels or {}


def oldest_queued(tx: Transaction) -> float | None:
    """Return since when the action that has waited longest has waited for capacity or for approval."""
    is_open = incidents.c.state == "open"
    oldest: float | None = tx.scalar(select(func.min(incidents.c.queued_since)).where(is_open))
    return oldest


def count_incidents_by_state(tx: Transaction) -> dict[str, int]:
    rows = tx.execute(select(incidents.c.state, func.count().label("number")).group_by(incidents.c.state))
    return {row.state: row.number for row in rows}

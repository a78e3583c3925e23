"""Receive alerts: a webhook's payload becomes alerts, incidents and notifications in one transaction."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row, bindparam, insert, select, update

from fleet.inventory.model import HostAlert, Inventory
from fleet.inventory.notify import NotificationKind
from remediator.clients.alerts import WATCHDOG, Alert
from remediator.incidents import resolution
from remediator.incidents.alert_limits import AlertLimits
from remediator.incidents.alert_starts import add_received_copy, limit_starts, normalize_starts_at, read_starts
from remediator.incidents.lifecycle import begin_outage, is_muted, mute_if_stopped, open_or_create
from remediator.incidents.timeline import TimelineEvent, add_event
from remediator.record import notifications, timestamps
from remediator.record.schema import alerts, incidents
from remediator.record.transaction import Transaction

LATE_COPY = 300.0  # seconds after an alert's end in which a firing copy is taken for a late one
RECEIVER_EXPIRES = 86400.0  # seconds after its last webhook
RECEIVER_STORED_EVERY = 3600.0
MAX_RECEIVERS = 100
MAX_EVENTS = 1000  # of alerts, of one incident, within `arrivals.SPAN`
RECENT_ALERTS = 5  # of one fingerprint, whose starts a copy is compared with
# Built once, since a webhook may have thousands of alerts.
_SELECT_ALERT = select(alerts).where(
    alerts.c.fingerprint == bindparam("fingerprint"), alerts.c.starts_at == bindparam("starts_at")
)
_SELECT_RECENT = (
    select(alerts)
    .where(alerts.c.fingerprint == bindparam("fingerprint"))
    .order_by(alerts.c.status == "resolved", alerts.c.id.desc())
    .limit(RECENT_ALERTS)
)
_INSERT = insert(alerts).returning(*alerts.c)
_SET_FIRING = (
    update(alerts)
    .where(alerts.c.id == bindparam("number"))
    .values(
        status="firing", resolved_by=None, times=alerts.c.times + 1, incident_id=bindparam("incident"),
        last_seen=bindparam("now"), starts=bindparam("new_starts"), held_at=None, doubted_at=None,
    )
)  # fmt: skip


def receive_alerts(tx: Transaction, received: Sequence[Alert], receiver: str = "") -> int:
    """Store the alerts of a webhook, open or update incidents, and add notifications. Idempotent.

    `receiver` is the Alertmanager receiver that sent it. Returns how many alerts were refused because too many are
    open.
    """
    limits = AlertLimits(tx)
    if receiver:
        _store_receiver(tx, receiver)
    for alert in received:
        if alert.name != WATCHDOG:
            _receive_alert(tx, alert, limits)
        else:
            timestamps.put(tx, "watchdog" if alert.status == "firing" else "watchdog-resolved", tx.now)
    return limits.refused


def _store_receiver(tx: Transaction, receiver: str) -> None:
    known = known_receivers(tx)
    if tx.now - known.get(receiver, float("-inf")) >= RECEIVER_STORED_EVERY:
        newest = sorted({**known, receiver: tx.now}.items(), key=lambda item: item[1])[-MAX_RECEIVERS:]
        timestamps.put(tx, "receivers", tx.now, names=dict(newest))


def known_receivers(tx: Transaction) -> dict[str, float]:
    """Return the Alertmanager receivers that deliver to this remediator, with the time of a recent webhook."""
    stored = timestamps.get(tx, "receivers")
    names: Mapping[str, float] = stored.detail["names"] if stored is not None else {}
    return {name: at for name, at in names.items() if tx.now - at < RECEIVER_EXPIRES}


def _receive_alert(tx: Transaction, alert: Alert, limits: AlertLimits) -> None:
    start = normalize_starts_at(alert.starts_at)
    latest, *earlier = recent_alerts(tx, alert.fingerprint)
    if latest is None or start not in read_starts(latest):
        if latest is not None and is_copy_of_earlier(tx, alert, start, earlier):
            return
        if latest is None or latest.status == "resolved":
            add_alert(tx, alert, start, limits)
            return
    if latest.status == "firing":
        _update_firing(tx, latest, alert, start)
    elif alert.status == "firing":
        _fire_after_end(tx, latest, start, limits)
    elif latest.doubted_at is not None:
        set_doubt(tx, latest, add_received_copy(read_starts(latest), start, alert.status))


def recent_alerts(tx: Transaction, fingerprint: str) -> list[Row[Any] | None]:
    """Return the alerts of a fingerprint, the firing or newest one first; [None] if there is none."""
    return list(tx.execute(_SELECT_RECENT, {"fingerprint": fingerprint}).all()) or [None]


def is_copy_of_earlier(tx: Transaction, alert: Alert, start: str, earlier: Sequence[Row[Any] | None]) -> bool:
    """Whether this is a late copy of an alert after which another one with its fingerprint was received."""
    identity = {"fingerprint": alert.fingerprint, "starts_at": alert.starts_at}
    return (
        any(row is not None and start in read_starts(row) for row in earlier)
        or tx.execute(_SELECT_ALERT, identity).first() is not None
    )


def add_alert(tx: Transaction, alert: Alert, start: str, limits: AlertLimits) -> bool:
    """Store a new alert; if it is firing, open an incident and notify. False if too many are open, or new.

    One that is not firing is stored for late copies of it, and nobody sees it.
    """
    accepted = limits.accept(alert)
    if accepted is None:
        return False
    is_firing = accepted.status == "firing"
    values = {
        "fingerprint": accepted.fingerprint,
        "starts_at": accepted.starts_at,
        "status": accepted.status,
        "resolved_by": None if is_firing else "alertmanager",
        "times": 0,
        "name": accepted.name,
        "labels": dict(accepted.labels),
        "annotations": dict(accepted.annotations),
        "ends_at": accepted.ends_at,
        "first_seen": tx.now,
        "last_seen": tx.now,
        "starts": {start: is_firing},
    }
    row = tx.execute(_INSERT, values).one()
    if is_firing:
        set_firing(tx, row)
    return True


def _update_firing(tx: Transaction, row: Row[Any], alert: Alert, start: str) -> None:
    """Take another copy of a firing alert, which may resolve it."""
    starts = add_received_copy(read_starts(row), start, alert.status)
    if not any(starts.values()):
        if row.held_at is None:
            end_alert(tx, row, "alertmanager", alert.ends_at)
        return
    if alert.status == "resolved":
        tx.execute(update(alerts).where(alerts.c.id == row.id).values(starts=starts))
        return
    values = {"starts": starts, "last_seen": tx.now, "held_at": None, "resolved_by": None}
    tx.execute(update(alerts).where(alerts.c.id == row.id).values(**values))
    if row.incident_id is None and tx.inventory.find_subject_of_alert(row.name, row.labels) is not None:
        set_firing(tx, row)  # its service or its runbook was added to the inventory since


def _fire_after_end(tx: Transaction, row: Row[Any], start: str, limits: AlertLimits) -> None:
    """Take a firing copy of a resolved alert: a late copy, or the alert fires again with the same start."""
    if row.resolved_by == "reconciliation":
        set_firing(tx, row, start)
    elif is_remediation_alert(row, tx.inventory):
        # The exporter knows. Stored, so that a restart does not lose the question.
        set_doubt(tx, row, add_received_copy(read_starts(row), start, "firing"))
    elif tx.now - row.last_seen >= LATE_COPY and limits.take_place(row.name, row.labels):
        set_firing(tx, row, start)


def set_doubt(tx: Transaction, row: Row[Any], starts: Mapping[str, bool]) -> None:
    """Store that a resolved alert may fire by these starts; without a firing one, there is no doubt."""
    values = {"starts": dict(starts), "doubted_at": tx.now if any(starts.values()) else None}
    tx.execute(update(alerts).where(alerts.c.id == row.id).values(**values))


def set_firing(tx: Transaction, row: Row[Any], start: str | None = None) -> None:
    """Set an alert to firing, for the first time or again: open or update its incident if it has one, and notify."""
    service = tx.inventory.find_subject_of_alert(row.name, row.labels)
    incident = open_or_create(tx, service) if service else None
    starts = limit_starts({**read_starts(row), start or normalize_starts_at(row.starts_at): True})
    tx.execute(_SET_FIRING, {"number": row.id, "incident": incident, "now": tx.now, "new_starts": starts})
    _note(tx, incident, "alert_firing", alert=row.name, starts_at=row.starts_at)
    kind: NotificationKind
    if (
        service is not None
        and incident is not None
        and row.name in tx.inventory.remediation.for_service(service).alerts
        and not (isinstance(service, HostAlert) and _has_begun_with_other(tx, incident, row))
    ):
        begin_outage(tx, incident, row.labels)
        key, kind = notifications.incident_key(incident), "down"
    else:
        key, kind = notifications.alert_key(row.fingerprint, row.starts_at, row.times + 1), "alert"
    if service is not None and incident is not None and mute_if_stopped(tx, incident, service.id):
        return
    notifications.notify(tx, kind, key, row.labels, _notification_content(row), incident=incident, alert=row.id)


def _has_begun_with_other(tx: Transaction, incident: int, row: Row[Any]) -> bool:
    """Whether the outage began with an alert that has other labels, such as of another disk of the host."""
    labels = tx.scalar(select(incidents.c.labels).where(incidents.c.id == incident))
    return labels is not None and labels != row.labels


def _notification_content(row: Row[Any]) -> dict[str, Any]:
    return {"annotations": row.annotations, "starts_at": row.starts_at}


def end_alert(tx: Transaction, row: Row[Any], by: str, ends_at: str) -> None:
    """Resolve an alert, or hold its end until there is evidence for it."""
    if is_remediation_alert(row, tx.inventory) or resolution.is_end_confirmed(tx, row.name, tx.now):
        resolve_alert(tx, row, by, ends_at)
        return
    starts = dict.fromkeys(read_starts(row), False)
    values = {"held_at": tx.now, "resolved_by": by, "ends_at": ends_at, "starts": starts}
    tx.execute(update(alerts).where(alerts.c.id == row.id).values(**values))
    _note(tx, row.incident_id, "alert_end_held", alert=row.name, by=by, ends_at=ends_at)


def resolve_alert(tx: Transaction, row: Row[Any], by: str, ends_at: str) -> None:
    """Resolve an alert and notify the channels that were notified of it."""
    starts = dict.fromkeys(read_starts(row), False)
    values = {
        "status": "resolved", "resolved_by": by, "ends_at": ends_at, "last_seen": tx.now, "held_at": None,
        "starts": starts,
    }  # fmt: skip
    tx.execute(update(alerts).where(alerts.c.id == row.id).values(**values))
    _note(tx, row.incident_id, "alert_resolved", alert=row.name, by=by, ends_at=ends_at)
    notifications.update_cards(tx, alert=row.id)
    notifications.drop_follow_ups(tx, alert=row.id)
    if row.incident_id is not None and is_muted(tx, row.incident_id, "alert_over"):
        return
    key = notifications.alert_key(row.fingerprint, row.starts_at, row.times)
    notified = notifications.notified_channels(tx, key)
    channels = tx.inventory.notify.follow_up_channels(notified, row.labels, "alert_over")
    notifications.add(
        tx, channels, "alert_over", f"{key} over", row.labels, _notification_content(row), incident=row.incident_id,
        alert=row.id,
    )  # fmt: skip


def _note(tx: Transaction, incident: int | None, event: TimelineEvent, **detail: str) -> None:
    """Add an event of an alert to the timeline of its incident, if it has one with room: anybody can send many."""
    subject = f"events of incident {incident}"
    if incident is not None and tx.arrivals.count(subject) < MAX_EVENTS:
        tx.arrivals.add(subject)
        add_event(tx, incident, event, **detail)


def is_remediation_alert(row: Row[Any], inventory: Inventory) -> bool:
    """Whether an alert is one of `remediation.alerts` of a service in the inventory."""
    service = inventory.services.get(row.labels.get("service", ""))
    return service is not None and row.name in inventory.remediation.for_service(service).alerts

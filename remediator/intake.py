"""Taking alerts in: a delivery becomes alerts, incidents and notices in one transaction."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, func, insert, select, update

from fleet.model import Inventory
from fleet.notify import Told
from remediator import marks
from remediator.incidents import became_down, note, open_or_new
from remediator.notices import outbox
from remediator.schema import alerts
from remediator.webhook import Alert

WATCHDOG = "Watchdog"
# Made once: a delivery may hold thousands of alerts.
_KNOWN = select(alerts).where(
    alerts.c.fingerprint == bindparam("fingerprint"), alerts.c.starts_at == bindparam("starts_at")
)
_NEW = insert(alerts)
_NUMBERED = select(alerts).where(alerts.c.id == bindparam("number"))
_FIRES = (
    update(alerts)
    .where(alerts.c.id == bindparam("number"))
    .values(
        status="firing", resolved_by=None, times=alerts.c.times + 1, incident_id=bindparam("incident"),
        last_seen=bindparam("now"),
    )
)  # fmt: skip


def receive(connection: Connection, delivered: Sequence[Alert], inventory: Inventory, now: float) -> None:
    """Take a delivery in: renew or add alerts, change incidents, write notices; seeing one again changes nothing."""
    for alert in delivered:
        if alert.name != WATCHDOG:
            _take(connection, alert, inventory, now)
        elif alert.status == "firing":
            marks.put(connection, "watchdog", now)


def _take(connection: Connection, alert: Alert, inventory: Inventory, now: float) -> None:
    known = connection.execute(_KNOWN, {"fingerprint": alert.fingerprint, "starts_at": alert.starts_at}).first()
    if known is None:
        made = connection.execute(
            _NEW,
            {
                "fingerprint": alert.fingerprint,
                "starts_at": alert.starts_at,
                "status": alert.status,
                "resolved_by": "alertmanager" if alert.status == "resolved" else None,
                "times": 0,
                "name": alert.name,
                "labels": dict(alert.labels),
                "annotations": dict(alert.annotations),
                "ends_at": alert.ends_at,
                "first_seen": now,
                "last_seen": now,
            },
        )
        known = connection.execute(_NUMBERED, {"number": made.lastrowid}).one()
        if alert.status == "firing":
            _fire(connection, known, inventory, now)
    elif alert.status == "resolved":
        if known.status == "firing":
            _resolve(connection, known, "alertmanager", alert.ends_at, inventory, now)
    elif known.status == "firing":
        connection.execute(update(alerts).where(alerts.c.id == known.id).values(last_seen=now))
        if known.incident_id is None and alert.labels.get("service", "") in inventory.services:
            _fire(connection, known, inventory, now)  # its service came into the inventory meanwhile
    elif known.resolved_by == "reconciliation":
        _fire(connection, known, inventory, now)
    # What Alertmanager called resolved stays so here: a late copy of the firing one is no news. If it really fires
    # again, Alertmanager's list says so, and reconcile() takes it up.


def _fire(connection: Connection, known: Row[Any], inventory: Inventory, now: float) -> None:
    """Let an alert fire, for the first time or again: its service has an incident, and people are told."""
    service = inventory.services.get(known.labels.get("service", ""))
    incident = open_or_new(connection, service, now) if service else None
    connection.execute(_FIRES, {"number": known.id, "incident": incident, "now": now})
    if service is not None and incident is not None:
        note(connection, incident, now, "firing", alert=known.name, starts_at=known.starts_at)
    about: str
    kind: Told
    if service is not None and incident is not None and known.name in inventory.remediation.of(service).alerts:
        became_down(connection, incident, known.labels)
        about, kind = outbox.about_incident(incident), "down"
    else:
        about, kind = outbox.about_alert(known.fingerprint, known.starts_at, known.times + 1), "alert"
    outbox.tell(
        connection, inventory.notify, kind, about, known.labels, _content(known), now, incident=incident, alert=known.id
    )


def _content(known: Row[Any]) -> dict[str, Any]:
    return {"annotations": known.annotations, "starts_at": known.starts_at}


def _resolve(connection: Connection, known: Row[Any], by: str, ends_at: str, inventory: Inventory, now: float) -> None:
    connection.execute(
        update(alerts)
        .where(alerts.c.id == known.id)
        .values(status="resolved", resolved_by=by, ends_at=ends_at, last_seen=now)
    )
    if known.incident_id is not None:
        note(connection, known.incident_id, now, "resolved", alert=known.name, by=by, ends_at=ends_at)
    outbox.changed(connection, now, alert=known.id)
    outbox.outgrown(connection, now, alert=known.id)
    about = outbox.about_alert(known.fingerprint, known.starts_at, known.times)
    channels = inventory.notify.channels_after(outbox.told(connection, about), known.labels, "alert_over")
    outbox.put(
        connection, inventory.notify, channels, "alert_over", f"{about} over", known.labels, _content(known), now,
        incident=known.incident_id, alert=known.id,
    )  # fmt: skip


def acknowledge(connection: Connection, alert: int, by: str, now: float) -> Row[Any] | None:
    """Take a person's word that they look after an alert; the alert as it is then, or None where there is none."""
    mine = and_(alerts.c.id == alert, alerts.c.status == "firing", alerts.c.acknowledged_at.is_(None))
    values = {"acknowledged_by": by, "acknowledged_at": now}
    if connection.execute(update(alerts).where(mine).values(**values)).rowcount:
        outbox.changed(connection, now, alert=alert)
    return connection.execute(select(alerts).where(alerts.c.id == alert)).first()


def reconcile(
    connection: Connection,
    active: Iterable[str],
    listed: Iterable[str],
    before: float,
    inventory: Inventory,
    now: float,
) -> int:
    """Hold what we believe against Alertmanager's list: fingerprints that are `active`, and all that are `listed`.

    What we believe to fire and is not listed is over; what we hold to be over and is active fires again. Alerts seen
    since `before` are left alone: they may be newer than the list. Returns how many changed.
    """
    still, active = set(listed), set(active)
    stale = connection.execute(select(alerts).where(alerts.c.status == "firing", alerts.c.last_seen < before)).all()
    over = [row for row in stale if row.fingerprint not in still]
    for row in over:
        _resolve(connection, row, "reconciliation", "", inventory, now)
    again = _wrongly_over(connection, active, before)
    for row in again:
        _fire(connection, row, inventory, now)
    return len(over) + len(again)


def _wrongly_over(connection: Connection, active: AbstractSet[str], before: float) -> list[Row[Any]]:
    """The newest alert of each active fingerprint, where we hold it to be over."""
    newest = connection.scalars(
        select(func.max(alerts.c.id)).where(alerts.c.fingerprint.in_(active)).group_by(alerts.c.fingerprint)
    ).all()
    rows = connection.execute(
        select(alerts).where(alerts.c.id.in_(newest), alerts.c.status == "resolved", alerts.c.last_seen < before)
    )
    return list(rows)


def _to_act_on(known: Row[Any], inventory: Inventory) -> bool:
    service = inventory.services.get(known.labels.get("service", ""))
    return service is not None and known.name in inventory.remediation.of(service).alerts


def presume_over(connection: Connection, up: AbstractSet[str], before: float, inventory: Inventory, now: float) -> int:
    """Resolve the alerts to act on of services that have long been `up`; for where no Alertmanager can be asked."""
    stale = connection.execute(select(alerts).where(alerts.c.status == "firing", alerts.c.last_seen < before)).all()
    over = [row for row in stale if row.labels.get("service") in up and _to_act_on(row, inventory)]
    for row in over:
        _resolve(connection, row, "reconciliation", "", inventory, now)
    return len(over)

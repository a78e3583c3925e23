"""Taking alerts in: a delivery becomes alerts, incidents and notices in one transaction."""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, select, update

from fleet.model import Inventory, Service
from remediator.incidents import note, open_or_new
from remediator.notices import outbox
from remediator.schema import alerts
from remediator.webhook import Alert

WATCHDOG = "Watchdog"


def receive(connection: Connection, delivered: Sequence[Alert], inventory: Inventory, now: float) -> None:
    """Take a delivery in: renew or add alerts, change incidents, write notices; seeing one again changes nothing."""
    for alert in delivered:
        if alert.name != WATCHDOG:
            _take(connection, alert, inventory, now)


def _take(connection: Connection, alert: Alert, inventory: Inventory, now: float) -> None:
    service = inventory.services.get(alert.labels.get("service", ""))
    key = and_(alerts.c.fingerprint == alert.fingerprint, alerts.c.starts_at == alert.starts_at)
    known = connection.execute(select(alerts).where(key)).first()
    if known is None:
        incident = open_or_new(connection, service, now) if service and alert.status == "firing" else None
        connection.execute(
            insert(alerts).values(
                fingerprint=alert.fingerprint,
                starts_at=alert.starts_at,
                status=alert.status,
                resolved_by="alertmanager" if alert.status == "resolved" else None,
                name=alert.name,
                incident_id=incident,
                labels=dict(alert.labels),
                annotations=dict(alert.annotations),
                ends_at=alert.ends_at,
                first_seen=now,
                last_seen=now,
            )
        )
        if alert.status == "firing":
            _tell_firing(connection, alert, service, incident, inventory, now)
        return
    # What Alertmanager called resolved stays so: a late copy of the firing one is no news. What only we held to be
    # over, because Alertmanager no longer listed it, fires again.
    reopened = known.status == "resolved" and alert.status == "firing" and known.resolved_by == "reconciliation"
    if reopened:
        incident = open_or_new(connection, service, now) if service else None
        connection.execute(
            update(alerts).where(key).values(status="firing", resolved_by=None, incident_id=incident, last_seen=now)
        )
        if incident is not None:
            note(connection, incident, now, "firing", alert=alert.name, again=True)
    elif known.status == "firing" and alert.status == "resolved":
        _resolve(connection, known, "alertmanager", alert.ends_at, inventory, now)
    else:
        connection.execute(update(alerts).where(key).values(last_seen=now))


def _tell_firing(
    connection: Connection,
    alert: Alert,
    service: Service | None,
    incident: int | None,
    inventory: Inventory,
    now: float,
) -> None:
    content = {"labels": dict(alert.labels), "annotations": dict(alert.annotations), "starts_at": alert.starts_at}
    if incident is not None:
        note(connection, incident, now, "firing", alert=alert.name, starts_at=alert.starts_at)
    if service is not None and alert.name in inventory.remediation.of(service).alerts:
        about, kind = f"down incident {incident}", "down"
    else:
        about, kind = f"alert {alert.fingerprint} {alert.starts_at}", "alert"
    outbox.tell(connection, inventory.notify, kind, about, alert.labels, content, now, incident)


def _resolve(connection: Connection, known: Row[Any], by: str, ends_at: str, inventory: Inventory, now: float) -> None:
    connection.execute(
        update(alerts)
        .where(alerts.c.id == known.id)
        .values(status="resolved", resolved_by=by, ends_at=ends_at, last_seen=now)
    )
    if known.incident_id is not None:
        note(connection, known.incident_id, now, "resolved", alert=known.name, by=by, ends_at=ends_at)
    about = f"alert {known.fingerprint} {known.starts_at}"
    if outbox.was_told(connection, about):
        content = {"labels": known.labels, "annotations": known.annotations, "starts_at": known.starts_at}
        outbox.tell(
            connection, inventory.notify, "alert_over", f"{about} over", known.labels, content, now, known.incident_id
        )


def reconcile(
    connection: Connection, active: Iterable[tuple[str, str]], before: float, inventory: Inventory, now: float
) -> int:
    """Hold what we believe to fire against the (fingerprint, startsAt) of what does.

    Alerts seen since `before` are left alone. Returns how many were over without our having been told.
    """
    still = {fingerprint for fingerprint, _ in active}
    stale = connection.execute(select(alerts).where(alerts.c.status == "firing", alerts.c.last_seen < before)).all()
    over = [row for row in stale if row.fingerprint not in still]
    for row in over:
        _resolve(connection, row, "reconciliation", "", inventory, now)
    return len(over)


def presume_over(connection: Connection, up: AbstractSet[str], before: float, inventory: Inventory, now: float) -> int:
    """Resolve the alerts to act on of services that have long been `up`; for where no Alertmanager can be asked."""
    stale = connection.execute(select(alerts).where(alerts.c.status == "firing", alerts.c.last_seen < before)).all()
    over = [row for row in stale if row.labels.get("service") in up and row.name in inventory.remediation.alerts]
    for row in over:
        _resolve(connection, row, "reconciliation", "", inventory, now)
    return len(over)

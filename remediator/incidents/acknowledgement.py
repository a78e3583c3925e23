"""Acknowledgements: an operator says that they take care of an incident, an alert, or everything in a message."""

from typing import Any

from sqlalchemy import Row, and_, or_, select, update

from remediator.incidents.timeline import add_event
from remediator.record import notifications as notification_rows
from remediator.record.schema import alerts, incidents, notifications
from remediator.record.transaction import Transaction


def acknowledge_incident(tx: Transaction, incident: int, by: str) -> Row[Any] | None:
    """Acknowledge an open incident; returns its row afterwards, None if there is no such incident.

    The first acknowledgement counts. A closed incident stays as it is.
    """
    is_due = and_(incidents.c.id == incident, incidents.c.state == "open", incidents.c.acknowledged_at.is_(None))
    if tx.execute(update(incidents).where(is_due).values(acknowledged_by=by, acknowledged_at=tx.now)).rowcount:
        add_event(tx, incident, "acknowledged", by=by)
        for alert in tx.scalars(select(alerts.c.id).where(alerts.c.incident_id == incident)).all():
            notification_rows.update_cards(tx, alert=alert)
    return tx.execute(select(incidents).where(incidents.c.id == incident)).first()


def acknowledge_alert(tx: Transaction, alert: int, by: str) -> Row[Any] | None:
    """Acknowledge a firing alert; returns its row afterwards, None if there is no such alert."""
    is_due = and_(alerts.c.id == alert, alerts.c.status == "firing", alerts.c.acknowledged_at.is_(None))
    if tx.execute(update(alerts).where(is_due).values(acknowledged_by=by, acknowledged_at=tx.now)).rowcount:
        notification_rows.update_cards(tx, alert=alert)
    return tx.execute(select(alerts).where(alerts.c.id == alert)).first()


def acknowledge_message(tx: Transaction, notification: int, by: str) -> int:
    """Acknowledge everything in the message of a notification that has not ended; returns how many there were."""
    message = select(notifications.c.message_id).where(notifications.c.id == notification).scalar_subquery()
    in_message = or_(
        notifications.c.id == notification,
        notifications.c.sent_with == notification,
        notifications.c.message_id == message,
    )
    rows = tx.execute(
        select(
            notifications.c.kind, notifications.c.incident_id, notifications.c.alert_id,
            alerts.c.incident_id.label("incident_of_alert"),
        )
        .join(alerts, notifications.c.alert_id == alerts.c.id, isouter=True)
        .where(in_message)
    ).all()  # fmt: skip
    # An alert may have moved to another incident since the message was sent.
    incident_ids = {row.incident_of_alert if row.kind == "alert" else row.incident_id for row in rows} - {None}
    alert_ids = {row.alert_id for row in rows if row.kind == "alert" and row.incident_of_alert is None}
    acknowledged = [acknowledge_incident(tx, number, by) for number in sorted(incident_ids)]
    count = sum(1 for row in acknowledged if row is not None and row.state == "open")
    without_incident = [acknowledge_alert(tx, number, by) for number in sorted(alert_ids)]
    return count + sum(1 for row in without_incident if row is not None and row.status == "firing")

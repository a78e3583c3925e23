"""Delete old rows: what ended before the retention time, with everything that belongs to it."""

from sqlalchemy import and_, delete, or_, select

from remediator.record.schema import (
    actions,
    alerts,
    button_presses,
    deliveries,
    evidence,
    incidents,
    maintenance,
    notifications,
    timeline,
)
from remediator.record.transaction import Transaction

BATCH = 500  # incidents deleted by one transaction


def delete_before(tx: Transaction, before: float) -> int:
    """Delete one batch of what ended before a time; returns the number of deleted rows, 0 when nothing is left."""
    old_incidents = tx.scalars(
        select(incidents.c.id).where(incidents.c.closed_at < before).order_by(incidents.c.id).limit(BATCH)
    ).all()
    belongs = or_(
        actions.c.incident_id.in_(old_incidents), actions.c.incident_id.is_(None) & (actions.c.ended_at < before)
    )
    old_actions = tx.scalars(select(actions.c.id).where(belongs).limit(BATCH * 10)).all()
    # Notifications of open incidents and firing alerts are needed to notify the same channels of the end.
    open_incidents = select(incidents.c.id).where(incidents.c.state == "open")
    firing = select(alerts.c.id).where(alerts.c.status == "firing")
    is_over = and_(
        or_(notifications.c.incident_id.is_(None), notifications.c.incident_id.not_in(open_incidents)),
        or_(notifications.c.alert_id.is_(None), notifications.c.alert_id.not_in(firing)),
    )
    is_old = or_(notifications.c.incident_id.in_(old_incidents), notifications.c.ended_at < before)
    old_notifications = tx.scalars(
        select(notifications.c.id).where(is_old, notifications.c.state != "pending", is_over).limit(BATCH * 10)
    ).all()
    counts = [
        tx.execute(delete(evidence).where(evidence.c.action_id.in_(old_actions))).rowcount,
        tx.execute(delete(actions).where(actions.c.id.in_(old_actions))).rowcount,
        tx.execute(delete(timeline).where(timeline.c.incident_id.in_(old_incidents))).rowcount,
        tx.execute(delete(deliveries).where(deliveries.c.notification_id.in_(old_notifications))).rowcount,
        tx.execute(delete(notifications).where(notifications.c.id.in_(old_notifications))).rowcount,
        tx.execute(
            delete(alerts).where(
                # SQLite may reuse the id: delete an alert after everything that refers to it.
                alerts.c.id.not_in(select(notifications.c.alert_id).where(notifications.c.alert_id.is_not(None))),
                alerts.c.status == "resolved",
                or_(
                    alerts.c.incident_id.in_(old_incidents),
                    alerts.c.incident_id.is_(None) & (alerts.c.last_seen < before),
                ),
            )
        ).rowcount,
        tx.execute(delete(maintenance).where(maintenance.c.until < before)).rowcount,
        tx.execute(delete(button_presses).where(button_presses.c.at < before)).rowcount,
    ]
    # An incident stays while something refers to it, such as a notification that could not be sent yet.
    references = [
        select(table.c.incident_id).where(table.c.incident_id.in_(old_incidents))
        for table in (actions, alerts, notifications)
    ]
    referenced = {incident for query in references for incident in tx.scalars(query)}
    unreferenced = set(old_incidents) - referenced
    counts.append(tx.execute(delete(incidents).where(incidents.c.id.in_(unreferenced))).rowcount)
    return sum(counts)

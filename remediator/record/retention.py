"""Delete old rows: what ended before the retention time, with everything that belongs to it."""

from collections.abc import Sequence

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
MAX_ALERTS = 10_000  # that are over, of no incident: whoever has the webhook token can send any number of them


def delete_before(tx: Transaction, before: float) -> int:
    """Delete one batch of what ended before a time; returns the number of deleted rows, 0 when nothing is left."""
    old_incidents = tx.scalars(
        select(incidents.c.id).where(incidents.c.closed_at < before).order_by(incidents.c.id).limit(BATCH)
    ).all()
    belongs = or_(
        actions.c.incident_id.in_(old_incidents), actions.c.incident_id.is_(None) & (actions.c.ended_at < before)
    )
    old_actions = tx.scalars(select(actions.c.id).where(belongs).limit(BATCH * 10)).all()
    old_alerts = _find_old_alerts(tx, before)
    # Notifications of open incidents and firing alerts are needed to notify the same channels of the end.
    open_incidents = select(incidents.c.id).where(incidents.c.state == "open")
    firing = select(alerts.c.id).where(alerts.c.status == "firing")
    is_over = and_(
        or_(notifications.c.incident_id.is_(None), notifications.c.incident_id.not_in(open_incidents)),
        or_(notifications.c.alert_id.is_(None), notifications.c.alert_id.not_in(firing)),
    )
    is_old = or_(
        notifications.c.incident_id.in_(old_incidents),
        notifications.c.alert_id.in_(old_alerts),
        notifications.c.ended_at < before,
    )
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
                or_(alerts.c.incident_id.in_(old_incidents), alerts.c.id.in_(old_alerts)),
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


def _find_old_alerts(tx: Transaction, before: float) -> Sequence[int]:
    """Return a batch of alerts of no incident that are over: since a time, or that are more than the limit."""
    over = select(alerts).where(alerts.c.status == "resolved", alerts.c.incident_id.is_(None)).subquery()
    oldest_kept = tx.scalar(select(over.c.last_seen).order_by(over.c.last_seen.desc()).offset(MAX_ALERTS - 1).limit(1))
    until = max(before, oldest_kept) if oldest_kept is not None else before
    pending = select(notifications.c.alert_id).where(
        notifications.c.state == "pending", notifications.c.alert_id.is_not(None)
    )
    deletable = select(over.c.id).where(over.c.last_seen < until, over.c.id.not_in(pending))
    return tx.scalars(deletable.order_by(over.c.id).limit(BATCH * 10)).all()

"""Read incidents, actions, alerts and notifications as dictionaries, for the API and the console."""

from collections.abc import Collection
from typing import Any, Literal

from sqlalchemy import ColumnElement, Row, Select, Table, select

from remediator.record.schema import actions, alerts, deliveries, evidence, incidents, notifications, timeline
from remediator.record.transaction import Transaction

_NOTIFICATION_COLUMNS = (
    "id", "channel", "kind", "severity", "incident_id", "created_at", "state", "tries", "ended_at", "response",
    "sent_with",
)  # fmt: skip

TIMELINE_LIMIT, ROWS_LIMIT = 1000, 200  # the newest events of an incident; alerts, actions and notifications, each

Subject = Literal["incident", "alert"]


def page_of_incidents(
    tx: Transaction, before: int | None, limit: int, *, is_open: bool | None = None, service: str = ""
) -> list[dict[str, Any]]:
    """Return the newest incidents with an id below `before`; only open or closed ones, or of a service, if given."""
    wanted = []
    if is_open is not None:
        wanted.append(incidents.c.state == "open" if is_open else incidents.c.state != "open")
    if service:
        wanted.append(incidents.c.service == service)
    return _page(tx, incidents, before, limit, *wanted)


def page_of_actions(tx: Transaction, before: int | None, limit: int) -> list[dict[str, Any]]:
    """Return the newest actions with an id below `before`."""
    return _page(tx, actions, before, limit)


def page_of_alerts(tx: Transaction, before: int | None, limit: int) -> list[dict[str, Any]]:
    """Return the newest alerts with an id below `before`, and what they lead to."""
    notify_only = "notification only: it has no service of the inventory"
    return [
        {**row, "decided": f"incident {row['incident_id']}" if row["incident_id"] else notify_only}
        for row in _page(tx, alerts, before, limit)
    ]


def page_of_notifications(tx: Transaction, before: int | None, limit: int) -> list[dict[str, Any]]:
    """Return the newest notifications with an id below `before`, with their deliveries."""
    query = select(notifications).order_by(notifications.c.id.desc()).limit(limit)
    return _with_deliveries(tx, query if before is None else query.where(notifications.c.id < before))


def find_incidents(
    tx: Transaction, state: Literal["open", "closed"], services: Collection[str] | None, before: int | None, limit: int
) -> list[dict[str, Any]]:
    """Return the newest incidents in a state, of these services or of all, with an id below `before`."""
    is_open = incidents.c.state == "open"
    query = select(incidents).where(is_open if state == "open" else ~is_open).order_by(incidents.c.id.desc())
    if services is not None:
        query = query.where(incidents.c.service.in_(services))
    if before is not None:
        query = query.where(incidents.c.id < before)
    return [dict(row) for row in tx.execute(query.limit(limit)).mappings()]


def incidents_of_service(tx: Transaction, service: str, limit: int) -> list[dict[str, Any]]:
    """Return the newest incidents of a service."""
    query = select(incidents).where(incidents.c.service == service).order_by(incidents.c.opened_at.desc()).limit(limit)
    return [dict(row) for row in tx.execute(query).mappings()]


def last_action_of(tx: Transaction, service: str) -> dict[str, Any] | None:
    """Return the newest action on a service that was run."""
    was_run = (actions.c.service == service) & actions.c.state.not_in(("queued", "cancelled"))
    query = select(actions).where(was_run, actions.c.kind != "reset").order_by(actions.c.claimed_at.desc()).limit(1)
    row = tx.execute(query).mappings().first()
    return dict(row) if row is not None else None


def last_deliveries(tx: Transaction, channels: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the last attempt to send something, by channel: when, its outcome, and the channel's response."""
    found = {}
    for channel in channels:
        query = (
            select(deliveries.c.at, deliveries.c.outcome, deliveries.c.response)
            .join(notifications, notifications.c.id == deliveries.c.notification_id)
            .where(notifications.c.channel == channel)
            .order_by(deliveries.c.id.desc())
            .limit(1)
        )
        if (row := tx.execute(query).mappings().first()) is not None:
            found[channel] = dict(row)
    return found


def last_outcomes(tx: Transaction, channels: Collection[str]) -> dict[str, str]:
    """Return the outcome of the last completed attempt to send something, by channel; none where there was none."""
    found = {}
    for channel in channels:
        query = (
            select(deliveries.c.outcome)
            .join(notifications, notifications.c.id == deliveries.c.notification_id)
            .where(notifications.c.channel == channel, deliveries.c.outcome.is_not(None))
            .order_by(deliveries.c.id.desc())
            .limit(1)
        )
        if (outcome := tx.scalar(query)) is not None:
            found[channel] = str(outcome)
    return found


def read_incident(tx: Transaction, incident: int) -> dict[str, Any] | None:
    """Return an incident with its newest alerts, actions, events and notifications; None if there is none."""
    row = tx.execute(select(incidents).where(incidents.c.id == incident)).mappings().first()
    if row is None:
        return None

    def rows_of(table: Table, *first: ColumnElement[Any]) -> list[dict[str, Any]]:
        newest = select(table).where(table.c.incident_id == incident).order_by(*first, table.c.id.desc())
        rows = tx.execute(newest.limit(ROWS_LIMIT)).mappings()
        return sorted((dict(each) for each in rows), key=lambda row: int(row["id"]))

    of_timeline = select(timeline).where(timeline.c.incident_id == incident).order_by(timeline.c.id.desc())
    newest = tx.execute(of_timeline.limit(TIMELINE_LIMIT))
    action_rows = rows_of(actions)
    for action in action_rows:
        texts = tx.execute(select(evidence).where(evidence.c.action_id == action["id"]).order_by(evidence.c.id))
        action["evidence"] = [{"name": text.name, "at": text.at, "text": text.text} for text in texts]
    of_incident = select(notifications).where(notifications.c.incident_id == incident)
    newest_notifications = of_incident.order_by(notifications.c.id.desc()).limit(ROWS_LIMIT)
    return {
        **row,
        "alerts": rows_of(alerts, alerts.c.status != "firing"),
        "actions": action_rows,
        "timeline": [dict(each) for each in newest.mappings()][::-1],
        "notifications": _with_deliveries(tx, newest_notifications)[::-1],
    }


def find_row(tx: Transaction, subject: Subject, number: int) -> Row[Any] | None:
    """Return the row of an incident or of an alert."""
    table = incidents if subject == "incident" else alerts
    return tx.execute(select(table).where(table.c.id == number)).first()


def find_open_service(tx: Transaction, incident: int) -> str | None:
    """Return the service of an incident; None if it is not open."""
    is_open = (incidents.c.id == incident) & (incidents.c.state == "open")
    service: str | None = tx.scalar(select(incidents.c.service).where(is_open))
    return service


def _page(
    tx: Transaction, table: Table, before: int | None, limit: int, *wanted: ColumnElement[bool]
) -> list[dict[str, Any]]:
    query = select(table).where(*wanted).order_by(table.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(table.c.id < before)
    return [dict(row) for row in tx.execute(query).mappings()]


def _with_deliveries(tx: Transaction, query: Select[Any]) -> list[dict[str, Any]]:
    rows = [{name: row[name] for name in _NOTIFICATION_COLUMNS} for row in tx.execute(query).mappings()]
    attempts = tx.execute(
        select(deliveries.c.notification_id, deliveries.c.at, deliveries.c.outcome, deliveries.c.response)
        .where(deliveries.c.notification_id.in_([row["id"] for row in rows]))
        .order_by(deliveries.c.id)
    ).all()
    of_notification: dict[int, list[dict[str, Any]]] = {}
    for each in attempts:
        shown = {"at": each.at, "outcome": each.outcome, "response": each.response}
        of_notification.setdefault(each.notification_id, []).append(shown)
    for row in rows:
        row["deliveries"] = of_notification.get(row["id"], [])
    return rows

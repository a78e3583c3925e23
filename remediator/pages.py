"""Reading the record, for the API and the command line."""

from typing import Any

from sqlalchemy import Connection, select

from remediator.schema import actions, alerts, incidents, timeline


def page_of_incidents(connection: Connection, before: int | None, limit: int) -> list[dict[str, Any]]:
    query = select(incidents).order_by(incidents.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(incidents.c.id < before)
    return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001 - SQLAlchemy's public name


def whole_incident(connection: Connection, incident: int) -> dict[str, Any] | None:
    """An incident with its alerts, actions and timeline."""
    row = connection.execute(select(incidents).where(incidents.c.id == incident)).first()
    if row is None:
        return None

    def of(table: Any, order: Any) -> list[dict[str, Any]]:
        rows = connection.execute(select(table).where(table.c.incident_id == incident).order_by(order))
        return [dict(each._mapping) for each in rows]  # noqa: SLF001

    return {
        **row._mapping,  # noqa: SLF001
        "alerts": of(alerts, alerts.c.id),
        "actions": of(actions, actions.c.id),
        "timeline": of(timeline, timeline.c.id),
    }


def page_of_actions(connection: Connection, before: int | None, limit: int) -> list[dict[str, Any]]:
    query = select(actions).order_by(actions.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(actions.c.id < before)
    return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001

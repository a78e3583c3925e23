"""Reading the record, for the API and the command line."""

from typing import Any

from sqlalchemy import Connection, Select, Text, select

from remediator.record.clock import SteadyClock
from remediator.record.schema import actions, alerts, evidence, incidents, notices, sends, timeline
from runtime.times import format_rfc3339

_OF_NOTICES = (
    "id", "channel", "kind", "severity", "incident_id", "created_at", "state", "tries", "ended_at", "answer", "told_in",
)  # fmt: skip
# Free text is of the type Text in the tables; some of it is in the details of the timeline too, by the same names.
_WITHHELD = frozenset(
    column.name
    for table in (incidents, actions, evidence, notices, sends)
    for column in table.columns
    if isinstance(column.type, Text)
) | {"evidence", "said", "message"}
_FACTS = frozenset({"before", "after"})  # of a target: their state may quote an answer or a command's output
_TIMES = ("at", "until", "queued_since", "healing_since", "first_seen", "last_seen")


def page_of_incidents(connection: Connection, before: int | None, limit: int) -> list[dict[str, Any]]:
    query = select(incidents).order_by(incidents.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(incidents.c.id < before)
    return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001 - SQLAlchemy's public name


def open_incidents(connection: Connection) -> list[dict[str, Any]]:
    """Those that are open, the oldest first."""
    rows = connection.execute(select(incidents).where(incidents.c.state == "open").order_by(incidents.c.opened_at))
    return [dict(row._mapping) for row in rows]  # noqa: SLF001


def page_of_alerts(connection: Connection, before: int | None, limit: int) -> list[dict[str, Any]]:
    """Alerts, and what is decided about those that open no incident."""
    query = select(alerts).order_by(alerts.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(alerts.c.id < before)
    told = "told, and never acted on: it names no service of the inventory"
    rows = (dict(row._mapping) for row in connection.execute(query))  # noqa: SLF001
    return [{**row, "decided": f"incident {row['incident_id']}" if row["incident_id"] else told} for row in rows]


def whole_incident(connection: Connection, incident: int) -> dict[str, Any] | None:
    """An incident with its alerts, its actions with their evidence, and its timeline."""
    row = connection.execute(select(incidents).where(incidents.c.id == incident)).first()
    if row is None:
        return None

    def of(table: Any, order: Any) -> list[dict[str, Any]]:
        rows = connection.execute(select(table).where(table.c.incident_id == incident).order_by(order))
        return [dict(each._mapping) for each in rows]  # noqa: SLF001

    acted = of(actions, actions.c.id)
    for each in acted:
        kept = connection.execute(select(evidence).where(evidence.c.action_id == each["id"]).order_by(evidence.c.id))
        each["evidence"] = [{"name": one.name, "at": one.at, "text": one.text} for one in kept]
    return {
        **row._mapping,  # noqa: SLF001
        "alerts": of(alerts, alerts.c.id),
        "actions": acted,
        "timeline": of(timeline, timeline.c.id),
        "notices": _notices(
            connection, select(notices).where(notices.c.incident_id == incident).order_by(notices.c.id)
        ),
    }


def page_of_notices(connection: Connection, before: int | None, limit: int) -> list[dict[str, Any]]:
    query = select(notices).order_by(notices.c.id.desc()).limit(limit)
    return _notices(connection, query if before is None else query.where(notices.c.id < before))


def _notices(connection: Connection, query: Select[Any]) -> list[dict[str, Any]]:
    """Notices with every attempt to send them."""
    found = [{name: row._mapping[name] for name in _OF_NOTICES} for row in connection.execute(query)]  # noqa: SLF001
    tried = connection.execute(
        select(sends.c.notice_id, sends.c.at, sends.c.outcome, sends.c.answer)
        .where(sends.c.notice_id.in_([each["id"] for each in found]))
        .order_by(sends.c.id)
    ).all()
    for each in found:
        each["sends"] = [
            {"at": row.at, "outcome": row.outcome, "answer": row.answer} for row in tried if row.notice_id == each["id"]
        ]
    return found


def page_of_actions(connection: Connection, before: int | None, limit: int) -> list[dict[str, Any]]:
    query = select(actions).order_by(actions.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(actions.c.id < before)
    return [dict(row._mapping) for row in connection.execute(query)]  # noqa: SLF001


def open_part(value: Any) -> Any:
    """Rows without the texts that hosts, services and servers gave, which only callers with a credential may see."""
    if isinstance(value, dict):
        return {
            key: None if key in _FACTS else _without(item) if key in _WITHHELD else open_part(item)
            for key, item in value.items()
        }
    return [open_part(item) for item in value] if isinstance(value, list) else value


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return open_part(value)
    return [] if isinstance(value, list) else None


def shown(value: Any, clock: SteadyClock) -> Any:
    """Rows with their times in RFC 3339, by the calendar."""
    if isinstance(value, dict):
        return {
            key: format_rfc3339(clock.unix(item)) if _is_time(key, item) else shown(item, clock)
            for key, item in value.items()
        }
    return [shown(item, clock) for item in value] if isinstance(value, list) else value


def _is_time(key: str, value: Any) -> bool:
    return isinstance(value, float) and (key in _TIMES or key.endswith("_at"))

"""Plain names of tables, timestamps and events of the timeline."""

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

TABLES = {
    "notices": "notifications",
    "sends": "deliveries",
    "presses": "button_presses",
    "marks": "timestamps",
}
TIMESTAMPS = {"watchdog-over": "watchdog-resolved", "automation-told": "automation-notified"}
EVENTS = {
    "opened": "incident_opened",
    "firing": "alert_firing",
    "resolved": "alert_resolved",
    "end-held": "alert_end_held",
    "person-needed": "person_needed",
    "cancelled": "action_cancelled",
    "queued": "action_queued",
    "approved": "action_approved",
    "action": "action_started",
    "command": "command_ended",
    "up": "service_up",
    "action-ended": "action_ended",
    "succeeded": "attempts_reset",
}


def upgrade() -> None:
    connection = op.get_bind()
    for old, new in TABLES.items():
        op.rename_table(old, new)
    rename = sa.text("UPDATE timestamps SET name = :new WHERE name = :old")
    for old, new in TIMESTAMPS.items():
        connection.execute(rename, {"old": old, "new": new})
    rename = sa.text("UPDATE timeline SET event = :new WHERE event = :old")
    for old, new in EVENTS.items():
        connection.execute(rename, {"old": old, "new": new})
    _rewrite("act", "decision", lambda detail: {"verb": "act", **detail})
    _rewrite("wait", "decision", lambda detail: {"verb": "wait", **detail})
    _rewrite("refuse", "decision", lambda detail: {"verb": "refuse", **detail})
    _rewrite("recovered", "incident_closed", lambda detail: {"state": "recovered", **detail})
    _rewrite("unobserved", "incident_closed", lambda detail: {"state": "unobserved", **detail})
    _rewrite("caution", "caution", _rename_said)


def _rename_said(detail: dict[str, Any]) -> dict[str, Any]:
    return {"message" if name == "said" else name: value for name, value in detail.items()}


def _rewrite(old: str, new: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rename an event and change its details, which are JSON."""
    connection = op.get_bind()
    rows = connection.execute(sa.text("SELECT id, detail FROM timeline WHERE event = :old"), {"old": old}).all()
    update = sa.text("UPDATE timeline SET event = :new, detail = :detail WHERE id = :id")
    for row in rows:
        detail = json.dumps(change(json.loads(row.detail)))
        connection.execute(update, {"new": new, "detail": detail, "id": row.id})

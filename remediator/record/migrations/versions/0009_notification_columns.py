"""Columns and indexes of notifications, deliveries and button presses get names that explain themselves.

What a channel stores for the next attempt becomes one JSON column.
"""

from alembic import op

revision = "0009"
down_revision = "0008"

COLUMNS = {
    "notifications": {
        "about": "key",
        "topic": "group_key",
        "answer": "response",
        "told_in": "sent_with",
        "renewed": "replacements",
    },
    "deliveries": {"notice_id": "notification_id", "answer": "response"},
    "button_presses": {"answer": "button", "about": "ids"},
}
OUTCOMES = {"again": "retry", "sign again": "resend", "degrade": "resend", "dead": "reject"}
INDEXES = {
    "notices_to_send": ("notifications_to_send", "notifications", ["state", "channel", "id"]),
    "notices_about": ("notifications_by_key", "notifications", ["key"]),
    "notices_of_incident": ("notifications_of_incident", "notifications", ["incident_id"]),
    "notices_of_alert": ("notifications_of_alert", "notifications", ["alert_id"]),
    "notices_of_message": ("notifications_of_message", "notifications", ["message_id"]),
    "sends_of_bot": ("deliveries_of_bot", "deliveries", ["bot", "at"]),
    "sends_of_notice": ("deliveries_of_notification", "deliveries", ["notification_id"]),
}


def upgrade() -> None:
    for index in INDEXES:
        op.drop_index(index)
    for table, columns in COLUMNS.items():
        for old, new in columns.items():
            op.execute(f'ALTER TABLE {table} RENAME COLUMN {old} TO "{new}"')
    for index, table, indexed in INDEXES.values():
        op.create_index(index, table, indexed)
    op.execute("ALTER TABLE notifications ADD COLUMN retry_state JSON")
    # Only Feishu channels exist, which stored these two.
    op.execute(
        "UPDATE notifications SET retry_state = json_object('degraded', degraded, 'signed_again', signed_again)"
        " WHERE degraded > 0 OR signed_again > 0"
    )
    op.execute("ALTER TABLE notifications DROP COLUMN degraded")
    op.execute("ALTER TABLE notifications DROP COLUMN signed_again")
    for old, new in OUTCOMES.items():
        op.execute(f"UPDATE deliveries SET outcome = '{new}' WHERE outcome = '{old}'")  # noqa: S608 - constants

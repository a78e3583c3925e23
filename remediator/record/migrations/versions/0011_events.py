"""Events of the exporter, and indexes for the timeline of all events and for the cards of an incident."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("last_at", sa.Float),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("host", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("times", sa.Integer, nullable=False),
    )
    op.create_index("events_by_time", "events", ["at"])
    op.create_index("events_of_kind", "events", ["kind", "at"])
    op.create_index("events_of_host", "events", ["host", "kind", "at"])
    op.create_index("events_of_name", "events", ["kind", "name", "at"])
    op.drop_index("notifications_of_incident", "notifications")
    op.create_index("notifications_of_incident", "notifications", ["incident_id", "kind", "card"])
    op.create_index("incidents_by_start", "incidents", ["opened_at"])
    op.create_index("actions_by_end", "actions", ["ended_at"])
    op.create_index("audit_of_target", "audit", ["target", "at"])

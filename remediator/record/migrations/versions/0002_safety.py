"""A clock that does not jump, switches, maintenance, approvals and evidence."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "clock",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("boot", sa.String(), nullable=False),
        sa.Column("running", sa.Float(), nullable=False),
        sa.Column("calendar", sa.Float(), nullable=False),
        sa.Column("steady", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "marks",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "maintenance",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("scope", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("asked_by", sa.String(), nullable=False),
        sa.Column("begun_at", sa.Float(), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "evidence",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("action_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["action_id"], ["actions.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("evidence_of_action", "evidence", ["action_id"])
    of_incidents: list[sa.Column[Any]] = [
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("queued_since", sa.Float(), nullable=True),
        sa.Column("healing_since", sa.Float(), nullable=True),
    ]
    for column in of_incidents:
        op.add_column("incidents", column)
    op.create_index("incidents_by_end", "incidents", ["closed_at"])
    of_actions: list[sa.Column[Any]] = [
        sa.Column("asked_by", sa.String(), nullable=False, server_default=""),
        sa.Column("overruled", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("step", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("approved_by", sa.String(), nullable=True),
        sa.Column("approved_at", sa.Float(), nullable=True),
        sa.Column("blocked", sa.String(), nullable=True),
        sa.Column("before", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("after", sa.JSON(none_as_null=True), nullable=True),
    ]
    for column in of_actions:
        op.add_column("actions", column)
    op.create_index(
        "one_queued_action", "actions", ["incident_id"], unique=True, sqlite_where=sa.text("state = 'queued'")
    )
    op.create_index("notices_of_incident", "notices", ["incident_id"])
    op.create_index("sends_of_notice", "sends", ["notice_id"])

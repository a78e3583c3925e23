"""Acknowledgements, pressed buttons, and cards that are updated in place."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for table in ("incidents", "alerts"):
        op.add_column(table, sa.Column("acknowledged_by", sa.String(), nullable=True))
        op.add_column(table, sa.Column("acknowledged_at", sa.Float(), nullable=True))
    of_notices: list[sa.Column[Any]] = [
        sa.Column("topic", sa.String(), nullable=False, server_default=""),
        sa.Column("alert_id", sa.Integer(), nullable=True),
        sa.Column("pending_since", sa.Float(), nullable=False, server_default="0"),
        sa.Column("told_in", sa.Integer(), nullable=True),
        sa.Column("degraded", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("signed_again", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("card", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("version", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("message_id", sa.String(), nullable=True),
        sa.Column("message_at", sa.Float(), nullable=True),
        sa.Column("renewed", sa.Integer(), nullable=False, server_default="0"),
    ]
    for column in of_notices:
        op.add_column("notices", column)
    op.execute("UPDATE notices SET pending_since = created_at")
    op.create_index("notices_about", "notices", ["about"])
    op.create_index("notices_of_alert", "notices", ["alert_id"])
    op.create_index("notices_of_message", "notices", ["message_id"])
    op.create_table(
        "presses",
        sa.Column("event_id", sa.String(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("channel", sa.String(), nullable=False),
        sa.Column("open_id", sa.String(), nullable=False),
        sa.Column("who", sa.String(), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("about", sa.JSON(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("event_id"),
    )

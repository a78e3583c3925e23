"""Locks on targets, and services that an operator stopped."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "stops",
        sa.Column("service", sa.String(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("asked_by", sa.String(), nullable=False),
        sa.Column("action_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("service"),
    )
    op.add_column("incidents", sa.Column("starting_since", sa.Float(), nullable=True))
    op.add_column("incidents", sa.Column("quiet", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("actions", sa.Column("target", sa.Text(), nullable=False, server_default=""))
    # The targets of earlier actions are unknown.
    op.execute("UPDATE actions SET target = 'service:' || service")
    op.create_index("actions_of_target", "actions", ["host", "target", "claimed_at"])
    op.create_index(
        "one_action_on_a_target", "actions", ["host", "target"], unique=True, sqlite_where=sa.text("state = 'running'")
    )

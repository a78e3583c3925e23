"""Incidents: the outage's start, the last failed probe, since when a person is needed; maintenance: `notify`."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    of_incidents: list[sa.Column[Any]] = [
        sa.Column("down_at", sa.Float(), nullable=True),
        sa.Column("probe", sa.Text(), nullable=True),
        sa.Column("person_needed_at", sa.Float(), nullable=True),
    ]
    for column in of_incidents:
        op.add_column("incidents", column)
    op.execute("UPDATE incidents SET down_at = opened_at WHERE labels IS NOT NULL")
    # Refusals are decided again, so that they are notified under their new name.
    op.execute("UPDATE incidents SET verb = NULL, reason = NULL WHERE state = 'open' AND verb = 'refuse'")
    op.execute("UPDATE notices SET kind = 'person_needed' WHERE kind = 'gave_up'")
    op.add_column("maintenance", sa.Column("notify", sa.Integer(), nullable=False, server_default="0"))

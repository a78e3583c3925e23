"""A person is needed, since when a service is down, how its probe failed, and maintenance that is not quiet."""

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
    # What was refused is decided anew, and so told as what it is called from now on.
    op.execute("UPDATE incidents SET verb = NULL, reason = NULL WHERE state = 'open' AND verb = 'refuse'")
    op.execute("UPDATE notices SET kind = 'person_needed' WHERE kind = 'gave_up'")
    op.add_column("maintenance", sa.Column("notify", sa.Integer(), nullable=False, server_default="0"))

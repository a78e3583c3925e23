"""Incidents: an observed stop of the target, which its manager may forget."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    for name in ("stopped_run", "stopped_why"):
        op.add_column("incidents", sa.Column(name, sa.Text(), nullable=True))

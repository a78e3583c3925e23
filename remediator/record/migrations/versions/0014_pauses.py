"""Maintenance: whether its services are not probed on schedule."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.add_column("maintenance", sa.Column("pause_probing", sa.Integer(), nullable=False, server_default="0"))

"""Notifications: whether they are of an alert of no service or host in the inventory."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.add_column("notifications", sa.Column("foreign_alert", sa.Integer(), nullable=False, server_default="0"))

"""Actions: which component of its service an action restarts."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("actions", sa.Column("component", sa.String(), nullable=False, server_default=""))

"""Why a service was stopped."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("stops", sa.Column("reason", sa.String, nullable=False, server_default=""))

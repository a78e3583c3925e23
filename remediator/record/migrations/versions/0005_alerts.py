"""Alerts: several starts per fingerprint, held ends, and copies in doubt."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("alerts", sa.Column("starts", sa.JSON(), nullable=True))
    op.add_column("alerts", sa.Column("held_at", sa.Float(), nullable=True))
    op.add_column("alerts", sa.Column("doubted_at", sa.Float(), nullable=True))
    op.create_index("alerts_in_doubt", "alerts", ["doubted_at"], sqlite_where=sa.text("doubted_at IS NOT NULL"))

"""Batches may go by the Batch API: which way, until when, and how far their waves have come."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from governor.journal.schema import background, wave_requests, waves

revision = "v0005"
down_revision = "v0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in (waves, wave_requests, background):
        table.create(op.get_bind(), checkfirst=True)
    if op.get_bind().dialect.name == "postgresql":
        # Where an earlier version has made the table already; SQLite's keys are 64 bits wide anyway.
        op.alter_column("waves", "wave", type_=sa.BigInteger())
    op.add_column("service_batches", sa.Column("via", sa.String(255), nullable=False, server_default="live"))
    op.add_column("service_batches", sa.Column("finish_by", sa.Double(), nullable=False, server_default="-1"))
    op.add_column("service_batches", sa.Column("waves", sa.Text(), nullable=False, server_default="[]"))


def downgrade() -> None:
    for column in ("waves", "finish_by", "via"):
        op.drop_column("service_batches", column)

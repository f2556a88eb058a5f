"""Commits are numbered, so that one whose acknowledgement was lost is not repeated; batches can be named."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0002"
down_revision = "v0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("service_replicas", sa.Column("commits", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("service_batches", sa.Column("name", sa.String(255), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("service_batches", "name")
    op.drop_column("service_replicas", "commits")

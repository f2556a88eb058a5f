"""Record the service tier that served an attempt, and the tokens that it wrote to a cache."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from governor.journal.schema import run

revision = "v0004"
down_revision = "v0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("service_tier", sa.String(255), nullable=False, server_default=""))
    op.add_column("attempts", sa.Column("cache_write_tokens", sa.BigInteger, nullable=False, server_default="0"))
    op.execute(run.update().values(schema=5))


def downgrade() -> None:
    op.execute(run.update().values(schema=3))
    for name in ("cache_write_tokens", "service_tier"):
        op.drop_column("attempts", name)

"""The first schema. A new database is made of the tables themselves (`base`) and marked with the newest revision."""

from __future__ import annotations

revision = "v0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass

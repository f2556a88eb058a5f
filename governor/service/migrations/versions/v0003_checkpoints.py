"""Record each pool's use, and how late timers rang, in place of the replay of recorded decisions."""

from __future__ import annotations

from alembic import op

from governor.journal.schema import checkpoints, run, timers

revision = "v0003"
down_revision = "v0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in (checkpoints, timers):
        table.create(op.get_bind(), checkfirst=True)
    op.execute(run.update().values(schema=3))


def downgrade() -> None:
    op.execute(run.update().values(schema=2))
    for table in (checkpoints, timers):
        table.drop(op.get_bind())

"""The journal's tables and the service's own, as they were at first."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from governor.schema import Words

revision = "v0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "attempts",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("request", sa.BigInteger(), nullable=False),
        sa.Column("custom_id", Words(), nullable=False),
        sa.Column("pool", Words(), nullable=False),
        sa.Column("model", Words(), nullable=False),
        sa.Column("url", Words(), nullable=False),
        sa.Column("lane", Words(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("submitted_s", sa.Double(), nullable=False),
        sa.Column("eligible_s", sa.Double(), nullable=False),
        sa.Column("launched_s", sa.Double(), nullable=False),
        sa.Column("finished_s", sa.Double(), nullable=False),
        sa.Column("reserved_tokens", sa.BigInteger(), nullable=False),
        sa.Column("charged_tokens", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.String(length=255), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("error_code", Words(), nullable=False),
        sa.Column("retry_after_s", sa.Double(), nullable=False),
        sa.Column("waited_concurrency_s", sa.Double(), nullable=False),
        sa.Column("waited_stagger_s", sa.Double(), nullable=False),
        sa.Column("waited_tpm_s", sa.Double(), nullable=False),
        sa.Column("waited_rpm_s", sa.Double(), nullable=False),
        sa.Column("waited_day_s", sa.Double(), nullable=False),
        sa.Column("waited_hold_s", sa.Double(), nullable=False),
        sa.Column("waited_paused_s", sa.Double(), nullable=False),
        sa.Column("waited_backoff_s", sa.Double(), nullable=False),
        sa.Column("request_id", Words(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), nullable=False),
        sa.Column("processing_s", sa.Double(), nullable=False),
        sa.Column("limits", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_index("attempts_by_request", "attempts", ["request"], unique=False)
    op.create_table(
        "bodies",
        sa.Column("request", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("request"),
    )
    op.create_table(
        "commands",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("asked_epoch_s", sa.Double(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("words", sa.Text(), nullable=False),
        sa.Column("taken_s", sa.Double(), nullable=False),
        sa.Column("outcome", Words(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "decisions",
        sa.Column("leg", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("pool", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("first", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("calls", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("leg", "pool", "first"),
    )
    op.create_table(
        "deferrals",
        sa.Column("leg", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("pool", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("cause", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("leg", "pool", "cause"),
    )
    op.create_table(
        "forecasts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("leg", sa.BigInteger(), nullable=False),
        sa.Column("at_s", sa.Double(), nullable=False),
        sa.Column("launched_before", sa.BigInteger(), nullable=False),
        sa.Column("json", Words(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "legs",
        sa.Column("leg", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("began_s", sa.Double(), nullable=False),
        sa.Column("ended_s", sa.Double(), nullable=False),
        sa.Column("ending", Words(), nullable=False),
        sa.Column("version", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("leg"),
    )
    op.create_table(
        "policies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("leg", sa.BigInteger(), nullable=False),
        sa.Column("pool", sa.BigInteger(), nullable=False),
        sa.Column("at_s", sa.Double(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "pools",
        sa.Column("pool", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("pool"),
    )
    op.create_table(
        "requests",
        sa.Column("request", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("pool", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("lane", sa.String(length=255), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("resent", sa.BigInteger(), nullable=False),
        sa.Column("first_launched_s", sa.Double(), nullable=False),
        sa.Column("launched_s", sa.Double(), nullable=False),
        sa.Column("ended_s", sa.Double(), nullable=False),
        sa.Column("retry_at_s", sa.Double(), nullable=False),
        sa.Column("failure", sa.String(length=255), nullable=False),
        sa.Column("reserve", sa.Double(), nullable=False),
        sa.Column("expected", sa.Double(), nullable=False),
        sa.Column("finalize_reserve", sa.Double(), nullable=False),
        sa.Column("charge", sa.BigInteger(), nullable=False),
        sa.Column("finalize_charge", sa.BigInteger(), nullable=False),
        sa.Column("custom_id", Words(), nullable=False),
        sa.Column("url", Words(), nullable=False),
        sa.Column("model", Words(), nullable=False),
        sa.Column("endpoint", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("chars", sa.BigInteger(), nullable=False),
        sa.Column("role_chars", sa.BigInteger(), nullable=False),
        sa.Column("messages", sa.BigInteger(), nullable=False),
        sa.Column("images", sa.BigInteger(), nullable=False),
        sa.Column("tools", sa.BigInteger(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("max_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request"),
    )
    op.create_index(
        "requests_by_length",
        "requests",
        [sa.literal_column("expected DESC"), sa.literal_column("reserve DESC"), "request"],
        unique=False,
    )
    op.create_table(
        "results",
        sa.Column("request", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("outcome", sa.String(length=255), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("error_code", Words(), nullable=False),
        sa.Column("message", Words(), nullable=False),
        sa.Column("retry_after_s", sa.Double(), nullable=False),
        sa.Column("used_prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("used_output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cut_off", sa.BigInteger(), nullable=False),
        sa.Column("has_text", sa.BigInteger(), nullable=False),
        sa.Column("request_id", Words(), nullable=False),
        sa.Column("body", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("request"),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("schema", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=255), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("epoch_s", sa.Double(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("purged_epoch_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "service_batches",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("batch_id", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=255), nullable=False),
        sa.Column("wanted", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.String(length=255), nullable=False),
        sa.Column("owner", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("done", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.Column("in_flight", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("throttled", sa.BigInteger(), nullable=False),
        sa.Column("resent", sa.BigInteger(), nullable=False),
        sa.Column("eta_s", sa.Double(), nullable=False),
        sa.Column("who", sa.String(length=255), nullable=False),
        sa.Column("template_id", sa.String(length=255), nullable=False),
        sa.Column("template_version", sa.BigInteger(), nullable=False),
        sa.Column("finalize", sa.BigInteger(), nullable=False),
        sa.Column("deadline_s", sa.Double(), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("batch_id"),
    )
    op.create_index("service_batches_by_state", "service_batches", ["state", "owner"], unique=False)
    op.create_table(
        "service_keys",
        sa.Column("scope", sa.String(length=255), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("fingerprint", sa.String(length=255), nullable=False),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "key"),
    )
    op.create_table(
        "service_legs",
        sa.Column("leg", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("replica", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("leg"),
    )
    op.create_table(
        "service_replicas",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("lost", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_table(
        "service_settings",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("who", sa.String(length=255), nullable=False),
        sa.Column("pool", sa.String(length=255), nullable=False),
        sa.Column("changes", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_table(
        "service_templates",
        sa.Column("template_id", sa.String(length=255), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("deleted", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("template_id"),
    )
    op.create_table(
        "service_tokens",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("sha256", sa.String(length=255), nullable=False),
        sa.Column("scope", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("sha256"),
    )
    op.create_table(
        "service_versions",
        sa.Column("template_id", sa.String(length=255), nullable=False),
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("who", sa.String(length=255), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("template_id", "version"),
    )


def downgrade() -> None:
    op.drop_table("service_versions")
    op.drop_table("service_tokens")
    op.drop_table("service_templates")
    op.drop_table("service_settings")
    op.drop_table("service_replicas")
    op.drop_table("service_legs")
    op.drop_table("service_keys")
    op.drop_index("service_batches_by_state", table_name="service_batches")
    op.drop_table("service_batches")
    op.drop_table("run")
    op.drop_table("results")
    op.drop_index("requests_by_length", table_name="requests")
    op.drop_table("requests")
    op.drop_table("pools")
    op.drop_table("policies")
    op.drop_table("legs")
    op.drop_table("forecasts")
    op.drop_table("deferrals")
    op.drop_table("decisions")
    op.drop_table("commands")
    op.drop_table("bodies")
    op.drop_index("attempts_by_request", table_name="attempts")
    op.drop_table("attempts")

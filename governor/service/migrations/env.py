"""Run Alembic's migrations on the connection that the caller has opened. No address, no logging set up."""

from __future__ import annotations

from alembic import context

from governor.journal import schema
from governor.service.store import tables

# Alembic sets `config` while it runs this file; a plain import does nothing.
if hasattr(context, "config"):
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=[schema.metadata, tables.metadata],
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()

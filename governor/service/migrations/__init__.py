"""Alembic's migrations of the service's database: `env` runs them on the connection that `base` hands over."""

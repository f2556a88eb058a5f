"""The durable record of a run in SQLite or PostgreSQL: what was sent, what came back, what was decided."""

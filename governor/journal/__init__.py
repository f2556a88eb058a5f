"""The durable record of a run in SQLite or PostgreSQL: requests sent, answers received, decisions made."""

"""The service's database: its own tables, and the journal of its batches."""

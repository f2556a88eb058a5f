"""What the service keeps in its database, and the journal of its batches."""

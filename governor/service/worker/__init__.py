"""One replica at work: its lease, its batches, one lane per pool."""

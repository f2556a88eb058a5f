"""What a run tells while it goes on: Prometheus metrics, the event log, progress."""

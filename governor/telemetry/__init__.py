"""What a run or a governed client tells while it goes on: Prometheus metrics, OpenTelemetry, event log, progress."""

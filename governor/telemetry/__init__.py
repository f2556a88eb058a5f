"""Live reports of runs and governed clients: Prometheus metrics, OpenTelemetry, event log, progress."""

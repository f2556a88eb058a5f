"""What a run is expected to do and what it did: preflight, forecast, start guard, summary."""

"""Expected and actual results of a run: preflight, forecast, start guard, summary."""

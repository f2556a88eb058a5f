"""Validation of the twin: backtest, replay, and the forecast before a run."""

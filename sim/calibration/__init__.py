"""Calibration: input models from logs and journals."""

"""The planning commands and the Python API."""

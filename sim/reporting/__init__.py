"""Presentation of results: terminal, HTML, JSON, notebooks and figures."""

"""Helpers that every package uses: text, colours, files, progress."""

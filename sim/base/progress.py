"""A progress bar with an ETA, shown only on a terminal.

It is written to stderr, so that stdout holds only the result, and vanishes when the work is done.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

# The bar never shows more than this share of its total; the rest is for unforeseen work.
FORESEEN = 0.99
# Steps closer than this are reported together: a call per simulated request would cost more than the request.
EVERY_S = 0.1


class Progress:
    """A context manager that shows work of about `total` units in progress. `shown`: whether stderr is a terminal."""

    def __init__(self, title: str, total: float, stream: TextIO | None = None) -> None:
        self.title = title
        self.total = max(1.0, float(total))
        self.stream = stream or sys.stderr
        self.shown = self.stream.isatty()
        self._done = 0.0
        self._told_at = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=Console(file=self.stream),
                transient=True,
            )
            self._task = self._bar.add_task(self.title, total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, units: float = 1.0) -> None:
        """Record that `units` more are done."""
        self._done += units
        if self._bar is not None:
            now = time.monotonic()
            if now - self._told_at >= EVERY_S:
                self._told_at = now
                self._bar.update(self._task, completed=min(self._done, FORESEEN * self.total))

    def say(self, what: str) -> None:
        """Show what is being done now."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

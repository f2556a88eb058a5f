"""An event loop whose clock runs X times as fast as the machine's: for rehearsals against a provider sped up alike.

`paceline provider --time-scale X` refills its bucket X times as fast, but the bucket stays as large: only a client
whose own clock runs as fast can pace itself against it. All times that such a run shows and records are on that clock.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any


class _Selector(selectors.DefaultSelector):
    """Waits for the requested time divided by the scale."""

    scale = 1.0

    def select(self, timeout: float | None = None) -> Any:
        return super().select(timeout / self.scale if timeout and timeout > 0.0 else timeout)


class ScaledLoop(asyncio.SelectorEventLoop):
    """An event loop on the faster clock; see this module's docstring."""

    def __init__(self, scale: float) -> None:
        selector = _Selector()
        selector.scale = scale
        self._scale = scale
        super().__init__(selector)

    def time(self) -> float:
        """Return seconds on the faster clock."""
        return super().time() * self._scale


def loop_factory(scale: float) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the factory from which `asyncio.Runner` makes its loop; None = the usual one."""
    return None if scale == 1.0 else lambda: ScaledLoop(scale)

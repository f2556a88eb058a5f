"""An asyncio event loop on virtual time: nothing sleeps, and every timer fires at exactly its own time.

`run_virtual(main())` is `asyncio.run` with time jumping from one timer to the next as soon as no callback is ready. The
clock starts at 0 and takes exactly the timers' values, so times may be compared to the bit. If nothing is left to
happen and the main task still waits, the loop raises `Deadlock`.

Theory of operation. asyncio asks its selector to wait whenever no callback is ready. The selector here never waits, but
takes the next timer from the calendar, sets the clock to it and makes it ready. So each timer is processed completely,
with everything that it triggers at that instant, before the next one fires: as in SimPy.

An unhandled exception (in a callback, or in a task that is never awaited) is raised at the end, not logged.

Ties. Timers of one instant fire in the order of `priorities` (smallest first, 0 for functions not in it; the keys are
the called functions), and within a priority in the order in which they were set. A real loop promises no order and
needs none: no two moments of a real clock are equal.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import selectors
from collections.abc import Callable, Coroutine, Mapping
from heapq import heappop, heappush
from typing import Any, TypeVar

_T = TypeVar("_T")


class Deadlock(RuntimeError):  # noqa: N818
    """A task waits, and no timer is left that could ever wake it."""


class _NoWait(selectors.SelectSelector):
    """A selector that watches no files: when the loop would wait for one, the clock jumps."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if not self.loop.has_ready():
            self.loop.jump()
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """The event loop on virtual time: see the module. `timers_rung` counts the timers that fired."""

    def __init__(self, priorities: Mapping[Callable[..., Any], int] | None = None) -> None:
        selector = _NoWait()
        selector.loop = self
        self._now = 0.0
        self._calendar: list[tuple[float, int, int, asyncio.TimerHandle]] = []
        self._priorities = dict(priorities or {})
        self._set = 0
        self.timers_rung = 0
        self.lost: list[BaseException] = []
        super().__init__(selector)
        self.set_exception_handler(self._nobody_took)

    def time(self) -> float:
        """Return virtual seconds since the loop was created."""
        return self._now

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Schedule a callback as in asyncio. A time in the past means now."""
        assert not math.isnan(when)
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._set += 1
        priority = self._priorities.get(getattr(callback, "__func__", callback), 0)
        heappush(self._calendar, (max(when, self._now), priority, self._set, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, **rest: Any
    ) -> asyncio.TimerHandle:
        """Schedule a callback as in asyncio."""
        return self.call_at(self._now + delay, callback, *args, **rest)

    def _nobody_took(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.lost.append(context.get("exception") or RuntimeError(context["message"]))

    def has_ready(self) -> bool:
        """Return whether work is left at this instant."""
        return bool(self._ready)  # type: ignore[attr-defined]

    def timers(self) -> list[tuple[float, Callable[..., Any]]]:
        """Return the timers that are set and not cancelled, in order: (when, callback)."""
        live = sorted(entry for entry in self._calendar if not entry[3].cancelled())
        return [(when, handle._callback) for when, _, _, handle in live]  # type: ignore[attr-defined]

    def jump(self) -> None:
        """Advance the clock to the next timer and fire it."""
        while self._calendar:
            when, _, _, handle = heappop(self._calendar)
            if not handle.cancelled():
                self._now = when
                self.timers_rung += 1
                self._ready.append(handle)  # type: ignore[attr-defined]
                return
        raise Deadlock(f"at {self._now:g} s no event is left, and a task still waits")


def run_virtual(
    main: Coroutine[Any, Any, _T],
    *,
    priorities: Mapping[Callable[..., Any], int] | None = None,
    kind: type[VirtualLoop] = VirtualLoop,
) -> _T:
    """Run `main` to its end on a new loop; tasks still running are then cancelled, as by `asyncio.run`."""
    loop = kind(priorities)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(main)
    if loop.lost:
        raise loop.lost[0]
    return result

"""SimPy's calendar with callbacks at absolute times, and the order of events at one instant."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import simpy

# Order of events at one instant; CHANGE: a change of the provider's limits or of settings. Within a class the order of
# scheduling decides. See docs/explanation/law.md#ties.
ANSWER, CHANGE, RETRY_DUE, ARRIVAL, WAKE = range(5)


class Calendar(simpy.Environment):
    """SimPy's environment, whose queue `Appointment` fills with absolute times."""

    def keep(self) -> None:
        """Process all appointments in order, as `run` at half its cost: each has one callback that never fails."""
        queue = self._queue
        while queue:
            self._now, _, _, event = heappop(queue)
            event.callbacks[0](event)


class Appointment(simpy.Event):
    """A callback at an absolute time. (A SimPy timeout takes a delay, and now + (at - now) need not be `at`.)"""

    def __init__(
        self, env: Calendar, at: float, priority: int, callback: Callable[[Any], None], value: Any = None
    ) -> None:
        self.env = env
        self.callbacks = [callback]
        self._value = value
        self._ok = True
        heappush(env._queue, (at, priority, next(env._eid), self))  # type: ignore[misc]

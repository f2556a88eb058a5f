"""A scheduler in an event loop: its timer, its binding to one loop at a time, and the handling of internal errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import inf
from typing import Any

from governor.model.errors import PacelineError
from governor.model.work import Job
from governor.scheduler.attempts import Attempts
from governor.scheduler.batch import BatchShell
from governor.scheduler.scheduler import Scheduler


class InALoop:
    """The part of a governor that lives in an event loop. `zero`: the loop's time at the run's zero."""

    only_loop = ""  # why this governor may not be used in an event loop other than its first
    pool: str
    loop: asyncio.AbstractEventLoop
    zero: float
    zero_epoch: float
    late_s: float
    scheduler: Scheduler[Job]
    batch: BatchShell
    attempts: Attempts
    _timer: asyncio.TimerHandle | None
    _timer_at: float
    _done: asyncio.Future[None] | None
    _error: BaseException | None

    def now(self) -> float:
        """Return the seconds since the run began; never less than a time that was already acted upon."""
        return max(self.loop.time() - self.zero, self.scheduler.clock_at)

    def event(self) -> None:
        """Let the scheduler look at the head again because something has changed."""
        self.scheduler.changed(self.now())
        self.settle()

    def soon(self) -> None:
        """Call `event` soon. May be used from anywhere, even by an observer in the middle of a launch."""
        if not self.loop.is_closed():  # the next loop that uses this governor looks anyway
            self.loop.call_soon(self.guarded, self.event)

    def settle(self) -> None:
        """Set the timer for the scheduler's next moment, and end the run if all is done. Called after each event."""
        at = self.scheduler.wake_at
        if at != self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self.loop.call_at(self.zero + at, self._ring) if at < inf else None
        is_over = self._done is not None and not self.attempts.count
        if is_over and (self.scheduler.stopped or not self.scheduler.unfinished):
            self._end()

    def _end(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _ring(self) -> None:
        self.guarded(self._rung)

    def _rung(self) -> None:
        """Handle the timer: due entries happen in order of time, else the head's moment has come."""
        scheduler, timer_at = self.scheduler, self._timer_at
        now = max(timer_at, self.now())
        self._timer, self._timer_at = None, inf
        self.late_s = now - timer_at if scheduler.due_at > now else -1.0
        scheduler.woken(now)
        self.late_s = -1.0
        while scheduler.due_at <= now and not self.scheduler.stopped:
            scheduler.woken(now)
        self.settle()

    def bind(self) -> None:
        """Work in the running loop from now on: the first loop, or another one after the previous loop has ended.

        Raise PacelineError if this governor is still at work in another loop.
        """
        before, running = self.loop, asyncio.get_running_loop()
        if running is before:
            return
        if self.only_loop:
            raise PacelineError(self.only_loop)
        if before.is_running() or (not before.is_closed() and (self.attempts.count or self.scheduler.jobs())):
            raise PacelineError(
                f"the governor of pool '{self.pool}' is at work in another event loop: use it in that one, or make one "
                "for each loop with a share of the quota"
            )
        now = self.now()
        self.loop, self.zero = running, running.time() - now
        self.zero_epoch = time.time() - now
        # Timers and tasks of the previous loop will never be called again.
        self._timer, self._timer_at = None, inf
        for job in [*self.attempts.forget(), *self.batch.granted, *self.scheduler.jobs()]:
            self.scheduler.drop(job)

    def fail(self, error: BaseException) -> None:
        """Stop because of an internal error or a full disk: the run ends and raises once all in flight has ended."""
        self._error = self._error or error
        self.scheduler.stop(str(error) if isinstance(error, PacelineError) else f"internal error: {error!r}")

    def guarded(self, happens: Callable[[], Any]) -> None:
        """Call `happens` in a loop callback, where an exception would be lost: the run ends at once and raises it."""
        try:
            happens()
        except Exception as error:
            if self._error is None:
                self.fail(error)
            self._end()

"""A scheduler in an event loop: one timer, one loop at a time, and what becomes of a bug of ours."""

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

    only_loop = ""  # why it may not be used in another event loop than the first
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
        """Seconds since the run began; never less than any time already acted upon."""
        return max(self.loop.time() - self.zero, self.scheduler.clock_at)

    def event(self) -> None:
        """Something has changed: the scheduler looks at the head again."""
        self.scheduler.changed(self.now())
        self.settle()

    def soon(self) -> None:
        """The same for what may be asked from anywhere, even by an observer in the middle of a launch."""
        if not self.loop.is_closed():  # whoever uses it next looks anyway
            self.loop.call_soon(self.guarded, self.event)

    def settle(self) -> None:
        """After each event: sets one timer for the scheduler's next moment, and ends the run where all is done."""
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
        """The timer: what is due happens in order of time, else the head's moment has come."""
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
        """From now on in the loop that runs: the first, or another after the one before has ended."""
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
        # What the loop before it left behind will never be called again.
        self._timer, self._timer_at = None, inf
        for job in [*self.attempts.forget(), *self.batch.granted, *self.scheduler.jobs()]:
            self.scheduler.drop(job)

    def fail(self, error: BaseException) -> None:
        """Somebody's bug, or a disk that is full: the run ends when what is in flight has ended, and raises."""
        self._error = self._error or error
        self.scheduler.stop(str(error) if isinstance(error, PacelineError) else f"internal error: {error!r}")

    def guarded(self, happens: Callable[[], Any]) -> None:
        """A callback of the loop, where nobody would hear of a bug of ours. The run ends at once, and raises it."""
        try:
            happens()
        except Exception as error:
            if self._error is None:
                self.fail(error)
            self._end()

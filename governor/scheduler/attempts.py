"""The tasks that send requests: one per attempt, each with a time limit.

One timer watches for the first overdue answer: `asyncio.timeout_at` costs more than an admission.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from governor import law
from governor.model.errors import PacelineError
from governor.model.work import TIMED_OUT, Job, Send
from governor.scheduler.queue import SWEEP, swept

if TYPE_CHECKING:
    from governor.scheduler.driver import Governor


class NoLoop:
    """A placeholder for the event loop of a governor that no loop uses yet: time does not pass."""

    def time(self) -> float:
        """Return 0."""
        return 0.0

    def is_running(self) -> bool:
        """Return False."""
        return False

    def is_closed(self) -> bool:
        """Return True, as for a loop that has ended: nothing can be called in it."""
        return True


class Attempts:
    """The running attempts of a governor's batch."""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor
        self._tasks: dict[asyncio.Task[None], Job] = {}
        self._expiring: list[tuple[float, int, asyncio.Task[None]]] = []
        self._sweep = SWEEP
        self._sequence = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        """The number of running attempts."""
        return len(self._tasks)

    def jobs(self) -> Iterable[Job]:
        """Return the jobs that are being sent."""
        return self._tasks.values()

    def start(self, job: Job, send: Send) -> None:
        """Start the task that sends an attempt."""
        job.expired = False
        task = self._governor.loop.create_task(self._attempt(job, send))
        self._tasks[task] = job
        task.add_done_callback(self._over)

    async def cancelled(self) -> None:
        """Cancel all attempts, and return when they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self) -> list[Job]:
        """Forget all attempts, because their event loop has ended without them, and return their jobs."""
        jobs = list(self._tasks.values())
        self._tasks.clear()
        self._expiring.clear()
        self._timer = None
        return jobs

    async def _attempt(self, job: Job, send: Send) -> None:
        """Send one attempt and report its answer, whatever it is."""
        governor = self._governor
        await governor.observer.flushed()
        task = asyncio.current_task()
        assert task is not None
        # Compute the time limit only now: recording the launch may have taken long if the disk was full.
        expires_at = law.expires_at(governor.p, job.first_launched_s, governor.now())
        self._watch(expires_at, task)
        try:
            answer = await send(job, max(0.0, expires_at - governor.now()))
        except asyncio.CancelledError:
            if not job.expired or task.cancelling() > 1:
                raise  # the task was (also) cancelled from outside
            answer = TIMED_OUT
        if job.expired:
            task.uncancel()
        governor.batch.answered(job, answer)  # `_over` settles

    def _over(self, task: asyncio.Task[None]) -> None:
        governor, job = self._governor, self._tasks.pop(task)
        if not self._tasks:
            self._expiring.clear()
            self._set_timer()
        if job.flying:
            governor.scheduler.drop(job)
        if not task.cancelled():
            error = task.exception()
        elif not governor.batch.is_open:
            error = None  # `cancelled` has cancelled it
        else:
            error = PacelineError(f"sending request {job.index} was cancelled by something inside it")
        if error is not None:
            governor.fail(error)
        governor.settle()

    # ------------------------------------------------------------ time-outs

    def _watch(self, at: float, task: asyncio.Task[None]) -> None:
        """Cancel an attempt's task at that time if it is still running."""
        expiring = self._expiring
        if len(expiring) > self._sweep:
            self._sweep = swept(expiring, lambda entry: entry[2] not in self._tasks)
        self._sequence += 1
        heappush(expiring, (at, self._sequence, task))
        if expiring[0][2] is task:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        at = self._expiring[0][0] if self._expiring else inf
        governor = self._governor
        self._timer = governor.loop.call_at(governor.zero + at, self.expire, at) if at < inf else None

    def expire(self, now: float) -> None:
        """Cancel the overdue attempts, and forget those that have already ended."""
        expiring = self._expiring
        while expiring and (expiring[0][0] <= now or expiring[0][2] not in self._tasks):
            task = heappop(expiring)[2]
            if task in self._tasks:
                self._tasks[task].expired = True
                task.cancel()
        self._set_timer()

"""Permits: the quota for a program's own calls, one `async with` per request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from governor.model.errors import PacelineError, Refused
from governor.model.requests import BACKOFF, Answer, Limit
from governor.model.work import Job
from governor.scheduler.batch import no_more, stated_by

if TYPE_CHECKING:
    from governor.scheduler.driver import Governor


class PermitFuture(asyncio.Future[bool]):
    """The future on which the task that asked for a permit waits.

    If it is cancelled or fails, its job ends at once: an event may reach the scheduler before the task itself can
    report.
    """

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._job = job

    def cancel(self, msg: object = None) -> bool:
        """Cancel the wait, and end the job with it."""
        is_cancelled = super().cancel(msg)
        self._job.ended = self._job.ended or is_cancelled
        return is_cancelled

    def set_exception(self, exception: type | BaseException) -> None:
        """End the wait with an exception, and the job with it."""
        self._job.ended = True
        super().set_exception(exception)


class Permit:
    """The right to send one request, from the beginning of an `async with` to its end.

    The permit is given back on every way out of the block. After an exception or a cancellation the reservation stays
    booked, since the provider may have charged it; `used` reports the tokens of an answer. A request that is refused or
    fails may wait for its next attempt inside the block.
    """

    __slots__ = ("_governor", "_job", "_limits", "_max_wait_s", "_used")

    def __init__(self, governor: Governor, job: Job, max_wait_s: float = inf) -> None:
        self._governor = governor
        self._job = job
        self._max_wait_s = max_wait_s
        self._used = -1.0
        self._limits: tuple[Limit, ...] = ()

    async def __aenter__(self) -> Permit:
        if not self._job.flying:  # else `try_permit` has granted it
            assert self._job.granted is None, "a permit is used once"
            await self._granted(self._ask(), self._max_wait_s)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """End the permit, as leaving the block does. Does nothing if it has already ended."""
        governor, job = self._governor, self._job
        if job.flying:
            governor.batch.granted.discard(job)
            used = job.need_of(self._used) if self._used >= 0.0 else None
            governor.scheduler.returned(job, used, stated_by(governor, self._limits), governor.now())
            governor.settle()

    @property
    def launched_s(self) -> float:
        """Return when the permit was last granted, seconds since the governor began."""
        return self._job.launched_s

    @property
    def waits_s(self) -> list[float]:
        """Return how long the request waited before the last grant, seconds by cause (`CAUSES`).

        Empty unless an observer is told about attempts.
        """
        job = self._job
        waits_s: list[float] = getattr(job, "waits_s", [])
        return [*waits_s[:BACKOFF], job.eligible_s - job.submitted_s if job.tries > 1 else 0.0] if waits_s else []

    @property
    def attempt(self) -> int:
        """The number of the granted attempt, from 1."""
        return self._job.attempt

    @property
    def attempts_max(self) -> int:
        """Return how often the policy allows a request to be sent."""
        return self._governor.p.max_attempts

    def used(self, tokens: float, limits: tuple[Limit, ...] = ()) -> None:
        """Report that the request was answered and used this many tokens, prompt and output; below 0 = unknown.

        `limits`: the counts in the answer's headers (see `answers`). Raises PacelineError if `tokens` is inf or not a
        number.
        """
        if not tokens < inf:
            raise PacelineError(f"an answer that used {tokens} tokens: state a number of tokens, -1 = not known")
        self._used, self._limits = tokens, limits

    async def answered(self, answer: Answer) -> bool:
        """Report any answer; return True when the request may be sent again, False if it is over.

        Use it in place of `used`, `throttled` and `failed` if `answers.classify` has produced the answer.
        """
        return await self._once_more(lambda: self._governor.batch.answered(self._job, answer))

    def over(self, answer: Answer) -> None:
        """Report the last answer of a request that is never sent again, such as one whose stream has begun."""
        governor, job = self._governor, self._job
        if job.flying:
            governor.batch.granted.discard(job)
            governor.batch.answered(job, answer, is_last=True)
            governor.settle()

    def stated(self, limits: tuple[Limit, ...]) -> None:
        """Report the headers' counts before the answer is complete: the body of a stream may take long."""
        governor = self._governor
        if self._job.flying and limits:
            governor.scheduler.stated(self._job, stated_by(governor, limits), governor.now())
            governor.settle()

    async def throttled(self, retry_after_s: float = -1.0, limits: tuple[Limit, ...] = ()) -> bool:
        """Report a 429 with its Retry-After (-1 = none); return True when the request may be sent again.

        False: the request's attempts or time are exhausted, and the permit has been given back.
        """
        governor, job = self._governor, self._job
        stated = stated_by(governor, limits)
        return await self._once_more(lambda: governor.scheduler.throttled(job, retry_after_s, stated, governor.now()))

    async def failed(self, retry_after_s: float = -1.0, limits: tuple[Limit, ...] = ()) -> bool:
        """Report a 5xx, a time-out or a dropped connection; returns as `throttled` does."""
        governor, job = self._governor, self._job
        stated = stated_by(governor, limits)
        return await self._once_more(lambda: governor.scheduler.failed(job, retry_after_s, stated, governor.now(), ""))

    def is_granted_now(self) -> bool:
        """Ask for the permit and return whether it was granted; if not, take the request back."""
        granted = self._ask()
        if granted.done():
            granted.result()
            return True
        self._governor.scheduler.drop(self._job)
        self._governor.event()
        return False

    def _ask(self) -> PermitFuture:
        """Queue the request, and return the future of its grant."""
        governor, job = self._governor, self._job
        governor.bind()
        self._check_open()
        job.granted = granted = PermitFuture(job, governor.loop)
        job.submitted_s = governor.now()
        governor.scheduler.submitted(job, job.submitted_s)
        governor.settle()
        return granted

    async def _once_more(self, happened: Callable[[], bool]) -> bool:
        """Report the end of an attempt; return True when the next may be sent, False if there is none."""
        governor, job = self._governor, self._job
        job.granted = granted = PermitFuture(job, governor.loop)
        governor.batch.granted.discard(job)
        is_again = happened()
        governor.settle()
        if not is_again:
            return False
        self._check_open()
        return await self._granted(granted)

    def _check_open(self) -> None:
        """Raise Refused if the pool has stopped."""
        if self._governor.stopped:
            self._governor.scheduler.drop(self._job)
            raise no_more(self._governor)

    async def _granted(self, granted: PermitFuture, max_wait_s: float = inf) -> bool:
        """Return True when the job may be sent (again), or False if its time is over before that."""
        governor, patience = self._governor, None
        if max_wait_s < inf:
            patience = governor.loop.call_later(max_wait_s, self._too_long, granted, max_wait_s)
        try:
            return await granted
        except BaseException:
            # The wait was cancelled, perhaps at the moment of the grant, or ended with an error.
            governor.batch.granted.discard(self._job)
            governor.scheduler.drop(self._job)
            governor.event()
            raise
        finally:
            if patience is not None:
                patience.cancel()

    def _too_long(self, granted: PermitFuture, max_wait_s: float) -> None:
        if not granted.done():
            pool = self._governor.pool
            text = f"pool '{pool}' cannot send a request within {max_wait_s:g} s: answer that it is busy, or wait"
            granted.set_exception(Refused(text, max_wait_s))

"""The governor: a scheduler in an event loop, for a program's own calls and for whole batches.

Theory of operation. Time is the loop's monotonic clock, in seconds since the run began; a timer that rings early counts
as its own time (`max(timer_at, clock)`), so that the law's word and the clock cannot disagree. The epoch is only for
records. A waiting task costs one wake-up, when it is its turn.

When something raises that must not (a send, an observer, the source), nothing more is launched on a state that cannot
be vouched for; what is in flight is paid for and may end; then `run` raises it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from math import inf
from typing import cast

from governor import law
from governor.law import Params, State
from governor.model.errors import BadSetting, quoted
from governor.model.policy import Policy
from governor.model.pools import check_own_quota
from governor.model.requests import Request
from governor.model.work import Begun, Job, Observer, Send, Work
from governor.scheduler.attempts import Attempts, NoLoop
from governor.scheduler.batch import BatchShell
from governor.scheduler.interfaces import Quota
from governor.scheduler.learning import Learner
from governor.scheduler.loop import InALoop
from governor.scheduler.permits import Permit
from governor.scheduler.quota import local_quota
from governor.scheduler.refusals import Refusals
from governor.scheduler.scheduler import Scheduler
from governor.scheduler.waiting import wait_s

# Lanes of a program's own calls: where nobody waits for the answer, and where somebody does.
BATCH = "batch"
INTERACTIVE = "interactive"


def standing_of(lane: str) -> int:
    """How the law sees a first attempt in that lane. BadSetting for one that does not exist."""
    if lane not in (BATCH, INTERACTIVE):
        raise BadSetting(f"lane {quoted(lane)} does not exist: use {BATCH} or {INTERACTIVE}")
    return law.INTERACTIVE if lane == INTERACTIVE else law.FIRST


class Governor(InALoop):
    """One pool's quota: a scheduler in an event loop.

    It may be made anywhere, and works in the event loop that it is used in: one after the other in several
    (`asyncio.run` twice), where bookings go on ageing between them, but never in two at once.

    `params`: the settings (kept as `policy`), or the numbers that they mean to the law.

    `permit` serves a program's own calls, `run` a whole batch; both at once share the quota, permits first. `state`
    and `start_s` continue an earlier run, at so many seconds since that began, with nothing in flight. `day_*_used`:
    what was used of the daily limits before. `learner`: estimates what waits at the head anew. `own_quota`: not
    shared, even if PACELINE_REDIS_URL is set (BadSetting without it: see `sharing`). `quota`: another than one of its
    own. `late_s`: by how much the timer that let the next launch out was late, -1 = none did.
    """

    def __init__(
        self,
        params: Params | Policy,
        *,
        seed: int = 0,
        observer: Observer | None = None,
        pool: str = "default",
        state: State | None = None,
        start_s: float = 0.0,
        day_tokens_used: float = 0.0,
        day_requests_used: float = 0.0,
        learner: Learner | None = None,
        own_quota: bool = False,
        quota: Quota | None = None,
    ) -> None:
        if quota is None and not own_quota:
            check_own_quota(os.environ)
        self.policy = params if isinstance(params, Policy) else None
        self.pool = pool
        self.observer = observer or Observer()
        self.loop: asyncio.AbstractEventLoop
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            self.loop = cast(asyncio.AbstractEventLoop, NoLoop())  # until it is used in one
        self.zero = self.loop.time() - start_s
        self.zero_epoch = time.time() - start_s
        self.late_s = -1.0
        self.portal: object = None  # see `portal.portal_to`
        self.batch = BatchShell(self, learner)
        self.attempts = Attempts(self)
        if quota is None:
            numbers = params.params() if isinstance(params, Policy) else params
            own = local_quota(numbers, state, self.batch.tell_decision if self.observer.hears_decisions else None)
            if day_tokens_used > 0.0 or day_requests_used > 0.0:
                own.day_started(day_tokens_used, day_requests_used, start_s)
            quota = own
        estimate = self.batch.estimate if learner is not None else None
        self.scheduler: Scheduler[Job] = Scheduler(self.batch, quota, seed=seed, start_s=start_s, estimate=estimate)
        self._calls = 0
        self._timer, self._timer_at = None, inf
        self._done, self._error = None, None
        self.observer.began(self)

    # ------------------------------------------------------------ from outside

    def observe(self, observer: Observer) -> None:
        """Tells that observer from now on, in the place of the one before (see `Together`)."""
        self.observer = observer
        self.batch.observe(observer)

    def permit(
        self,
        reserve: float,
        *,
        expected: float = -1.0,
        charge: int = -1,
        request: Request | None = None,
        max_wait_s: float = inf,
        lane: str = BATCH,
    ) -> Permit:
        """`async with governor.permit(tokens) as permit:` waits until a request that reserves so many may be sent.

        `expected`: its declared output cap, for the order of launches. `max_wait_s`: Refused, if it may not be sent
        within so many seconds. `request`, `charge`: what observers are told about each attempt, and without which they
        are not. `lane`: "interactive" for a request that somebody waits for, which goes before all others, is not
        staggered and may use what OPENAI_INTERACTIVE_RESERVE keeps; else "batch". Raises PacelineError for what can
        never be sent, and where the pool has stopped.
        """
        reserve = self.batch.reserved(reserve, request)
        self._calls += 1
        job = Job(None, self._calls, reserve, expected, charge, 0.0, request)
        job.standing = standing_of(lane)
        return Permit(self, job, max_wait_s)

    def try_permit(self, reserve: float, *, expected: float = -1.0, lane: str = BATCH) -> Permit | None:
        """A permit that is granted already, where the request may be sent right now; None where it would have to wait.

        Enter it (`async with`) at once: it holds its place from here on. Raises as `permit` does.
        """
        permit = self.permit(reserve, expected=expected, lane=lane)
        return permit if permit.is_granted_now() else None

    def wait_s(self, reserve: float, *, expected: float = -1.0, lane: str = BATCH) -> float:
        """How long a request that reserves so many tokens would wait now, about, in seconds: see `waiting`.

        0 = it may go at once; inf = nobody can say (paused, stopped). For a caller who would rather answer that it is
        busy than wait. Where the quota is shared, what other processes' requests wait for is not known here.
        """
        reserve = self.batch.reserved(reserve, None)
        if self.stopped:
            return inf
        standing = standing_of(lane)
        ahead = self.scheduler.ahead_of(law.rank(self.p, law.MAIN, 1, expected, reserve, inf, standing))
        flying = [(job.launched_s, job.reserve) for job in (*self.batch.granted, *self.attempts.jobs())]
        return wait_s(self.p, self.s, ahead, flying, (reserve, standing), self.batch.answer_s, self.now())

    async def run(
        self, source: Iterator[Work], send: Send, *, finalize: bool = False, refusals: Refusals | None = None
    ) -> str:
        """Runs all work of the source, in its order; returns "" or why it stopped before the end: see `stopped`.

        What was launched before comes first in the source: attempts go on counting, deadlines go on running, and an
        open finalize pass is opened again.

        `finalize`: a cut answer without text gets one more call. `refusals`: notices where all requests are refused
        alike; without it each refusal ends its own. Where it stops, what waits stays where it came from. Cancelling
        this cancels what is in flight. What a send, the observer or the source raises is raised here in the end.
        """
        self.bind()
        self.event()
        self.batch.begin(source, send, self.mark(), finalize=finalize, refusals=refusals)
        self._done = self.loop.create_future()
        try:
            self.scheduler.begun(self.now())
            self.event()
            await self._done
        finally:
            await self._close_down()
        if self._error is not None:
            raise self._error
        return self.stopped

    def stop(self, why: str) -> None:
        """Launches nothing more; what is in flight goes on, who waits for a permit gets an error. `why`: not empty."""
        self.scheduler.stop(why)

    def more(self) -> None:
        """The source of `run`, which had said that there is no more, has more. Nothing happens where no run goes on."""
        if self._done is not None and not self._done.done():
            self.scheduler.begun(self.now())
            self.soon()

    def mark(self) -> Begun:
        """This moment, for work that is submitted now and launched later (`Work.begun`)."""
        now = self.now()
        self.scheduler.advance(now)
        return now, self.scheduler.clock.copy()

    def withdraw(self, is_meant: Callable[[Request], bool]) -> int:
        """Takes out of the queue what waits and is meant, unended; returns how many. What is in flight goes on.

        The source must have stopped giving it before. What holds a place in flight while it backs off gives it back.
        """
        count = self.scheduler.withdrawn(lambda job: job.work is not None and is_meant(job.work.request), self.now())
        self.soon()
        return count

    def reopen(self) -> None:
        """Launches again after `stop`, in the next `run`."""
        assert not self.batch.is_open, "a batch is still running"
        self.scheduler.stopped = ""

    def pause(self) -> None:
        """Launches nothing until `resume`."""
        self.scheduler.pause()
        self.soon()

    def resume(self) -> None:
        """Goes on after `pause`."""
        self.scheduler.resume()
        self.soon()

    def reprice(self, params: Params) -> None:
        """Takes changed settings over in mid-run. What was submitted before keeps its place in the queue."""
        self.scheduler.reprice(params, self.now())
        self.soon()

    async def aclose(self) -> None:
        """Gives back what this process holds of a quota that it shares (`shared`); nothing where it is its own."""

    def next_launch_at(self) -> float:
        """When anything can be launched at the earliest; -inf = at any moment, or as soon as something else happens.

        What is in flight may change that by its answer, but for a hold.
        """
        return self.scheduler.next_launch_at(is_flying=self.attempts.count > 0)

    def backing_off(self) -> tuple[float, float]:
        """When the first and the last of those that back off may be tried again; (inf, -inf) where nobody does."""
        return self.scheduler.backing_off()

    @property
    def p(self) -> Params:
        """The settings, as numbers of the law."""
        return self.scheduler.quota.p

    @property
    def s(self) -> State:
        """The law's state, as far as it is known."""
        return self.scheduler.quota.s

    @property
    def stopped(self) -> str:
        """Why nothing is launched any more."""
        return self.scheduler.stopped

    @property
    def cause(self) -> int:
        """The law's reason for which the head of the queue waits right now."""
        return self.scheduler.cause

    @property
    def wake_at(self) -> float:
        """When the head may launch, seconds since the run began; inf = not before something else happens."""
        return self.scheduler.head_at

    @property
    def may_move(self) -> bool:
        """Whether another event loop may take over: nothing waits or is in flight."""
        return not (self.attempts.count or self.batch.granted or self.scheduler.jobs() or self.batch.is_open)

    @property
    def in_flight(self) -> int:
        """Permits taken: by requests that are being sent, and by those that back off and keep their place."""
        return self.scheduler.quota.in_flight

    @property
    def next_slot_at(self) -> float:
        """When the stagger allows the next launch, seconds since the run began; -inf before the first launch."""
        return self.s.next_slot_at

    @property
    def next_slot_epoch(self) -> float:
        """The same in seconds since 1970; 0 before the first launch."""
        return self.zero_epoch + self.s.next_slot_at if self.s.next_slot_at > -inf else 0.0

    async def _close_down(self) -> None:
        """Whatever the run leaves behind gives back what it holds."""
        self._done = None
        self.batch.end()
        try:
            await self.attempts.cancelled()
        finally:
            self.scheduler.closed()
            self.guarded(self.event)

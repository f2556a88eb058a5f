"""The governor: a scheduler in an event loop, for a program's own calls and for whole batches.

Theory of operation. Time is the loop's monotonic clock, in seconds since the run began. If a timer rings early, its own
time counts (`max(timer_at, clock)`), so that the law and the clock cannot disagree. Epoch times are only for records. A
waiting task costs one wake-up, when its turn has come.

If an unexpected exception is raised (by a send, an observer or the source), nothing more is launched, because the state
can no longer be trusted. Requests in flight are paid for and may end; then `run` raises the exception.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import cast

from governor import law
from governor.law import Params, State
from governor.model.errors import BadSetting, quoted
from governor.model.needs import STANDARD, TOKENS, Weights, of_amounts
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
from governor.scheduler.quota import LocalQuota
from governor.scheduler.repeated_refusals import Refusals
from governor.scheduler.scheduler import Scheduler
from governor.scheduler.waiting import wait_s

# Lanes of a program's own calls: without and with a user who waits for the answer.
BATCH = "batch"
INTERACTIVE = "interactive"


def standing_of(lane: str) -> int:
    """Return the law's standing for a first attempt in that lane. Raise BadSetting if the lane does not exist."""
    if lane not in (BATCH, INTERACTIVE):
        raise BadSetting(f"lane {quoted(lane)} does not exist: use {BATCH} or {INTERACTIVE}")
    return law.INTERACTIVE if lane == INTERACTIVE else law.FIRST


class Governor(InALoop):
    """One pool's quota: a scheduler in an event loop.

    A governor may be created anywhere. It works in the event loop that uses it, and in several if they run one after
    another (`asyncio.run` twice; bookings keep ageing in between), but never in two at once.

    `params`: the settings (kept as `policy`), or the law's numbers for them. `state` and `start_s` continue an earlier
    run at that many seconds since it began, with nothing in flight. `day_*_used`: prior use of the daily limits.
    `learner`: estimates the reservation of the head anew. `own_quota`: do not share the quota even if
    PACELINE_REDIS_URL is set (with False, BadSetting is raised in that case: see `sharing`). `quota`: use this quota in
    place of a new one.

    `permit` serves a program's own calls, `run` a whole batch. Both can share the quota at the same time; permits go
    first. `late_s`: how late the timer rang that triggered the next launch, -1 = no timer did.
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
            self.loop = cast(asyncio.AbstractEventLoop, NoLoop())  # until an event loop uses this governor
        self.zero = self.loop.time() - start_s
        self.zero_epoch = time.time() - start_s
        self.late_s = -1.0
        self.portal: object = None  # see `portal.portal_to`
        if self.policy is not None and any(each.window == law.CLOCK for each in self.policy.quota):
            state = state or State()
            state.zero_s = self.zero_epoch
        self.batch = BatchShell(self, learner)
        self.attempts = Attempts(self)
        if quota is None:
            numbers = params.params() if isinstance(params, Policy) else params
            own = LocalQuota(numbers, state, self.batch.tell_decision if self.observer.hears("decided") else None)
            if day_tokens_used > 0.0 or day_requests_used > 0.0:
                own.started(of_amounts({law.TPD: day_tokens_used, law.RPD: day_requests_used}), start_s)
            quota = own
        estimate = self.batch.estimate if learner is not None else None
        self.scheduler: Scheduler[Job] = Scheduler(self.batch, quota, seed=seed, start_s=start_s, estimate=estimate)
        self._calls = 0
        self._timer, self._timer_at = None, inf
        self._done, self._error = None, None
        self.observer.began(self)

    # ------------------------------------------------------------ public methods

    @property
    def weights(self) -> Weights:
        """What a request and its tokens take of the dimensions of this pool's quota."""
        return TOKENS if self.policy is None else self.policy.weights

    @property
    def places(self) -> Mapping[str, int]:
        """The places of the quota's dimensions, by the names under which answers state them."""
        return STANDARD if self.policy is None else self.policy.places

    def observe(self, observer: Observer) -> None:
        """Report to this observer from now on, in place of the previous one (see `Together`)."""
        self.observer = observer
        self.batch.observe(observer)

    def permit(
        self,
        reserve: float,
        *,
        prompt: float = 0.0,
        expected: float = -1.0,
        charge: int = -1,
        request: Request | None = None,
        max_wait_s: float = inf,
        lane: str = BATCH,
    ) -> Permit:
        """Return a permit: `async with governor.permit(tokens)` waits until a request of that reservation may be sent.

        `prompt`: how many of the tokens are input, which matters where a profile limits input and output apart; read
        from `request` if that is given. `expected`: the request's declared output cap, for the order of launches.
        `max_wait_s`: entering raises Refused if the request may not be sent within that many seconds. `request`,
        `charge`: what observers are told about each attempt; without `request` they are not told. `lane`: "interactive"
        for a request whose user is waiting, which goes before all others, is not staggered and may use the share that
        OPENAI_INTERACTIVE_RESERVE keeps free; else "batch". Raises PacelineError if the request can never be sent, or
        if the pool has stopped.
        """
        reserve = self.batch.reserved(reserve, request, prompt)
        self._calls += 1
        job = Job(None, self._calls, reserve, expected, charge, 0.0, request, self.weights)
        if request is None and prompt > 0.0:
            job.prompt, job.need = prompt, job.weights.of(reserve, prompt)
        job.standing = standing_of(lane)
        return Permit(self, job, max_wait_s)

    def try_permit(self, reserve: float, *, expected: float = -1.0, lane: str = BATCH) -> Permit | None:
        """Return a permit that is already granted, or None if the request would have to wait.

        Enter it (`async with`) at once: it holds its place from here on. Raises as `permit` does.
        """
        permit = self.permit(reserve, expected=expected, lane=lane)
        return permit if permit.is_granted_now() else None

    def wait_s(self, reserve: float, *, expected: float = -1.0, lane: str = BATCH) -> float:
        """Estimate how long a request that reserves that many tokens would wait now, in seconds: see `waiting`.

        0 = it may go at once; inf = unpredictable (paused or stopped). A caller can use this to answer "busy" rather
        than wait. With a shared quota, the requests that wait in other processes are not known here.
        """
        reserve = self.batch.reserved(reserve, None)
        if self.stopped:
            return inf
        standing = standing_of(lane)
        ahead = self.scheduler.ahead_of(law.rank(self.p, law.MAIN, 1, expected, reserve, inf, standing))
        flying = [(job.launched_s, job.need) for job in (*self.batch.granted, *self.attempts.jobs())]
        return wait_s(
            self.p, self.s, ahead, flying, (self.weights.of(reserve, 0.0), standing), self.batch.answer_s, self.now()
        )

    async def run(
        self, source: Iterator[Work], send: Send, *, finalize: bool = False, refusals: Refusals | None = None
    ) -> str:
        """Run all work of the source, in its order; return "" or why the run stopped before the end: see `stopped`.

        Requests launched in an earlier run come first in the source: their attempts and deadlines continue to count,
        and an open finalize pass is opened again.

        `finalize`: a truncated answer without text gets one more call. `refusals`: detects that all requests are
        refused alike; without it each refusal ends only its own request. If the run stops, waiting requests stay in the
        source's records. Cancelling this coroutine cancels the requests in flight. An exception raised by a send, the
        observer or the source is raised here at the end.
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
        """Launch nothing more; requests in flight continue, waiting callers get an error. `why`: not empty."""
        self.scheduler.stop(why)

    def more(self) -> None:
        """Continue reading the source of `run` after it had reported its end. Does nothing if no run is active."""
        if self._done is not None and not self._done.done():
            self.scheduler.begun(self.now())
            self.soon()

    def renew(self) -> bool:
        """Look at the source of `run` again, whose next request may be another one; return whether a run is active."""
        is_active = self._done is not None and not self._done.done()
        if is_active:
            self.scheduler.renewed(self.now())
            self.soon()
        return is_active

    def mark(self) -> Begun:
        """Return this moment, for work that is submitted now and launched later (`Work.begun`)."""
        now = self.now()
        self.scheduler.advance(now)
        return now, self.scheduler.clock.copy()

    def withdraw(self, is_meant: Callable[[Request], bool]) -> int:
        """Remove the waiting requests that `is_meant` selects, without ending them, and return how many.

        Requests in flight continue. The source must have stopped yielding the selected requests before. A request that
        holds a place in flight during its backoff gives it back.
        """
        count = self.scheduler.withdrawn(lambda job: job.work is not None and is_meant(job.work.request), self.now())
        self.soon()
        return count

    def reopen(self) -> None:
        """Allow launches again after `stop`, in the next `run`."""
        assert not self.batch.is_open, "a batch is still running"
        self.scheduler.stopped = ""

    def pause(self) -> None:
        """Launch nothing until `resume`."""
        self.scheduler.pause()
        self.soon()

    def resume(self) -> None:
        """Continue after `pause`."""
        self.scheduler.resume()
        self.soon()

    def reprice(self, params: Params) -> None:
        """Adopt changed settings in mid-run. Requests submitted before keep their places in the queue."""
        self.scheduler.reprice(params, self.now())
        self.soon()

    async def aclose(self) -> None:
        """Give back what this process holds of a shared quota (`shared`); does nothing if the quota is not shared."""

    def next_launch_at(self) -> float:
        """Return the earliest time of the next launch; -inf = at any moment, or as soon as something else happens.

        The answer of a request in flight may change that time, unless a hold is the cause.
        """
        return self.scheduler.next_launch_at(is_flying=self.attempts.count > 0)

    def backing_off(self) -> tuple[float, float]:
        """Return when the first and the last backing-off request may be tried again; (inf, -inf) if there is none."""
        return self.scheduler.backing_off()

    @property
    def p(self) -> Params:
        """The settings as the law's numbers."""
        return self.scheduler.quota.p

    @property
    def s(self) -> State:
        """The law's state, as far as it is known here."""
        return self.scheduler.quota.s

    @property
    def stopped(self) -> str:
        """Why nothing is launched any more; "" while launches go on."""
        return self.scheduler.stopped

    @property
    def cause(self) -> int:
        """The law's reason why the head of the queue waits right now."""
        return self.scheduler.cause

    @property
    def wake_at(self) -> float:
        """Return when the head may launch, seconds since the run began; inf = not before something else happens."""
        return self.scheduler.head_at

    @property
    def may_move(self) -> bool:
        """Return whether another event loop may take over, because no request waits or is in flight."""
        return not (self.attempts.count or self.batch.granted or self.scheduler.jobs() or self.batch.is_open)

    @property
    def in_flight(self) -> int:
        """The number of permits taken by requests that are being sent or that keep their place during a backoff."""
        return self.scheduler.quota.in_flight

    def limits(self) -> dict[str, tuple[float, float, float]]:
        """Return (limit, budget, used) of each limited dimension by name.

        The limit is as set, as headers state it, or as found (0 = not found yet); the budget is what of it may be
        used, and `used` counts against the budget now.
        """
        p, s, now = self.p, self.s, self.now()
        return {
            name: (
                s.granted[d] or law.limit_found(p, s, d),
                p.budget[d] * s.scale[d],
                law.used_in(p, s, d, now),
            )
            for name, d in self.places.items()
            if d < p.dimensions and p.budget[d] < inf
        }

    @property
    def next_slot_at(self) -> float:
        """Return when the stagger allows the next launch, seconds since the run began; -inf before the first launch."""
        return self.s.next_slot_at

    @property
    def next_slot_epoch(self) -> float:
        """`next_slot_at` in seconds since 1970; 0 before the first launch."""
        return self.zero_epoch + self.s.next_slot_at if self.s.next_slot_at > -inf else 0.0

    async def _close_down(self) -> None:
        """Give back everything that the run's remaining requests hold."""
        self._done = None
        self.batch.end()
        try:
            await self.attempts.cancelled()
        finally:
            self.scheduler.closed()
            self.guarded(self.event)

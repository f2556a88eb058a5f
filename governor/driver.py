"""The asyncio driver of the law: the twin of `sim/driver.py`, to be read side by side with it.

What lives here: the live clock, the queue, one timer, and the tasks that send. What must not: any rule of admission,
pacing or retry (they stand in `governor/law.py`), HTTP (`openai_adapter`), storage (`journal`, an `Observer`).

Theory of operation. Work is pulled from its source only when it comes to the head, so that memory stays flat; retries
and finalize passes wait in a heap. After every event (an answer, a retry that has backed off, a wake-up, a change of
settings) `_pump` asks the law about the head, launches as long as the law says "now", and leaves one timer for the
moment that it named: any number of waiting tasks costs one wake-up each, when it is their turn.

Time is the loop's monotonic clock, in seconds since the run began; a timer that rings early counts as its own time
(`max(timer_at, clock)`), so the law's word and the clock cannot disagree. The epoch is only for records.

Every call of the law goes through `_law`, which tells the observer name, arguments and result: replayed in order on a
fresh state, each decision comes out the same, to the bit (`paceline verify`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import Any, Protocol

from governor import law
from governor.errors import FailureCode, PacelineError
from governor.keyed import JITTER_RETRY, JITTER_STAGGER, attempt_key, keyed_uniform
from governor.law import FINALIZE, FIRST, MAIN, Params, State
from governor.requests import Answer, Attempt, Limit, Outcome, Request
from governor.summary import CAUSES

DIMENSIONS = {"TPM": law.TPM, "RPM": law.RPM, "TPD": law.TPD, "RPD": law.RPD}
LANES = ("main", "finalize")
# What a failed attempt becomes when no further one is allowed.
SPENT = {
    Outcome.THROTTLED: FailureCode.RATE_LIMIT_EXHAUSTED,
    Outcome.SLOW_DOWN: FailureCode.RATE_LIMIT_EXHAUSTED,
    Outcome.OVERLOADED: FailureCode.SERVER_ERROR,
    Outcome.SERVER_ERROR: FailureCode.SERVER_ERROR,
    Outcome.MALFORMED: FailureCode.SERVER_ERROR,
    Outcome.TIMEOUT: FailureCode.TIMEOUT,
    Outcome.DROPPED: FailureCode.CONNECTION_DROPPED,
    Outcome.TOO_LARGE: FailureCode.REQUEST_TOO_LARGE,
    Outcome.BAD_REQUEST: FailureCode.BAD_REQUEST,
}
THROTTLES = (Outcome.THROTTLED, Outcome.SLOW_DOWN)
FINAL = (Outcome.TOO_LARGE, Outcome.BAD_REQUEST)
# The account, not the request, is at fault: nothing more is sent, and what was not answered stays pending.
STOPPING = {Outcome.QUOTA: FailureCode.INSUFFICIENT_QUOTA, Outcome.UNAUTHORIZED: FailureCode.UNAUTHORIZED}
# Admitted at least as far as the door, as far as anyone can tell: its charge counts.
UNCHARGED = (*THROTTLES, *STOPPING, *FINAL)


@dataclass(frozen=True, slots=True)
class Work:
    """One request to run: what to reserve for it and for its finalize pass, and its declared cap (-1 = none).

    `charge`, `finalize_charge`: what the provider is believed to charge, for the records; -1 = unknown.
    """

    request: Request
    reserve: float
    expected: float = -1.0
    finalize_reserve: float = 0.0
    charge: int = -1


class Observer:
    """Told of everything that a run does, in order. All methods are quick and synchronous; none may raise.

    `flushed` is awaited before a request is sent: a journal makes the launch durable there.
    """

    def launched(self, job: Job, now: float) -> None:
        """An attempt is about to be sent."""

    async def flushed(self) -> None:
        """Returns when what was told so far is durable."""

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        """An attempt is over; `failure` is the request's failure code if it is lost with it."""

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        """A request is over: answered (""), or lost with that code."""

    def deferred(self, cause: int) -> None:
        """A request at the head has to wait for this cause of the law; counted once per request and cause."""

    def decided(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """The law's function of that name was called with these arguments (without `p` and `s`)."""


class Send(Protocol):
    """Sends one attempt and says what came back. Never raises but for cancellation."""

    def __call__(self, job: Job, timeout_s: float) -> Awaitable[Answer]:
        """`timeout_s`: how long the answer is awaited; what takes longer is a `timeout` answer."""


class Job:
    """One request on its way, or one permit that somebody waits for."""

    __slots__ = (
        *("work", "index", "lane", "attempt", "standing", "reserve", "expected"),
        *("submitted_s", "eligible_s", "first_launched_s", "launched_s"),
        *("since", "waits_s", "asked", "ended", "booked", "granted"),
    )

    def __init__(self, work: Work | None, index: int, reserve: float, expected: float, now: float) -> None:
        self.work = work
        self.index = index
        self.reserve = reserve
        self.expected = expected
        self.lane = MAIN
        self.attempt = 1
        self.standing = FIRST
        self.submitted_s = now
        self.eligible_s = now
        self.first_launched_s = -1.0
        self.launched_s = -1.0
        self.since: list[float] = []
        self.waits_s: list[float] = []
        self.asked = 0
        self.ended = False
        self.booked: list[float] = []
        self.granted: asyncio.Future[None] | None = None


Entry = tuple[tuple[float, ...], int, Job]


class Governor:
    """One pool's quota: a queue, the law's state and one timer. Use it inside a running event loop.

    `permit` serves a program's own calls; `run` a whole batch.
    """

    def __init__(
        self, params: Params, *, seed: int = 0, observer: Observer | None = None, pool: str = "default"
    ) -> None:
        self.p = params
        self.s = State()
        self.seed = seed
        self.pool = pool
        self.observer = observer or Observer()
        self.loop = asyncio.get_running_loop()
        self.zero = self.loop.time()
        self.stopped = ""
        self.clock = [0.0] * len(CAUSES)
        self.clock_at = 0.0
        self.cause = law.NOTHING
        self._queue: list[Entry] = []
        self._backing_off: list[tuple[float, int, Job]] = []
        self._source: Iterator[Work] = iter(())
        self._head: Job | None = None
        self._sequence = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._wake_at = inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._send: Send | None = None
        self._finalizes = False
        self._done = asyncio.Event()

    # ------------------------------------------------------------ for a program's own calls

    @asynccontextmanager
    async def permit(self, reserve: float, *, expected: float = -1.0) -> AsyncIterator[Permit]:
        """Waits until a request that reserves so many tokens may be sent, and holds its place while it is.

        The permit comes back on every way out of the block: an exception or a cancellation leaves the reservation
        booked, since the provider may have charged it.
        """
        now = self.now()
        if law.never_fits(self.p, reserve):
            raise PacelineError(f"a request of {reserve:,.0f} tokens never fits: the limit is {self.p.limit[0]:,.0f}")
        self._sequence += 1
        job = Job(None, self._sequence, reserve, expected, now)
        job.granted = self.loop.create_future()
        self._advance(now)
        self._may_go(job, now)
        self._pump(now)
        try:
            await job.granted
        except asyncio.CancelledError:
            if job.granted.done() and not job.granted.cancelled():
                self._law("released")
            job.ended = True
            self._event()
            raise
        permit = Permit(job)
        try:
            yield permit
        finally:
            self._advance(self.now())
            if permit.used_tokens >= 0.0:
                self._law("settled", reserve, permit.used_tokens, job.launched_s)
            else:
                self._law("released")
            self._pump(self.clock_at)

    # ------------------------------------------------------------ for a batch

    async def run(self, source: Iterator[Work], send: Send, *, finalize: bool = False) -> str:
        """Runs all work of the source; returns "" or why it stopped before the end (a failure code, or `stop`'s word).

        `finalize`: a cut answer without text gets one more call. Cancelling this cancels what is in flight.
        """
        self._source, self._send, self._finalizes = source, send, finalize
        self._head = self._next()
        self._event()
        try:
            await self._done.wait()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for task in tuple(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.gather(*self._tasks, return_exceptions=True)
        return self.stopped

    def stop(self, why: str) -> None:
        """Launches nothing more; what is in flight goes on, what waits stays where it came from."""
        self.stopped = self.stopped or why
        self._event()

    def pause(self) -> None:
        """Launches nothing until `resume`."""
        self._law("paused")
        self._event()

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._law("resumed")
        self._event()

    def reprice(self, params: Params) -> None:
        """Takes changed settings over in mid-run."""
        now = self.now()
        self._advance(now)
        law.repriced(self.p, params, self.s, now)
        self.observer.decided("repriced", (params, now), None)
        self.p = params
        self._pump(now)

    def now(self) -> float:
        """Seconds since the run began; never less than any time already acted upon."""
        return max(self.loop.time() - self.zero, self.clock_at)

    # ------------------------------------------------------------ the queue

    def _next(self) -> Job | None:
        """The next new work, from its source. What can never fit ends here, unsent."""
        for work in self._source:
            job = Job(work, work.request.index, work.reserve, work.expected, 0.0)
            if not law.never_fits(self.p, work.reserve):
                job.since = [0.0] * len(CAUSES)
                return job
            self.observer.ended(work.request, FailureCode.REQUEST_TOO_LARGE, None, self.now())
        return None

    def _may_go(self, job: Job, now: float) -> None:
        """The job becomes eligible: from now on its waiting is counted."""
        job.eligible_s = now
        job.asked = 0
        job.ended = False
        job.since = self.clock.copy()
        self._sequence += 1
        sequence = float(self._sequence)
        key = law.rank(self.p, job.lane, job.attempt, job.expected, job.reserve, sequence)
        heappush(self._queue, (key, self._sequence, job))

    def _first(self) -> Job | None:
        queue = self._queue
        while queue and queue[0][2].ended:
            heappop(queue)
        return queue[0][2] if queue else self._head

    def _taken(self, job: Job) -> None:
        """Removes the head from its queue."""
        if job is self._head:
            self._head = self._next()
        else:
            heappop(self._queue)

    # ------------------------------------------------------------ time

    def _law(self, name: str, *arguments: Any) -> Any:
        """Every change of the law's state, told to the observer."""
        result = getattr(law, name)(self.p, self.s, *arguments)
        self.observer.decided(name, arguments, result)
        return result

    def _advance(self, now: float) -> None:
        """Time has passed until `now`, under the cause that has held since the last event."""
        passed = now - self.clock_at
        if passed > 0.0:
            self.clock[self.cause] += passed
            self.clock_at = now

    def _event(self) -> None:
        """Something has changed: look at the head again."""
        now = self.now()
        self._advance(now)
        self._pump(now)

    def _ring(self) -> None:
        now = max(self._timer_at, self.now())
        self._timer, self._timer_at = None, inf
        self._advance(now)
        while self._backing_off and self._backing_off[0][0] <= now:
            job = heappop(self._backing_off)[2]
            if not job.ended:
                self._may_go(job, now)
        self._give_up_late(now)
        self._pump(now)

    def _set_timer(self) -> None:
        """One live timer: for the head, for the next retry, or for the next deadline, whichever is first."""
        at = min(self._wake_at, self._backing_off[0][0] if self._backing_off else inf)
        if at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.loop.call_at(self.zero + at, self._ring) if at < inf else None

    def _give_up_late(self, now: float) -> None:
        """Retries whose request's time is over while they wait for their launch end there."""
        if self.p.deadline_s <= 0.0:
            return
        for _, _, job in self._queue:
            if not job.ended and job.attempt > 1 and law.deadline_at(self.p, job.first_launched_s) <= now:
                self._give_up(job, now, FailureCode.DEADLINE_EXCEEDED)

    def _pump(self, now: float) -> None:
        """Launches what the law admits now, and leaves one timer for the moment at which it will admit the next."""
        self._wake_at = inf
        self.cause = law.NOTHING
        while not self.stopped:
            job = self._first()
            if job is None:
                break
            at, cause = self._law("admission", job.reserve, job.standing, now)
            if at > now:
                self.cause, self._wake_at = cause, at
                if job.attempt > 1:
                    self._wake_at = min(at, law.deadline_at(self.p, job.first_launched_s))
                if not job.asked & (1 << cause):
                    job.asked |= 1 << cause
                    self.observer.deferred(cause)
                break
            self._launch(job, now)
        self._set_timer()
        idle = not self._tasks and not self._backing_off
        if self._send is not None and idle and (self.stopped or self._first() is None):
            self._done.set()

    # ------------------------------------------------------------ an attempt

    def _launch(self, job: Job, now: float) -> None:
        """The law books the attempt, and it is sent or, for a permit, granted."""
        self._taken(job)
        u = 0.5
        if self.p.stagger_s > 0.0 and job.standing == FIRST:
            u = keyed_uniform(self.seed, job.index, attempt_key(job.lane, job.attempt), JITTER_STAGGER)
        self._law("launched", job.reserve, job.standing, now, u)
        job.launched_s = now
        job.waits_s = [reading - before for reading, before in zip(self.clock, job.since, strict=True)]
        if job.first_launched_s < 0.0:
            job.first_launched_s = now
        if self.p.sync_headers:
            job.booked = list(self.s.booked)
        if job.granted is not None:
            if job.granted.cancelled():
                self._law("released")
            else:
                job.granted.set_result(None)
            return
        self.observer.launched(job, now)
        task = self.loop.create_task(self._attempt(job))
        self._tasks.add(task)
        task.add_done_callback(self._task_over)

    def _task_over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A bug of ours: nothing may be launched on a state that nobody can vouch for.
            self.stopped = self.stopped or f"internal error: {task.exception()!r}"
        self._event()

    async def _attempt(self, job: Job) -> None:
        """Sends one attempt and takes its answer, whatever it is."""
        assert self._send is not None
        await self.observer.flushed()
        expires_at = law.expires_at(self.p, job.first_launched_s, job.launched_s)
        answer = await self._send(job, max(0.001, expires_at - self.now()))
        now = self.now()
        self._advance(now)
        self._answered(job, answer, now)
        self._pump(now)

    def _answered(self, job: Job, answer: Answer, now: float) -> None:
        if self.p.sync_headers:
            self._sync(job, answer.limits, 0.0 if answer.outcome not in THROTTLES else 1.0, now)
        if answer.outcome == Outcome.OK:
            self._ok(job, answer, now)
        elif answer.outcome in STOPPING:
            self._law("released")
            self._record(job, answer, now, "")
            self.stopped = self.stopped or STOPPING[answer.outcome]
        elif answer.outcome in FINAL:
            self._law("released")
            self._ended(job, answer, now, SPENT[answer.outcome])
        else:
            self._again(job, answer, now)

    def _sync(self, job: Job, limits: tuple[Limit, ...], refused: float, now: float) -> None:
        """What the headers state about the moment of admission, beside what has been booked since."""
        for limit in limits:
            d = DIMENSIONS[limit.dimension]
            amount = refused * (job.reserve if d in (law.TPM, law.TPD) else 1.0)
            since = self.s.booked[d] - job.booked[d]
            self._law("synced", d, limit.limit, limit.remaining, amount, since, job.launched_s, now)

    def _ok(self, job: Job, answer: Answer, now: float) -> None:
        used = max(0, answer.used_prompt_tokens) + max(0, answer.used_output_tokens)
        known = answer.used_prompt_tokens >= 0
        self._law("settled", job.reserve, float(used) if known else job.reserve, job.launched_s)
        if not (self._finalizes and job.lane == MAIN and answer.cut_off and not answer.has_text):
            self._ended(job, answer, now, "")
            return
        self._record(job, answer, now, "")
        self._law("finalize_opened")
        assert job.work is not None
        last = Job(job.work, job.index, job.work.finalize_reserve, job.expected, now)
        last.lane = FINALIZE
        last.first_launched_s = job.first_launched_s
        self._may_go(last, now)

    def _again(self, job: Job, answer: Answer, now: float) -> None:
        """After a throttle or a failure: try again when the law says so, or never (inf)."""
        u = keyed_uniform(self.seed, job.index, attempt_key(job.lane, job.attempt), JITTER_RETRY)
        wait_s, first = answer.retry_after_s, job.first_launched_s
        if answer.outcome in THROTTLES:
            at = self._law("throttled", job.reserve, job.attempt, wait_s, first, job.launched_s, now, u)
        else:
            at = self._law("failed", job.attempt, wait_s, first, now, u)
        if at == inf:
            spent = job.attempt >= self.p.max_attempts
            self._ended(job, answer, now, SPENT[answer.outcome] if spent else FailureCode.DEADLINE_EXCEEDED)
            return
        self._record(job, answer, now, "")
        job.attempt += 1
        job.standing = law.keeps_permit(self.p)
        job.submitted_s = now
        self._sequence += 1
        heappush(self._backing_off, (at, self._sequence, job))

    def _give_up(self, job: Job, now: float, code: str) -> None:
        """A retry that will not be launched any more."""
        job.ended = True
        if job.standing == law.HOLDING:
            self._law("released")
        self._close(job, None, now, code)

    def _ended(self, job: Job, answer: Answer, now: float, code: str) -> None:
        """The request is over with this attempt: answered ("") or lost."""
        self._record(job, answer, now, code)
        self._close(job, answer, now, code)

    def _close(self, job: Job, answer: Answer | None, now: float, code: str) -> None:
        if job.lane == FINALIZE:
            self._law("finalize_closed")
        assert job.work is not None
        self.observer.ended(job.work.request, code, answer, now)

    def _record(self, job: Job, answer: Answer, now: float, failure: str) -> None:
        assert job.work is not None
        request = job.work.request
        charged = 0 if answer.outcome in UNCHARGED else job.work.charge
        waits = dict(zip(_WAITED, job.waits_s[1:-1], strict=True))
        backoff_s = job.eligible_s - job.submitted_s if job.attempt > 1 else 0.0
        self.observer.attempted(
            Attempt(
                request=request.index,
                custom_id=request.custom_id,
                pool=self.pool,
                model=request.model,
                url=request.url,
                lane=LANES[job.lane],
                attempt=job.attempt,
                submitted_s=job.submitted_s,
                eligible_s=job.eligible_s,
                launched_s=job.launched_s,
                finished_s=now,
                reserved_tokens=int(job.reserve),
                charged_tokens=charged,
                prompt_tokens=answer.used_prompt_tokens,
                output_tokens=answer.used_output_tokens,
                outcome=answer.outcome,
                status=answer.status,
                error_code=failure or answer.error_code,
                retry_after_s=answer.retry_after_s,
                **waits,
                waited_backoff_s=backoff_s,
            ),
            answer,
            failure,
        )


_WAITED = tuple(f"waited_{cause}_s" for cause in CAUSES[1:-1])


class Permit:
    """The right to send one request now. Call `used` with what it really used, if it is known."""

    def __init__(self, job: Job) -> None:
        self.launched_s = job.launched_s
        self.used_tokens = -1.0

    def used(self, tokens: float) -> None:
        """The request is answered and used so many tokens."""
        self.used_tokens = tokens

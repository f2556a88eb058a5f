"""The asyncio driver of the law: the twin of `sim/des/driver.py`, to be read side by side with it.

Theory of operation. New work is pulled from its source one request ahead, so that memory stays flat; retries, finalize
passes and permits wait in a heap, and so does, with its history, what an earlier leg of the run had launched. After
every event (an answer, a retry that has backed off, a wake-up, a change of settings) `_pump` asks the law about the
head, launches as long as the law says "now", and leaves one timer for the moment that it named. Any number of waiting
tasks costs one wake-up each, when it is their turn. One more timer watches for the first answer that is overdue.

Time is the loop's monotonic clock, in seconds since the run began; a timer that rings early counts as its own time
(`max(timer_at, clock)`), so the law's word and the clock cannot disagree. The epoch is only for records.

Every call of the law that reads or changes its state goes through `_law`, which tells the observer name, arguments and
result: decided again in order on a state as it was at the start, each comes out the same, to the bit.

When something raises that must not (a send, an observer, the source), nothing more is launched on a state that nobody
can vouch for; what is in flight is paid for and may end; then `run` raises it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from math import inf
from operator import sub
from typing import Any, cast

from governor import law
from governor.law import FINALIZE, FIRST, HOLDING, MAIN, RETRY, Params, State
from governor.model.errors import FailureCode, PacelineError, Refused
from governor.model.keyed import JITTER_RETRY, JITTER_STAGGER, attempt_key, keyed_uniform
from governor.model.policy import Policy
from governor.model.pools import check_own_quota
from governor.model.requests import CAUSES, Answer, Limit, Outcome, Request
from governor.model.work import (
    DIMENSIONS,
    FINAL,
    SPENT,
    STOPPING,
    THROTTLES,
    TIMED_OUT,
    TURNED_AWAY,
    Begun,
    Job,
    Observer,
    Send,
    Work,
    attempt_of,
)
from governor.model.work import PoolState as PoolState
from governor.scheduler.learning import Learner
from governor.scheduler.refusals import Refusals

# Heap entries. In the calendar: when, sequence, whether it is a deadline (else a retry that has backed off), job and
# how often it had been launched by then.
Entry = tuple[tuple[float, ...], int, Job]
Moment = tuple[float, int, bool, Job, int]
_LAW = vars(law)
# From this length on, heaps are swept now and then of what is over but not yet at their top.
SWEEP = 100


class NoLoop:
    """Stands in for the event loop of a governor that is not used in one yet: time does not pass."""

    def time(self) -> float:
        """0."""
        return 0.0

    def is_running(self) -> bool:
        """No."""
        return False

    def is_closed(self) -> bool:
        """As one that is over: nothing can be called in it."""
        return True


class Governor:
    """One pool's quota: a queue, the law's state and one timer.

    It may be made anywhere, and works in the event loop that it is used in: one after the other in several
    (`asyncio.run` twice), where bookings go on ageing between them, but never in two at once.

    `params`: the settings (kept as `policy`), or the numbers that they mean to the law.

    `permit` serves a program's own calls, `run` a whole batch; both at once share the quota, permits first. `state`
    and `start_s` continue an earlier run, at so many seconds since that began, with nothing in flight. `day_*_used`:
    what was used of the daily limits before. `learner`: estimates what waits at the head anew. `own_quota`: not
    shared, even if PACELINE_REDIS_URL is set (BadSetting without it: see `sharing`). `stopped`: why nothing
    is launched any more, "" while it is. `cause`: the law's reason for which the head of the queue waits right now.
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
    ) -> None:
        if type(self) is Governor and not own_quota:
            check_own_quota(os.environ)
        self.policy = params if isinstance(params, Policy) else None
        self.p = params.params() if isinstance(params, Policy) else params
        self.learner = learner
        self.s = state or State()
        self.seed = seed
        self.pool = pool
        self.observer = observer or Observer()
        self.loop: asyncio.AbstractEventLoop
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            self.loop = cast(asyncio.AbstractEventLoop, NoLoop())  # until it is used in one
        self.zero = self.loop.time() - start_s
        self.zero_epoch = time.time() - start_s
        self.portal: object = None  # see `portal.portal_to`
        self.stopped = ""
        self.clock = [0.0] * len(CAUSES)
        self.clock_at = start_s
        self.cause = law.NOTHING
        self.wake_at = inf
        self._tells = self.observer.hears_decisions
        self._shows = type(self.observer).attempted is not Observer.attempted
        self._queue: list[Entry] = []  # permits, and retries and finalize passes that may go
        self._calendar: list[Moment] = []
        self._queue_sweep = self._calendar_sweep = SWEEP
        self._head: Job | None = None  # new work
        self._source: Iterator[Work] = iter(())
        self._begun: tuple[float, list[float]] = start_s, self.clock
        self._sequence = 0
        self._unfinished = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self.late_s = -1.0  # by how much the timer that let the next launch out was late, -1 = none did
        self._tasks: dict[asyncio.Task[None], Job] = {}
        self._permitted: set[Job] = set()  # granted to permits that have not ended
        self._expiring: list[tuple[float, int, asyncio.Task[None]]] = []
        self._expiring_sweep = SWEEP
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._send: Send | None = None
        self._finalizes = False
        self._refusals: Refusals | None = None
        self._aside: list[tuple[Job, Answer, float, FailureCode]] = []  # lost, unless all others meet the same
        self._done: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        if day_tokens_used > 0.0 or day_requests_used > 0.0:
            self._law("day_started", day_tokens_used, day_requests_used, start_s)
        self.observer.began(self)

    # ------------------------------------------------------------ from outside

    def observe(self, observer: Observer) -> None:
        """Tells that observer from now on, in the place of the one before (see `Together`)."""
        self.observer = observer
        self._tells = observer.hears_decisions
        self._shows = type(observer).attempted is not Observer.attempted

    def permit(
        self,
        reserve: float,
        *,
        expected: float = -1.0,
        charge: int = -1,
        request: Request | None = None,
        max_wait_s: float = inf,
    ) -> Permit:
        """`async with governor.permit(tokens) as permit:` waits until a request that reserves so many may be sent.

        `expected`: its declared output cap, for the order of launches. `max_wait_s`: Refused, if it may not be sent
        within so many seconds. `request`, `charge`: what observers are told about each attempt, and without which they
        are not. Raises PacelineError for what can never be sent, and where the pool has stopped.
        """
        if not reserve >= 0.0:
            raise PacelineError(f"a request of {reserve} tokens: reserve a number of tokens from 0 up")
        if law.never_fits(self.p, reserve):
            raise PacelineError(self._too_large(reserve))
        if request is not None and self.learner is not None:
            kind, prompt_tokens = kind_of(request)
            found = self.learner.estimate(kind, prompt_tokens, reserve)
            reserve = reserve if law.never_fits(self.p, found) else found
        self._sequence += 1
        return Permit(self, Job(None, self._sequence, reserve, expected, charge, 0.0), request, max_wait_s)

    def try_permit(self, reserve: float, *, expected: float = -1.0) -> Permit | None:
        """A permit that is granted already, where the request may be sent right now; None where it would have to wait.

        Enter it (`async with`) at once: it holds its place from here on. Raises as `permit` does.
        """
        permit = self.permit(reserve, expected=expected)
        self._bind()
        granted = self._asks(permit._job)
        if not granted.done():
            self._dropped(permit._job)
            self._event()
            return None
        granted.result()
        return permit

    async def run(
        self, source: Iterator[Work], send: Send, *, finalize: bool = False, refusals: Refusals | None = None
    ) -> str:
        """Runs all work of the source, in its order; returns "" or why it stopped before the end: see `stopped`.

        What was launched before comes first in the source: attempts go on counting, deadlines go on running, and an
        open finalize pass is opened again.

        `finalize`: a cut answer without text gets one more call. `refusals`: notices where all requests are refused
        alike; without it each refusal ends its own. Where it stops, what waits stays where it came from,
        unended. Cancelling this cancels what is in flight. What a send, the observer or the source raises is raised
        here, when all that was in flight has ended.
        """
        self._bind()
        assert self._send is None, "one batch at a time"
        self._source, self._send, self._finalizes, self._refusals = source, send, finalize, refusals
        now = self._event()
        self._begun = now, self.clock.copy()
        self._head = self._next()
        self._done = self.loop.create_future()
        try:
            self._event()
            await self._done
        finally:
            await self._close_down()
        if self._error is not None:
            raise self._error
        return self.stopped

    def stop(self, why: str) -> None:
        """Launches nothing more; what is in flight goes on, who waits for a permit gets an error. `why`: not empty."""
        self.stopped = self.stopped or why
        for job in self._waiting():
            if job.granted is not None and not job.granted.done():
                job.granted.set_exception(Refused(self._no_more()))
        self._soon()

    def more(self) -> None:
        """The source of `run`, which had said that there is no more, has more. Nothing happens where no run goes on."""
        if self._done is not None and not self._done.done() and self._head is None:
            self._head = self._next()
            self._soon()

    def mark(self) -> Begun:
        """This moment, for work that is submitted now and launched later (`Work.begun`)."""
        now = self.now()
        self._advance(now)
        return now, self.clock.copy()

    def withdraw(self, is_meant: Callable[[Request], bool]) -> int:
        """Takes out of the queue what waits and is meant, unended; returns how many. What is in flight goes on.

        The source must have stopped giving it before. What holds a place in flight while it backs off gives it back.
        """
        self._advance(self.now())
        waiting = [*self._waiting(), *(each[0] for each in self._aside)]
        found = [job for job in waiting if job.work is not None and is_meant(job.work.request)]
        self._aside = [each for each in self._aside if each[0] not in found]
        for job in found:
            self._dropped(job)
        count = len(found)
        while self._head is not None and self._head.work is not None and is_meant(self._head.work.request):
            self._unfinished -= 1
            count += 1
            self._head = self._next()
        self._unfinished -= len(found)
        self._soon()
        return count

    def reopen(self) -> None:
        """Launches again after `stop`, in the next `run`."""
        assert self._send is None, "a batch is still running"
        self.stopped = ""

    def pause(self) -> None:
        """Launches nothing until `resume`."""
        self._law("paused")
        self._soon()

    def resume(self) -> None:
        """Goes on after `pause`."""
        self._law("resumed")
        self._soon()

    def reprice(self, params: Params) -> None:
        """Takes changed settings over in mid-run. What was submitted before keeps its place in the queue."""
        now = self.now()
        self._advance(now)
        law.repriced(self.p, params, self.s, now)
        if self._tells:
            self._tell(self.observer.decided, "repriced", (params, now), None)
        deadline_moves = params.deadline_s != self.p.deadline_s
        self.p = params
        # Only then: who backs off is given a moment when its backoff ends, and at one instant the order counts.
        for job in self._waiting() if deadline_moves else ():
            self._watch_deadline(job)
        self._soon()

    def now(self) -> float:
        """Seconds since the run began; never less than any time already acted upon."""
        return max(self.loop.time() - self.zero, self.clock_at)

    def next_launch_at(self) -> float:
        """When anything can be launched at the earliest; -inf = at any moment, or as soon as something else happens.

        What is in flight may change that by its answer, but for a hold.
        """
        if self.stopped or self.s.paused or (self._tasks and self.cause != law.HOLD):
            return -inf
        if self.cause == law.HOLD:
            return self.wake_at
        at = min(self.wake_at, max(self.backing_off()[0], self.s.hold_until))
        return at if at < inf else -inf

    def backing_off(self) -> tuple[float, float]:
        """When the first and the last of those that back off may be tried again; (inf, -inf) where nobody does."""
        ends = [when for when, _, is_deadline, job, attempt in self._calendar if not is_deadline and not job.ended]
        return min(ends, default=inf), max(ends, default=-inf)

    async def aclose(self) -> None:
        """Gives back what this process holds of a quota that it shares (`shared`); nothing where it is its own."""

    @property
    def may_move(self) -> bool:
        """Whether another event loop may take over: nothing waits, and nothing is in flight."""
        return not (self._tasks or self._permitted or self._waiting() or self._send)

    @property
    def in_flight(self) -> int:
        """Permits taken: requests that are being sent, and those that back off where the policy keeps their place."""
        return self.s.in_flight

    @property
    def sending(self) -> int:
        """Requests of `run` that are being sent right now."""
        return len(self._tasks)

    @property
    def next_slot_at(self) -> float:
        """When the stagger allows the next launch, seconds since the run began; -inf before the first launch."""
        return self.s.next_slot_at

    @property
    def next_slot_epoch(self) -> float:
        """The same in seconds since 1970; 0 before the first launch."""
        return self.zero_epoch + self.s.next_slot_at if self.s.next_slot_at > -inf else 0.0

    # ------------------------------------------------------------ permits

    async def _granted(self, job: Job, retry_at: float = -inf, max_wait_s: float = inf) -> bool:
        """Returns when a permit's job may be sent (again): True, or False where its time is over before that."""
        self._bind()
        granted = self._asks(job, retry_at)
        patience = self.loop.call_later(max_wait_s, self._too_long, granted, max_wait_s) if max_wait_s < inf else None
        try:
            return await granted
        except BaseException:
            # Cancelled, perhaps in the very moment of the grant; or told that there is nothing more to wait for.
            self._dropped(job)
            self._event()
            raise
        finally:
            if patience is not None:
                patience.cancel()

    def _asks(self, job: Job, retry_at: float = -inf) -> asyncio.Future[bool]:
        """The permit's job waits from now on; what it waits for."""
        if self.stopped:
            self._dropped(job)
            raise Refused(self._no_more())
        now = self.now()
        self._advance(now)
        job.submitted_s = now
        job.granted = self.loop.create_future()
        if retry_at > -inf:
            self._at(retry_at, False, job)
        else:
            self._may_go(job, now)
        self._pump(now)
        return job.granted

    def _too_long(self, granted: asyncio.Future[bool], max_wait_s: float) -> None:
        if not granted.done():
            text = f"pool '{self.pool}' cannot send a request within {max_wait_s:g} s: answer that it is busy, or wait"
            granted.set_exception(Refused(text, max_wait_s))

    def _given_back(self, job: Job, used: float, limits: tuple[Limit, ...], outcome: Outcome | None = None) -> None:
        """The permit's request is over, and used so many tokens (-1 = unknown: the reservation stays booked).

        `outcome`: of its answer, None where none is known of.
        """
        now = self.now()
        self._advance(now)
        job.flying = job.holds = False
        self._permitted.discard(job)
        if used >= 0.0:
            self._law("settled", job.reserve, used, job.launched_s, now)
        else:
            self._law("released")
            if outcome is not None:
                self._law("answered", now)
        self._sync(job, limits, outcome in TURNED_AWAY, now)
        if law.answer_may_admit(self.p, self.cause):
            self._pump(now)

    async def _heard(self, job: Job, request: Request | None, answer: Answer) -> bool:
        """The answer to a permit's attempt: whether it may be sent again, which is then waited for."""
        at, failure = self._learnt(job, request, answer, is_last=False)
        if at < inf:
            if await self._granted(job, at):
                return True
            failure = FailureCode.DEADLINE_EXCEEDED
        if request is not None:
            self._tell(self.observer.ended, request, failure, answer, self.now())
        return False

    def _heard_last(self, job: Job, request: Request | None, answer: Answer) -> None:
        """The answer to a permit's attempt, after which there is no other, whatever it says."""
        _, failure = self._learnt(job, request, answer, is_last=True)
        if request is not None:
            self._tell(self.observer.ended, request, failure, answer, self.now())

    def _learnt(self, job: Job, request: Request | None, answer: Answer, *, is_last: bool) -> tuple[float, str]:
        """When a permit's request may be tried again after that answer (inf = never), and its failure if not."""
        outcome = answer.outcome
        row = None
        if request is not None and self._shows:
            row = attempt_of(job, self.pool, answer, self.now(), "", request)
        at, failure = inf, ""
        if outcome == Outcome.OK or outcome in FINAL or outcome in STOPPING:
            known = outcome == Outcome.OK and min(answer.used_prompt_tokens, answer.used_output_tokens) >= 0
            used = float(answer.used_prompt_tokens + answer.used_output_tokens) if known else -1.0
            if known and request is not None and self.learner is not None:
                kind, prompt_tokens = kind_of(request)
                self.learner.saw(kind, prompt_tokens, used)
            self._given_back(job, used, answer.limits, outcome)
            if outcome != Outcome.OK:
                failure = STOPPING.get(outcome) or SPENT[outcome]
        else:
            spent = is_last or law.is_spent(self.p, job.attempt, answer.retry_after_s)
            at = self._missed(job, outcome, answer.retry_after_s, answer.limits, answer.status)
            if is_last and at < inf:
                at = inf
                self._dropped(job)
                self._event()
            if at == inf:
                lost = SPENT.get(outcome, FailureCode.CONNECTION_DROPPED)
                failure = lost if spent else FailureCode.DEADLINE_EXCEEDED
        if row is not None:
            self._tell(self.observer.attempted, row, answer, failure)
        return at, failure

    async def _once_more(self, job: Job, outcome: Outcome, retry_after_s: float, limits: tuple[Limit, ...]) -> bool:
        """The permit's request failed so: waits until it may be sent again, or says that its attempts are spent."""
        at = self._missed(job, outcome, retry_after_s, limits)
        return at < inf and await self._granted(job, at)

    def _missed(
        self, job: Job, outcome: Outcome, retry_after_s: float, limits: tuple[Limit, ...], status: int = 0
    ) -> float:
        """When the permit's request, which failed so, may be tried again; inf = never."""
        now = self.now()
        self._advance(now)
        self._permitted.discard(job)
        self._sync(job, limits, outcome in TURNED_AWAY, now)
        at = self._retry_at(job, outcome, retry_after_s, now, status)
        if at == inf:
            self._pump(now)
        return at

    def _too_large(self, reserve: float) -> str:
        limit = min(limit for limit in (self.p.limit[law.TPM], self.p.limit[law.TPD]) if limit > 0.0)
        return (
            f"a request of {reserve:,.0f} tokens never fits: pool '{self.pool}' is limited to {limit:,.0f}: shorten "
            "it, or raise OPENAI_TPM_LIMIT (OPENAI_TPD_LIMIT where that is the smaller one)"
        )

    def _no_more(self) -> str:
        return f"pool '{self.pool}' launches nothing more: {self.stopped}"

    # ------------------------------------------------------------ the queue

    def _next(self) -> Job | None:
        """The next new work, from its source. What an earlier leg had launched is taken up on the way."""
        while True:
            try:
                work = next(self._source, None)
            except Exception as error:
                self._fail(error)
                return None
            if work is None:
                return None
            self._unfinished += 1
            if work.first_launched_s >= 0.0:
                self._take_up(work)
                continue
            begun = work.begun or self._begun
            job = Job(work, work.request.index, work.reserve, work.expected, work.charge, begun[0])
            job.since = begun[1]
            return job

    def _take_up(self, work: Work) -> None:
        """A request that was launched before goes on where it stood; its place in flight is gone."""
        reserve, charge = work.reserve, work.charge
        if work.lane == FINALIZE:
            reserve, charge = work.finalize_reserve, work.finalize_charge
            self._law("finalize_opened")
        begun = work.begun or self._begun
        job = Job(work, work.request.index, reserve, work.expected, charge, begun[0])
        job.lane, job.attempt, job.first_launched_s = work.lane, work.attempt, work.first_launched_s
        job.tries = work.attempt - 1
        if job.attempt > 1:
            job.standing = RETRY
        if work.retry_at_s > self.clock_at:
            self._at(work.retry_at_s, False, job)
        else:
            self._may_go(job, self.clock_at)
        self._watch_deadline(job)

    def _may_go(self, job: Job, now: float) -> None:
        """The job becomes eligible: from now on its waiting is counted."""
        job.eligible_s = now
        job.asked = 0
        job.since = self.clock.copy()
        self._sequence += 1
        key = law.rank(self.p, job.lane, job.attempt, job.expected, job.reserve, float(self._sequence), job.standing)
        if len(self._queue) > self._queue_sweep:
            self._queue_sweep = _swept(self._queue, lambda entry: _gone(entry[2]))
        heappush(self._queue, (key, self._sequence, job))

    def _first(self) -> Job | None:
        queue = self._queue
        while queue:
            if not _gone(queue[0][2]):
                return queue[0][2]
            heappop(queue)
        return self._head

    def _taken(self, job: Job) -> None:
        """Removes the head from its queue."""
        if job is self._head:
            self._head = self._next()
        else:
            heappop(self._queue)

    def _waiting(self) -> list[Job]:
        """All that wait for their launch or for the end of a backoff, but for the head of new work."""
        backing_off = [job for _, _, is_deadline, job, _ in self._calendar if not is_deadline]
        return [job for _, _, job in self._queue if not job.ended] + [job for job in backing_off if not job.ended]

    # ------------------------------------------------------------ time

    def _law(self, name: str, *arguments: Any) -> Any:
        """The law decides, and the observer is told."""
        result = _LAW[name](self.p, self.s, *arguments)
        if self._tells:
            self._tell(self.observer.decided, name, arguments, result)
        return result

    def _tell(self, report: Callable[..., None], *arguments: Any) -> bool:
        """Reports to the observer. If that fails the run ends, but who reports goes on: nothing is left half done."""
        try:
            report(*arguments)
        except Exception as error:
            self._fail(error)
            return False
        return True

    def _advance(self, now: float) -> None:
        """Time has passed until `now`, under the cause that has held since the last event."""
        passed = now - self.clock_at
        if passed > 0.0:
            self.clock[self.cause] += passed
            self.clock_at = now

    def _event(self) -> float:
        """Something has changed: look at the head again."""
        now = self.now()
        self._advance(now)
        self._pump(now)
        return now

    def _soon(self) -> None:
        """The same for what may be asked from anywhere, even by an observer in the middle of a launch."""
        if not self.loop.is_closed():  # whoever uses it next looks anyway
            self.loop.call_soon(self._guarded, self._event)

    def _bind(self) -> None:
        """From now on in the loop that runs: the first, or another after the one before has ended."""
        before, running = self.loop, asyncio.get_running_loop()
        if running is before:
            return
        if before.is_running() or (not before.is_closed() and (self._tasks or self._waiting())):
            raise PacelineError(
                f"the governor of pool '{self.pool}' is at work in another event loop: use it in that one, or make one "
                "for each loop with a share of the quota"
            )
        now = self.now()
        self.loop, self.zero = running, running.time() - now
        self.zero_epoch = time.time() - now
        # What the loop before it left behind will never be called again.
        self._timer, self._timer_at, self._expiry_timer = None, inf, None
        self._expiring.clear()
        left = [*self._tasks.values(), *self._permitted, *self._waiting()]
        self._tasks.clear()
        for job in left:
            self._dropped(job)

    def _pump(self, now: float) -> None:
        """Launches what the law admits now, and leaves one timer for the moment at which it will admit the next."""
        self.wake_at = inf
        self.cause = law.NOTHING
        while not self.stopped:
            job = self._first()
            if job is None:
                break
            if self.learner is not None:
                self._estimate(job)
            if law.never_fits(self.p, job.reserve):
                self._taken(job)
                self._give_up(job, now, FailureCode.REQUEST_TOO_LARGE)
                continue
            at, cause = self._law("admission", job.reserve, job.standing, now)
            if at > now:
                self.cause, self.wake_at = cause, at
                bit = 1 << cause
                if not job.asked & bit:
                    job.asked |= bit
                    self._tell(self.observer.deferred, cause)
                break
            if job.first_launched_s >= 0.0 and law.deadline_at(self.p, job.first_launched_s) <= now:
                self._taken(job)
                self._give_up(job, now, FailureCode.DEADLINE_EXCEEDED)
                continue
            self._launch(job, now)
        self._set_timer()
        self._look_if_done()

    def _estimate(self, job: Job) -> None:
        """What to reserve for the head, by what is known now; as declared where more than that would never fit."""
        if self.learner is None or job.work is None or job.lane != MAIN:
            return
        kind, prompt_tokens = kind_of(job.work.request)
        found = self.learner.estimate(kind, prompt_tokens, job.work.reserve)
        job.reserve = job.work.reserve if law.never_fits(self.p, found) else found

    def _set_timer(self) -> None:
        """One live timer: for the head, for the next retry, or for the next deadline, whichever is first."""
        calendar = self._calendar
        while calendar and _stale(calendar[0]):
            heappop(calendar)
        at = inf if self.stopped else min(self.wake_at, calendar[0][0] if calendar else inf)
        if at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.loop.call_at(self.zero + at, self._ring) if at < inf else None

    def _ring(self) -> None:
        self._guarded(self._rung)

    def _rung(self) -> None:
        """The timer: what is due happens in order of time, else the head's moment has come."""
        timer_at = self._timer_at
        now = max(timer_at, self.now())
        self._timer, self._timer_at = None, inf
        self._advance(now)
        due = self._calendar
        waked = True
        while due and due[0][0] <= now:
            moment = heappop(due)
            if _stale(moment):
                continue
            waked = False
            _, _, is_deadline, job, _ = moment
            if is_deadline:
                self._on_deadline(job, now)
            else:
                self._may_go(job, now)
                self._watch_deadline(job)
            self._pump(now)
        if waked:
            self.late_s = now - timer_at
            self._pump(now)
            self.late_s = -1.0

    def _watch_deadline(self, job: Job) -> None:
        """A request that was launched before is given up at its deadline, should it still wait then."""
        if job.first_launched_s < 0.0:
            return
        gives_up_at = law.deadline_at(self.p, job.first_launched_s)
        if gives_up_at < inf:
            self._at(gives_up_at, True, job)

    def _on_deadline(self, job: Job, now: float) -> None:
        # Not if changed settings have put it off: those set a moment of their own.
        if law.deadline_at(self.p, job.first_launched_s) <= now:
            self._give_up(job, now, FailureCode.DEADLINE_EXCEEDED)

    def _at(self, when: float, is_deadline: bool, job: Job) -> None:
        """Enters a job's deadline, or the end of its backoff, into the calendar."""
        self._sequence += 1
        if not is_deadline:
            job.eligible_s = when
        if len(self._calendar) > self._calendar_sweep:
            self._calendar_sweep = _swept(self._calendar, _stale)
        heappush(self._calendar, (when, self._sequence, is_deadline, job, job.tries))

    # ------------------------------------------------------------ an attempt

    def _launch(self, job: Job, now: float) -> None:
        """The law books the attempt, and it is sent or, for a permit, granted."""
        self._taken(job)
        self._law("launched", job.reserve, job.standing, now, self._jitter_u(job))
        self._off(job, now, self.s.booked_before.copy() if self.p.sync_headers else [])
        self.late_s = -1.0

    def _jitter_u(self, job: Job) -> float:
        """The uniform number that moves the next launch slot."""
        if self.p.stagger_s > 0.0 and job.standing == FIRST:
            return keyed_uniform(self.seed, job.index, attempt_key(job.lane, job.tries + 1), JITTER_STAGGER)
        return 0.5

    def _off(self, job: Job, now: float, booked: list[float]) -> None:
        """The attempt is booked: it goes out. `booked`: what had been booked before, for counts of the provider."""
        job.flying = job.holds = True
        job.expired = False
        if job.failed_s >= 0.0:
            self._spare(job)
        job.tries += 1
        job.launched_s = now
        if job.first_launched_s < 0.0:
            job.first_launched_s = now
        job.booked = booked
        if self._shows:
            job.waits_s = self._waited(job)
        if job.granted is not None:
            self._permitted.add(job)
            job.granted.set_result(True)
            return
        if not self._tell(self.observer.launched, job, now):
            self._dropped(job)  # never send what no record knows of
            return
        assert self._send is not None
        task = self.loop.create_task(self._attempt(job, self._send))
        self._tasks[task] = job
        task.add_done_callback(self._task_over)

    def _spare(self, job: Job) -> None:
        """Its last attempt failed; if that was in an outage, as far as is known by now, it does not count."""
        outages = self._spared(job)
        if outages >= 0:
            job.outages = outages
            job.attempt -= 1
        job.failed_s = -1.0

    def _spared(self, job: Job) -> int:
        return law.spared(self.p, self.s, job.outages, job.launched_s, job.failed_s)

    @property
    def _breaker(self) -> State:
        """The state that knows of the circuit breaker."""
        return self.s

    def _waited(self, job: Job) -> list[float]:
        """How long the job has waited since it became eligible, by cause."""
        return list(map(sub, self.clock, job.since))

    async def _attempt(self, job: Job, send: Send) -> None:
        """Sends one attempt and takes its answer, whatever it is."""
        await self.observer.flushed()
        task = asyncio.current_task()
        assert task is not None
        # From now on: to record the launch may have taken long, if the disk was full.
        expires_at = law.expires_at(self.p, job.first_launched_s, self.now())
        self._watch_expiry(expires_at, task)
        try:
            answer = await send(job, max(0.0, expires_at - self.now()))
        except asyncio.CancelledError:
            if not job.expired or task.cancelling() > 1:
                raise  # by somebody else (too)
            answer = TIMED_OUT
        if job.expired:
            task.uncancel()
        now = self.now()
        self._advance(now)
        in_wait = self.cause
        self._answered(job, answer, now)
        waited_on = law.answer_may_admit(self.p, in_wait) or self.learner is not None
        if answer.outcome != Outcome.OK or waited_on or self._queue:
            self._pump(now)

    def _watch_expiry(self, at: float, task: asyncio.Task[None]) -> None:
        """Cancels an attempt's task then, should it still run. (`asyncio.timeout_at` costs more than an admission.)"""
        expiring = self._expiring
        if len(expiring) > self._expiring_sweep:
            self._expiring_sweep = _swept(expiring, lambda entry: entry[2] not in self._tasks)
        self._sequence += 1
        heappush(expiring, (at, self._sequence, task))
        if expiring[0][2] is task:
            self._set_expiry_timer()

    def _set_expiry_timer(self) -> None:
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        at = self._expiring[0][0] if self._expiring else inf
        self._expiry_timer = self.loop.call_at(self.zero + at, self._expire, at) if at < inf else None

    def _expire(self, now: float) -> None:
        """Whose time is over is cancelled; whose attempt has ended before is forgotten."""
        expiring = self._expiring
        while expiring and (expiring[0][0] <= now or expiring[0][2] not in self._tasks):
            task = heappop(expiring)[2]
            if task in self._tasks:
                self._tasks[task].expired = True
                task.cancel()
        self._set_expiry_timer()

    def _task_over(self, task: asyncio.Task[None]) -> None:
        job = self._tasks.pop(task)
        if not self._tasks:
            self._expiring.clear()
            self._set_expiry_timer()
        if job.flying:
            self._dropped(job)
        if not task.cancelled():
            error = task.exception()
        elif self._send is None:
            error = None  # we did that ourselves
        else:
            error = PacelineError(f"sending request {job.index} was cancelled by something inside it")
        if error is not None:
            self._fail(error)
        self._look_if_done()

    def _answered(self, job: Job, answer: Answer, now: float) -> None:
        outcome = answer.outcome
        if outcome == Outcome.OK:
            self._ok(job, answer, now)
            return
        self._sync(job, answer.limits, outcome in TURNED_AWAY, now)
        if outcome in STOPPING:
            self._law("answered", now)
            self._dropped(job)
            self._suspend(job, answer, now)
            self.stop(STOPPING[outcome])
        elif outcome in FINAL:
            job.flying = job.holds = False
            self._law("released")
            self._law("answered", now)
            self._lost(job, answer, now, SPENT[outcome])
        else:
            self._again(job, answer, now)

    def _sync(self, job: Job, limits: tuple[Limit, ...], turned_away: bool, now: float) -> None:
        """What the headers state, beside what has been booked since the launch."""
        if not (limits and self.p.sync_headers and job.booked):
            return
        for limit in limits:
            d = DIMENSIONS[limit.dimension]
            amount = job.reserve if d in (law.TPM, law.TPD) else 1.0
            since = self._booked_since(job, d)
            stated = d, limit.limit, limit.remaining
            self._law("synced", *stated, amount, int(turned_away), since, job.launched_s, now)

    def _booked_since(self, job: Job, d: int) -> float:
        """What has been booked in a dimension since before the job's launch."""
        return self.s.booked[d] - job.booked[d]

    def _ok(self, job: Job, answer: Answer, now: float) -> None:
        used = job.reserve
        if answer.used_prompt_tokens >= 0 and answer.used_output_tokens >= 0:
            used = float(answer.used_prompt_tokens + answer.used_output_tokens)
            if self.learner is not None and job.work is not None and job.lane == MAIN:
                kind, prompt_tokens = kind_of(job.work.request)
                self.learner.saw(kind, prompt_tokens, used)
        job.flying = job.holds = False
        self._law("settled", job.reserve, used, job.launched_s, now)
        if self._refusals is not None:
            self._refusals.succeeded()
        if not self.stopped:
            self._end_aside()
        self._sync(job, answer.limits, False, now)
        assert job.work is not None
        finalizes = self._finalizes and job.work.finalizes
        if finalizes and job.lane == MAIN and answer.cut_off and not answer.has_text:
            self._open_finalize(job, answer, now)
        else:
            self._ended(job, answer, now, "")

    def _open_finalize(self, job: Job, answer: Answer, now: float) -> None:
        """The answer was cut off and has no usable text: one more call, before new work."""
        self._record(job, answer, now, "")
        self._law("finalize_opened")
        work = job.work
        assert work is not None
        last = Job(work, job.index, work.finalize_reserve, job.expected, work.finalize_charge, now)
        last.lane = FINALIZE
        last.first_launched_s = job.first_launched_s
        self._may_go(last, now)
        self._watch_deadline(last)

    def _again(self, job: Job, answer: Answer, now: float) -> None:
        """After a throttle or a failure: try again when the law says so, or never (inf)."""
        spent = law.is_spent(self.p, job.attempt, answer.retry_after_s) and answer.outcome is not Outcome.LOCAL
        row = attempt_of(job, self.pool, answer, now, "") if self._shows else None
        at = self._retry_at(job, answer.outcome, answer.retry_after_s, now, answer.status)
        if at == inf:
            self._lost(job, answer, now, SPENT[answer.outcome] if spent else FailureCode.DEADLINE_EXCEEDED)
            if law.is_shut_out(self.s):
                self.stop(FailureCode.OUTWAITED)
            return
        if self._refusals is not None and job.work is not None and self._refusals.may_concern_all(answer):
            self._refusals.refused(job.work.request, answer)
        job.submitted_s = now
        self._at(at, False, job)
        if row is not None:
            self._tell(self.observer.attempted, row, answer, "")
            self._tell(self.observer.backed_off, row, answer, at, job.attempt)

    def _retry_at(self, job: Job, outcome: Outcome, retry_after_s: float, now: float, status: int = 0) -> float:
        """When the law lets the job try again, inf = never; readies it for that."""
        u = keyed_uniform(self.seed, job.index, attempt_key(job.lane, job.tries), JITTER_RETRY)
        first, last = job.first_launched_s, job.launched_s
        at: float
        if outcome in THROTTLES:
            at = self._law("throttled", job.reserve, job.attempt, retry_after_s, first, last, now, u)
            standing = law.keeps_permit(self.p)
        else:
            is_answer = int(400 <= status < 500)
            # What this machine could not send is no attempt: 0 is never the last one.
            counted = int(outcome is not Outcome.LOCAL)
            history = job.index, job.attempt * counted, job.outages, is_answer
            at, standing = self._law("failed", *history, retry_after_s, first, last, now, u)
            job.failed_s = now if counted and not is_answer else -1.0
            job.attempt -= 1 - counted
        job.flying = False
        job.holds = at < inf and standing == HOLDING
        if at < inf:
            job.attempt += 1
            job.standing = standing
            if job.failed_s >= 0.0 and self._breaker.probe_at > -inf:
                self._spare(job)
        return at

    # ------------------------------------------------------------ the end of a request, and of a run

    def _give_up(self, job: Job, now: float, code: str) -> None:
        """A job that will not be launched any more."""
        job.ended = True
        if job.holds:
            job.holds = False
            self._law("released")
        if job.granted is None:
            self._close(job, None, now, code)
        elif code == FailureCode.REQUEST_TOO_LARGE:
            job.granted.set_exception(PacelineError(self._too_large(job.reserve)))
        else:
            job.granted.set_result(False)

    def _ended(self, job: Job, answer: Answer, now: float, code: str) -> None:
        """The request is over with this attempt: answered ("") or lost."""
        self._record(job, answer, now, code)
        self._close(job, answer, now, code)

    def _lost(self, job: Job, answer: Answer, now: float, code: FailureCode) -> None:
        """The request is over without an answer; or set aside, as long as all the others may meet the same."""
        refusals = self._refusals
        in_doubt = refusals is not None and refusals.may_concern_all(answer)
        outwaited = answer.outcome in THROTTLES and law.outlasts(self.p, answer.retry_after_s)
        # A finalize pass is over at once: while it is open, the lower cap holds for all others.
        if job.lane == FINALIZE or not (in_doubt or outwaited):
            self._ended(job, answer, now, code)
            return
        assert job.work is not None
        self._suspend(job, answer, now, code)
        self._aside.append((job, answer, now, code))
        if in_doubt and refusals is not None:
            refusals.refused(job.work.request, answer)

    def _end_aside(self) -> None:
        """It is known that what was refused is at fault itself: it ended when it was refused."""
        aside, self._aside = self._aside, []
        for job, answer, at, code in aside:
            self._close(job, answer, at, code)

    def _suspend(self, job: Job, answer: Answer, now: float, code: str = "") -> None:
        """The attempt is over, and its request as if it had not been made. `code`: what it is lost with if it is."""
        if self._shows:
            row = attempt_of(job, self.pool, answer, now, code)
            self._tell(self.observer.attempted, row, answer, "")
            self._tell(self.observer.suspended, row, answer)

    def _close(self, job: Job, answer: Answer | None, now: float, code: str) -> None:
        if job.lane == FINALIZE:
            self._law("finalize_closed")
        self._unfinished -= 1
        assert job.work is not None
        self._tell(self.observer.ended, job.work.request, code, answer, now)

    def _dropped(self, job: Job) -> None:
        """Neither answered nor lost: the job gives back what it holds, and its request stays pending."""
        job.ended = True
        job.flying = False
        self._permitted.discard(job)
        if job.holds:
            job.holds = False
            self._law("released")
        if job.lane == FINALIZE:
            self._law("finalize_closed")

    def _look_if_done(self) -> None:
        done = self._done
        if self._aside and not self._tasks and not self.stopped and len(self._aside) == self._unfinished:
            self._end_aside()  # too few to be sure, and nothing else is left
        if done is not None and not self._tasks and (self.stopped or not self._unfinished) and not done.done():
            done.set_result(None)

    def _fail(self, error: BaseException) -> None:
        """Somebody's bug, or a disk that is full: the run ends when what is in flight has ended, and raises."""
        self._error = self._error or error
        self.stop(str(error) if isinstance(error, PacelineError) else f"internal error: {error!r}")

    def _guarded(self, happens: Callable[[], Any]) -> None:
        """A callback of the loop, where nobody would hear of a bug of ours. The run ends at once, and raises it."""
        try:
            happens()
        except Exception as error:
            if self._error is None:
                self._fail(error)
            if self._done is not None and not self._done.done():
                self._done.set_result(None)

    async def _close_down(self) -> None:
        """Whatever the run leaves behind gives back what it holds."""
        self._send = self._done = None
        self._source, self._head, self._unfinished = iter(()), None, 0
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            aside, self._aside = self._aside, []
            for job in [*self._waiting(), *(each[0] for each in aside)]:
                if job.work is not None:
                    self._dropped(job)
            self._guarded(self._event)

    def _record(self, job: Job, answer: Answer, now: float, failure: str) -> None:
        if self._shows:
            self._tell(self.observer.attempted, attempt_of(job, self.pool, answer, now, failure), answer, failure)


def kind_of(request: Request) -> tuple[tuple[str, int, int], float]:
    """Of which kind a request is, for `Learner`, and its estimated prompt."""
    sizes = request.sizes
    return (request.model, sizes.endpoint, sizes.max_tokens), float(sizes.prompt_tokens)


def _gone(job: Job) -> bool:
    """Whether nobody waits for the job any more; a permit's waiter is cancelled a moment before it can say so."""
    return job.ended or (job.granted is not None and job.granted.done())


def _stale(moment: Moment) -> bool:
    """Whether what was meant to happen then has lost its object."""
    _, _, is_deadline, job, tries = moment
    return _gone(job) or job.tries != tries or (is_deadline and job.launched_s >= job.eligible_s)


def _swept(heap: list[Any], is_over: Callable[[Any], bool]) -> int:
    """Leaves out of a heap what is over, in place; returns at which length to do so again."""
    heap[:] = [entry for entry in heap if not is_over(entry)]
    heapify(heap)
    return SWEEP + 2 * len(heap)


class Permit:
    """The right to send one request, from the beginning of an `async with` to its end.

    It comes back on every way out of the block. An exception or a cancellation leaves the reservation booked, since
    the provider may have charged it; `used` says more. A request that is refused or fails may wait, inside the block,
    for its next attempt. `limits`: what the answer's headers stated, if anything (see `answers`).
    """

    __slots__ = ("_governor", "_job", "_limits", "_max_wait_s", "_request", "_used")

    def __init__(self, governor: Governor, job: Job, request: Request | None = None, max_wait_s: float = inf) -> None:
        self._governor = governor
        self._job = job
        self._request = request
        self._max_wait_s = max_wait_s
        self._used = -1.0
        self._limits: tuple[Limit, ...] = ()

    async def __aenter__(self) -> Permit:
        if not self._job.flying:  # by `try_permit`
            assert self._job.granted is None, "a permit is used once"
            await self._governor._granted(self._job, max_wait_s=self._max_wait_s)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Ends the permit, as leaving the block does. Nothing happens where it has ended already."""
        if self._job.flying:
            self._governor._given_back(self._job, self._used, self._limits)

    @property
    def launched_s(self) -> float:
        """When the permit was last granted, seconds since the governor began."""
        return self._job.launched_s

    @property
    def attempt(self) -> int:
        """The number of the attempt that the permit is granted for, from 1."""
        return self._job.attempt

    @property
    def attempts_max(self) -> int:
        """How often the policy lets a request be sent."""
        return self._governor.p.max_attempts

    def used(self, tokens: float, limits: tuple[Limit, ...] = ()) -> None:
        """The request is answered and used so many tokens, prompt and output; below 0 = not known."""
        if not tokens < inf:
            raise PacelineError(f"an answer that used {tokens} tokens: tell a number of tokens, -1 = not known")
        self._used, self._limits = tokens, limits

    async def answered(self, answer: Answer) -> bool:
        """What came back, whatever it is: returns True when the request may be sent again, False where it is over.

        See `answers.classify`. In the place of `used`, `throttled` and `failed`, for who does not tell answers apart.
        """
        return await self._governor._heard(self._job, self._request, answer)

    def over(self, answer: Answer) -> None:
        """The same where the request is not sent again, whatever came back: a stream has begun, say."""
        if self._job.flying:
            self._governor._heard_last(self._job, self._request, answer)

    def stated(self, limits: tuple[Limit, ...]) -> None:
        """What the answer's headers say, before the answer is over: a stream's body may take long."""
        if self._job.flying and limits:
            self._governor._sync(self._job, limits, False, self._governor.now())
            self._governor._event()

    async def throttled(self, retry_after_s: float = -1.0, limits: tuple[Limit, ...] = ()) -> bool:
        """The request drew a 429, with that Retry-After (-1 = none): returns True when it may be sent again.

        False: its attempts or its time are spent, and the permit has gone back.
        """
        return await self._governor._once_more(self._job, Outcome.THROTTLED, retry_after_s, limits)

    async def failed(self, retry_after_s: float = -1.0, limits: tuple[Limit, ...] = ()) -> bool:
        """The same for a 5xx, a time-out or a dropped connection."""
        return await self._governor._once_more(self._job, Outcome.SERVER_ERROR, retry_after_s, limits)

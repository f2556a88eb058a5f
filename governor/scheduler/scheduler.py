"""The scheduler: decides which request goes next and what follows from an answer, without a clock or I/O.

Its only chance is keyed: the same seed and request give the same numbers.

Theory of operation. Events come in as method calls named in the past tense, each with the time at which it happened:
`submitted`, `succeeded`, `throttled`, `failed`, `woken`, ... Instructions go out to a `Shell`: `launch`, `ended`,
`backed_off`, ..., one at a time and in order, since carrying one out may stop, pause or reprice the scheduler before
the next is decided. Between two events the shell has one duty: to call `woken` at `wake_at`.

After an event that may have changed something, `pump` asks the quota about the head and launches as long as the quota
says "now". A shared quota may take requests over instead and grant them later.

Undecided requests. A request that met a wait longer than any that is obeyed, or a refusal that may concern every
request, is set aside: it is lost once an answer shows that other requests do not meet the same, or when nothing else is
left. If the scheduler stops before that, the request stays pending for the next run, like all unlaunched requests.

Shells: `driver.py`, and `sim/des/driver.py`. `sim/des/engine.py` states the same steps over arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop
from math import inf

from governor import law
from governor.law import FINALIZE, HOLDING, NOTHING, Params
from governor.model.errors import FailureCode
from governor.model.requests import BACKOFF
from governor.scheduler.interfaces import TAKEN_OVER, J, Quota, Shell, Stated
from governor.scheduler.queue import NEW_WORK, Queue

NOT_BOOKED: list[float] = []  # before a launch, if no counts of the provider are compared with the bookings


class Scheduler(Queue[J]):
    """The state machine of one pool. Events must come in order of time; an instruction may call only `stop`, `pause`,
    `resume` and `reprice`.

    `start_s`: when the clock begins, in the caller's seconds. `backlog`: how many requests the source is known to hold.
    `estimate`: returns for a job what to reserve by current knowledge, and what it declares; called whenever the job is
    at the head.

    `stopped`: why nothing is launched any more, "" while launches go on. `cause`: what the head waits for; `head_at`:
    when it may launch. `clock`: seconds by cause, up to `clock_at`; `waits_s`: the same seconds times the number of
    waiting requests. `waiting`: how many requests wait for their launch, the backlog included. `unfinished`: requests
    of the batch, as far as known, that have not ended.
    """

    def __init__(
        self,
        shell: Shell[J],
        quota: Quota,
        *,
        seed: int,
        start_s: float = 0.0,
        backlog: int = 0,
        estimate: Callable[[J], tuple[float, float]] | None = None,
    ) -> None:
        super().__init__(shell, quota, seed, start_s, backlog)
        self._estimate = estimate
        self._fitting: J | None = None  # the head, once it is known not to be too large

    def begun(self, now: float) -> None:
        """Start on the source, or continue because it has more work."""
        self.advance(now)
        if self._head is None:
            self._next()

    def submitted(self, job: J, now: float) -> None:
        """Queue a job outside the batch: a program's call, or a simulated arrival."""
        self.advance(now)
        self._may_go(job, now)
        self.pump(now)

    def taken_up(self, job: J, retry_at: float) -> None:
        """Continue a request of the source that was launched in an earlier run; its place in flight is gone."""
        self.unfinished += 1
        if job.lane == FINALIZE:
            self.quota.finalize_opened()
        if retry_at > self.clock_at:
            self._at(retry_at, False, job)
        else:
            self._may_go(job, self.clock_at)
        self._watch_deadline(job)

    def withdrawn(self, is_meant: Callable[[J], bool], now: float) -> int:
        """Remove the waiting jobs that `is_meant` selects, without ending them, and return how many.

        Requests in flight continue.
        """
        self.advance(now)
        found = [job for job in [*self.jobs(), *(each[0] for each in self._aside)] if is_meant(job)]
        self._aside = [each for each in self._aside if each[0] not in found]
        for job in found:
            self.drop(job)
        count = len(found)
        self.unfinished -= count
        while self._head is not None and is_meant(self._head):
            self.unfinished -= 1
            self.waiting -= 1
            count += 1
            self._next()
        return count

    def closed(self) -> None:
        """End the batch: its remaining jobs give back what they hold and stay pending."""
        aside, self._aside = self._aside, []
        for job in [*self.jobs(), *(each[0] for each in aside)]:
            if not job.alone:
                self.drop(job)
        self.waiting -= self.backlog + (self._head is not None)
        self._head, self.unfinished, self.backlog = None, 0, 0

    # ------------------------------------------------------------ events: time and settings

    def changed(self, now: float) -> None:
        """Look at the head again because something outside has changed."""
        self.advance(now)
        self.pump(now)

    def woken(self, now: float) -> None:
        """Act on the arrival of `wake_at`, one due entry at a time: call again if `due_at` has come."""
        self.advance(now)
        if self.calendar and self.due_at <= now:
            _, _, is_deadline, job, _ = heappop(self.calendar)
            if not is_deadline and not self._handed_on(job, now, inf if job.failed_s >= 0.0 else now):
                self._may_go(job, now)
                self._watch_deadline(job)
            elif is_deadline and law.deadline_at(self.quota.p, job.first_launched_s) <= now:
                # (Changed settings may have postponed the deadline; the calendar then holds the new one too.)
                self._give_up(job, now, FailureCode.DEADLINE_EXCEEDED)
        self.pump(now)

    def pause(self) -> None:
        """Launch nothing until `resume`, from the next event on."""
        self.quota.paused()

    def resume(self) -> None:
        """Continue after `pause`, from the next event on."""
        self.quota.resumed()

    def reprice(self, params: Params, now: float) -> None:
        """Adopt changed settings from the next event on. Jobs submitted before keep their places."""
        self.advance(now)
        before = self.quota.p
        self.quota.reprice(params, now)
        self.repriced(before)

    def repriced(self, before: Params) -> None:
        """Adjust to the quota's changed settings: deadlines move with them, and the head may now be too large."""
        self._fitting = None
        # Only if the deadline changed: a job that backs off enters its deadline when the backoff ends, and entries
        # of the same instant are handled in the order in which they were made.
        if before.deadline_s != self.quota.p.deadline_s:
            for job in self.jobs():
                self._watch_deadline(job)

    def stop(self, why: str) -> None:
        """Launch nothing more; requests in flight continue, waiting ones stay pending. `why`: not empty."""
        self.stopped = self.stopped or why
        self.shell.halted()

    # ------------------------------------------------------------ events: the end of an attempt

    def succeeded(self, job: J, used: list[float], stated: Stated, now: float, is_empty: bool) -> None:
        """Settle an answered job that used these amounts of the dimensions.

        `is_empty`: the answer was cut off without text, so a finalize pass follows.
        """
        self.advance(now)
        in_wait = self.cause
        job.flying = job.holds = False
        self.quota.settled(job.need, used, job.launched_s, now)
        if self._aside and not self.stopped and job.launched_s >= self._aside[0][1]:
            self._end_aside()
        if stated:
            self._sync(job, stated, 0, now)
        if is_empty:
            self._open_finalize(job, now)
        else:
            self.shell.ended(job, now, "")
            self.unfinished -= 1
            if job.lane == FINALIZE:
                self.quota.finalize_closed()
        self._pump_after(in_wait, now)

    def returned(
        self,
        job: J,
        used: list[float] | None,
        stated: Stated,
        now: float,
        *,
        is_charged: bool = True,
        is_answered: bool = False,
    ) -> None:
        """End a program's call that used these amounts (None = unknown: its need stays booked).

        `is_answered`: the provider answered. `is_charged`: the provider admitted the request.
        """
        self.advance(now)
        job.flying = job.holds = False
        if used is not None:
            self.quota.settled(job.need, used, job.launched_s, now)
        else:
            self.quota.released()
            if is_answered:
                self.quota.answered(now)
        self._sync(job, stated, int(not is_charged), now)
        self._pump_after(self.cause, now)

    def stated(self, job: J, stated: Stated, now: float) -> None:
        """Take over the counts in the headers of an answer that is still arriving."""
        self.advance(now)
        self._sync(job, stated, 0, now)
        self.pump(now)

    def throttled(
        self,
        job: J,
        retry_after_s: float,
        stated: Stated,
        now: float,
        *,
        in_doubt: bool = False,
        is_last: bool = False,
    ) -> bool:
        """Handle a 429 and return whether the job will be tried again.

        `in_doubt`: the refusal may concern every request. `is_last`: the caller does not want another attempt.
        """
        self.advance(now)
        self._sync(job, stated, 1, now)
        p = self.quota.p
        times = job.first_launched_s, job.launched_s, now, self._retry_u(job)
        at, standing = self.quota.throttled(job.need, job.attempt, retry_after_s, *times), law.keeps_permit(p)
        if is_last:
            at = self._renounced(at, standing)
        if at < inf:
            self._back_off(job, at, standing, -1.0, 1, now, in_doubt)
            self._handed_on(job, now, at)
        else:
            spent = is_last or law.is_spent(p, job.attempt, retry_after_s)
            code = FailureCode.RATE_LIMIT_EXHAUSTED if spent else FailureCode.DEADLINE_EXCEEDED
            self._exhausted(job, now, code, in_doubt, in_doubt or law.outlasts(p, retry_after_s))
        self.pump(now)
        return at < inf

    def failed(
        self,
        job: J,
        retry_after_s: float,
        stated: Stated,
        now: float,
        code: str,
        *,
        is_answer: bool = False,
        is_local: bool = False,
        in_doubt: bool = False,
        is_last: bool = False,
    ) -> bool:
        """Handle a server error, a time-out or a dropped connection; return whether the job will be tried again.

        `code`: the failure code if this attempt was the last. `is_answer`: the failure is a 4xx that may be retried.
        `is_local`: this machine could not send the request, which does not count as an attempt. `in_doubt`, `is_last`:
        as for `throttled`.
        """
        self.advance(now)
        self._sync(job, stated, 0, now)
        p, counted = self.quota.p, int(not is_local)
        # A request that could not be sent has made no attempt: number 0 is never the last one.
        history = job.index, job.attempt * counted, job.outages, int(is_answer), retry_after_s
        at, standing = self.quota.failed(*history, job.first_launched_s, job.launched_s, now, self._retry_u(job))
        if is_last:
            at = self._renounced(at, standing)
        if at < inf:
            failed_s = now if counted and not is_answer else -1.0
            self._back_off(job, at, standing, failed_s, counted, now, in_doubt)
        else:
            spent = is_last or (counted and law.is_spent(p, job.attempt, retry_after_s))
            self._exhausted(job, now, code if spent else FailureCode.DEADLINE_EXCEEDED, in_doubt, in_doubt)
        self.pump(now)
        return at < inf

    def rejected(
        self, job: J, stated: Stated, now: float, code: str, *, is_charged: bool = False, in_doubt: bool = False
    ) -> None:
        """End a request by an answer that is final.

        `is_charged`: the provider admitted it. `in_doubt`: the rejection may concern every request.
        """
        self.advance(now)
        self._sync(job, stated, int(not is_charged), now)
        self.quota.released()
        self.quota.answered(now)
        self._lose(job, now, code, in_doubt, in_doubt)
        self.pump(now)

    def account_refused(self, job: J, stated: Stated, now: float, code: str) -> None:
        """Stop because the account, not the request, was refused; unanswered requests stay pending."""
        self.advance(now)
        self._sync(job, stated, 1, now)
        self.quota.answered(now)
        self.drop(job)
        self.shell.suspended(job, now, "")
        self.stop(code)
        if self.elsewhere is not None and self.elsewhere.may_save(job, now):
            self._leaves(job)
        self.pump(now)

    def granted(self, job: J, at: float, booked: list[float]) -> None:
        """Launch a job at `at`: the quota that had taken it over has booked the launch."""
        self._dequeued(job)
        # The quota rounds its time down, so that it may lie slightly before the moment at which we asked.
        job.eligible_s = min(job.eligible_s, at)
        job.holds = True
        if job.ended:
            self.drop(job)
        elif self._is_late(job, at):
            self._give_up(job, at, FailureCode.DEADLINE_EXCEEDED)
        else:
            self._launch(job, at, booked)

    def refused(self, job: J, now: float) -> None:
        """Give up a job that the quota had taken over and will never admit."""
        self._give_up(job, now, FailureCode.REQUEST_TOO_LARGE)

    def pump(self, now: float) -> None:
        """Launch what the quota admits now, and note when it will admit the next."""
        quota = self.quota
        if self.elsewhere is not None:
            if self.stopped or quota.breaker.probe_at > -inf:
                self._given_away(now)
            self.elsewhere.looked()
        is_shared = quota.head is not None
        if is_shared:
            for rank, job in quota.take_back(now):
                self._push(rank, job)
        at, cause = inf, NOTHING
        while not self.stopped:
            first = self.first() if self._queue else self._head
            if first is None:
                at, cause = inf, NOTHING
                break
            if self._estimate is not None:
                first.reserve_anew(quota.p, *self._estimate(first))
            if first is not self._fitting:
                if law.never_fits(quota.p, first.need):
                    self._leave(first)
                    self._give_up(first, now, FailureCode.REQUEST_TOO_LARGE)
                    continue
                self._fitting = first
            at, cause = quota.ask(first.need, first.standing, now)
            if at > now:
                bit = 1 << cause
                if not first.asked & bit and cause != NOTHING:
                    first.asked |= bit
                    self.shell.deferred(cause)
                break
            if at == TAKEN_OVER:
                first.queued = True
                self._taken(first)
                continue
            self.waiting -= 1
            if first is self._head:
                self._next()
            else:
                heappop(self._queue)
                first.queued = False
            if first.first_launched_s >= 0.0 and self._is_late(first, now):
                self._give_up(first, now, FailureCode.DEADLINE_EXCEEDED)
            else:
                u = first.jitter_u
                quota.launched(first.need, first.standing, now, u if u >= 0.0 else self.jitter_u(first))
                self._launch(first, now, quota.s.booked_before.copy() if quota.p.sync_headers else NOT_BOOKED)
        else:
            at, cause = inf, NOTHING
        if is_shared and quota.head is not None:
            at, cause = quota.head
        self.head_at = at
        self.cause = cause
        if self._aside and not self.stopped and len(self._aside) == self.unfinished:
            self._end_aside()  # too few refusals to be sure, but nothing else is left

    def _pump_after(self, in_wait: int, now: float) -> None:
        """Pump after an ordinary answer, if it can have brought the head forward or changed which job is the head."""
        is_urgent = self._queue and self._queue[0][0][0] < NEW_WORK
        if is_urgent or law.answer_may_admit(self.quota.p, in_wait) or self._estimate is not None:
            self.pump(now)

    def _launch(self, job: J, now: float, booked: list[float]) -> None:
        """Send an attempt whose launch is booked."""
        if job.failed_s >= 0.0:
            self._spare(job)
        job.flying = job.holds = True
        job.tries += 1
        job.launched_s = now
        if job.first_launched_s < 0.0:
            job.first_launched_s = now
        job.booked = booked
        self.shell.launch(job, now)

    def _open_finalize(self, job: J, now: float) -> None:
        """Queue one more call, ahead of new work, for an answer that was cut off without usable text."""
        last = self.shell.finalize(job, now)
        self.quota.finalize_opened()
        last.lane = FINALIZE
        last.first_launched_s = job.first_launched_s
        self._may_go(last, now)
        self._watch_deadline(last)

    def _back_off(
        self, job: J, at: float, standing: int, failed_s: float, counted: int, now: float, in_doubt: bool
    ) -> None:
        """Schedule the next attempt at `at`. `failed_s`: as in `Scheduled`; `counted`: whether this was an attempt."""
        job.flying = False
        job.holds = standing == HOLDING
        self.shell.attempted(job, now)
        self.waits_s[BACKOFF] += at - now
        job.standing = standing
        job.attempt += counted
        job.failed_s = failed_s
        if failed_s >= 0.0 and self.quota.breaker.probe_at > -inf:
            self._spare(job)
        job.jitter_u = -1.0
        job.submitted_s = now
        self._at(at, False, job)
        self.shell.backed_off(job, now, at)
        if in_doubt:
            self.shell.doubted(job)

    def _renounced(self, at: float, standing: int) -> float:
        """Return inf for a retry that the caller does not want, and give back the permit if it was kept for it."""
        if at < inf and standing == HOLDING:
            self.quota.released()
        return inf

    def _exhausted(self, job: J, now: float, code: str, in_doubt: bool, aside: bool) -> None:
        """End a job that is not tried again, and stop if the provider has shut the pool out."""
        self._lose(job, now, code, in_doubt, aside)
        if job.alone:
            return
        if law.is_shut_out(self.quota.s):
            self.stop(FailureCode.OUTWAITED)

    def _lose(self, job: J, now: float, code: str, in_doubt: bool, aside: bool) -> None:
        """End the request without an answer, or set it aside while all others may meet the same."""
        job.flying = job.holds = False
        # A finalize pass ends at once: while it is open, the lower cap holds for all others.
        if job.alone or job.lane == FINALIZE or not aside:
            self.shell.ended(job, now, code)
            self._over(job)
            return
        self.shell.suspended(job, now, code)
        if not self._handed_on(job, now, inf):
            self._aside.append((job, now, code))
        if in_doubt:
            self.shell.doubted(job)

    def _end_aside(self) -> None:
        """End the requests set aside, as of their refusals. A success launched before the first proves no fault."""
        aside, self._aside = self._aside, []
        for job, at, code in aside:
            self.shell.lost(job, at, code)
            self._over(job)

    def _give_up(self, job: J, now: float, code: str) -> None:
        """End a job that will not be launched any more."""
        self.quota.forget(job)
        self._dequeued(job)
        job.ended = True
        if job.holds:
            job.holds = False
            self.quota.released()
        self.shell.given_up(job, now, code)
        self._over(job)

    def _over(self, job: J) -> None:
        """Count the request as ended."""
        if job.lane == FINALIZE:
            self.quota.finalize_closed()
        if not job.alone:
            self.unfinished -= 1

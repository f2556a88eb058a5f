"""The SimPy shell of the scheduler: a calendar, and the synthetic provider.

Theory of operation. SimPy keeps the calendar; there is no process per request. Three kinds of timed callback drive the
run: an answer arrives, a request arrives, or the scheduler's timer fires (a backoff has ended, a deadline is reached,
or the head may launch). After each of them one timer is set for the moment that the scheduler names. At one instant
answers go before retries and deadlines, these before arrivals, and arrivals before wakes; within each kind the order of
scheduling decides. Limit changes belong to the provider and precede its admissions.

Memory. Requests are read as they come to the head. Only requests in flight, backing off or (with arrivals from a trace)
arrived are held, and one float per finished request for the quantiles of latency.

When the scheduler stops (no credit, or only waits that are too long), waiting requests stay pending, as in a live run.
No later run will answer them here, so the tally counts them as lost, with the reason for the stop.
"""

from __future__ import annotations

from math import inf

from governor import law
from governor.model.errors import FailureCode
from governor.model.keyed import attempt_key
from governor.model.needs import of_amounts
from governor.scheduler.interfaces import Stated
from governor.scheduler.learning import Learner
from governor.scheduler.quota import LocalQuota
from governor.scheduler.scheduler import Scheduler
from sim.des.calendar import ANSWER, ARRIVAL, RETRY_DUE, WAKE, Appointment, Calendar
from sim.des.jobs import Job, jobs_of
from sim.des.run import CHARGED, SPENT, TIMEOUT, AttemptSink, Tally
from sim.model import provider as prov
from sim.model.provider import ProviderParams, ProviderState
from sim.model.workload import Columns


class Simulation:
    """One run of a batch: requests in, a `Tally` out. Call `run()` exactly once."""

    def __init__(
        self,
        columns: Columns,
        params: law.Params,
        provider: ProviderParams,
        *,
        seed: int,
        day_tokens_used: float = 0.0,
        day_requests_used: float = 0.0,
        finalize_max_tokens: int = 0,
        from_trace: bool = False,
        on_attempt: AttemptSink | None = None,
        provider_seed: int | None = None,
    ) -> None:
        self.columns = columns
        self.pp = provider
        self.seed = seed
        # Differs from the law's seed when a run's own jitter is replayed against other draws of the provider.
        self.provider_seed = seed if provider_seed is None else provider_seed
        self.finalize_max_tokens = finalize_max_tokens
        self.from_trace = from_trace
        self.on_attempt = on_attempt
        self.ps = ProviderState()
        quota = LocalQuota(params)
        quota.started(of_amounts({law.TPD: day_tokens_used, law.RPD: day_requests_used}), 0.0)
        prov.day_started(self.ps, day_tokens_used, day_requests_used)
        self.env = Calendar()
        self.learner = Learner() if columns.kind is not None else None
        estimate = self._estimate if self.learner is not None else None
        self.scheduler: Scheduler[Job] = Scheduler(self, quota, seed=seed, backlog=len(columns), estimate=estimate)
        if from_trace:  # nothing waits yet
            self.scheduler.waiting = self.scheduler.backlog = 0
        self.tally = Tally(waits_s=self.scheduler.waits_s)
        self.flying = 0
        # Whether the provider acts when an answer leaves it.
        self._counts_later = provider.settles or any(provider.at_answer) or provider.counts == prov.COUNTS_AT_ANSWER
        self.timer: Appointment | None = None
        self.timer_at, self.is_due = inf, False
        self._coming = jobs_of(columns, params, provider, seed, self.provider_seed, from_trace=from_trace)

    @property
    def p(self) -> law.Params:
        """Return the settings as the law's numbers."""
        return self.scheduler.quota.p

    @property
    def s(self) -> law.State:
        """Return the law's state."""
        return self.scheduler.quota.s

    @property
    def is_over(self) -> bool:
        """Return whether no work is in progress and none will start."""
        return not self.flying and (self.scheduler.stopped != "" or not self.scheduler.unfinished)

    def run(self, start_s: float = 0.0) -> Tally:
        """Run to the end of the last request and return the tally.

        Every request has then ended exactly once (asserted).
        `start_s`: the moment of the first launch on the law's clock; it matters because sliding windows have fixed
        steps.
        """
        scheduler, tally, requests = self.scheduler, self.tally, len(self.columns.reserve)
        self.env._now = scheduler.clock_at = start_s
        if self.from_trace:
            self._next_arrival()
        else:
            scheduler.begun(start_s)
            scheduler.changed(start_s)
            self._settle()
        self.env.keep()
        scheduler.closed()
        assert tally.requests == requests or scheduler.stopped, f"{requests - tally.requests} requests never ended"
        for _ in range(requests - tally.requests):
            tally.ended(scheduler.stopped, scheduler.clock_at)
        assert self.s.in_flight == 0, f"{self.s.in_flight} permits leaked"
        assert self.s.finalize_open == 0, f"{self.s.finalize_open} finalize passes never closed"
        tally.failures = dict(sorted(tally.failures.items()))  # The compiled engine does not record which came first.
        return tally

    def next_work(self) -> Job | None:
        """Return the next request of the batch, or None after the last."""
        return next(self._coming, None)

    def _next_arrival(self) -> None:
        job = self.next_work()
        if job is not None:
            Appointment(self.env, job.submitted_s, ARRIVAL, self._on_arrival, job)

    def _estimate(self, job: Job) -> tuple[float, float]:
        """Return what to reserve for a job by the learnt estimates, and what it declares."""
        if self.learner is None or self.columns.kind is None or job.lane != law.MAIN:
            return job.reserve, job.reserve
        declared = float(self.columns.reserve[job.index])
        return self.learner.estimate(int(self.columns.kind[job.index]), job.prompt, declared), declared

    # ------------------------------------------------------------ what happens

    def _settle(self) -> None:
        """Set one timer for the scheduler's next moment; called after each event."""
        at, is_due = self._next_at(self.scheduler.head_at)
        if at != self.timer_at or is_due is not self.is_due:
            self.timer_at = at
            self.is_due = is_due
            self.timer = None
            if at < inf:
                self.timer = Appointment(self.env, at, RETRY_DUE if is_due else WAKE, self._on_wake)

    def _next_at(self, head_at: float) -> tuple[float, bool]:
        """Return when the timer must fire, and whether it is for a backoff or a deadline rather than for the head."""
        scheduler = self.scheduler
        if scheduler.calendar and not scheduler.stopped:
            due_at = scheduler.due_at
            if due_at <= head_at:
                return due_at, due_at < inf
        return head_at, False

    def _on_wake(self, event: Appointment) -> None:
        if event is self.timer:
            self.timer, self.timer_at = None, inf
            self.scheduler.woken(self.env._now)
            self._settle()

    def change(self, change: law.Params | str) -> None:
        """Change the settings from now on, or mark the pool "paused" or "resumed".

        No effect after the end of the run.
        """
        if not self.is_over:
            if isinstance(change, law.Params):
                self.scheduler.reprice(change, self.env._now)
            elif change == "paused":
                self.scheduler.pause()
            else:
                self.scheduler.resume()
            self.scheduler.changed(self.env._now)
            self._settle()

    def _on_arrival(self, event: Appointment) -> None:
        if not self.scheduler.stopped:
            self._next_arrival()
            self.scheduler.submitted(event._value, self.env._now)
            self._settle()

    def _on_answer(self, event: Appointment) -> None:
        job, now = event._value, self.env._now
        scheduler, outcome = self.scheduler, job.outcome
        self.flying -= 1
        unheard = outcome == TIMEOUT or outcome == prov.DROPPED
        if unheard or (outcome == prov.OK and job.lane == law.FINALIZE):
            self.tally.extra_prompt_tokens += job.prompt
            self.tally.extra_output_tokens += job.output
        stated: Stated = ()
        if not unheard:
            if self._counts_later:
                self._left(job, now)
            if scheduler.quota.p.sync_headers:
                stated = self._stated(job)
        if outcome == prov.OK:
            self._on_ok(job, stated, now)
        elif outcome == prov.THROTTLED or outcome == prov.SLOW_DOWN:
            self.tally.throttled += 1
            scheduler.throttled(job, job.retry_after_s, stated, now)
        elif outcome == prov.QUOTA:
            scheduler.account_refused(job, stated, now, FailureCode.INSUFFICIENT_QUOTA)
        elif outcome == prov.TOO_LARGE:
            scheduler.rejected(job, stated, now, SPENT[outcome])
        else:
            scheduler.failed(job, job.retry_after_s, stated, now, SPENT[outcome])
        if scheduler.head_at != self.timer_at or scheduler.calendar:
            self._settle()

    def _on_ok(self, job: Job, stated: Stated, now: float) -> None:
        tally = self.tally
        used = job.prompt + job.output
        if self.learner is not None and self.columns.kind is not None and job.lane == law.MAIN:
            self.learner.saw(int(self.columns.kind[job.index]), job.prompt, used)
        tally.used_tokens += used
        is_empty = False
        if job.lane == law.MAIN:
            tally.work.add(job.arrived_s, job.charge, used, now - job.launched_s, job.prompt)
            is_empty = self.finalize_max_tokens > 0 and self._came_back_empty(job)
        else:
            tally.work.finalized(job.charge, used)
        self.scheduler.succeeded(job, job.need_of(used), stated, now, is_empty)

    # ------------------------------------------------------------ the provider

    def _answer(self, job: Job, key: int, now: float) -> tuple[int, float, int, float]:
        """Return the provider's response to an attempt: see `provider.answered`."""
        rest = job.recorded_s, now, job.drawn_s, job.prompt
        return prov.answered(self.pp, self.ps, self.provider_seed, job.index, key, job.charge, job.output, *rest)

    def _left(self, job: Job, now: float) -> None:
        """Let the answer leave the provider: book real use, then state counts if the provider dates them by the answer.

        In the simulation this is the moment at which the answer arrives.
        """
        pp, ps, seed = self.pp, self.ps, self.provider_seed
        if job.outcome == prov.OK:
            prov.settled(pp, ps, seed, job.charge, job.prompt + job.output, now, job.prompt)
        if pp.counts == prov.COUNTS_AT_ANSWER:
            prov.advanced(pp, ps, seed, now)
            self._state(job)

    def _state(self, job: Job) -> None:
        """Store what the answer's headers will state: dimension, limit and remaining amount."""
        pp, ps = self.pp, self.ps
        job.stated = [
            (d, prov.limit_now(pp, ps, d), prov.remaining(pp, ps, d))
            for d in range(pp.dimensions)
            if prov.is_stated(pp, ps, d)
        ]

    def _stated(self, job: Job) -> Stated:
        """Return the stated counts by dimension, as far as the headers state them."""
        if not (job.booked and prov.states_counts(self.pp, job.outcome not in CHARGED)):
            return ()
        return job.stated

    def _came_back_empty(self, job: Job) -> bool:
        c, i = self.columns, job.index
        return 0 < c.cap[i] < c.output_tokens[i] and prov.cut_without_text(self.pp, self.provider_seed, i)

    def _expires_at(self, job: Job, now: float) -> float:
        return law.expires_at(self.p, job.first_launched_s, now)

    # ------------------------------------------------------------ instructions of the scheduler

    def launch(self, job: Job, now: float) -> None:
        """Have the provider answer the attempt, and put its answer into the calendar."""
        scheduler, tally = self.scheduler, self.tally
        self.flying += 1
        if self.flying > tally.peak_in_flight:
            tally.peak_in_flight = self.flying
        tally.attempts += 1
        tally.reserved_tokens += job.reserve
        job.outcome, service_s, _, job.retry_after_s = self._answer(job, attempt_key(job.lane, job.tries), now)
        job.charged = job.charge if job.outcome in CHARGED else 0.0
        tally.charged_tokens += job.charged
        if job.booked:
            self._state(job)
        if self.on_attempt is not None:
            job.waits_s = scheduler.waited(job)
        at = now + service_s
        expires_at = self._expires_at(job, now)
        if at > expires_at:
            at = expires_at
            job.outcome = TIMEOUT
            job.retry_after_s = -1.0
        Appointment(self.env, at, ANSWER, self._on_answer, job)

    def attempted(self, job: Job, now: float, code: str = "") -> None:
        """Record the attempt."""
        if self.on_attempt is not None:
            self.on_attempt(job, now, code)

    def backed_off(self, job: Job, now: float, retry_at: float) -> None:
        """Forget the drawn latency: the next one is drawn at launch."""
        job.drawn_s = -1.0

    def finalize(self, job: Job, now: float) -> Job:
        """Record the attempt and return the job of the finalize pass."""
        self.attempted(job, now)
        self.tally.finalize_passes += 1
        c, i = self.columns, job.index
        output = min(float(c.output_tokens[i]), float(self.finalize_max_tokens))
        sizes = float(c.finalize_reserve[i]), job.expected, float(c.finalize_charge[i]), job.prompt, output
        last = Job(i, *sizes, job.recorded_s, now, weights=job.weights)
        last.arrived_s = job.arrived_s
        return last

    def suspended(self, job: Job, now: float, code: str) -> None:
        """Record the attempt, with the provider's code."""
        self.attempted(job, now, code or SPENT[job.outcome])

    def doubted(self, job: Job) -> None:
        """Do nothing: the synthetic provider refuses no request for a reason that all requests share."""

    def ended(self, job: Job, now: float, code: str) -> None:
        """Record the attempt and count the request."""
        if self.on_attempt is not None:
            self.on_attempt(job, now, code)
        if not code:
            self.tally.latencies_s.append(now - job.arrived_s)
        self.over(job, now, code)

    def lost(self, job: Job, at: float, code: str) -> None:
        """Count the request."""
        self.over(job, at, code)

    def given_up(self, job: Job, now: float, code: str) -> None:
        """Count the request."""
        self.over(job, now, code)

    def over(self, job: Job, at: float, code: str) -> None:
        """Count a request that ended at `at` with `code`."""
        self.tally.ended(code, at)

    def deferred(self, cause: int) -> None:
        """Count a wait."""
        self.tally.deferrals[cause] += 1

    def halted(self) -> None:
        """Do nothing: attempts in flight continue."""

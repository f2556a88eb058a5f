"""The SimPy driver of the law: the twin of `governor/scheduler/driver.py`, to be read side by side with it.

Theory of operation. SimPy keeps the calendar; there is no process per request. Four kinds of timed callback move the
run: an answer arrives, a retry has backed off, a request arrives, a wake-up rings. After each of them `_pump` asks the
law about the head of the queue, launches as long as the law says "now", and leaves one timer for the moment that it
named. At one instant answers go before retries, retries before arrivals, arrivals before wakes, and within these the
order of scheduling decides; limit changes are the provider's and precede its admissions.

Memory. Requests are read from the columns in chunks as they come to the head; only what is in flight, backing off or
(with arrivals from a trace) has arrived is held, and one float per finished request for the quantiles of latency.

Waiting. The cause of waiting is what the law says of the head, and it holds until the next event. One cumulative clock
per cause advances with it, so an attempt's wait by cause is a difference of two readings, and the totals over all
attempts need no reading at all: each advance counts once for everybody who waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from math import inf
from typing import Any

import numpy as np
import simpy

from governor import law
from governor.model import requests
from governor.model.errors import FailureCode
from governor.model.keyed import JITTER_RETRY, JITTER_STAGGER, attempt_key, keyed_uniform
from governor.scheduler.learning import Learner
from sim.des.run import CHARGED, SPENT, TIMEOUT, AttemptSink, Tally, arrival_order, batch_order, rows_of
from sim.model import provider as prov
from sim.model.draws import first_jitters, first_latencies_s
from sim.model.provider import ProviderParams, ProviderState
from sim.model.workload import Columns

# Order of events at one instant.
ANSWER = 0
RETRY_DUE = 2
ARRIVAL = 3
WAKE = 4

CAUSES = len(requests.CAUSES)
BACKOFF = requests.BACKOFF
CHUNK = 4096
NOT_BOOKED: list[float] = []


class Job:
    """One request on its way: what the law and the provider must know of it, and when things happened to it."""

    __slots__ = (
        *("index", "lane", "attempt", "standing", "reserve", "charge", "prompt", "output", "recorded_s"),
        *("drawn_s", "jitter_u"),
        *("arrived_s", "submitted_s", "eligible_s", "first_launched_s", "launched_s"),
        *("outcome", "charged", "retry_after_s", "stated", "booked"),
        *("since", "waits_s", "asked", "ended", "tries", "failed_s", "outages"),
    )
    # Set at launch, and by whoever queues the job: slots without a value until then.
    launched_s: float
    outcome: int
    charged: float
    retry_after_s: float
    stated: tuple[float, float, int, float, float]
    booked: list[float]
    since: list[float]
    waits_s: list[float]

    def __init__(
        self,
        index: int,
        reserve: float,
        charge: float,
        prompt: float,
        output: float,
        recorded_s: float,
        submitted_s: float,
        drawn_s: float = -1.0,
        jitter_u: float = -1.0,
    ) -> None:
        self.index = index
        self.reserve = reserve
        self.charge = charge
        self.prompt = prompt
        self.output = output
        self.recorded_s = recorded_s
        # Drawn ahead for first attempts, -1 = to be drawn.
        self.drawn_s = drawn_s
        self.jitter_u = jitter_u
        self.arrived_s = submitted_s
        self.submitted_s = submitted_s
        self.eligible_s = submitted_s
        self.first_launched_s = -1.0
        self.attempt = 1
        self.lane = law.MAIN
        self.standing = law.FIRST
        self.asked = 0
        self.ended = False
        self.booked = NOT_BOOKED
        self.tries = 0
        self.failed_s = -1.0
        self.outages = 0


class _Moment(simpy.Event):
    """A callback at an absolute time. (A SimPy timeout takes a delay, and now + (at - now) need not be `at`.)"""

    def __init__(
        self, env: _Calendar, at: float, priority: int, callback: Callable[[Any], None], value: Any = None
    ) -> None:
        self.env = env
        self.callbacks = [callback]
        self._value = value
        self._ok = True
        heappush(env._queue, (at, priority, next(env._eid), self))  # type: ignore[misc]


class _Calendar(simpy.Environment):
    """SimPy's environment, whose queue `_Moment` fills with absolute times."""


class Simulation:
    """One run of a batch: requests in, a `Tally` out. Make it, call `run()` once."""

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
        self.p = params
        self.pp = provider
        self.seed = seed
        # Another one than the law's where a run's own jitter meets another chance of the provider.
        self.provider_seed = seed if provider_seed is None else provider_seed
        self.finalize_max_tokens = finalize_max_tokens
        self.on_attempt = on_attempt
        self.s = law.State()
        self.ps = ProviderState()
        law.day_started(self.p, self.s, day_tokens_used, day_requests_used, 0.0)
        prov.day_started(self.ps, day_tokens_used, day_requests_used)
        self.env = _Calendar()
        self.tally = Tally()
        self.learner = Learner() if columns.kind is not None else None
        self.urgent: list[tuple[tuple[float, ...], int, Job]] = []  # retries and finalize passes that may go
        self.arrived: list[tuple[tuple[float, ...], int, Job]] = []  # new work, when it arrives over time
        self.head: Job | None = None  # new work at the head, when it is there from the beginning
        self.sequence = 0
        self.clock = [0.0] * CAUSES
        self.clock_at = 0.0
        self.cause = law.NOTHING
        self.waiting = 0
        self.timer: _Moment | None = None
        self.timer_at = inf
        self.stopped = ""
        self.coming = self._jobs(from_trace)
        if from_trace:
            self._next_arrival()
        else:
            self.waiting = len(columns.reserve)
            self.head = next(self.coming, None)

    # ------------------------------------------------------------ the queue

    def _jobs(self, from_trace: bool) -> Iterator[Job]:
        """New work in order of launch (a batch) or of arrival (a trace), read in chunks."""
        c = self.columns
        order = arrival_order(c) if from_trace else batch_order(c, self.p)
        zeros = [0.0] * CAUSES
        for start in range(0, len(c), CHUNK):
            i = rows_of(order, start, min(start + CHUNK, len(c)))
            output = np.where(c.cap[i] > 0, np.minimum(c.output_tokens[i], c.cap[i]), c.output_tokens[i])
            arrival = c.arrival_s[i] if from_trace else np.zeros(len(i))
            output = output.astype(np.float64)
            sizes = (c.reserve[i], c.charge[i], c.prompt_tokens[i].astype(np.float64), output)
            columns = (i, *sizes, c.recorded_s[i], arrival)
            drawn_s = first_latencies_s(self.pp, self.provider_seed, i, output, c.recorded_s[i])
            jitters = first_jitters(self.p, self.seed, i)
            for row in zip(*(column.tolist() for column in columns), drawn_s, jitters, strict=True):
                job = Job(*row)
                job.since = zeros
                yield job

    def _next_arrival(self) -> None:
        job = next(self.coming, None)
        if job is not None:
            _Moment(self.env, job.submitted_s, ARRIVAL, self._on_arrival, job)

    def _queued(self, job: Job) -> tuple[tuple[float, ...], int, Job]:
        """A heap entry in the law's order; the sequence keeps jobs themselves from being compared."""
        self.sequence += 1
        expected = float(self.columns.cap[job.index])
        key = law.rank(self.p, job.lane, job.attempt, expected, job.reserve, float(self.sequence), job.standing)
        return key, self.sequence, job

    def _may_go(self, job: Job, now: float, queue: list[tuple[tuple[float, ...], int, Job]]) -> None:
        """The job becomes eligible: from now on its waiting is counted."""
        job.eligible_s = now
        job.asked = 0
        job.ended = False
        job.since = self.clock.copy()
        self.waiting += 1
        heappush(queue, self._queued(job))

    def _first(self) -> Job | None:
        urgent = self.urgent
        while urgent and urgent[0][2].ended:
            heappop(urgent)
        if urgent:
            return urgent[0][2]
        if self.arrived:
            return self.arrived[0][2]
        return self.head

    def _taken(self, job: Job) -> None:
        """Removes the head from its queue."""
        self.waiting -= 1
        if job is self.head:
            self.head = next(self.coming, None)
        else:
            heappop(self.urgent if self.urgent else self.arrived)

    # ------------------------------------------------------------ time

    def _advance(self, now: float) -> None:
        """Time has passed until `now`, under the cause that has held since the last event."""
        passed = now - self.clock_at
        if passed > 0.0:
            self.clock[self.cause] += passed
            self.tally.waits_s[self.cause] += passed * self.waiting
            self.clock_at = now

    def _pump(self, now: float) -> None:
        """Launches what the law admits now, and leaves one timer for the moment at which it will admit the next."""
        p, s = self.p, self.s
        while True:
            job = self._first() if self.urgent or self.arrived else self.head
            if job is None:
                self.cause = law.NOTHING
                self.timer = None
                self.timer_at = inf
                return
            if self.learner is not None:
                self._estimate(job)
            if not job.asked and law.never_fits(p, job.reserve):
                self._taken(job)
                self._give_up(job, now, FailureCode.REQUEST_TOO_LARGE)
                continue
            at, cause = law.admission(p, s, job.reserve, job.standing, now)
            if at > now:
                break
            if job.first_launched_s >= 0.0 and law.deadline_at(p, job.first_launched_s) <= now:
                self._taken(job)
                self._give_up(job, now, FailureCode.DEADLINE_EXCEEDED)
                continue
            self._launch(job, now)
        self.cause = cause
        bit = 1 << cause
        if not job.asked & bit:
            job.asked |= bit
            self.tally.deferrals[cause] += 1
        if at != self.timer_at:
            self.timer_at = at
            self.timer = _Moment(self.env, at, WAKE, self._on_wake) if at < inf else None

    def _estimate(self, job: Job) -> None:
        """What to reserve for the head, by what is known now; as declared where more than that would never fit."""
        if self.learner is None or self.columns.kind is None or job.lane != law.MAIN:
            return
        declared = float(self.columns.reserve[job.index])
        found = self.learner.estimate(int(self.columns.kind[job.index]), job.prompt, declared)
        job.reserve = declared if law.never_fits(self.p, found) else found

    def _launch(self, job: Job, now: float) -> None:
        """One attempt goes out: the law books it, the provider answers it, its answer enters the calendar."""
        p, s, tally = self.p, self.s, self.tally
        if job is self.head:
            self.waiting -= 1
            self.head = next(self.coming, None)
        else:
            self._taken(job)
        if job.failed_s >= 0.0:
            self._spare(job)
        job.tries += 1
        key = attempt_key(job.lane, job.tries)
        u = job.jitter_u
        if u < 0.0:
            drawn = p.stagger_s > 0.0 and job.standing == law.FIRST
            u = keyed_uniform(self.seed, job.index, key, JITTER_STAGGER) if drawn else 0.5
        law.launched(p, s, job.reserve, job.standing, now, u)
        if s.in_flight > tally.peak_in_flight:
            tally.peak_in_flight = s.in_flight
        tally.attempts += 1
        tally.reserved_tokens += job.reserve
        job.launched_s = now
        if job.first_launched_s < 0.0:
            job.first_launched_s = now
        job.outcome, service_s, _, job.retry_after_s = self._answer(job, key, now)
        job.charged = job.charge if job.outcome in CHARGED else 0.0
        tally.charged_tokens += job.charged
        if p.sync_headers:
            job.booked = s.booked_before.copy()
            self._state(job)
        if self.on_attempt is not None:
            job.waits_s = [reading - before for reading, before in zip(self.clock, job.since, strict=True)]
        at = now + service_s
        expires_at = self._expires_at(job, now)
        if at > expires_at:
            at = expires_at
            job.outcome = TIMEOUT
            job.retry_after_s = -1.0
        _Moment(self.env, at, ANSWER, self._on_answer, job)

    def _expires_at(self, job: Job, now: float) -> float:
        """When the attempt that is launched now has taken too long."""
        return law.expires_at(self.p, job.first_launched_s, now)

    def _spare(self, job: Job) -> None:
        """Its last attempt failed; if that was in an outage, as far as is known by now, it does not count."""
        outages = law.spared(self.p, self.s, job.outages, job.launched_s, job.failed_s)
        if outages >= 0:
            job.outages = outages
            job.attempt -= 1
        job.failed_s = -1.0

    def _answer(self, job: Job, key: int, now: float) -> tuple[int, float, int, float]:
        """What the provider does with an attempt: see `provider.answered`."""
        return prov.answered(
            self.pp,
            self.ps,
            self.provider_seed,
            job.index,
            key,
            job.charge,
            job.output,
            job.recorded_s,
            now,
            job.drawn_s,
        )

    def _left(self, job: Job, now: float) -> None:
        """The answer leaves the provider: it books real use, then states its counts if it dates them by the answer.

        Here in the moment in which the answer arrives.
        """
        pp, ps, seed = self.pp, self.ps, self.provider_seed
        if job.outcome == prov.OK:
            prov.settled(pp, ps, seed, job.charge, job.prompt + job.output, now)
        if pp.counts == prov.COUNTS_AT_ANSWER:
            prov.advanced(pp, ps, seed, now)
            self._state(job)

    def _state(self, job: Job) -> None:
        """What the answer's headers will say: limit and remaining of tokens, then of the tighter requests limit."""
        pp, ps = self.pp, self.ps
        d = prov.requests_dimension(pp, ps)
        job.stated = (
            prov.limit_now(pp, ps, law.TPM),
            prov.remaining(pp, ps, law.TPM),
            d,
            prov.limit_now(pp, ps, d) if d >= 0 else 0.0,
            prov.remaining(pp, ps, d) if d >= 0 else 0.0,
        )

    # ------------------------------------------------------------ what happens

    def _on_arrival(self, event: _Moment) -> None:
        job, now = event._value, self.env._now
        self._advance(now)
        self._may_go(job, now, self.arrived)
        self._next_arrival()
        if self.stopped:
            self._stop(now, self.stopped)
        self._pump(now)

    def _on_retry_due(self, event: _Moment) -> None:
        job, now = event._value, self.env._now
        self._advance(now)
        if self.stopped:
            self._give_up(job, now, self.stopped)
            return
        self._may_go(job, now, self.urgent)
        self._watch_deadline(job)
        self._pump(now)

    def _watch_deadline(self, job: Job) -> None:
        gives_up_at = law.deadline_at(self.p, job.first_launched_s)
        if gives_up_at < inf:
            _Moment(self.env, gives_up_at, RETRY_DUE, self._on_deadline, (job, job.tries))

    def _on_deadline(self, event: _Moment) -> None:
        """A retry or finalize pass that still waits for its launch when its request's time is over ends there."""
        (job, tries), now = event._value, self.env._now
        if job.ended or job.tries != tries or job.launched_s >= job.eligible_s:
            return
        self._advance(now)
        self.waiting -= 1
        self._give_up(job, now, FailureCode.DEADLINE_EXCEEDED)
        self._pump(now)

    def _on_wake(self, event: _Moment) -> None:
        if event is self.timer:
            self.timer = None
            self.timer_at = inf
            now = self.env._now
            self._advance(now)
            self._pump(now)

    def _on_answer(self, event: _Moment) -> None:
        job, now = event._value, self.env._now
        p, s = self.p, self.s
        self._advance(now)
        outcome = job.outcome
        unheard = outcome == TIMEOUT or outcome == prov.DROPPED
        if unheard or (outcome == prov.OK and job.lane == law.FINALIZE):
            self.tally.extra_prompt_tokens += job.prompt
            self.tally.extra_output_tokens += job.output
        if not unheard:
            self._left(job, now)
            if outcome != prov.OK:
                self._sync(job, now)
        if outcome == prov.OK:
            in_wait = self.cause
            self._on_ok(job, now)
            if not law.answer_may_admit(p, in_wait) and not self.urgent and self.learner is None:
                return
        elif outcome in (prov.THROTTLED, prov.SLOW_DOWN):
            self.tally.throttled += 1
            u = keyed_uniform(self.seed, job.index, attempt_key(job.lane, job.tries), JITTER_RETRY)
            at = law.throttled(
                p, s, job.reserve, job.attempt, job.retry_after_s, job.first_launched_s, job.launched_s, now, u
            )
            self._again(job, now, at, law.keeps_permit(p))
        elif outcome in (prov.TOO_LARGE, prov.QUOTA):
            law.released(p, s)
            law.answered(p, s, now)
            self._ended(job, now, SPENT[outcome])
            if outcome == prov.QUOTA:
                self._stop(now, FailureCode.INSUFFICIENT_QUOTA)
        else:
            u = keyed_uniform(self.seed, job.index, attempt_key(job.lane, job.tries), JITTER_RETRY)
            history, times = (job.index, job.attempt, job.outages, 0), (job.first_launched_s, job.launched_s, now)
            at, standing = law.failed(p, s, *history, job.retry_after_s, *times, u)
            job.failed_s = now
            self._again(job, now, at, standing)
        self._pump(now)

    def _sync(self, job: Job, now: float) -> None:
        """What the headers state, beside what has been booked since the launch."""
        p, s, at = self.p, self.s, job.launched_s
        refused = int(job.outcome not in CHARGED)
        if not (p.sync_headers and job.booked and prov.states_counts(self.pp, refused > 0)):
            return
        tokens_limit, tokens_left, d, requests_limit, requests_left = job.stated
        if tokens_limit > 0.0:
            since = s.booked[law.TPM] - job.booked[law.TPM]
            law.synced(p, s, law.TPM, tokens_limit, tokens_left, job.reserve, refused, since, at, now)
        if d >= 0:
            since = s.booked[d] - job.booked[d]
            law.synced(p, s, d, requests_limit, requests_left, 1.0, refused, since, at, now)

    def _on_ok(self, job: Job, now: float) -> None:
        tally = self.tally
        used = job.prompt + job.output
        if self.learner is not None and self.columns.kind is not None and job.lane == law.MAIN:
            self.learner.saw(int(self.columns.kind[job.index]), job.prompt, used)
        law.settled(self.p, self.s, job.reserve, used, job.launched_s, now)
        self._sync(job, now)
        tally.used_tokens += used
        if job.lane == law.MAIN:
            tally.work.add(job.arrived_s, job.charge, used, now - job.launched_s)
        else:
            tally.work.finalized(job.charge, used)
        if self.finalize_max_tokens and job.lane == law.MAIN and self._came_back_empty(job):
            self._open_finalize(job, now)
        else:
            self._ended(job, now, "")

    def _came_back_empty(self, job: Job) -> bool:
        c, i = self.columns, job.index
        return 0 < c.cap[i] < c.output_tokens[i] and prov.cut_without_text(self.pp, self.provider_seed, i)

    def _open_finalize(self, job: Job, now: float) -> None:
        """The answer was cut off and has no usable text: one more call, before new work."""
        if self.on_attempt is not None:
            self._record(job, now, "")
        law.finalize_opened(self.p, self.s)
        self.tally.finalize_passes += 1
        c, i = self.columns, job.index
        output = min(float(c.output_tokens[i]), float(self.finalize_max_tokens))
        sizes = float(c.finalize_reserve[i]), float(c.finalize_charge[i]), job.prompt, output
        last = Job(i, *sizes, job.recorded_s, now)
        last.arrived_s = job.arrived_s
        last.lane = law.FINALIZE
        last.first_launched_s = job.first_launched_s
        last.launched_s = -1.0
        self._may_go(last, now, self.urgent)
        self._watch_deadline(last)
        if self.stopped:
            self._stop(now, self.stopped)

    def _again(self, job: Job, now: float, at: float, standing: int) -> None:
        """After a throttle or a failure: try again at `at`, or never (inf)."""
        if at == inf:
            spent = law.is_spent(self.p, job.attempt, job.retry_after_s)
            self._ended(job, now, SPENT[job.outcome] if spent else FailureCode.DEADLINE_EXCEEDED)
            if law.is_shut_out(self.s):
                self._stop(now, FailureCode.OUTWAITED)
            return
        if self.on_attempt is not None:
            self._record(job, now, "")
        self.tally.waits_s[BACKOFF] += at - now
        job.attempt += 1
        if job.failed_s >= 0.0 and self.s.probe_at > -inf:
            self._spare(job)
        job.drawn_s = job.jitter_u = -1.0
        job.standing = standing
        job.submitted_s = now
        _Moment(self.env, at, RETRY_DUE, self._on_retry_due, job)

    def _give_up(self, job: Job, now: float, code: str) -> None:
        """A job that will not be launched any more."""
        job.ended = True
        if job.standing == law.HOLDING:
            law.released(self.p, self.s)
        self._close(job, now, code)

    def _stop(self, now: float, code: str) -> None:
        """Nothing is launched any more (no credit, or only waits too long): what waits ends here, unlaunched."""
        self.stopped = code
        job = self._first()
        while job is not None:
            self._taken(job)
            self._give_up(job, now, code)
            job = self._first()

    def _ended(self, job: Job, now: float, code: str) -> None:
        """The request is over with this attempt: answered (0) or lost."""
        if self.on_attempt is not None:
            self._record(job, now, code)
        self._close(job, now, code)

    def _close(self, job: Job, now: float, code: str) -> None:
        if job.lane == law.FINALIZE:
            law.finalize_closed(self.p, self.s)
        if not code:
            self.tally.latencies_s.append(now - job.arrived_s)
        self.tally.ended(code, now)

    def _record(self, job: Job, now: float, code: str) -> None:
        assert self.on_attempt is not None
        self.on_attempt(job, now, code)

    def run(self, start_s: float = 0.0) -> Tally:
        """Runs to the end of the last request. Every request has then ended exactly once (asserted).

        `start_s`: the moment of the first launch on the law's clock, whose sliding windows have steps of their own.
        """
        self.env._now = self.clock_at = start_s
        self._pump(start_s)
        self.env.run()
        tally, requests = self.tally, len(self.columns.reserve)
        assert tally.requests == requests, f"{requests - tally.requests} of {requests} requests never ended"
        assert self.s.in_flight == 0, f"{self.s.in_flight} permits leaked"
        assert self.s.finalize_open == 0, f"{self.s.finalize_open} finalize passes never closed"
        tally.failures = dict(sorted(tally.failures.items()))  # The compiled engine does not know which came first.
        return tally

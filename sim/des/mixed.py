"""A run over live calls, flex and the Batch API in SimPy's calendar: the live half as ever, batches beside it.

The live half is the ordinary simulation: the scheduler, the law, the synthetic provider. Batches are the synthetic
provider's own model (`sim/model/batches.py`). What goes where is decided by `governor/forecast/mixes.py`, the function
that a live run asks, at the times at which a live run would ask it: after each batch that ends, and every `step_s`.

The provider's turnaround is one thing, what the decision believes of it another: it is only told the belief.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from governor import law
from governor.batchapi.limits import ENDED, EXPIRES_S, IN_PROGRESS
from governor.forecast.mixes import (
    FLEX_BLOCKED_S,
    Candidate,
    LiveRate,
    OpenBatch,
    Placement,
    Situation,
    Turnaround,
    decide,
    step_s,
)
from governor.model.errors import FailureCode
from governor.model.keyed import FAULT, keyed_uniform
from sim.des.calendar import CHANGE, RETRY_DUE, Appointment
from sim.des.driver import Simulation
from sim.des.jobs import Job
from sim.des.run import Tally
from sim.model.batches import Batch, BatchApi, BatchQueue
from sim.model.provider import ProviderParams
from sim.model.workload import Columns

LIVE, FLEX, BATCH = "live", "flex", "batch"
# What is not answered by then is lost: batches that always expire would be handed in for ever.
GIVE_UP_S = 10 * EXPIRES_S

Decide = Callable[[Situation], Placement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What a run over several places is told. Sequences have one value per request.

    `queue_tokens`: usable ones, inf = no limit. `flex_slower`: factor on live answers' time; `flex_refused`: share of
    flex requests refused for lack of capacity. `horizon_s`: the deadline, seconds from the beginning. `re_decides`: at
    intervals, not only when a batch has ended.
    """

    models: Sequence[str]
    saving_usd: Sequence[float]
    flex: Sequence[bool]
    batch_api: BatchApi
    queue_tokens: float
    file_requests: int
    horizon_s: float
    turnaround: Turnaround
    live: LiveRate
    decide: Decide = decide
    re_decides: bool = True
    flex_slower: float = 3.0
    flex_refused: float = 0.0


@dataclass(slots=True)
class _Open:
    batch: Batch
    rows: tuple[int, ...]


class MixedSimulation(Simulation):
    """One run; `run()` returns its tally, and `place` then says for each request where it was answered."""

    def __init__(
        self, columns: Columns, params: law.Params, provider: ProviderParams, *, seed: int, mix: Mix, **rest: Any
    ) -> None:
        super().__init__(columns, params, provider, seed=seed, from_trace=True, **rest)
        self.mix = mix
        self.queue = BatchQueue(mix.batch_api, seed, "org-simulated")
        self.place = [""] * len(columns)
        self.decisions = self.submitted = self.cancelled = self.refused = 0
        self._jobs = sorted(self._coming, key=lambda job: job.index)
        self._reserve = [job.reserve for job in self._jobs]
        self._input = [int(job.prompt) for job in self._jobs]
        self._waiting = set(range(len(columns)))
        self._open: dict[int, _Open] = {}
        self._live_requests, self._live_tokens = 0, 0.0
        self._flex_from = 0.0
        self._decides_at = 0.0
        self._tick: Appointment | None = None

    def run(self, start_s: float = 0.0) -> Tally:
        """Run to the end of the last request; see `Simulation.run`."""
        assert start_s == 0.0
        return super().run(start_s)

    def _next_arrival(self) -> None:
        """Take the first decision: requests arrive as it says."""
        self._decide(self.env.now)

    def _on_arrival(self, event: Appointment) -> None:
        self.scheduler.submitted(event._value, self.env._now)
        self._settle()

    # ------------------------------------------------------------ deciding

    def _on_tick(self, event: Appointment) -> None:
        now = self.env._now
        if event is self._tick and (self._collect(now) or now >= self._decides_at):
            self._decide(now)
        elif event is self._tick:
            self._await()

    def _await(self) -> None:
        """Set the timer for the next decision, or the next change of a batch before it."""
        at = min(self._decides_at, self.queue.next_at())
        if at > GIVE_UP_S:
            now = self.env._now
            for _ in range(len(self._waiting) + sum(len(each.rows) for each in self._open.values())):
                self.tally.ended(FailureCode.BATCH_CANCELLED, now)
            self._waiting.clear()
            self._open.clear()
        is_over = not self._waiting and not self._open
        self._tick = None if is_over else Appointment(self.env, at, CHANGE, self._on_tick)

    def _decide(self, now: float) -> None:
        mix = self.mix
        if not self._waiting and not self._open:
            return
        flex = now >= self._flex_from
        situation = Situation(
            now=now,
            deadline=mix.horizon_s,
            waiting=[
                Candidate(i, mix.models[i], self._input[i], self._reserve[i], mix.saving_usd[i], flex and mix.flex[i])
                for i in sorted(self._waiting)
            ],
            batches=[self._seen(key, each, now) for key, each in self._open.items()],
            live=mix.live,
            live_left=(self._live_requests, self._live_tokens),
            queue_tokens=mix.queue_tokens,
            file_requests=mix.file_requests,
            step_s=step_s(now, mix.horizon_s),
            turnaround=mix.turnaround,
        )
        decision = mix.decide(situation)
        self.decisions += 1
        for key in decision.cancel:
            if self.queue.cancel(self._open[key].batch, now):
                self.cancelled += 1
        for rows in decision.batch:
            self._hand_in(rows, now)
        for i in decision.flex:
            self._launch_flex(i, now)
        for i in decision.live:
            self._go_live(i, LIVE, now)
        self._decides_at = now + situation.step_s if mix.re_decides else inf
        self._await()

    def _seen(self, key: int, each: _Open, now: float) -> OpenBatch:
        batch = each.batch
        done = batch.answered(now)
        left = [each.rows[i] for i in batch.order[done:]]
        tokens = sum(self._reserve[i] for i in left)
        cancelling = batch.status not in ("validating", IN_PROGRESS)
        return OpenBatch(key, batch.model, batch.tokens, len(left), tokens, batch.created_at, done > 0, cancelling)

    def _hand_in(self, rows: tuple[int, ...], now: float) -> None:
        self._waiting.difference_update(rows)
        self.submitted += 1
        tokens = sum(self._input[i] for i in rows)
        model = self.mix.models[rows[0]]
        batch = self.queue.submit(self.submitted, model=model, tokens=tokens, lines=len(rows), now=now)
        self._open[self.submitted] = _Open(batch, rows)

    def _collect(self, now: float) -> bool:
        """Take in the batches that have ended, their answers and their rest; return whether there were any."""
        self.queue.advance(now)
        before = len(self._open)
        for key, each in list(self._open.items()):
            batch = each.batch
            if batch.status not in ENDED:
                continue
            del self._open[key]
            done = batch.answered(now) if batch.status != "failed" else 0
            for i in batch.order[:done]:
                self.place[each.rows[i]] = BATCH
                self.tally.ended("", now)
            self._waiting.update(each.rows[i] for i in batch.order[done:])
            if batch.status == "failed":
                self._waiting.update(each.rows)
        return len(self._open) < before

    def _launch_flex(self, i: int, now: float) -> None:
        if keyed_uniform(self.seed, i, self.refused, FAULT) < self.mix.flex_refused:
            self.refused += 1
            self._flex_from = now + FLEX_BLOCKED_S
            return
        job = self._jobs[i]
        if job.drawn_s >= 0.0:
            job.drawn_s *= self.mix.flex_slower
        self._go_live(i, FLEX, now)

    def _go_live(self, i: int, place: str, now: float) -> None:
        self._waiting.discard(i)
        self.place[i] = place
        job = self._jobs[i]
        job.submitted_s = job.arrived_s = job.eligible_s = now
        self._live_requests += 1
        self._live_tokens += self._reserve[i]
        Appointment(self.env, now, RETRY_DUE, self._on_arrival, job)

    # ------------------------------------------------------------ the live half

    def ended(self, job: Job, now: float, code: str) -> None:
        """Count a request that live calls have ended."""
        self._live_over(job)
        super().ended(job, now, code)

    def lost(self, job: Job, at: float, code: str) -> None:
        """Count a request that live calls have lost."""
        self._live_over(job)
        super().lost(job, at, code)

    def given_up(self, job: Job, now: float, code: str) -> None:
        """Count a request that live calls have given up."""
        self._live_over(job)
        super().given_up(job, now, code)

    def _live_over(self, job: Job) -> None:
        self._live_requests -= 1
        self._live_tokens -= self._reserve[job.index]


def only(place: str) -> Decide:
    """Return a decision that uses one place for everything: `LIVE`, `FLEX` or `BATCH`."""

    def decided(s: Situation) -> Placement:
        keys = tuple(c.key for c in s.waiting)
        if place == LIVE:
            return Placement(live=keys)
        if place == FLEX:
            return Placement(flex=keys)
        # Without a deadline nothing needs to be bought live.
        found = decide(replace(s, deadline=inf, waiting=[replace(c, flex=False) for c in s.waiting]))
        return Placement(batch=found.batch)

    return decided

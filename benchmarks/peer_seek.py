"""The peers of `bench_seek`: what other libraries do about a limit that nobody states, in the same virtual time.

Their rules, restated here as they are and with their defaults, at the simulator's provider:

- `inspect_ai` 0.3.285, `util/_concurrency.py` (AdaptiveConcurrencyController) and `model/_retry.py`: as many requests
  in flight as a controller allows, 20 at first, 10 to 100; a place is kept over the waits between attempts.
- `langroid` 0.69.16, `language_models/rate_limiter.py` (RateLimiter) and `language_models/utils.py` (retries): requests
  are spaced; five retries, then a request is lost. It has no limit in flight of its own: `workers` of them call.

Below both, the official SDK retries a 429 twice, after the stated wait or after half a second, doubling.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from sim.des.jobs import jobs_of
from sim.experiment.experiment import Case
from sim.model import provider as prov

Steps = Generator[float, None, bool]
_SDK_RETRIES = 2
# A wait of the SDK that is longer than this is not obeyed.
_SDK_MAX_S = 60.0


@dataclass
class Runs:
    """One run: requests as generators that yield seconds to wait and return whether they were answered."""

    work: Case
    seed: int
    now: float = 0.0
    throttled: int = 0
    attempts: int = 0
    lost: int = 0
    in_flight: int = 0
    ps: prov.ProviderState = field(default_factory=prov.ProviderState)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        prov.day_started(self.ps, 0.0, 0.0)

    def attempt(self, job: Any, key: int) -> Generator[float, None, tuple[bool, float]]:
        """Send it; return whether it was answered, and the wait that its refusal stated, -1 = none."""
        self.attempts += 1
        pp, rest = self.work.provider, (job.output, job.recorded_s, self.now, job.drawn_s, job.prompt)
        outcome, service_s, _, wait_s = prov.answered(pp, self.ps, self.seed, job.index, key, job.charge, *rest)
        yield service_s
        if outcome == prov.OK:
            prov.settled(pp, self.ps, self.seed, job.charge, job.prompt + job.output, self.now, job.prompt)
            return True, -1.0
        self.throttled += 1
        return False, wait_s

    def sdk_wait_s(self, retry: int, stated_s: float) -> float:
        """Return how long openai-python waits before its retry of that number, from 0."""
        if 0.0 < stated_s <= _SDK_MAX_S:
            return stated_s
        return min(0.5 * 2.0**retry, 8.0) * (1.0 - 0.25 * self.random.random())

    def limit(self) -> float:
        """Return how many requests may be under way at once."""
        raise NotImplementedError

    def request(self, job: Any) -> Steps:
        """Return the steps of one request."""
        raise NotImplementedError

    def run(self) -> float:
        """Run all to the end; return when the last was answered or given up."""
        jobs = iter(
            jobs_of(self.work.columns, self.work.params, self.work.provider, self.seed, self.seed, from_trace=False)
        )
        due: list[tuple[float, int, Steps]] = []
        order, is_more = 0, True
        while True:
            while is_more and self.in_flight < self.limit():
                job = next(jobs, None)
                if job is None:
                    is_more = False
                else:
                    self.in_flight += 1
                    heapq.heappush(due, (self.now, order, self.request(job)))
                    order += 1
                    self.started()
            if not due:
                return self.now
            self.now, _, steps = heapq.heappop(due)
            try:
                heapq.heappush(due, (self.now + next(steps), order, steps))
                order += 1
            except StopIteration as ended:
                self.in_flight -= 1
                self.lost += not ended.value

    def started(self) -> None:
        """Note that a request has begun."""


class InspectAi(Runs):
    """AdaptiveConcurrencyController: slow start, then up by a twentieth per clean round, down to four fifths."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.allowed, self.successes, self.peak = 20, 0, 0
        self.is_refused, self.cooldown_until = False, 0.0

    def limit(self) -> float:
        return self.allowed

    def started(self) -> None:
        # Places are counted as they are taken, but not during the cooldown.
        if self.now >= self.cooldown_until:
            self.peak = max(self.peak, self.in_flight)

    def succeeded(self) -> None:
        """notify_success."""
        if self.now < self.cooldown_until:
            return
        self.successes += 1
        old, peak = self.allowed, self.peak
        if self.successes < max(old, 4):
            return
        self.peak = self.successes = 0
        if peak < 0.8 * old:
            return
        grown = old * 2 if not self.is_refused else old + max(1, round(old * 0.05))
        if self.is_refused and grown >= 10:
            grown = (grown + 4) // 5 * 5
        self.allowed = min(grown, 100)

    def refused(self) -> None:
        """notify_retry."""
        self.successes = self.peak = 0
        self.is_refused = True
        if self.now < self.cooldown_until:
            return
        cut = int(self.allowed * 0.8)
        self.allowed = max(cut if cut < 10 else cut // 5 * 5, 10)
        self.cooldown_until = self.now + 15.0

    def request(self, job: Any) -> Steps:
        key = retries = 0
        while True:
            for sent in range(_SDK_RETRIES + 1):
                is_answered, stated_s = yield from self.attempt(job, key)
                key += 1
                if is_answered:
                    if key == 1:
                        self.succeeded()
                    return True
                if sent < _SDK_RETRIES:
                    yield self.sdk_wait_s(sent, stated_s)
                self.refused()  # the SDK's own retries are seen as they are sent
            # tenacity.wait_exponential_jitter(initial=3, max=1800, jitter=3), without end
            yield min(3.0 * 2.0 ** min(retries, 20) + self.random.uniform(0.0, 3.0), 1_800.0)
            retries += 1


class Langroid(Runs):
    """RateLimiter without counts: the interval doubles on a 429 that states no wait, and decays by tenths."""

    workers = 40.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.interval_s, self.next_at, self.gate_until = 0.0, 0.0, 0.0

    def limit(self) -> float:
        return self.workers

    def acquired(self) -> Generator[float, None, None]:
        """acquire_async: a slot after all earlier ones, again if a hold began meanwhile, 60 s at most."""
        left_s = 60.0
        while True:
            at = max(self.now, self.next_at, self.gate_until)
            self.next_at = at + max(self.interval_s, 0.05)
            wait_s = min(at - self.now, left_s)
            if wait_s > 0.0:
                left_s -= wait_s
                yield wait_s
            if left_s <= 0.0 or self.gate_until <= self.now:
                return

    def refused(self, stated_s: float) -> None:
        """observe_rate_limit_error."""
        if stated_s <= 0.0:
            self.interval_s = min(10.0, max(0.05, self.interval_s * 2.0))
        hold_s = min(max(stated_s, self.interval_s), 60.0)
        if hold_s > 0.0:
            self.gate_until = max(self.gate_until, self.now + hold_s)
            self.next_at = max(self.next_at, self.gate_until)

    def request(self, job: Any) -> Steps:
        key, delay_s = 0, 1.0
        for _ in range(5 + 1):
            yield from self.acquired()
            stated_s = -1.0
            for sent in range(_SDK_RETRIES + 1):
                is_answered, stated_s = yield from self.attempt(job, key)
                key += 1
                if is_answered:
                    self.interval_s = 0.0 if self.interval_s * 0.9 < 1e-3 else self.interval_s * 0.9
                    return True
                if sent < _SDK_RETRIES:
                    yield self.sdk_wait_s(sent, stated_s)
            # Its parser knows whole and broken seconds.
            self.refused(stated_s)
            delay_s *= 1.3 * (1.0 + self.random.random())
            yield delay_s
        return False


def figures(peer: type[Runs], work: Case, seed: int, bound_s: float) -> tuple[float, float, int]:
    """Return the answered share of the bound's rate, the 429s per 100 attempts, and how many requests were lost."""
    runs = peer(work, seed)
    took_s = runs.run()
    count = len(work.columns)
    share = (count - runs.lost) / count * bound_s / took_s if took_s > 0.0 else math.nan
    return share, 100.0 * runs.throttled / runs.attempts, runs.lost

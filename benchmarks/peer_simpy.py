"""The peer: a closed batch against a rate-limited provider, as one would write it in plain SimPy.

What lives here is the yardstick for the speed of `sim/des/driver.py`, so it shares no code with `governor` or `sim`,
and its source was fixed before that driver was tuned. It is meant to be an honest model in SimPy's usual idiom, not a
slow one: one process per request, all started at once, a `simpy.Resource` for the permits and another of capacity 1 as
the launch gate. Nobody polls: who stands at the gate asks the buckets once when there is room, and sleeps until then.

The rules, in the words of the knobs that give the same behaviour elsewhere: OPENAI_TPM_WINDOW=bucket,
OPENAI_LAUNCH_ORDER=fifo, OPENAI_SETTLE=false, OPENAI_BACKOFF_KEEPS_PERMIT=true, OPENAI_HOLD_ON_THROTTLE=false,
OPENAI_SYNC_HEADERS=false, no refunds (a retry reserves anew), no daily budgets, no deadline, no finalize pass.
Headroom applies to tokens, not to requests per minute. A reservation above the budget waits for a full bucket, but not
for an empty flight. The provider is the continuous bucket of docs/explanation/provider.md#buckets: it admits if
`used + requested <= limit`, charges at admission, answers a 429 at once, and does not charge for it.

Only totals are kept, no row per attempt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from dataclasses import dataclass

import simpy

WINDOW_S = 60.0
JITTER_CAP_S = 3.0
BACKOFF_CAP_S = 60.0
# The provider's wait is floored to ms, so a client that sleeps exactly that long can come up to 1 ms too early.
RETRY_MARGIN_S = 0.005
# Clock sums are exact to about 1e-12 s; without a little slack a request that is exactly on time would draw a 429.
ROUNDING_TOKENS = 1e-6
# Stands for "no limit" (0 in the arguments): large enough never to bind, small enough to calculate with.
UNLIMITED = 1e15


@dataclass(slots=True)
class Totals:
    """What a run leaves. Seconds since its start; `reserved_tokens` counts every attempt, `throttled` every 429."""

    completed: int = 0
    failed: int = 0
    throttled: int = 0
    makespan_s: float = 0.0
    reserved_tokens: int = 0
    peak_in_flight: int = 0


class Bucket:
    """A continuously refilled bucket, kept as the moment at which it will be full again. It starts full."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity or UNLIMITED
        self.rate_per_s = self.capacity / WINDOW_S
        self.full_at = 0.0

    def ready_at(self, amount: float) -> float:
        """Earliest moment with room for `amount`, maybe past. More than the capacity waits for a full bucket."""
        return self.full_at - max(self.capacity - amount, 0.0) / self.rate_per_s

    def take(self, amount: float, at: float) -> None:
        """Book `amount` at the moment `at`, which may lie ahead."""
        self.full_at = max(self.full_at, at) + amount / self.rate_per_s

    def wait_s(self, amount: float, now: float) -> float:
        """The provider's wait formula, (used + requested - limit) / limit * 60 s; 0 or less: there is room."""
        used = max(self.full_at - now, 0.0) * self.rate_per_s
        return (used + amount - self.capacity - ROUNDING_TOKENS) / self.rate_per_s


class Provider:
    """Admits or refuses, and draws how long an answer takes."""

    def __init__(
        self,
        *,
        tpm_limit: int,
        rpm_limit: int,
        base_latency_s: float,
        per_token_s: float,
        sigma: float,
        rng: random.Random,
    ) -> None:
        self.tokens = Bucket(tpm_limit)
        self.requests = Bucket(rpm_limit)
        self.base_latency_s = base_latency_s
        self.per_token_s = per_token_s
        self.sigma = sigma
        self.rng = rng

    def admit(self, charge: int, now: float) -> float | None:
        """None if admitted (and charged), else the Retry-After of the 429 in seconds, floored to ms; inf: too large."""
        wait_s = max(self.tokens.wait_s(charge, now), self.requests.wait_s(1, now))
        if wait_s > 0.0:
            return math.floor(wait_s * 1000.0) / 1000.0 if charge <= self.tokens.capacity else math.inf
        self.tokens.take(charge, now)
        self.requests.take(1, now)
        return None

    def latency_s(self, output_tokens: int) -> float:
        """First token plus the rest, times log-normal noise with median 1."""
        return (self.base_latency_s + self.per_token_s * output_tokens) * self.rng.lognormvariate(0.0, self.sigma)


class Governor:
    """Our side: permits, the launch gate with its stagger, the budgets, and how long to back off."""

    def __init__(
        self,
        env: simpy.Environment,
        *,
        concurrency: int,
        stagger_s: float,
        jitter_ratio: float,
        token_budget: float,
        request_budget: float,
        max_attempts: int,
        backoff_base_s: float,
        rng: random.Random,
    ) -> None:
        self.permits = simpy.Resource(env, capacity=concurrency)
        self.gate = simpy.Resource(env, capacity=1)
        self.stagger_s = stagger_s
        self.jitter_s = min(jitter_ratio * stagger_s, JITTER_CAP_S)
        self.jitter_ratio = jitter_ratio
        self.next_slot_at = 0.0
        self.tokens = Bucket(token_budget)
        self.requests = Bucket(request_budget)
        self.max_attempts = max_attempts
        self.backoff_base_s = backoff_base_s
        self.rng = rng

    def book(self, reserve: int, earliest_at: float) -> float:
        """Reserve tokens and one request at the first moment from `earliest_at` on that has room; that moment.

        First come, first served. Only the head of the gate and retries ask, so new work never gets ahead of a retry.
        """
        at = max(earliest_at, self.tokens.ready_at(reserve), self.requests.ready_at(1))
        self.tokens.take(reserve, at)
        self.requests.take(1, at)
        return at

    def book_next_slot(self, now: float) -> None:
        """The next launch comes one stagger after this one, give or take the jitter."""
        self.next_slot_at = now + self.stagger_s
        if self.jitter_s > 0.0:
            self.next_slot_at += self.rng.uniform(-self.jitter_s, self.jitter_s)

    def backoff_s(self, attempt: int, retry_after_s: float | None) -> float:
        """Seconds to wait after the 429 of attempt 1, 2, ...: Retry-After wins over doubling; jitter only adds."""
        if retry_after_s is None:
            wait_s = min(self.backoff_base_s * 2.0 ** (attempt - 1), BACKOFF_CAP_S)
        else:
            wait_s = retry_after_s + RETRY_MARGIN_S
        return wait_s * (1.0 + self.jitter_ratio * self.rng.random())


class Batch:
    """One run: the two sides, the clock between them and the totals."""

    def __init__(
        self, env: simpy.Environment, governor: Governor, provider: Provider, *, sends_retry_after: bool
    ) -> None:
        self.env = env
        self.governor = governor
        self.provider = provider
        self.sends_retry_after = sends_retry_after
        self.totals = Totals()
        self.in_flight = 0

    def request(self, output_tokens: int, reserve: int, charge: int) -> Generator[simpy.Event, None, None]:
        """The life of one request, as a SimPy process."""
        env, governor, provider, totals = self.env, self.governor, self.provider, self.totals
        with governor.permits.request() as permit:
            yield permit
            with governor.gate.request() as turn:
                yield turn
                launch_at = governor.book(reserve, max(env.now, governor.next_slot_at))
                if launch_at > env.now:
                    yield env.timeout(launch_at - env.now)
                governor.book_next_slot(env.now)
            attempt = 1
            totals.reserved_tokens += reserve
            while (retry_after_s := provider.admit(charge, env.now)) is not None:
                totals.throttled += 1
                if attempt == governor.max_attempts or retry_after_s == math.inf:
                    break
                yield env.timeout(governor.backoff_s(attempt, retry_after_s if self.sends_retry_after else None))
                # A retry takes tokens but no launch slot, and so does not pass the gate again.
                launch_at = governor.book(reserve, env.now)
                if launch_at > env.now:
                    yield env.timeout(launch_at - env.now)
                attempt += 1
                totals.reserved_tokens += reserve
            if retry_after_s is None:
                self.in_flight += 1
                totals.peak_in_flight = max(totals.peak_in_flight, self.in_flight)
                yield env.timeout(provider.latency_s(output_tokens))
                self.in_flight -= 1
                totals.completed += 1
            else:
                totals.failed += 1
            totals.makespan_s = env.now


def run(
    prompt_tokens: list[int],
    output_tokens: list[int],
    *,
    reserve: list[int],
    charge: list[int],
    concurrency: int,
    stagger_s: float,
    jitter_ratio: float,
    tpm_limit: int,
    rpm_limit: int,
    headroom: float,
    base_latency_s: float,
    per_token_s: float,
    sigma: float,
    seed: int,
    max_attempts: int = 5,
    backoff_base_s: float = 2.0,
    sends_retry_after: bool = True,
) -> Totals:
    """Simulate one batch, all of it waiting at time 0, and return its totals.

    The four lists have one entry per request: its real sizes, what we reserve for it and what the provider charges.
    A limit of 0 is none. `headroom` is the share of `tpm_limit` that we leave unused; `rpm_limit` is mirrored as it is.
    """
    rng = random.Random(seed)
    env = simpy.Environment()
    governor = Governor(
        env,
        concurrency=concurrency,
        stagger_s=stagger_s,
        jitter_ratio=jitter_ratio,
        token_budget=tpm_limit * (1.0 - headroom),
        request_budget=rpm_limit,
        max_attempts=max_attempts,
        backoff_base_s=backoff_base_s,
        rng=rng,
    )
    provider = Provider(
        tpm_limit=tpm_limit,
        rpm_limit=rpm_limit,
        base_latency_s=base_latency_s,
        per_token_s=per_token_s,
        sigma=sigma,
        rng=rng,
    )
    batch = Batch(env, governor, provider, sends_retry_after=sends_retry_after)
    # The prompt's length matters through `reserve` and `charge` alone; it is walked to hold the lists to one length.
    for _, output, reserved, charged in zip(prompt_tokens, output_tokens, reserve, charge, strict=True):
        env.process(batch.request(output, reserved, charged))
    env.run()
    return batch.totals

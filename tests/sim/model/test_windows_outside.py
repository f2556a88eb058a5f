"""Windows against limiters that we did not write: pyrate-limiter's algorithms, fed the same attempts at the same times.

The attempts weigh tokens, so that both sides count amounts. Waits are compared where pyrate-limiter states them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from pyrate_limiter import InMemoryBucket, Rate, RateItem
from pyrate_limiter.abstracts.algorithm import GCRA, FixedWindow, SlidingWindowLog

from sim.model import provider as prov
from sim.model import windows as win
from sim.model.provider import ProviderState
from tests.sim.doors import knock, quota

LIMIT, REQUESTS, MINUTE_MS = 600, 30, 60_000
Door = Callable[[int, int], tuple[bool, int]]
"""Asked (milliseconds, tokens), it says whether they are let in, and if not, how long to wait: milliseconds."""


def gcra(burst: int, limit: int = LIMIT) -> Door:
    algorithm, rates = GCRA(), [Rate(limit, MINUTE_MS, burst)]
    state = algorithm.initial(rates)

    def door(now: int, tokens: int) -> tuple[bool, int]:
        nonlocal state
        state, decision = algorithm.step(rates, state, now, tokens)
        return decision.allowed, decision.retry_after_ms if decision.retry_after_ms is not None else -1

    return door


def logged(algorithm: FixedWindow | SlidingWindowLog, limit: int = LIMIT) -> Door:
    bucket = InMemoryBucket([Rate(limit, MINUTE_MS)], algorithm)

    def door(now: int, tokens: int) -> tuple[bool, int]:
        item = RateItem("key", now, tokens)
        let_in = bucket.put(item)
        return let_in, -1 if let_in else int(bucket.waiting(item))

    return door


@pytest.mark.parametrize(
    ("door", "habits", "capacity"),
    [
        (lambda: gcra(LIMIT), {}, LIMIT),
        (lambda: gcra(100), {"burst_ratio": 100 / LIMIT}, 100),
        (lambda: logged(FixedWindow()), {"window": win.CLOCK}, LIMIT),
        (lambda: logged(SlidingWindowLog()), {"window": win.SLIDING}, LIMIT),
    ],
)
def test_pyrate_limiter_lets_in_the_same_attempts(
    door: Callable[[], Door], habits: dict[str, float], capacity: int, seed: int
) -> None:
    theirs, pp, ps = door(), quota(tpm=float(LIMIT), **habits), ProviderState()
    rng, now, refused, admitted = random.Random(seed), 0, 0, set[int]()
    for _ in range(2_000):
        now += rng.choice([1, 7, 130, rng.randrange(1, 9_000), rng.randrange(1, 2_000)])
        if now - MINUTE_MS in admitted:
            now += 1  # theirs still counts what is exactly a minute old
        tokens = rng.randint(1, rng.choice([5, 40, capacity]))
        let_in, wait_ms = theirs(now, tokens)
        outcome, _, wait_s = knock(pp, ps, float(tokens), now / 1_000.0)
        assert (outcome == prov.OK) == let_in, (seed, now, tokens)
        if let_in:
            admitted.add(now)
        else:
            refused += 1
            # Theirs is rounded up, or a millisecond more; ours is cut off.
            assert wait_s * 1_000.0 == pytest.approx(wait_ms, abs=2.5), (seed, now)
    assert refused > 200
    assert len(admitted) > 200


@pytest.mark.parametrize(
    ("doors", "habits"),
    [
        (lambda: (gcra(5, REQUESTS), gcra(100)), {"burst_ratio": 100 / LIMIT}),
        (lambda: (logged(SlidingWindowLog(), REQUESTS), logged(SlidingWindowLog())), {"window": win.SLIDING}),
    ],
)
def test_requests_that_are_checked_before_tokens_state_their_own_wait(
    doors: Callable[[], tuple[Door, Door]], habits: dict[str, float], seed: int
) -> None:
    pp, ps = quota(LIMIT, REQUESTS, failed_count=prov.REFUSAL_REQUESTS, **habits), ProviderState()
    theirs, rng, now = doors(), random.Random(seed), 0
    refused, booked = [0, 0], set[int]()
    for _ in range(2_000):
        now += 4 * rng.choice([1, 7, 130, rng.randrange(1, 2_000), rng.randrange(1, 1_000)])
        while now - MINUTE_MS in booked:
            now += 1  # theirs still counts what is exactly a minute old
        tokens = rng.randint(1, rng.choice([10, 90]))
        outcome, d, wait_s = knock(pp, ps, float(tokens), now / 1_000.0)
        for dimension, (door, amount) in enumerate(zip(theirs, (1, tokens), strict=True)):
            let_in, wait_ms = door(now, amount)
            if not let_in:
                refused[dimension] += 1
                assert (outcome, d) == (prov.THROTTLED, (win.RPM, win.TPM)[dimension]), (seed, now)
                assert wait_s * 1_000.0 == pytest.approx(wait_ms, abs=2.5), (seed, now)
                break
            booked.add(now)
        else:
            assert outcome == prov.OK, (seed, now)
    assert min(refused) > 50

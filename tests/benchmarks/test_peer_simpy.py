"""The SimPy peer is a fair yardstick only if it models the rules: it meets closed forms and independent sums."""

from __future__ import annotations

import heapq
import math
import random
from typing import Any

import pytest

from benchmarks import peer_simpy as peer

# Nothing binds but what a test sets; latency is exactly 2 s.
OPEN: dict[str, Any] = {
    "concurrency": 10_000,
    "stagger_s": 0.0,
    "jitter_ratio": 0.0,
    "tpm_limit": 0,
    "rpm_limit": 0,
    "headroom": 0.0,
    "base_latency_s": 2.0,
    "per_token_s": 0.0,
    "sigma": 0.0,
    "seed": 1,
}


def _run(
    reserve: list[int], *, charge: list[int] | None = None, outputs: list[int] | None = None, **changes: Any
) -> peer.Totals:
    zeros = [0] * len(reserve)
    return peer.run(zeros, outputs or zeros, reserve=reserve, charge=charge or reserve, **{**OPEN, **changes})


@pytest.mark.parametrize("headroom", [0.0, 0.01, 0.15])
def test_bucket_alone_meets_its_closed_form(headroom: float) -> None:
    rng = random.Random(7)
    sizes = [rng.randrange(100, 5_000) for _ in range(500)]
    totals = _run(sizes, tpm_limit=30_000, headroom=headroom)
    budget = 30_000 * (1.0 - headroom)
    assert totals.makespan_s == pytest.approx((sum(sizes) - budget) / (budget / 60.0) + 2.0, rel=1e-9)
    assert (totals.completed, totals.failed, totals.throttled) == (500, 0, 0)
    assert totals.reserved_tokens == sum(sizes)


def test_requests_per_minute_alone_meet_their_closed_form() -> None:
    totals = _run([1] * 500, rpm_limit=60)
    assert totals.makespan_s == pytest.approx(500 - 60 + 2.0, rel=1e-9)
    assert (totals.completed, totals.throttled) == (500, 0)


@pytest.mark.parametrize(("requests", "concurrency"), [(1_000, 10), (1_001, 10), (7, 300)])
def test_concurrency_alone_meets_its_closed_form(requests: int, concurrency: int) -> None:
    totals = _run([1] * requests, concurrency=concurrency)
    assert totals.makespan_s == pytest.approx(math.ceil(requests / concurrency) * 2.0, rel=1e-9)
    assert totals.peak_in_flight == min(requests, concurrency)
    assert totals.completed == requests


def test_concurrency_with_unequal_answers_is_list_scheduling() -> None:
    rng = random.Random(11)
    outputs = [rng.randrange(1, 900) for _ in range(2_000)]
    slots = [0.0] * 7
    for output in outputs:
        heapq.heapreplace(slots, slots[0] + 0.2 + 0.02 * output)
    totals = _run([1] * 2_000, outputs=outputs, concurrency=7, base_latency_s=0.2, per_token_s=0.02)
    assert totals.makespan_s == pytest.approx(max(slots), rel=1e-9)


def test_stagger_spaces_launches() -> None:
    assert _run([1] * 40, stagger_s=15.0).makespan_s == pytest.approx(39 * 15.0 + 2.0)
    jittered = _run([1] * 40, stagger_s=15.0, jitter_ratio=0.2).makespan_s - 2.0
    # 39 uniform draws of +-3 s: standard deviation 3 / sqrt(3) * sqrt(39) = 10.8 s.
    assert 0.0 < abs(jittered - 39 * 15.0) < 4 * 10.8
    # 40 % of 15 s would be 6 s; the cap holds it to 3 s.
    capped = _run([1] * 2, stagger_s=15.0, jitter_ratio=100.0).makespan_s - 2.0
    assert 12.0 <= capped <= 18.0


def test_default_guardrails_on_ten_runs() -> None:
    totals = _run([7_000] * 10, concurrency=3, stagger_s=15.0, tpm_limit=30_000, headroom=0.15, base_latency_s=30.0)
    # Launches at 0, 15, 30 s; the 4th has tokens at (28,000 - 25,500) / 425 = 5.9 s. From there on tokens are the
    # slowest constraint in the long run: 7,000 tokens take 16.47 s. Calculated by hand, launch by launch:
    launches: list[float] = []
    for index in range(10):
        tokens_at = ((index + 1) * 7_000 - 25_500) / 425.0
        stagger_at = launches[-1] + 15.0 if launches else 0.0
        permit_at = launches[index - 3] + 30.0 if index >= 3 else 0.0
        launches.append(max(0.0, tokens_at, stagger_at, permit_at))
    assert totals.makespan_s == pytest.approx(launches[-1] + 30.0)
    assert totals.peak_in_flight <= 3
    assert totals.throttled == 0


def test_a_reservation_above_the_budget_waits_for_a_full_bucket() -> None:
    totals = _run([28_000, 28_000], tpm_limit=30_000, headroom=0.15)
    assert totals.makespan_s == pytest.approx(28_000 / 425.0 + 2.0)
    assert (totals.completed, totals.throttled) == (2, 0)


def test_backoff_doubles_until_the_attempts_are_spent() -> None:
    # One token per second: the second request would fit at 60 s, but its 429s come at 0, 2, 6, 14 and 30 s.
    totals = _run([1, 1], charge=[60, 60], tpm_limit=60, sends_retry_after=False)
    assert (totals.completed, totals.failed, totals.throttled) == (1, 1, 5)
    assert totals.makespan_s == pytest.approx(30.0)
    assert totals.reserved_tokens == 6


def test_retry_after_wins_over_backoff() -> None:
    totals = _run([1, 1], charge=[60, 60], tpm_limit=60)
    assert (totals.completed, totals.failed, totals.throttled) == (2, 0, 1)
    assert totals.makespan_s == pytest.approx(60.0 + 2.0, abs=0.01)


def test_retry_after_is_the_published_formula_floored_to_ms() -> None:
    # "Limit 250000, Used 250000, Requested 57059. Please try again in 13.694s", docs/explanation/provider.md#buckets.
    provider = peer.Provider(
        tpm_limit=250_000, rpm_limit=0, base_latency_s=1.0, per_token_s=0.0, sigma=0.0, rng=random.Random(1)
    )
    assert provider.admit(250_000, 0.0) is None
    assert provider.admit(57_059, 0.0) == 13.694
    assert provider.admit(250_001, 0.0) == math.inf


def test_too_large_fails_at_once_and_holds_nobody_up() -> None:
    totals = _run([1, 1, 1], charge=[10, 61, 10], tpm_limit=60)
    assert (totals.completed, totals.failed, totals.throttled) == (2, 1, 1)
    assert totals.makespan_s == pytest.approx(2.0)


def test_latency_noise_is_log_normal_with_the_given_sigma() -> None:
    count, sigma = 20_000, 0.25
    totals = _run([1] * count, concurrency=1, sigma=sigma)
    mean = 2.0 * math.exp(sigma**2 / 2.0)
    error = mean * math.sqrt((math.exp(sigma**2) - 1.0) / count)
    assert abs(totals.makespan_s / count - mean) < 4.0 * error


@pytest.mark.parametrize("seed", range(40))
def test_no_request_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(1, 400)
    charge = [rng.randrange(1, 3_000) for _ in range(count)]
    reserve = [max(1, round(tokens * rng.uniform(0.3, 1.5))) for tokens in charge]
    changes: dict[str, Any] = {
        "outputs": [rng.randrange(0, 500) for _ in range(count)],
        "concurrency": rng.randrange(1, 60),
        "stagger_s": rng.choice([0.0, 0.5, 15.0]),
        "jitter_ratio": 0.2,
        "tpm_limit": rng.choice([0, 4_000, 30_000]),
        "rpm_limit": rng.choice([0, 30, 500]),
        "headroom": rng.choice([0.0, 0.15]),
        "per_token_s": 0.02,
        "sigma": 0.25,
        "seed": seed,
        "sends_retry_after": rng.random() < 0.5,
    }
    totals = _run(reserve, charge=charge, **changes)
    print(f"seed {seed}: {totals}")  # shown when an assertion fails
    assert totals.completed + totals.failed == count
    assert totals.reserved_tokens >= sum(reserve)
    assert totals.peak_in_flight <= changes["concurrency"]
    assert totals.failed <= totals.throttled
    if limit := changes["tpm_limit"]:
        # Whatever was answered fits into a full bucket and its refill: the provider's own promise.
        smallest = sum(sorted(charge)[: totals.completed])
        assert smallest <= limit + limit / 60.0 * totals.makespan_s + 1.0
    assert totals == _run(reserve, charge=charge, **changes)

"""The simulator meets theory where theory has an answer: closed forms, Erlang's formula, and a bound nobody may beat.

Each arrangement leaves one rule of the law to bind and takes the rest away, so that the makespan follows from a formula
that shares no code with the law: one cap, one bucket, one kind of window, one stagger. The M/M/c queue is the same
driver again, with keyed Poisson arrivals and exponential services.
"""

from __future__ import annotations

import heapq
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from governor import law
from governor.model.keyed import ARRIVAL, LATENCY
from governor.model.policy import Policy
from sim.des.jobs import Job
from sim.experiment.experiment import case_of, simulated
from sim.model.synthetic import uniforms
from tests.scenarios import Run, batch, drawn, run, scenario_of, shown

EXACT = 1e-9


def only(**knobs: Any) -> Policy:
    """A policy in which nothing binds but what is named. Sizes are reserved as they are."""
    open_ = {"max_concurrency": 10**5, "stagger_seconds": 0.0, "tpm_limit": 10**12, "tpm_headroom": 0.0}
    return Policy(**{**open_, "jitter_ratio": 0.0, "charge_rule": "prompt_plus_max", **knobs})


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("count", "cap"), [(1, 1), (1, 50), (49, 50), (50, 50), (51, 50), (1_000, 7), (1_001, 7)])
@pytest.mark.parametrize("service_s", [0.3, 11.0])
def test_a_cap_alone_takes_as_many_rounds_as_it_is_smaller_than_the_batch(
    count: int, cap: int, service_s: float
) -> None:
    done = run(scenario_of(batch([5] * count, service_s), only(max_concurrency=cap)))
    assert done.tally.last_s == pytest.approx(math.ceil(count / cap) * service_s, rel=EXACT)
    assert done.tally.peak_in_flight == min(count, cap)
    # Rounds wait 0, 1, 2 ... services.
    rounds = sum((i // cap) * service_s for i in range(count))
    assert done.tally.waits_s[1] == pytest.approx(rounds, rel=EXACT)


def test_a_cap_alone_with_unequal_services_is_list_scheduling(seed: int) -> None:
    rng = random.Random(seed)
    service_s = [rng.uniform(0.1, 30.0) for _ in range(500)]
    places = [0.0] * 9
    for one_s in service_s:
        heapq.heapreplace(places, places[0] + one_s)
    done = run(scenario_of(batch([5] * 500, service_s), only(max_concurrency=9)))
    assert done.tally.last_s == pytest.approx(max(places), rel=EXACT)


@pytest.mark.parametrize("headroom", [0.0, 0.01, 0.15])
@pytest.mark.parametrize("settle", [False, True])
def test_a_bucket_alone_empties_at_its_rate_after_its_capacity(seed: int, headroom: float, settle: bool) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 5_000) for _ in range(400)]
    policy = only(tpm_limit=30_000, tpm_headroom=headroom, tpm_window="bucket", settle=settle)
    done = run(scenario_of(batch(sizes, 2.5), policy, provider={"tpm": 30_000}))
    budget = 30_000 * (1 - headroom)
    # (Answers use what was reserved, so settling has nothing to give back.)
    assert done.tally.last_s == pytest.approx((sum(sizes) - budget) / (budget / 60.0) + 2.5, rel=EXACT)
    assert done.tally.throttled == 0
    assert done.tally.waits_s[3] == pytest.approx(math.fsum(a.launched_s for a in done.rows), rel=EXACT)


def test_a_bucket_of_requests_and_one_of_a_day_do_the_same() -> None:
    policy = only(rpm_limit=60, tpm_window="bucket")
    done = run(scenario_of(batch([5] * 500, 2.0), policy, provider={"rpm": 60}))
    assert done.tally.last_s == pytest.approx(500 - 60 + 2.0, rel=EXACT)
    done = run(scenario_of(batch([1] * 300, 2.0), only(rpd_limit=200), provider={"rpd": 200}))
    assert done.tally.last_s == pytest.approx(100 * 432.0 + 2.0, rel=EXACT)
    used = {"tpd": 5_000, "day_tokens_used": 4_000}
    done = run(scenario_of(batch([100] * 30, 2.0), only(tpd_limit=5_000), provider=used))
    assert done.tally.last_s == pytest.approx(2_000 / (5_000 / 86_400.0) + 2.0, rel=EXACT)
    assert done.tally.throttled == 0


@pytest.mark.parametrize(("window", "cycle_s"), [("fixed", law.FIXED_S), ("sliding", law.SLIDING_S)])
@pytest.mark.parametrize(("count", "size"), [(100, 900), (7, 1_000), (24, 2_550), (25, 2_550)])
def test_a_window_alone_lets_in_what_fits_once_per_minute(window: str, cycle_s: float, count: int, size: int) -> None:
    """A fixed window lasts a second longer than a minute; a sliding one keeps the half second that it ends in, too."""
    policy = only(tpm_limit=30_000, tpm_headroom=0.15, tpm_window=window)
    done = run(scenario_of(batch([size] * count, 4.0), policy, provider={"tpm": 30_000}))
    per_minute = 25_500 // size
    assert done.tally.last_s == pytest.approx((math.ceil(count / per_minute) - 1) * cycle_s + 4.0, rel=EXACT)
    assert done.tally.throttled == 0


def test_a_stagger_alone_spaces_the_launches() -> None:
    done = run(scenario_of(batch([5] * 200, 3.0), only(stagger_seconds=1.7)))
    assert done.tally.last_s == pytest.approx(199 * 1.7 + 3.0, rel=EXACT)
    assert done.tally.waits_s[2] == pytest.approx(1.7 * 199 * 200 / 2, rel=EXACT)


def test_jitter_leaves_the_mean_gap_as_it_is() -> None:
    gaps = []
    for run_seed in range(20):
        policy = only(stagger_seconds=15.0, jitter_ratio=0.2)
        gaps.append((run(scenario_of(batch([5] * 101, 3.0), policy), run_seed).tally.last_s - 3.0) / 100)
    # 2,000 uniform draws of +-3 s: standard error 3 / sqrt(3) / sqrt(2,000) = 0.039 s.
    assert abs(np.mean(gaps) - 15.0) < 4 * 0.039
    assert np.std(gaps) > 0.0


# ---------------------------------------------------------------- a queue with a known answer


def erlang_c(servers: int, offered: float) -> float:
    """The probability that an arrival waits in M/M/c (Erlang 1917); `offered` = arrival rate / service rate."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (math.fsum(terms) + last)


def queue_waits(run_seed: int, servers: int, load: float, count: int) -> np.ndarray[Any, Any]:
    """Waits of `count` arrivals to an M/M/c queue of mean service 1, in order of arrival, by the driver."""
    service_s = -np.log(uniforms(run_seed, count, LATENCY))
    arrival_s = np.cumsum(-np.log(uniforms(run_seed, count, ARRIVAL)) / (load * servers))
    workload = batch([1] * count, service_s.tolist(), arrival_s=arrival_s.tolist())
    scenario = scenario_of(workload, only(max_concurrency=servers), arrivals="trace")
    waits_s = np.full(count, math.nan)

    def take(job: Job, now: float, failure: str) -> None:
        waits_s[job.index] = job.launched_s - job.arrived_s

    simulated(case_of(scenario), run_seed, take)
    return waits_s


def interval(means: list[float]) -> tuple[float, float]:
    """Mean of independent replications and the half-width of its interval, 99 %, Student's t."""
    n = len(means)
    half = student.ppf(0.995, n - 1) * np.std(means, ddof=1) / math.sqrt(n)
    return float(np.mean(means)), float(half)


@pytest.mark.parametrize(("servers", "load"), [(2, 0.5), (3, 0.6)])
def test_poisson_arrivals_and_exponential_services_wait_as_erlang_says(servers: int, load: float) -> None:
    """32 independent replications under fixed seeds, 9,000 arrivals each after 500 to warm up."""
    replications, warm_up, count = 32, 500, 9_500
    waits_s = [queue_waits(r, servers, load, count)[warm_up:] for r in range(replications)]
    offered = servers * load
    expected_s = erlang_c(servers, offered) / (servers - offered)
    mean_s, half_s = interval([float(w.mean()) for w in waits_s])
    assert half_s < 0.05 * expected_s  # sharp enough to object
    assert abs(mean_s - expected_s) <= half_s
    delayed, half = interval([float((w > 0.0).mean()) for w in waits_s])
    assert half < 0.02
    assert abs(delayed - erlang_c(servers, offered)) <= half
    # One server more or a tenth more load would not have passed.
    assert abs(mean_s - erlang_c(servers + 1, offered) / (servers + 1 - offered)) > half_s
    assert abs(mean_s - erlang_c(servers, 1.1 * offered) / (servers - 1.1 * offered)) > half_s


def test_erlangs_formula_for_one_server_is_its_load() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1.0 / 3.0)


# ---------------------------------------------------------------- the bound


def bound_and_makespan(done: Run) -> tuple[float, float]:
    summary = done.tally.summary(done.case.grant)
    return summary.bound_s, summary.makespan_s


@settings(
    max_examples=4 * settings.default.max_examples,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.integers(0, 2**40))
def test_no_run_beats_its_bound(seed: int) -> None:
    scenario = drawn(seed)
    note(shown(seed, scenario))
    done = run(scenario)
    bound_s, makespan_s = bound_and_makespan(done)
    # The bound itself: `efficiency` is None where it is above the makespan, and would hide it.
    assert 0.0 <= bound_s <= makespan_s * (1 + 1e-9)
    efficiency = done.tally.summary(done.case.grant).efficiency
    assert (efficiency is not None) == (done.tally.failed == 0 and makespan_s > 0.0)
    assert efficiency is None or 0.0 <= efficiency <= 1.0


@pytest.mark.parametrize("provider", [{}, {"settles": True}, {"rpm": 50}, {"tpd": 400_000, "day_tokens_used": 100_000}])
def test_a_mirrored_bucket_reaches_the_bound(provider: dict[str, Any]) -> None:
    """The property above would hold for a bound of zero, too: equal requests through a bucket leave no gap to it."""
    policy = only(
        tpm_limit=30_000, tpm_window="bucket", rpm_limit=provider.get("rpm", 0), tpd_limit=provider.get("tpd", 0)
    )
    done = run(scenario_of(batch([600] * 600, 3.0), policy, provider={"tpm": 30_000, **provider}))
    bound_s, makespan_s = bound_and_makespan(done)
    assert done.tally.throttled == 0
    assert bound_s == pytest.approx(makespan_s, rel=1e-6)
    assert bound_s > 600.0


def test_arrivals_that_come_in_time_reach_the_bound_too() -> None:
    # 40 requests of 600 tokens every minute for ten minutes: 24,000 of 30,000 a minute, then a burst at the end.
    arrival_s = [60.0 * (i // 40) for i in range(400)] + [600.0] * 100
    policy = only(tpm_limit=30_000, tpm_window="bucket")
    done = run(
        scenario_of(batch([600] * 500, 3.0, arrival_s=arrival_s), policy, provider={"tpm": 30_000}, arrivals="trace")
    )
    bound_s, makespan_s = bound_and_makespan(done)
    assert bound_s == pytest.approx(600.0 + (100 * 600 - 30_000) / 500.0 + 3.0, rel=1e-6)
    assert makespan_s == pytest.approx(bound_s, rel=1e-6)

"""One quota over several processes, simulated: nothing is lost or let in twice, whoever dies, and little time is."""

from __future__ import annotations

import random
from math import inf

import pytest

from governor.model.policy import Policy
from sim.experiment.experiment import case_of, simulated
from sim.experiment.shared_quota import Arrangement, SharedRun, shared_run
from tests.scenarios import batch, drawn, scenario_of, shown

RTT_S = 0.001
# Days, nearly all of them idle, show nothing here.
NO_DAY = {"tpd": 0, "rpd": 0}
NO_REQUESTS = {"rpm": 0, "quota_requests": 0}
NO_POLICY_DAY = {"tpd_limit": 0, "rpd_limit": 0}


def issue(processes: int, requests: int, *, sync: bool = False, **arrangement: float) -> SharedRun:
    """The issue's case: 1,500-token requests at 30,000 tokens per minute, charged at admission."""
    workload = batch(
        [1_400 + (i * 37) % 200 for i in range(requests)], [1.0 + 0.3 * (i % 7) for i in range(requests)], cap=1
    )
    policy = Policy(
        max_concurrency=100,
        stagger_seconds=0.0,
        tpm_headroom=0.01,
        tpm_window="bucket",
        charge_rule="prompt_plus_max",
        backoff_keeps_permit=False,
        sync_headers=sync,
    )
    scenario = scenario_of(workload, policy, provider={"tpm": 30_000})
    return shared_run(scenario, Arrangement(processes=processes, rtt_s=RTT_S, **arrangement))


@pytest.mark.parametrize(("processes", "requests"), [(3, 60), (8, 240)])
@pytest.mark.parametrize("sync", [False, True])
def test_a_shared_quota_is_used_as_well_as_one_of_ones_own(processes: int, requests: int, sync: bool) -> None:
    run = issue(processes, requests, sync=sync)
    s = run.summary
    assert (s.completed, s.failed, s.throttled, run.resent) == (requests, 0, 0, 0)
    assert s.makespan_s <= 1.10 * s.bound_s
    assert run.used_max <= 30_000.0
    assert all(0.8 <= share <= 1.2 for share in run.shares())


@pytest.mark.parametrize("how", [{"crash_at": 40.0}, {"lost_at": 40.0}, {"lost_at": 40.0, "lost_s": 30.0}])
def test_whoever_dies_the_provider_never_sees_more_than_its_limit(how: dict[str, float]) -> None:
    run = issue(3, 60, **how)
    s = run.summary
    assert (s.completed, s.failed, s.throttled) == (60, 0, 0)
    assert run.used_max <= 30_000.0
    assert run.resent <= 3  # what was in flight when its process died


def test_a_process_alone_is_like_one_with_its_own_quota(seed: int) -> None:
    """Without a round trip, and where nobody refuses or gives up: the plain simulation's run, but for the grain."""
    free = {"tpm": 0, "faults": {}, "outages": (), "slice_s": 0.0, "slice_tokens": 0, **NO_DAY, **NO_REQUESTS}
    patient = {"sync_headers": False, "deadline_seconds": 0.0, "request_timeout_seconds": 600.0, **NO_POLICY_DAY}
    for i in range(6):
        scenario = drawn(seed + i, arrivals="batch", policy=patient, provider=free)
        plain = simulated(case_of(scenario), scenario.seed).summary(scenario.grant())
        s = shared_run(scenario, Arrangement(processes=1, rtt_s=0.0)).summary
        told = shown(seed + i, scenario)
        assert (s.attempts, s.completed, s.failed) == (plain.attempts, plain.completed, plain.failed), told
        # By a grain, a launch may fall into the next half second of a sliding window.
        assert s.makespan_s == pytest.approx(plain.makespan_s, rel=1e-3, abs=0.6), told


def test_nothing_is_lost_whatever_happens(seed: int) -> None:
    """Drawn scenarios, over 1 to 5 processes, with a crash, or a store that forgets, at any moment."""
    rng = random.Random(seed)
    for i in range(8):
        scenario = drawn(seed + i, arrivals="batch", policy=NO_POLICY_DAY, provider=NO_DAY)
        if scenario.policy.tpm_limit < 3_000:
            continue  # hours, most of them idle
        arrangement = Arrangement(
            processes=rng.choice([1, 2, 3, 5]),
            rtt_s=rng.choice([0.0, 0.001, 0.02]),
            crash_at=rng.choice([inf, rng.uniform(0.0, 60.0)]),
            lost_at=rng.choice([inf, rng.uniform(0.0, 60.0)]),
            lost_s=rng.choice([0.1, 1.0, 8.0]),
        )
        run = shared_run(scenario, arrangement)
        s = run.summary
        told = f"{arrangement}, {shown(seed + i, scenario)}"
        if not run.stopped:  # as where the credit is used up
            assert s.completed + s.failed == len(scenario.workload), told
        if arrangement.crash_at == inf and not scenario.finalize and not s.failed and s.attempts == s.requests:
            assert run.resent == 0, told

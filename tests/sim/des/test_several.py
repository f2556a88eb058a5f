"""A simulated batch over several quotas: near the pooled bound, water-filled in order, and what dead ones cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from governor.model.policy import Policy
from sim.des.several import SeveralTallies, simulated_over
from sim.experiment.experiment import Case, case_of
from sim.model import provider as prov
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import ModelSource, Scenario
from tests.scenarios import batch

REQUESTS = 240
LATENCY: dict[str, Any] = {"first_token_s": 0.3, "per_token_s": 0.002, "sigma": 0.0, "stall_ratio": 0.0}


def case(tpm: int, requests: int = REQUESTS, **provider: Any) -> Case:
    config = ProviderConfig.model_validate(
        {"tpm": tpm, "rpm": 10_000, "charge_rule": "prompt_plus_max", "latency": LATENCY, **provider}
    )
    policy = Policy.preset("paceline").with_(
        max_concurrency=40, stagger_seconds=0.0, tpm_headroom=0.01, tpm_limit=tpm, charge_rule="prompt_plus_max"
    )
    r = np.random.default_rng(7)
    sizes = [int(n) for n in r.integers(500, 2_500, requests)]
    work = batch(sizes, outputs=[int(n) for n in r.integers(300, 1_400, requests)], cap=1_500)
    source = ModelSource(requests=requests, prompt_tokens=(1, 1), output_tokens=(1, 1))
    return case_of(Scenario(source=source, workload=work, provider=config, policy=policy))


def bound_s(of: Case, tpm: int) -> float:
    return float(of.columns.charge.sum()) / (tpm / 60.0) - 60.0


def test_three_unequal_quotas_come_near_the_pooled_bound() -> None:
    cases = [case(30_000), case(60_000), case(90_000)]
    found = simulated_over(cases, 1)
    assert (found.completed, found.lost, [t.throttled for t in found.tallies]) == (REQUESTS, 0, [0, 0, 0])
    assert bound_s(cases[0], 180_000) <= found.makespan_s <= 1.05 * bound_s(cases[0], 180_000)
    again = simulated_over(cases, 1)
    assert [t.last_s for t in again.tallies] == [t.last_s for t in found.tallies]


def test_a_reserved_quota_that_comes_first_is_filled_first_and_the_rest_spills() -> None:
    few = simulated_over([case(90_000, 8), case(90_000, 8)], 1)
    assert [t.completed for t in few.tallies] == [8, 0]
    more = simulated_over([case(90_000, 60), case(90_000, 60)], 1)
    assert min(t.completed for t in more.tallies) >= 20


@pytest.mark.parametrize(
    "death",
    [
        {"quota_requests": 50},
        {"outages": [{"at_s": 60.0, "length_s": 80_000.0}]},
        {"outages": [{"at_s": 60.0, "length_s": 80_000.0, "kind": "5xx"}]},
    ],
)
def test_a_quota_that_dies_in_mid_run_loses_none_and_costs_one_attempt_each_at_most(death: dict[str, Any]) -> None:
    spent: Counter[int] = Counter()

    def on_dead(job: Any, now: float, code: str) -> None:
        if job.outcome != prov.OK:
            spent[job.index] += 1

    cases = [case(30_000), case(60_000), case(90_000, **death)]
    found: SeveralTallies = simulated_over(cases, 1, [lambda *_: None, lambda *_: None, on_dead])
    assert (found.completed, found.lost) == (REQUESTS, 0)
    assert found.tallies[2].completed < 120
    assert spent
    assert max(spent.values()) == 1


def test_a_request_too_large_for_one_quota_goes_to_another_and_holds_up_nobody() -> None:
    found = simulated_over([case(1_900), case(90_000)], 1)
    assert (found.completed, found.lost) == (REQUESTS, 0)
    assert found.tallies[0].failed == 0


def test_if_every_quota_is_dead_the_rest_is_lost_with_the_reason() -> None:
    found = simulated_over([case(30_000, quota_requests=10), case(60_000, quota_requests=10)], 1)
    assert (found.completed, found.lost) == (20, REQUESTS - 20)
    assert sum(t.failed for t in found.tallies) == REQUESTS - 20

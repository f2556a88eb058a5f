"""Plans: they end, they keep their word on fresh seeds, and their percentiles are what they are said to be."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.bench_scenarios import drawn_scenario
from governor.model.policy import KNOB_BY_ENV, Policy
from sim.experiment.experiment import Pool, replicate
from sim.experiment.results import Forecast, Plan, paired_difference, percentile
from sim.scenario.scenario import Scenario
from sim.selection.evidence import LABELS
from sim.selection.planner import FRESH_SEEDS, most_requests, plan
from sim.selection.search import Goal
from sim.selection.space import plain_mirror


@functools.cache
def planned(seed: int, **more: object) -> tuple[Scenario, Plan]:
    scenario = drawn_scenario(seed)
    return scenario, plan(scenario, effort="quick", pool=Pool(1, engine="compiled"), **more)  # type: ignore[arg-type]


def fresh(scenario: Scenario, policy: Policy, runs: int) -> Forecast:
    """The same runs as those that a plan publishes."""
    first = scenario.seed + FRESH_SEEDS
    return replicate(dataclasses.replace(scenario, seed=first), runs, policy=policy, pool=Pool(1, engine="compiled"))


@pytest.mark.parametrize("case", range(4))
def test_a_plan_ends_and_keeps_its_word(seed: int, case: int) -> None:
    """On small drawn scenarios: bounded, the limits that are broken are told, and nobody plain is faster unsaid."""
    scenario, found = planned(1_000 * seed + case)
    assert found.requests_simulated <= most_requests("quick", len(scenario.workload))
    assert not found.out_of_time
    best = found.full.forecast
    assert len(best.runs) >= 100
    assert min(run.seed for run in best.runs) == scenario.seed + FRESH_SEEDS
    allowed = max(1.0, 200.0 / len(scenario.workload))
    # Every cell in which a recommendation breaks a limit that another column keeps is named.
    for row in found.stress:
        for who in ("recommended", "guardrails"):
            f = row.forecasts[who]
            lost = f.lost > 0 and any(other.lost == 0 for other in row.forecasts.values())
            over = f["throttled_per_100"].mean > allowed and f.lost == 0
            over = over and any(o["throttled_per_100"].mean <= allowed and o.lost == 0 for o in row.forecasts.values())
            told = any(f"under '{row.name}' {LABELS[who]}" in said for said in found.broken)
            assert told == (lost or over), (row.name, who, found.broken)
    # A plain mirrored window that is faster by more than 1 % stands in the report, with the condition that forbids it.
    plain, mine = (fresh(scenario, policy, 200) for policy in (plain_mirror(scenario), best.policy))
    gain = paired_difference(mine, plain, "makespan_s")
    if gain.low > 0.0 and gain.mean > 0.01 * mine["makespan_s"].mean:
        reasons = [each.reason for each in found.full.passed_over if each.name == "a plain mirrored window"]
        assert len(reasons) == 1
        assert "429s per 100 requests" in reasons[0]
    json.dumps(found.to_json_dict(), allow_nan=False)


def test_what_a_change_is_worth_is_what_leaving_it_out_costs() -> None:
    scenario, found = planned(5)
    assert found.full.steps
    for step in found.full.steps:
        without = found.full.policy.with_(**{KNOB_BY_ENV[step.env].name: step.old})
        a, b = (fresh(scenario, policy, step.worth_s.n) for policy in (without, found.full.policy))
        assert step.worth_s.mean == pytest.approx(a["makespan_s"].mean - b["makespan_s"].mean)
    worths = [step.worth_s.mean for step in found.full.steps]
    assert worths == sorted(worths, reverse=True)


def test_a_wish_is_decided_on_the_upper_limit() -> None:
    _, found = planned(5)
    late = found.full.forecast.percentile("makespan_s", 0.95)
    assert late.value < late.high
    # Between the estimate and its limit: the runs do not exclude that the wish is missed.
    _, wished = planned(5, goal=Goal(finish_by_s=(late.value + late.high) / 2.0))
    assert any("at 95 % confidence" in said for said in wished.broken)
    _, wished = planned(5, goal=Goal(finish_by_s=late.high))
    assert not any("wanted" in said for said in wished.broken)


# ---------------------------------------------------------------- percentiles


@pytest.mark.parametrize("ratio", [0.5, 0.95])
@pytest.mark.parametrize("n", [1, 10, 30, 58, 59, 100, 173, 400])
def test_limits_of_a_percentile_by_the_binomial_distribution(n: int, ratio: float) -> None:
    found = percentile(np.arange(1, n + 1), ratio)
    low = 0 if np.isinf(found.low) else int(found.low)
    high = n + 1 if np.isinf(found.high) else int(found.high)
    # P(at least `low` values lie below the percentile, and fewer than `high`).
    coverage = binom.cdf(high - 1, n, ratio) - (binom.cdf(low - 1, n, ratio) if low else 0.0)
    assert coverage >= 0.95
    if n == 100:
        assert coverage <= 0.97
    assert found.bounded == (n >= 59 if ratio == 0.95 else n > 5)


def test_the_next_run_stays_below_a_percentile_as_often_as_is_said(seed: int) -> None:
    rng = np.random.default_rng(seed)
    below = 0
    for _ in range(4_000):
        x = np.exp(1.5 * rng.standard_normal(101))
        below += x[-1] < percentile(x[:-1], 0.95).value
    # Binomial: 0.95 +- 4 standard deviations.
    assert abs(below / 4_000 - 0.95) < 0.0138

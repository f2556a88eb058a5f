"""The value of information: statistics against theory, choices against brute force, and nothing that noise made."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from governor.model.policy import Policy
from governor.profiles.loader import prices_in_force
from sim.experiment.experiment import Pool, case_of, figures_of, simulated
from sim.experiment.information import mean_gain, narrowing
from sim.experiment.runs import Runs
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import ModelSource, Scenario
from sim.scenario.stress import Condition, stress_set
from sim.scenario.unknowns import FRESH_DRAWS, FRESH_SEEDS, Unknowns, drawn
from sim.selection.evidence import Evidence
from sim.selection.hardening import Hardening, Stress
from sim.selection.information import Costs, Information
from sim.selection.search import Goal, Searcher

Z_95 = 1.6448536269514722


def test_narrowing_is_that_of_log_normal_times(seed: int) -> None:
    """T = exp(x + y), both normal: the 95th percentile goes from exp(z sqrt(a^2 + b^2)) to exp(a^2 / 2 + z b)."""
    rng = np.random.default_rng(seed)
    a, b = 0.4, 0.2
    x, y = a * rng.standard_normal(2_000), b * rng.standard_normal(2_000)
    times = np.exp(x + y)
    found = narrowing(times, times, x.tolist(), 0.05, seed)
    assert found is not None
    expected = math.exp(Z_95 * math.hypot(a, b)) - math.exp(a * a / 2.0 + Z_95 * b)
    assert abs(found.mean_s - expected) < 4.5 * found.se_s
    assert found.mean_s == pytest.approx(expected, rel=0.25)


def test_noise_is_worth_nothing(seed: int) -> None:
    """Unknowns that change nothing: at a level of 5 % one in 20 may seem to."""
    rng = np.random.default_rng(seed)
    shown = [0, 0, 0]
    for i in range(50):
        times = np.exp(0.4 * rng.standard_normal(100))
        labels = [str(label) for label in rng.integers(4, size=100)]
        shown[0] += narrowing(times, times, labels, 0.05, i) is not None
        shown[1] += narrowing(times, times, rng.random(100).tolist(), 0.05, i) is not None
        shown[2] += mean_gain(rng.standard_normal(100), 0.05) is not None
    assert max(shown) <= binom.ppf(1.0 - 1e-6, 50, 0.05), shown


def test_what_cannot_be_told_is_not() -> None:
    times = np.linspace(1.0, 2.0, 100)
    assert mean_gain(np.full(100, math.nan), 0.05) is None
    assert mean_gain(np.zeros(100), 0.05) is None
    assert narrowing(np.full(100, math.inf), times, ["a", "b"] * 50, 0.05, 1) is None
    assert narrowing(times[:18], times[:18], ["a", "b"] * 9, 0.05, 1) is None
    assert narrowing(times, times, ["a"] * 100, 0.05, 1) is None


KNOWN = ("settling", "slices", "window")


def information(provider: dict[str, object]) -> tuple[Information, Unknowns, list[Policy], list[Condition]]:
    """Two settings, one for a provider that charges the cap and one for any other; nothing but the rule is unknown."""
    source = ModelSource(requests=60, prompt_tokens=(400, 900), output_tokens=(100, 300), max_tokens=2_000, seed=3)
    late = {"first_token_s": 0.5, "per_token_s": 0.005, "sigma": 0.2, "stall_ratio": 0.0}
    made = ProviderConfig().with_(tpm=30_000, latency=late, **provider)
    careful = Policy.preset("paceline").with_(
        charge_rule="prompt_plus_max", tpm_headroom=0.02, stagger_seconds=0.0, max_concurrency=60, sync_headers=False
    )
    scenario = Scenario.of(source, provider=made, policy=careful, seed=11)
    bold = careful.with_(charge_rule="auto")
    runs, goal = Runs(Pool(1, engine="compiled")), Goal().allowing(2, 60)
    here, listed = Condition("", scenario), [Condition(name, changed) for name, changed in stress_set(scenario)]
    hardening = Hardening(Searcher(here, goal, runs), Stress(listed, goal, runs, 1), seeds=3, most=4, steps=1, effort=0)
    hardening.require([careful, bold])
    evidence = Evidence(Searcher(here, goal, runs, first=FRESH_SEEDS), Stress(listed, goal, runs, 2, FRESH_SEEDS), 5)
    unknowns = Unknowns(
        settles=0.0, counts_at_answer=0.0, cotenant_share=(0, 0), latency_factor=(1, 1), output_factor=(1, 1)
    )
    fresh = drawn(scenario, unknowns, range(FRESH_DRAWS, FRESH_DRAWS + 60))
    return Information(evidence, hardening, careful, fresh=fresh, most=480), unknowns, [careful, bold], fresh


def test_a_rule_is_worth_what_the_best_setting_for_it_gains() -> None:
    asked, unknowns, (careful, bold), fresh = information({"learnt": KNOWN, "learnt_from": "a log"})
    prices = prices_in_force()
    costs = Costs(fresh[0].scenario, 600.0, None, prices)
    (found,) = asked.findings(unknowns, costs)
    assert found.unknown == "the charge rule"

    def run(policy: Policy, condition: Condition) -> tuple[float, float]:
        case, seed = case_of(condition.scenario, policy), condition.scenario.seed + FRESH_SEEDS
        figures = figures_of(simulated(case, seed), case.grant, seed)
        return figures["makespan_s"], figures["throttled"]

    # Brute force: the bold setting wherever the rule is none under which it is refused.
    gains, refused = [], {}
    for condition in fresh:
        (slow, _), (fast, throttled) = run(careful, condition), run(bold, condition)
        rule = condition.scenario.provider.charge_rule
        refused[rule] = refused.get(rule, 0.0) + throttled
        gains.append((rule, slow - fast))
    assert refused["prompt_plus_max"] > 100
    worth = np.mean([gain if refused[rule] <= 2 else 0.0 for rule, gain in gains])
    assert found.sooner is not None
    assert found.sooner.mean_s == pytest.approx(worth, rel=1e-9)
    assert found.command == "paceline probe"
    assert found.cost_usd is None


def test_what_two_doubts_forbid_is_worth_a_word_only_together() -> None:
    """The bold setting fails under slices as well as under other rules: neither answer alone sets it free."""
    asked, unknowns, _, fresh = information({"learnt": ("window",), "learnt_from": "a log"})
    (found,) = asked.findings(unknowns, Costs(fresh[0].scenario, 600.0, None, None))
    assert found.if_so
    assert found.unknown == (
        "the charge rule, whether unused tokens come back and that no slices of a second are enforced"
    )
    assert found.sooner is not None


def test_nobody_is_asked_what_was_learnt() -> None:
    asked, unknowns, _, fresh = information({"learnt": ("charge rule", *KNOWN), "learnt_from": "a log"})
    names = {name for name, _ in stress_set(asked.scenario)}
    assert not [name for name in names if "rule" in name or "settle" in name or "slices" in name or "clock" in name]
    assert {each.scenario.provider.charge_rule for each in fresh} == {"auto"}
    assert asked.findings(unknowns, Costs(fresh[0].scenario, 600.0, None, None)) == ()

"""Conditions that are drawn: each unknown within its range, the same draws again, and none that could not run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from sim.app.inputs import PlanOptions
from sim.base.arguments import checked
from sim.experiment.experiment import Pool
from sim.experiment.robustness import DrawnConditions, Outcomes
from sim.experiment.runs import Runs
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import ModelSource, Scenario
from sim.scenario.stress import Condition
from sim.scenario.unknowns import FRESH_SEEDS, WINDOWS, Unknowns, drawn
from sim.selection.evidence import NAMES, Evidence
from sim.selection.hardening import Stress
from sim.selection.search import Goal, Searcher


def scenario(**provider: object) -> Scenario:
    source = ModelSource(requests=30, prompt_tokens=(700, 2_000), output_tokens=(150, 600), max_tokens=800, seed=5)
    return Scenario.of(source, provider=ProviderConfig().with_(**provider), policy=Policy(), seed=7)


def test_every_draw_is_within_the_ranges_and_they_are_filled() -> None:
    base, unknowns = scenario(), Unknowns(cotenant_share=(0.1, 0.3), latency_factor=(0.5, 4.0))
    found = [each.scenario for each in drawn(base, unknowns, range(300))]
    shares = np.array([each.provider.cotenant.share for each in found])
    scales = np.array([each.provider.latency.scale for each in found])
    longer = [each.workload.output_tokens.sum() / base.workload.output_tokens.sum() for each in found]
    for values, low, high in ((shares, 0.1, 0.3), (scales, 0.5, 4.0), (np.array(longer), 0.6, 2.0)):
        assert low * 0.99 <= values.min() <= low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) <= values.max() <= high * 1.01
    # Factors are log-uniform: the median is the geometric mean (300 draws: 4 sigma is 12 % of the range of the log).
    assert math.log(float(np.median(scales))) == pytest.approx(math.log(2.0**0.5), abs=0.12 * math.log(8.0))
    assert sum(each.provider.settles for each in found) == pytest.approx(150, abs=4.0 * 75.0**0.5)
    assert {each.provider.charge_rule for each in found} == {"auto", "prompt_plus_max", "max_of", "responses"}
    assert {each.policy for each in found} == {base.policy}


def test_more_draws_do_not_change_those_before_them() -> None:
    base = scenario()
    few, many = drawn(base, Unknowns(), range(3)), drawn(base, Unknowns(), range(10))
    assert [c.name for c in few] == ["draw 1", "draw 2", "draw 3"]
    assert [c.scenario.provider for c in few] == [c.scenario.provider for c in many[:3]]
    assert drawn(base, Unknowns(), range(2, 3))[0].scenario.provider == many[2].scenario.provider
    other = drawn(base.with_(seed=8), Unknowns(), range(3))
    assert [c.scenario.provider for c in other] != [c.scenario.provider for c in few]


def test_what_is_known_stays() -> None:
    base = scenario(cotenant={"share": 0.4})
    fixed = Unknowns(
        charge_rules=False, settles=0.0, cotenant_share=(0.0, 0.0), latency_factor=(1.0, 1.0), output_factor=(1.0, 1.0)
    )
    for each in drawn(base, fixed, range(5)):
        provider = each.scenario.provider
        assert (provider.charge_rule, provider.settles, provider.cotenant.share) == ("auto", False, 0.4)
        assert provider.latency.scale == 1.0
        assert (each.scenario.workload.output_tokens == base.workload.output_tokens).all()
    # A charge rule under which some request could never run is no condition to expect.
    tight = scenario(tpm=4_700).fitted()
    found = drawn(tight, Unknowns(), range(40))
    assert all(each.scenario.charges().max() <= 4_700 for each in found)
    assert {each.scenario.provider.charge_rule for each in found} < {"auto", "prompt_plus_max", "max_of", "responses"}


def test_any_window_and_gate_is_drawn_if_nothing_showed_them() -> None:
    base = scenario(retry_after="seconds")
    found = [each.scenario.provider for each in drawn(base, Unknowns(windows=True), range(100))]
    assert {(p.window, p.charged) for p in found} == {(w, c) for w in WINDOWS for c in ("admission", "answer")}
    assert {p.retry_after for p in found} == {"seconds", 60}
    assert all((p.phase_s > 0.0) == (p.window == "clock") for p in found)
    learnt = scenario(window="sliding", learnt=("window",), learnt_from="a log")
    for settled in (drawn(base, Unknowns(), range(20)), drawn(learnt, Unknowns(windows=True), range(20))):
        assert len({(p.window, p.charged, p.retry_after) for p in (each.scenario.provider for each in settled)}) == 1


@pytest.mark.parametrize(
    "wrong", [{"cotenant_share": [0.5, 0.2]}, {"latency_factor": [0.0, 1.0]}, {"settles": 1.5}, {"latencies": 1}]
)
def test_ranges_that_make_no_sense_are_named(wrong: dict) -> None:
    with pytest.raises(BadSetting, match=f"^plan.unknowns.*{next(iter(wrong))}"):
        checked(PlanOptions, {"unknowns": wrong}, "plan")


def test_what_one_draw_in_20_exceeds() -> None:
    values = np.arange(1.0, 102.0)
    found = Outcomes(values, values, values / 100.0, np.zeros(101))
    # The next draw stays below the k-th of n with probability k / (n + 1): 96.9 of 101.
    assert found.bad("objective_s") == pytest.approx(0.95 * 102)
    assert (found.median("objective_s"), found.worst("objective_s")) == (51.0, 101.0)
    spread = DrawnConditions("ranges", 101, 1, {"now": found})
    assert spread.kept("now", 0.5, 0.0) == 50
    plain = spread.to_json_dict("makespan")
    assert plain["now"]["makespan_s"] == {"median": 51.0, "percentile_95": pytest.approx(96.9), "worst": 101.0}


def test_outcomes_are_plain_runs_of_the_drawn_scenarios(root: Path) -> None:
    base = scenario()
    runs = Runs(Pool(1, engine="simpy"))
    searcher = Searcher(Condition("", base), Goal(), runs)
    quick = base.policy.with_(stagger_seconds=1.0)
    conditions = drawn(base, Unknowns(), range(5, 9))
    found = Evidence(searcher, Stress([], Goal(), runs, 1), 1).drawn("ranges", [base.policy, quick], conditions)
    assert (found.draws, found.runs, tuple(found.outcomes)) == (4, 1, NAMES[:2])
    assert runs.made == 2 * 4
    for i, condition in enumerate(conditions):
        # Chance of its own in each: a stall of one seed would be in every condition, or in none.
        (run,) = runs.figures(condition, quick, [base.seed + 5 + i + FRESH_SEEDS])
        assert found.outcomes["guardrails"].makespan_s[i] == run["makespan_s"]

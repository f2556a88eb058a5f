"""Which knob matters: against what each knob can do, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from governor.model.policy import KNOB_BY_NAME, Policy
from sim.app.cli import main
from sim.experiment.experiment import Pool
from sim.experiment.runs import Runs
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import Scenario
from sim.selection.search import Goal
from sim.selection.sensitivity import MOVE, _morris, sensitivity
from sim.selection.space import full_space
from tests.scenarios import batch

ROWS = 12


@pytest.fixture(scope="module")
def plain() -> Scenario:
    """Requests of 1 s each, no noise, no limit that binds: nothing but stagger and concurrency can matter."""
    base = Scenario.of("examples/batch.jsonl")
    policy = Policy(jitter_ratio=0.0, tpm_limit=10**9, tpm_headroom=0.0, max_concurrency=3)
    provider = ProviderConfig().with_(tpm=10**9, rpm=0)
    return base.with_(workload=batch([100] * ROWS, 1.0, cap=100), policy=policy, provider=provider, seed=3)


@pytest.mark.parametrize(("method", "size"), [("morris", 12), ("sobol", 16)])
def test_knobs_that_can_change_nothing_have_no_effect(plain: Scenario, method, size: int) -> None:
    found = sensitivity(plain, Goal(), method=method, size=size, runs=Runs(Pool(1, engine="simpy")))
    effects = {e.env: e for e in found.effects["makespan_s"]}
    ladders = full_space(plain).ladders
    unordered = {name for name, ladder in ladders.items() if isinstance(ladder[0], str | bool)}
    moves = {name for name in set(ladders) - unordered if len(ladders[name]) > 1}
    assert set(effects) == {KNOB_BY_NAME[name].env for name in moves}
    for name in ("backoff_base_seconds", "retry_max_attempts", "tpm_headroom"):
        effect = effects[KNOB_BY_NAME[name].env]
        assert (effect.size, effect.half_width, effect.other) == (0.0, 0.0, 0.0)
    # Every other value of every rule and switch is compared, none of which can change anything here.
    levels = found.levels["makespan_s"]
    assert {(level.env, level.value) for level in levels} == {
        (KNOB_BY_NAME[name].env, value) for name in unordered for value in ladders[name]
    } - {(KNOB_BY_NAME[name].env, getattr(plain.policy, name)) for name in unordered}
    assert {(level.change, level.low, level.high, level.shows) for level in levels} == {(0.0, 0.0, 0.0, False)}
    first, second = found.effects["makespan_s"][:2]
    assert first.env == "OPENAI_STAGGER_SECONDS"
    assert second.env == "OPENAI_MAX_CONCURRENCY"
    assert first.size > second.size > 0.0
    assert first.half_width > 0.0
    assert all(e.size == 0.0 for name in ("throttled_per_100", "lost_per_100") for e in found.effects[name])
    if method == "sobol":
        assert 0.0 < first.other <= first.size <= 1.2


def test_an_elementary_effect_is_the_change_over_two_thirds_of_the_ladder(plain: Scenario) -> None:
    """With many places the makespan is 11 staggers + 1 s: a move goes from the low third to the high one, or back."""
    wide = plain.with_(policy=plain.policy.with_(max_concurrency=ROWS))
    space = full_space(wide)
    ladder = np.array(space.ladders["stagger_seconds"])
    last = len(ladder) - 1
    moves = [(0, round(MOVE * last)), (round(last / 3.0), last)]
    steps = [(ROWS - 1) * (ladder[high] - ladder[low]) for low, high in moves]
    found = sensitivity(wide, Goal(), size=16, runs=Runs(Pool(1, engine="simpy")))
    stagger = found.effects["makespan_s"][0]
    # Less where a low concurrency holds things back: 12 s in a row at the most.
    assert min(steps) - ROWS <= stagger.size <= max(steps)


def test_morris_is_as_salib_has_it(seed: int) -> None:
    from SALib.analyze import morris as analysis
    from SALib.sample import morris as sampling

    names = list(KNOB_BY_NAME)[:5]
    problem = {"num_vars": len(names), "names": names, "bounds": [[0.0, 1.0]] * len(names)}
    design, analysed = _morris(problem, 9, seed)
    np.testing.assert_allclose(design, sampling.sample(problem, 9, num_levels=4, seed=seed), atol=1e-12)
    y = np.sin(7.0 * design @ np.arange(len(names))) + design[:, 3] ** 2
    theirs = analysis.analyze(problem, design, y, num_levels=4, num_resamples=200, seed=seed)
    ours = analysed(design, y)
    for name, of in (("mu_star", "size"), ("mu_star_conf", "half_width"), ("sigma", "other")):
        # Theirs are per whole range.
        assert [getattr(e, of) for e in ours] == pytest.approx([float(MOVE * e) for e in theirs[name]])


def test_near_stays_within_two_steps(plain: Scenario) -> None:
    found = sensitivity(plain, Goal(), size=4, near=True, runs=Runs(Pool(1, engine="simpy")))
    ladder = full_space(plain).ladders["stagger_seconds"]
    at = ladder.index(plain.policy.stagger_seconds)
    assert found.values["OPENAI_STAGGER_SECONDS"] == ladder[at - 2 : at + 3]


def test_a_rule_is_compared_with_the_present_one_run_by_run(plain: Scenario) -> None:
    """Reserving 100,000 for each request lets one go per window of 100,000: what the rule costs is their number."""
    fixed = plain.policy.with_(
        charge_rule="prompt_plus_max", stagger_seconds=0.0, max_concurrency=ROWS, est_tokens_per_run=100_000,
        tpm_limit=100_000, tpm_window="bucket",
    )  # fmt: skip
    found = sensitivity(plain, Goal(), base=fixed, size=4, runs=Runs(Pool(1, engine="simpy")))
    costs = {level.value: level for level in found.levels["makespan_s"] if level.env == "OPENAI_CHARGE_RULE"}
    assert set(costs) == {"fixed", "prompt_chars4", "auto", "responses", "max_of"}
    worst = found.levels["makespan_s"][0]
    assert (worst.assignment, worst.shows) == ("OPENAI_CHARGE_RULE=fixed", True)
    # A full bucket for the first, a minute for each of the others.
    assert worst.change == pytest.approx(60.0 * (ROWS - 1), rel=0.01)
    assert costs["max_of"].change == 0.0


def test_the_command(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    for knob in KNOB_BY_NAME.values():
        monkeypatch.delenv(knob.env, raising=False)
    words = ["sensitivity", "examples/batch.jsonl", "--first", "12", "--size", "4", "--workers", "1"]
    figure = tmp_path / "effects.svg"
    assert main([*words, "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "OPENAI_STAGGER_SECONDS" in figure.read_text()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "morris"
    for effect in found["effects"]["makespan_s"]:
        assert effect["env"] in out
    for level in found["levels"]["makespan_s"]:
        assert f"{level['env']}={str(level['value']).lower()}" in out
    assert "±" not in out
    assert main([*words[:-4], "--size", "12", "--method", "sobol"]) == 2
    assert "--size 12 is not a power of 2" in capsys.readouterr().err
    assert main([*words, "--figure", str(tmp_path / "effects.pdf")]) == 2
    assert ".png or .svg" in capsys.readouterr().err

"""The twin against rate limiters of others, in virtual time: `make twin-outside` in a short form."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.live_batch import drawn, write_lines
from benchmarks.twin_outside import PRESET, TOKENS, asked, preset, provider_of, run_ours
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import FileSource


@pytest.mark.parametrize("kind", ["slowapi fixed", "slowapi moving", "pyrate gcra", "pyrate sliding"])
def test_a_backtest_foresees_every_refusal_of_somebody_elses_limiter(kind: str, tmp_path: Path, seed: int) -> None:
    path, scenario = tmp_path / "batch.jsonl", tmp_path / "scenario.yaml"
    write_lines(path, (case.body for case in drawn(seed, 60, TOKENS)))
    Scenario.of(FileSource(path=str(path)), provider=provider_of(kind), policy=preset()).write(scenario)
    folder = tmp_path / PRESET
    ours = run_ours(kind, 60, path, preset(), scenario, seed=seed, time_scale=0.0, folder=folder)
    found = ours.found
    assert ours.lost == 0
    assert found.throttled.measured > 0.0
    assert found.throttled.covered
    assert found.makespan_s.covered
    assert abs(found.makespan_s.error_ratio or 0.0) < 0.01


def test_the_probe_is_silent_where_two_meanings_of_a_wait_fit(seed: int) -> None:
    """slowapi's sliding log states when its oldest entry expires; for calls of one size that is when they fit."""
    told = {each.name: each.value for each in asked("slowapi moving", seed)[0]}
    assert told["window"] == "sliding"
    assert told["retry_after"] in (None, "oldest")

"""Runs over live calls and the Batch API: everything is answered once, in time, and near the clairvoyant's bound."""

from __future__ import annotations

import math
import statistics

import pytest

from benchmarks import bench_auto
from sim.des.mixed import BATCH, FLEX, LIVE, MixedSimulation, only
from sim.experiment.experiment import case_of


@pytest.fixture(scope="module")
def results() -> list[bench_auto.Result]:
    return [bench_auto.ran(bench_auto.drawn(seed)) for seed in range(1, 17)]


def test_the_short_form_of_the_benchmark(results: list[bench_auto.Result]) -> None:
    """All 200 cases: `make auto`."""
    possible = [r for r in results if math.isfinite(r.bound)]
    assert sum(r.is_in_time for r in possible) >= 0.95 * len(possible)
    assert statistics.median(r.cost / r.bound for r in possible) <= 1.05
    # The bound is one: nothing is cheaper.
    assert min(r.cost / r.bound for r in possible) > 0.98


def test_nothing_is_lost_or_answered_twice(results: list[bench_auto.Result]) -> None:
    """`Tally` counts each end; requests are answered in one place each."""
    assert {r.lost for r in results} == {0}
    assert any(0.0 < r.by_batch < 1.0 for r in results)


def test_one_place_for_everything() -> None:
    case = bench_auto.drawn(11)
    ready = case_of(case.scenario)
    found = {}
    for place in (LIVE, FLEX, BATCH):
        run = MixedSimulation(
            ready.columns, ready.params, ready.provider, seed=3, mix=bench_auto.mix_of(case, decide=only(place))
        )
        tally = run.run()
        assert (tally.requests, tally.failed) == (len(ready.columns), 0)
        found[place] = tally.last_s
        if place != BATCH:
            assert {*run.place} == {place}
    # Slower answers, and a queue.
    assert found[LIVE] < found[BATCH]
    assert found[LIVE] <= found[FLEX]

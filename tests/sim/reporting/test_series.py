"""Series over time: against brute force, against the driver's own counts, and against what a queue must do."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from governor.model.policy import Policy
from governor.model.requests import Attempt, Outcome
from sim.experiment.experiment import attempts_of
from sim.experiment.results import Plan
from sim.reporting import series
from sim.scenario.scenario import Scenario


def attempt(launched_s: float, finished_s: float, **more: object) -> Attempt:
    known = {
        **{"request": 0, "custom_id": "r", "pool": "default", "model": "", "url": "", "lane": "main", "attempt": 1},
        **{"submitted_s": 0.0, "eligible_s": 0.0, "reserved_tokens": 10, "charged_tokens": 10, "prompt_tokens": 5},
        **{"output_tokens": 5, "outcome": Outcome.OK, "status": 200, "error_code": "", "retry_after_s": -1.0},
    }
    return Attempt(**{**known, "launched_s": launched_s, "finished_s": finished_s, **more})  # type: ignore[arg-type]


def value_at(curve: series.Steps, t: float) -> float:
    times, values = curve
    i = int(np.searchsorted(times, t, side="right")) - 1
    return float(values[i]) if i >= 0 else 0.0


def drawn(seed: int, count: int) -> list[Attempt]:
    r = random.Random(seed)
    rows = []
    for i in range(count):
        launched = round(r.uniform(0.0, 300.0), 1)
        charged = r.choice([-1, 0, r.randint(1, 900)])
        rows.append(attempt(launched, launched + round(r.uniform(0.0, 40.0), 1), request=i, charged_tokens=charged))
    return rows


def test_in_flight_and_charges_are_what_a_count_says(seed: int) -> None:
    rows = drawn(seed, 200)
    flying, charged = series.in_flight(rows), series.charged_per_minute(rows)
    r = random.Random(seed + 1)
    for t in [r.uniform(0.0, 400.0) for _ in range(300)]:
        assert value_at(flying, t) == sum(a.launched_s <= t < a.finished_s for a in rows)
        # Unknown counts as reserved; nothing is charged for what was refused.
        tokens = sum(
            a.reserved_tokens if a.charged_tokens < 0 else a.charged_tokens
            for a in rows
            if a.launched_s <= t < a.launched_s + 60.0
        )
        assert value_at(charged, t) == tokens
    assert flying[1][-1] == charged[1][-1] == 0.0
    assert all(a < b for a, b in pairwise(flying[0].tolist()))


def test_an_answer_that_frees_a_place_for_the_next_launch_leaves_no_spike() -> None:
    assert series.in_flight([attempt(0.0, 5.0), attempt(5.0, 9.0)])[1].max() == 1.0


def test_the_envelope_keeps_every_peak(seed: int) -> None:
    curve = series.charged_per_minute(drawn(seed, 400))
    edges, peaks = series.envelope(curve, 300.0, 50)
    assert len(edges) == 50
    for i, start in enumerate(edges.tolist()):
        times, values = curve
        inside = values[(times >= start) & (times < start + 6.0)].tolist()
        assert peaks[i] == max([value_at(curve, start), *inside])
    assert peaks.max() == curve[1][curve[0] <= 300.0].max()


def test_the_mean_keeps_the_area(seed: int) -> None:
    rows = drawn(seed, 300)
    end_s = max(a.finished_s for a in rows)
    _, means = series.means(series.in_flight(rows), end_s, 37)
    # Little's law without a queue: the area below the curve is the time spent in flight.
    assert means.sum() * end_s / 37 == pytest.approx(sum(a.finished_s - a.launched_s for a in rows))


def test_empty_runs_have_empty_curves() -> None:
    assert [len(part) for part in series.in_flight([])] == [0, 0]
    assert [len(part) for part in series.charged_per_minute([])] == [0, 0]
    assert series.means(series.in_flight([]), 0.0, 4)[1].tolist() == [0.0] * 4
    assert series.lanes([]) == []
    assert series.head_waits([]) == []
    assert series.waiting_shares([], 0.0, 3)[1] == {}


def test_lanes_hold_one_attempt_at_a_time_and_are_as_few_as_can_be(seed: int) -> None:
    rows = [a for a in drawn(seed, 300) if a.finished_s > a.launched_s]
    lanes = series.lanes(rows)
    for lane in set(lanes):
        mine = sorted((a.launched_s, a.finished_s) for a, at in zip(rows, lanes, strict=True) if at == lane)
        assert all(before[1] <= after[0] for before, after in pairwise(mine))
    assert max(lanes) + 1 == series.in_flight(rows)[1].max()


# ---------------------------------------------------------------- who made us wait


def test_the_head_of_a_batch_waits_for_what_the_driver_says(sample_scenario: Scenario) -> None:
    """Independent of the reconstruction: a request's own waits are those of the head while it stood in line."""
    rows, tally = attempts_of(sample_scenario, 3)
    assert tally.throttled == 0
    waits = series.head_waits(rows)
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(waits))
    for row in rows:
        for cause in series.HEAD_CAUSES:
            before = sum(w.end_s - w.start_s for w in waits if w.cause == cause and w.end_s <= row.launched_s + 1e-9)
            assert before == pytest.approx(getattr(row, f"waited_{cause}_s"), abs=1e-6)
    assert {w.cause for w in waits} == {"stagger", "tpm"}


def test_a_stagger_alone_is_all_that_the_head_waits_for(sample_scenario: Scenario) -> None:
    """Theory: with one launch per 7 s, no jitter and no other limit, the head waits 7 s between any two launches."""
    policy = Policy(stagger_seconds=7.0, jitter_ratio=0.0, max_concurrency=1_000, tpm_limit=10**9, est_tokens_per_run=1)
    free = sample_scenario.provider.with_(tpm=10**9, rpm=0)
    rows, _ = attempts_of(sample_scenario.with_(policy=policy, provider=free), 3)
    waits = series.head_waits(rows)
    assert {w.cause for w in waits} == {"stagger"}
    assert [w.end_s - w.start_s for w in waits] == pytest.approx([7.0] * (len(rows) - 1))
    edges, shares = series.waiting_shares(waits, 7.0 * (len(rows) - 1), 10)
    assert edges[-1] == 7.0 * (len(rows) - 1)
    assert shares["stagger"] == pytest.approx(np.ones(10))


def test_with_retries_waits_never_overlap_nor_exceed_the_time(reckless_plan: Plan) -> None:
    rows = reckless_plan.timelines["now"]
    waits = series.head_waits(rows)
    assert any(a.attempt > 1 for a in rows)
    assert all(w.start_s < w.end_s <= w.attempt.launched_s for w in waits)
    assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(waits))
    # While a request of the batch is still to be launched for the first time, somebody waits at every moment.
    last_new = max(a.launched_s for a in rows if a.attempt == 1)
    waited = sum(min(w.end_s, last_new) - w.start_s for w in waits if w.start_s < last_new)
    assert waited == pytest.approx(last_new, rel=0.02)


def test_a_wait_that_ends_before_another_begins_leaves_a_gap() -> None:
    """With arrivals over time the clocks stand while nobody waits."""
    rows = [
        attempt(4.0, 5.0, eligible_s=1.0, waited_rpm_s=3.0),
        attempt(20.0, 21.0, eligible_s=20.0),
        attempt(32.0, 33.0, eligible_s=30.0, waited_tpm_s=2.0),
    ]
    found = [(w.start_s, w.end_s, w.cause) for w in series.head_waits(rows)]
    assert found == [(1.0, 4.0, "rpm"), (30.0, 32.0, "tpm")]
    _, shares = series.waiting_shares(series.head_waits(rows), 40.0, 4)
    assert {cause: share.tolist() for cause, share in shares.items()} == {
        "tpm": [0.0, 0.0, 0.0, 0.2],
        "rpm": [0.3, 0.0, 0.0, 0.0],
    }


def test_the_order_of_the_rows_does_not_matter(sample_plan: Plan) -> None:
    rows = list(sample_plan.timelines["recommended"])
    turned = list(reversed(rows))
    assert series.head_waits(rows) == series.head_waits(turned)
    assert series.in_flight(rows)[1].tolist() == series.in_flight(turned)[1].tolist()

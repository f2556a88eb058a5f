"""Pools of one group, live over HTTP on the process's own time: near the pooled bound, and what a dead one costs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_pools import DEATHS, measured, run_in
from benchmarks.live_batch import drawn, write_lines
from governor.journal.journal import Journal
from governor.model.requests import Outcome
from governor.run.account import tally_of
from sim.model.faults import Event

SEED = 20_261_201


def test_three_unequal_pools_are_as_fast_as_one_with_the_sum_of_their_limits() -> None:
    found = measured(drawn(SEED, 200, (1_000, 5_000)))
    assert (found.lost, found.throttled, found.attempts) == (0, 0, 200)
    assert found.ratio <= 1.05, found
    # What the run says of itself is against the sum of the limits, too.
    assert found.efficiency is not None
    assert 1.0 / found.efficiency == pytest.approx(found.ratio, rel=0.02)
    shares = [found.by_pool[name] / 200 for name in ("p0", "p1", "p2")]
    assert shares == sorted(shares)


def test_a_reserved_pool_in_front_is_used_alone_while_it_suffices_and_the_rest_spills_over() -> None:
    few = measured(drawn(SEED, 12, (1_000, 5_000)), limits=(90_000, 90_000))
    assert (few.lost, few.by_pool) == (0, {"p0": 12})
    more = measured(drawn(SEED, 90, (1_000, 5_000)), limits=(90_000, 90_000))
    assert more.lost == 0
    assert min(more.by_pool["p0"], more.by_pool["p1"]) > 30


@pytest.mark.parametrize("kind", sorted(DEATHS))
def test_a_pool_that_dies_costs_no_request_and_at_most_one_attempt_each(kind: str) -> None:
    event: dict[str, Any] = DEATHS[kind]
    found = measured(drawn(SEED, 90, (1_000, 5_000)), [Event(**event, after_requests=20)])
    assert (found.lost, found.answered, found.by_pool["p2"]) == (0, 90, 20)
    assert found.most_lost == 1


def test_killed_and_resumed_nothing_is_lost_and_the_records_name_the_pool_of_each_attempt(tmp_path: Path) -> None:
    batch = drawn(SEED, 90, (1_000, 5_000))
    write_lines(tmp_path / "batch.jsonl", (case.body for case in batch))
    child = os.fork()
    if child == 0:
        run_in(tmp_path, batch, at_s=8.0, then=lambda: os._exit(9))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with Journal.open(tmp_path / "run.db") as journal:
        counts = journal.counts()
        before = {a.request for a in journal.attempts()}
    assert 0 < counts.done < 90
    refusals = Event(kind="throttled", times=3, retry_after_s=300.0)
    found = run_in(tmp_path, batch, [refusals])
    assert (found.lost, found.answered) == (0, 90)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"q-{i}" for i in range(90)]
    with Journal.open(tmp_path / "run.db") as journal:
        answered = [a for a in journal.attempts() if a.outcome is Outcome.OK]
        assert len(answered) == 90  # none was sent twice whose answer was known
        assert before < {a.request for a in answered}
        pools = {a.request: a.pool for a in answered}
        assert {r.request.index: r.request.pool for r in journal.results()} == pools
        assert sum(journal.counts(name).done for name in ("p0", "p1", "p2")) == 90
        # What moved to another pool in mid-run has been there from the beginning, as far as the bound goes.
        moved = [a for a in journal.attempts() if a.attempt > 1 and a.outcome is Outcome.OK]
        assert moved
        assert max(tally_of(journal, name).work.latest_s for name in ("p0", "p1", "p2")) < 10.0


def test_while_one_pool_waits_as_a_429_says_its_requests_go_elsewhere() -> None:
    refusals = Event(kind="throttled", after_requests=10, times=3, retry_after_s=300.0)
    found = measured(drawn(SEED, 40, (1_000, 5_000)), [refusals])
    assert (found.lost, found.answered, found.throttled, found.most_lost) == (0, 40, 3, 1)
    assert found.makespan_s < 60.0

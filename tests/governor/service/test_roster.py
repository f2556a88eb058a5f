"""What goes before the end of a batch among others: turns go by tokens, and what flies has had its turn."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from governor.service.worker.feed import RosterLine
from governor.service.worker.roster import Roster, RunningBatch


def plainly(others: list[tuple[int, float]], requests: int, tokens: float) -> tuple[float, float]:
    """Of each other batch as many tokens go first as this one has, or all of its own if it has fewer."""
    first = [min(1.0, tokens / left_tokens) for _, left_tokens in others]
    total = requests + sum(share * left for share, (left, _) in zip(first, others, strict=True))
    return total, tokens + sum(share * left_tokens for share, (_, left_tokens) in zip(first, others, strict=True))


def test_what_goes_before_the_end_of_a_batch(seed: int) -> None:
    rng = random.Random(seed)
    for size in (0, 1, 2, 30):
        batches = [(rng.randint(1, 500), float(rng.choice((100, 5_000, rng.randint(1, 10**6))))) for _ in range(size)]
        line = RosterLine(batches)
        for i, (requests, tokens) in enumerate(batches):
            total, sum_tokens = plainly(batches[:i] + batches[i + 1 :], requests, tokens)
            found = line.ahead_of(requests, tokens, is_in=True)
            assert found == (pytest.approx(total, abs=0.5 + 1e-6), pytest.approx(sum_tokens))
        requests, tokens = rng.randint(0, 50), float(rng.randint(0, 10**5))
        total, sum_tokens = plainly(batches, requests, tokens)
        found = line.ahead_of(requests, tokens, is_in=False)
        assert found == (pytest.approx(total, abs=0.5 + 1e-6), pytest.approx(sum_tokens))


def test_what_is_in_flight_has_its_tokens_booked_and_goes_before_nobody() -> None:
    """Counted as waiting, too, it would have filled the minute twice: the next batch seemed to need another one."""
    nothing: Any = None
    roster = Roster(
        nothing, nothing, 1, nothing, {}, nothing, spawn=nothing, since_s=lambda: 0.0, over=lambda: None, waves=nothing
    )
    row: Any = SimpleNamespace(requests=4, details={"pools": ["default"]}, via="live")
    batch = RunningBatch(row, "running", 1, 0, 3, 0, 0, left_tokens=30_000.0, flying={2, 3})
    roster.running[7] = batch
    assert batch.waiting == (1, 10_000.0)
    assert roster.ahead_of(1, 10_000.0, "default") == (2, 20_000.0)
    batch.flying.add(4)
    assert roster.ahead_of(1, 10_000.0, "default") == (1, 10_000.0)

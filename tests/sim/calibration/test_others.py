"""The way to the provider and its other users, read from counts: against a provider whose neighbours are known."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from governor.journal.rows import HeardAttempt
from governor.law import RPM, TPM
from governor.model.requests import Attempt, Limit, Outcome
from sim.calibration.others import Count, began_s, counts_of, takings, ways_of
from sim.model import provider as prov
from sim.model.provider_config import ProviderConfig


def heard(
    request: int, launched_s: float, took_s: float, processing_s: float, left: float, **changes: Any
) -> HeardAttempt:
    values: dict[str, Any] = dict.fromkeys(Attempt.columns(), 0.0)
    values |= {"request": request, "lane": "main", "attempt": 1, "prompt_tokens": 10, "output_tokens": 20}
    values |= {"outcome": Outcome.OK, "launched_s": launched_s, "finished_s": launched_s + took_s}
    return HeardAttempt(Attempt(**{**values, **changes}), (Limit("TPM", 1_000.0, left),), processing_s)


PLACE = {i: i for i in range(9)}


def test_the_shortest_round_is_a_way_without_a_queue_and_the_rest_of_others_is_the_way_there() -> None:
    rows = [heard(0, 5.0, 1.2, 1.0, 900.0), heard(1, 10.0, 3.5, 3.0, 800.0), heard(2, 20.0, 0.5, -1.0, 700.0)]
    counts = counts_of(rows, PLACE, lambda at_s: at_s - 5.0)
    assert [count.launched_s for count in counts] == [0.0, 5.0, 15.0]
    # Rounds of 0.2 and 0.5 s; the third does not say, and has the usual one, half of it back.
    assert [count.round_s for count in counts] == pytest.approx([0.2, 0.5, -1.0])
    assert [count.there_s for count in counts] == pytest.approx([0.1, 0.4, 0.25])
    there_s, round_s = ways_of(counts, 4)
    assert there_s == pytest.approx([0.1, 0.4, 0.25, 0.25])
    assert round_s == pytest.approx([0.2, 0.5, 0.35, 0.35])
    assert began_s(counts) == pytest.approx(0.1)


def test_of_a_burst_who_finds_least_was_let_in_last() -> None:
    rows = [heard(i, 0.0, 2.0 + i, 1.9 + i - wait_s, left) for i, (wait_s, left) in enumerate([(0.0, 5.0), (0.2, 9.0)])]
    counts = counts_of(rows, PLACE, lambda at_s: at_s)
    assert {count.place: round(count.there_s, 9) for count in counts} == {1: 0.05, 0: 0.25}


def test_nothing_is_known_of_the_way_where_nobody_states_a_time() -> None:
    counts = counts_of([heard(0, 0.0, 2.0, -1.0, 5.0)], PLACE, lambda at_s: at_s)
    there_s, round_s = ways_of(counts, 2)
    assert there_s.tolist() == round_s.tolist() == [0.0, 0.0]
    assert takings(counts, np.full(2, 500.0), ProviderConfig(tpm=1_000)) == ()


def run(config: ProviderConfig, seed: int) -> tuple[list[Count], np.ndarray[Any, Any], float]:
    """Counts of 200 requests, 3 s apart, of a provider with that neighbour; and what the neighbour takes.

    Together they use a little more than refills, so that what is used never drains away unseen.
    """
    r, pp, ps = random.Random(seed), config.params(), prov.ProviderState()
    charges = np.array([float(r.randint(2_000, 2_700)) for _ in range(200)])
    counts, others, launched = [], 0.0, 0.0
    for i, charge in enumerate(charges.tolist()):
        there_s = r.uniform(0.01, 0.3)
        now = launched + there_s
        outcome, _, _ = prov.admitted(pp, ps, 1, charge, now)
        stated = tuple((d, pp.limit[d], prov.remaining(pp, ps, d)) for d in (TPM, RPM))
        # What is known of the way is not exact.
        known_s = there_s + r.uniform(-0.02, 0.02)
        counts.append(
            Count(
                i, True, launched, now + 1.05, known_s, known_s + 0.05, outcome == prov.OK, -1.0, charge - 50.0, stated
            )
        )
        prov.settled(pp, ps, 1, charge, charge - 50.0, now + 1.0)
        launched += 3.0
    if config.cotenant.share:
        others = config.cotenant.share * config.tpm * now / 60.0
    return counts, charges, others


@pytest.mark.parametrize("bursts", [False, True])
@pytest.mark.parametrize("settles", [False, True])
def test_what_a_neighbour_took_is_found(settles: bool, bursts: bool, seed: int) -> None:
    cotenant = {"share": 0.3, "burst_s": 10.0 if bursts else 0.0, "period_s": 30.0 if bursts else 0.0}
    config = ProviderConfig(tpm=60_000, rpm=500, settles=settles, cotenant=cotenant)
    counts, charges, others = run(config, seed)
    found = takings(counts, charges, config)
    tokens = sum(taking.amount for taking in found if taking.d == TPM)
    # But for the beginning, when the bucket is full again before the next count.
    assert tokens == pytest.approx(others, rel=0.1)
    assert [taking.at_s for taking in found] == sorted(taking.at_s for taking in found)


def test_inexact_moments_make_no_neighbour(seed: int) -> None:
    config = ProviderConfig(tpm=30_000, rpm=500)
    counts, charges, _ = run(config, seed)
    assert takings(counts, charges, config) == ()

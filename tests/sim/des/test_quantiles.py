"""Quantiles of a stream: exact while they are few, close to exact for ever, the same however they were handed over."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sim.des import quantiles
from sim.des.quantiles import Quantiles

SHARES = (0.05, 0.5, 0.95, 0.99)


def test_few_are_exact(seed: int) -> None:
    x = np.random.default_rng(seed).lognormal(size=10_001)
    q = Quantiles()
    for value in x.tolist():
        q.append(value)
    assert q.quantiles(SHARES) == np.quantile(x, SHARES).tolist()
    assert len(q) == len(x)
    assert all(map(math.isnan, Quantiles().quantiles(SHARES)))


def test_many_are_within_a_thousandth_or_two_in_bounded_memory(seed: int) -> None:
    x = 0.5 + np.random.default_rng(seed).lognormal(0.0, 0.8, 3_000_000)
    q = Quantiles()
    for chunk in np.array_split(x, 500):
        q.extend(chunk)
        assert len(q.held) <= quantiles.EXACT
    found = np.array(q.quantiles(SHARES))
    assert len(q) == len(x)
    assert np.abs(found / np.quantile(x, SHARES) - 1.0).max() < 2e-3
    assert len(q.digest.serialize()) < 500_000


def test_how_they_were_handed_over_makes_no_difference(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiles, "WAITING", 1_000)
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=60_000)
    at_once, in_chunks, one_by_one = (Quantiles(room=10_000) for _ in range(3))
    at_once.extend(x)
    for chunk in np.array_split(x, np.sort(rng.integers(0, len(x), 50))):
        in_chunks.extend(chunk)
    for value in x.tolist():
        one_by_one.append(value)
    assert at_once.quantiles(SHARES) == in_chunks.quantiles(SHARES) == one_by_one.quantiles(SHARES)
    assert len(at_once) == len(in_chunks) == len(one_by_one) == len(x)

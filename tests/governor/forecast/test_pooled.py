"""The bound of several quotas that share a batch: below every division's own bounds, and equal to the best one's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from governor.forecast.pooled import pooled_bound_s
from governor.forecast.summary import Grant, WorkDone, bound_s
from governor.law import CLOCK
from governor.model.needs import Limited


def work(*requests: tuple[float, float]) -> WorkDone:
    """Return the work of requests that were charged so many tokens and took so many seconds."""
    done = WorkDone()
    for charge, service_s in requests:
        done.add(0.0, charge, charge, service_s)
    return done


def test_it_is_that_of_one_quota_with_the_sum_of_the_limits() -> None:
    limits = 30_000.0, 60_000.0, 90_000.0
    works = [work(*[(1_000.0, 2.0)] * n) for n in (70, 140, 210)]
    grants = [Grant(tpm_limit=limit) for limit in limits]
    whole = bound_s(Grant(tpm_limit=180_000.0), work(*[(1_000.0, 2.0)] * 420))
    assert whole == pytest.approx((420_000 - 180_000) / 3_000 + 2.0)
    assert pooled_bound_s(grants, works) == pytest.approx(whole)
    # It does not ask which of them had the work: one that died leaves the bound as it was.
    assert pooled_bound_s(grants, [works[0], work(), work(*[(1_000.0, 2.0)] * 350)]) == pytest.approx(whole)


def test_no_division_has_a_bound_below_it(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        count = rng.randint(2, 4)
        resets = rng.random() < 0.3
        grants = [
            Grant(
                tpm_limit=rng.choice([500.0, 1_000.0, 3_000.0]),
                rpm_limit=rng.choice([0.0, 5.0, 20.0]),
                tpd_limit=rng.choice([0.0, 4_000.0]),
                day_tokens_used=rng.choice([0.0, 1_000.0]),
                minute_reset=resets if rng.random() < 0.8 else not resets,
                burst_ratio=rng.choice([1.0, 0.5]),
                changes=rng.choice([(), ((30.0, 0.5),), ((60.0, 2.0),)]),
            )
            for _ in range(count)
        ]
        requests = [(float(rng.randint(1, 400)), rng.uniform(0.1, 5.0)) for _ in range(rng.randint(1, 40))]
        shares: list[list[tuple[float, float]]] = [[] for _ in grants]
        for request in requests:
            rng.choice(shares).append(request)
        works = [work(*share) for share in shares]
        pooled = pooled_bound_s(grants, works)
        own = max(bound_s(grant, each) for grant, each in zip(grants, works, strict=True))
        assert max(s for _, s in requests) <= pooled <= own + 1e-6, (grants, shares)


def test_a_limit_that_one_of_them_does_not_have_bounds_nothing() -> None:
    works = [work(*[(1_000.0, 2.0)] * 50)] * 2
    assert pooled_bound_s([Grant(tpm_limit=1_000.0), Grant()], works) == 2.0
    assert pooled_bound_s([Grant(tpm_limit=1_000.0), Grant(tpm_limit=1_000.0, minute_reset=True)], works) == 2.0


def test_dimensions_of_a_profile_add_up_where_they_are_of_one_kind() -> None:
    day = Limited("RPD", 0, 10.0, 86_400.0, CLOCK, per_request=1.0)
    grants = [Grant(quota=(day,)), Grant(quota=(replace(day, limit=30.0),))]
    works = [work(*[(1.0, 2.0)] * 41)] * 2
    whole = bound_s(Grant(quota=(replace(day, limit=40.0),)), work(*[(1.0, 2.0)] * 82))
    assert pooled_bound_s(grants, works) == whole == 2 * 86_400.0 + 2.0
    other = replace(day, length_s=3_600.0)
    assert pooled_bound_s([grants[0], Grant(quota=(other,))], works) == 2.0

"""The synthetic provider against the recordings, against its own formulas, and under random calls.

Waits and headers are compared with what real responses printed (PROVIDER-FACTS section 3); budgets with sums over the
attempts that were let in; chance with the distributions that the parameters name.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import answers, law
from sim import provider as prov
from sim.provider import RPD, RPM, TPD, TPM, ProviderParams, ProviderState

DIMENSIONS = {"TPM": TPM, "RPM": RPM, "TPD": TPD, "RPD": RPD}
LENGTH_S = {TPM: 60.0, RPM: 60.0, TPD: 86_400.0, RPD: 86_400.0}
MS = 0.001


def quota(tpm: float = 0.0, rpm: float = 0.0, tpd: float = 0.0, rpd: float = 0.0, **knobs: Any) -> ProviderParams:
    return ProviderParams(limit=[tpm, rpm, tpd, rpd], **knobs)


def changing(pp: ProviderParams, *changes: tuple[float, float]) -> ProviderParams:
    """`pp` whose minute limits are `factor` times the first ones from each moment on."""
    for i, (at, factor) in enumerate(changes):
        pp.change_at[i] = at
        pp.change_factor[i] = factor
    return pp


def knock(pp: ProviderParams, ps: ProviderState, charge: float, now: float, seed: int = 0) -> tuple[int, int, float]:
    """One attempt: (outcome, dimension, stated wait in seconds)."""
    outcome, dimension, wait_ms = prov.admitted(pp, ps, seed, charge, now)
    return outcome, dimension, prov.stated_wait_s(pp, wait_ms)


def taken(pp: ProviderParams, ps: ProviderState, charge: float, now: float) -> float:
    """Asks for `charge` over and over until it is refused; the sum of what was let in."""
    total = 0.0
    while prov.admitted(pp, ps, 0, charge, now)[0] == prov.OK:
        total += charge
    return total


# ---------------------------------------------------------------- against the recordings


def printed_wait_s(dimension: str, limit: float, used: float, requested: float) -> float:
    """What the provider states to a request that comes when `used` of `limit` is used."""
    d = DIMENSIONS[dimension]
    pp, ps = ProviderParams(), ProviderState()
    pp.limit[d] = limit
    ps.used[d] = used
    outcome, tightest, wait_s = knock(pp, ps, requested if d in (TPM, TPD) else 0.0, 0.0)
    assert (outcome, tightest) == (prov.THROTTLED, d)
    return wait_s


@pytest.mark.parametrize(
    ("dimension", "limit", "used", "requested", "wait_s"),
    [
        ("TPM", 30_000, 29_937, 385, 0.644),
        ("TPM", 30_000, 14_567, 24_754, 18.642),
        ("TPM", 250_000, 250_000, 57_059, 13.694),
        ("TPM", 30_000, 30_000, 46, 0.092),
        ("RPM", 3_000, 3_000, 1, 0.020),
        ("RPD", 1_000, 1_000, 1, 86.4),
        ("RPD", 200, 200, 1, 432.0),
    ],
)
def test_waits_as_published(dimension: str, limit: float, used: float, requested: float, wait_s: float) -> None:
    assert printed_wait_s(dimension, limit, used, requested) == wait_s


def test_waits_equal_the_printed_ones_in_all_logged_messages_but_the_free_tiers(
    data_file: Callable[[str], Path],
) -> None:
    with data_file("openai-observed/http429_messages.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["provenance"] == "log"]
    assert len(rows) == 32
    wrong = []
    for row in rows:
        limit, used, requested = (float(row[name]) for name in ("limit", "used", "requested"))
        if printed_wait_s(row["dimension"], limit, used, requested) != float(row["wait_s"]):
            wrong.append(row)
    assert [row["source"] for row in wrong] == ["openai/openai-dotnet#404"]
    # ... whose window is 30 days.
    limit, used, requested = (float(wrong[0][name]) for name in ("limit", "used", "requested"))
    assert (used + requested - limit) / limit * 30 * 86_400 == pytest.approx(float(wrong[0]["wait_s"]), abs=MS)


def headers_agree(d: int, limit: float, left: float, reset_s: float, length_s: float) -> bool:
    """Whether a bucket exists (its content may be a fraction) that prints this pair of remaining and reset."""
    reset_ms = round(reset_s * 1000.0)
    low = max(limit - left - 1.0, reset_ms / 1000.0 / length_s * limit)
    high = min(limit - left, (reset_ms + 1) / 1000.0 / length_s * limit)
    pp, ps = ProviderParams(), ProviderState()
    pp.limit[d] = limit
    for share in (0.0, 0.5, 0.99, 1.0):
        ps.used[d] = low + share * (high - low)
        prints = answers.refill_reset_s(limit, limit - ps.used[d], length_s)
        if low <= high and prov.remaining(pp, ps, d) == left and prints == reset_ms / 1000.0:
            return True
    return False


def test_headers_are_those_of_a_continuous_bucket(data_file: Callable[[str], Path]) -> None:
    with data_file("openai-observed/ratelimit_header_observations.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] == "openai"]
    agree = {"tokens": 0, "requests": 0}
    seen = {"tokens": 0, "requests": 0}
    for row in rows:
        for kind, windows in (("tokens", (TPM,)), ("requests", (RPM, RPD))):
            if not row[f"limit_{kind}"] or not row[f"reset_{kind}"]:
                continue
            limit, left = float(row[f"limit_{kind}"]), float(row[f"remaining_{kind}"])
            reset_s = answers.duration_s(row[f"reset_{kind}"])
            seen[kind] += 1
            agree[kind] += any(headers_agree(d, limit, left, reset_s, LENGTH_S[d]) for d in windows)
    assert (agree["tokens"], seen["tokens"]) == (635, 637)
    assert agree["requests"] == seen["requests"] >= 637


# ---------------------------------------------------------------- the buckets


def test_a_fresh_quota_lets_one_minutes_limit_in_at_once_and_then_its_rate() -> None:
    pp, ps = quota(tpm=6_000), ProviderState()
    assert taken(pp, ps, 100.0, 0.0) == 6_000
    for second in range(1, 181):
        assert taken(pp, ps, 100.0, float(second)) == 100, second
    # Nothing happens when the minute is full: only what refilled since is there.
    assert taken(pp, ps, 100.0, 240.0) == 6_000


def test_waiting_as_told_and_a_millisecond_more_is_enough_and_less_is_not() -> None:
    for requested in (1.0, 17.0, 999.0, 7_000.0):
        pp, ps = quota(tpm=7_000), ProviderState()
        assert taken(pp, ps, 7_000.0, 0.0) == 7_000
        outcome, _, wait_s = knock(pp, ps, requested, 0.0)
        assert (outcome, wait_s) == (prov.THROTTLED, math.floor(requested / 7_000 * 60_000) / 1000)
        assert knock(pp, ps, requested, wait_s - MS)[0] == prov.THROTTLED
        assert knock(pp, ps, requested, wait_s + MS)[0] == prov.OK


def test_every_dimension_must_have_room_and_the_longest_wait_is_told() -> None:
    pp, ps = quota(tpm=1_000, rpm=10, tpd=5_000, rpd=100), ProviderState()
    ps.used = [900.0, 10.0, 4_950.0, 100.0]
    #                     TPM: 6 s       RPM: 6 s        TPD: 50/5000 day = 864 s    RPD: 864 s; the first of equals
    assert knock(pp, ps, 200.0, 0.0) == (prov.THROTTLED, TPD, 150 / 5_000 * 86_400)
    ps.used[TPD] = 0.0
    assert knock(pp, ps, 200.0, 0.0) == (prov.THROTTLED, RPD, 864.0)
    ps.used[RPD] = 0.0
    assert knock(pp, ps, 220.0, 0.0) == (prov.THROTTLED, TPM, 7.2)
    assert knock(pp, ps, 110.0, 0.0) == (prov.THROTTLED, RPM, 6.0)
    ps.used[RPM] = 9.0
    assert knock(pp, ps, 100.0, 0.0)[0] == prov.OK
    assert ps.used == [1_000.0, 10.0, 100.0, 1.0]
    assert (ps.admitted, ps.throttled) == (1.0, 4.0)


def test_a_refusal_books_nothing() -> None:
    pp, ps = quota(tpm=1_000, rpm=10, rpd=100), ProviderState()
    ps.used[TPM] = 999.0
    for _ in range(5):
        assert knock(pp, ps, 2.0, 0.0)[0] == prov.THROTTLED
    assert ps.used == [999.0, 0.0, 0.0, 0.0]


def test_a_refusal_that_counts_fills_up_to_the_limit_and_not_beyond() -> None:
    pp, ps = quota(tpm=1_000, rpm=10, failed_count=1), ProviderState()
    assert knock(pp, ps, 900.0, 0.0)[0] == prov.OK
    assert knock(pp, ps, 150.0, 0.0) == (prov.THROTTLED, TPM, 3.0)
    # "Used 2000000" at a limit of 2000000: whoever knocks on finds it exactly full.
    for refusals in range(1, 9):
        assert knock(pp, ps, 150.0, 0.0) == (prov.THROTTLED, TPM, 9.0)
        assert ps.used[:2] == [1_000.0, min(10.0, 2.0 + refusals)]


def test_above_the_limit_it_never_fits() -> None:
    pp, ps = quota(tpm=1_000, tpd=2_000), ProviderState()
    assert knock(pp, ps, 1_001.0, 0.0) == (prov.TOO_LARGE, TPM, -1.0)
    assert knock(quota(tpd=2_000), ps, 2_001.0, 0.0) == (prov.TOO_LARGE, TPD, -1.0)
    assert ps.used == [0.0] * 4
    assert knock(pp, ps, 1_000.0, 0.0)[0] == prov.OK
    # Also while it is full: no wait would help.
    assert knock(pp, ps, 1_001.0, 0.0) == (prov.TOO_LARGE, TPM, -1.0)


def test_less_than_one_request_a_minute_is_a_throttle_not_a_request_too_large() -> None:
    pp, ps = changing(quota(rpm=1), (0.0, 0.5), (600.0, 1.0)), ProviderState()
    assert knock(pp, ps, 5.0, 10.0)[:2] == (prov.THROTTLED, RPM)
    assert knock(pp, ps, 5.0, 600.0)[0] == prov.OK


def test_daily_buckets_start_at_a_level_and_refill_over_the_day() -> None:
    pp, ps = quota(tpd=86_400, rpd=100), ProviderState()
    prov.day_started(ps, 86_000.0, 99.0)
    assert knock(pp, ps, 1_000.0, 0.0) == (prov.THROTTLED, TPD, 600.0)
    assert knock(pp, ps, 400.0, 0.0)[0] == prov.OK
    assert knock(pp, ps, 1.0, 0.0) == (prov.THROTTLED, RPD, 864.0)
    assert knock(pp, ps, 864.0, 864.0)[0] == prov.OK


@given(
    limits=st.tuples(*[st.integers(1, 5_000) | st.just(0)] * 4),
    calls=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 2_000)), min_size=1, max_size=40),
)
def test_what_is_let_in_never_exceeds_capacity_plus_rate_times_time(
    limits: tuple[int, ...], calls: list[tuple[int, int]]
) -> None:
    """Over any interval and in every dimension, by brute force; and a refused attempt is told when it would fit."""
    pp, ps = quota(*map(float, limits)), ProviderState()
    now, let_in = 0.0, []
    for tenths, charge in calls:
        now += tenths / 10.0
        outcome, d, wait_ms = prov.admitted(pp, ps, 0, float(charge), now)
        if outcome == prov.OK:
            let_in.append((now, charge))
        elif outcome == prov.TOO_LARGE:
            assert 0 < limits[d] < charge
        else:
            excess = ps.used[d] + (charge if d in (TPM, TPD) else 1.0) - limits[d]
            assert wait_ms / 1000.0 == pytest.approx(excess / limits[d] * LENGTH_S[d])
    for d, limit in enumerate(limits):
        if limit:
            for i, (start, _) in enumerate(let_in):
                total = 0
                for end, charge in let_in[i:]:
                    total += charge if d in (TPM, TPD) else 1
                    assert total <= limit + (end - start) * limit / LENGTH_S[d] + 1e-3


# ---------------------------------------------------------------- what is a knob


@pytest.mark.parametrize(
    ("style", "wait_s"), [(prov.SAYS_NOTHING, -1.0), (prov.SAYS_MILLISECONDS, 12.345), (prov.SAYS_SECONDS, 13.0)]
)
def test_a_refusal_says_nothing_milliseconds_or_whole_seconds(style: int, wait_s: float) -> None:
    pp = quota(tpm=60_000, retry_after=style, refusal_s=0.07)
    assert prov.stated_wait_s(pp, 12_345.999) == wait_s
    assert prov.stated_wait_s(pp, -1.0) == -1.0
    ps = ProviderState(used=[60_000.0, 0.0, 0.0, 0.0])
    # 12,345.9 tokens at 1,000 per second.
    assert prov.answered(pp, ps, 1, 0, 1, 12_345.9, 10.0, -1.0, 0.0) == (prov.THROTTLED, 0.07, TPM, wait_s)


def test_per_second_slices_spread_what_a_minute_would_let_in_at_once() -> None:
    pp, ps = quota(rpm=120, slice_s=1.0), ProviderState()
    assert [knock(pp, ps, 1.0, 0.0)[0] for _ in range(3)] == [prov.OK, prov.OK, prov.THROTTLED]
    assert knock(pp, ps, 1.0, 0.0) == (prov.THROTTLED, RPM, 0.5)
    assert knock(pp, ps, 1.0, 0.501)[0] == prov.OK
    assert knock(pp, ps, 1.0, 0.502)[0] == prov.THROTTLED
    # Below one per slice, one at a time all the same.
    pp, ps = quota(rpm=30, slice_s=1.0), ProviderState()
    assert knock(pp, ps, 1.0, 0.0)[0] == prov.OK
    assert knock(pp, ps, 1.0, 1.0) == (prov.THROTTLED, RPM, 1.0)
    assert knock(pp, ps, 1.0, 2.0)[0] == prov.OK


def test_a_token_slice_is_never_smaller_than_it_was_made_and_takes_a_larger_request_when_empty() -> None:
    pp, ps = quota(tpm=60_000, slice_s=1.0, slice_tokens=4_000.0), ProviderState()
    assert knock(pp, ps, 3_000.0, 0.0)[0] == prov.OK
    assert knock(pp, ps, 2_000.0, 0.0) == (prov.THROTTLED, TPM, 1.0)
    assert knock(pp, ps, 2_000.0, 1.0)[0] == prov.OK
    # 5,000 in a slice of 4,000: as soon as it is empty.
    assert knock(pp, ps, 5_000.0, 1.0) == (prov.THROTTLED, TPM, 4.0)
    assert knock(pp, ps, 5_000.0, 5.0)[0] == prov.OK


def test_a_minute_counter_is_emptied_when_the_minute_begins_and_never_drains_before() -> None:
    pp, ps = quota(tpm=1_000, rpm=5, tpd=86_400, minute_reset=1), ProviderState()
    assert taken(pp, ps, 500.0, 0.5) == 1_000
    assert knock(pp, ps, 1.0, 59.25) == (prov.THROTTLED, TPM, 0.75)
    assert taken(pp, ps, 500.0, 60.0) == 1_000
    assert knock(pp, ps, 1.0, 60.0) == (prov.THROTTLED, TPM, 60.0)
    # Minutes of the clock, not of the first request: one and a half minutes later there were two of them.
    assert taken(pp, ps, 500.0, 150.0) == 1_000
    # The day's bucket drains as ever: 3,000 tokens, one per second.
    assert ps.used[TPD] == pytest.approx(3_000 - 149.5)


def test_the_ramp_grows_by_half_per_quarter_of_an_hour() -> None:
    pp, ps = quota(tpm=100_000, ramp_tpm=1_000.0), ProviderState()
    peak = 1_000.0
    for quarter in range(5):
        for minute in range(15):
            now = (quarter * 15 + minute) * 60.0
            assert taken(pp, ps, 10.0, now) == math.floor(peak / 10) * 10, (quarter, minute)
            assert prov.admitted(pp, ps, 0, 10.0, now) == (prov.SLOW_DOWN, TPM, -1.0)
        peak = 1.5 * math.floor(peak / 10) * 10
    # After a quarter of an hour of silence the growth is forgotten.
    assert taken(pp, ps, 10.0, 10 * 900.0) == 1_000


def test_settling_books_what_was_used_at_completion() -> None:
    pp, ps = quota(tpm=10_000, tpd=50_000, settles=1), ProviderState()
    assert knock(pp, ps, 6_000.0, 0.0)[0] == prov.OK
    prov.settled(pp, ps, 0, 6_000.0, 1_500.0, 0.0)
    assert ps.used == [1_500.0, 0.0, 1_500.0, 0.0]
    prov.settled(pp, ps, 0, 6_000.0, 9_000.0, 0.0)
    assert ps.used == [4_500.0, 0.0, 4_500.0, 0.0]
    # Never below nothing, and more than expected never beyond the limit.
    prov.settled(pp, ps, 0, 6_000.0, 100.0, 0.0)
    assert ps.used == [0.0, 0.0, 0.0, 0.0]
    prov.settled(pp, ps, 0, 0.0, 12_000.0, 0.0)
    assert ps.used == [10_000.0, 0.0, 12_000.0, 0.0]


def test_without_settling_the_charge_stays() -> None:
    pp, ps = quota(tpm=10_000), ProviderState()
    assert knock(pp, ps, 6_000.0, 0.0)[0] == prov.OK
    prov.settled(pp, ps, 0, 6_000.0, 1.0, 6.0)
    assert (ps.used[TPM], ps.at) == (6_000.0, 0.0)


def test_a_limit_that_changes_keeps_what_is_used() -> None:
    pp, ps = changing(quota(tpm=6_000, rpm=60, rpd=1_000), (100.0, 0.5), (700.0, 1.0)), ProviderState()
    assert taken(pp, ps, 300.0, 99.0) == 6_000
    assert prov.limit_now(pp, ps, TPM) == 6_000
    # At 100 s 5,900 are used of 3,000: those above must drain first, at the new rate of 50 per second.
    assert knock(pp, ps, 300.0, 100.0) == (prov.THROTTLED, TPM, 3_200 / 50)
    assert [prov.limit_now(pp, ps, d) for d in range(4)] == [3_000, 30, 0, 1_000]
    assert knock(pp, ps, 300.0, 163.9)[0] == prov.THROTTLED
    assert knock(pp, ps, 300.0, 164.0)[0] == prov.OK
    assert taken(pp, ps, 300.0, 400.0) == 3_000
    # From 400 to 700 s it empties; restored, the whole limit is there.
    assert knock(pp, ps, 3_001.0, 699.9)[0] == prov.TOO_LARGE
    assert taken(pp, ps, 300.0, 700.0) == 6_000


def test_when_the_credit_is_gone_everything_is_refused_for_good() -> None:
    pp, ps = quota(tpm=1_000, quota_requests=3.0), ProviderState()
    assert [knock(pp, ps, 400.0, 60.0 * i)[0] for i in range(4)] == [prov.OK, prov.OK, prov.OK, prov.QUOTA]
    assert knock(pp, ps, 1.0, 1e7) == (prov.QUOTA, -1, -1.0)
    assert prov.answered(pp, ps, 0, 9, 1, 1.0, 1.0, -1.0, 1e7) == (prov.QUOTA, pp.refusal_s, -1, -1.0)


# ---------------------------------------------------------------- the co-tenant


def intake_per_tick(pp: ProviderParams, ps: ProviderState, seed: int, ticks: int, d: int = TPM) -> list[float]:
    """How much of the limit the co-tenant takes at each whole second, alone on the quota."""
    taken_ = []
    for tick in range(ticks):
        prov.advanced(pp, ps, seed, tick - 1e-6 if tick else 0.0)
        before = ps.used[d] if tick else 0.0
        prov.advanced(pp, ps, seed, float(tick))
        after = ps.used[d]
        taken_.append(after - max(0.0, before - 1e-6 * prov.limit_now(pp, ps, d) / 60.0))
    return taken_


def test_a_steady_neighbour_takes_its_share_every_second() -> None:
    pp, ps = quota(tpm=6_000, rpm=600, cotenant_share=0.25), ProviderState()
    # The very first tick is processed with the first call, at the same instant.
    assert intake_per_tick(pp, ps, 0, 100)[1:] == pytest.approx([25.0] * 99)


def test_beside_a_steady_neighbour_the_rest_is_ours(seed: int) -> None:
    """Somebody who takes all that is left just after each tick gets the capacity once, and 1 - share of the rate."""
    pp, ps = quota(tpm=6_000, cotenant_share=0.25), ProviderState()
    ours = sum(taken(pp, ps, 5.0, float(second)) for second in range(1, 2_001))
    assert ours == pytest.approx(6_000 + 2_000 * 100 * 0.75, rel=0.002)


def test_a_bursty_neighbour_takes_its_whole_share_in_bursts_at_keyed_moments(seed: int) -> None:
    pp, ps = quota(tpm=6_000, cotenant_share=0.25, cotenant_burst_s=15.0, cotenant_period_s=60.0), ProviderState()
    periods = 200
    intake = intake_per_tick(pp, ps, seed, 60 * periods)
    starts = []
    for period in range(1, periods):
        part = intake[60 * period : 60 * (period + 1)]
        assert sum(part) == pytest.approx(0.25 * 6_000, rel=1e-6)
        busy = [second for second, amount in enumerate(part) if amount > 0.0]
        assert busy == list(range(busy[0], busy[0] + 15))
        starts.append(busy[0])
    # Uniform over the 45 s in which a burst can begin: mean 22.5 and a bit, standard error 13 / sqrt(199).
    assert sum(starts) / len(starts) == pytest.approx(23.0, abs=5 * 13.0 / math.sqrt(len(starts)))
    other = intake_per_tick(pp, ProviderState(), seed + 1, 3_000)
    assert other[60:] != pytest.approx(intake[60:3_000])


def test_a_burst_beyond_the_limit_takes_what_is_there_and_no_more() -> None:
    """25 % of an hour's period in one minute is 15 times the rate: capacity first, then what refills."""
    pp, ps = quota(tpm=6_000, cotenant_share=0.25, cotenant_burst_s=60.0, cotenant_period_s=3_600.0), ProviderState()
    intake = intake_per_tick(pp, ps, 7, 7_200)
    assert max(intake) <= 6_000
    assert sum(intake[:3_600]) == pytest.approx(6_000 + 59 * 100, rel=0.01)


# ---------------------------------------------------------------- time


@given(
    steps=st.lists(st.integers(1, 4_000), min_size=1, max_size=20),
    used=st.tuples(*[st.integers(0, 9_000)] * 4),
    share=st.sampled_from([0.0, 0.25, 0.9]),
    period_s=st.sampled_from([0.0, 45.0]),
    minute_reset=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)
def test_one_leap_in_time_or_many_steps_come_to_the_same(
    steps: list[int], used: tuple[int, ...], share: float, period_s: float, minute_reset: int, seed: int
) -> None:
    """Changes of the limit, ticks and minutes happen at their own moments, not when somebody happens to knock."""
    pp = changing(quota(6_000, 60, 50_000, 1_000, slice_s=1.0), (33.5, 0.5), (47.0, 0.1), (200.0, 1.0))
    pp.cotenant_share, pp.cotenant_period_s, pp.cotenant_burst_s = share, period_s, 10.0
    pp.minute_reset = minute_reset
    leap, walk = ProviderState(used=[float(n) for n in used]), ProviderState(used=[float(n) for n in used])
    leap.slice_requests = walk.slice_requests = 50.0
    end = sum(steps) / 20.0
    prov.advanced(pp, leap, seed, end)
    now = 0
    for step in steps:
        now += step
        prov.advanced(pp, walk, seed, now / 20.0)
    assert leap.at == walk.at == end
    assert leap.used == pytest.approx(walk.used, abs=1e-6)
    assert leap.slice_requests == pytest.approx(walk.slice_requests, abs=1e-6)
    assert (leap.tick, leap.factor, leap.next_change) == (walk.tick, walk.factor, walk.next_change)


def test_a_policy_that_mirrors_the_bucket_without_headroom_is_never_refused(seed: int) -> None:
    """The law's bucket and this one are the same arithmetic written differently: rounding alone must not throttle."""
    pp, ps = quota(tpm=30_000, rpm=500), ProviderState()
    p = law.Params(
        **dict.fromkeys([slot for slot in law.Params.__slots__ if slot not in ("limit", "budget", "rate_per_s")], 0),
        limit=[30_000.0, 500.0, 0.0, 0.0],
        budget=[law.budget_of(30_000.0, 0.0), law.budget_of(500.0, 0.0), math.inf, math.inf],
        rate_per_s=[law.rate_of(30_000.0, 0.0, 60.0), law.rate_of(500.0, 0.0, 60.0), math.inf, math.inf],
    )
    p.window = law.BUCKET
    p.max_concurrency = 10**9
    s, now = law.State(), 0.0
    for request in range(3_000):
        charge = float(1 + int(prov.keyed_uniform(seed, request, 0, 1) * 2_000))
        now = law.admit_at(p, s, charge, law.FIRST, now)
        law.launched(p, s, charge, law.FIRST, now, 0.5)
        assert prov.admitted(pp, ps, 0, charge, now)[0] == prov.OK, request


# ---------------------------------------------------------------- latency and faults

KS_FACTOR = math.sqrt(-math.log(1e-7 / 2) / 2)  # Dvoretzky-Kiefer-Wolfowitz: exceeded once in ten million runs


def farthest(sample: list[float], cdf: Callable[[float], float]) -> float:
    """The Kolmogorov distance of a sample from a distribution."""
    ordered, n = sorted(sample), len(sample)
    return max(max(cdf(x) - i / n, (i + 1) / n - cdf(x)) for i, x in enumerate(ordered))


def test_latency_is_first_token_plus_tokens_times_a_log_normal_factor(seed: int) -> None:
    pp = quota(first_token_s=0.4, per_token_s=0.02, sigma=0.3)
    base_s = 0.4 + 0.02 * 150
    sample = [prov.latency_s(pp, seed, request, 1, 150.0, -1.0) for request in range(20_000)]
    normal = NormalDist(math.log(base_s), 0.3)
    assert farthest(sample, lambda s: normal.cdf(math.log(s))) < KS_FACTOR / math.sqrt(len(sample))


def test_latency_without_noise_is_exact_and_a_recorded_time_takes_its_place() -> None:
    pp = quota(first_token_s=0.5, per_token_s=0.25, sigma=0.0)
    assert [prov.latency_s(pp, 1, 2, 1, n, -1.0) for n in (0.0, 1.0, 10.0)] == [0.5, 0.75, 3.0]
    assert prov.latency_s(quota(sigma=0.3), 1, 2, 1, 500.0, 7.5) == 7.5
    assert prov.latency_s(quota(sigma=0.3), 1, 2, 1, 500.0, 0.0) == 0.0


def test_stalls_are_rare_uniform_and_on_top(seed: int) -> None:
    pp = quota(first_token_s=1.0, per_token_s=0.0, stall_ratio=0.1, stall_min_s=10.0, stall_max_s=60.0)
    sample = [prov.latency_s(pp, seed, request, 1, 100.0, -1.0) - 1.0 for request in range(20_000)]
    stalls = [s for s in sample if s > 0.0]
    assert len(stalls) == pytest.approx(2_000, abs=5.5 * math.sqrt(20_000 * 0.1 * 0.9))
    assert farthest(stalls, lambda s: (s - 10.0) / 50.0) < KS_FACTOR / math.sqrt(len(stalls))


def test_faults_come_at_their_ratios_after_admission(seed: int) -> None:
    pp, ps = quota(tpm=1e9, error_ratio=0.1, drop_ratio=0.05, first_token_s=0.5, per_token_s=0.01), ProviderState()
    outcomes = []
    for request in range(20_000):
        outcome, after_s, d, wait_s = prov.answered(pp, ps, seed, request, 1, 10.0, 100.0, -1.0, 0.0)
        assert (d, wait_s) == (-1, -1.0)
        assert after_s == (0.5 if outcome == prov.SERVER_ERROR else 1.5)
        outcomes.append(outcome)
    assert ps.used[TPM] == 200_000
    for outcome, ratio in ((prov.OK, 0.85), (prov.SERVER_ERROR, 0.1), (prov.DROPPED, 0.05)):
        spread = 5.5 * math.sqrt(20_000 * ratio * (1 - ratio))
        assert outcomes.count(outcome) == pytest.approx(20_000 * ratio, abs=spread)


def test_an_attempts_fate_depends_on_its_key_alone(seed: int) -> None:
    pp = quota(tpm=1e9, error_ratio=0.2, drop_ratio=0.2, sigma=0.3, stall_ratio=0.2)
    keys = [(request, attempt) for request in range(40) for attempt in (1, 2, 3)]

    def fates(order: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, float, int, float]]:
        ps = ProviderState()
        return {(r, a): prov.answered(pp, ps, seed, r, a, 9.0, 80.0, -1.0, 2.0 * i) for i, (r, a) in enumerate(order)}

    assert fates(keys) == fates(keys[::-1])
    assert len({fate[1] for fate in fates(keys).values()}) > 60


def test_cut_answers_without_text_come_at_their_ratio(seed: int) -> None:
    empty = sum(prov.cut_without_text(quota(empty_cut_ratio=0.3), seed, request) for request in range(20_000))
    assert empty == pytest.approx(6_000, abs=5.5 * math.sqrt(20_000 * 0.3 * 0.7))


# ---------------------------------------------------------------- headers


def test_headers_speak_of_the_tighter_requests_limit() -> None:
    ps = ProviderState(used=[0.0, 40.0, 0.0, 900.0])
    assert prov.requests_dimension(quota(tpm=5), ps) == -1
    assert prov.requests_dimension(quota(rpm=60), ps) == RPM
    assert prov.requests_dimension(quota(rpd=1_000), ps) == RPD
    assert prov.requests_dimension(quota(rpm=60, rpd=1_000), ps) == RPM
    ps.used[RPD] = 981.0
    assert prov.requests_dimension(quota(rpm=60, rpd=1_000), ps) == RPD


def test_remaining_is_whole_and_never_negative_and_rises_by_the_rate() -> None:
    pp, ps = changing(quota(tpm=30_000), (200.0, 0.5)), ProviderState()
    assert knock(pp, ps, 27_000.0, 0.0)[0] == prov.OK
    left = []
    for tenth in range(0, 100):
        prov.advanced(pp, ps, 0, tenth / 10.0)
        left.append(prov.remaining(pp, ps, TPM))
    assert left == [3_000 + 50 * tenth for tenth in range(100)]
    assert all(b - a == 50 for a, b in pairwise(left))
    assert taken(pp, ps, 10.0, 199.0) == 30_000
    prov.advanced(pp, ps, 0, 200.0)
    assert prov.remaining(pp, ps, TPM) == 0.0

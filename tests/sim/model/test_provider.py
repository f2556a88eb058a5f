"""The synthetic provider's door against the recordings, against its own formulas, and under random calls.

Waits and headers are compared with what real responses printed (docs/explanation/provider.md#buckets); budgets with
sums over the attempts that were let in.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.provider import rate_limit_headers as stated
from sim.model import provider as prov
from sim.model import windows as win
from sim.model.provider import RPD, RPM, TPD, TPM, ProviderParams, ProviderState
from tests.sim.doors import changing, knock, quota, taken

DIMENSIONS = {"TPM": TPM, "RPM": RPM, "TPD": TPD, "RPD": RPD}
LENGTH_S = {TPM: 60.0, RPM: 60.0, TPD: 86_400.0, RPD: 86_400.0}
MS = 0.001


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
        prints = stated.refill_reset_s(limit, limit - ps.used[d], length_s)
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
            reset_s = stated.duration_s(row[f"reset_{kind}"])
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
    assert ps.used[:4] == [1_000.0, 10.0, 100.0, 1.0]
    assert (ps.admitted, ps.throttled) == (1.0, 4.0)


def test_a_refusal_books_nothing() -> None:
    pp, ps = quota(tpm=1_000, rpm=10, rpd=100), ProviderState()
    ps.used[TPM] = 999.0
    for _ in range(5):
        assert knock(pp, ps, 2.0, 0.0)[0] == prov.THROTTLED
    assert ps.used[:4] == [999.0, 0.0, 0.0, 0.0]


def test_a_refusal_that_counts_fills_up_to_the_limit_and_not_beyond() -> None:
    pp, ps = quota(tpm=1_000, rpm=10, failed_count=3), ProviderState()
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
    assert ps.used == [0.0] * 8
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
    pp, ps = quota(tpm=1_000, rpm=5, tpd=86_400, window=win.CLOCK), ProviderState()
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
    assert ps.used[:4] == [1_500.0, 0.0, 1_500.0, 0.0]
    prov.settled(pp, ps, 0, 6_000.0, 9_000.0, 0.0)
    assert ps.used[:4] == [4_500.0, 0.0, 4_500.0, 0.0]
    # Never below nothing, and more than expected never beyond the limit.
    prov.settled(pp, ps, 0, 6_000.0, 100.0, 0.0)
    assert ps.used[:4] == [0.0, 0.0, 0.0, 0.0]
    prov.settled(pp, ps, 0, 0.0, 12_000.0, 0.0)
    assert ps.used[:4] == [10_000.0, 0.0, 12_000.0, 0.0]


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
    # What only the rounding of many small drains took is not missing.
    ps.used[TPM] = 10_000.0 + 1e-9
    assert prov.remaining(pp, ps, TPM) == 20_000.0
    ps.used[TPM] = 0.0
    assert taken(pp, ps, 10.0, 199.0) == 30_000
    prov.advanced(pp, ps, 0, 200.0)
    assert prov.remaining(pp, ps, TPM) == 0.0


@pytest.mark.parametrize(
    ("habits", "used", "stated"),
    [
        ({}, 400.4, 9_599),
        ({"counts_share": 0.1}, 400.4, 959),
        ({"counts_rounded_to": 1_000.0}, 400.4, 10_000),
        ({"counts_rounded_to": 1_000.0}, 501.0, 9_000),
        ({}, 10_700.0, 0),
        ({"counts_negative": 1}, 10_700.0, -700),
        ({"counts_negative": 1, "counts_rounded_to": 1_000.0}, 10_700.0, -1_000),
    ],
)
def test_a_count_is_stated_in_part_rounded_or_below_zero(habits: dict[str, Any], used: float, stated: float) -> None:
    pp, ps = quota(tpm=10_000, **habits), ProviderState()
    ps.used[TPM] = used
    assert prov.remaining(pp, ps, TPM) == stated


def test_which_answers_state_counts() -> None:
    kinds = (prov.COUNTS_NONE, prov.COUNTS_AT_ADMISSION, prov.COUNTS_AT_ANSWER, prov.COUNTS_ON_REFUSALS)
    states = [[prov.states_counts(ProviderParams(counts=kind), refused) for refused in (False, True)] for kind in kinds]
    assert states == [[False, False], [True, True], [True, True], [False, True]]

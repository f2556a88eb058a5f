"""The law as timetables: what happens when, told by `laws.Pool` and compared with what the rules say on paper."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest

from governor import law
from governor.law import BUCKET, FIXED, RPD, RPM, SLIDING, TPD, TPM
from tests.governor import laws
from tests.governor.laws import Job, Launch, Pool, Reply, params

WINDOWS = (FIXED, SLIDING, BUCKET)
INF = math.inf


def after(seconds: float, **reply: Any):
    """Every attempt is answered after so many seconds."""
    return lambda job, now: Reply(seconds, **reply)


def by_attempt(*replies: Reply):
    """The first attempt of a request ends like this, the second like that; later ones like the last."""
    return lambda job, now: replies[min(job.attempt, len(replies)) - 1]


def free(**changes: Any) -> law.Params:
    """No limit but those that a test sets."""
    return params(**({"tpm": 0, "max_concurrency": 1_000, "stagger_s": 0.0} | changes))


# ---------------------------------------------------------------- ten runs on the guardrails


def test_ten_runs_on_the_guardrails_with_answers_in_no_time() -> None:
    """7,000 each, 25,500 per anchored minute: three launches 15 s apart, then the next minute.

    The fourth slot, at 45 s, would bring the window to 28,000: it waits for the window's end at 60 s, and so on.
    """
    pool = Pool(params(), [7_000.0] * 10, after(5.0)).run()
    assert pool.times() == [0, 15, 30, 60, 75, 90, 120, 135, 150, 180]
    # Each of the nine deferred once: six for their slot, three for the window, whose end comes after their slot.
    assert pool.deferrals == {law.STAGGER: 6, law.BY_TPM: 3}
    assert {cause for _, index, _, cause in pool.waits if index in (3, 6, 9)} == {law.BY_TPM}


def test_ten_runs_on_the_guardrails_with_slow_answers() -> None:
    """Three in flight for 100 s each: the fourth starts with the first answer, and no slot is caught up on."""
    pool = Pool(params(), [7_000.0] * 10, after(100.0)).run()
    assert pool.times() == [0, 15, 30, 100, 115, 130, 200, 215, 230, 300]
    assert max(launch.in_flight for launch in pool.launches) == 3
    # Two wait for their slot, then everybody for a permit; at 100 s the window of three launches is long over.
    assert pool.deferrals == {law.STAGGER: 2, law.CONCURRENCY: 7}


@pytest.mark.parametrize(("u", "gap_s"), [(0.0, 12.0), (0.25, 13.5), (0.5, 15.0), (1.0, 18.0)])
def test_slots_are_15_s_apart_within_the_jitter(u: float, gap_s: float) -> None:
    """+-20 % of 15 s is 3 s, the cap; nothing but the stagger holds these back."""
    pool = Pool(params(), [1_000.0] * 10, after(1.0), u).run()
    assert [later - sooner for sooner, later in pairwise(pool.times())] == [gap_s] * 9
    assert pool.deferrals == {law.STAGGER: 9}


@pytest.mark.parametrize(("stagger_s", "jitter_s"), [(5.0, 1.0), (15.0, 3.0), (60.0, 3.0), (0.0, 0.0)])
def test_jitter_is_a_fifth_of_the_stagger_and_at_most_three_seconds(stagger_s: float, jitter_s: float) -> None:
    p = params(stagger_s=stagger_s)
    assert [law.stagger_gap_s(p, u) for u in (0.0, 0.5, 1.0)] == [stagger_s - jitter_s, stagger_s, stagger_s + jitter_s]


def test_the_guardrails_budget_is_25_500() -> None:
    assert params().budget == [25_500.0, INF, INF, INF]
    assert params().rate_per_s[TPM] == pytest.approx(425.0, rel=1e-15)


# ---------------------------------------------------------------- windows


def test_a_fixed_minute_is_anchored_at_the_first_launch_after_the_last_one_expired() -> None:
    p, s = free(tpm=1_000, headroom=0.0, window=FIXED), law.State()
    law.launched(p, s, 600.0, law.FIRST, 7.0, 0.5)
    law.launched(p, s, 400.0, law.FIRST, 50.0, 0.5)
    assert law.admit_at(p, s, 1.0, law.FIRST, 50.0) == 67.0
    assert law.used_in(p, s, TPM, 66.9) == 1_000
    assert law.used_in(p, s, TPM, 67.0) == 0
    # Nobody comes at 67 s: the next minute begins when somebody does.
    law.launched(p, s, 1_000.0, law.FIRST, 90.0, 0.5)
    assert law.admit_at(p, s, 1.0, law.FIRST, 100.0) == 150.0


def test_the_sliding_window_lets_go_after_60_to_60_and_a_half_seconds() -> None:
    for launched_at in (0.0, 0.25, 0.4999999, 0.5, 17.3, 59.5):
        p, s = free(tpm=1_000, headroom=0.0, window=SLIDING), law.State()
        law.launched(p, s, 1_000.0, law.FIRST, launched_at, 0.5)
        at = law.admit_at(p, s, 1.0, law.FIRST, launched_at)
        assert at == math.floor(launched_at * 2) / 2 + 60.5
        assert 60.0 < at - launched_at <= 60.5


def test_the_sliding_window_frees_what_is_needed_and_no_more() -> None:
    p, s = free(tpm=1_000, headroom=0.0, window=SLIDING), law.State()
    law.launched(p, s, 400.0, law.FIRST, 0.0, 0.5)
    law.launched(p, s, 300.0, law.FIRST, 10.0, 0.5)
    law.launched(p, s, 300.0, law.FIRST, 20.0, 0.5)
    needs = {1.0: 60.5, 400.0: 60.5, 401.0: 70.5, 700.0: 70.5, 701.0: 80.5, 1_000.0: 80.5}
    assert {need: law.admit_at(p, s, need, law.FIRST, 30.0) for need in needs} == needs
    assert [law.used_in(p, s, TPM, now) for now in (60.4, 60.5, 70.4, 70.5, 80.5)] == [1_000, 600, 600, 300, 0]


def test_the_bucket_refills_continuously_and_never_holds_more_than_its_capacity() -> None:
    p, s = free(tpm=6_000, headroom=0.0, window=BUCKET), law.State()
    law.launched(p, s, 6_000.0, law.FIRST, 10.0, 0.5)
    ready = [law.admit_at(p, s, n, law.FIRST, 10.0) for n in (1.0, 100.0, 3_000.0, 6_000.0)]
    assert ready == pytest.approx([10.01, 11.0, 40.0, 70.0], rel=1e-12)
    assert [law.used_in(p, s, TPM, now) for now in (10.0, 20.0, 69.0, 70.0, 500.0)] == [6_000, 5_000, 100, 0, 0]
    law.launched(p, s, 6_000.0, law.FIRST, 1_000.0, 0.5)
    assert law.admit_at(p, s, 100.0, law.FIRST, 1_000.0) == 1_001


@pytest.mark.parametrize("window", WINDOWS)
def test_requests_per_minute_are_counted_in_the_same_kind_of_window(window: int) -> None:
    p, s = free(rpm=3, headroom=0.0, window=window), law.State()
    for at in (0.0, 10.0, 20.0):
        assert law.admission(p, s, 999.0, law.FIRST, at) == (at, law.NOTHING)
        law.launched(p, s, 999.0, law.FIRST, at, 0.5)
    # A bucket of three had refilled one request at 20 s and needs until 40 s for the next one.
    expected = {FIXED: 60.0, SLIDING: 60.5, BUCKET: 20.0}[window]
    at, cause = law.admission(p, s, 999.0, law.FIRST, 20.0)
    assert at == pytest.approx(expected)
    assert cause == (law.NOTHING if window == BUCKET else law.BY_RPM)


def test_a_steady_load_is_paced_at_the_bucket_rate() -> None:
    """1,000-token requests on 6,000 per minute: six at once, then one every 10 s."""
    pool = Pool(free(tpm=6_000, headroom=0.0, window=BUCKET), [1_000.0] * 20, after(3.0)).run()
    assert pool.times() == pytest.approx([0.0] * 6 + [10.0 * n for n in range(1, 15)], rel=1e-12)


def test_daily_budgets_are_buckets_of_a_day_and_start_at_a_level() -> None:
    for window in WINDOWS:
        p, s = free(tpd=86_400, rpd=100, window=window), law.State()
        law.day_started(p, s, 80_000.0, 99.0, 0.0)
        assert law.admission(p, s, 6_400.0, law.FIRST, 0.0) == (0.0, law.NOTHING)
        assert law.admit_at(p, s, 7_000.0, law.FIRST, 0.0) == pytest.approx(600.0)
        law.launched(p, s, 6_400.0, law.FIRST, 0.0, 0.5)
        # Now a token comes every second, a request every 864 s.
        assert law.admission(p, s, 100.0, law.FIRST, 0.0) == (pytest.approx(864.0), law.BY_DAY)
        assert law.admission(p, s, 2_000.0, law.FIRST, 0.0) == (pytest.approx(2_000.0), law.BY_DAY)
        assert [law.used_in(p, s, d, 0.0) for d in (TPD, RPD)] == pytest.approx([86_400.0, 100.0])
        assert law.used_in(p, s, TPD, 86_400.0) == 0.0


def test_a_day_that_begins_overdrawn_waits_it_off() -> None:
    p, s = free(rpd=10), law.State()
    law.day_started(p, s, 0.0, 12.0, 1_000.0)
    assert law.admit_at(p, s, 1.0, law.FIRST, 1_000.0) == pytest.approx(1_000.0 + 3 * 8_640.0)


# ---------------------------------------------------------------- oversized requests


@pytest.mark.parametrize("window", WINDOWS)
def test_above_the_budget_and_within_the_limit_a_request_runs_alone(window: int) -> None:
    """28,000 of 25,500: nothing else in flight, the window empty; and nobody joins it, though there are permits."""
    p = params(window=window, stagger_s=0.0)
    pool = Pool(p, [1_000.0, 28_000.0, 1_000.0, 1_000.0], after(200.0)).run()
    assert pool.times() == [0, 200, 400, 400]
    assert [launch.in_flight for launch in pool.launches] == [1, 1, 1, 2]
    assert pool.deferrals == {law.CONCURRENCY: 2}


@pytest.mark.parametrize(("window", "empty_at"), [(FIXED, 60.0), (SLIDING, 60.5), (BUCKET, 1_000 / 425)])
def test_an_oversized_request_waits_for_an_empty_window(window: int, empty_at: float) -> None:
    pool = Pool(params(window=window, stagger_s=0.0), [1_000.0, 28_000.0], after(1.0)).run()
    assert pool.times() == pytest.approx([0.0, empty_at])
    assert pool.deferrals == {law.CONCURRENCY: 1, law.BY_TPM: 1}


@pytest.mark.parametrize("keeps", [0, 1])
def test_the_retry_of_an_oversized_request_runs_alone_too(keeps: int) -> None:
    """Whether it kept its permit or not: nobody is in flight beside 28,000, before or after its 429."""
    p = params(window=BUCKET, stagger_s=0.0, backoff_keeps_permit=keeps)
    replies = {1: by_attempt(Reply(1.0, laws.THROTTLED), Reply(30.0))}
    pool = Pool(p, [500.0, 28_000.0, 500.0], lambda job, now: replies.get(job.index, after(1.0))(job, now)).run()
    beside = [launch for launch in pool.launches if launch.index == 1 or launch.in_flight > 1]
    assert [(launch.index, launch.in_flight) for launch in beside] == [(1, 1), (1, 1)]
    first, second = (launch.at for launch in beside)
    # The bucket holds the refused 28,000 as well: empty again 28,000 / 425 s after it was launched.
    assert second == pytest.approx(first + 28_000 / 425)
    assert sorted(index for _, index, kind in pool.ends if kind == laws.OK) == [0, 1, 2]


def test_what_is_above_the_limit_itself_never_fits() -> None:
    p = params(tpd=50_000)
    assert [law.never_fits(p, n) for n in (25_501.0, 30_000.0, 30_001.0)] == [False, False, True]
    assert law.never_fits(free(tpd=50_000), 50_001.0)
    assert not law.never_fits(free(), 1e12)


@pytest.mark.parametrize("keeps", [0, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_retries_that_a_lower_limit_made_oversized_do_not_wait_for_each_other(window: int, keeps: int) -> None:
    """Three are refused while the limit falls from 30,000 to 8,000: 7,000 is above 6,800. All hold a permit, none runs.

    Were each to wait for the others to end, nobody would ever move.
    """
    p = params(window=window, stagger_s=0.0, backoff_keeps_permit=keeps)
    lower = params(tpm=8_000, window=window, stagger_s=0.0, backoff_keeps_permit=keeps)
    pool = Pool(p, [7_000.0] * 4, by_attempt(Reply(1.0, laws.THROTTLED, retry_after_s=30.0), Reply(5.0)))

    def lowered(now: float) -> None:
        law.repriced(pool.p, lower, pool.s, now)
        pool.p = lower

    pool.at(10.0, lowered)
    pool.run()
    assert sorted(index for _, index, kind in pool.ends if kind == laws.OK) == [0, 1, 2, 3]
    # Each in a window of its own: at 8,000 per minute, a minute (7,000 refilled at 113 per second) apart.
    apart = {FIXED: 60.0, SLIDING: 60.0, BUCKET: 7_000 / (6_800 / 60)}[window]
    seconds = pool.times(attempt=2)
    assert all(later - sooner >= apart - 1e-9 for sooner, later in pairwise(seconds))


# ---------------------------------------------------------------- retries


def test_backoff_starts_2_4_8_16_s_after_each_429_and_then_it_is_exhausted() -> None:
    pool = Pool(params(), [7_000.0], after(0.5, kind=laws.THROTTLED)).run()
    # The fixed window has room for three per minute; the fourth attempt is due at 16 s and the fifth at 76.5 s.
    assert pool.times() == [0.0, 2.5, 7.0, 60.0, 76.5]
    assert pool.ends == [(77.0, 0, laws.EXHAUSTED)]
    assert pool.s.in_flight == 0


def test_backoff_waits_alone() -> None:
    """Where no budget is in the way: 2, 4, 8, 16 s after the 429 was received, to the instant."""
    pool = Pool(free(), [7_000.0], after(0.5, kind=laws.THROTTLED)).run()
    received = [at + 0.5 for at in pool.times()]
    assert [later - sooner for sooner, later in zip(received, pool.times()[1:], strict=False)] == [2, 4, 8, 16]


def test_the_32_s_wait_is_reached_from_six_attempts_on_and_the_cap_from_seven() -> None:
    p = free(max_attempts=8)
    assert [law.backoff_s(p, attempt) for attempt in range(1, 8)] == [2, 4, 8, 16, 32, 60, 60]
    pool = Pool(p, [1.0], after(0.0, kind=laws.FAILED)).run()
    assert [later - sooner for sooner, later in pairwise(pool.times())] == [2, 4, 8, 16, 32, 60, 60]


def test_retry_jitter_only_adds_and_at_most_a_fifth_up_to_three_seconds() -> None:
    waits = {}
    for attempt in (1, 4, 5):
        p, s = free(max_attempts=9), law.State(in_flight=1)
        waits[attempt] = law.throttled(p, s, 1.0, attempt, -1.0, 0.0, 0.0, 100.0, 1.0) - 100.0
    assert waits == pytest.approx({1: 2.4, 4: 19.0, 5: 35.0})


def test_a_stated_retry_after_wins_over_the_backoff() -> None:
    pool = Pool(free(), [1.0], by_attempt(Reply(1.0, laws.THROTTLED, retry_after_s=0.644), Reply(1.0))).run()
    # And two milliseconds on top: the provider floors what it prints.
    assert pool.times() == pytest.approx([0.0, 1.646], abs=1e-12)
    longer = by_attempt(Reply(1.0, laws.FAILED, retry_after_s=20.0), Reply(1.0))
    assert Pool(free(), [1.0], longer).run().times() == pytest.approx([0.0, 21.002], abs=1e-12)


@pytest.mark.parametrize("stated", [-1.0, 0.0])
def test_no_retry_after_or_zero_means_our_own_backoff(stated: float) -> None:
    pool = Pool(free(), [1.0], by_attempt(Reply(1.0, laws.THROTTLED, retry_after_s=stated), Reply(1.0))).run()
    assert pool.times() == [0.0, 3.0]


def test_a_retry_takes_no_slot_and_moves_none() -> None:
    """The first of three fails at 1 s and is retried at 3 s, between the slots at 0 and 15 s, which stay."""
    replies = {0: by_attempt(Reply(1.0, laws.FAILED), Reply(1.0))}
    pool = Pool(params(), [100.0] * 3, lambda job, now: replies.get(job.index, after(1.0))(job, now)).run()
    assert [(launch.at, launch.index, launch.standing) for launch in pool.launches] == [
        (0.0, 0, law.FIRST),
        (3.0, 0, law.HOLDING),
        (15.0, 1, law.FIRST),
        (30.0, 2, law.FIRST),
    ]


def test_a_permit_that_is_kept_blocks_others_and_one_given_back_does_not() -> None:
    replies = {0: by_attempt(Reply(1.0, laws.FAILED, retry_after_s=30.0), Reply(1.0))}

    def launches(keeps: int) -> list[tuple[float, int]]:
        p = free(max_concurrency=1, backoff_keeps_permit=keeps)
        pool = Pool(p, [1.0] * 3, lambda job, now: replies.get(job.index, after(20.0))(job, now)).run()
        return [(round(launch.at, 9), launch.index) for launch in pool.launches]

    assert launches(1) == [(0, 0), (31.002, 0), (32.002, 1), (52.002, 2)]
    # Given back, the second launches at once, the third when that is over; the retry, due at 31 s, when that one is.
    assert launches(0) == [(0, 0), (1, 1), (21, 2), (41, 0)]


def test_a_kept_permit_needs_no_second_one_and_a_finalize_pass_cannot_take_it_away() -> None:
    p, s = free(max_concurrency=2), law.State()
    for at in (0.0, 1.0):
        law.launched(p, s, 1.0, law.FIRST, at, 0.5)
    law.finalize_opened(p, s)
    assert law.failed(p, s, 1, -1.0, 0.0, 2.0, 0.0) == 4.0
    assert s.in_flight == 2
    assert law.admission(p, s, 1.0, law.HOLDING, 4.0) == (4.0, law.NOTHING)
    assert law.admission(p, s, 1.0, law.RETRY, 4.0) == (INF, law.CONCURRENCY)
    law.launched(p, s, 1.0, law.HOLDING, 4.0, 0.5)
    assert s.in_flight == 2


def test_the_last_attempt_and_the_deadline_give_the_permit_back() -> None:
    for attempt, deadline_s, first in ((5, 0.0, 0.0), (1, 10.0, 0.0), (1, 12.0, 0.0)):
        p, s = free(deadline_s=deadline_s), law.State(in_flight=2)
        assert law.failed(p, s, attempt, -1.0, first, 10.0, 0.0) == INF
        assert s.in_flight == 1
    # One moment more, and the retry at 12 s still counts.
    p, s = free(deadline_s=12.1), law.State(in_flight=2)
    assert law.failed(p, s, 1, -1.0, 0.0, 10.0, 0.0) == 12.0
    assert s.in_flight == 2


def test_the_deadline_counts_from_the_first_launch_retries_included() -> None:
    pool = Pool(free(deadline_s=20.0), [1.0], after(1.0, kind=laws.FAILED)).run()
    # 429s at 1, 4, 9: the next retry would be at 17 and its answer at 18; the one after that at 34.
    assert pool.times() == [0, 3, 8, 17]
    assert pool.ends == [(18.0, 0, laws.EXHAUSTED)]
    p = free(deadline_s=20.0, timeout_s=8.0)
    assert [law.expires_at(p, 5.0, at) for at in (5.0, 15.0, 24.0)] == [13.0, 23.0, 25.0]
    assert law.deadline_at(free(), 5.0) == INF


# ---------------------------------------------------------------- holds


def test_a_429_holds_the_whole_pool_until_its_retry_goes() -> None:
    p = free(hold_on_throttle=1, max_concurrency=10, stagger_s=5.0, jitter_ratio=0.0)
    replies = {1: by_attempt(Reply(1.0, laws.THROTTLED, retry_after_s=20.0), Reply(1.0))}
    pool = Pool(p, [1.0] * 5, lambda job, now: replies.get(job.index, after(1.0))(job, now)).run()
    launches = [(round(launch.at, 9), launch.index) for launch in pool.launches]
    # Refused at 6 s; retried first at 26.002 s. The slot of 10 s has long come.
    assert launches == [(0, 0), (5, 1), (26.002, 1), (26.002, 2), (31.002, 3), (36.002, 4)]
    assert pool.deferrals[law.HOLD] == 1


def test_a_hold_never_shrinks_and_its_jitter_does_not_let_new_work_overtake() -> None:
    p, s = free(hold_on_throttle=1), law.State(in_flight=3)
    first = law.throttled(p, s, 1.0, 1, 30.0, 0.0, 0.0, 1.0, 1.0)
    assert first == pytest.approx(1.0 + 30.002 + 3.0)
    assert s.hold_until == first
    assert law.throttled(p, s, 1.0, 1, 2.0, 0.0, 0.0, 2.0, 0.0) == pytest.approx(4.002)
    assert s.hold_until == first
    assert law.admission(p, s, 1.0, law.HOLDING, 4.002) == (first, law.HOLD)


def test_failures_hold_nobody() -> None:
    p, s = free(hold_on_throttle=1), law.State(in_flight=1)
    law.failed(p, s, 1, 30.0, 0.0, 1.0, 0.0)
    assert s.hold_until == -INF


def test_an_exhausted_request_still_holds_but_no_longer_than_anybody_would_wait() -> None:
    p, s = free(hold_on_throttle=1, deadline_s=600.0), law.State(in_flight=1)
    assert law.throttled(p, s, 1.0, 1, 411_480.0, 0.0, 0.0, 10.0, 0.0) == INF
    assert s.hold_until == 610.0
    p, s = free(hold_on_throttle=1), law.State(in_flight=1)
    assert law.throttled(p, s, 1.0, 5, 7.0, 0.0, 0.0, 10.0, 0.0) == INF
    assert s.hold_until == pytest.approx(17.002)


@pytest.mark.parametrize("window", WINDOWS)
def test_after_a_hold_the_budgets_still_bind(window: int) -> None:
    p = free(tpm=1_000, headroom=0.0, window=window, hold_on_throttle=1)
    s = law.State()
    law.launched(p, s, 1_000.0, law.FIRST, 0.0, 0.5)
    law.throttled(p, s, 1_000.0, 1, 10.0, 0.0, 0.0, 0.1, 0.0)
    at, cause = laws.promised(p, s, 1_000.0, law.HOLDING, 0.1)
    assert (at, cause) == (pytest.approx(60.5 if window == SLIDING else 60.0), law.BY_TPM)
    law.throttled(p, s, 1_000.0, 1, 90.0, 0.0, 0.0, 0.1, 0.0)
    assert laws.promised(p, s, 1_000.0, law.HOLDING, 0.1) == (s.hold_until, law.HOLD)


# ---------------------------------------------------------------- finalize passes, pauses


def test_finalize_lowers_the_cap_to_two_and_pre_empts_nobody() -> None:
    p = free(max_concurrency=3)
    pool = Pool(p, [1.0] * 10, after(10.0))
    pool.at(5.0, lambda now: law.finalize_opened(p, pool.s))
    pool.at(35.0, lambda now: law.finalize_closed(p, pool.s))
    pool.run()
    # Three run on to 10 s; then two at a time, until the pass closes at 35 s and the third place comes back.
    assert [(launch.at, launch.in_flight) for launch in pool.launches] == [
        *((0, 1), (0, 2), (0, 3)),
        *((10, 2), (10, 2)),
        *((20, 2), (20, 2)),
        *((30, 2), (30, 2)),
        (35, 3),
    ]
    p, s = free(max_concurrency=3), law.State(in_flight=2, finalize_open=2)
    assert law.blocked_by(p, s, 1.0, law.FIRST, 0.0) == law.CONCURRENCY
    law.finalize_closed(p, s)
    assert law.permits(p, s) == 2
    law.finalize_closed(p, s)
    assert law.permits(p, s) == 3


def test_finalize_never_raises_the_cap_and_can_be_told_not_to_lower_it() -> None:
    s = law.State(finalize_open=1)
    assert law.permits(free(max_concurrency=1), s) == 1
    assert law.permits(free(max_concurrency=9, finalize_lowers=0), s) == 9
    assert law.permits(free(max_concurrency=9, finalize_max_concurrency=4), s) == 4


def test_a_pause_stops_launches_and_nothing_else() -> None:
    pool = Pool(params(), [7_000.0] * 3, after(1.0))
    pool.at(10.0, lambda now: law.paused(pool.p, pool.s))
    pool.at(40.0, lambda now: law.resumed(pool.p, pool.s))
    pool.run()
    assert pool.times() == [0, 40, 55]
    assert pool.ends[0] == (1.0, 0, laws.OK)
    assert pool.deferrals == {law.STAGGER: 2, law.PAUSED: 1}


# ---------------------------------------------------------------- causes


def test_the_cause_is_the_knob_whose_own_time_is_latest() -> None:
    p, s = params(rpm=1, headroom=0.0, tpd=100_000, window=BUCKET, hold_on_throttle=1), law.State()
    law.launched(p, s, 30_000.0, law.FIRST, 0.0, 0.5)
    # Slot at 15 s; 30,000 at 500 per second; one request per minute; 100,000 a day: 70,000 are left.
    cases = {
        (1_000.0, law.FIRST): (60.0, law.BY_RPM),
        (30_000.0, law.FIRST): (60.0, law.BY_TPM),
        (1_000.0, law.RETRY): (60.0, law.BY_RPM),
    }
    for (reserve, standing), expected in cases.items():
        assert law.admission(p, s, reserve, standing, 1.0) == expected
    relaxed = params(headroom=0.0, tpd=100_000, window=BUCKET)
    assert law.admission(relaxed, s, 1_000.0, law.FIRST, 1.0) == (15.0, law.STAGGER)
    assert law.admission(relaxed, s, 10_000.0, law.FIRST, 1.0) == (20.0, law.BY_TPM)
    assert law.admission(relaxed, s, 1_000.0, law.RETRY, 1.0) == (2.0, law.BY_TPM)
    s.hold_until = 61.0
    assert law.admission(p, s, 1_000.0, law.FIRST, 1.0) == (61.0, law.HOLD)
    s.in_flight = 3
    assert law.admission(p, s, 1_000.0, law.FIRST, 1.0) == (INF, law.CONCURRENCY)
    law.paused(p, s)
    assert law.admission(p, s, 1_000.0, law.FIRST, 1.0) == (INF, law.PAUSED)


# ---------------------------------------------------------------- settling and refunds


@pytest.mark.parametrize("window", WINDOWS)
def test_settling_books_real_use_where_the_reservation_stood(window: int) -> None:
    p, s = free(tpm=1_000, tpd=50_000, headroom=0.0, window=window, settles=1), law.State()
    law.launched(p, s, 800.0, law.FIRST, 5.0, 0.5)
    assert law.blocked_by(p, s, 400.0, law.FIRST, 6.0) == law.BY_TPM
    law.settled(p, s, 800.0, 500.0, 5.0)
    drained = 100 / 6 if window == BUCKET else 0.0
    assert law.used_in(p, s, TPM, 6.0) == pytest.approx(500.0 - drained)
    assert law.used_in(p, s, TPD, 6.0) == pytest.approx(500.0 - 50_000 / 86_400)
    assert law.admission(p, s, 500.0, law.FIRST, 6.0) == (6.0, law.NOTHING)
    # More than reserved counts as well.
    law.launched(p, s, 100.0, law.FIRST, 6.0, 0.5)
    law.settled(p, s, 100.0, 450.0, 6.0)
    assert law.used_in(p, s, TPM, 6.0) == pytest.approx(950.0 - drained)


@pytest.mark.parametrize("window", [FIXED, SLIDING])
def test_a_settlement_that_comes_after_its_window_changes_nothing(window: int) -> None:
    p, s = free(tpm=1_000, headroom=0.0, window=window, settles=1), law.State()
    law.launched(p, s, 800.0, law.FIRST, 0.0, 0.5)
    law.launched(p, s, 900.0, law.FIRST, 61.0, 0.5)
    law.settled(p, s, 800.0, 100.0, 0.0)
    assert law.used_in(p, s, TPM, 61.0) == 900.0


def test_without_settling_the_reservation_stays() -> None:
    p, s = free(tpm=1_000, headroom=0.0), law.State()
    law.launched(p, s, 800.0, law.FIRST, 0.0, 0.5)
    law.settled(p, s, 800.0, 1.0, 0.0)
    assert law.used_in(p, s, TPM, 1.0) == 800.0


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("refunds", "left"), [(0, 900.0), (1, 0.0)])
def test_a_429_stays_booked_unless_the_policy_refunds(window: int, refunds: int, left: float) -> None:
    p, s = free(tpm=1_000, rpm=10, headroom=0.0, window=window, refunds_throttled=refunds), law.State()
    law.launched(p, s, 900.0, law.FIRST, 0.0, 0.5)
    law.throttled(p, s, 900.0, 1, -1.0, 0.0, 0.0, 0.0, 0.0)
    assert law.used_in(p, s, TPM, 0.0) == pytest.approx(left)
    # The request itself was made: it counts in any case. And a 5xx was charged: no refund.
    assert law.used_in(p, s, RPM, 0.0) == pytest.approx(1.0)
    law.launched(p, s, 100.0, law.RETRY, 0.0, 0.5)
    law.failed(p, s, 1, -1.0, 0.0, 0.0, 0.0)
    assert law.used_in(p, s, TPM, 0.0) == pytest.approx(left + 100.0)


# ---------------------------------------------------------------- order


def test_retries_go_first_then_finalize_passes_then_new_work() -> None:
    fifo, longest = params(), params(longest_first=1)
    waiting = [
        (law.MAIN, 1, 50.0, 400.0, 1.0),
        (law.MAIN, 1, 900.0, 400.0, 2.0),
        (law.MAIN, 1, 900.0, 700.0, 3.0),
        (law.MAIN, 1, -1.0, 900.0, 4.0),  # no declared cap: last
        (law.FINALIZE, 1, 10.0, 10.0, 5.0),
        (law.MAIN, 2, 10.0, 10.0, 6.0),
        (law.FINALIZE, 3, 10.0, 10.0, 7.0),
        (law.MAIN, 1, 900.0, 700.0, 8.0),
    ]

    def order(p: law.Params) -> list[int]:
        return [int(row[4]) for row in sorted(waiting, key=lambda row: law.rank(p, *row))]

    assert order(fifo) == [6, 7, 5, 1, 2, 3, 4, 8]
    assert order(longest) == [6, 7, 5, 3, 8, 2, 1, 4]


# ---------------------------------------------------------------- the provider's count


def heard(p: law.Params, limit: float, remaining: float, now: float = 0.0) -> law.State:
    """A pool that has launched nothing and just heard this about its tokens per minute."""
    s = law.State()
    law.synced(p, s, TPM, limit, remaining, 0.0, 0.0, now, now)
    return s


def synced_policy(**changes: Any) -> law.Params:
    return free(**({"tpm": 30_000, "headroom": 0.0, "window": BUCKET, "sync_headers": 1} | changes))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_count_with_less_room_tightens_every_kind_of_window(window: int) -> None:
    """Somebody else used 20,000. In ours they count from now on, as if we had launched them."""
    p = synced_policy(window=window)
    s = heard(p, 30_000.0, 10_000.0)
    assert law.used_in(p, s, TPM, 0.0) == pytest.approx(20_000.0)
    assert law.blocked_by(p, s, 10_001.0, law.FIRST, 0.0) == law.BY_TPM


def test_a_count_with_more_room_loosens_the_bucket_and_no_other_window() -> None:
    for window, left in ((BUCKET, 10_000.0), (FIXED, 25_000.0), (SLIDING, 25_000.0)):
        p, s = synced_policy(window=window), law.State()
        law.launched(p, s, 25_000.0, law.FIRST, 0.0, 0.5)
        # We reserved 25,000, the provider charged 10,000.
        law.synced(p, s, TPM, 30_000.0, 20_000.0, 0.0, 0.0, 0.0, 0.0)
        assert law.used_in(p, s, TPM, 0.0) == pytest.approx(left)


def test_a_count_speaks_of_the_moment_of_admission() -> None:
    """20,000 were left at 10 s; 5 s later 2,500 have come back and the 4,000 booked since are gone."""
    p, s = synced_policy(), law.State()
    law.launched(p, s, 1_000.0, law.FIRST, 10.0, 0.5)
    booked = s.booked[TPM]
    law.launched(p, s, 4_000.0, law.FIRST, 12.0, 0.5)
    law.synced(p, s, TPM, 30_000.0, 20_000.0, 0.0, s.booked[TPM] - booked, 10.0, 15.0)
    assert law.used_in(p, s, TPM, 15.0) == pytest.approx(30_000 - (20_000 + 2_500 - 4_000))


@pytest.mark.parametrize(
    ("limit", "remaining"),
    [
        (0.0, 0.0),
        (-1.0, -1.0),
        (30_000.0, -27_689.0),
        (30_000.0, 30_001.0),
        (math.nan, 5.0),
        (30_000.0, math.nan),
        (INF, 5.0),
        (INF, INF),
    ],
)
def test_implausible_counts_change_nothing(limit: float, remaining: float) -> None:
    p, s = synced_policy(), law.State()
    law.launched(p, s, 5_000.0, law.FIRST, 0.0, 0.5)
    before = copy.deepcopy(s)
    for now in (0.0, 1.0):
        law.synced(p, s, TPM, limit, remaining, 0.0, 0.0, 0.0, now)
    assert s == before


def test_stale_and_out_of_order_counts_change_nothing() -> None:
    p, s = synced_policy(), law.State()
    law.synced(p, s, TPM, 30_000.0, 20_000.0, 0.0, 0.0, 100.0, 101.0)
    before = copy.deepcopy(s)
    law.synced(p, s, TPM, 30_000.0, 100.0, 0.0, 0.0, 99.9, 102.0)  # older than the last one
    law.synced(p, s, TPM, 30_000.0, 100.0, 0.0, 0.0, 101.0, 161.5)  # older than the window
    assert s == before
    law.synced(p, s, TPM, 30_000.0, 100.0, 0.0, 0.0, 101.0, 102.0)
    assert s != before


def test_counts_are_ignored_where_the_policy_does_not_sync() -> None:
    p = synced_policy(sync_headers=0)
    s = heard(p, 10_000.0, 0.0)
    assert s == law.State()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_granted_limit_below_ours_scales_the_budget(window: int) -> None:
    """We believe in 30,000 with 15 % headroom, the provider grants 10,000: 8,500 are ours, and 9,000 runs alone."""
    p = synced_policy(headroom=0.15, window=window)
    s = heard(p, 10_000.0, 10_000.0)
    assert s.scale[TPM] == pytest.approx(1 / 3)
    law.launched(p, s, 5_000.0, law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, 3_500.0, law.FIRST, 0.0) == (0.0, law.NOTHING)
    assert law.blocked_by(p, s, 3_501.0, law.FIRST, 0.0) == law.BY_TPM
    assert law.blocked_by(p, s, 9_000.0, law.FIRST, 0.0) == law.CONCURRENCY
    # The limit comes back: so does the budget.
    law.synced(p, s, TPM, 30_000.0, 25_000.0, 0.0, 0.0, 1.0, 1.0)
    assert s.scale[TPM] == 1.0
    assert law.admission(p, s, 15_000.0, law.FIRST, 1.0)[1] == law.NOTHING


def test_a_granted_limit_above_ours_leaves_our_budget_where_it_is() -> None:
    """Somebody has 90,000 and gives us 30,000: what others use of the rest is no concern of ours."""
    p = synced_policy()
    s = heard(p, 90_000.0, 90_000.0)
    law.launched(p, s, 30_000.0, law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, 500.0, law.FIRST, 0.0) == (pytest.approx(1.0), law.BY_TPM)


def test_a_limit_of_requests_that_only_the_headers_know_binds() -> None:
    """The policy names no limit of requests; the headers do: 3 per minute, 200 per day. Our one request is counted."""
    for d, limit, wait_s, cause in ((RPM, 3.0, 20.0, law.BY_RPM), (RPD, 200.0, 432.0, law.BY_DAY)):
        p, s = synced_policy(), law.State()
        law.launched(p, s, 10.0, law.FIRST, 0.0, 0.5)
        law.synced(p, s, d, limit, limit - 1.0, 0.0, 0.0, 0.0, 0.0)
        for _ in range(int(limit) - 1):
            assert law.admission(p, s, 10.0, law.FIRST, 0.0) == (0.0, law.NOTHING)
            law.launched(p, s, 10.0, law.FIRST, 0.0, 0.5)
        assert law.admission(p, s, 10.0, law.FIRST, 0.0) == (pytest.approx(wait_s), cause)


def test_no_part_of_a_day_is_kept_free_for_surprises() -> None:
    """Room that is kept costs a minute's bucket a delay of seconds, and a day's one of hours.

    Nor need a day's count ever be heard: the headers show requests of the tighter limit, and tokens per minute only.
    """
    p, s = synced_policy(tpd=86_400, rpd=200), law.State()
    for _ in range(200):
        assert law.admission(p, s, 1.0, law.FIRST, 0.0) == (0.0, law.NOTHING)
        law.launched(p, s, 1.0, law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, 1.0, law.FIRST, 0.0) == (pytest.approx(432.0), law.BY_DAY)
    # An earlier run has used 140 of this day's 200: 60 are left, and all of them may go.
    p, s = synced_policy(rpd=200), law.State()
    law.launched(p, s, 1.0, law.FIRST, 0.0, 0.5)
    law.synced(p, s, RPD, 200.0, 59.0, 0.0, 0.0, 0.0, 0.0)
    for _ in range(59):
        assert law.admission(p, s, 1.0, law.FIRST, 0.0) == (0.0, law.NOTHING)
        law.launched(p, s, 1.0, law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, 1.0, law.FIRST, 0.0) == (pytest.approx(432.0), law.BY_DAY)


def test_even_pacing_ends_when_it_was_to_end() -> None:
    """Both times are absolute: the next launch waits for its turn, and no longer than until `paced_until`."""
    for pace_at, until, expected in ((50.0, 600.0, 50.0), (50.0, 30.0, 30.0), (50.0, -INF, 10.0)):
        p, s = synced_policy(), law.State(pace_at=pace_at, paced_until=until)
        assert laws.promised(p, s, 100.0, law.FIRST, 10.0)[0] == expected


# ---------------------------------------------------------------- changed settings


def repriced(old: law.Params, new: law.Params, used: float, now: float) -> law.State:
    """A pool that launched `used` tokens at 0 s under the old settings, and gets the new ones now."""
    s = law.State()
    law.launched(old, s, used, law.FIRST, 0.0, 0.5)
    law.repriced(old, new, s, now)
    return s


@pytest.mark.parametrize("before", WINDOWS)
@pytest.mark.parametrize("after_", WINDOWS)
def test_what_is_used_stays_used_whatever_the_window_becomes(before: int, after_: int) -> None:
    old, new = free(tpm=6_000, rpm=10, window=before), free(tpm=3_000, rpm=10, window=after_)
    used = 3_000.0
    s = repriced(old, new, used, 12.0)
    # 12 s at 85 per second have drained from a bucket.
    left = used - 12.0 * 6_000 * 0.85 / 60 if before == BUCKET else used
    assert law.used_in(new, s, TPM, 12.0) == pytest.approx(left)
    requests = 0.0 if before == BUCKET else 1.0
    assert law.used_in(new, s, RPM, 12.0) == pytest.approx(requests)
    at, cause = laws.promised(new, s, 2_550.0, law.FIRST, 12.0)
    assert cause == law.BY_TPM
    if before == after_ and before != BUCKET:
        # The same window goes on: its end does not move.
        assert at == (60.0 if before == FIXED else 60.5)
    elif after_ != BUCKET:
        assert at == 12.0 + (60.0 if after_ == FIXED else 60.5)
    else:
        assert at == pytest.approx(12.0 + left / (3_000 * 0.85 / 60))


def test_the_next_slot_moves_with_the_stagger() -> None:
    old = params(jitter_ratio=0.0)
    for stagger_s, slot in ((30.0, 30.0), (5.0, 5.0), (0.0, 0.0), (15.0, 15.0)):
        s = repriced(old, params(stagger_s=stagger_s), 100.0, 2.0)
        assert s.next_slot_at == slot
    # From none to some: from the last launch on. And before any launch there is no slot to move.
    assert repriced(params(stagger_s=0.0), params(), 100.0, 2.0).next_slot_at == 15.0
    s = law.State()
    law.repriced(params(), params(stagger_s=30.0), s, 2.0)
    assert s.next_slot_at == -INF


def test_the_drawn_jitter_of_the_next_slot_is_kept_in_proportion() -> None:
    s = law.State()
    law.launched(params(), s, 1.0, law.FIRST, 100.0, 1.0)
    law.repriced(params(), params(stagger_s=30.0), s, 101.0)
    assert s.next_slot_at == 100.0 + 2 * 18.0


def test_permits_holds_passes_and_pauses_survive_new_settings() -> None:
    s = law.State(in_flight=2, finalize_open=1, paused=1, hold_until=99.0, alone=1)
    law.repriced(params(), params(tpm=10_000, window=BUCKET, max_concurrency=1), s, 5.0)
    assert (s.in_flight, s.finalize_open, s.paused, s.hold_until, s.alone) == (2, 1, 1, 99.0, 1)


def test_a_limit_that_is_lifted_or_set_in_mid_run() -> None:
    with_limit, without = params(stagger_s=0.0), params(tpm=0, stagger_s=0.0)
    s = repriced(with_limit, without, 25_000.0, 1.0)
    assert law.admission(without, s, 1e9, law.RETRY, 1.0) == (1.0, law.NOTHING)
    s = repriced(without, with_limit, 25_000.0, 1.0)
    assert law.admission(with_limit, s, 25_500.0, law.RETRY, 1.0) == (1.0, law.NOTHING)


@pytest.mark.parametrize("window", WINDOWS)
def test_daily_use_survives_new_settings(window: int) -> None:
    old, new = free(tpd=86_400, window=FIXED), free(tpd=43_200, window=window)
    s = repriced(old, new, 10_000.0, 0.0)
    assert law.used_in(new, s, TPD, 0.0) == pytest.approx(10_000.0)
    assert law.used_in(new, s, TPD, 1_000.0) == pytest.approx(9_500.0)


def test_a_settlement_from_before_a_change_of_window_never_makes_room_that_comes_back() -> None:
    """7,000 launched under `fixed` stand, after the change, in the cell of the change.

    A settlement finds an empty cell at its own launch: were it booked there as less than nothing, the window would look
    emptier for a while and then fuller again, and the law would take back a moment that it had named.
    """
    old = free(tpm=10_000, headroom=0.0, window=FIXED, settles=1)
    new = free(tpm=10_000, headroom=0.0, window=SLIDING, settles=1)
    s = repriced(old, new, 7_000.0, 30.0)
    law.settled(new, s, 7_000.0, 2_000.0, 0.0)
    s.hold_until = 70.0
    laws.promised(new, s, 5_000.0, law.FIRST, 30.0)


def test_a_state_begins_empty() -> None:
    s = law.State()
    for window in WINDOWS:
        p = params(rpm=3, tpd=1_000_000, rpd=50, window=window)
        assert [law.used_in(p, s, d, 0.0) for d in range(4)] == [0.0] * 4
        assert law.admission(p, s, 25_500.0, law.FIRST, 0.0) == (0.0, law.NOTHING)
    assert Launch(0.0, 0, 1.0, 1, law.FIRST, 1) == Pool(params(), [1.0], after(1.0)).run().launches[0]
    assert Job(0, 1.0).standing == law.FIRST

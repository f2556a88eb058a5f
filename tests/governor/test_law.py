"""The law as timetables: what happens when, told by `laws.Pool` and compared with what the rules say on paper.

Here: launches, windows, oversized requests, finalize passes and the queue's order.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from governor import law
from governor.law import BUCKET, FIXED, FIXED_S, RPD, SLIDING, SLIDING_S, TPD, TPM
from governor.model.needs import of_amounts, of_tokens
from tests.governor import laws
from tests.governor.laws import INF, WINDOWS, Pool, Reply, after, by_attempt, free, params

# ---------------------------------------------------------------- ten runs on the guardrails


def test_ten_runs_on_the_guardrails_with_answers_in_no_time() -> None:
    """7,000 each, 25,500 per anchored minute: three launches 15 s apart, then the next minute.

    The fourth slot, at 45 s, would bring the window to 28,000: it waits for the window's end, and so on.
    """
    pool = Pool(params(), [7_000.0] * 10, after(5.0)).run()
    assert pool.times() == pytest.approx([m * FIXED_S + s for m in range(4) for s in (0, 15, 30)][:10])
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
    assert params().budget == [25_500.0, *[INF] * 7]
    assert params().rate_per_s[TPM] == pytest.approx(425.0, rel=1e-15)


# ---------------------------------------------------------------- windows


def test_a_fixed_minute_is_anchored_at_the_first_launch_after_the_last_one_expired() -> None:
    p, s = free(tpm=1_000, headroom=0.0, window=FIXED), law.State()
    law.launched(p, s, of_tokens(600.0), law.FIRST, 7.0, 0.5)
    law.launched(p, s, of_tokens(400.0), law.FIRST, 50.0, 0.5)
    assert law.admit_at(p, s, of_tokens(1.0), law.FIRST, 50.0) == 7.0 + FIXED_S
    assert law.used_in(p, s, TPM, 67.0) == 1_000
    assert law.used_in(p, s, TPM, 7.0 + FIXED_S) == 0
    # Nobody comes at once: the next minute begins when somebody does.
    law.launched(p, s, of_tokens(1_000.0), law.FIRST, 90.0, 0.5)
    assert law.admit_at(p, s, of_tokens(1.0), law.FIRST, 100.0) == 90.0 + FIXED_S


def test_the_sliding_window_lets_go_after_61_to_61_and_a_half_seconds() -> None:
    for launched_at in (0.0, 0.25, 0.4999999, 0.5, 17.3, 59.5):
        p, s = free(tpm=1_000, headroom=0.0, window=SLIDING), law.State()
        law.launched(p, s, of_tokens(1_000.0), law.FIRST, launched_at, 0.5)
        at = law.admit_at(p, s, of_tokens(1.0), law.FIRST, launched_at)
        assert at == math.floor(launched_at * 2) / 2 + SLIDING_S
        assert FIXED_S < at - launched_at <= SLIDING_S


def test_the_sliding_window_frees_what_is_needed_and_no_more() -> None:
    p, s = free(tpm=1_000, headroom=0.0, window=SLIDING), law.State()
    law.launched(p, s, of_tokens(400.0), law.FIRST, 0.0, 0.5)
    law.launched(p, s, of_tokens(300.0), law.FIRST, 10.0, 0.5)
    law.launched(p, s, of_tokens(300.0), law.FIRST, 20.0, 0.5)
    needs = {1.0: 61.5, 400.0: 61.5, 401.0: 71.5, 700.0: 71.5, 701.0: 81.5, 1_000.0: 81.5}
    assert {need: law.admit_at(p, s, of_tokens(need), law.FIRST, 30.0) for need in needs} == needs
    assert [law.used_in(p, s, TPM, now) for now in (61.4, 61.5, 71.4, 71.5, 81.5)] == [1_000, 600, 600, 300, 0]


def test_the_bucket_refills_continuously_and_never_holds_more_than_its_capacity() -> None:
    p, s = free(tpm=6_000, headroom=0.0, window=BUCKET), law.State()
    law.launched(p, s, of_tokens(6_000.0), law.FIRST, 10.0, 0.5)
    ready = [law.admit_at(p, s, of_tokens(n), law.FIRST, 10.0) for n in (1.0, 100.0, 3_000.0, 6_000.0)]
    assert ready == pytest.approx([10.01, 11.0, 40.0, 70.0], rel=1e-12)
    assert [law.used_in(p, s, TPM, now) for now in (10.0, 20.0, 69.0, 70.0, 500.0)] == [6_000, 5_000, 100, 0, 0]
    law.launched(p, s, of_tokens(6_000.0), law.FIRST, 1_000.0, 0.5)
    assert law.admit_at(p, s, of_tokens(100.0), law.FIRST, 1_000.0) == 1_001


@pytest.mark.parametrize("window", WINDOWS)
def test_requests_per_minute_are_counted_in_the_same_kind_of_window(window: int) -> None:
    p, s = free(rpm=3, headroom=0.0, window=window), law.State()
    for at in (0.0, 10.0, 20.0):
        assert law.admission(p, s, of_tokens(999.0), law.FIRST, at) == (at, law.NOTHING)
        law.launched(p, s, of_tokens(999.0), law.FIRST, at, 0.5)
    # A bucket of three had refilled one request at 20 s and needs until 40 s for the next one.
    expected = {FIXED: FIXED_S, SLIDING: SLIDING_S, BUCKET: 20.0}[window]
    at, cause = law.admission(p, s, of_tokens(999.0), law.FIRST, 20.0)
    assert at == pytest.approx(expected)
    assert cause == (law.NOTHING if window == BUCKET else law.BY_RPM)


def test_a_steady_load_is_paced_at_the_bucket_rate() -> None:
    """1,000-token requests on 6,000 per minute: six at once, then one every 10 s."""
    pool = Pool(free(tpm=6_000, headroom=0.0, window=BUCKET), [1_000.0] * 20, after(3.0)).run()
    assert pool.times() == pytest.approx([0.0] * 6 + [10.0 * n for n in range(1, 15)], rel=1e-12)


def test_daily_budgets_are_buckets_of_a_day_and_start_at_a_level() -> None:
    for window in WINDOWS:
        p, s = free(tpd=86_400, rpd=100, window=window), law.State()
        law.started(p, s, of_amounts({TPD: 80_000.0, RPD: 99.0}), 0.0)
        assert law.admission(p, s, of_tokens(6_400.0), law.FIRST, 0.0) == (0.0, law.NOTHING)
        assert law.admit_at(p, s, of_tokens(7_000.0), law.FIRST, 0.0) == pytest.approx(600.0)
        law.launched(p, s, of_tokens(6_400.0), law.FIRST, 0.0, 0.5)
        # Now a token comes every second, a request every 864 s.
        assert law.admission(p, s, of_tokens(100.0), law.FIRST, 0.0) == (pytest.approx(864.0), law.BY_DAY)
        assert law.admission(p, s, of_tokens(2_000.0), law.FIRST, 0.0) == (pytest.approx(2_000.0), law.BY_DAY)
        assert [law.used_in(p, s, d, 0.0) for d in (TPD, RPD)] == pytest.approx([86_400.0, 100.0])
        assert law.used_in(p, s, TPD, 86_400.0) == 0.0


def test_a_day_that_begins_overdrawn_waits_it_off() -> None:
    p, s = free(rpd=10), law.State()
    law.started(p, s, of_amounts({RPD: 12.0}), 1_000.0)
    assert law.admit_at(p, s, of_tokens(1.0), law.FIRST, 1_000.0) == pytest.approx(1_000.0 + 3 * 8_640.0)


# ---------------------------------------------------------------- oversized requests


@pytest.mark.parametrize("window", WINDOWS)
def test_above_the_budget_and_within_the_limit_a_request_runs_alone(window: int) -> None:
    """28,000 of 25,500: nothing else in flight, the window empty; and nobody joins it, though there are permits."""
    p = params(window=window, stagger_s=0.0)
    pool = Pool(p, [1_000.0, 28_000.0, 1_000.0, 1_000.0], after(200.0)).run()
    assert pool.times() == [0, 200, 400, 400]
    assert [launch.in_flight for launch in pool.launches] == [1, 1, 1, 2]
    assert pool.deferrals == {law.CONCURRENCY: 2}


@pytest.mark.parametrize(("window", "empty_at"), [(FIXED, FIXED_S), (SLIDING, SLIDING_S), (BUCKET, 1_000 / 425)])
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
    assert [law.never_fits(p, of_tokens(n)) for n in (25_501.0, 30_000.0, 30_001.0)] == [False, False, True]
    assert law.never_fits(free(tpd=50_000), of_tokens(50_001.0))
    assert not law.never_fits(free(), of_tokens(1e12))


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
    apart = {FIXED: FIXED_S, SLIDING: 60.0, BUCKET: 7_000 / (6_800 / 60)}[window]
    seconds = pool.times(attempt=2)
    assert all(later - sooner >= apart - 1e-9 for sooner, later in pairwise(seconds))


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
    assert law.admission(p, s, of_tokens(1.0), law.FIRST, 0.0)[1] == law.CONCURRENCY
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
    law.launched(p, s, of_tokens(30_000.0), law.FIRST, 0.0, 0.5)
    # Slot at 15 s; 30,000 at 500 per second; one request per minute; 100,000 a day: 70,000 are left.
    cases = {
        (1_000.0, law.FIRST): (60.0, law.BY_RPM),
        (30_000.0, law.FIRST): (60.0, law.BY_TPM),
        (1_000.0, law.RETRY): (60.0, law.BY_RPM),
    }
    for (reserve, standing), expected in cases.items():
        assert law.admission(p, s, of_tokens(reserve), standing, 1.0) == expected
    relaxed = params(headroom=0.0, tpd=100_000, window=BUCKET)
    assert law.admission(relaxed, s, of_tokens(1_000.0), law.FIRST, 1.0) == (15.0, law.STAGGER)
    assert law.admission(relaxed, s, of_tokens(10_000.0), law.FIRST, 1.0) == (20.0, law.BY_TPM)
    assert law.admission(relaxed, s, of_tokens(1_000.0), law.RETRY, 1.0) == (2.0, law.BY_TPM)
    s.hold_until = 61.0
    assert law.admission(p, s, of_tokens(1_000.0), law.FIRST, 1.0) == (61.0, law.HOLD)
    s.in_flight = 3
    assert law.admission(p, s, of_tokens(1_000.0), law.FIRST, 1.0) == (INF, law.CONCURRENCY)
    law.paused(p, s)
    assert law.admission(p, s, of_tokens(1_000.0), law.FIRST, 1.0) == (INF, law.PAUSED)


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
    # Of retries, one that holds its place goes before one that does not: it may be what the other waits for.
    assert law.rank(fifo, law.MAIN, 2, 1.0, 1.0, 9.0, law.HOLDING) < law.rank(
        fifo, law.MAIN, 2, 1.0, 1.0, 8.0, law.RETRY
    )
    assert order(longest) == [6, 7, 5, 3, 8, 2, 1, 4]


# ---------------------------------------------------------------- interactive requests


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sync", [0, 1])
def test_a_batch_leaves_the_interactive_share_of_each_limit_free(window: int, sync: int) -> None:
    """1,000 tokens and 10 requests a minute of which a fifth is kept: 800 and 8 for the batch, all for the others.

    (A little less or more, so that no sum of them is exactly the limit.)
    """

    def launches(standing: int, reserve: float) -> int:
        p = free(tpm=1_000, rpm=10.5, headroom=0.0, window=window, interactive_ratio=0.2, sync_headers=sync)
        s = law.State(synced_at=[0.0] * 4)
        count = 0
        while law.admit_at(p, s, of_tokens(reserve), standing, 0.0) == 0.0:
            law.launched(p, s, of_tokens(reserve), standing, 0.0, 0.5)
            count += 1
        return count

    assert [launches(standing, 98.0) for standing in (law.FIRST, law.RETRY, law.INTERACTIVE)] == [8, 10, 10]
    assert [launches(standing, 1.0) for standing in (law.FIRST, law.RETRY, law.INTERACTIVE)] == [8, 10, 10]


def test_a_batch_leaves_places_in_flight_free_but_never_all() -> None:
    p = free(max_concurrency=10, interactive_ratio=0.25)
    s = law.State(in_flight=7)
    assert [law.admit_at(p, s, of_tokens(1.0), standing, 0.0) for standing in (law.FIRST, law.INTERACTIVE)] == [
        INF,
        0.0,
    ]
    s.in_flight = 6
    assert law.admit_at(p, s, of_tokens(1.0), law.FIRST, 0.0) == 0.0
    p.max_concurrency, s.in_flight = 1, 0
    assert law.admit_at(p, s, of_tokens(1.0), law.FIRST, 0.0) == 0.0


def test_a_request_of_the_batch_that_needs_the_share_itself_waits_for_an_empty_window() -> None:
    p = free(tpm=1_000, headroom=0.0, window=law.BUCKET, interactive_ratio=0.5)
    s = law.State()
    assert law.admit_at(p, s, of_tokens(900.0), law.FIRST, 0.0) == 0.0
    law.launched(p, s, of_tokens(100.0), law.INTERACTIVE, 0.0, 0.5)
    assert law.admit_at(p, s, of_tokens(900.0), law.FIRST, 0.0) == pytest.approx(6.0)
    assert law.admit_at(p, s, of_tokens(900.0), law.INTERACTIVE, 0.0) == 0.0


def test_interactive_requests_go_first_and_take_no_launch_slot() -> None:
    p = params(interactive_ratio=0.2)
    s = law.State()
    law.launched(p, s, of_tokens(100.0), law.FIRST, 0.0, 0.5)
    slot = s.next_slot_at
    assert law.admit_at(p, s, of_tokens(100.0), law.INTERACTIVE, 1.0) == 1.0
    law.launched(p, s, of_tokens(100.0), law.INTERACTIVE, 1.0, 0.5)
    assert s.next_slot_at == slot
    standings = {"first": law.FIRST, "retry": law.RETRY, "holding": law.HOLDING, "interactive": law.INTERACTIVE}
    order = sorted(standings, key=lambda name: law.rank(p, law.MAIN, 1, 1.0, 1.0, 1.0, standings[name]))
    assert order == ["holding", "interactive", "retry", "first"]

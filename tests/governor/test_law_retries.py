"""The law as timetables: what follows a 429 or a failure. Backoff, Retry-After, permits kept or given back, holds."""

from __future__ import annotations

from itertools import pairwise

import pytest

from governor import law
from governor.law import BUCKET, FIXED, FIXED_S, SLIDING, SLIDING_S
from governor.model.needs import of_tokens
from tests.governor import laws
from tests.governor.laws import INF, WINDOWS, Pool, Reply, after, by_attempt, free, params

# ---------------------------------------------------------------- retries


def test_backoff_starts_2_4_8_16_s_after_each_429_and_then_it_is_exhausted() -> None:
    pool = Pool(params(), [7_000.0], after(0.5, kind=laws.THROTTLED)).run()
    # The fixed window has room for three per minute; the fourth attempt waits for the next, the fifth 16 s.
    assert pool.times() == pytest.approx([0.0, 2.5, 7.0, FIXED_S, FIXED_S + 16.5])
    assert pool.ends == [(pytest.approx(FIXED_S + 17.0), 0, laws.EXHAUSTED)]
    assert pool.s.in_flight == 0


def test_backoff_waits_alone() -> None:
    """Where no budget is in the way: 2, 4, 8 s after the 429 was received, to the instant, and then the minute's end.

    With a deadline, or a longer backoff than what is left of the minute, the last wait is the backoff.
    """
    for changes, last in (({}, FIXED_S - 16.0), ({"deadline_s": 100.0}, 16.0), ({"backoff_base_s": 6.0}, 48.0)):
        pool = Pool(free(**changes), [7_000.0], after(0.5, kind=laws.THROTTLED)).run()
        received = [at + 0.5 for at in pool.times()]
        waits = [later - sooner for sooner, later in zip(received, pool.times()[1:], strict=False)]
        base = changes.get("backoff_base_s", 2.0)
        assert waits == pytest.approx([base, 2 * base, 4 * base, last])


def test_the_32_s_wait_is_reached_from_six_attempts_on_and_the_cap_from_seven() -> None:
    p = free(max_attempts=8)
    assert [law.backoff_s(p, attempt) for attempt in (*range(1, 8), 10**6)] == [2, 4, 8, 16, 32, 60, 60, 60]
    pool = Pool(p, [1.0], after(0.0, kind=laws.FAILED)).run()
    assert [later - sooner for sooner, later in pairwise(pool.times())] == [2, 4, 8, 16, 32, 60, 60]


def test_retry_jitter_only_adds_and_at_most_a_fifth_up_to_three_seconds() -> None:
    waits = {}
    for attempt in (1, 4, 5):
        p, s = free(max_attempts=9), law.State(in_flight=1)
        waits[attempt] = law.throttled(p, s, of_tokens(1.0), attempt, -1.0, 0.0, 0.0, 100.0, 1.0) - 100.0
    assert waits == pytest.approx({1: 2.4, 4: 19.0, 5: 35.0})


def test_a_stated_retry_after_wins_over_the_backoff() -> None:
    pool = Pool(free(), [1.0], by_attempt(Reply(1.0, laws.THROTTLED, retry_after_s=0.644), Reply(1.0))).run()
    # And two milliseconds on top: the provider floors what it prints.
    assert pool.times() == pytest.approx([0.0, 1.646], abs=1e-12)
    longer = by_attempt(Reply(1.0, laws.FAILED, retry_after_s=20.0), Reply(1.0))
    assert Pool(free(), [1.0], longer).run().times() == pytest.approx([0.0, 21.002], abs=1e-12)


@pytest.mark.parametrize(("stated", "waits"), [(0.5, [0.5, 1, 2, 4]), (3.0, [3, 4, 8, 16]), (60.0, [60] * 4)])
def test_a_stated_wait_that_proves_too_short_doubles_up_to_the_backoff(stated: float, waits: list[float]) -> None:
    pool = Pool(free(), [1.0], after(0.0, kind=laws.THROTTLED, retry_after_s=stated)).run()
    assert [later - sooner for sooner, later in pairwise(pool.times())] == pytest.approx(
        [wait + 0.002 for wait in waits]
    )


@pytest.mark.parametrize("stated", [-1.0, 0.0])
def test_no_retry_after_or_zero_means_our_own_backoff(stated: float) -> None:
    pool = Pool(free(), [1.0], by_attempt(Reply(1.0, laws.THROTTLED, retry_after_s=stated), Reply(1.0))).run()
    assert pool.times() == [0.0, 3.0]


@pytest.mark.parametrize(("keeps", "standing"), [(1, law.HOLDING), (0, law.RETRY)])
def test_a_retry_takes_no_slot_and_moves_none(keeps: int, standing: int) -> None:
    """The first of three fails at 1 s and is retried at 3 s, between the slots at 0 and 15 s, which stay."""
    p = params(backoff_keeps_permit=keeps)
    replies = {0: by_attempt(Reply(1.0, laws.FAILED), Reply(1.0))}
    pool = Pool(p, [100.0] * 3, lambda job, now: replies.get(job.index, after(1.0))(job, now)).run()
    assert [(launch.at, launch.index, launch.standing) for launch in pool.launches] == [
        (0.0, 0, law.FIRST),
        (3.0, 0, standing),
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
        law.launched(p, s, of_tokens(1.0), law.FIRST, at, 0.5)
    law.finalize_opened(p, s)
    assert law.failed(p, s, 0, 1, 0, 0, -1.0, 0.0, 0.0, 2.0, 0.0)[0] == 4.0
    assert s.in_flight == 2
    assert law.admission(p, s, of_tokens(1.0), law.HOLDING, 4.0) == (4.0, law.NOTHING)
    assert law.admission(p, s, of_tokens(1.0), law.RETRY, 4.0) == (INF, law.CONCURRENCY)
    law.launched(p, s, of_tokens(1.0), law.HOLDING, 4.0, 0.5)
    assert s.in_flight == 2


def test_the_last_attempt_and_the_deadline_give_the_permit_back() -> None:
    for attempt, deadline_s, first in ((5, 0.0, 0.0), (1, 10.0, 0.0), (1, 12.0, 0.0)):
        p, s = free(deadline_s=deadline_s), law.State(in_flight=2)
        assert law.failed(p, s, 0, attempt, 0, 0, -1.0, first, first, 10.0, 0.0)[0] == INF
        assert s.in_flight == 1
    # One moment more, and the retry at 12 s still counts.
    p, s = free(deadline_s=12.1), law.State(in_flight=2)
    assert law.failed(p, s, 0, 1, 0, 0, -1.0, 0.0, 0.0, 10.0, 0.0)[0] == 12.0
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
    # Refused at 6 s; retried first at 26.002 s, and alone as long as a refusal takes. The slot of 10 s has long come.
    assert launches == [(0, 0), (5, 1), (26.002, 1), (27.002, 2), (32.002, 3), (37.002, 4)]
    assert pool.deferrals[law.HOLD] == 1


def test_a_hold_never_shrinks_and_its_jitter_does_not_let_new_work_overtake() -> None:
    p, s = free(hold_on_throttle=1), law.State(in_flight=3)
    first = law.throttled(p, s, of_tokens(1.0), 1, 30.0, 0.0, 0.0, 1.0, 1.0)
    assert first == pytest.approx(1.0 + 30.002 + 3.0)
    assert s.hold_until == first
    assert law.throttled(p, s, of_tokens(1.0), 1, 2.0, 0.0, 0.0, 2.0, 0.0) == pytest.approx(4.002)
    assert s.hold_until == first
    assert law.admission(p, s, of_tokens(1.0), law.HOLDING, 4.002) == (first, law.HOLD)


def test_failures_hold_nobody() -> None:
    p, s = free(hold_on_throttle=1), law.State(in_flight=1)
    law.failed(p, s, 0, 1, 0, 0, 30.0, 0.0, 0.0, 1.0, 0.0)
    assert s.hold_until == -INF


def test_an_exhausted_request_still_holds_but_no_longer_than_anybody_would_wait() -> None:
    p, s = free(hold_on_throttle=1, deadline_s=600.0), law.State(in_flight=1)
    assert law.throttled(p, s, of_tokens(1.0), 1, 411_480.0, 0.0, 0.0, 10.0, 0.0) == INF
    assert s.hold_until == 610.0
    p, s = free(hold_on_throttle=1), law.State(in_flight=1)
    assert law.throttled(p, s, of_tokens(1.0), 5, 7.0, 0.0, 0.0, 10.0, 0.0) == INF
    assert s.hold_until == pytest.approx(42.002)


@pytest.mark.parametrize("window", WINDOWS)
def test_after_a_hold_the_budgets_still_bind(window: int) -> None:
    p = free(tpm=1_000, headroom=0.0, window=window, hold_on_throttle=1)
    s = law.State()
    law.launched(p, s, of_tokens(1_000.0), law.FIRST, 0.0, 0.5)
    law.throttled(p, s, of_tokens(1_000.0), 1, 10.0, 0.0, 0.0, 0.1, 0.0)
    at, cause = laws.promised(p, s, 1_000.0, law.HOLDING, 0.1)
    assert (at, cause) == (pytest.approx({FIXED: FIXED_S, SLIDING: SLIDING_S, BUCKET: 60.0}[window]), law.BY_TPM)
    law.throttled(p, s, of_tokens(1_000.0), 1, 90.0, 0.0, 0.0, 0.1, 0.0)
    assert laws.promised(p, s, 1_000.0, law.HOLDING, 0.1) == (s.hold_until, law.HOLD)


def test_a_wait_above_the_cap_ends_no_request_in_an_outage() -> None:
    """A page of maintenance with `Retry-After: 3600`: the requests wait by our own backoff, and for the provider."""
    s, p = law.State(), params(retry_after_cap_s=600.0)
    assert law.failed(p, s, 0, 1, 0, 0, 3_600.0, 0.0, 0.0, 10.0, 0.0)[0] == 10.0 + law.backoff_s(p, 1)
    assert law.failed(p, s, 0, p.max_attempts, 0, 0, 3_600.0, 0.0, 0.0, 10.0, 0.0)[0] == INF
    # A 4xx is an answer of a provider that is there.
    assert law.failed(p, s, 1, 1, 0, 1, 3_600.0, 0.0, 0.0, 10.0, 0.0)[0] == INF

"""The law's books: what an answer corrects in them, what the provider's own count does, and new settings in mid-run."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest

from governor import law
from governor.law import BUCKET, FIXED, FIXED_S, RPD, RPM, SLIDING, SLIDING_S, TPD, TPM
from governor.model.needs import of_tokens
from tests.governor import laws
from tests.governor.laws import INF, WINDOWS, Job, Launch, Pool, Reply, after, by_attempt, free, params

# ---------------------------------------------------------------- settling and refunds


@pytest.mark.parametrize("window", WINDOWS)
def test_settling_books_real_use_where_the_reservation_stood(window: int) -> None:
    p, s = free(tpm=1_000, tpd=50_000, headroom=0.0, window=window, settles=1), law.State()
    law.launched(p, s, of_tokens(800.0), law.FIRST, 5.0, 0.5)
    assert law.admission(p, s, of_tokens(400.0), law.FIRST, 6.0)[1] == law.BY_TPM
    law.settled(p, s, of_tokens(800.0), of_tokens(500.0), 5.0, 6.0)
    drained = 100 / 6 if window == BUCKET else 0.0
    assert law.used_in(p, s, TPM, 6.0) == pytest.approx(500.0 - drained)
    assert law.used_in(p, s, TPD, 6.0) == pytest.approx(500.0 - 50_000 / 86_400)
    assert law.admission(p, s, of_tokens(500.0), law.FIRST, 6.0) == (6.0, law.NOTHING)
    # More than reserved counts as well.
    law.launched(p, s, of_tokens(100.0), law.FIRST, 6.0, 0.5)
    law.settled(p, s, of_tokens(100.0), of_tokens(450.0), 6.0, 6.0)
    assert law.used_in(p, s, TPM, 6.0) == pytest.approx(950.0 - drained)


@pytest.mark.parametrize("window", [FIXED, SLIDING])
def test_a_settlement_that_comes_after_its_window_changes_nothing(window: int) -> None:
    p, s = free(tpm=1_000, headroom=0.0, window=window, settles=1), law.State()
    law.launched(p, s, of_tokens(800.0), law.FIRST, 0.0, 0.5)
    law.launched(p, s, of_tokens(900.0), law.FIRST, SLIDING_S, 0.5)
    law.settled(p, s, of_tokens(800.0), of_tokens(100.0), 0.0, SLIDING_S)
    assert law.used_in(p, s, TPM, SLIDING_S) == 900.0


def test_without_settling_the_reservation_stays() -> None:
    p, s = free(tpm=1_000, headroom=0.0), law.State()
    law.launched(p, s, of_tokens(800.0), law.FIRST, 0.0, 0.5)
    law.settled(p, s, of_tokens(800.0), of_tokens(1.0), 0.0, 1.0)
    assert law.used_in(p, s, TPM, 1.0) == 800.0


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("refunds", "left"), [(0, 900.0), (1, 0.0)])
def test_a_429_stays_booked_unless_the_policy_refunds(window: int, refunds: int, left: float) -> None:
    p, s = free(tpm=1_000, rpm=10, headroom=0.0, window=window, refunds=refunds), law.State()
    law.launched(p, s, of_tokens(900.0), law.FIRST, 0.0, 0.5)
    law.throttled(p, s, of_tokens(900.0), 1, -1.0, 0.0, 0.0, 0.0, 0.0)
    assert law.used_in(p, s, TPM, 0.0) == pytest.approx(left)
    # The request itself was made: it counts in any case. And a 5xx was charged: no refund.
    assert law.used_in(p, s, RPM, 0.0) == pytest.approx(1.0)
    law.launched(p, s, of_tokens(100.0), law.RETRY, 0.0, 0.5)
    law.failed(p, s, 0, 1, 0, 0, -1.0, 0.0, 0.0, 0.0, 0.0)
    assert law.used_in(p, s, TPM, 0.0) == pytest.approx(left + 100.0)


# ---------------------------------------------------------------- the provider's count


def says(
    p: law.Params, s: law.State, remaining: float, now: float, d: int = TPM, limit: float = 30_000.0, **changes: Any
) -> None:
    """An answer whose request booked `amount`, and nothing since, states a count."""
    given: dict[str, Any] = {"amount": 0.0, "is_refused": 0, "launched_at": now} | changes
    since = given.pop("booked_since", given["amount"])
    law.synced(p, s, d, limit, remaining, given["amount"], given["is_refused"], since, given["launched_at"], now)


def heard(p: law.Params, limit: float, remaining: float, now: float = 0.0) -> law.State:
    """A pool that has launched nothing and just heard this about its tokens per minute, twice."""
    s = law.State()
    for _ in range(2):
        says(p, s, remaining, now, limit=limit)
    return s


def synced_policy(**changes: Any) -> law.Params:
    return free(**({"tpm": 30_000, "headroom": 0.0, "window": BUCKET, "sync_headers": 1} | changes))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_count_with_less_room_tightens_every_kind_of_window(window: int) -> None:
    """Somebody else used 20,000, in a bucket that refills 500 per second."""
    p = synced_policy(window=window)
    s = heard(p, 30_000.0, 10_000.0)
    assert law.admission(p, s, of_tokens(10_000.0), law.FIRST, 0.0) == (0.0, law.NOTHING)
    assert law.admission(p, s, of_tokens(10_500.0), law.FIRST, 0.0) == (pytest.approx(1.0), law.BY_TPM)


def test_a_count_with_more_room_loosens_the_bucket_and_no_other_window() -> None:
    for window, left in ((BUCKET, 10_000.0), (FIXED, 25_000.0), (SLIDING, 25_000.0)):
        p, s = synced_policy(window=window), law.State()
        law.launched(p, s, of_tokens(25_000.0), law.FIRST, 0.0, 0.5)
        # We reserved 25,000, the provider charged 10,000.
        for _ in range(2):
            says(p, s, 20_000.0, 0.0, amount=25_000.0)
        assert law.used_in(p, s, TPM, 0.0) == pytest.approx(left)


def test_one_count_is_not_believed_against_all_others() -> None:
    """A limit of one token, a day without a rest, an empty minute: each stated once, in between counts that agree."""
    p, s = synced_policy(), law.State()
    law.launched(p, s, of_tokens(1_000.0), law.FIRST, 0.0, 0.5)
    for d, limit, remaining in ((TPM, 1.0, 0.0), (RPD, 500.0, 0.0), (TPM, 30_000.0, 0.0)):
        says(p, s, 29_000.0, 0.0, amount=1_000.0)
        says(p, s, remaining, 0.0, d, limit, amount=1_000.0)
        assert law.admission(p, s, of_tokens(29_000.0), law.FIRST, 0.0) == (0.0, law.NOTHING)


@pytest.mark.parametrize("dated", ["launch", "answer"])
def test_a_count_may_be_of_the_launch_or_of_the_answer(dated: str) -> None:
    """5 s pass from launch to answer, in which 2,500 refill and 4,000 are booked: nobody else is there, either way."""
    p, s = synced_policy(), law.State()
    law.launched(p, s, of_tokens(20_000.0), law.FIRST, 0.0, 0.5)
    for launched_at in (0.0, 1.0):
        before = s.booked_before[TPM] if launched_at == 0.0 else s.booked[TPM]
        law.launched(p, s, of_tokens(1_000.0), law.FIRST, launched_at, 0.5)
        law.launched(p, s, of_tokens(4_000.0), law.FIRST, launched_at + 2.0, 0.5)
        image = law.used_in(p, s, TPM, launched_at + 5.0)
        used = image - 4_000.0 + 2_500.0 if dated == "launch" else image
        since = s.booked[TPM] - before - (20_000.0 if launched_at == 0.0 else 0.0)
        at, now = {"launched_at": launched_at, "booked_since": since}, launched_at + 5.0
        says(p, s, 30_000.0 - used, now, amount=1_000.0, **at)
        assert law.used_in(p, s, TPM, now) == pytest.approx(image)


@pytest.mark.parametrize(
    ("limit", "remaining"),
    [
        (0.0, 0.0),
        (-1.0, -1.0),
        (30_000.0, -30_001.0),
        (30_000.0, 30_001.0),
        (math.nan, 5.0),
        (30_000.0, math.nan),
        (INF, 5.0),
        (INF, INF),
    ],
)
def test_implausible_counts_change_nothing(limit: float, remaining: float) -> None:
    p, s = synced_policy(), law.State()
    law.launched(p, s, of_tokens(5_000.0), law.FIRST, 0.0, 0.5)
    before = copy.deepcopy(s)
    for now in (0.0, 1.0):
        says(p, s, remaining, now, limit=limit, amount=5_000.0)
    assert s == before


def test_less_than_nothing_is_more_than_the_limit_in_use() -> None:
    """Azure states -5,000 of 30,000: 10 s until the bucket is no more than full, 2 s more for a thousand."""
    p, s = synced_policy(), heard(synced_policy(), 30_000.0, -5_000.0)
    assert law.admission(p, s, of_tokens(1_000.0), law.FIRST, 0.0) == (pytest.approx(12.0), law.BY_TPM)


def test_none_left_says_at_least_so_much_and_never_lowers_what_is_used() -> None:
    """The limit was halved with 29,000 in use: counts of 0 of 15,000 do not say that 14,000 of those are gone."""
    p, s = synced_policy(), law.State()
    law.launched(p, s, of_tokens(29_000.0), law.FIRST, 0.0, 0.5)
    for _ in range(3):
        says(p, s, 0.0, 0.0, limit=15_000.0, amount=29_000.0)
    assert law.admission(p, s, of_tokens(1_000.0), law.FIRST, 0.0)[0] == pytest.approx(15_000 / 250)


def test_stale_and_out_of_order_counts_change_nothing() -> None:
    p, s = synced_policy(), law.State()
    says(p, s, 20_000.0, 101.0, launched_at=100.0)
    before = copy.deepcopy(s)
    says(p, s, 100.0, 102.0, launched_at=99.9)  # older than the last one
    says(p, s, 100.0, 161.5, launched_at=101.0)  # older than the window
    assert s == before
    says(p, s, 100.0, 102.0, launched_at=101.0)
    assert s != before


def test_counts_are_ignored_where_the_policy_does_not_sync() -> None:
    p = synced_policy(sync_headers=0)
    s = heard(p, 10_000.0, 0.0)
    assert s == law.State()


@dataclass
class Bucket:
    """A provider's bucket of 30,000 per minute, kept here as a level."""

    used: float = 0.0
    at: float = 0.0

    def came(self, charge: float, now: float) -> float:
        """Lets a request in, or nobody (0); returns what is left after it."""
        self.used = max(0.0, self.used - 500.0 * (now - self.at)) + charge
        self.at = now
        assert self.used <= 30_000.0 + 1e-6
        return 30_000.0 - self.used


@pytest.mark.parametrize("dated", ["admission", "answer"])
@pytest.mark.parametrize("rounded_to", [1, 1_000])
def test_a_burst_that_arrives_in_another_order_misleads_nobody(dated: str, rounded_to: int, seed: int) -> None:
    """Requests launched at one instant are let in, and answered, in any order, some time later, and counts are rounded.

    Our image holds what the bucket does, but for the rounding and for what refills on the way there and to the answers.
    """
    r = random.Random(seed)
    for _ in range(100):
        p, s, bucket = synced_policy(), law.State(), Bucket()
        for burst in range(3):
            now = 20.0 * burst
            sizes = [r.uniform(50.0, 1_500.0) for _ in range(r.randint(1, 8))]
            before = []
            for size in sizes:
                law.launched(p, s, of_tokens(size), law.FIRST, now, 0.5)
                before.append(s.booked_before[TPM])
            came = sorted(now + r.uniform(0.0, 0.4) for _ in sizes)
            order = r.sample(range(len(sizes)), len(sizes))
            left = {i: bucket.came(sizes[i], at) for i, at in zip(order, came, strict=True)}
            end = now + 1.0
            for i in r.sample(range(len(sizes)), len(sizes)):
                end += 0.1
                remaining = left[i] if dated == "admission" else bucket.came(0.0, end)
                stated = min(30_000.0, rounded_to * math.floor(remaining / rounded_to + 0.5))
                since = s.booked[TPM] - before[i]
                law.synced(p, s, TPM, 30_000.0, stated, sizes[i], 0, since, now, end)
            used = 30_000.0 - bucket.came(0.0, end)
            assert used - 200.0 - rounded_to / 2 <= law.used_in(p, s, TPM, end) <= used + 900.0 + rounded_to / 2


def test_what_others_use_is_kept_free_once_a_refusal_has_met_it() -> None:
    """Others took 6,000. As long as nothing is refused, no room is lost to them; after a refusal as much is."""
    p = synced_policy()
    for is_refused, room in ((False, 24_000.0), (True, 18_000.0)):
        s = heard(p, 30_000.0, 24_000.0)
        if is_refused:
            law.launched(p, s, of_tokens(24_000.0), law.FIRST, 0.0, 0.5)
            says(p, s, 23_999.0, 0.0, amount=24_000.0, is_refused=1)
            law.throttled(p, s, of_tokens(24_000.0), 1, -1.0, 0.0, 0.0, 0.0, 0.0)
            assert s.surprise[TPM] == pytest.approx(6_001.0)
            s.full_at[TPM] = -INF
        assert law.admission(p, s, of_tokens(room - 10.0), law.FIRST, 0.0) == (0.0, law.NOTHING)
        assert law.admission(p, s, of_tokens(room + 10.0), law.FIRST, 0.0)[1] == law.BY_TPM


@pytest.mark.parametrize(("left", "is_even"), [(2_000.0, True), (900.0, False)])
def test_a_refusal_in_spite_of_a_count_with_room_makes_launches_even(left: float, is_even: bool) -> None:
    """A limit that headers do not show, such as a share of the minute per second: 1,000 tokens take two seconds."""
    p, s = synced_policy(), law.State()
    law.launched(p, s, of_tokens(1_000.0), law.FIRST, 0.0, 0.5)
    says(p, s, left, 0.05, amount=1_000.0, is_refused=1, launched_at=0.0)
    law.throttled(p, s, of_tokens(1_000.0), 1, -1.0, 0.0, 0.0, 0.05, 0.0)
    assert (s.paced_until > 0.05) == is_even
    law.launched(p, s, of_tokens(1_000.0), law.RETRY, 100.0, 0.5)
    at = law.admission(p, s, of_tokens(1_000.0), law.FIRST, 100.0)[0]
    assert at == pytest.approx(102.0 if is_even else 100.0)


def test_a_stated_wait_goes_before_a_count() -> None:
    """Case a14: a 429 with nothing left and Retry-After 1.5 s. The request goes after 1.5 s, and not after 60."""
    p, s = synced_policy(hold_on_throttle=1, max_concurrency=5), law.State()
    law.launched(p, s, of_tokens(1_000.0), law.FIRST, 0.0, 0.5)
    says(p, s, 0.0, 0.1, amount=1_000.0, is_refused=1, launched_at=0.0)
    at = law.throttled(p, s, of_tokens(1_000.0), 1, 1.5, 0.0, 0.0, 0.1, 0.0)
    assert at == pytest.approx(1.602)
    assert law.admission(p, s, of_tokens(1_000.0), law.RETRY, at) == (at, law.NOTHING)


def test_half_of_the_bucket_is_kept_until_an_answer_comes_with_or_without_a_count() -> None:
    p, s = synced_policy(), law.State()
    law.launched(p, s, of_tokens(15_000.0), law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, of_tokens(1_000.0), law.FIRST, 0.0)[1] == law.BY_TPM
    law.settled(p, s, of_tokens(15_000.0), of_tokens(15_000.0), 0.0, 0.0)
    assert law.admission(p, s, of_tokens(15_000.0), law.FIRST, 0.0) == (0.0, law.NOTHING)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_granted_limit_below_ours_scales_the_budget(window: int) -> None:
    """We believe in 30,000 with 15 % headroom, the provider grants 10,000: 8,500 are ours, and 9,000 runs alone."""
    p = synced_policy(headroom=0.15, window=window)
    s = heard(p, 10_000.0, 10_000.0)
    assert s.scale[TPM] == pytest.approx(1 / 3)
    law.launched(p, s, of_tokens(5_000.0), law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, of_tokens(3_500.0), law.FIRST, 0.0) == (0.0, law.NOTHING)
    assert law.admission(p, s, of_tokens(3_501.0), law.FIRST, 0.0)[1] == law.BY_TPM
    assert law.admission(p, s, of_tokens(9_000.0), law.FIRST, 0.0)[1] == law.CONCURRENCY
    # The limit comes back: so does the budget.
    for _ in range(2):
        says(p, s, 25_000.0, 1.0)
    assert s.scale[TPM] == 1.0
    assert law.admission(p, s, of_tokens(15_000.0), law.FIRST, 1.0)[1] == law.NOTHING


def test_a_granted_limit_above_ours_leaves_our_budget_where_it_is() -> None:
    """Somebody has 90,000 and gives us 30,000: what others use of the rest is no concern of ours."""
    p = synced_policy()
    s = heard(p, 90_000.0, 90_000.0)
    law.launched(p, s, of_tokens(30_000.0), law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, of_tokens(500.0), law.FIRST, 0.0) == (pytest.approx(1.0), law.BY_TPM)


def test_a_limit_of_requests_that_only_the_headers_know_binds() -> None:
    """The policy names no limit of requests; the headers do: 3 per minute, 200 per day. Our one request is counted."""
    for d, limit, wait_s, cause in ((RPM, 3.0, 20.0, law.BY_RPM), (RPD, 200.0, 432.0, law.BY_DAY)):
        p, s = synced_policy(), law.State()
        law.launched(p, s, of_tokens(10.0), law.FIRST, 0.0, 0.5)
        for _ in range(3):  # the limit is believed when it is heard again, and the count by the one after that
            says(p, s, limit - 1.0, 0.0, d, limit, amount=1.0)
        for _ in range(int(limit) - 1):
            assert law.admission(p, s, of_tokens(10.0), law.FIRST, 0.0) == (0.0, law.NOTHING)
            law.launched(p, s, of_tokens(10.0), law.FIRST, 0.0, 0.5)
        assert law.admission(p, s, of_tokens(10.0), law.FIRST, 0.0) == (pytest.approx(wait_s), cause)


def test_no_part_of_a_day_is_kept_free_for_surprises() -> None:
    """Room that is kept costs a minute's bucket a delay of seconds, and a day's one of hours.

    Nor need a day's count ever be heard: the headers show requests of the tighter limit, and tokens per minute only.
    """
    p, s = synced_policy(tpd=86_400, rpd=200), law.State()
    for _ in range(200):
        assert law.admission(p, s, of_tokens(1.0), law.FIRST, 0.0) == (0.0, law.NOTHING)
        law.launched(p, s, of_tokens(1.0), law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, of_tokens(1.0), law.FIRST, 0.0) == (pytest.approx(432.0), law.BY_DAY)
    # An earlier run has used 140 of this day's 200: 60 are left, and all of them may go.
    p, s = synced_policy(rpd=200), law.State()
    law.launched(p, s, of_tokens(1.0), law.FIRST, 0.0, 0.5)
    for _ in range(2):
        says(p, s, 59.0, 0.0, RPD, 200.0, amount=1.0)
    for _ in range(59):
        assert law.admission(p, s, of_tokens(1.0), law.FIRST, 0.0) == (0.0, law.NOTHING)
        law.launched(p, s, of_tokens(1.0), law.FIRST, 0.0, 0.5)
    assert law.admission(p, s, of_tokens(1.0), law.FIRST, 0.0) == (pytest.approx(432.0), law.BY_DAY)


def test_even_pacing_ends_when_it_was_to_end() -> None:
    """Both times are absolute: the next launch waits for its turn, and no longer than until `paced_until`."""
    for pace_at, until, expected in ((50.0, 600.0, 50.0), (50.0, 30.0, 30.0), (50.0, -INF, 10.0)):
        p, s = synced_policy(), law.State(pace_at=pace_at, paced_until=until)
        assert laws.promised(p, s, 100.0, law.FIRST, 10.0)[0] == expected


# ---------------------------------------------------------------- changed settings


def repriced(old: law.Params, new: law.Params, used: float, now: float) -> law.State:
    """A pool that launched `used` tokens at 0 s under the old settings, and gets the new ones now."""
    s = law.State()
    law.launched(old, s, of_tokens(used), law.FIRST, 0.0, 0.5)
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
        assert at == (FIXED_S if before == FIXED else SLIDING_S)
    elif after_ != BUCKET:
        assert at == 12.0 + (FIXED_S if after_ == FIXED else SLIDING_S)
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
    law.launched(params(), s, of_tokens(1.0), law.FIRST, 100.0, 1.0)
    law.repriced(params(), params(stagger_s=30.0), s, 101.0)
    assert s.next_slot_at == 100.0 + 2 * 18.0


def test_permits_holds_passes_and_pauses_survive_new_settings() -> None:
    s = law.State(in_flight=2, finalize_open=1, paused=1, hold_until=99.0, alone=1)
    held = {"hold_on_throttle": 1}
    law.repriced(params(**held), params(tpm=10_000, window=BUCKET, max_concurrency=1, **held), s, 5.0)
    assert (s.in_flight, s.finalize_open, s.paused, s.hold_until, s.alone) == (2, 1, 1, 99.0, 1)


def test_a_hold_ends_with_a_new_deadline_and_at_once_where_nobody_is_held() -> None:
    held, hours = params(hold_on_throttle=1), 411_480.0
    for new, until in (
        (params(hold_on_throttle=1, deadline_s=600.0), 605.0),
        (params(hold_on_throttle=1, deadline_s=1e6), hours),
        (params(), -math.inf),
    ):
        s = law.State(hold_until=hours)
        law.repriced(held, new, s, 5.0)
        assert s.hold_until == until


def test_a_limit_that_is_lifted_or_set_in_mid_run() -> None:
    with_limit, without = params(stagger_s=0.0), params(tpm=0, stagger_s=0.0)
    s = repriced(with_limit, without, 25_000.0, 1.0)
    assert law.admission(without, s, of_tokens(1e9), law.RETRY, 1.0) == (1.0, law.NOTHING)
    s = repriced(without, with_limit, 25_000.0, 1.0)
    assert law.admission(with_limit, s, of_tokens(25_500.0), law.RETRY, 1.0) == (1.0, law.NOTHING)


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
    law.settled(new, s, of_tokens(7_000.0), of_tokens(2_000.0), 0.0, 30.0)
    s.hold_until = 70.0
    laws.promised(new, s, 5_000.0, law.FIRST, 30.0)


def test_a_state_begins_empty() -> None:
    s = law.State()
    for window in WINDOWS:
        p = params(rpm=3, tpd=1_000_000, rpd=50, window=window)
        assert [law.used_in(p, s, d, 0.0) for d in range(4)] == [0.0] * 4
        assert law.admission(p, s, of_tokens(25_500.0), law.FIRST, 0.0) == (0.0, law.NOTHING)
    assert Launch(0.0, 0, 1.0, 1, law.FIRST, 1) == Pool(params(), [1.0], after(1.0)).run().launches[0]
    assert Job(0, 1.0).standing == law.FIRST


def test_retries_with_and_without_a_place_do_not_wait_for_each_other() -> None:
    """One gave its permit back, then the setting changes, and the other keeps the only one there is."""
    gives, keeps = free(max_concurrency=1, backoff_keeps_permit=0), free(max_concurrency=1, backoff_keeps_permit=1)
    refused = Reply(5.0, laws.THROTTLED, retry_after_s=30.0)
    pool = Pool(gives, [1.0, 1.0], by_attempt(refused, Reply(1.0)))
    pool.at(6.0, lambda now: setattr(pool, "p", keeps))
    pool.run()
    # Refused at 5 and 10 s, due at 35 and 40 s: the first waits for the second's place.
    assert [(round(launch.at, 3), launch.index, launch.standing) for launch in pool.launches] == [
        (0.0, 0, law.FIRST),
        (5.0, 1, law.FIRST),
        (40.002, 1, law.HOLDING),
        (41.002, 0, law.RETRY),
    ]


@pytest.mark.parametrize("window", [FIXED, SLIDING])
def test_after_a_stated_wait_a_minute_that_no_count_speaks_of_opens_at_once(window: int) -> None:
    """All that has left our own window goes when the wait is over, and not as a bucket would refill."""
    p, s = free(tpm=30_000, headroom=0.0, window=window, sync_headers=1, hold_on_throttle=1), law.State()
    for _ in range(29):
        law.launched(p, s, of_tokens(1_000.0), law.FIRST, 0.0, 0.5)
        law.settled(p, s, of_tokens(1_000.0), of_tokens(1_000.0), 0.0, 0.5)
    law.launched(p, s, of_tokens(1_000.0), law.FIRST, 1.0, 0.5)
    at = law.throttled(p, s, of_tokens(1_000.0), 1, 61.0, 1.0, 1.0, 1.1, 0.0)
    now = law.admit_at(p, s, of_tokens(1_000.0), law.RETRY, at)
    assert now == at == pytest.approx(62.1, abs=0.01)
    launches = []
    for _ in range(30):
        now = law.admit_at(p, s, of_tokens(1_000.0), law.FIRST, now)
        law.launched(p, s, of_tokens(1_000.0), law.FIRST, now, 0.5)
        launches.append(now)
    # The first goes alone for as long as the refusal took; then at distances that halve.
    assert launches[-1] - at < 1.0


def test_a_refusal_that_a_smaller_limit_explains_is_believed() -> None:
    """Settings ten times too high: a stated wait of 21 s means 2,100 tokens at the real rate, not 21,000 at ours."""
    p, s = free(tpm=60_000, headroom=0.0, sync_headers=1), law.State()
    need = of_tokens(4_000.0)
    for _ in range(2):
        law.launched(p, s, need, law.FIRST, 0.0, 0.5)
    law.synced(p, s, TPM, 6_000.0, 1_900.0, 4_000.0, 1, 0.0, 0.0, 0.05)
    law.throttled(p, s, need, 1, 21.0, 0.0, 0.0, 0.05, 0.5)
    assert s.granted[TPM] == 6_000.0
    at, _ = law.admission(p, s, need, law.RETRY, 0.05)
    assert 20.0 < at < 70.0

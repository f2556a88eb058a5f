"""Promises of the law that hold under every policy and every history.

Hypothesis draws policies, requests, answers and interruptions; `laws.Pool` drives them and holds each single answer of
the law to its word (never in the past, the same until something changes, and "now" when its moment comes; no permit
leaks; nobody waits for ever). Budgets are then checked by brute force over what was launched, without the law.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from governor import law
from governor.law import BUCKET, FIXED, SLIDING, TPD, TPM
from tests.governor import laws
from tests.governor.laws import Booking, Job, Pool, Reply, params

EXAMPLES = 2 * settings().max_examples
LENGTH_S = (60.0, 60.0, 86_400.0, 86_400.0)
# Half seconds meet the borders of cells and minutes exactly; the others meet nothing.
MOMENTS = st.integers(0, 400).map(lambda n: n / 2.0) | st.floats(0.0, 200.0)


@st.composite
def policies(draw: st.DrawFn, **fixed: Any) -> law.Params:
    """Any policy within what `Policy` allows, at a scale at which its parts get in each other's way."""
    drawn: dict[str, Any] = {
        "window": draw(st.sampled_from([FIXED, SLIDING, BUCKET])),
        "max_concurrency": draw(st.integers(1, 6)),
        "stagger_s": draw(st.sampled_from([0.0, 0.25, 4.0, 15.0])),
        "jitter_ratio": draw(st.sampled_from([0.0, 0.2, 1.0])),
        "max_attempts": draw(st.integers(1, 6)),
        "backoff_base_s": draw(st.sampled_from([0.1, 2.0, 30.0])),
        "deadline_s": draw(st.sampled_from([0.0, 0.0, 45.0, 900.0])),
        "interactive_ratio": draw(st.sampled_from([0.0, 0.0, 0.2, 0.9])),
    }
    for flag in ("settles", "backoff_keeps_permit", "hold_on_throttle", "refunds", "sync_headers"):
        drawn[flag] = draw(st.integers(0, 1))
    return params(
        tpm=draw(st.integers(1, 3_000)),
        rpm=draw(st.just(0) | st.integers(1, 30)),
        tpd=draw(st.just(0) | st.integers(200, 20_000)),
        rpd=draw(st.just(0) | st.integers(2, 60)),
        headroom=draw(st.sampled_from([0.0, 0.01, 0.15, 0.5, 0.99])),
        **(drawn | fixed),
    )


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    kind = draw(st.sampled_from([laws.OK] * 4 + [laws.THROTTLED] * 3 + [laws.FAILED, laws.GONE]))
    return Reply(
        after_s=draw(MOMENTS),
        kind=kind,
        used=draw(st.floats(0.0, 1.0)),  # a share of what was reserved
        retry_after_s=draw(st.sampled_from([-1.0, -1.0, 0.05, 1.0, 20.0, 70.0])),
        u=draw(st.floats(0.0, 1.0)),
    )


def script(parts: list[Reply], scale: float = 1.0) -> Callable[[Job, float], Reply]:
    """Replies in turn; after the last one, everything is answered after a second."""
    left = list(parts)

    def reply(job: Job, now: float) -> Reply:
        part = left.pop(0) if left else Reply(after_s=1.0, used=1.0)
        used = math.floor(part.used * scale * job.reserve)
        return Reply(part.after_s, part.kind, used, part.retry_after_s, part.u)

    return reply


# ---------------------------------------------------------------- budgets, by brute force


def fixed_minutes_exceeded(bookings: list[Booking], budget: float, tokens: bool) -> list[str]:
    """Anchored minutes: one begins with the first launch after the last one expired."""
    held: dict[int, float] = {}
    begun, faults = -math.inf, []
    members: list[int] = []
    for booking in bookings:
        if tokens or booking.launches:
            held[booking.launch] = booking.tokens if tokens else 1.0
        if booking.launches:
            if booking.at >= begun + law.FIXED_S:
                begun, members = booking.at, []
            members.append(booking.launch)
            total = sum(held[member] for member in members)
            if total > budget:
                faults.append(f"{total} of {budget} in the minute from {begun} on, at {booking.at}")
    return faults


def any_minute_exceeded(bookings: list[Booking], budget: float, tokens: bool) -> list[str]:
    """Every closed interval of 60 s that ends with a launch: those hold the maximum. Rounding would widen it."""
    held: dict[int, float] = {}
    launched_at: dict[int, float] = {}
    faults = []
    for booking in bookings:
        if tokens or booking.launches:
            held[booking.launch] = booking.tokens if tokens else 1.0
        if booking.launches:
            launched_at[booking.launch] = booking.at
            total = sum(held[n] for n, at in launched_at.items() if Fraction(booking.at) - Fraction(at) <= 60)
            if total > budget:
                faults.append(f"{total} of {budget} in the 60 s up to {booking.at}")
    return faults


def bucket_exceeded(bookings: list[Booking], budget: float, rate_per_s: float, tokens: bool) -> list[str]:
    """Over any interval, from just before one launch to just after another: budget + rate x time.

    What is given back (settled, refunded) counts when it comes back, and fills the bucket no further than full.
    """
    held: dict[int, float] = {}
    level, at, faults = budget, 0.0, []
    for booking in bookings:
        level = min(budget, level + rate_per_s * (booking.at - at))
        at = booking.at
        if tokens or booking.launches:
            amount = booking.tokens if tokens else 1.0
            level = min(budget, level - amount + held.get(booking.launch, 0.0))
            held[booking.launch] = amount
        if booking.launches and level < -1e-6 * budget:
            faults.append(f"{-level} too much at {booking.at}")
    if all(booking.launches for booking in bookings):
        amounts = [(booking.at, booking.tokens if tokens else 1.0) for booking in bookings]
        for i, (start, _) in enumerate(amounts):
            total = 0.0
            for end, amount in amounts[i:]:
                total += amount
                if total > (budget + rate_per_s * (end - start)) * (1.0 + 1e-9) + 1e-6:
                    faults.append(f"{total} from {start} to {end}")
    return faults


def budgets_exceeded(p: law.Params, bookings: list[Booking]) -> list[str]:
    faults = []
    for d in range(4):
        tokens = d in (TPM, TPD)
        if p.limit[d] <= 0.0:
            continue
        if p.window[d] == BUCKET:
            faults += bucket_exceeded(bookings, p.budget[d], p.rate_per_s[d], tokens)
        elif p.window[d] == SLIDING:
            faults += any_minute_exceeded(bookings, p.budget[d], tokens)
        else:
            faults += fixed_minutes_exceeded(bookings, p.budget[d], tokens)
    return faults


@settings(max_examples=EXAMPLES)
@given(
    p=policies(sync_headers=0),
    shares=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=25),
    parts=st.lists(replies(), max_size=30),
    u=st.floats(0.0, 1.0),
)
def test_no_budget_is_ever_exceeded_in_the_sense_of_its_window(
    p: law.Params, shares: list[float], parts: list[Reply], u: float
) -> None:
    roof = min(p.budget[TPM], p.budget[TPD])
    pool = Pool(p, [math.floor(share * roof) for share in shares], script(parts), u).run()
    assert budgets_exceeded(p, pool.bookings) == []
    assert sorted(index for _, index, _ in pool.ends) == list(range(len(shares)))


def test_the_brute_force_sees_an_excess() -> None:
    """The checks above are worth what they find: 101 of 100 in each kind of window, and none where there is none."""
    near = [Booking(0.0, 0, 60.0, True), Booking(30.0, 1, 41.0, True)]
    astride = [Booking(0.0, 0, 60.0, True), Booking(59.0, 1, 40.0, True), Booking(law.FIXED_S, 2, 61.0, True)]
    assert fixed_minutes_exceeded(near, 100.0, True)
    assert any_minute_exceeded(near, 100.0, True)
    assert not fixed_minutes_exceeded(astride[:2], 100.0, True)
    assert not fixed_minutes_exceeded(astride, 100.0, True)
    assert any_minute_exceeded(astride, 100.0, True)
    assert not bucket_exceeded(near, 100.0, 1.0, True)
    assert bucket_exceeded(near, 100.0, 0.03, True)
    assert not bucket_exceeded(near, 101.0, 0.0, True)
    settled = [near[0], Booking(10.0, 0, 50.0, False), near[1]]
    assert not fixed_minutes_exceeded(settled, 100.0, True)
    assert not any_minute_exceeded(settled, 100.0, True)
    assert not bucket_exceeded(settled, 100.0, 0.0, True)
    assert [fault for d in (False,) for fault in any_minute_exceeded(near, 1.0, d)]


# ---------------------------------------------------------------- life goes on


def interruption(pool: Pool, kind: str, numbers: tuple[float, ...], other: law.Params) -> Callable[[float], None]:
    """Something that happens to a pool from outside, drawn from four numbers between 0 and 1."""
    a, b, c, d = numbers

    def synced(now: float) -> None:
        dimension = int(4 * a) % 4
        # From absurdly little to three times what the policy believes; now and then implausible.
        limit = max(pool.p.limit[dimension], 10.0) * (0.001 + 3.0 * b * b)
        remaining = limit * (1.2 * c - 0.05)
        as_of = now - 90.0 * d
        law.synced(pool.p, pool.s, dimension, limit, remaining, 50.0, int(d > 0.9), 300.0 * a, as_of, now)

    def repriced(now: float) -> None:
        law.repriced(pool.p, other, pool.s, now)
        pool.p = other

    def paused(now: float) -> None:
        law.paused(pool.p, pool.s)
        pool.at(now + 50.0 * a, lambda then: law.resumed(pool.p, pool.s))

    def finalized(now: float) -> None:
        law.finalize_opened(pool.p, pool.s)
        pool.at(now + 100.0 * b, lambda then: law.finalize_closed(pool.p, pool.s))

    return {"synced": synced, "repriced": repriced, "paused": paused, "finalized": finalized}[kind]


Interruptions = list[tuple[float, str, tuple[float, ...], law.Params]]


@settings(max_examples=EXAMPLES)
@given(
    p=policies(),
    reserves=st.lists(st.integers(1, 3_000), min_size=1, max_size=20),
    parts=st.lists(replies(), max_size=25),
    interruptions=st.lists(
        st.tuples(
            MOMENTS,
            st.sampled_from(["synced", "synced", "repriced", "paused", "finalized"]),
            st.tuples(*[st.floats(0.0, 1.0)] * 4),
            policies(),
        ),
        max_size=8,
    ),
    scale=st.sampled_from([1.0, 1.0, 2.5]),
    u=st.floats(0.0, 1.0),
)
def test_whatever_happens_every_request_ends_once_and_no_permit_is_left(
    p: law.Params, reserves: list[int], parts: list[Reply], interruptions: Interruptions, scale: float, u: float
) -> None:
    """Oversized requests, settings and limits that change, pauses, finalize passes, counts of any kind."""
    pool = Pool(p, [float(n) for n in reserves], script(parts, scale), u)
    for at, kind, numbers, other in interruptions:
        pool.at(at, interruption(pool, kind, numbers, other))
    pool.run()
    assert sorted(index for _, index, _ in pool.ends) == list(range(len(reserves)))
    assert (pool.s.in_flight, pool.s.alone, pool.s.finalize_open, pool.s.paused) == (0, 0, 0, 0)
    for launch in pool.launches:
        assert launch.attempt <= 6


@st.composite
def states(draw: st.DrawFn, p: law.Params, now: float) -> law.State:
    """Any state around `now`, reachable or not. Most moments are far in the past, or one would hide all the others."""
    moment = st.just(-math.inf) | st.just(-math.inf) | st.floats(-100.0, 100.0).map(lambda s: now + s)
    amount = st.just(0.0) | st.floats(0.0, 3_000.0)
    s = law.State()
    for name in ("next_slot_at", "hold_until", "pace_at", "paced_until"):
        setattr(s, name, draw(moment))
    for name in ("full_at", "window_at", "mirror_at", "synced_at"):
        setattr(s, name, draw(st.lists(moment, min_size=8, max_size=8)))
    for name in ("window_used", "surprise"):
        setattr(s, name, draw(st.lists(amount, min_size=8, max_size=8)))
    s.granted = draw(st.lists(amount, min_size=8, max_size=8))
    s.scale = [draw(st.just(1.0) | st.floats(1e-6, 1.0))] * 8
    s.in_flight = draw(st.integers(0, 8))
    s.finalize_open = draw(st.integers(0, 2))
    s.alone = draw(st.integers(0, 1)) if s.in_flight else 0
    s.paused = draw(st.integers(0, 9)) // 9
    cell = math.floor(now / law.cell_s(p, law.TPM)) - draw(st.integers(0, 130))
    for d in (law.TPM, law.RPM):
        s.cell_at[d] = float(max(0, cell))
        for back in range(0, law.CELLS, 7):
            tokens = draw(st.integers(0, 300))
            s.cells[d * law.CELLS + (int(s.cell_at[d]) - back) % law.CELLS] = float(tokens)
        s.window_used[d] = sum(s.cells[d * law.CELLS : (d + 1) * law.CELLS])
    return s


@settings(max_examples=EXAMPLES)
@given(
    data=st.data(),
    p=policies(),
    reserve=st.integers(0, 4_000),
    standing=st.sampled_from([law.FIRST, law.RETRY, law.HOLDING, law.INTERACTIVE]),
    now=MOMENTS | st.floats(0.0, 1e6),
)
def test_in_any_state_at_all_the_law_keeps_its_promises_and_changes_nothing(
    data: st.DataObject, p: law.Params, reserve: int, standing: int, now: float
) -> None:
    """Above all: only a pause or somebody in flight makes the head wait without end."""
    s = data.draw(states(p, now))
    before = copy.deepcopy(s)
    laws.promised(p, s, float(reserve), standing, now)
    assert s == before


# ---------------------------------------------------------------- the single formulas


@given(limit=st.integers(1, 10**9), percent=st.integers(0, 99))
def test_the_budget_is_the_whole_part_of_the_limit_less_headroom_and_at_least_one(limit: int, percent: int) -> None:
    assert law.budget_of(float(limit), percent / 100.0) == max(1, limit * (100 - percent) // 100)


@example(attempt=5, base=2.0, cap=60.0)
@given(attempt=st.integers(1, 100), base=st.floats(1e-3, 3_600.0), cap=st.floats(1e-3, 86_400.0))
def test_backoff_doubles_up_to_its_cap(attempt: int, base: float, cap: float) -> None:
    waits = [base]
    for _ in range(attempt - 1):
        waits.append(waits[-1] * 2.0)
    assert law.backoff_s(params(backoff_base_s=base, backoff_cap_s=cap), attempt) == min(waits[-1], cap)


@given(stagger=st.floats(0.0, 3_600.0), ratio=st.floats(0.0, 1.0), cap=st.floats(0.0, 3_600.0), u=st.floats(0.0, 1.0))
def test_the_gap_between_slots_stays_within_its_jitter(stagger: float, ratio: float, cap: float, u: float) -> None:
    p = params(stagger_s=stagger, jitter_ratio=ratio, jitter_cap_s=cap)
    jitter = min(stagger * ratio, cap)
    assert law.stagger_gap_s(p, 0.5) == stagger
    assert 0.0 <= stagger - jitter <= law.stagger_gap_s(p, 0.0)
    gap = law.stagger_gap_s(p, u)
    assert law.stagger_gap_s(p, 0.0) <= gap <= law.stagger_gap_s(p, 1.0) <= stagger + jitter


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 3), st.integers(-1, 5), st.integers(1, 5)), min_size=1, max_size=30
    ),
    longest_first=st.integers(0, 1),
)
def test_the_queue_is_a_total_order_retries_then_finalize_then_new(
    rows: list[tuple[int, int, int, int]], longest_first: int
) -> None:
    p = params(longest_first=longest_first)
    ordered = sorted(
        range(len(rows)), key=lambda n: law.rank(p, rows[n][0], rows[n][1], rows[n][2], rows[n][3], float(n))
    )

    def told(n: int) -> tuple[float, ...]:
        lane, attempt, expected, reserve = rows[n]
        if attempt > 1:
            return 0, n
        if lane == law.FINALIZE:
            return 1, n
        return (2, -expected, -reserve, n) if longest_first else (2, n)

    assert ordered == sorted(range(len(rows)), key=told)

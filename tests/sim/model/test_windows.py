"""The windows of the synthetic provider, each against an independent calculation over the whole history of attempts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from sim.model import provider as prov
from sim.model import windows as win
from sim.model.provider import RPM, TPM, ProviderParams, ProviderState
from tests.sim.doors import knock, quota

History = list[tuple[float, float]]
"""What was let in: (when, tokens)."""

LIMIT, REQUESTS = 6_000.0, 40.0


def in_clock_minute(history: History, now: float, phase_s: float) -> History:
    begins = (now + phase_s) // 60.0 * 60.0 - phase_s
    return [each for each in history if each[0] >= begins]


def in_last_minute(history: History, now: float) -> History:
    return [each for each in history if each[0] > now - 60.0]


def fits(seen: History, charge: float) -> bool:
    return sum(tokens for _, tokens in seen) + charge <= LIMIT and len(seen) + 1 <= REQUESTS


def attempts(rng: random.Random, count: int) -> History:
    """Whole milliseconds, so that sums are exact; bursts, pauses and steady traffic."""
    now, drawn = 0.0, []
    for _ in range(count):
        now += rng.choice([0, 0, 250, 1_500, rng.randrange(4_000), rng.randrange(90_000) if rng.random() < 0.1 else 8])
        drawn.append((now / 1_000.0, float(rng.randint(1, rng.choice([50, 900, 3_000])))))
    return drawn


@pytest.mark.parametrize("phase_s", [0.0, 8.0, 59.5])
def test_a_clock_counts_its_own_minutes(seed: int, phase_s: float) -> None:
    pp, ps = quota(LIMIT, REQUESTS, window=win.CLOCK, phase_s=phase_s), ProviderState()
    history: History = []
    for now, charge in attempts(random.Random(seed), 2_000):
        let_in = fits(in_clock_minute(history, now, phase_s), charge)
        outcome, _, wait_s = knock(pp, ps, charge, now)
        assert (outcome == prov.OK) == let_in, (seed, now)
        if let_in:
            history.append((now, charge))
        else:
            assert wait_s == pytest.approx(60.0 - (now + phase_s) % 60.0, abs=0.0011)
    assert 200 < len(history) < 1_800


def test_an_anchored_window_begins_with_the_first_attempt_after_the_last_one(seed: int) -> None:
    pp, ps = quota(LIMIT, REQUESTS, window=win.ANCHORED), ProviderState()
    history: History = []
    begins = -math.inf
    for now, charge in attempts(random.Random(seed), 2_000):
        if now >= begins + 60.0:
            begins, history = now, []
        let_in = fits(history, charge)
        outcome, _, wait_s = knock(pp, ps, charge, now)
        assert (outcome == prov.OK) == let_in, (seed, now)
        if let_in:
            history.append((now, charge))
        else:
            assert wait_s == pytest.approx(begins + 60.0 - now, abs=0.0011)


def test_a_sliding_log_is_exact(seed: int) -> None:
    pp, ps = quota(LIMIT, REQUESTS, window=win.SLIDING), ProviderState()
    history: History = []
    refused = 0
    for now, charge in attempts(random.Random(seed), 2_000):
        seen = in_last_minute(history, now)
        outcome, d, wait_s = knock(pp, ps, charge, now)
        assert (outcome == prov.OK) == fits(seen, charge), (seed, now)
        if outcome == prov.OK:
            history.append((now, charge))
            continue
        refused += 1
        # Nothing else coming in, it fits as soon as enough of the oldest ones have gone.
        at = next(at + 60.0 for at, _ in seen if fits([each for each in seen if each[0] > at], charge))
        assert now + wait_s == pytest.approx(at, abs=0.0011), (seed, now, d)
    assert refused > 200


def test_a_full_sliding_log_is_never_looser_and_hardly_tighter(seed: int) -> None:
    """More entries than it holds: dated later than they came, by less than a grain."""
    pp, ps = quota(rpm=4_000.0, window=win.SLIDING), ProviderState()
    rng = random.Random(seed)
    now, times = 0.0, []
    while now < 300.0:
        now += rng.expovariate(100.0)
        if knock(pp, ps, 0.0, now)[0] == prov.OK:
            times.append(now)
    for i in range(4_000, len(times)):
        assert times[i] >= times[i - 4_000] + 60.0
    assert len(times) >= 4_000 * (1.0 + 240.0 / (60.0 + 2.0 * 60.0 / (win.LOG // 2 - 2))) - 1


@pytest.mark.parametrize("burst_s", [1.0, 6.0, 30.0])
def test_a_bucket_with_a_small_burst_is_gcra(seed: int, burst_s: float) -> None:
    """The generic cell rate algorithm of the ATM Forum, by theoretical arrival times: 40 requests per minute."""
    pp, ps = quota(rpm=40.0, burst_ratio=burst_s / 60.0), ProviderState()
    cell_s = 60.0 / 40.0
    tolerance_s = max(1.0, 40.0 * burst_s / 60.0) * cell_s - cell_s
    rng, arrives_at, now, refused = random.Random(seed), 0.0, 0.0, 0
    for _ in range(3_000):
        now += rng.choice([0.0, rng.uniform(0.0, 2.0 * cell_s), rng.uniform(0.0, 5.0)])
        lead_s = arrives_at - now - tolerance_s
        if abs(lead_s) < 1e-5:
            continue  # within the rounding that is granted
        outcome, _, wait_s = knock(pp, ps, 0.0, now)
        assert (outcome == prov.OK) == (lead_s <= 0.0), (seed, now)
        if outcome == prov.OK:
            arrives_at = max(now, arrives_at) + cell_s
        else:
            refused += 1
            assert wait_s == pytest.approx(lead_s, abs=0.0011)
    assert refused > 100


@pytest.mark.parametrize("window", [win.BUCKET, win.CLOCK, win.ANCHORED, win.SLIDING])
def test_waiting_as_told_is_enough_and_a_millisecond_less_is_not(seed: int, window: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        pp = quota(LIMIT, REQUESTS, window=window, phase_s=rng.choice([0.0, 13.0]) if window == win.CLOCK else 0.0)
        ps, now = ProviderState(), rng.uniform(0.0, 200.0)
        charge = float(rng.randint(400, 3_000))
        while (answer := knock(pp, ps, charge, now))[0] == prov.OK:
            now += rng.expovariate(1.0)
        early, late = _copied(ps), _copied(ps)
        assert knock(pp, early, charge, now + answer[2] - 0.001)[0] == prov.THROTTLED
        assert knock(pp, late, charge, now + answer[2] + 0.001)[0] == prov.OK


def _copied(ps: ProviderState) -> ProviderState:
    other = ProviderState()
    for name in ProviderState.__slots__:
        value = getattr(ps, name)
        setattr(other, name, list(value) if isinstance(value, list) else value)
    return other


# ---------------------------------------------------------------- what is charged when


def test_what_is_charged_at_the_answer_overshoots_and_then_refuses() -> None:
    """A gate of level: whoever finds anything left is let in, whatever it will use."""
    pp = quota(
        1_000.0, 10.0, at_answer=[1.0, 0.0, 1.0, *[0.0] * 5], window=win.ANCHORED, failed_count=3, counts_negative=1
    )
    ps = ProviderState()
    for _ in range(3):
        assert knock(pp, ps, 5_000.0, 0.0)[0] == prov.OK
    assert ps.used[:2] == [0.0, 3.0]
    prov.settled(pp, ps, 0, 5_000.0, 999.0, 1.0)
    assert knock(pp, ps, 5_000.0, 1.0)[0] == prov.OK
    prov.settled(pp, ps, 0, 5_000.0, 700.0, 2.0)
    assert prov.remaining(pp, ps, TPM) == -699
    assert knock(pp, ps, 1.0, 2.0) == (prov.THROTTLED, TPM, 58.0)
    # No tokens of a refusal are known, its request is.
    assert ps.used[:2] == [1_699.0, 5.0]
    assert knock(pp, ps, 1.0, 60.0)[0] == prov.OK


@pytest.mark.parametrize(
    ("counts", "used"),
    [
        (0, [900.0, 1.0]),
        (prov.REFUSAL_TOKENS, [1_000.0, 1.0]),
        (prov.REFUSAL_REQUESTS, [900.0, 2.0]),
        (prov.REFUSAL_TOKENS | prov.REFUSAL_REQUESTS, [1_000.0, 2.0]),
    ],
)
@pytest.mark.parametrize("window", [win.BUCKET, win.SLIDING])
def test_a_refusal_counts_as_tokens_and_requests_apart(window: int, counts: int, used: list[float]) -> None:
    pp, ps = quota(1_000.0, 10.0, failed_count=counts, window=window), ProviderState()
    assert knock(pp, ps, 900.0, 0.0)[0] == prov.OK
    assert knock(pp, ps, 500.0, 0.0)[0] == prov.THROTTLED
    assert ps.used[:2] == used


def test_a_refund_of_a_sliding_log_leaves_the_newest_entries() -> None:
    pp, ps = quota(1_000.0, window=win.SLIDING, settles=1), ProviderState()
    for now in (0.0, 10.0, 20.0):
        assert knock(pp, ps, 300.0, now)[0] == prov.OK
    prov.settled(pp, ps, 0, 300.0, 40.0, 25.0)
    assert ps.used[TPM] == 640.0
    prov.settled(pp, ps, 0, 300.0, 200.0, 26.0)
    assert ps.used[TPM] == 540.0
    # Of 300 each at 0, 10 and 20 s, 300, 240 and 0 are left.
    for now, left in ((59.0, 540.0), (60.0, 240.0), (70.0, 0.0)):
        prov.advanced(pp, ps, 0, now)
        assert ps.used[TPM] == left


@pytest.mark.parametrize(
    ("habits", "wait_s"),
    [
        ({"retry_after": prov.SAYS_CONSTANT, "retry_after_s": 60.0}, 60.0),
        ({"retry_after": prov.SAYS_SECONDS, "retry_after_min_s": 1.0}, 1.0),
        ({"retry_after": prov.SAYS_MILLISECONDS, "retry_after_min_s": 1.0}, 1.0),
        ({"retry_after": prov.SAYS_MILLISECONDS}, 0.06),
        ({"retry_after": prov.SAYS_NOTHING, "retry_after_min_s": 1.0}, -1.0),
    ],
)
def test_what_a_refusal_states(habits: dict[str, float], wait_s: float) -> None:
    pp, ps = quota(1_000.0, **habits), ProviderState()
    ps.used[TPM] = 1_000.0
    assert knock(pp, ps, 1.0, 0.0) == (prov.THROTTLED, TPM, wait_s)


@pytest.mark.parametrize("window", [win.CLOCK, win.ANCHORED, win.SLIDING])
def test_others_use_the_same_window(window: int) -> None:
    pp, ps = quota(6_000.0, cotenant_share=0.5, window=window), ProviderState()
    prov.advanced(pp, ps, 0, 0.0)
    prov.advanced(pp, ps, 0, 59.5)
    assert ps.used[TPM] == pytest.approx(3_000.0)
    prov.advanced(pp, ps, 0, 60.5)
    assert ps.used[TPM] == pytest.approx(3_000.0 if window == win.SLIDING else 50.0)


# ---------------------------------------------------------------- the bound


@pytest.mark.parametrize(
    "make",
    [
        lambda: quota(LIMIT, REQUESTS, window=win.CLOCK, phase_s=45.0),
        lambda: quota(LIMIT, REQUESTS, window=win.ANCHORED),
        lambda: quota(LIMIT, REQUESTS, window=win.SLIDING),
        lambda: quota(LIMIT, REQUESTS, burst_ratio=0.2),
    ],
)
def test_greedy_launches_meet_the_bound_and_never_beat_it(make: Callable[[], ProviderParams], seed: int) -> None:
    from governor.forecast.summary import Grant, WorkDone, bound_s

    pp, ps, rng = make(), ProviderState(), random.Random(seed)
    grant = Grant(
        tpm_limit=LIMIT,
        rpm_limit=REQUESTS,
        minute_reset=pp.window[0] != win.BUCKET,
        phase_s=pp.phase_s[0],
        burst_ratio=pp.burst_ratio[0],
    )
    work, now = WorkDone(), 0.0
    for _ in range(400):
        charge = float(rng.choice([50, 100, 200]))
        while (answer := prov.admitted(pp, ps, 0, charge, now))[0] != prov.OK:
            now += answer[2] / 1_000.0 + 1e-9
        work.add(0.0, charge, charge, 1.0)
    bound = bound_s(grant, work)
    assert bound <= now + 1.0 + 1e-6
    assert now + 1.0 <= bound + 61.0
    assert ps.used[RPM] <= REQUESTS


def test_a_wait_for_the_oldest_entry_may_be_too_short() -> None:
    pp, ps = quota(1_000.0, window=win.SLIDING, retry_after=prov.SAYS_OLDEST), ProviderState()
    for now in (0.0, 10.0, 20.0):
        assert knock(pp, ps, 300.0, now)[0] == prov.OK
    # 600 need two of the three to expire, at 70 s; the first does so at 60 s.
    assert knock(pp, ps, 600.0, 30.0)[2] == 30.0
    assert knock(pp, ps, 600.0, 60.0)[2] == 10.0
    assert knock(pp, ps, 600.0, 70.0)[0] == prov.OK

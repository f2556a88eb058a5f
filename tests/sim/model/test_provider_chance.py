"""The synthetic provider over time and by chance: neighbours, leaps in time, latency and faults against theory."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import law
from governor.model.needs import of_tokens
from sim.model import provider as prov
from sim.model.latency import latency_s
from sim.model.provider import TPM, ProviderParams, ProviderState
from tests.governor import laws
from tests.sim.doors import changing, quota, taken

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
    window=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_one_leap_in_time_or_many_steps_come_to_the_same(
    steps: list[int], used: tuple[int, ...], share: float, period_s: float, window: int, seed: int
) -> None:
    """Changes of the limit, ticks and minutes happen at their own moments, not when somebody happens to knock."""
    pp = changing(quota(6_000, 60, 50_000, 1_000, slice_s=1.0), (33.5, 0.5), (47.0, 0.1), (200.0, 1.0))
    pp.cotenant_share, pp.cotenant_period_s, pp.cotenant_burst_s = share, period_s, 10.0
    pp.window[:2], pp.phase_s[:2] = [window, window], [12.0, 12.0]
    leap, walk = (ProviderState(used=[*map(float, used), *[0.0] * 4]) for _ in range(2))
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


@pytest.mark.parametrize("burst", [1.0, 0.1])
def test_a_policy_that_mirrors_the_bucket_without_headroom_is_never_refused(seed: int, burst: float) -> None:
    """The law's bucket and this one are the same arithmetic written differently: rounding alone must not throttle."""
    pp, ps = quota(tpm=30_000, rpm=500, burst_ratio=burst), ProviderState()
    p = laws.free(tpm=30_000, rpm=500, headroom=0.0, window=law.BUCKET, burst_ratio=burst, max_concurrency=10**9)
    s, now = law.State(), 0.0
    for request in range(3_000):
        charge = float(1 + int(prov.keyed_uniform(seed, request, 0, 1) * 2_000))
        now = law.admit_at(p, s, of_tokens(charge), law.FIRST, now)
        law.launched(p, s, of_tokens(charge), law.FIRST, now, 0.5)
        assert prov.admitted(pp, ps, 0, charge, now)[0] == prov.OK, request
    # It is not refused for want of asking: what has been used is all that was granted but for the last burst.
    assert ps.used[law.TPM] > 0.9 * burst * 30_000 - 2_000


# ---------------------------------------------------------------- latency and faults

KS_FACTOR = math.sqrt(-math.log(1e-7 / 2) / 2)  # Dvoretzky-Kiefer-Wolfowitz: exceeded once in ten million runs


def farthest(sample: list[float], cdf: Callable[[float], float]) -> float:
    """The Kolmogorov distance of a sample from a distribution."""
    ordered, n = sorted(sample), len(sample)
    return max(max(cdf(x) - i / n, (i + 1) / n - cdf(x)) for i, x in enumerate(ordered))


def test_latency_is_first_token_plus_tokens_times_a_log_normal_factor(seed: int) -> None:
    pp = quota(first_token_s=0.4, per_token_s=0.02, sigma=0.3)
    base_s = 0.4 + 0.02 * 150
    sample = [latency_s(pp, seed, request, 1, 150.0, -1.0) for request in range(20_000)]
    normal = NormalDist(math.log(base_s), 0.3)
    assert farthest(sample, lambda s: normal.cdf(math.log(s))) < KS_FACTOR / math.sqrt(len(sample))


def test_latency_without_noise_is_exact_and_a_recorded_time_takes_its_place() -> None:
    pp = quota(first_token_s=0.5, per_token_s=0.25, sigma=0.0)
    assert [latency_s(pp, 1, 2, 1, n, -1.0) for n in (0.0, 1.0, 10.0)] == [0.5, 0.75, 3.0]
    assert latency_s(quota(sigma=0.3), 1, 2, 1, 500.0, 7.5) == 7.5
    assert latency_s(quota(sigma=0.3), 1, 2, 1, 500.0, 0.0) == 0.0


def test_stalls_are_rare_uniform_and_on_top(seed: int) -> None:
    pp = quota(first_token_s=1.0, per_token_s=0.0, stall_ratio=0.1, stall_min_s=10.0, stall_max_s=60.0)
    sample = [latency_s(pp, seed, request, 1, 100.0, -1.0) - 1.0 for request in range(20_000)]
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

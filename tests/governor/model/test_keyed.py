"""Chance that is keyed must look like chance along every part of its key, and be nothing but a function of it.

Bounds are set so that a sound generator fails one of these in about ten million runs: distances by the
Dvoretzky-Kiefer-Wolfowitz inequality, counts and correlations at 5.5 standard deviations and more.
"""

from __future__ import annotations

import ast
import inspect
import math
import random
from collections.abc import Callable
from itertools import combinations, pairwise
from statistics import NormalDist, correlation, fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.model import keyed
from governor.model.keyed import keyed_uniform, normal_quantile

N = 20_000
KS_MAX = math.sqrt(-math.log(1e-7 / 2) / 2) / math.sqrt(N)
SIGMAS = 5.5

Key = Callable[[int], tuple[int, int, int, int]]
# One part of the key counts up while the others stand still, as they do in a run.
ALONG: dict[str, Key] = {
    "requests": lambda i: (7, i, 1, keyed.LATENCY),
    "seeds": lambda i: (i, 3, 1, keyed.LATENCY),
    "attempts": lambda i: (7, 3, i, keyed.LATENCY),
    "finalize attempts": lambda i: (7, i, 100_001, keyed.LATENCY),
    "requests and seeds": lambda i: (i % 141, i // 141, 1, keyed.LATENCY),
    "requests and purposes": lambda i: (7, i // 13, 1, 1 + i % 13),
    "every 4096th request": lambda i: (7, i * 4096, 1, keyed.LATENCY),
    "seeds beyond 32 bits": lambda i: (i << 32, 3, 1, keyed.LATENCY),
    "requests beyond 32 bits": lambda i: (7, i << 32, 1, keyed.LATENCY),
    "seeds by powers": lambda i: ((i * i) & (2**63 - 1), i & 3, 1, keyed.LATENCY),
}


def shifted(key: Key, seed: int) -> Key:
    """The same walk, from elsewhere."""
    offset = random.Random(seed).getrandbits(20)
    return lambda i: tuple(part + offset if n < 2 else part for n, part in enumerate(key(i)))  # type: ignore[return-value]


@pytest.fixture(params=ALONG)
def walk(request: pytest.FixtureRequest, seed: int) -> list[float]:
    key = shifted(ALONG[request.param], seed)
    return [keyed_uniform(*key(i)) for i in range(N)]


def test_uniform_along_each_part_of_the_key(walk: list[float]) -> None:
    assert all(0.0 < u < 1.0 for u in walk)
    distance = max(max(u - i / N, (i + 1) / N - u) for i, u in enumerate(sorted(walk)))
    assert distance < KS_MAX


def test_low_bits_are_uniform_too(walk: list[float]) -> None:
    """The last 8 of the 52 bits, as a chi-squared over 256 values: mean 255, variance 510."""
    counts = [0] * 256
    for u in walk:
        counts[int(u * 2.0**52) & 255] += 1
    chi2 = sum((n - N / 256) ** 2 for n in counts) / (N / 256)
    assert abs(chi2 - 255) < 7.0 * math.sqrt(510)


def test_neighbours_are_independent(walk: list[float]) -> None:
    """Pairs fill the unit square evenly (16 x 16 fields), at several distances; so do their correlations."""
    for lag in (1, 2, 3, 16, 141):
        pairs = list(zip(walk, walk[lag:], strict=False))
        counts = [0] * 256
        for a, b in pairs:
            counts[int(a * 16) * 16 + int(b * 16)] += 1
        expected = len(pairs) / 256
        chi2 = sum((n - expected) ** 2 for n in counts) / expected
        assert abs(chi2 - 255) < 7.0 * math.sqrt(510), lag
        assert abs(correlation(*zip(*pairs, strict=True))) < SIGMAS / math.sqrt(len(pairs)), lag


def test_runs_that_differ_in_one_part_of_the_key_are_unrelated(seed: int) -> None:
    """Other seeds, attempts, lanes and purposes, each over the same requests, at every shift up to 3."""
    start = seed % 1_000_003
    runs = {
        "one": (start, 1, keyed.LATENCY),
        "next seed": (start + 1, 1, keyed.LATENCY),
        "far seed": (start + 2**32, 1, keyed.LATENCY),
        "next attempt": (start, 2, keyed.LATENCY),
        "finalize": (start, keyed.attempt_key(1, 1), keyed.LATENCY),
        "other purpose": (start, 1, keyed.STALL),
        "another purpose": (start, 1, keyed.JITTER_STAGGER),
    }
    n = 10_000
    draws = {
        name: [keyed_uniform(s, i, attempt, purpose) for i in range(n)] for name, (s, attempt, purpose) in runs.items()
    }
    for a, b in combinations(draws, 2):
        for shift in range(4):
            r = correlation(draws[a][shift:], draws[b][: n - shift])
            assert abs(r) < SIGMAS / math.sqrt(n - shift), (a, b, shift)


def test_every_bit_of_the_key_turns_half_the_bits_of_the_number(seed: int) -> None:
    """The avalanche: one bit of the seed, the request or the attempt flips each of 52 bits with even odds."""
    r = random.Random(seed)
    trials = 400

    def bits(*key: int) -> int:
        return int((keyed_uniform(*key) * 2.0**52) - 0.5)

    for part, width in ((0, 63), (1, 63), (2, 20)):
        for bit in range(width):
            flips = 0
            for _ in range(trials):
                key = [r.getrandbits(62), r.getrandbits(62), r.getrandbits(16), r.randint(1, 20)]
                other = list(key)
                other[part] ^= 1 << bit
                flips += (bits(*key) ^ bits(*other)).bit_count()
            # 52 fair coins per trial: standard deviation sqrt(13) per trial.
            assert flips / trials == pytest.approx(26.0, abs=SIGMAS * math.sqrt(13.0 / trials)), (part, bit)


def test_no_two_keys_of_a_large_run_share_a_number(seed: int) -> None:
    """300,000 draws among 2**52 values: two alike by chance once in 100,000 runs."""
    draws = {
        keyed_uniform(seed, request, attempt, purpose)
        for request in range(10_000)
        for attempt in (1, 2, 3, 100_001, 100_002)
        for purpose in range(1, 7)
    }
    assert len(draws) == 300_000


@given(
    key=st.tuples(
        st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 63)
    ).filter(lambda key: key[2] * 64 + key[3] < 2**63)
)
def test_any_key_gives_a_number_strictly_between_the_ends(key: tuple[int, int, int, int]) -> None:
    u = keyed_uniform(*key)
    assert 0.0 < u < 1.0
    assert u == keyed_uniform(*key)
    assert math.isfinite(normal_quantile(u))


def test_purposes_are_distinct_and_fit_beside_the_attempt() -> None:
    purposes = [
        getattr(keyed, target.id)
        for node in ast.parse(inspect.getsource(keyed)).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id != "MASK"
    ]
    assert len(purposes) >= 13
    assert len(set(purposes)) == len(purposes)
    assert all(0 < purpose < 64 for purpose in purposes)


def test_lanes_share_no_attempt_key() -> None:
    keys = [keyed.attempt_key(lane, attempt) for lane in (0, 1) for attempt in range(1, 101)]
    assert len(set(keys)) == 200


# ---------------------------------------------------------------- the normal quantile


def cdf(x: float) -> float:
    """The normal distribution function from the complementary error function: precise in the lower tail."""
    return math.erfc(-x / math.sqrt(2.0)) / 2.0


def test_normal_quantile_agrees_with_the_standard_library() -> None:
    """The same algorithm written by somebody else, to the last digits, over all three of its branches."""
    inverse = NormalDist().inv_cdf
    grid = [i / 5_000 for i in range(1, 5_000)] + [10.0**-e for e in range(3, 17)] + [2.0**-53, 1.0 - 2.0**-53]
    for u in grid:
        assert normal_quantile(u) == pytest.approx(inverse(u), rel=1e-14, abs=1e-15), u


@given(u=st.floats(1e-300, 0.5))
def test_normal_quantile_inverts_the_distribution_function(u: float) -> None:
    """Independent of the algorithm. Far out a relative error of x grows by x**2 in the probability."""
    x = normal_quantile(u)
    assert x <= 0.0
    assert cdf(x) == pytest.approx(u, rel=4e-15 * (1.0 + x * x) + 1e-14)


@given(u=st.integers(1, 2**53 - 1).map(lambda n: n / 2.0**53))
def test_normal_quantile_is_odd_about_the_middle(u: float) -> None:
    assert normal_quantile(1.0 - u) == -normal_quantile(u)


def test_normal_quantile_rises_over_its_seams() -> None:
    """At 0.075 and 0.925 and at r = 5, about 1.4e-11, one formula hands over to the next."""
    assert normal_quantile(0.5) == 0.0
    for seam in (0.075, 0.925, math.exp(-25.0), 1.0 - math.exp(-25.0)):
        steps = [seam * (1.0 + 1e-12 * k) for k in range(-20, 21)]
        values = [normal_quantile(u) for u in steps if 0.0 < u < 1.0]
        assert all(a <= b + 1e-13 for a, b in pairwise(values)), seam
    assert all(a < b for a, b in pairwise(normal_quantile(i / 1_000) for i in range(1, 1_000)))


def test_uniforms_become_normals(seed: int) -> None:
    sample = [normal_quantile(keyed_uniform(seed, i, 1, keyed.LATENCY)) for i in range(N)]
    assert fmean(sample) == pytest.approx(0.0, abs=SIGMAS / math.sqrt(N))
    assert fmean(x * x for x in sample) == pytest.approx(1.0, abs=SIGMAS * math.sqrt(2.0 / N))
    assert fmean(x**4 for x in sample) == pytest.approx(3.0, abs=SIGMAS * math.sqrt(96.0 / N))

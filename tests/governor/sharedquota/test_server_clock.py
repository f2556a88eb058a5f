"""One time for several processes: never ahead of the store, exact both ways, and a state seen from another zero."""

from __future__ import annotations

import random
from math import inf

import pytest

from governor import law
from governor.law import State
from governor.model.lawcalls import moved
from governor.model.needs import of_tokens
from governor.sharedquota.interfaces import EPOCH_S, QUANTUM_S, ServerClock, floored, server_s
from tests.governor.laws import params

DAYS = 86_400_000_000


@pytest.mark.parametrize("scale", [1.0, 60.0, 1_000.0])
def test_differences_of_times_are_exact(seed: int, scale: float) -> None:
    rng = random.Random(seed)
    for _ in range(2_000):
        at = server_s(EPOCH_S * 1_000_000 + rng.randrange(400 * DAYS), scale)
        zero = floored(rng.uniform(0.0, 400 * 86_400 * scale))
        assert (at - zero) + zero == at
        assert at % QUANTUM_S == 0.0


def test_nobody_is_ahead_of_the_store(seed: int) -> None:
    """Clocks that drift by 100 ppm either way, and answers that take from 0.1 to 50 ms."""
    rng = random.Random(seed)
    for drift in (-1e-4, 0.0, 1e-4):
        clock, local, late = ServerClock(), 1_000.0, []
        for _ in range(500):
            local += rng.choice([0.01, 1.0, 2.5])
            there, back = rng.uniform(5e-5, 0.025), rng.uniform(5e-5, 0.025)
            stated = 5_000.0 + (local + there) * (1.0 + drift)
            clock.heard(int((EPOCH_S + stated) * 1e6), local, local + there + back)
            local += there + back
            true = 5_000.0 + local * (1.0 + drift)
            assert local + clock.ahead_s <= true + 2e-5
            late.append(true - local - clock.ahead_s)
        assert max(late[10:]) < 0.03


def test_a_clock_that_was_set_back_is_followed() -> None:
    clock = ServerClock()
    clock.heard((EPOCH_S + 100) * 1_000_000, 10.0, 10.001)
    clock.heard((EPOCH_S + 50) * 1_000_000, 11.0, 11.001)
    assert 11.001 + clock.ahead_s == pytest.approx(50.0, abs=0.002)


@pytest.mark.parametrize("window", [law.FIXED, law.SLIDING, law.BUCKET])
def test_a_moved_state_decides_alike_at_moved_times(seed: int, window: int) -> None:
    """By whole cells the answers move exactly as far, up to the last digits; by a part of one never to earlier."""
    rng = random.Random(seed)
    p = params(window=window, tpm=6_000, rpm=60, stagger_s=0.5, jitter_ratio=0.2, headroom=0.1, max_concurrency=1_000)
    for _ in range(60):
        s, now = State(), 0.0
        for _ in range(rng.randrange(1, 30)):
            now += rng.choice([0.0, 0.1, 3.0])
            law.launched(p, s, of_tokens(float(rng.randrange(1, 900))), law.FIRST, now, rng.random())
        for by_s, slack_s in ((200.5, 0.0), (-1e6, 0.0), (rng.uniform(-1e5, 1e5), law.cell_s(p, law.TPM))):
            t = moved(p, s, by_s)
            for ahead in (0.0, 1.0, 20.0, 59.9, 61.0):
                for reserve in (1.0, 500.0, 5_000.0):
                    there = law.admit_at(p, s, of_tokens(reserve), law.FIRST, now + ahead) + by_s
                    here = law.admit_at(p, t, of_tokens(reserve), law.FIRST, now + ahead + by_s)
                    assert there - 1e-6 <= here <= there + slack_s + 1e-6


def test_every_time_of_a_state_is_moved() -> None:
    """A field that holds a time says so by its name; counts do not move."""
    s = State()
    for name in State.__slots__:
        value = getattr(s, name)
        if name.endswith(("_at", "_until")):
            setattr(s, name, [1_000.0] * len(value) if isinstance(value, list) else 1_000.0)
    p = params(window=law.SLIDING)
    t = moved(p, s, 500.0)
    for name in State.__slots__:
        before, after = getattr(s, name), getattr(t, name)
        if name == "cell_at":  # half seconds; empty, so it begins anew
            assert after == [0.0, 0.0, *before[2:]]
        elif name.endswith(("_at", "_until")):
            assert after == ([1_500.0] * len(before) if isinstance(before, list) else 1_500.0), name
        elif name == "zero_s":
            assert after == before - 500.0
        else:
            assert after == before, name
    assert moved(p, State(), 5.0).last_launch_at == -inf

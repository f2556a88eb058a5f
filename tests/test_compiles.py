"""Law, chance and provider, compiled as they stand, decide as the interpreted ones do: equal to the bit.

Random calls in random order, on both sides at once, each on its own state: what comes back is compared after every
call, and the states with it. Any function that is added must be called here, or the coverage check says so.
"""

from __future__ import annotations

import inspect
import math
import random
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from governor import law
from governor.model import keyed
from sim.des.machine import array_of, compiled
from sim.model import latency
from sim.model import provider as prov
from sim.model import windows as win
from sim.model.latency import NOISE_GROUPS, NOISE_KNOTS
from tests.governor.laws import burst, params, sought
from tests.sim.doors import quota

DECISIONS = 40_000
# They make the empty arrays of the dataclasses, and are called by those alone.
FACTORIES = {"_each", "_none", "_ones", "_of_openai"}
# Calls in one sequence: enough for states to fill up, few enough to see many policies.
CALLS = 250


@pytest.fixture(scope="module")
def copies(root: Path) -> dict[str, ModuleType]:
    names = (
        "governor/law.py",
        "governor/model/keyed.py",
        "sim/model/windows.py",
        "sim/model/latency.py",
        "sim/model/provider.py",
    )
    return compiled([root / name for name in names], root)


def bits(value: Any) -> Any:
    """A result in a form that is equal only if every bit is."""
    if isinstance(value, tuple):
        return tuple(bits(part) for part in value)
    return None if value is None else struct.pack("<d", float(value))


class Pair:
    """One bag of numbers on both sides: a dataclass for the interpreted functions, a record for the compiled ones."""

    def __init__(self, bag: Any) -> None:
        self.bag = bag
        array = array_of(bag)
        self.record = array.view(np.recarray)[0]
        self.fields = {name: array[name] for name in type(bag).__slots__}  # views: a record looks names up anew

    def differing(self, large: bool = True) -> list[str]:
        """The fields that differ in any bit; `large` ones are looked at too if asked for."""
        faults = []
        for name, theirs in self.fields.items():
            ours = getattr(self.bag, name)
            if isinstance(ours, list):
                if (large or len(ours) <= 8) and struct.pack(f"<{len(ours)}d", *ours) != theirs.tobytes():
                    faults.append(name)
            elif bits(ours) != bits(theirs.item()):
                faults.append(name)
        return faults


def _compiled(argument: Any) -> Any:
    if isinstance(argument, Pair):
        return argument.record
    return np.array(argument) if isinstance(argument, list) else argument


class Both:
    """Calls a function of one module on both sides and compares; counts what it called."""

    def __init__(self, plain: ModuleType, copy: ModuleType) -> None:
        self.plain = plain
        self.copy = copy
        self.calls: dict[str, int] = {}

    def __call__(self, name: str, *arguments: Any) -> Any:
        ours = getattr(self.plain, name)(*(a.bag if isinstance(a, Pair) else a for a in arguments))
        theirs = getattr(self.copy, name)(*map(_compiled, arguments))
        shown = [repr(a) for a in arguments if not isinstance(a, Pair)]
        assert bits(ours) == bits(theirs), f"{name}({', '.join(shown)}): {ours!r} interpreted, {theirs!r} compiled"
        self.calls[name] = self.calls.get(name, 0) + 1
        for a in arguments:
            if isinstance(a, Pair):
                faults = a.differing(large=self.calls[name] % 8 == 0)
                assert not faults, f"{name}({', '.join(shown)}) left another {', '.join(faults)} when compiled"
        return ours

    def covered(self) -> None:
        """Every public function was called, and every function at all was compiled on the way."""
        functions = {
            n for n, f in vars(self.plain).items() if inspect.isfunction(f) and f.__module__ == self.plain.__name__
        }
        public = {name for name in functions if not name.startswith("_")}
        assert set(self.calls) == public
        idle = [name for name in functions - FACTORIES if not getattr(self.copy, name).nopython_signatures]
        assert not idle, f"never compiled: {sorted(idle)}"


# ---------------------------------------------------------------- the law


def drawn_policy(r: random.Random) -> law.Params:
    p = params(
        tpm=r.choice([0, 30_000, 2_000_000, r.randint(1, 100_000)]),
        rpm=r.choice([0, 3, 500, r.randint(1, 100)]),
        tpd=r.choice([0, r.randint(10_000, 10**7)]),
        rpd=r.choice([0, r.randint(10, 10_000)]),
        headroom=r.choice([0.0, 0.01, 0.15, r.random()]),
        window=r.randrange(3),
        max_concurrency=r.choice([1, 3, 100]),
        stagger_s=r.choice([0.0, 15.0, r.uniform(0.0, 5.0)]),
        jitter_ratio=r.choice([0.0, 0.2, r.random()]),
        backoff_base_s=r.choice([2.0, r.uniform(0.01, 10.0)]),
        max_attempts=r.randint(1, 8),
        deadline_s=r.choice([0.0, r.uniform(10.0, 1_000.0)]),
    )
    for flag in ("longest_first", "backoff_keeps_permit", "hold_on_throttle", "sync_headers", "finalize_lowers"):
        setattr(p, flag, r.randrange(2))
    if r.random() < 0.5:
        draw_dimensions(r, p)
    for d in range(p.dimensions):
        p.settles[d], p.refunds[d] = float(r.randrange(2)), float(r.randrange(2))
        if p.window[d] == law.BUCKET:
            p.burst_ratio[d] = r.choice([1.0, 1.0, 0.1, r.uniform(0.001, 1.0)])
    burst(p)
    if r.random() < 0.5:
        for d in range(p.dimensions):
            if r.random() < 0.5:
                sought(p, d)
    p.interactive_ratio = r.choice([0.0, 0.2, r.random()])
    return p


def draw_dimensions(r: random.Random, p: law.Params) -> None:
    """Another number of dimensions, each with a limit, a length and a window of its own."""
    p.dimensions = r.randint(1, law.DIMENSIONS)
    for d in range(p.dimensions):
        headroom = r.choice([0.0, 0.15])
        p.limit[d] = float(r.choice([0, 3, 500, r.randint(1, 100_000)]))
        p.length_s[d] = r.choice([1.0, 10.0, 60.0, 600.0, 86_400.0])
        p.window[d] = float(r.randrange(4))
        p.phase_s[d] = r.choice([0.0, -28_800.0, r.uniform(0.0, 100.0)])
        p.burst_ratio[d] = 1.0
        p.budget[d] = law.budget_of(p.limit[d], headroom)
        p.rate_per_s[d] = law.rate_of(p.limit[d], headroom, p.length_s[d])
        p.cause[d] = float(r.choice([law.BY_TPM, law.BY_RPM, law.BY_DAY]))


def later(r: random.Random, now: float) -> float:
    """Some moment from now on: the same, a little later, on a border of cells or minutes, or long after."""
    kind = r.randrange(7)
    if kind == 0:
        return now
    if kind == 1:
        return math.floor(now * 2.0 + 1.0) / 2.0
    if kind == 2:
        return now + r.choice([60.0, law.FIXED_S, law.SLIDING_S, 3_600.0])
    return now + r.expovariate(1.0) * r.choice([0.01, 1.0, 10.0])


def drawn_amounts(r: random.Random) -> list[float]:
    """Whole amounts, some of them 0, as of requests, tokens and tenths of cents."""
    return [float(r.choice([0, 1, r.randint(0, r.choice([100, 7_000, 60_000]))])) for _ in range(law.DIMENSIONS)]


def law_calls(r: random.Random, both: Both) -> None:
    """One pool's life: a driver that does everything in its power, not always in a sensible order."""
    p, s = Pair(drawn_policy(r)), Pair(law.State())
    now = later(r, 0.0)
    both("started", p, s, drawn_amounts(r), now)
    out: list[tuple[list[float], float, float, int]] = []  # need, launched, first launched, attempt
    for _ in range(CALLS):
        need = drawn_amounts(r)
        size, standing, u = max(need), r.randrange(4), r.random()
        at = both("admit_at", p, s, need, standing, now)
        kind = r.randrange(16)
        if kind < 4:
            if math.isfinite(at) and r.random() < 0.7:
                now = at
            both("launched", p, s, need, standing, now, u)
            out.append((need, now, now - r.choice([0.0, 20.0]), r.randint(1, 6)))
        elif kind < 9 and out:
            need, launched_at, first_at, attempt = out.pop(r.randrange(len(out)))
            wait = r.choice([-1.0, 0.0, r.uniform(0.0, 30.0), 411_480.0])
            if kind == 4:
                both("throttled", p, s, need, attempt, wait, first_at, launched_at, now, u)
                both("outlasts", p, wait)
                both("is_spent", p, attempt, wait)
                both("is_shut_out", s)
            elif kind == 5:
                history = r.randrange(3), attempt, r.randrange(7), r.randrange(2)
                both("failed", p, s, *history, wait, first_at, launched_at, now, u)
                both("spared", p, s, r.randrange(7), launched_at, now - r.choice([0.0, 100.0]))
            elif kind == 6:
                both("released", p, s)
                both("answered", p, s, now)
            else:
                used = [each * r.choice([1.0, r.uniform(0.0, 2.0)]) for each in need]
                both("settled", p, s, need, used, launched_at, now)
        elif kind == 9:
            d = r.randrange(law.DIMENSIONS)
            limit = r.choice([p.bag.limit[d], r.uniform(0.0, 1e5), r.choice([math.inf, math.nan, -1.0])])
            left, since = limit * r.uniform(-0.1, 1.1), r.choice([0.0, r.uniform(0.0, 1e4)])
            as_of = now - r.choice([r.uniform(0.0, 0.3), r.uniform(0.0, 70.0)])
            both("synced", p, s, d, limit, left, need[d], r.randrange(2), since, as_of, now)
        elif kind == 10 and r.random() < 0.1:
            new = Pair(drawn_policy(r))
            both("repriced", p, new, s, now)
            p = new
        elif kind == 11:
            both("finalize_opened" if s.bag.finalize_open <= 0 else "finalize_closed", p, s)
        elif kind == 12 and r.random() < 0.2:
            both("resumed" if s.bag.paused else "paused", p, s)
        elif kind == 13:
            both("admission", p, s, need, standing, now)
            d = r.randrange(law.DIMENSIONS)
            both("used_in", p, s, d, now)
            both("permits", p, s)
            both("answer_may_admit", p, standing)
            both("never_fits", p, need)
            both("held_of", p, d, size)
            both("burst_of", size, u)
            both("is_brief", p, d)
            both("limit_found", p, s, d)
            both("cell_s", p, d)
        elif kind == 14:
            place = (r.randrange(2), r.randint(1, 3), float(r.randint(-1, 900)), size, float(r.randrange(99)))
            both("rank", p, *place)
            both("rank", p, *place, standing)
            both("stagger_gap_s", p, u)
            both("backoff_s", p, r.randint(1, 100))
            both("keeps_permit", p)
            both("deadline_at", p, now)
            both("expires_at", p, now, now + u)
            both("budget_of", r.choice([0.0, size]), u)
            both("rate_of", r.choice([0.0, size]), u, r.choice([60.0, 86_400.0]))
        else:
            now = later(r, now)
    assert not s.differing()


@pytest.mark.slow
def test_decisions_of_the_law_are_equal_to_the_bit(copies: dict[str, ModuleType], seed: int) -> None:
    r, both = random.Random(seed), Both(law, copies["governor.law"])
    while sum(both.calls.values()) < DECISIONS:
        law_calls(r, both)
    both.covered()


# ---------------------------------------------------------------- chance


def test_chance_is_equal_to_the_bit(copies: dict[str, ModuleType], seed: int) -> None:
    """Also for numbers beyond 32 bits, where a signed multiplication would overflow if it were not masked."""
    r, both = random.Random(seed), Both(keyed, copies["governor.model.keyed"])
    for _ in range(20_000):
        numbers = [r.getrandbits(r.choice([1, 8, 32, 40, 63])) for _ in range(2)]
        u = both("keyed_uniform", *numbers, r.randrange(200_000), r.randint(1, 20))
        both("normal_quantile", u)
        both("attempt_key", r.randrange(2), r.randint(1, 99))
    for tiny in (5e-324, 1e-300, 1e-17, 1e-5, 0.075, 0.5, 1.0 - 1e-16):
        both("normal_quantile", tiny)
    both.covered()


# ---------------------------------------------------------------- the provider


def drawn_provider(r: random.Random) -> prov.ProviderParams:
    pp = quota(
        float(r.choice([0, 30_000, r.randint(1, 100_000)])),
        float(r.choice([0, 3, 500])),
        float(r.choice([0, r.randint(10_000, 10**7)])),
        float(r.choice([0, 200, 10_000])),
        window=r.randrange(4),
        phase_s=r.choice([0.0, 17.5]),
        burst_ratio=r.choice([1.0, 1.0, 0.25]),
        at_answer=[float(r.randrange(4) // 3) if d % 2 == 0 else 0.0 for d in range(law.DIMENSIONS)],
        retry_after_s=r.choice([1.0, 60.0]),
        retry_after_min_s=r.choice([0.0, 1.0]),
        counts=r.randrange(4),
        counts_share=r.choice([1.0, 0.1]),
        counts_rounded_to=r.choice([1.0, 1_000.0]),
        counts_negative=r.randrange(2),
        slice_s=r.choice([0.0, 1.0, 10.0]),
        slice_tokens=r.choice([0.0, 5_000.0]),
        settles=r.randrange(2),
        failed_count=r.randrange(4),
        retry_after=r.randrange(4),
        ramp_tpm=r.choice([0.0, 20_000.0]),
        quota_requests=r.choice([0.0, 0.0, 60.0]),
        first_token_s=r.uniform(0.0, 1.0),
        per_token_s=r.uniform(0.0, 0.05),
        sigma=r.choice([0.0, 0.3, 1.0]),
        stall_ratio=r.choice([0.0, 0.1]),
        error_ratio=r.choice([0.0, 0.1]),
        drop_ratio=r.choice([0.0, 0.1]),
        hang_ratio=r.choice([0.0, 0.1]),
    )
    if r.random() < 0.5:
        pp.cotenant_share = r.random()
        pp.cotenant_period_s = r.choice([0.0, 60.0, 45.5])
        pp.cotenant_burst_s = 0.0 if pp.cotenant_period_s == 0.0 else r.uniform(1.0, 40.0)
    at = 0.0
    for i in range(r.choice([0, 0, 1, NOISE_GROUPS])):
        pp.noise_from[i] = 1_000.0 * i
        shape = sorted(r.gauss(0.0, 1.0) for _ in range(NOISE_KNOTS))
        pp.noise[i * NOISE_KNOTS : (i + 1) * NOISE_KNOTS] = shape
    for i in range(r.randrange(prov.CHANGES + 1)):
        at = later(r, at)
        pp.change_at[i] = at
        pp.change_factor[i] = r.choice([0.5, 1.0, r.uniform(0.01, 2.0)])
    at = 0.0
    for i in range(r.randrange(prov.OUTAGES)):
        pp.outage_at[i] = later(r, at)
        pp.outage_until[i] = at = pp.outage_at[i] + r.choice([0.5, 60.0, r.expovariate(0.1)])
        pp.outage_kind[i] = float(r.randrange(3))
    if r.random() < 0.5:
        draw_provider_dimensions(r, pp)
    return pp


def draw_provider_dimensions(r: random.Random, pp: prov.ProviderParams) -> None:
    """Other dimensions, each with a limit, a length, a window and weights of its own."""
    pp.dimensions = r.randint(1, law.DIMENSIONS)
    for d in range(pp.dimensions):
        pp.limit[d] = float(r.choice([0, 3, 500, r.randint(1, 100_000)]))
        pp.window[d] = float(r.randrange(4))
        pp.length_s[d] = 60.0 if pp.window[d] == win.SLIDING else r.choice([10.0, 60.0, 600.0, 86_400.0])
        pp.phase_s[d] = r.choice([0.0, 17.5])
        pp.burst_ratio[d] = r.choice([1.0, 0.25]) if pp.window[d] == win.BUCKET else 1.0
        pp.per_request[d] = r.choice([0.0, 1.0])
        pp.per_input[d], pp.per_output[d] = r.choice([(1.0, 1.0), (1.0, 0.0), (0.0, 5.0), (2.5e-6, 1e-5)])
        pp.header[d] = float(r.randrange(4))


def provider_calls(r: random.Random, both: Both, timed: Both) -> None:
    pp, ps = Pair(drawn_provider(r)), Pair(prov.ProviderState())
    chance, now = r.getrandbits(32), 0.0
    both("day_started", ps, r.uniform(0.0, 1e4), float(r.randrange(50)))
    for _ in range(CALLS):
        # Seconds, not hours: a co-tenant is followed second by second.
        now += r.choice([0.0, 0.5, r.expovariate(1.0), r.expovariate(0.05)])
        charge, request, attempt = (
            float(r.randint(0, r.choice([100, 7_000, 60_000]))),
            r.randrange(10**6),
            r.randint(1, 9),
        )
        output = float(r.randrange(4_000))
        recorded_s = r.choice([-1.0, -1.0, r.random()])
        kind = r.randrange(8)
        if kind < 4:
            prompt = float(r.randrange(2_000))
            both("answered", pp, ps, chance, request, attempt, charge, output, recorded_s, now, -1.0, prompt)
        elif kind == 4:
            both("settled", pp, ps, chance, charge, float(r.randrange(10_000)), now, float(r.randrange(500)))
        elif kind == 5:
            _, _, wait_ms = both("admitted", pp, ps, chance, charge, now, float(r.randrange(500)))
            both("stated_wait_s", pp, wait_ms)
        elif kind == 6:
            both("advanced", pp, ps, chance, now)
            for d in range(4):
                both("remaining", pp, ps, d)
                both("states_counts", pp, d > 1)
                both("is_stated", pp, ps, d)
            both("requests_dimension", pp, ps)
            both("taken_by_others", pp, ps, r.randrange(2), r.uniform(0.0, 5_000.0))
        else:
            timed("latency_s", pp, chance, request, attempt, output, recorded_s)
            timed("smooth_latency_s", pp, output, recorded_s, r.random())
            timed("stall_s", pp, chance, request, attempt)
            both("cut_without_text", pp, chance, request)
    assert not ps.differing()


@pytest.mark.slow
def test_the_provider_is_equal_to_the_bit(copies: dict[str, ModuleType], seed: int) -> None:
    r, both = random.Random(seed), Both(prov, copies["sim.model.provider"])
    timed = Both(latency, copies["sim.model.latency"])
    while sum(both.calls.values()) < DECISIONS // 2:
        provider_calls(r, both, timed)
    both.covered()
    timed.covered()


def test_the_copies_are_compiled_and_the_originals_are_not(copies: dict[str, ModuleType]) -> None:
    provider = copies["sim.model.provider"]
    assert provider.keyed_uniform is copies["governor.model.keyed"].keyed_uniform
    assert inspect.isfunction(prov.keyed_uniform)
    assert prov.keyed_uniform is keyed.keyed_uniform
    assert copies["governor.law"].admission is not law.admission
    assert hasattr(copies["governor.law"]._book, "nopython_signatures")


def test_the_comparison_sees_one_bit() -> None:
    """What compares bags and results would notice the last bit, the sign of a zero and a cell of a ring."""
    assert bits(0.1 + 0.2) != bits(0.3)
    assert bits(0.0) != bits(-0.0)
    assert bits((1, None, 2.0)) == bits((1.0, None, 2))
    pair = Pair(law.State())
    assert not pair.differing()
    pair.bag.cells[17] = 5e-324
    pair.bag.in_flight = 1
    assert pair.differing() == ["in_flight", "cells"]

"""The stress set: conditions that a recommendation must survive, each a scenario with one assumption changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from governor.model.estimate import RULES
from sim.model.provider import CHANGES
from sim.model.windows import MINUTE_S
from sim.scenario.scenario import Scenario

COTENANT_SHARE = 0.25
COTENANT_BURST_S = 15.0
COTENANT_PERIOD_S = 60.0
HALVED_FROM_S = 120.0
HALVED_FOR_S = 600.0
# Provider behaviour that does not change from day to day, by its names in `ProviderConfig.learnt`: once learnt, it is
# not doubted again.
HABITS = ("charge rule", "settling", "slices", "window", "Retry-After")


@dataclass(frozen=True, slots=True)
class Condition:
    """A named scenario: "" for the assumed one, else a condition of the stress set."""

    name: str
    scenario: Scenario


def stress_set(scenario: Scenario) -> list[tuple[str, Scenario]]:
    """Return the named conditions under which a recommendation must lose nothing, each with one assumption changed.

    They are: every other charge rule that charges this workload differently; settling the other way; a co-tenant that
    takes 25 % in bursts; per-second slices; latency doubled; no Retry-After; counts of the moment of the answer,
    rounded; clock minutes, if no published tier is named; the limit halved for ten minutes. `stress_notes` lists
    conditions that could not be applied because some request could then never run. Behaviour learnt of the provider
    (`ProviderConfig.learnt`) is not doubted, except what changes from hour to hour: co-tenants, latency, the limit.
    """
    return [(name, changed) for name, changed, _ in _conditions(scenario) if changed is not None]


def stress_notes(scenario: Scenario) -> list[tuple[str, str]]:
    """Return (name, reason) for each condition of the stress set that was left out or softened."""
    return [(name, note) for name, _, note in _conditions(scenario) if note]


_Tried = tuple[str, Scenario | None, str]


def _conditions(scenario: Scenario) -> Iterator[_Tried]:
    """Yield name, changed scenario (None = cannot be applied) and a note on each condition."""
    provider = scenario.provider

    def changed(**changes: Any) -> Scenario:
        return scenario.with_(provider=provider.with_(**changes))

    largest = _largest_charge(scenario)
    open_to = set(HABITS) - set(provider.learnt)
    if "charge rule" in open_to:
        yield from _other_charge_rules(scenario)
    if "settling" in open_to:
        yield ("does not settle" if provider.settles else "settles"), changed(settles=not provider.settles), ""
    cotenant = {
        "share": max(COTENANT_SHARE, provider.cotenant.share),
        "burst_s": COTENANT_BURST_S,
        "period_s": COTENANT_PERIOD_S,
    }
    yield f"co-tenant takes {cotenant['share']:.0%} in bursts", changed(cotenant=cotenant), ""
    if "slices" in open_to and provider.slice_s == 0.0 and (provider.tpm or provider.rpm):
        # With a token slice below the largest charge, that request would pass only because the limiter makes an
        # exception.
        yield "per-second slices", changed(slice_s=1.0, slice_tokens=math.ceil(largest)), ""
    late = provider.latency.model_dump()
    yield "latency x 2", changed(latency={**late, "scale": min(1_000.0, 2.0 * provider.latency.scale)}), ""
    if "Retry-After" in open_to and provider.retry_after != "absent":
        yield "no Retry-After", changed(retry_after="absent"), ""
    if provider.counts == "admission":
        yield "counts of the answer, in thousands", changed(counts="answer", counts_rounded_to=1_000), ""
    counted = provider.window == "bucket" and bool(provider.tpm or provider.rpm)
    if "window" in open_to and counted and not provider.preset:
        # Published tiers have been observed to refill continuously; other limiters are unknown.
        clock = {"window": "clock", "burst_s": MINUTE_S, "phase_s": MINUTE_S / 2.0}
        yield "minutes of the clock, begun in the middle of one", changed(**clock), ""
    if provider.tpm or provider.rpm:
        yield _limit_halved(scenario, largest)


def _largest_charge(scenario: Scenario) -> float:
    """Return the largest charge of any request under the scenario's rule, including finalize passes if any."""
    c = scenario.columns()
    largest = float(c.charge.max(initial=0.0))
    return max(largest, float(c.finalize_charge.max(initial=0.0))) if scenario.finalize else largest


def _other_charge_rules(scenario: Scenario) -> Iterator[_Tried]:
    provider = scenario.provider
    limits = [limit for limit in (provider.tpm, provider.tpd) if limit]
    known = [scenario.charges()]
    for rule in RULES:
        # `fixed` is a reserve rule of policies; no provider is expected to charge that way.
        if rule in ("fixed", provider.charge_rule):
            continue
        other = scenario.with_(provider=provider.with_(charge_rule=rule))
        charged = other.charges()
        if any(np.array_equal(charged, before) for before in known):
            continue
        known.append(charged)
        largest = _largest_charge(other)
        name = f"charge rule {rule}"
        if largest > min(limits, default=math.inf):
            yield name, None, f"left out: a request would be charged {largest:,.0f}, above the limit of {min(limits):,}"
        else:
            yield name, other, ""


def _limit_halved(scenario: Scenario, largest: float) -> _Tried:
    """Return the limit halved for ten minutes inside the run; cut by less if half would refuse a request for good."""
    provider = scenario.provider
    factor, note = 0.5, ""
    if provider.tpm and largest > 0.5 * provider.tpm:
        factor = math.ceil(100.0 * largest / provider.tpm) / 100.0
        note = f"lowered to {factor:.0%} only: the largest request is charged {largest:,.0f} of {provider.tpm:,}"
    start_s = _inside(scenario)
    end_s = start_s + HALVED_FOR_S
    name = f"limit {'halved' if factor == 0.5 else f'x {factor:.2f}'} from {start_s:g} s to {end_s:g} s"
    before = [(change.at_s, change.factor) for change in provider.limit_changes]
    times = sorted({at_s for at_s, _ in before} | {start_s, end_s})
    if factor >= 1.0 or len(times) > CHANGES:
        why = note if factor >= 1.0 else f"left out: more than {CHANGES} changes of the limit"
        return name, None, why.replace(f"lowered to {factor:.0%} only", "left out")
    changes = []
    for at_s in times:
        own = [f for since_s, f in before if since_s <= at_s]
        lowered = factor if start_s <= at_s < end_s else 1.0
        changes.append({"at_s": at_s, "factor": lowered * (own[-1] if own else 1.0)})
    return name, scenario.with_(provider=provider.with_(limit_changes=changes)), note


def _inside(scenario: Scenario) -> float:
    """Return when the ten minutes begin, in whole seconds: after two minutes, or sooner if the run could end by then.

    The sooner start is a quarter of the shortest time in which the limits let everything through.
    """
    provider = scenario.provider
    fluid_s = 60.0 * len(scenario.workload) / provider.rpm if provider.rpm else 0.0
    if provider.tpm:
        fluid_s = max(fluid_s, 60.0 * float(scenario.charges().sum()) / provider.tpm)
    if scenario.arrivals == "trace":
        fluid_s = max(fluid_s, float(scenario.workload.arrival_s.max(initial=0.0)))
    return min(HALVED_FROM_S, math.floor(fluid_s / 4.0))

"""What the tests of the provider share: quotas, and ways to knock at the door."""

from __future__ import annotations

from typing import Any

from sim.model import provider as prov
from sim.model.provider import ProviderParams, ProviderState
from sim.model.windows import BUCKET


def quota(tpm: float = 0.0, rpm: float = 0.0, tpd: float = 0.0, rpd: float = 0.0, **knobs: Any) -> ProviderParams:
    """A provider's limits; `window`, `phase_s` and `burst_ratio` are those of both limits per minute."""
    for name, rest in (("window", float(BUCKET)), ("phase_s", 0.0), ("burst_ratio", 1.0)):
        if name in knobs:
            knobs[name] = [float(knobs[name])] * 2 + [rest] * 6
    return ProviderParams(limit=[tpm, rpm, tpd, rpd, *[0.0] * 4], **knobs)


def changing(pp: ProviderParams, *changes: tuple[float, float]) -> ProviderParams:
    """`pp` whose minute limits are `factor` times the first ones from each moment on."""
    for i, (at, factor) in enumerate(changes):
        pp.change_at[i] = at
        pp.change_factor[i] = factor
    return pp


def knock(pp: ProviderParams, ps: ProviderState, charge: float, now: float, seed: int = 0) -> tuple[int, int, float]:
    """One attempt: (outcome, dimension, stated wait in seconds)."""
    outcome, dimension, wait_ms = prov.admitted(pp, ps, seed, charge, now)
    return outcome, dimension, prov.stated_wait_s(pp, wait_ms)


def taken(pp: ProviderParams, ps: ProviderState, charge: float, now: float) -> float:
    """Asks for `charge` over and over until it is refused; the sum of what was let in."""
    total = 0.0
    while prov.admitted(pp, ps, 0, charge, now)[0] == prov.OK:
        total += charge
    return total

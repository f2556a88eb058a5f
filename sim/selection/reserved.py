"""Reserved capacity: what provisioned units cost beside paying per token, with the spill, and from which load they pay.

Theory of operation. A unit processes so many weighted tokens per minute, at a price per hour, used or not. Of a minute
that offers more than all units hold, the share above it spills over to calls that are paid per token. With c_k what
minute k costs if it is paid per token, m_k its weighted tokens, and t, p, H a unit's tokens per minute, its price per
hour and the hours, n units save

    sum over k of c_k x min(s, n t / m_k)  -  n p H

where the traffic is s times the one given. This never falls as s grows, and per unit it is the largest for the fewest
units; so the load from which reserving is cheaper is where the smallest deployment saves nothing. If a unit that is
used to the full is worth less than its price, no load is enough.

Minutes are those of the arrivals; a batch is taken to be spread evenly until its deadline. What a unit may carry for
less than a minute beyond its rate is not counted, and neither is the time that spilled requests take.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.model.errors import BadSetting
from governor.model.prices import PER, Price, Prices
from governor.profiles.loader import all_profiles, read_profile
from governor.profiles.schema import Profile, Reserved
from sim.model.provider_tiers import SNAPSHOT, published_tiers
from sim.scenario.scenario import Scenario

HOURLY = "hourly"
_STEPS_MAX = 2_000


@dataclass(frozen=True, slots=True)
class ReservedChoice:
    """The cheapest number of units under one term. `usd_per_hour`: of units and spill together.

    `spilled`: share of the weighted tokens that is paid per token. `used`: share of the units' capacity that is used.
    `pays_from_tpm`: mean tokens per minute from which reserving is cheaper, for traffic of this shape; None = never.
    `spill_tier`: the smallest published tier that grants the largest minute of the spill, "" = none.
    """

    term: str
    units: int
    unit_usd_per_hour: float
    usd_per_hour: float
    spilled: float
    used: float
    pays_from_tpm: float | None
    spill_tier: str


@dataclass(frozen=True, slots=True)
class ReservedComparison:
    """Paying per token beside reserving. `tpm`, `peak_tpm`: mean and largest minute of prompt and answer tokens.

    `tier`: the smallest published tier that grants that largest minute, "" = none.
    """

    model: str
    provider: str
    unit: str
    source: str
    hours: float
    tpm: float
    peak_tpm: float
    tokens_usd_per_hour: float
    tier: str
    choices: tuple[ReservedChoice, ...]

    @property
    def best(self) -> ReservedChoice | None:
        """Return the cheapest choice that beats paying per token; None if there is none."""
        cheaper = [each for each in self.choices if each.usd_per_hour < self.tokens_usd_per_hour]
        return min(cheaper, key=lambda each: each.usd_per_hour, default=None)

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain values."""
        best = self.best
        return {**asdict(self), "cheapest": "tokens" if best is None else best.term}


def compared(
    scenario: Scenario, prices: Prices, finish_by_s: float | None, model: str, *, cached_share: float = 0.0
) -> ReservedComparison:
    """Compare paying per token with reserving. `finish_by_s`: a batch's deadline, None for traffic with arrivals.

    Raise BadSetting if no profile states units for the model, or nothing states its price.
    """
    profile, offer = _offer(SNAPSHOT.sub("", model), scenario.provider.profile)
    price = prices.of(model, date.today())
    if price is None or offer.usd_per_hour is None:
        what = f"of {model}" if price is None else f"of a {offer.unit} for {model}"
        raise BadSetting(f"the price {what} is not known: state it in a profile of your own (--profile FILE.yaml)")
    weighted, usd, tokens, hours = _minutes(scenario, offer, price, finish_by_s, cached_share)
    busy = weighted > 0.0
    weighted, usd, tokens = weighted[busy], usd[busy], tokens[busy]
    terms = {HOURLY: offer.usd_per_hour, **offer.terms}
    tpm = float(tokens.sum()) / (60.0 * hours)
    choices = tuple(
        _choice(term, each, offer, weighted, usd, tokens, hours, tpm, model, scenario.provider.profile)
        for term, each in terms.items()
    )
    peak = float(tokens.max())
    return ReservedComparison(
        model, profile.title, offer.unit, offer.source, hours, tpm, peak, float(usd.sum()) / hours,
        _tier(model, peak, scenario.provider.profile), choices,
    )  # fmt: skip


def _offer(model: str, own: str) -> tuple[Profile, Reserved]:
    """Return the units for a model, and whose they are: of the provider's profile, or else of any that is shipped."""
    for profile in (read_profile(own), *all_profiles()):
        for offer in profile.reserved:
            if any(fnmatch.fnmatchcase(model, pattern) for pattern in offer.models):
                return profile, offer
    known = dict.fromkeys(name for profile in all_profiles() for offer in profile.reserved for name in offer.models)
    raise BadSetting(f"no profile states reserved units for {model!r}: use one of {', '.join(known)}", "--reserved")


def _minutes(
    scenario: Scenario, offer: Reserved, price: Price, finish_by_s: float | None, cached_share: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """Return weighted tokens, US dollars if paid per token, and tokens, of each minute; and the hours."""
    workload = scenario.workload
    prompt = np.asarray(workload.prompt_tokens, dtype=np.float64)
    output = np.maximum(0.0, np.asarray(workload.output_tokens, dtype=np.float64))
    cap = np.asarray(workload.max_tokens, dtype=np.float64)
    output = np.where(cap >= 0.0, np.minimum(output, cap * np.asarray(workload.n)), output)
    cached = cached_share * prompt
    weight = offer.weights
    weighted = (
        weight.get("input", 0.0) * (prompt - cached)
        + weight.get("cached_input", 0.0) * cached
        + weight.get("output", 0.0) * output
        + weight.get("requests", 0.0)
    )
    usd = ((prompt - cached) * price.input + cached * price.cached_input + output * price.output) / PER
    tokens = prompt + output
    if scenario.arrivals != "trace":
        minutes = max(1, math.ceil((finish_by_s or 60.0) / 60.0))
        even = [np.full(minutes, each.sum() / minutes) for each in (weighted, usd, tokens)]
        return even[0], even[1], even[2], minutes / 60.0
    at = np.floor(np.asarray(workload.arrival_s, dtype=np.float64) / 60.0).astype(np.int64)
    first, second, third = (np.bincount(at - at.min(), each).astype(np.float64) for each in (weighted, usd, tokens))
    return first, second, third, len(first) / 60.0


def _choice(
    term: str,
    unit_usd: float,
    offer: Reserved,
    weighted: NDArray[np.float64],
    usd: NDArray[np.float64],
    tokens: NDArray[np.float64],
    hours: float,
    tpm: float,
    model: str,
    profile: str,
) -> ReservedChoice:
    most = max(offer.minimum, math.ceil(float(weighted.max()) / offer.tokens_per_minute))
    step = offer.increment * max(1, math.ceil((most - offer.minimum) / offer.increment / _STEPS_MAX))
    found = []
    for units in range(offer.minimum, most + step, step):
        spilled = np.maximum(0.0, 1.0 - units * offer.tokens_per_minute / weighted)
        found.append((units * unit_usd + float(usd @ spilled) / hours, units, spilled))
    cost, units, spilled = min(found, key=lambda each: each[:2])
    over = float(weighted @ spilled)
    carried = float(weighted.sum()) - over
    peak = float((tokens * spilled).max())
    return ReservedChoice(
        term=term,
        units=units,
        unit_usd_per_hour=unit_usd,
        usd_per_hour=cost,
        spilled=over / float(weighted.sum()),
        used=carried / (units * offer.tokens_per_minute * 60.0 * hours),
        pays_from_tpm=_pays_from(offer, unit_usd * hours, weighted, usd, tpm),
        spill_tier=_tier(model, peak, profile) if peak > 0.0 else "",
    )


def _pays_from(
    offer: Reserved, unit_usd: float, weighted: NDArray[np.float64], usd: NDArray[np.float64], tpm: float
) -> float | None:
    """Return the mean tokens per minute from which the smallest deployment saves money; None = from no load.

    `unit_usd`: a unit's price over the whole time. See the module's docstring.
    """
    full = offer.minimum * offer.tokens_per_minute / weighted

    def saved(factor: float) -> float:
        return float(usd @ np.minimum(factor, full)) - offer.minimum * unit_usd

    low, high = 0.0, float(full.max())
    if saved(high) < 0.0:
        return None
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (low, middle) if saved(middle) >= 0.0 else (middle, high)
    return high * tpm


def _tier(model: str, tpm: float, profile: str) -> str:
    """Return the smallest published tier of the model that grants so many tokens per minute; "" if there is none."""
    own = {name: tier.limits.get("TPM", 0.0) for name, tier in published_tiers(profile).items() if tier.model == model}
    return min((name for name, limit in own.items() if limit >= tpm), key=lambda name: own[name], default="")

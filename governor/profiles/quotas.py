"""The dimensions of a profile as the law and the synthetic provider count them.

The four that the guardrails' settings name (TPM, RPM, TPD, RPD) keep their places in the law's arrays; others take the
places after them, then free ones among them. A dimension that also holds per slice gets a second one for the slice.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from governor import law
from governor.model.errors import BadSetting, quoted
from governor.model.needs import STANDARD, Limited
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Price
from governor.profiles.schema import Dimension, Profile

# At the end of the name of a slice's dimension.
SLICE = "_SLICE"
# Profiles whose dimensions are the guardrails' four.
_PLAIN = ("openai", "generic")
_WINDOWS = {"fixed": law.FIXED, "clock": law.CLOCK, "sliding": law.SLIDING, "bucket": law.BUCKET}


def quota_of(
    profile: Profile, limits: Mapping[str, float], *, price: Price | None = None, now_epoch: float | None = None
) -> tuple[Limited, ...]:
    """Return the dimensions of an account with these limits, by name; a limit left out is the profile's, or none.

    `price`: of the model, for limits of money. `now_epoch`: the moment for which time zones are looked up, default now.
    Raise BadSetting for a name that the profile does not have, and for more dimensions than the law has places.
    """
    for name in limits:
        if name not in profile.dimensions:
            raise _no_dimension(name, profile)
    now_epoch = time.time() if now_epoch is None else now_epoch
    places = [d for d in (4, 5, 6, 7, 3, 2, 1, 0) if d not in {STANDARD.get(name) for name in profile.dimensions}]
    headers: dict[str, int] = {}
    found: list[Limited] = []
    for name, each in profile.dimensions.items():
        limit = float(limits.get(name, each.limit or 0.0))
        wanted = 1 + (each.slice_s is not None and limit > 0.0) - (name in STANDARD)
        if wanted > len(places):
            raise BadSetting(f"profile {profile.name} has more than {law.DIMENSIONS} dimensions, slices included")
        header = headers.setdefault(each.headers.limit, 1 + len(headers)) if each.headers is not None else 0
        place = STANDARD[name] if name in STANDARD else places.pop(0)
        found.append(_limited(name, place, each, limit, each.length_s, header, price, now_epoch))
        if each.slice_s is not None and limit > 0.0:
            share = max(1.0, limit * each.slice_s / each.length_s)
            part = each.model_copy(update={"window": "bucket"})
            found.append(_limited(name + SLICE, places.pop(0), part, share, each.slice_s, 0, price, now_epoch))
    return tuple(found)


def over_profile(policy: Policy, profile: Profile, pool: Pool) -> Policy:
    """Return a pool's policy over the dimensions of its profile, under the limits that the pool and its tier state.

    OpenAI's dimensions are the guardrails' own: without further ones the policy is as it was, but for the limits of a
    tier. So it is where no limit is known of a profile without TPM: the guardrails pace that as they would any server.
    A limit named by a setting wins over one of a tier. The charge rule `auto` means the profile's rule, as does an
    unnamed one beside further dimensions: an estimate per run does not tell input from output. Raise BadSetting for a
    name that the profile does not have.
    """
    stated = {**(tier_limits(profile, pool.tier, pool.models) if pool.tier else {}), **dict(pool.limits)}
    if unknown := [name for name in stated if name not in profile.dimensions and name not in STANDARD]:
        raise _no_dimension(unknown[0], profile)
    fields = {name: f"{name.lower()}_limit" for name in STANDARD}
    for name in STANDARD.keys() & stated.keys():
        if fields[name] not in policy.model_fields_set:
            limit = stated[name]
            policy = policy.with_(**{fields[name]: int(limit) if limit.is_integer() else limit})
    further = {name: limit for name, limit in stated.items() if name not in STANDARD}
    known = further or any(each.limit for name, each in profile.dimensions.items() if name not in STANDARD)
    is_plain = profile.name in _PLAIN or "TPM" not in profile.dimensions
    if not known and is_plain:
        return policy
    if lacking := [name for name, _ in pool.limits if name not in profile.dimensions]:
        raise _no_dimension(lacking[0], profile)
    is_unnamed = policy.model_fields_set.isdisjoint(("charge_rule", "est_tokens_per_run"))
    if policy.charge_rule == "auto" or (known and is_unnamed):
        policy = policy.with_(charge_rule=profile.charge.rule)
    standard = {
        name: float(getattr(policy, fields[name]))
        for name in STANDARD.keys() & profile.dimensions.keys()
        if fields[name] in policy.model_fields_set or not profile.dimensions[name].limit
    }
    price = _dearest(profile, pool.models)
    for name, each in profile.dimensions.items():
        if price is None and each.weights.get("cost") and further.get(name, each.limit):
            raise BadSetting(f"{name} limits money, and the profile states no price for these models")
    return policy.with_quota(quota_of(profile, {**standard, **further}, price=price))


def tier_limits(profile: Profile, tier: str, models: tuple[str, ...] = ()) -> Mapping[str, float]:
    """Return the limits of a tier: `MODEL-TIER`, or the tier's own name where those of the models do not differ.

    `models`: patterns of the models that are meant, () = all. Raise BadSetting, naming the tiers there are.
    """
    names = {
        f"{model}-{each}": (each, limits)
        for entry in profile.tiers
        for model in entry.models
        if not models or any(fnmatch.fnmatchcase(model, pattern) for pattern in models)
        for each, limits in entry.limits.items()
    }
    if tier in names:
        return names[tier][1]
    found = {name: limits for name, (each, limits) in names.items() if each == tier}
    if not found:
        listed = f"it has {', '.join(names)}" if names else "it has none for these models: state the limits by name"
        raise BadSetting(f"profile {profile.name} has no tier {quoted(tier)}: {listed}")
    limits, *others = found.values()
    if any(other != limits for other in others):
        raise BadSetting(f"tier {quoted(tier)} depends on the model: write one of {', '.join(found)}")
    return limits


def _dearest(profile: Profile, models: tuple[str, ...]) -> Price | None:
    """Return the highest price of the models of a pool, so that a limit of money holds for each; None if unknown."""
    today = datetime.now(UTC).date()
    meant = [
        max((price for price in prices if price.since <= today), default=prices[-1])
        for model, prices in profile.prices.items()
        if not models or any(fnmatch.fnmatchcase(model, pattern) for pattern in models)
    ]
    if not meant:
        return None
    dearest = [
        max(rates) for rates in zip(*((each.input, each.cached_input, each.output) for each in meant), strict=True)
    ]
    return Price(today, *dearest)


def _no_dimension(name: str, profile: Profile) -> BadSetting:
    return BadSetting(f"profile {profile.name} has no dimension {name}: it has {', '.join(profile.dimensions)}")


def _limited(
    name: str,
    place: int,
    each: Dimension,
    limit: float,
    length_s: float,
    header: int,
    price: Price | None,
    now_epoch: float,
) -> Limited:
    cost = each.weights.get("cost", 0.0)
    prices = (price.input, price.output, price.cached_input) if price is not None else (0.0, 0.0, 0.0)
    per_in, per_out, per_cached = (cost * usd / 1e6 for usd in prices)
    offset = datetime.fromtimestamp(now_epoch, UTC).astimezone(ZoneInfo(each.time_zone)).utcoffset()
    return Limited(
        name=name,
        place=place,
        limit=limit,
        length_s=length_s,
        window=_WINDOWS[each.window],
        phase_s=offset.total_seconds() if offset is not None and each.window == "clock" else 0.0,
        per_request=each.weights.get("requests", 0.0),
        per_input=each.weights.get("input", 0.0) + per_in,
        per_output=each.weights.get("output", 0.0) + per_out,
        per_cached=each.weights.get("cached_input", 0.0) + per_cached,
        per_written=each.weights.get("cache_write", 0.0) + per_in,
        settles=each.settles,
        at_answer=each.charged == "answer",
        header=header,
    )

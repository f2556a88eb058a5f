"""Published tiers and measured latencies, from the profiles: the starting points of a provider's configuration.

Both are explained in docs/explanation/provider.md#limits and #latency.

A tier states what a provider publishes, not what an account has: the account's limits page is the measurement. The
latency lines are fits of the provider's own processing time against completion tokens. The spread around the line and
the rare stalls are assumed: a healthy provider's P99 is about twice its P50, and sigma 0.25 gives 1.8 times.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any, NamedTuple

from governor.model.errors import BadSetting, quoted
from governor.profiles.loader import OPENAI, all_profiles, names, read_profile
from governor.profiles.schema import LatencyLine, Profile

# A model's name may end in its snapshot date.
SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")

# The date on which the measured charge rules were checked.
CHECKED_ON = read_profile(OPENAI).checked.isoformat()

# The first user's account: 30,000 tokens per minute, as the guardrails assume.
DEFAULT_TIER = "gpt-4o-tier1"
DEFAULT_LATENCY = "gpt-4o"

# The dimensions whose limits are fields of a provider's configuration.
SIMULATED = ("TPM", "RPM", "TPD", "RPD")

SIGMA = 0.25
STALL_RATIO = 0.001
STALL_MIN_S = 10.0
STALL_MAX_S = 60.0


class PublishedTier(NamedTuple):
    """The limits of one model in one usage tier, by dimension of its profile."""

    profile: str
    model: str
    source: str
    since: date
    limits: Mapping[str, float]


def published_tiers(profile: str = "") -> dict[str, PublishedTier]:
    """Return the tiers of a user's own profile (its file) and every shipped one by name: `gpt-4o-tier1`, ..."""
    own = (
        {name: tier._replace(profile=profile) for name, tier in tiers_in(read_profile(profile)).items()}
        if (profile and profile not in names())
        else {}
    )
    return own | {name: tier for name, tier in _shipped_tiers().items() if name not in own}


@functools.cache
def _shipped_tiers() -> dict[str, PublishedTier]:
    return {
        name: tier for profile in (read_profile(OPENAI), *all_profiles()) for name, tier in tiers_in(profile).items()
    }


def tiers_in(profile: Profile) -> dict[str, PublishedTier]:
    """Return the tiers of one profile by name, each model's in the order of the file."""
    return {
        f"{model}-{tier}": PublishedTier(profile.name, model, entry.source, entry.since, limits)
        for entry in profile.tiers
        for model in entry.models
        for tier, limits in entry.limits.items()
    }


def latency_lines(profile: str = "") -> dict[str, LatencyLine]:
    """Return the latency lines of a user's own profile (its file) and of the shipped ones, by model."""
    own = read_profile(profile).latency if profile and profile not in names() else {}
    return {**_shipped_lines(), **own}


@functools.cache
def _shipped_lines() -> dict[str, LatencyLine]:
    return {model: line for profile in reversed(all_profiles()) for model, line in profile.latency.items()}


def tier_of(name: str, profile: str = "") -> PublishedTier:
    """Return a tier of that profile (its name or file), or a published one.

    Raise BadSetting, with the nearest name, if it does not exist.
    """
    known = published_tiers(profile)
    if name not in known:
        raise BadSetting(f"there is no provider preset {quoted(name)}: {_nearest(name, known)}")
    return known[name]


def tier_preset(name: str, profile: str = "") -> dict[str, Any]:
    """Return the provider fields of a tier. Raise BadSetting as `tier_of` does."""
    tier = tier_of(name, profile)
    standard = {dimension.lower(): int(tier.limits.get(dimension, 0)) for dimension in SIMULATED}
    others = {dimension: limit for dimension, limit in tier.limits.items() if dimension not in SIMULATED}
    return {
        "profile": tier.profile,
        **standard,
        **({"limits": others} if others else {}),
        "latency": tier.model if tier.model in latency_lines(profile) else DEFAULT_LATENCY,
    }


def tier_source(name: str, profile: str = "") -> str:
    """Return the source of a tier's limits."""
    tier = tier_of(name, profile)
    return f"published for {tier.model}, {name.removeprefix(f'{tier.model}-')} ({tier.source}, {tier.since})"


def habits(profile: Profile) -> dict[str, Any]:
    """Return what a profile says of a provider, as fields of its configuration; limits are the account's."""
    per_minute = [each for each in profile.dimensions.values() if each.length_s == 60.0]
    windows = {each.window for each in per_minute}
    return {
        **({} if "TPM" in profile.dimensions else {"tpm": 0}),
        "charge_rule": profile.charge.rule,
        "as_of": profile.checked if profile.name == OPENAI else CHECKED_ON,
        "failed_requests_count": profile.charge.refusals_count,
        "counts": profile.charge.counts,
        "counts_rounded_to": profile.charge.counts_rounded_to,
        "settles": any(each.settles for each in per_minute),
        "charged": "answer" if any(each.charged == "answer" for each in per_minute) else "admission",
        "window": {"fixed": "anchored"}.get(window := windows.pop(), window) if len(windows) == 1 else "bucket",
        "slice_s": max((each.slice_s or 0.0 for each in per_minute), default=0.0),
    }


def latency_preset(name: str) -> dict[str, Any]:
    """Return the latency fields of a measured model.

    Raise BadSetting, with the nearest name, if it was not measured.
    """
    lines = latency_lines()
    if name not in lines:
        raise BadSetting(f"there is no latency preset {quoted(name)}: {_nearest(name, lines)}")
    line = lines[name]
    return {
        "first_token_s": line.first_token_s,
        "per_token_s": line.per_token_s,
        "sigma": SIGMA,
        "stall_ratio": STALL_RATIO,
        "stall_min_s": STALL_MIN_S,
        "stall_max_s": STALL_MAX_S,
    }


def completed(data: Any, preset: Any) -> Any:
    """Return a preset's name as its fields; fields with a `preset` override that preset's."""
    if isinstance(data, str):
        data = {"preset": data}
    if isinstance(data, dict) and isinstance(data.get("preset"), str) and data["preset"]:
        return {**preset(data["preset"]), **data}
    return data


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else "use one of " + ", ".join(known)

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
from governor.profiles.loader import OPENAI, all_profiles, read_profile
from governor.profiles.schema import LatencyLine, Profile

# A model's name may end in its snapshot date.
SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")

# The date on which the measured charge rules were checked.
CHECKED_ON = read_profile(OPENAI).checked.isoformat()

# The first user's account: 30,000 tokens per minute, as the guardrails assume.
DEFAULT_TIER = "gpt-4o-tier1"
DEFAULT_LATENCY = "gpt-4o"

# The dimensions that the synthetic provider limits.
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


@functools.cache
def published_tiers() -> dict[str, PublishedTier]:
    """Return every tier of the shipped profiles by its name: `gpt-4o-tier1`, ..."""
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


@functools.cache
def latency_lines() -> dict[str, LatencyLine]:
    """Return the measured latency lines of the shipped profiles, by model."""
    return {model: line for profile in reversed(all_profiles()) for model, line in profile.latency.items()}


def tier_of(name: str) -> PublishedTier:
    """Return a published tier. Raise BadSetting, with the nearest name, if it does not exist."""
    if name not in published_tiers():
        raise BadSetting(f"there is no provider preset {quoted(name)}: {_nearest(name, published_tiers())}")
    return published_tiers()[name]


def tier_preset(name: str) -> dict[str, Any]:
    """Return the provider fields of a published tier. Raise BadSetting, with the nearest name, if it does not exist."""
    tier = tier_of(name)
    if unknown := [dimension for dimension in tier.limits if dimension not in SIMULATED]:
        raise BadSetting(f"{name} limits {', '.join(unknown)}, which are not simulated: state tpm and rpm yourself")
    limits = {dimension.lower(): int(tier.limits.get(dimension, 0)) for dimension in SIMULATED}
    return {
        "profile": tier.profile,
        **limits,
        "latency": tier.model if tier.model in latency_lines() else DEFAULT_LATENCY,
    }


def tier_source(name: str) -> str:
    """Return the source of a published tier's limits."""
    tier = tier_of(name)
    return f"published for {tier.model}, {name.removeprefix(f'{tier.model}-')} ({tier.source}, {tier.since})"


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


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, 1)
    return f"did you mean {close[0]}?" if close else "use one of " + ", ".join(names)

"""Published tiers and measured latencies, as data: the starting points of a provider's configuration.

Both are explained in docs/explanation/provider.md#limits and #latency.

A tier states what a provider publishes, not what an account has: the account's limits page is the measurement. The
latency lines are fits (Theil-Sen) of the provider's own processing time against completion tokens, over recordings of
mixed dates. Slope and intercept are measured and exclude the network; the spread around the line and the rare stalls
are assumed: a healthy provider's P99 is about twice its P50, and sigma 0.25 gives 1.8 times.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from governor.model.errors import BadSetting, quoted

# A model's name may end in its snapshot date.
SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")

# The date on which these figures and the measured charge rules were checked.
CHECKED_ON = "2026-11-23"


class Tiers(NamedTuple):
    """Limits of one model's usage tiers 1 to 5: (requests per minute, tokens per minute) each, and their source."""

    source: str
    limits: tuple[tuple[int, int], ...]


_GUIDE = "OpenAI's rate-limits guide"
_OTHERS = "third-party lists; some of these limits also seen in recorded headers"
_FLAGSHIP = ((500, 500_000), (5_000, 1_000_000), (5_000, 2_000_000), (10_000, 4_000_000), (15_000, 40_000_000))

TIERS: dict[str, Tiers] = {
    "gpt-5.5": Tiers(_GUIDE, _FLAGSHIP),
    "gpt-5.6-sol": Tiers(_GUIDE, _FLAGSHIP),
    "gpt-6-sol": Tiers(_GUIDE, _FLAGSHIP),
    "gpt-5.5-long-context": Tiers(
        _GUIDE, ((200, 400_000), (500, 1_000_000), (1_000, 2_000_000), (2_000, 10_000_000), (8_000, 20_000_000))
    ),
    "gpt-5.4-mini": Tiers(
        _GUIDE, ((500, 500_000), (5_000, 2_000_000), (5_000, 4_000_000), (10_000, 10_000_000), (30_000, 180_000_000))
    ),
    "gpt-5.1-chat": Tiers(
        _GUIDE, ((500, 30_000), (5_000, 450_000), (5_000, 800_000), (10_000, 2_000_000), (15_000, 40_000_000))
    ),
    "gpt-4-turbo": Tiers(
        _GUIDE, ((500, 30_000), (5_000, 450_000), (5_000, 600_000), (10_000, 800_000), (10_000, 2_000_000))
    ),
    "gpt-4o": Tiers(
        _OTHERS, ((500, 30_000), (5_000, 450_000), (5_000, 800_000), (10_000, 2_000_000), (10_000, 30_000_000))
    ),
    "gpt-4o-mini": Tiers(
        _OTHERS, ((500, 200_000), (5_000, 2_000_000), (5_000, 4_000_000), (10_000, 10_000_000), (30_000, 150_000_000))
    ),
}

# The first user's account: 30,000 tokens per minute, as the guardrails assume.
DEFAULT_TIER = "gpt-4o-tier1"


class LatencyLine(NamedTuple):
    """Latency of one model: seconds to the first token, seconds per output token, number of recordings."""

    first_token_s: float
    per_token_s: float
    recordings: int


LATENCIES: dict[str, LatencyLine] = {
    "gpt-4o": LatencyLine(0.214, 0.0193, 64),
    "gpt-4o-mini": LatencyLine(0.359, 0.0136, 92),
    "gpt-4.1": LatencyLine(0.382, 0.023, 11),
    "gpt-4.1-nano": LatencyLine(0.304, 0.0123, 35),
    "gpt-3.5-turbo": LatencyLine(0.213, 0.0107, 113),
    "gpt-4": LatencyLine(0.296, 0.043, 17),
    # Only the slope was measured; the time to the first token is taken from the most similar model.
    "gpt-5-nano": LatencyLine(0.304, 0.013, 8),
}
DEFAULT_LATENCY = "gpt-4o"

SIGMA = 0.25
STALL_RATIO = 0.001
STALL_MIN_S = 10.0
STALL_MAX_S = 60.0


def tier_names() -> list[str]:
    """Return the names of all published tiers: `gpt-4o-tier1`, ..."""
    return [f"{model}-tier{i + 1}" for model, tiers in TIERS.items() for i in range(len(tiers.limits))]


def tier_preset(name: str) -> dict[str, Any]:
    """Return the provider fields of a published tier. Raise BadSetting, with the nearest name, if it does not exist."""
    if name not in tier_names():
        raise BadSetting(f"there is no provider preset {quoted(name)}: {_nearest(name, tier_names())}")
    model, _, tier = name.rpartition("-tier")
    rpm, tpm = TIERS[model].limits[int(tier) - 1]
    return {"tpm": tpm, "rpm": rpm, "latency": model if model in LATENCIES else DEFAULT_LATENCY}


def tier_source(name: str) -> str:
    """Return the source of a published tier's limits."""
    model, _, tier = name.rpartition("-tier")
    return f"published for {model}, tier {tier} ({TIERS[model].source}, {CHECKED_ON})"


def latency_preset(name: str) -> dict[str, Any]:
    """Return the latency fields of a measured model.

    Raise BadSetting, with the nearest name, if it was not measured.
    """
    if name not in LATENCIES:
        raise BadSetting(f"there is no latency preset {quoted(name)}: {_nearest(name, LATENCIES)}")
    line = LATENCIES[name]
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

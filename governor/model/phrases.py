"""Put figures into words: durations, shares, counts and causes of waiting. Pure functions from numbers to short texts.

A text never claims more precision than a reader can use.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from governor.law import RPD, RPM
from governor.model.needs import STANDARD

if TYPE_CHECKING:
    from governor.model.policy import Policy

# Each cause of waiting: the knob that decides it, and what the request waits for.
WAITED_FOR = {
    "concurrency": ("OPENAI_MAX_CONCURRENCY", "a free place in flight"),
    "stagger": ("OPENAI_STAGGER_SECONDS", "the next launch slot"),
    "tpm": ("OPENAI_TPM_LIMIT", "tokens of the budget per minute"),
    "rpm": ("OPENAI_RPM_LIMIT", "requests of the budget per minute"),
    "day": ("OPENAI_TPD_LIMIT", "the budget of the day"),
    "hold": ("OPENAI_HOLD_ON_THROTTLE", "the end of a hold after a 429"),
    "paused": ("", "the pause to end"),
    "backoff": ("OPENAI_BACKOFF_BASE_SECONDS", "the end of a backoff"),
}


# The figures of a duration longer than this would only fill a line.
CENTURIES_S = 200.0 * 365.25 * 86_400.0


def duration(seconds: float) -> str:
    """Return a duration in its two largest units.

    Examples: "0.35 s", "42 s", "24 min 10 s", "1 h 28 min", "2 d 4 h"; inf is "never".
    """
    if math.isnan(seconds):
        return "not known"
    if math.isinf(seconds):
        return "never"
    sign, s = ("−", -seconds) if seconds < 0.0 else ("", seconds)
    if s >= CENTURIES_S:
        return "centuries"
    if s < 0.0005:
        return "0 s"
    if s < 9.95:
        return f"{sign}{s:.2g} s"
    # Round before splitting, so that 59.7 s reads "1 min" and not "60 s".
    if round(s) < 60:
        return f"{sign}{round(s)} s"
    if round(s) < 3_600:
        return sign + _two(round(s), 60, "min", "s")
    if round(s / 60.0) < 1_440:
        return sign + _two(round(s / 60.0), 60, "h", "min")
    return sign + _two(round(s / 3_600.0), 24, "d", "h")


def _two(small: int, ratio: int, big_unit: str, small_unit: str) -> str:
    big, rest = divmod(small, ratio)
    return f"{big:,} {big_unit} {rest} {small_unit}" if rest else f"{big:,} {big_unit}"


def percent(ratio: float) -> str:
    """Return a share to two digits: "73 %", "0.41 %", "99.8 %"; a share below 1 never reads 100 %."""
    if math.isnan(ratio):
        return "not known"
    sign, value = ("−", -100.0 * ratio) if ratio < 0.0 else ("", 100.0 * ratio)
    if 99.0 <= value < 100.0:
        return f"{sign}{math.floor(10.0 * value) / 10.0:.1f} %"
    return f"{sign}{value:.0f} %" if value >= 9.95 or value == 0.0 else f"{sign}{value:.2g} %"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: "1 request", "2,000 requests"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def whole_number(text: str) -> int | None:
    """Return a whole number from 0 up as people write it: 450000, 450_000, 450k, 1.5M; None for anything else."""
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([kmg]?)", text.strip().lower(), re.ASCII)
    value = float(found[1].replace("_", "")) * _THOUSANDS[found[2]] if found else -1.0
    return int(value) if 0 <= value <= 1e12 and value == int(value) else None


def whole_if(value: float) -> float:
    """Return tokens and requests as whole numbers, and money to four digits."""
    return int(value) if value == int(value) else float(f"{value:.4g}")


def amount_text(value: float) -> str:
    """Return an amount of a dimension for people; see `whole_if`."""
    return f"{whole_if(value):,}"


def name_of(policy: Policy, d: int) -> str:
    """Return the name of a dimension of the policy's quota; "" if it has none there."""
    return next((name for name, place in policy.places.items() if place == d), "")


def what_of(policy: Policy, d: int) -> str:
    """Return what a dimension counts, for people: tokens, or "of OTPM" where a profile has its own."""
    return f"of {name_of(policy, d)}" if policy.quota else "requests" if d in (RPM, RPD) else "tokens"


def limit_name(policy: Policy, d: int) -> str:
    """Return where the limit of a dimension is set: OPENAI_TPM_LIMIT, or "its limit OTPM"."""
    name = name_of(policy, d)
    return f"OPENAI_{name}_LIMIT" if name in STANDARD else f"its limit {name}"

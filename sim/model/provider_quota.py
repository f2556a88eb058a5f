"""Fields of a provider's configuration as the parameters take them, and the dimensions of its profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from typing import Any

from governor import law
from governor.model.errors import BadSetting, quoted
from governor.model.needs import Limited, amounts, weights_of
from governor.model.phrases import amount_text
from governor.model.prices import Price
from governor.profiles.loader import GENERIC, OPENAI, read_profile
from governor.profiles.quotas import quota_of
from sim.model.provider import SAYS_MILLISECONDS, SAYS_NOTHING, SAYS_OLDEST, SAYS_SECONDS, ProviderParams
from sim.model.windows import ANCHORED, BUCKET, CLOCK, DAY_S, MINUTE_S, SLIDING

# The synthetic provider's name of each of the law's windows.
_KINDS = {law.BUCKET: BUCKET, law.CLOCK: CLOCK, law.FIXED: ANCHORED, law.SLIDING: SLIDING}
SAYS = {"absent": SAYS_NOTHING, "ms": SAYS_MILLISECONDS, "seconds": SAYS_SECONDS, "oldest": SAYS_OLDEST}


def list_of(*values: float) -> list[float]:
    """Return an array with these values for the first dimensions, and 0 for the others."""
    return list(amounts(*values))


# One validator, so that an error is reported once and not once per possible type.
def stated_wait(value: Any) -> Any:
    """Check how a refusal states the wait."""
    if isinstance(value, str) and value in SAYS:
        return value
    if type(value) in (int, float) and 0.0 <= value <= DAY_S:
        return float(value)
    wanted = f"must be 'absent', 'ms', 'seconds' or 'oldest', or a fixed number of seconds, 0 to {DAY_S:,.0f}"
    raise ValueError(f"{quoted(value)} {wanted}")


def named_limits(value: Any) -> tuple[tuple[str, float], ...]:
    """Return limits by dimension as pairs, which can be hashed; they are written as a mapping."""
    pairs = value.items() if isinstance(value, dict) else value
    if not isinstance(pairs, tuple | list) and not isinstance(value, dict):
        raise ValueError(f"{quoted(value)} must be limits by dimension, such as ITPM: 30000")
    found = []
    for pair in pairs:
        name, limit = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (pair, 0.0)
        if not isinstance(name, str) or type(limit) not in (int, float) or not 0.0 < limit <= 1e15:
            raise ValueError(f"{quoted(name)}: {quoted(limit)} must be the limit of a dimension, a number above 0")
        found.append((name, float(limit)))
    return tuple(found)


def granted_text(tpm: int, rpm: int, limits: tuple[tuple[str, float], ...]) -> str:
    """Return the limits of an account for people; 0 = no limit per minute."""
    if not limits:
        tokens, requests = (f"{limit:,}" if limit else "no limit on" for limit in (tpm, rpm))
        return f"{tokens} tokens and {requests} requests per minute"
    minute = [(name, float(limit)) for name, limit in (("TPM", tpm), ("RPM", rpm)) if limit]
    return ", ".join(f"{amount_text(limit)} {name}" for name, limit in (*minute, *limits))


def account_quota(
    name: str,
    standard: Mapping[str, float],
    others: Mapping[str, float],
    usd_per_million: tuple[float, float, float],
    phase_s: float,
) -> tuple[Limited, ...]:
    """Return the dimensions of that profile under an account's limits; () = the guardrails' four.

    `standard`: the limits of the four, 0 = none. `usd_per_million`: of input, output and cached input. A simulation
    begins `phase_s` into a minute of the clock, and with a day.
    """
    if name in (OPENAI, GENERIC) and not others:
        return ()
    profile = read_profile(name)
    limits = {each: float(limit) for each, limit in standard.items() if limit}
    if lacking := limits.keys() - profile.dimensions.keys():
        names, has = ", ".join(sorted(lacking)), ", ".join(profile.dimensions)
        raise BadSetting(f"profile {profile.name} has no {names}: its dimensions are {has}")
    per_input, per_output, per_cached = usd_per_million
    price = Price(date.min, per_input, per_cached, per_output)
    found = quota_of(profile, {**limits, **others}, price=price)
    return tuple(replace(each, phase_s=phase_s if each.length_s <= MINUTE_S else 0.0) for each in found)


def over_quota(p: ProviderParams, quota: tuple[Limited, ...]) -> ProviderParams:
    """Return the parameters with a profile's dimensions in place of the guardrails' four, each at its place."""
    if not quota:
        return p
    weights = weights_of(quota)
    p.dimensions = 1 + max(each.place for each in quota)
    p.slice_s = 0.0  # a dimension of its own
    p.per_request, p.per_input = list(weights.per_request), list(weights.per_input)
    p.per_output = list(weights.per_output)
    p.limit, p.header, p.at_answer = (list_of() for _ in range(3))
    for each in quota:
        d = each.place
        p.limit[d], p.header[d], p.at_answer[d] = each.limit, float(each.header), float(each.at_answer)
        p.length_s[d], p.phase_s[d] = each.length_s, each.phase_s
        p.window[d] = float(_KINDS[each.window])
        p.burst_ratio[d] = 1.0 if each.window != law.BUCKET or each.length_s > MINUTE_S else p.burst_ratio[d]
    return p

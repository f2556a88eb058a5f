"""The dimensions of a profile as the law and the synthetic provider count them.

The four that the guardrails' settings name (TPM, RPM, TPD, RPD) keep their places in the law's arrays; others take the
places after them, then free ones among them. A dimension that also holds per slice gets a second one for the slice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from governor import law
from governor.model.errors import BadSetting
from governor.model.needs import Limited
from governor.model.prices import Price
from governor.profiles.schema import Dimension, Profile

STANDARD = {"TPM": law.TPM, "RPM": law.RPM, "TPD": law.TPD, "RPD": law.RPD}
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
            raise BadSetting(f"profile {profile.name} has no dimension {name}: it has {', '.join(profile.dimensions)}")
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
            found.append(_limited(f"{name}_SLICE", places.pop(0), part, share, each.slice_s, 0, price, now_epoch))
    return tuple(found)


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

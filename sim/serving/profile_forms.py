"""Headers, codes and limits of the synthetic provider in a profile's names and formats, as the live half reads them."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from governor.model.requests import Outcome
from governor.profiles.schema import CountHeaders, Profile, TimeFormat
from governor.provider.rate_limit_headers import duration_text
from sim.model import provider as prov
from sim.model.provider import ProviderParams, ProviderState
from sim.serving import wire
from sim.serving.wire import Headers


def time_text(seconds: float, form: TimeFormat, epoch_s: float) -> str:
    """Return a time from now in a profile's format; `epoch_s`: now, seconds since 1970."""
    if form == "seconds":
        return f"{seconds:.3f}".rstrip("0").rstrip(".")
    if form == "milliseconds":
        return f"{math.ceil(seconds * 1000.0 - 1e-6)}"
    if form == "instant":
        return datetime.fromtimestamp(epoch_s + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if form == "epoch":
        return f"{math.ceil(epoch_s + seconds)}"
    return duration_text(wire.floored_ms(seconds))


def profile_headers(
    pp: ProviderParams,
    ps: ProviderState,
    scale: float,
    profile: Profile,
    places: Mapping[str, int],
    epoch_s: float,
) -> Headers:
    """Return the counts as of the last admission, under the names and in the formats of the profile.

    `places`: of its dimensions in the provider's arrays. Of dimensions that share their headers, the requests are those
    of the tighter limit, the tokens those of the minute.
    """
    sharing: dict[CountHeaders, list[int]] = {}
    for name, dimension in profile.dimensions.items():
        if dimension.headers is not None and name in places and pp.limit[places[name]] > 0.0:
            sharing.setdefault(dimension.headers, []).append(places[name])
    headers: Headers = []
    for names, found in sharing.items():
        d = prov.requests_dimension(pp, ps) if set(found) == {prov.RPM, prov.RPD} else min(found)
        headers += [
            (names.limit.encode(), b"%d" % prov.limit_now(pp, ps, d)),
            (names.remaining.encode(), b"%d" % prov.remaining(pp, ps, d)),
        ]
        if names.reset is not None:
            text = time_text(wire.reset_s(pp, ps, d) / scale, names.reset_format, epoch_s)
            headers.append((names.reset.encode(), text.encode()))
    return headers


def throttled_code(profile: Profile) -> str:
    """Return the code of the profile's 429."""
    return next(iter(profile.errors.codes.get(Outcome.THROTTLED, ())), "rate_limit_exceeded")


def profile_wait(profile: Profile, wait_s: float, epoch_s: float) -> Headers:
    """Return a stated wait in the header that the profile names first; none for -1, or if it names no header."""
    place = next((each for each in profile.retry_after if each.header is not None), None)
    if place is None or place.header is None or wait_s < 0.0:
        return []
    form: TimeFormat = "seconds" if place.format == "auto" else place.format
    return [(place.header.encode(), time_text(wait_s, form, epoch_s).encode())]


def limits_body(
    profile: Profile, path: str, pp: ProviderParams, places: Mapping[str, int], models: Sequence[str]
) -> bytes | None:
    """Return the limits of these models as the profile's endpoint states them; None if `path` is not that endpoint."""
    endpoint = profile.limits_endpoint
    if endpoint is None or not fnmatch.fnmatchcase(path, "/v1" + endpoint.path.format(project="?*")):
        return None
    stated = {
        name: round(pp.limit[places[dimension]])
        for dimension, name in endpoint.limits.items()
        if dimension in places and pp.limit[places[dimension]] > 0.0
    }
    if endpoint.entries is None:
        data: list[dict[str, Any]] = [
            {"object": "project.rate_limit", "id": f"rl-{model}", endpoint.models: model, **stated} for model in models
        ]
    else:
        limits = [{"type": name, "value": limit} for name, limit in stated.items()]
        data = [{"type": "rate_limit", endpoint.models: list(models), endpoint.entries: limits}]
    page = {"object": "list", "data": data, "has_more": False, "next_page": None}
    return json.dumps(page).encode()

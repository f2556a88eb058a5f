"""Reads the limits of an account from its provider's own endpoint, which takes an admin key.

Which endpoint, and under which names it states the dimensions, is the profile's `limits_endpoint`. Settings exist for
the guardrails' dimensions alone; the limits of others are shown.
"""

from __future__ import annotations

import fnmatch
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from governor.model.errors import BadSetting, PacelineError
from governor.model.policy import KNOB_BY_ENV
from governor.model.pools import PROJECT, Pool, is_loopback
from governor.profiles.loader import profile_of
from governor.profiles.schema import LimitsEndpoint, Profile

_TIMEOUT_S = 30.0
_PAGES_MAX = 50
_BYTES_MAX = 16 * 2**20
_LIMIT_MAX = 1e15
_OPENAI_URL = "https://api.openai.com/v1"
_ANTHROPIC_VERSION = "2023-06-01"


def account_limits(pool: Pool, environment: Mapping[str, str], model: str) -> dict[str, float] | None:
    """Return the limits that the provider states for a model, by dimension; None without an endpoint or an admin key.

    Raise BadSetting if the project is not named, PacelineError if the endpoint does not answer or knows no such model.
    """
    profile = profile_of(pool)
    endpoint = profile.limits_endpoint
    if endpoint is None or not (key := environment.get(endpoint.key, "").strip()):
        return None
    if not _is_own(pool.base_url, profile):
        raise BadSetting(
            f"{endpoint.key} is an admin key of {profile.title}, and is not sent to {pool.base_url}: unset one of them",
            endpoint.key,
        )
    project = pool.project or environment.get(PROJECT, "").strip()
    if "{project}" in endpoint.path and not project:
        raise BadSetting(f"{endpoint.key} is set, but not the project whose limits to read: set {PROJECT}", PROJECT)
    url = (pool.base_url or profile.base_url or _OPENAI_URL).rstrip("/")
    url += endpoint.path.format(project=urllib.parse.quote(project, safe=""))
    for entry in _entries(url, profile, key):
        if _names(entry.get(endpoint.models), model):
            return _limits_in(entry, endpoint)
    raise PacelineError(f"{url} states no limits of {model}: name a model of the account by --model")


def settings_for(limits: Mapping[str, float]) -> dict[str, str]:
    """Return the limits as settings, by variable, as far as there are settings for them."""
    named = {f"OPENAI_{dimension}_LIMIT": limit for dimension, limit in limits.items()}
    return {
        env: KNOB_BY_ENV[env].text(round(limit)) for env, limit in named.items() if env in KNOB_BY_ENV and limit > 0
    }


def drift(limits: Mapping[str, float], stated: Mapping[str, float]) -> list[str]:
    """Return one remark for each dimension whose limit in the headers is not the endpoint's."""
    return [
        f"the endpoint states {name} {limit:,.0f}, the headers {stated[name]:,.0f}: the account has another limit for "
        "this key, or it has just changed"
        for name, limit in limits.items()
        if name in stated and abs(stated[name] - limit) > 0.01 * limit
    ]


def _is_own(base_url: str, profile: Profile) -> bool:
    """Return whether an address is the provider's own, or on this machine: nobody else may get an admin key."""
    url = base_url.lower().rstrip("/") + "/"
    own = any(fnmatch.fnmatchcase(url, pattern) for pattern in profile.base_urls)
    return not base_url or is_loopback(base_url) or own


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: another host would get the key."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


def _limits_in(entry: Mapping[str, Any], endpoint: LimitsEndpoint) -> dict[str, float]:
    values: dict[str, Any] = dict(entry)
    if endpoint.entries is not None:
        groups = entry.get(endpoint.entries)
        listed = [each for each in groups if isinstance(each, dict)] if isinstance(groups, list) else []
        values = {str(each.get("type")): each.get("value") for each in listed}
    found = {dimension: values.get(name) for dimension, name in endpoint.limits.items()}
    return {name: float(value) for name, value in found.items() if _is_limit(value)}


def _is_limit(value: object) -> TypeGuard[int | float]:
    """Return whether a stated limit can be one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LIMIT_MAX


def _names(stated: object, model: str) -> bool:
    """Return whether an entry is the model's: by its full name, or by that of which it is a dated snapshot."""
    known = stated if isinstance(stated, list) else [stated]
    return any(isinstance(name, str) and (model == name or model.startswith(f"{name}-20")) for name in known)


def _entries(url: str, profile: Profile, key: str) -> Iterator[dict[str, Any]]:
    """Yield the entries of all pages, at most `_PAGES_MAX`."""
    after: dict[str, str] = {}
    for _ in range(_PAGES_MAX):
        page = _page(f"{url}?{urllib.parse.urlencode({'limit': '100', **after})}", profile, key)
        data = page.get("data")
        yield from (each for each in data if isinstance(each, dict)) if isinstance(data, list) else ()
        if isinstance(page.get("next_page"), str):
            after = {"page": page["next_page"]}
        elif page.get("has_more") is True and isinstance(page.get("last_id"), str):
            after = {"after": page["last_id"]}
        else:
            return


def _page(url: str, profile: Profile, key: str) -> dict[str, Any]:
    if profile.api == "anthropic":
        headers = {"x-api-key": key, "anthropic-version": _ANTHROPIC_VERSION}
    else:
        headers = {"Authorization": f"Bearer {key}"}
    place = url.partition("?")[0]
    try:
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
            found = json.loads(response.read(_BYTES_MAX))
    except urllib.error.HTTPError as error:
        remedy = "check the admin key" if error.code in (401, 403) else "check project and address"
        raise PacelineError(f"{place} answers {error.code}: {remedy}") from None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        raise PacelineError(f"{place} cannot be read: {error or type(error).__name__}".splitlines()[0]) from None
    if not isinstance(found, dict):
        raise PacelineError(f"{place} answers without a list of limits: check the address")
    return found

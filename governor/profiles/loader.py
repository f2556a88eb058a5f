"""Find, read, merge and choose profiles: those shipped beside this module, and a user's own files.

A file with `extends: NAME` states only what differs: mappings are merged key by key, lists and values replace those of
the extended profile, and a null removes a key (as in a JSON merge patch, RFC 7396).
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.files import read_yaml
from governor.model.policy import LIMITS
from governor.model.pools import DEFAULT, KEY, PROFILE, Pool, is_loopback, is_name
from governor.model.prices import Price, Prices, read_prices
from governor.profiles.documents import checked
from governor.profiles.quotas import over_profile
from governor.profiles.schema import Profile

FOLDER = Path(__file__).parent
GENERIC = "generic"
OPENAI = "openai"
AZURE = "azure-openai"
_EXTENDS_MAX = 5


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of the shipped profiles, in order of the alphabet."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_profile(stated: str) -> Profile:
    """Return a profile by its name, or by the path of a YAML file.

    Raise BadSetting for a name that is not shipped, BadInput (file, field, value, remedy) for a wrong file.
    """
    if stated in names():
        return _shipped(stated)
    if is_name(stated):
        close = difflib.get_close_matches(stated, names(), 1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(names())}, or a .yaml file of your own"
        raise BadSetting(f"there is no profile {quoted(stated)}: {hint}", PROFILE)
    return _read(Path(stated))


@functools.cache
def _shipped(name: str) -> Profile:
    return _read(FOLDER / f"{name}.yaml")


def _read(path: Path) -> Profile:
    data, name = read_yaml(path), str(path)
    for _ in range(_EXTENDS_MAX):
        base = data.get("extends")
        if base is None:
            break
        if not isinstance(base, str) or base not in names():
            raise BadInput(f"extends={quoted(base)}: must be a shipped profile: {', '.join(names())}", name)
        data = _merged(_without(read_yaml(FOLDER / f"{base}.yaml"), data), {**data, "extends": None})
    try:
        return checked(Profile, data, "")
    except BadSetting as error:
        raise BadInput(str(error), name) from None


def _without(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shipped profile without the limits of those dimensions that the extending file removes."""
    dimensions = own.get("dimensions")
    removed = [name for name, value in dimensions.items() if value is None] if isinstance(dimensions, dict) else []
    stated = [limits for tier in base.get("tiers", ()) for limits in tier["limits"].values()]
    for limits in (*stated, base.get("limits_endpoint", {}).get("limits", {})):
        for name in removed:
            limits.pop(name, None)
    return base


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `own` in place of its own; see the module's docstring."""
    found = dict(base)
    for key, value in own.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = _merged(found[key], value)
        else:
            found[key] = value
    return found


def profile_for(stated: str = "", base_url: str = "", *, azure: bool = False) -> Profile:
    """Return the profile of a pool: the one stated, else that of its base URL, else the generic one.

    `base_url`: "" is OpenAI's own. A server on this machine is a gateway or a test, and is read as generic.
    """
    if stated:
        return read_profile(stated)
    if azure:
        return _shipped(AZURE)
    if not base_url:
        return _shipped(OPENAI)
    if is_loopback(base_url):
        return _shipped(GENERIC)
    url = base_url.lower().rstrip("/") + "/"
    found = (each for each in all_profiles() if any(fnmatch.fnmatchcase(url, pattern) for pattern in each.base_urls))
    return next(found, _shipped(GENERIC))


def profile_of(pool: Pool) -> Profile:
    """Return a pool's profile: see `profile_for`."""
    return profile_for(pool.profile, pool.base_url, azure=pool.azure is not None)


def with_profile(pool: Pool, environment: Mapping[str, str]) -> Pool:
    """Return the pool with what its profile states: the dimensions of its quota, and where the user did not, the
    address and the variable of the key.

    The profile's variable counts if it is set. Raise BadSetting or BadInput for a wrong profile or limit.
    """
    profile = profile_of(pool)
    own_key = pool.key == KEY and bool(environment.get(profile.key, "").strip())
    url = profile.base_url if pool.profile and not pool.base_url and pool.azure is None else None
    pool = with_dimensions(pool)
    return replace(pool, key=profile.key if own_key else pool.key, base_url=pool.base_url if url is None else url)


def with_dimensions(pool: Pool) -> Pool:
    """Return the pool with its policy over the dimensions of its profile (`over_profile`), unless it is over some.

    Raise BadSetting, naming the pool, for a limit that the profile does not have.
    """
    if pool.policy.quota:
        return pool
    profile = profile_of(pool)
    try:
        return replace(pool, policy=over_profile(pool.policy, profile, pool))
    except BadSetting as error:
        of = f"{LIMITS}: " if pool.name == DEFAULT else f"pool {pool.name}: "
        raise BadSetting(f"{of}{error}", LIMITS) from None


def habits_of(stated: str = "", base_url: str = "", *, azure: bool = False) -> str:
    """Return the name or the file of the profile by which a provider is simulated; "" = as OpenAI's."""
    name = stated or profile_for("", base_url, azure=azure).name
    return "" if name in (OPENAI, GENERIC) else name


@functools.cache
def all_profiles() -> tuple[Profile, ...]:
    """Return every shipped profile, the generic one last."""
    return tuple(_shipped(name) for name in sorted(names(), key=lambda name: (name == GENERIC, name)))


def prices_in_force(path: str | None = None, *own: Profile) -> Prices:
    """Return the prices in a user's file, or else those of the profiles, `own` first and then all that are shipped.

    `checked` is then the oldest day on which one of those lists was checked.
    """
    if path is not None:
        return read_prices(path)
    listed = [each for each in (*own, *all_profiles()) if each.prices]
    models: dict[str, tuple[Price, ...]] = {}
    for each in listed:
        for model, prices in each.prices.items():
            models.setdefault(model, prices)
    days = [each.prices_checked for each in listed if each.prices_checked is not None]
    return Prices(models, "", min(days).isoformat() if days else "")

"""Pools: which provider quota a request belongs to, and with which settings, address and key variable it is called.

A pool is one quota: a base URL or an Azure deployment, an organisation or project, and a limit name. It has one law
state. Without a pools file there is a single pool, `default`, made of the OPENAI_* settings and the SDK's own
variables. With a pools file, a line goes to the first pool that has a pattern for its model (`*` stands for any text):

    pools:
      - name: main
        models: ["gpt-4o*"]
        key: OPENAI_API_KEY              # the name of a variable, never a key
        limits: {tpm: 30000, rpm: 500}   # or {tier: gpt-4o-tier1}
        settings: {OPENAI_MAX_CONCURRENCY: 20, OPENAI_TPM_WINDOW: bucket}
      - name: europe
        models: ["gpt-4.1*", "o4-mini"]
        key: AZURE_OPENAI_API_KEY
        azure: {endpoint: https://example.openai.azure.com, deployment: gpt-41, api_version: 2024-10-21}

Settings come from the guardrails' defaults, then the environment or env file, then the pool, then the command line.
`limits` is short for the four OPENAI_*_LIMIT settings of that pool, and names any further dimension of its provider's
profile ({itpm: 30000, otpm: 8000}) or one of its tiers; PACELINE_LIMITS does so without a pools file. `scenario` names
the scenario file of a plan for that pool, relative to the pools file, as PACELINE_SCENARIO does for a run without a
pools file. `profile` names the provider's profile: one that is shipped, or a file beside the pools file; without it the
address chooses one.

Pools of the same `group` have the same `models` and share their requests: each goes where it may be launched first, at
the same moment to the pool that stands first in the file. A pool that is dead (its account is refused, or nobody
answers) leaves its requests to the others.
"""

from __future__ import annotations

import contextlib
import fnmatch
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.estimate import kind_of
from governor.model.files import only_keys, read_yaml
from governor.model.knobs import shown
from governor.model.phrases import whole_number
from governor.model.policy import KNOB_BY_ENV, LIMITS, Policy
from governor.model.work import Sender

DEFAULT = "default"
KEY = "OPENAI_API_KEY"
AZURE_KEY = "AZURE_OPENAI_API_KEY"
BASE_URL = "OPENAI_BASE_URL"
_ORGANIZATION = "OPENAI_ORG_ID"
PROJECT = "OPENAI_PROJECT_ID"
# Sent to a server on this machine if no key is set: the SDK insists on a key, a synthetic provider does not.
NO_KEY = "no-key-is-needed-on-loopback"
_LIMITS = {
    "tpm": "OPENAI_TPM_LIMIT",
    "rpm": "OPENAI_RPM_LIMIT",
    "tpd": "OPENAI_TPD_LIMIT",
    "rpd": "OPENAI_RPD_LIMIT",
}
_KEYS = (
    *("name", "models", "key", "base_url", "organization", "project", "azure", "limits", "settings", "scenario"),
    *("profile", "group"),
)
_AZURE_KEYS = ("endpoint", "deployment", "api_version")

# Names the profile of the provider: one that is shipped, or a file.
PROFILE = "PACELINE_PROFILE"
# Names the Redis server through which processes share their quotas.
REDIS_URL = "PACELINE_REDIS_URL"


@dataclass(frozen=True, slots=True)
class Azure:
    """An Azure deployment; with an empty `deployment`, each request's model is the deployment's name."""

    endpoint: str
    api_version: str
    deployment: str = ""


@dataclass(frozen=True, slots=True)
class Pool:
    """One quota. `base_url`, `organization`, `project`: "" = the SDK's own default. `key`: the *name* of a variable.

    `models`: patterns, in order; empty = every model. `scenario`: the file that says what a plan assumed of this
    quota's provider, for forecasts; "" = none. `profile`: a shipped one's name or a file; "" = the address chooses it.
    `group`: the pools that share their requests with this one; "" = it shares them with none.
    `limits`: those stated for the pool by dimension of the profile; `tier`: the profile's tier that has the others, ""
    = none.
    """

    name: str = DEFAULT
    policy: Policy = field(default_factory=Policy)
    models: tuple[str, ...] = ()
    key: str = KEY
    base_url: str = ""
    organization: str = ""
    project: str = ""
    azure: Azure | None = None
    scenario: str = ""
    profile: str = ""
    group: str = ""
    limits: tuple[tuple[str, float], ...] = ()
    tier: str = ""

    def takes(self, model: str) -> bool:
        """Return whether a request for this model goes to this pool."""
        return not self.models or any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)

    @property
    def address(self) -> str:
        """Return the address to which this pool's requests go, for people; "" = the SDK's default."""
        return self.azure.endpoint if self.azure else self.base_url

    def to_json_dict(self) -> dict[str, Any]:
        """Return the address to which requests go, for the journal: neither settings nor scenario, and no key."""
        return {
            "name": self.name,
            "models": list(self.models),
            "key": self.key,
            "base_url": self.base_url,
            "organization": self.organization,
            "project": self.project,
            "azure": None
            if self.azure is None
            else {
                "endpoint": self.azure.endpoint,
                "api_version": self.azure.api_version,
                "deployment": self.azure.deployment,
            },
        }


Connect = Callable[[Pool], Sender]


def default_pools(policy: Policy, environment: Mapping[str, str], base_url: str = "") -> tuple[Pool, ...]:
    """Return the one pool of a run without a pools file.

    `base_url` (the command line's) wins over the environment's.
    """
    url = base_url or environment.get(BASE_URL, "").strip()
    organization, project = (environment.get(name, "").strip() for name in (_ORGANIZATION, PROJECT))
    profile = environment.get(PROFILE, "").strip()
    limits, tier = limits_of(environment.get(LIMITS, ""))
    pool = Pool(policy=policy, base_url=checked_url(url), organization=organization, project=project, profile=profile)
    return (replace(pool, limits=limits, tier=tier),)


def limits_of(text: str) -> tuple[tuple[tuple[str, float], ...], str]:
    """Return the limits by dimension, and the tier, that a text such as ITPM=30000,OTPM=8k or tier=NAME states.

    Raise BadSetting, naming the word, if it is not of that form.
    """
    words = [word.partition("=") for word in text.split(",") if word.strip()]
    stated = {name.strip(): value.strip() for name, _, value in words}
    if not all(stated.values()) or len(stated) < len(words):
        raise BadSetting(
            f"{LIMITS}={shown(text)}: write each name once, as in ITPM=30000,OTPM=8000 or tier=NAME", LIMITS
        )
    try:
        return _limits(stated)
    except BadSetting as error:
        raise BadSetting(f"{LIMITS}: {error}", LIMITS) from None


def _limits(stated: Mapping[Any, Any]) -> tuple[tuple[tuple[str, float], ...], str]:
    """Return limits by dimension, in capitals, and the tier."""
    limits: dict[str, float] = {}
    tier = ""
    for key, value in stated.items():
        name = str(key).upper()
        if name == "TIER":
            tier = str(value)
            continue
        limit = whole_number(value) if isinstance(value, str) else value
        if isinstance(value, str) and limit is None:
            with contextlib.suppress(ValueError):
                limit = float(value)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0.0 < limit <= 1e15:
            remedy = "write a number above 0, or leave it out if there is no such limit"
            raise BadSetting(f"limit {quoted(name)} is {quoted(value)}: {remedy}")
        if name in limits:
            raise BadSetting(f"limit {quoted(name)} is stated twice")
        limits[name] = float(limit)
    return tuple(limits.items()), tier


def checked_url(url: str, what: str = "base URL") -> str:
    """Return the URL without a trailing slash. Raise BadSetting if it is not an http(s) address."""
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # unmatched brackets, or an invalid port
        good = False
    if not good or not url.isprintable() or " " in url:
        shown = "" if "@" in url else f" {quoted(url)}"  # the text before the @ may be a password
        raise BadSetting(f"{what}{shown} is not an address: write https://HOST/v1", BASE_URL)
    if parts.username or parts.password:
        raise BadSetting(f"the {what} of {parts.hostname} holds a password: put the key into {KEY} instead", BASE_URL)
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """Return whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_of(pool: Pool, environment: Mapping[str, str]) -> str:
    """Return the pool's key from its variable.

    Raise BadSetting, naming the variable, if it is not set or cannot be sent. A server on this machine gets a stand-in,
    so that a synthetic provider needs no set-up.
    """
    key = environment.get(pool.key, "").strip()
    if key:
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise BadSetting(f"{pool.key} contains a character that no key has: copy the key again", pool.key)
        return key
    if is_loopback(pool.address):
        return NO_KEY
    of = "" if pool.name == DEFAULT else f" (the key of pool {quoted(pool.name)})"
    raise BadSetting(f"{pool.key} is not set{of}: export it, or put it into the file named by --env-file", pool.key)


def pool_for(model: str, pools: Iterable[Pool]) -> Pool | None:
    """Return the first pool that takes this model, or None."""
    return next((pool for pool in pools if pool.takes(model)), None)


# ---------------------------------------------------------------- pools.yaml


def read_pools(path: str | Path, base: Policy, assignments: Iterable[str] = ()) -> tuple[Pool, ...]:
    """Return the pools of a file, in its order. Raise BadInput, naming the pool and the key, if an entry is wrong.

    `base`: the settings beneath the pools' own; `assignments`: those that override them.
    """
    name = str(path)
    data = read_yaml(path)
    only_keys(data, ("pools",), "", name)
    stated = data.get("pools")
    if not isinstance(stated, list) or not stated:
        raise BadInput("it has no 'pools': a list of at least one, each with name and models", name)
    assignments = tuple(assignments)
    pools: list[Pool] = []
    for position, entry in enumerate(stated, 1):
        if not isinstance(entry, dict):
            raise BadInput(f"pool {position} is {kind_of(entry)}, not a mapping with name and models", name)
        pool = _pool(entry, position, base, assignments, name)
        if any(other.name == pool.name for other in pools):
            raise BadInput(f"two pools are named {quoted(pool.name)}", name)
        pools.append(pool)
    for members in groups_of(pools):
        first = members[0]
        if len(members) == 1 and first.group:
            raise BadInput(f"pool {first.name}: no other pool has group {quoted(first.group)}: give it to two", name)
        for other in members[1:]:
            if other.models != first.models:
                what = f"pool {other.name}: its models are not those of pool {first.name}, with which it shares"
                raise BadInput(f"{what} group {quoted(first.group)}: state the same patterns", name)
    return tuple(pools)


def groups_of(pools: Iterable[Pool]) -> list[tuple[Pool, ...]]:
    """Return the pools in their order, those together that share their requests."""
    found: dict[str, list[Pool]] = {}
    for pool in pools:
        # (A group's name and a pool's name may be the same text.)
        found.setdefault(f"group {pool.group}" if pool.group else f"pool {pool.name}", []).append(pool)
    return [tuple(members) for members in found.values()]


def _pool(entry: dict[str, Any], position: int, base: Policy, assignments: tuple[str, ...], name: str) -> Pool:
    title = _text(entry, "name", f"pool {position}: ", name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", title):
        raise BadInput(
            f"pool {position}: name is {quoted(title)}: use up to 64 letters, digits, '.', '_' and '-', no mark first",
            name,
        )
    place = f"pool {title}: "
    only_keys(entry, _KEYS, place, name)
    models = entry.get("models")
    if isinstance(models, str):
        models = [models]
    if not isinstance(models, list) or not models or not all(isinstance(m, str) and m for m in models):
        raise BadInput(f"{place}models must be a list of names or patterns, such as [gpt-4o*]", name)
    azure = _azure(entry["azure"], place, name) if entry.get("azure") is not None else None
    if azure and entry.get("base_url"):
        raise BadInput(f"{place}it has both base_url and azure: keep one", name)
    try:
        policy = base.set_values([*_settings(entry, place, name), *assignments])
        # A limit of 0 is no limit; the settings have checked those they name.
        others = {k: v for k, v in (entry.get("limits") or {}).items() if v != 0 or str(k).lower() not in _LIMITS}
        limits, tier = _limits(others)
        url = checked_url(_text(entry, "base_url", place, name, absent=""))
    except BadSetting as error:
        raise BadInput(f"{place}{error}", name) from None
    profile = _text(entry, "profile", place, name, absent="")
    return Pool(
        name=title,
        policy=policy,
        models=tuple(models),
        key=_variable(entry, AZURE_KEY if azure else KEY, place, name),
        base_url=url,
        organization=_text(entry, "organization", place, name, absent=""),
        project=_text(entry, "project", place, name, absent=""),
        azure=azure,
        scenario=_path(_text(entry, "scenario", place, name, absent=""), name),
        profile=profile if is_name(profile) else _path(profile, name),
        group=_text(entry, "group", place, name, absent=""),
        limits=limits,
        tier=tier,
    )


def _path(stated: str, name: str) -> str:
    """Return a path that the file `name` states, relative to the working directory; "" = none."""
    return str(Path(name).parent / stated) if stated else ""


def is_name(profile: str) -> bool:
    """Return whether a profile is meant by its name rather than as a file."""
    return not profile.lower().endswith((".yaml", ".yml"))


def _variable(entry: dict[str, Any], absent: str, place: str, name: str) -> str:
    """Return the name of the key's variable. An invalid name may be the key itself, so it is never repeated."""
    variable = _text(entry, "key", place, name, absent=absent)
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", variable):
        raise BadInput(f"{place}key must be the name of the variable that holds the key, such as {KEY}", name)
    return variable


def _settings(entry: dict[str, Any], place: str, name: str) -> list[str]:
    """Return the pool's own settings as NAME=VALUE words, its limits first."""
    limits, settings = entry.get("limits") or {}, entry.get("settings") or {}
    for key, value in (("limits", limits), ("settings", settings)):
        if not isinstance(value, dict):
            raise BadInput(f"{place}{key} is {kind_of(value)}, not a mapping", name)
    standard = [(_LIMITS[str(key).lower()], value) for key, value in limits.items() if str(key).lower() in _LIMITS]
    words = []
    for env, value in [*standard, *settings.items()]:
        knob = KNOB_BY_ENV.get(str(env))
        if isinstance(value, dict | list) or value is None:
            raise BadInput(f"{place}{env} is {kind_of(value)}, not a value", name)
        words.append(f"{env}={knob.text(value) if knob else value}")
    return words


def _azure(stated: Any, place: str, name: str) -> Azure:
    if not isinstance(stated, dict):
        raise BadInput(f"{place}azure is {kind_of(stated)}, not a mapping with {', '.join(_AZURE_KEYS)}", name)
    only_keys(stated, _AZURE_KEYS, f"{place}azure: ", name)
    place = f"{place}azure: "
    # YAML reads an API version as a date.
    values = {key: str(value) for key, value in stated.items() if value is not None}
    try:
        endpoint = checked_url(_text(values, "endpoint", place, name), "endpoint")
    except BadSetting as error:
        raise BadInput(f"{place}{error}", name) from None
    return Azure(endpoint, _text(values, "api_version", place, name), values.get("deployment", ""))


def _text(entry: Mapping[str, Any], key: str, place: str, name: str, absent: str | None = None) -> str:
    value = entry.get(key)
    if value is None and absent is not None:
        return absent
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{place}{key} is missing" if value is None else f"{place}{key} must be text", name)
    return value.strip()


def check_own_quota(environment: Mapping[str, str]) -> None:
    """Raise BadSetting if a private quota would silently ignore that the quota is to be shared."""
    if environment.get(REDIS_URL, "").strip():
        raise BadSetting(
            f"{REDIS_URL} is set, but Governor() keeps its quota to itself: make it by governor_from_env(os.environ), "
            "which shares it, or with own_quota=True",
            REDIS_URL,
        )


def checked_redis_url(url: str) -> str:
    """Return the URL. Raise BadSetting if it is not a Redis URL; its text is never repeated, it may hold a password."""
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in ("redis", "rediss") and bool(parts.hostname) and parts.port != 0
        is_sound = is_sound and (parts.path.strip("/") or "0").isdecimal()
    except ValueError:
        is_sound = False
    if not is_sound:
        raise BadSetting(f"{REDIS_URL} is not a Redis address: write redis://HOST:6379/0, rediss:// for TLS", REDIS_URL)
    return url

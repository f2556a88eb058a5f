"""Determines whether and under which name a quota is shared, and makes the governor that an environment describes.

Redis itself is in `redis_store`, which the base installation cannot import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from governor.model.errors import BadSetting
from governor.model.pools import REDIS_URL, checked_redis_url

if TYPE_CHECKING:
    from governor.model.pools import Pool
    from governor.scheduler.driver import Governor
    from governor.sharedquota.shared import SharedGovernor

_LOG = logging.getLogger("governor")
_EXTRA = ("hiredis", "msgpack", "redis")


def redis_url(environment: Mapping[str, str]) -> str:
    """Return the URL of the Redis that pools are shared through; "" = not shared. Raise BadSetting if unusable."""
    url = environment.get(REDIS_URL, "").strip()
    if url:
        checked_redis_url(url)
        if any(importlib.util.find_spec(name) is None for name in _EXTRA):
            text = f"{REDIS_URL} is set, and sharing a quota needs paceline[redis]: pip install 'paceline[redis]'"
            raise BadSetting(text, REDIS_URL)
    return url


def pool_key(pool: Pool) -> str:
    """Return a pool's name in the store: its name, and a digest of its address, organisation and project."""
    digest = hashlib.sha256("\n".join((pool.address, pool.organization, pool.project)).encode()).hexdigest()[:8]
    return f"{pool.name}:{digest}"


def governor_from_env(
    environment: Mapping[str, str],
    pool: Pool | None = None,
    *,
    say: Callable[[str], None] = _LOG.warning,
    **options: Any,
) -> Governor:
    """Return the governor that an environment describes, for use in a program. Call it inside a running event loop.

    Its settings are those of the OPENAI_* variables (or of `pool`), and its quota is shared if PACELINE_REDIS_URL is
    set; `aclose` it at the end. `say`: called with a line when Redis is lost and when it is back, by default the log.
    `options`: as for `Governor`. Raises BadSetting if a variable cannot be obeyed.
    """
    from governor.model.policy import Policy
    from governor.model.pools import default_pools
    from governor.profiles.loader import with_dimensions
    from governor.scheduler.driver import Governor  # imported here because reading a URL does not need it

    if pool is None:
        (pool,) = default_pools(Policy.from_env(environment), environment)
    pool = with_dimensions(pool)
    if url := redis_url(environment):
        return shared_governor(pool, url, say, **options)
    return Governor(pool.policy, pool=pool.name, own_quota=True, **options)


def shared_governor(
    pool: Pool, url: str, say: Callable[[str], None], *, time_scale: float = 1.0, **options: Any
) -> SharedGovernor:
    """Return the governor of a pool that is shared through that Redis. Raise BadSetting if its limits are sought."""
    if pool.policy.find_limits != "none":
        text = (
            f"pool '{pool.name}': OPENAI_FIND_LIMITS={pool.policy.find_limits} does not work on a quota shared through"
        )
        text += f" {REDIS_URL}: set OPENAI_FIND_LIMITS=none and the limits, or unset {REDIS_URL}"
        raise BadSetting(text, "OPENAI_FIND_LIMITS")
    from governor.sharedquota.redis_store import in_redis
    from governor.sharedquota.shared import SharedGovernor  # both modules need an optional dependency

    governor = SharedGovernor(
        pool.policy.params(),
        store=in_redis(url, pool_key(pool), scale=time_scale),
        say=say,
        time_scale=time_scale,
        pool=pool.name,
        **options,
    )
    governor.policy = pool.policy
    return governor

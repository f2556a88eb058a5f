"""Whether a quota is shared with other processes, and by which name; makes the governor that an environment describes.

Redis itself is in `store`, which the base installation lacks.
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
EXTRA = ("hiredis", "msgpack", "redis")


def redis_url(environment: Mapping[str, str]) -> str:
    """The URL of the Redis through which pools are shared; "" = they are not. BadSetting for one that cannot serve."""
    url = environment.get(REDIS_URL, "").strip()
    if url:
        checked_redis_url(url)
        if any(importlib.util.find_spec(name) is None for name in EXTRA):
            text = f"{REDIS_URL} is set, and sharing a quota needs paceline[redis]: pip install 'paceline[redis]'"
            raise BadSetting(text, REDIS_URL)
    return url


def pool_key(pool: Pool) -> str:
    """What a pool is called in the store: its name, and a digest of its quota's address, organisation and project."""
    digest = hashlib.sha256("\n".join((pool.address, pool.organization, pool.project)).encode()).hexdigest()[:8]
    return f"{pool.name}:{digest}"


def governor_from_env(
    environment: Mapping[str, str],
    pool: Pool | None = None,
    *,
    say: Callable[[str], None] = _LOG.warning,
    **options: Any,
) -> Governor:
    """The governor that an environment describes, for a program of one's own. Make it inside a running event loop.

    Its settings are the OPENAI_* variables' (or the `pool`'s), and its quota is shared where PACELINE_REDIS_URL is set;
    `aclose` it in the end. `say`: told in a line when Redis is away and when it is back, by default the log.
    `options`: as for `Governor`. BadSetting where a variable cannot be obeyed.
    """
    from governor.model.policy import Policy
    from governor.model.pools import default_pools
    from governor.scheduler.driver import Governor  # what is not needed to read a URL

    if pool is None:
        (pool,) = default_pools(Policy.from_env(environment), environment)
    if url := redis_url(environment):
        return shared_governor(pool, url, say, **options)
    return Governor(pool.policy, pool=pool.name, own_quota=True, **options)


def shared_governor(
    pool: Pool, url: str, say: Callable[[str], None], *, time_scale: float = 1.0, **options: Any
) -> SharedGovernor:
    """The governor of a pool that is shared through that Redis."""
    from governor.sharedquota.redis_store import in_redis
    from governor.sharedquota.shared import SharedGovernor  # what these two need is an extra

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

"""Whether a quota is shared with other processes, and by which name: what can be said before anything is connected.

What lives here: the variable that switches it on, its check, and a pool's name in the store. What must not: Redis
(`store`), which the base installation lacks.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from urllib.parse import urlsplit

from governor.model.errors import BadSetting
from governor.model.pools import Pool

REDIS_URL = "PACELINE_REDIS_URL"
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


def checked_redis_url(url: str) -> str:
    """The URL; BadSetting where it is none of Redis. What it holds is never repeated: a password may be in it."""
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in ("redis", "rediss") and bool(parts.hostname) and parts.port != 0
        is_sound = is_sound and (parts.path.strip("/") or "0").isdecimal()
    except ValueError:
        is_sound = False
    if not is_sound:
        raise BadSetting(f"{REDIS_URL} is no address of Redis: write redis://HOST:6379/0, rediss:// for TLS", REDIS_URL)
    return url


def pool_key(pool: Pool) -> str:
    """What a pool is called in the store: its name, and a digest of its quota's address, organisation and project."""
    digest = hashlib.sha256("\n".join((pool.address, pool.organization, pool.project)).encode()).hexdigest()[:8]
    return f"{pool.name}:{digest}"

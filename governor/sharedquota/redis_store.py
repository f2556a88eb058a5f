"""Redis access for a shared pool: the only module that imports redis.

Keys. All keys of a pool begin with `paceline:{POOL}:`, so that a Redis Cluster holds them in one place: `image`;
`inbox`, a list of batches of events; `leases`, until when each owner lives; `to:OWNER:N`, a list of news for an owner's
N-th entry; `recovery`, where owners meet when the image has been lost; `bell`, which calls them there.

Time is the server's own: every answer states it, read within the same script.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from redis import exceptions as broken
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from governor.model.errors import BadSetting, PacelineError
from governor.model.pools import REDIS_URL, checked_redis_url
from governor.sharedquota.image import HEAD, SERVER_BYTES
from governor.sharedquota.interfaces import LEASE_S, Server, StoreLostError, StoreReading

# How long an unused pool is kept: longer than the longest window, a day. Then, how long unfetched news is kept.
KEPT_S = 2 * 86_400
NEWS_KEPT_S = 60
# The number of processes that hear the bell at once.
BELLS = 100
CONNECT_S = 5.0
ANSWER_S = 10.0
BLOCK_S = 20.0
# No valid lease is beyond this, in milliseconds since 1970: the year 2286.
LEASE_MAX = 1e13

# Each script first removes values of a wrong type under the pool's keys, since it would fail as long as they exist.
# `read` returns time, image, inbox and leases of one moment.
_READ = """
local types = {'string', 'list', 'zset', 'hash', 'list'}
for i, key in ipairs(KEYS) do
  local found = redis.call('TYPE', key).ok
  if found ~= 'none' and found ~= (types[i] or 'list') then
    redis.call('DEL', key)
  end
end
local function read(now)
  local leases = redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES')
  return {now[1], now[2], redis.call('GET', KEYS[1]) or '', redis.call('LRANGE', KEYS[2], 0, -1), leases}
end
"""
# Append a batch if there is an image of this server, renew the lease, read. ARGV: server, owner, lease, batch.
_TELL = f"""{_READ}
local now = redis.call('TIME')
redis.call('ZADD', KEYS[3], now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[3], ARGV[2])
if ARGV[4] ~= '' and redis.call('GETRANGE', KEYS[1], 0, {SERVER_BYTES - 1}) == ARGV[1] then
  redis.call('RPUSH', KEYS[2], ARGV[4])
end
return read(now)
"""
# If the image is still the named one, replace it, remove that many batches from the inbox, and tell the owners of
# KEYS 6 and on; else read. A missing image may have been rebuilt and lost again since, so -1 batches are accepted only
# from an owner whose record of the recovery is there. ARGV: head, image, batches, seconds, seconds, owner, news.
_REPLACE = f"""{_READ}
if redis.call('GETRANGE', KEYS[1], 0, {HEAD.size - 1}) ~= ARGV[1]
    or ARGV[3] == '-1' and redis.call('HEXISTS', KEYS[4], ARGV[6]) == 0 then
  return read(redis.call('TIME'))
end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[4])
if ARGV[3] == '-1' then
  redis.call('DEL', KEYS[2], KEYS[4], KEYS[5])
else
  redis.call('LTRIM', KEYS[2], ARGV[3], -1)
end
local now = redis.call('TIME')[1]
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', (now - ARGV[5]) * 1000)
for i = 6, #KEYS do
  redis.call('RPUSH', KEYS[i], ARGV[i + 1])
  redis.call('EXPIRE', KEYS[i], ARGV[5])
end
return 1
"""
# Leave a record for the rebuilding of the image, unless that is done, ring for all that wait for news, and read.
# ARGV: server, owner, lease, record, seconds, head of an invalid image, whether to remove that image.
_RECOVERY = f"""{_READ}
local now = redis.call('TIME')
local head = redis.call('GETRANGE', KEYS[1], 0, {HEAD.size - 1})
if string.sub(head, 1, {SERVER_BYTES}) == ARGV[1] and head ~= ARGV[6] then
  return {{read(now), {{}}}}
end
if head == ARGV[6] and ARGV[7] == '1' then
  redis.call('DEL', KEYS[1])
end
redis.call('ZADD', KEYS[3], now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[3], ARGV[2])
redis.call('HSETNX', KEYS[4], '', now[1] * 1000 + math.floor(now[2] / 1000))
redis.call('HSET', KEYS[4], ARGV[2], ARGV[4])
redis.call('EXPIRE', KEYS[4], ARGV[5])
for i = redis.call('LLEN', KEYS[5]) + 1, {BELLS} do
  redis.call('RPUSH', KEYS[5], '')
end
redis.call('EXPIRE', KEYS[5], ARGV[5])
return {{read(now), redis.call('HGETALL', KEYS[4])}}
"""

# Errors that a user has to fix; any other error means that the store is unavailable right now.
REFUSED = (broken.AuthenticationError, broken.AuthorizationError, broken.NoPermissionError)
MISTAKES = ("unknown command", "DB index is out of range", "wrong number of arguments", "invalid DB index")


class _WrongTypeError(Exception):
    """Foreign data lies under one of our keys."""


class RedisStore:
    """One process's connections to the keys of one pool: a `interfaces.QuotaStore`.

    `scale`: the speed of the event loop's clock relative to the machine's.
    """

    def __init__(self, url: str, pool: str, owner: str, *, lease_s: float, scale: float = 1.0) -> None:
        self._url = checked_redis_url(url)
        self._owner = owner
        self._lease_ms = round(lease_s * 1000)
        self._scale = scale
        self._prefix = f"paceline:{{{pool}}}:"
        self._keys = [self._prefix + name for name in ("image", "inbox", "leases", "recovery", "bell")]
        self._at: tuple[str, int] | None = None  # the node of a cluster that holds the keys, once known
        self._client: Redis | None = None
        self._blocking: Redis | None = None
        self._server = b""
        self._shas: dict[str, str] = {}

    @property
    def place(self) -> str:
        """Host and port, for messages; never the password."""
        parts = urlsplit(self._url)
        host, port = self._at or (parts.hostname, parts.port or 6379)
        return f"Redis at {host}:{port}"

    async def connect(self) -> Server:
        """Connect anew, and return the answering server."""
        await self.close()
        self._client = self._made(ANSWER_S)
        self._blocking = self._made(BLOCK_S + ANSWER_S)
        await self._called(self._client.exists(self._keys[0]))  # a cluster's node may redirect us to another
        info = await self._called(self._client.info("server"))
        self._server = str(info.get("run_id", "")).encode()[:40].ljust(40, b"\0")
        self._shas = {}
        return Server(self._server.rstrip(b"\0"), float(info.get("uptime_in_seconds", 0.0)))

    def _made(self, answer_s: float) -> Redis:
        url = self._url
        if self._at is not None:
            parts = urlsplit(url)
            user, at, _ = parts.netloc.rpartition("@")
            host = f"[{self._at[0]}]" if ":" in self._at[0] else self._at[0]
            url = parts._replace(netloc=f"{user}{at}{host}:{self._at[1]}").geturl()
        connections = 0

        async def greet(connection: Any) -> None:
            # A client that reconnects by itself may reach another server, whose data differs from what we know.
            nonlocal connections
            connections += 1
            if connections > 1:
                raise broken.ConnectionError("the connection was closed")
            await connection.on_connect()

        return Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=greet,
            socket_timeout=answer_s * self._scale,
            socket_connect_timeout=CONNECT_S * self._scale,
        )

    async def close(self) -> None:
        """Close the connections."""
        for client in (self._client, self._blocking):
            if client is not None:
                with contextlib.suppress(broken.RedisError, OSError, TimeoutError):
                    async with asyncio.timeout(CONNECT_S * self._scale):
                        await client.aclose()
        # Forgotten only now: if this was cancelled, the next call closes what is left.
        self._client = self._blocking = None

    async def _called(self, answer: Any) -> Any:
        try:
            return await answer
        except REFUSED as error:
            text = (
                f"{self.place} refuses us ({str(error).rstrip('.')}): look at the user and the password in {REDIS_URL}"
            )
            raise BadSetting(text, REDIS_URL) from None
        except broken.MovedError as error:
            self._at = error.host or str(urlsplit(self._url).hostname), error.port
            raise StoreLostError("the cluster keeps this pool on another node") from None
        except broken.NoScriptError:
            raise
        except (broken.RedisError, OSError, TimeoutError) as error:
            self._at = None  # the next attempt goes to the configured address
            text = str(error) or type(error).__name__
            if text.startswith("WRONGTYPE"):
                raise _WrongTypeError from None
            if any(each in text for each in MISTAKES):
                raise PacelineError(f"{self.place}: {text}") from None
            raise StoreLostError(text) from None

    async def _run(self, script: str, keys: Sequence[str], *arguments: object) -> Any:
        client = self._client
        assert client is not None
        for _ in range(3):
            sha = self._shas.get(script)
            if sha is None:
                sha = self._shas[script] = await self._called(client.script_load(script))
            try:
                return await self._called(client.evalsha(sha, len(keys), *keys, *arguments))  # type: ignore[arg-type]
            except broken.NoScriptError:
                self._shas = {}
        raise StoreLostError("it forgets scripts as soon as they are loaded")

    # ------------------------------------------------------------ the store interface

    async def tell(self, batch: bytes) -> StoreReading:
        """See `interfaces.QuotaStore`."""
        return _reading(await self._run(_TELL, self._keys[:3], self._server, self._owner, self._lease_ms, batch))

    async def replace(
        self, head: bytes, image: bytes, taken: int, news: Mapping[tuple[str, int], bytes]
    ) -> StoreReading | None:
        """See `interfaces.QuotaStore`."""
        keys = [*self._keys, *(self._list(*to) for to in news)]
        answer = await self._run(_REPLACE, keys, head, image, taken, KEPT_S, NEWS_KEPT_S, self._owner, *news.values())
        return None if answer == 1 else _reading(answer)

    async def recovery(self, record: bytes, doubted: bytes, *, removes: bool) -> tuple[StoreReading, dict[str, bytes]]:
        """See `interfaces.QuotaStore`."""
        arguments = self._server, self._owner, self._lease_ms, record, NEWS_KEPT_S, doubted, int(removes)
        answer, pairs = await self._run(_RECOVERY, self._keys, *arguments)
        names = [name.decode(errors="replace") for name in pairs[::2]]
        return _reading(answer), dict(zip(names, pairs[1::2], strict=True))

    async def news(self, entry: int) -> list[bytes]:
        """See `interfaces.QuotaStore`."""
        client = self._blocking
        assert client is not None
        key = self._list(self._owner, entry)
        try:
            first = await self._called(client.blpop([key, self._keys[4]], BLOCK_S))
            if first is None:
                return []
            more = await self._called(client.lpop(key, 1000))
        except _WrongTypeError:
            # The empty news triggers a turn, which notices what was lost.
            await self._called(client.delete(key, self._keys[4]))
            return [b""]
        return [first[1], *(more or [])]

    def _list(self, owner: str, entry: int) -> str:
        return f"{self._prefix}to:{owner}:{entry}"


def _reading(answer: Any) -> StoreReading:
    seconds, microseconds, image, inbox, leases = answer
    names = [name.decode(errors="replace") for name in leases[::2]]
    until = dict(zip(names, (int(min(max(float(score), 0.0), LEASE_MAX)) for score in leases[1::2]), strict=True))
    return StoreReading(int(seconds) * 1_000_000 + int(microseconds), image, inbox, until)


def in_redis(url: str, pool: str, *, lease_s: float = LEASE_S, scale: float = 1.0) -> Callable[[str], RedisStore]:
    """Return a function that makes a pool's store, given the owner's name. Raise BadSetting for a bad URL.

    Rehearsals on faster clocks have a pool of their own: a process that came later would find its time standing still.
    """
    checked_redis_url(url)
    name = pool if scale == 1.0 else f"{pool}:x{scale:g}"
    return lambda owner: RedisStore(url, name, owner, lease_s=lease_s, scale=scale)

"""A provider that writes down each attempt as it comes, and what would have come of launches that take no time."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from sim.model import provider as limiter
from sim.model.provider_config import ProviderConfig
from sim.serving.server import Provider, ProviderThread

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One attempt at the provider: when it came, seconds since 1970, and the status that it was answered with."""

    name: str
    at: float
    status: int


class _Recorded(Provider):
    seen: list[Seen]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name = dict(scope["headers"]).get(b"x-client-request-id", b"").decode()
        if scope["method"] != "POST" or not name:
            await super().__call__(scope, receive, send)
            return
        at = time.time()

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.seen.append(Seen(name, at, message["status"]))
            await send(message)

        await super().__call__(scope, receive, told)


def _serve(config: dict[str, Any], options: dict[str, Any], end: Connection) -> None:
    provider = _Recorded(ProviderConfig.model_validate(config), **options)
    provider.seen = []
    running = ProviderThread(provider, 0)
    end.send(running.port)
    end.recv()
    end.send((provider.seen, provider.stats()))


class RecordedProvider:
    """See the module. A context manager; `record()` once, at the end."""

    def __init__(self, config: ProviderConfig, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(config.model_dump(), options, theirs), daemon=True)
        self._process.start()
        theirs.close()
        assert self._end.poll(WAIT_S), "the provider does not start"
        self.base_url = f"http://127.0.0.1:{self._end.recv()}/v1"

    def record(self) -> tuple[list[Seen], dict[str, Any]]:
        """What came, and what `GET /_stats` says."""
        self._end.send(None)
        assert self._end.poll(WAIT_S), "the provider does not answer"
        found: tuple[list[Seen], dict[str, Any]] = self._end.recv()
        return found

    def __enter__(self) -> RecordedProvider:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join(WAIT_S)
        self._end.close()


@dataclass(frozen=True, slots=True)
class Explained:
    """Of the 429s of a run: how many there were, how many there would have been with no time between the decision and
    the provider, and that time, seconds of the wall's clock: half of the attempts, and the longest."""

    throttled: int
    unaided: int
    path_s_p50: float
    path_s_max: float


def explained(
    config: ProviderConfig, seen: list[Seen], sent: Mapping[str, tuple[float, float, float]], scale: float
) -> Explained:
    """`sent`: by name: tokens, the moment of the decision on clocks `scale` times as fast, when its process heard."""
    params, state = config.params(), limiter.ProviderState()
    first = min(decided for _, decided, _ in sent.values())
    unaided = 0
    for tokens, decided, _ in sorted(sent.values(), key=lambda each: each[1]):
        outcome, *_ = limiter.admitted(params, state, 0, tokens, decided - first)
        unaided += outcome != limiter.OK
    paths_s = [each.at - sent[each.name][2] for each in seen]
    throttled = sum(each.status == 429 for each in seen)
    return Explained(throttled, unaided, statistics.median(paths_s), max(paths_s))

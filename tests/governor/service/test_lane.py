"""What a pool, and a replica, says of itself when nothing is launched."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.service.api.routes_rest import readyz
from governor.service.worker.lane import Lane
from governor.service.worker.worker import Worker


@pytest.mark.parametrize(
    ("governor", "blocked", "says"),
    [
        ({}, "", ""),
        ({"hold_s": 411_480.0}, "", "pool default: a 429 asked for a wait: nothing is launched for 4 d 18 h, until "),
        ({"hold_s": 5.0}, "", ""),
        ({"backoff_s": 300.0}, "", "pool default: requests wait for 5 min"),
        ({"is_connected": True}, "", ""),
        ({"is_connected": False}, "", "pool default: the Redis of PACELINE_REDIS_URL cannot be used"),
        ({}, "INSUFFICIENT_QUOTA", "pool default: INSUFFICIENT_QUOTA"),
    ],
)
def test_readiness_names_a_pool_that_launches_nothing(governor: dict[str, Any], blocked: str, says: str) -> None:
    rest: dict[str, Any] = dict.fromkeys(("recorder", "meter", "alarms", "waits", "series", "feed", "send"))
    now_s = 1_000.0
    held = SimpleNamespace(hold_until=now_s + governor.pop("hold_s", -now_s), probe_at=-math.inf)
    backs_off = (now_s + governor.pop("backoff_s", float("inf")), -float("inf"))
    bare: Any = SimpleNamespace(**governor, s=held, now=lambda: now_s, backing_off=lambda: backs_off)
    lane = Lane(pool=Pool(), policy=Policy(), governor=bare, blocked=blocked, **rest)
    worker = SimpleNamespace(ready=True, neighbours=0, lanes={"default": lane})
    service: Any = SimpleNamespace(worker=worker, config=SimpleNamespace(redis="redis://127.0.0.1"))
    answer = asyncio.run(readyz(service))
    assert answer.status_code == 200
    assert f'"detail":"{says}'.encode() in bytes(answer.body)


class _Refused(Worker):
    """A replica whose lives end with what its operator has to mend."""

    def __init__(self) -> None:
        config: Any = SimpleNamespace(time_scale=1.0)
        self.config = config
        self.trouble = ""
        self._stopping = asyncio.Event()

    async def _life(self) -> None:
        self._stopping.set()
        raise BadSetting("Redis at 10.0.0.1:6379 refuses us: look at the password in PACELINE_REDIS_URL")


def test_what_the_operator_has_to_mend_is_no_internal_error() -> None:
    worker = _Refused()
    asyncio.run(worker.run())
    assert worker.trouble.endswith("look at the password in PACELINE_REDIS_URL")

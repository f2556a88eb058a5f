"""Processes that share one quota, as tests and benchmarks start them: each with a governor of its own, all at once.

A `Crew` forks its workers from a process that has imported everything, so that many start within moments. All wait for
each other before the first asks for anything; what each did comes back as `Did`.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.synchronize import Barrier
from typing import Any

from governor.model.keyed import attempt_key
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.requests import CHAT, Answer, Attempt, Outcome, Request, Sizes, read_requests, url_of
from governor.model.work import Job, Observer, Work, work_of
from governor.provider.sending import PoolSender
from governor.run.scaledloop import ScaledLoop
from governor.scheduler.driver import Governor
from governor.sharedquota.redis_store import in_redis
from governor.sharedquota.shared import SharedGovernor
from tests.live import line

WAIT_S = 120.0
SIZES = Sizes(CHAT, 10, 40, 0, 1, 0, 0, 1, 10)
ANSWERED = Answer(Outcome.OK, 200, used_prompt_tokens=10, used_output_tokens=5, has_text=True)


@dataclass(frozen=True, slots=True)
class Order:
    """What each worker does. `url`: of Redis, "" = each has the quota to itself, as it believes. `scale`: of its clock.

    With `base_url`, `requests` requests of about `tokens` tokens each are sent there by the SDK. Without, `for_s`
    seconds of launches that are answered after `service_s`, as many as are granted, or with `every_s`, one permit each.
    """

    settings: dict[str, Any]
    url: str = ""
    base_url: str = ""
    requests: int = 0
    tokens: int = 1_000
    scale: float = 1.0
    for_s: float = 0.0
    service_s: float = 0.0
    every_s: float = 0.0


@dataclass(slots=True)
class Did:
    """What one worker did. Times in seconds since all began, on the worker's clock.

    `launches`: when it launched, and which request; `waits_s`: how long each permit took to be granted. `sent`: by the
    id under which the provider knows an attempt: tokens reserved, the pool's time of the decision (its own, where
    nothing is shared), and when this process heard of it, seconds since 1970.
    """

    index: int
    launches: list[tuple[float, int]] = field(default_factory=list)
    sent: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    waits_s: list[float] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    failed: int = 0
    throttled: int = 0
    last_s: float = 0.0
    cpu_s: float = 0.0
    why: str = ""
    said: list[str] = field(default_factory=list)
    began_at: float = 0.0


class _Watch(Observer):
    def __init__(self, did: Did) -> None:
        self.did = did
        self.name_of: Callable[[Job], str] | None = None
        self.zero_s: Callable[[], float] = lambda: 0.0

    def launched(self, job: Job, now: float) -> None:
        self.did.launches.append((asyncio.get_running_loop().time() - self.did.began_at, job.index))
        if self.name_of is not None:
            self.did.sent[self.name_of(job)] = (job.reserve, now + self.zero_s(), time.time())

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self.did.throttled += attempt.outcome in (Outcome.THROTTLED, Outcome.SLOW_DOWN)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        if failure:
            self.did.failed += 1
        else:
            self.did.answered.append(request.index)
        self.did.last_s = asyncio.get_running_loop().time() - self.did.began_at


def _governor(order: Order, policy: Policy, did: Did, name_of: Callable[[Job], str] | None = None) -> Governor:
    watch = _Watch(did)
    watch.name_of = name_of
    if not order.url:
        return Governor(policy.params(), observer=watch)
    governor = SharedGovernor(
        policy.params(),
        store=in_redis(order.url, "default:test", scale=order.scale),
        time_scale=order.scale,
        observer=watch,
        say=did.said.append,
    )
    watch.zero_s = lambda: governor.shared.zero_s
    return governor


async def _all_ready(governor: Governor, ready: Barrier, did: Did) -> None:
    """Until every worker is a member of the pool."""
    until = time.monotonic() + WAIT_S
    while isinstance(governor, SharedGovernor) and not governor.is_connected:
        assert time.monotonic() < until, "the pool cannot be entered"
        await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, ready.wait, WAIT_S)
    did.began_at = loop.time()


async def _sends(order: Order, ready: Barrier, did: Did) -> None:
    """A batch against a provider."""
    policy = Policy(**order.settings)
    pool = Pool(policy=policy, base_url=order.base_url)
    prompt = 100
    lines = (
        line(f"q-{i}", text="x" * (4 * prompt), cap=order.tokens - prompt + (i * 37) % 200 - 100)
        for i in range(order.requests)
    )
    found = list(read_requests((json.dumps(each) for each in lines), "batch"))
    works = [work_of(request, policy) for request in found]
    send = PoolSender(pool, {})
    adapter = send._adapter
    governor = _governor(
        order, policy, did, lambda job: adapter.client_request_id(job.index, attempt_key(job.lane, job.tries))
    )
    # The first request of a process takes a tenth of a second more, which sped-up clocks would make seconds.
    await adapter._lanes[0].client.models.list()
    await _all_ready(governor, ready, did)
    did.why = await governor.run(iter(works), send)
    await governor.aclose()
    await send.aclose()


async def _launches(order: Order, ready: Barrier, did: Did) -> None:
    """As many launches as are granted, for a while."""
    policy = Policy(**order.settings)
    governor = _governor(order, policy, did)
    await _all_ready(governor, ready, did)
    until = did.began_at + order.for_s

    def works() -> Iterator[Work]:
        loop = asyncio.get_running_loop()
        for i in count():
            if loop.time() >= until:
                return
            yield Work(Request(i, f"q-{i}", url_of(CHAT), "m", None, SIZES), 100.0)

    async def send(job: Job, timeout_s: float) -> Answer:
        await asyncio.sleep(order.service_s)
        return ANSWERED

    cpu_s = time.process_time()
    did.why = await governor.run(works(), send)
    did.cpu_s = time.process_time() - cpu_s
    await governor.aclose()


async def _permits(order: Order, ready: Barrier, did: Did) -> None:
    """A permit every so many seconds, whether the last was granted or not."""
    governor = _governor(order, Policy(**order.settings), did)
    await _all_ready(governor, ready, did)
    loop = asyncio.get_running_loop()

    async def one(i: int) -> None:
        asked = loop.time()
        async with governor.permit(100.0) as permit:
            did.waits_s.append(loop.time() - asked)
            did.launches.append((loop.time() - did.began_at, i))
            await asyncio.sleep(order.service_s)
            permit.used(50.0)
        did.answered.append(i)

    tasks = []
    # Workers take turns within the interval.
    await asyncio.sleep(order.every_s * (did.index % 8) / 8)
    for i in range(int(order.for_s / order.every_s)):
        tasks.append(loop.create_task(one(i)))
        await asyncio.sleep(max(0.0, did.began_at + order.every_s * (i + 1 + (did.index % 8) / 8) - loop.time()))
    await asyncio.gather(*tasks)
    await governor.aclose()


def _work(index: int, order: Order, ready: Barrier, results: Any) -> None:
    did = Did(index)
    way = _sends if order.base_url else _permits if order.every_s else _launches
    try:
        with asyncio.Runner(loop_factory=lambda: ScaledLoop(order.scale)) as runner:
            runner.run(way(order, ready, did))
    except BaseException as error:
        did.why = f"{type(error).__name__}: {error}"
        ready.abort()
        raise
    finally:
        results.put(did)


class Crew:
    """Workers under way. A context manager; `done()` waits for them."""

    def __init__(self, workers: int, order: Order) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.sharing_preload"])
        self._results = context.Queue()
        self._ready = context.Barrier(workers)
        self.workers = [
            context.Process(target=_work, args=(i, order, self._ready, self._results), daemon=True)
            for i in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join(WAIT_S)
        self._results.close()

    def done(self, wait_s: float = WAIT_S) -> list[Did]:
        """What each did, in order of the workers."""
        found = [self._results.get(timeout=wait_s) for _ in self.workers]
        for worker in self.workers:
            worker.join(WAIT_S)
        return sorted(found, key=lambda did: did.index)


def shares(found: list[Did]) -> list[float]:
    """Launches by worker until the first has launched all of its own, each over an equal share."""
    until = min(max(at for at, _ in did.launches) for did in found)
    counts = [sum(at <= until for at, _ in did.launches) for did in found]
    return [each * len(counts) / sum(counts) for each in counts]

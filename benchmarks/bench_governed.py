"""A client of one's own, governed, beside the bare one: what is lost, how long it takes, and what it costs.

    python -m benchmarks.bench_governed [--short] [--seeds 3] [--time-scale 5]

**The case**: a provider of 30,000 tokens per minute (continuous bucket, charged prompt + max_tokens at admission), 60
requests of 250 to 2,500 tokens, sent by the official SDKs over HTTP on loopback: awaited, streamed, from 20 threads, by
Anthropic's SDK, and by LangChain's chat model. Bare, 20 at once, with each SDK's own two retries; governed, all at
once, by `governed(client)` with the provider's limits. All clocks run five times as fast, so the figures are seconds of
their time. Each client has asked for the list of models before, since what it loads with its first call would be sped
up too. For each: lost, 429s, and the makespan over the bound, below which no scheduler can go. Last, two processes with
half of the requests each, which share the quota through a Redis of their own.

**The cost**: no limit binds, 50 in flight; requests per second, bare, governed and in shadow mode in turn, each round
beside the others; and, one at a time, how long a stream's first event takes. Twice: with answers at once, where the
client's own CPU is all there is, and with answers after 0.2 s, sooner than any model's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from typing import Any, TypeVar

from anthropic import AnthropicError, AsyncAnthropic
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI, OpenAIError

from benchmarks.bench_live_peers import CASES, REQUESTS, RPM, TOKENS, TPM, provider
from benchmarks.live_batch import RULE, Case, bound, drawn
from governor import Governor, Policy, governed
from governor.model.pools import Pool
from governor.run.governed import SHADOW_JOURNAL
from governor.run.scaledloop import ScaledLoop
from governor.scheduler import portal
from governor.sharedquota.sharing import shared_governor
from sim.base.layout import table
from sim.model.provider_config import ProviderConfig
from sim.serving.server import spawn
from tests.servers import RedisServer

CASE = next(iter(CASES))
SCALE_MOST = 10.0
SCALE = 5.0
AT_ONCE = 1
IN_FLIGHT = 20
KEY = "no-key-is-needed"
# Promised of the governed: none lost, at most one 429, and at most this makespan over the bound.
RATIO_MOST = 1.06
SHARED_RATIO_MOST = 1.08
# Promised of the cost: throughput of at least this part of the bare client's, and a first event at most so much later.
THROUGHPUT_LEAST = 0.95
SHADOW_LEAST = 0.97
DELAY_MOST_S = 0.001
COST_IN_FLIGHT = 50
C = TypeVar("C")


def policy() -> Policy:
    """What somebody sets who knows the provider: it does not charge what it refuses."""
    return Policy.preset("paceline").with_(
        max_concurrency=IN_FLIGHT, stagger_seconds=0.0, tpm_limit=TPM, tpm_headroom=0.01, rpm_limit=RPM,
        charge_rule=RULE, settle=False, refund_throttled=True,
    )  # fmt: skip


# ---------------------------------------------------------------- the case


@dataclass(frozen=True, slots=True)
class Ran:
    """What one client made of one batch. `ratio`: makespan over bound."""

    name: str
    governs: bool
    seed: int
    lost: int
    throttled: int
    ratio: float


async def plain(client: AsyncOpenAI, body: dict[str, Any]) -> None:
    """One awaited call."""
    await client.chat.completions.create(**body)


async def streamed(client: AsyncOpenAI, body: dict[str, Any]) -> None:
    """One streamed call, read to its end."""
    async for _ in await client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        pass


async def messages(client: AsyncAnthropic, body: dict[str, Any]) -> None:
    """One call of Anthropic's SDK."""
    await client.messages.create(**body)


async def chatted(model: ChatOpenAI, body: dict[str, Any]) -> None:
    """Make one call of LangChain's chat model."""
    await model.ainvoke(body["messages"], max_tokens=body["max_tokens"])


class Hurried(OpenAI):
    """A blocking client whose own backoff is on the sped-up clock."""

    scale = 1.0

    def _calculate_retry_timeout(self, *args: Any, **keywords: Any) -> float:
        return super()._calculate_retry_timeout(*args, **keywords) / self.scale


Way = Callable[[Any, dict[str, Any]], Awaitable[None]]
WAYS: dict[str, tuple[type[Any], Way]] = {
    "AsyncOpenAI": (AsyncOpenAI, plain),
    "AsyncOpenAI, streaming": (AsyncOpenAI, streamed),
    "AsyncAnthropic": (AsyncAnthropic, messages),
    "LangChain's ChatOpenAI": (ChatOpenAI, chatted),
}
THREADS = "OpenAI in 20 threads"
TWO = "AsyncOpenAI, two processes"


async def awaited(name: str, governs: bool, url: str, batch: Sequence[Case]) -> list[float]:
    """When each was answered, seconds of the loop's clock; -1 = lost."""
    kind, way = WAYS[name]
    address = url.removesuffix("/v1") if kind is AsyncAnthropic else url
    # A chat model is bound to one model's name; its SDK lists the models.
    client = kind(api_key=KEY, base_url=address, **({"model": batch[0].body["model"]} if kind is ChatOpenAI else {}))
    sdk = client.root_async_client if kind is ChatOpenAI else client
    if governs:
        governed(client, Governor(policy()))
    loop = asyncio.get_running_loop()
    free = asyncio.Semaphore(REQUESTS if governs else IN_FLIGHT)
    await sdk.models.list()
    begun = loop.time()

    async def one(case: Case) -> float:
        async with free:
            try:
                await way(client, case.body)
            except (OpenAIError, AnthropicError):
                return -1.0
        return loop.time() - begun

    async with sdk:
        return await asyncio.gather(*(one(case) for case in batch))


def threaded(governs: bool, url: str, batch: Sequence[Case], scale: float) -> list[float]:
    """The same from threads."""
    client = Hurried(api_key=KEY, base_url=url)
    client.scale = scale
    if governs:
        governed(client, Governor(policy()))
    client.models.list()
    begun = time.monotonic()

    def one(case: Case) -> float:
        try:
            client.chat.completions.create(**case.body)
        except OpenAIError:
            return -1.0
        return (time.monotonic() - begun) * scale

    with ThreadPoolExecutor(IN_FLIGHT) as pool, client:
        return list(pool.map(one, batch))


def ran(name: str, governs: bool, seed: int, scale: float) -> Ran:
    """One client, one batch, one provider."""
    batch = drawn(seed, REQUESTS, TOKENS)
    with spawn(provider(CASE), seed=seed, time_scale=scale, stated_time="provider") as server:
        if name == THREADS:
            portal.new_loop = lambda: ScaledLoop(scale)
            ends = threaded(governs, server.base_url, batch, scale)
        else:
            with asyncio.Runner(loop_factory=lambda: ScaledLoop(scale)) as runner:
                ends = runner.run(awaited(name, governs, server.base_url, batch))
        throttled = server.stats()["outcomes"].get("throttled", 0)
    return Ran(name, governs, seed, ends.count(-1.0), throttled, max(ends) / bound(provider(CASE), batch))


def half(url: str, store: str, seed: int, scale: float, part: int, together: Any, ends: Any) -> None:
    """One of two processes: sends every second request, and says when it began and when each was answered."""
    batch = drawn(seed, REQUESTS, TOKENS)[part::2]

    async def main() -> list[float]:
        governor = shared_governor(Pool(policy=policy()), store, lambda line: None, time_scale=scale)
        async with governed(AsyncOpenAI(api_key=KEY, base_url=url), governor) as client:
            await client.models.list()
            await asyncio.to_thread(together.wait)
            at = [time.monotonic()]

            async def one(case: Case) -> float:
                try:
                    await plain(client, case.body)
                except OpenAIError:
                    return -1.0
                return time.monotonic()

            at += await asyncio.gather(*(one(case) for case in batch))
        await governor.aclose()
        return at

    with asyncio.Runner(loop_factory=lambda: ScaledLoop(scale)) as runner:
        ends.put(runner.run(main()))


def ran_by_two(seed: int, scale: float) -> Ran:
    """Two processes, one quota."""
    processes = get_context("spawn")
    together, ends = processes.Barrier(2), processes.Queue()
    batch = drawn(seed, REQUESTS, TOKENS)
    redis = RedisServer()
    with spawn(provider(CASE), seed=seed, time_scale=scale, stated_time="provider") as server:
        given = (server.base_url, redis.url, seed, scale)
        crew = [processes.Process(target=half, args=(*given, part, together, ends)) for part in (0, 1)]
        for each in crew:
            each.start()
        told = [ends.get(timeout=300) for _ in crew]
        for each in crew:
            each.join()
        throttled = server.stats()["outcomes"].get("throttled", 0)
    redis.stop()
    answered = [at for each in told for at in each[1:]]
    makespan_s = (max(answered) - min(each[0] for each in told)) * scale
    return Ran(TWO, True, seed, answered.count(-1.0), throttled, makespan_s / bound(provider(CASE), batch))


def peer_case(seeds: range, scale: float) -> bool:
    """Its table; whether the governed did as promised."""
    names = [*WAYS, THREADS]
    orders = [(name, governs, seed) for name in names for governs in (False, True) for seed in seeds]
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as pool:
        done = list(pool.map(ran, *zip(*orders, strict=True), [scale] * len(orders)))
    done += [ran_by_two(seed, scale) for seed in seeds]
    rows = [["client", "", f"lost of {REQUESTS}", "429s", "makespan / bound, median", "worst"]]
    good = True
    for name in (*names, TWO):
        for governs in (False, True) if name != TWO else (True,):
            runs = [each for each in done if (each.name, each.governs) == (name, governs)]
            lost, drawn_429 = ([f"{min(n)} to {max(n)}" if min(n) != max(n) else str(n[0])][0] for n in (
                [each.lost for each in runs], [each.throttled for each in runs]))  # fmt: skip
            ratios = [each.ratio for each in runs]
            rows.append([name, "governed" if governs else "bare", lost, drawn_429])
            rows[-1] += [f"{median(ratios):.3f}", f"{max(ratios):.3f}"]
            if governs:
                most = SHARED_RATIO_MOST if name == TWO else RATIO_MOST
                good &= all(not each.lost and each.throttled <= 1 and each.ratio <= most for each in runs)
    print(f"seeds {seeds.start} to {seeds.stop - 1}, clocks {scale:g} times as fast")
    print(table(rows))
    limits = f"{RATIO_MOST:g} times the bound ({SHARED_RATIO_MOST:g} by two processes)"
    print(f"governed: none lost, at most one 429 and {limits}: {'met' if good else 'MISSED'}")
    return good


# ---------------------------------------------------------------- what it costs


def free_policy() -> Policy:
    """No limit binds, all of them are decided on."""
    return Policy.preset("paceline").with_(
        max_concurrency=10_000, stagger_seconds=0.0, tpm_limit=2_000_000_000, rpm_limit=10_000_000, charge_rule=RULE
    )


BODY = {"model": "gpt-4o", "max_tokens": 100, "messages": [{"role": "user", "content": "How are you? " * 40}]}


async def throughput(client: AsyncOpenAI, count: int) -> tuple[float, float]:
    """Requests per second of wall time, and per second of this process's CPU time."""
    free = asyncio.Semaphore(COST_IN_FLIGHT)

    async def one() -> None:
        async with free:
            await plain(client, BODY)

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


async def first_event_s(client: AsyncOpenAI) -> float:
    """How long a stream's first event takes."""
    begun = time.perf_counter()
    stream = await client.chat.completions.create(**BODY, stream=True)  # type: ignore[call-overload]
    await anext(aiter(stream))
    took_s = time.perf_counter() - begun
    await stream.close()
    return took_s


async def costs(url: str, words: str, rounds: int, count: int) -> bool:
    """Print the table of a server described by `words`; return whether it is as promised."""
    clients = [AsyncOpenAI(api_key=KEY, base_url=url) for _ in range(3)]
    governed(clients[1], Governor(free_policy()))
    governed(clients[2], mode="shadow")
    for client in clients:
        await throughput(client, COST_IN_FLIGHT)
    pace: list[list[tuple[float, float]]] = [[], [], []]
    for i in range(rounds):
        # Each in turn is the first of a round, whose machine is the coldest.
        for k in (i % 3, (i + 1) % 3, (i + 2) % 3):
            pace[k].append(await throughput(clients[k], count))
    firsts: list[list[float]] = [[], [], []]
    for _ in range(rounds * 40):
        for k, client in enumerate(clients):
            firsts[k].append(await first_event_s(client))
    for client in clients:
        await client.close()
    rows = [[words, "bare", "governed", "in shadow mode", "governed / bare", "shadow / bare"]]
    ratio = [
        [median(each[of] / beside[of] for each, beside in zip(pace[k], pace[0], strict=True)) for of in (0, 1)]
        for k in (1, 2)
    ]
    for of, name in enumerate(("requests/s", "requests per CPU second")):
        figures = [f"{median(each[of] for each in found):,.0f}" for found in pace]
        rows.append([name, *figures, f"{ratio[0][of]:.3f}", f"{ratio[1][of]:.3f}"])
    first_s = [median(found) for found in firsts]
    later = [f"{(each - first_s[0]) * 1e3:+.2f}" for each in first_s[1:]]
    rows.append(["first event, ms", *(f"{each * 1e3:.2f}" for each in first_s), *later])
    print(table(rows))
    good = ratio[0][0] >= THROUGHPUT_LEAST and ratio[1][0] >= SHADOW_LEAST and first_s[1] - first_s[0] < DELAY_MOST_S
    promised = (
        f"at least {THROUGHPUT_LEAST:g} of the throughput ({SHADOW_LEAST:g} in shadow mode), a first event less than "
        f"{DELAY_MOST_S * 1e3:g} ms later"
    )
    print(f"{promised}: {'met' if good else 'MISSED'}")
    return good


def main(words: list[str]) -> int:
    """The tables on standard output; 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(prog="bench_governed")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--time-scale", type=float, default=SCALE)
    parser.add_argument("--only", choices=("case", "cost"))
    given = parser.parse_args(words)
    if not 0.0 < given.time_scale <= SCALE_MOST:
        parser.error(f"--time-scale must be above 0 and at most {SCALE_MOST:g}")
    begun = time.monotonic()
    good = True
    if given.only != "cost":
        good &= peer_case(range(1, 1 + (given.seeds or (1 if given.short else 3))), given.time_scale)
    if given.only != "case":
        with tempfile.TemporaryDirectory() as folder:
            os.environ[SHADOW_JOURNAL] = f"{folder}/shadow.jsonl"
            for words, first_s in (("answers at once", 0.0), ("answers after 0.2 s", 0.2)):
                latency = {"first_token_s": first_s, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
                with spawn(ProviderConfig().with_(tpm=0, rpm=0, latency=latency)) as server:
                    rounds, sent = (5, 200) if given.short else (15, 500)
                    good &= asyncio.run(costs(server.base_url, words, rounds, sent))
    print(f"{time.monotonic() - begun:.0f} s")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

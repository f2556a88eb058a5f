"""Other ways to keep a batch of calls within a limit of tokens per minute: what is installed or written in place of us.

All send through the official SDK with its own retries (ten, where nothing else is said) and at most 20 in flight, know
the provider's charge of each request exactly, and run in an event loop whose clock is sped up as the provider's is: the
SDK, tenacity and aiolimiter read only that clock, pyrate-limiter is given it.

Left out: litellm's Router, which wants 120 MB of packages beside it; openlimit, which has had no release since 2023;
limiters without weights, which cannot count tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pyrate_limiter
from aiolimiter import AsyncLimiter
from openai import APIError, AsyncOpenAI, RateLimitError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

CONCURRENCY = 20
RETRIES = 10
HEADROOM = 0.05

# What a contender does with one request: (body, charge) -> its answer, or an exception.
Call = Callable[[dict[str, Any], int], Awaitable[object]]
Contender = Callable[[AsyncOpenAI, int], Call]


def sdk(client: AsyncOpenAI, tpm: int) -> Call:
    """The SDK's ten retries behind a semaphore."""
    del tpm
    free = asyncio.Semaphore(CONCURRENCY)

    async def call(body: dict[str, Any], charge: int) -> object:
        async with free:
            return await client.chat.completions.create(**body)

    return call


def cookbook(client: AsyncOpenAI, tpm: int) -> Call:
    """tenacity as OpenAI's cookbook shows it: six attempts, a random exponential wait of 1 to 60 s; no SDK retries."""
    del tpm
    free = asyncio.Semaphore(CONCURRENCY)
    once = client.with_options(max_retries=0)

    async def call(body: dict[str, Any], charge: int) -> object:
        async with free:
            async for attempt in AsyncRetrying(
                wait=wait_random_exponential(min=1, max=60),
                stop=stop_after_attempt(6),
                retry=retry_if_exception_type(RateLimitError),
                reraise=True,
            ):
                with attempt:
                    return await once.chat.completions.create(**body)
        raise AssertionError("tenacity returns or raises")

    return call


def aiolimiter(client: AsyncOpenAI, tpm: int) -> Call:
    """The ten-line baseline: a leaky bucket of tokens with 5 % headroom."""
    free = asyncio.Semaphore(CONCURRENCY)
    tokens = AsyncLimiter(tpm * (1.0 - HEADROOM), 60.0)

    async def call(body: dict[str, Any], charge: int) -> object:
        async with free:
            await tokens.acquire(charge)
            return await client.chat.completions.create(**body)

    return call


class _LoopClock(pyrate_limiter.AbstractClock):  # type: ignore[misc, unused-ignore]
    """The event loop's clock, in milliseconds."""

    def now(self) -> int:
        return int(asyncio.get_running_loop().time() * 1_000)


def pyrate(client: AsyncOpenAI, tpm: int) -> Call:
    """pyrate-limiter's token bucket, weighted, with the same headroom."""
    free = asyncio.Semaphore(CONCURRENCY)
    rate = pyrate_limiter.Rate(int(tpm * (1.0 - HEADROOM)), 60_000)
    bucket = pyrate_limiter.StateBucket([rate], pyrate_limiter.TokenBucket(), clock=_LoopClock())
    # A bucket of constant size needs no thread that empties it.
    limiter = pyrate_limiter.Limiter(pyrate_limiter.SingleBucketFactory(bucket, schedule_leak=False))

    async def call(body: dict[str, Any], charge: int) -> object:
        async with free:
            await limiter.try_acquire_async("tpm", charge)
            return await client.chat.completions.create(**body)

    return call


CONTENDERS: dict[str, Contender] = {
    "SDK, 10 retries": sdk,
    "tenacity (cookbook)": cookbook,
    "aiolimiter": aiolimiter,
    "pyrate-limiter": pyrate,
}


async def run(contender: Contender, base_url: str, tpm: int, work: Sequence[tuple[dict[str, Any], int]]) -> list[float]:
    """Sends all requests (body, charge); when each was answered, seconds of the loop's clock, -1 = it was lost."""
    loop = asyncio.get_running_loop()
    async with AsyncOpenAI(api_key="no-key-is-needed", base_url=base_url, max_retries=RETRIES) as client:
        call = contender(client, tpm)
        begun = loop.time()

        async def one(body: dict[str, Any], charge: int) -> float:
            try:
                await call(body, charge)
            except APIError:
                return -1.0
            return loop.time() - begun

        return await asyncio.gather(*(one(body, charge) for body, charge in work))

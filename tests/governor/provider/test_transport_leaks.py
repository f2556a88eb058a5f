"""However a governed call ends (cancelled, timed out, dropped, broken off), it leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections.abc import AsyncIterator
from math import inf
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from governor import Governor, Policy, governed, law
from governor.model.needs import of_tokens
from governor.provider import responses
from tests.strangers import chat, chat_stream
from tests.virtual_loop import run_virtual

POLICY = Policy().with_(
    stagger_s=0.05,
    tpm_limit=60_000,
    rpm_limit=600,
    tpd_limit=40_000_000,
    charge_rule="prompt_plus_max",
    tpm_window="bucket",
    backoff_base_s=0.5,
    max_concurrency=8,
    retry_max_attempts=3,
)
MESSAGES: Any = [{"role": "user", "content": "How are you?"}]
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


class Body(httpx2.AsyncByteStream):
    """A body that comes in pieces, on virtual time, and may break off."""

    def __init__(self, server: Server, pieces: list[bytes], breaks: bool, pause_s: float) -> None:
        self.server, self.pieces, self.breaks, self.pause_s = server, pieces, breaks, pause_s
        server.open.add(id(self))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            await asyncio.sleep(self.pause_s)
            yield piece
        if self.breaks:
            raise httpx2.ReadError("broken off")

    async def aclose(self) -> None:
        self.server.open.discard(id(self))


class Server(httpx2.AsyncBaseTransport):
    """A provider in this process, of whose answers some fail in each way that one can. `open`: bodies not closed."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.open: set[int] = set()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        rng = self.rng
        await asyncio.sleep(rng.expovariate(2.0))
        fate = rng.random()
        if fate < 0.06:
            raise rng.choice((httpx2.ConnectError, httpx2.ReadTimeout, httpx2.PoolTimeout))("no")
        if fate < 0.18:
            status = rng.choice((429, 500, 400, 503))
            body = json.dumps({"error": {"message": "no", "code": None}}).encode()
            return self.response(status, "application/json", [body], False)
        breaks = fate < 0.25
        if json.loads(request.content).get("stream"):
            pieces = chat_stream("Hel", "lo", usage=USAGE if fate < 0.6 else None)
            if fate > 0.95:
                pieces[1:] = [b'data: {"error": {"message": "overloaded", "type": "server_error", "code": null}}\n\n']
            return self.response(200, "text/event-stream", pieces[: 2 if breaks else None], breaks)
        return self.response(200, "application/json", [json.dumps(chat()[2]).encode()], breaks)

    def response(self, status: int, kind: str, pieces: list[bytes], breaks: bool) -> httpx2.Response:
        body = Body(self, pieces, breaks, self.rng.expovariate(4.0))
        return httpx2.Response(status, headers={"content-type": kind}, stream=body)


async def call(client: AsyncOpenAI, rng: random.Random) -> None:
    """One call as some program makes it, which may lose interest at any moment."""
    fate = rng.random()
    if fate < 0.4:
        await client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=rng.randint(1, 800))
        return
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    if fate < 0.5:
        return  # never looked at
    if fate < 0.6:
        await stream.close()
        return
    async for _ in stream:
        if fate < 0.75:
            return  # left in the midst, and not closed


async def impatient(client: AsyncOpenAI, rng: random.Random) -> None:
    """The same with a time-out, or without."""
    try:
        async with asyncio.timeout(rng.expovariate(0.3) if rng.random() < 0.4 else None):
            await call(client, rng)
    except (TimeoutError, openai.APIError, httpx2.HTTPError):
        pass


async def story(count: int, seed: int) -> None:
    rng = random.Random(seed)
    server = Server(rng)
    governor = Governor(POLICY)
    governed_client = governed(
        AsyncOpenAI(api_key="k", base_url="http://127.0.0.1/v1", http_client=httpx2.AsyncClient(transport=server)),
        governor,
    )
    governed_client._platform = "Linux"  # else looked up in a thread, which a virtual loop does not wait for
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(impatient(governed_client, rng)))
        await asyncio.sleep(rng.expovariate(8.0))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        assert governor.in_flight <= POLICY.max_concurrency
    for task in rng.sample(tasks, count // 10):
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [end for end in ends if isinstance(end, Exception)] == []
    gc.collect()  # streams that nobody holds any more
    await asyncio.sleep(1.0)
    assert governor.in_flight == 0
    assert governor.may_move
    assert server.open == set()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    # What was booked flows back by itself, and nothing is left of it.
    await asyncio.sleep(2 * law.DAY_S)
    governor.pause()
    governor.resume()
    now = governor.now()
    assert [law.used_in(governor.p, governor.s, d, now) for d in range(4)] == [0.0] * 4
    assert governor.s.full_at[law.TPM] <= now
    assert (governor.s.finalize_open, governor.s.in_flight) == (0, 0)
    for tokens in (governor.p.budget[law.TPM], 1.0):
        assert law.admit_at(governor.p, governor.s, of_tokens(tokens), law.FIRST, now) == now < inf
    await governed_client.close()


@pytest.fixture(autouse=True)
def own_watch(monkeypatch) -> None:
    """Idle streams are looked after on this test's loop: else by the loop of an earlier test, on another time."""
    monkeypatch.setattr(responses, "_idle", responses._Idle())


def told(count: int, seed: int) -> None:
    print(f"seed {seed}")
    run_virtual(story(count, seed))


def test_random_cancellations_time_outs_and_dropped_streams_leave_nothing() -> None:
    told(300, random.randrange(1_000_000))


@pytest.mark.long
def test_ten_thousand_leave_nothing() -> None:
    for _ in range(10):
        told(1_000, random.randrange(1_000_000))

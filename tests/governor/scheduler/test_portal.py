"""One governor used from several event loops, from threads, after a fork: where it is at home, and what it leaves."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from governor import Governor, Policy, governed
from governor.scheduler.portal import background_loop
from tests.live import WAIT_S
from tests.strangers import Stranger, chat, chat_stream, stranger

POLICY = Policy().with_(stagger_s=0, tpm_limit=1_000_000, max_concurrency=3)
MESSAGES: Any = [{"role": "user", "content": "How are you?"}]


def blocking(server: Stranger, governor: Governor) -> OpenAI:
    return governed(OpenAI(api_key="k", base_url=server.base_url), governor)


def ask(client: OpenAI) -> str | None:
    return client.chat.completions.create(model="m", messages=MESSAGES).choices[0].message.content


async def ask_async(server: Stranger, governor: Governor) -> str | None:
    async with governed(AsyncOpenAI(api_key="k", base_url=server.base_url), governor) as client:
        return (await client.chat.completions.create(model="m", messages=MESSAGES)).choices[0].message.content


def in_threads(count: int, what: Callable[[], Any]) -> list[Any]:
    """What it returns in each of so many threads at once."""
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(what())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return results


def test_threads_share_a_quota_and_never_more_than_the_cap_are_in_flight() -> None:
    governor = Governor(POLICY)
    now: list[int] = []
    lock = threading.Lock()
    most = [0]
    all_there = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        with lock:
            now.append(1)
            most[0] = max(most[0], len(now))
            if len(now) == 3:
                all_there.set()
        all_there.wait(WAIT_S)
        threading.Event().wait(0.02)
        with lock:
            now.pop()
        return chat()

    with stranger(answer) as server, blocking(server, governor) as client:
        assert in_threads(20, lambda: ask(client)) == ["fine"] * 20
    assert most[0] == 3
    assert governor.in_flight == 0


def test_several_loops_and_threads_at_once_share_one_governor() -> None:
    governor = Governor(POLICY)
    with stranger(lambda body: chat()) as server, blocking(server, governor) as client:
        turn = iter(range(100))

        def one() -> Any:
            return ask(client) if next(turn) % 2 else asyncio.run(ask_async(server, governor))

        assert in_threads(10, one) == ["fine"] * 10
    assert governor.in_flight == 0
    assert governor.loop is background_loop()


def test_a_loop_that_ends_with_a_stream_open_leaves_nothing_for_the_next() -> None:
    governor = Governor(POLICY.with_(max_concurrency=1))
    held: list[Any] = []

    async def leaves(server: Stranger) -> None:
        client = governed(AsyncOpenAI(api_key="k", base_url=server.base_url), governor)
        held.append(await client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
        assert governor.in_flight == 1
        await client.close()

    with stranger(lambda body: (200, {}, chat_stream("a")) if body.get("stream") else chat()) as server:
        asyncio.run(leaves(server))
        assert asyncio.run(ask_async(server, governor)) == "fine"
    assert governor.in_flight == 0
    held.clear()


def test_a_blocking_call_inside_a_running_loop_is_answered_as_in_a_notebook() -> None:
    governor = Governor(POLICY)

    async def cell(server: Stranger) -> list[str | None]:
        first = await ask_async(server, governor)
        assert governor.loop is asyncio.get_running_loop()
        with blocking(server, governor) as client:
            second = ask(client)
        return [first, second, await ask_async(server, governor)]

    with stranger(lambda body: chat()) as server:
        assert asyncio.run(cell(server)) == ["fine"] * 3


def test_where_a_blocking_call_would_wait_for_ever_it_says_so() -> None:
    governor = Governor(POLICY)

    async def main(server: Stranger) -> None:
        with blocking(server, governor) as client:
            async with governor.permit(1.0):
                with pytest.raises(openai.BadRequestError, match=r"a blocking call in the event loop .*to_thread"):
                    ask(client)
                assert await asyncio.to_thread(ask, client) == "fine"

    with stranger(lambda body: chat()) as server:
        asyncio.run(main(server))
    assert governor.in_flight == 0


def test_a_child_of_a_fork_holds_nothing_of_its_parent() -> None:
    governor = Governor(POLICY.with_(max_concurrency=1))
    with stranger(lambda body: (200, {}, chat_stream("a")) if body.get("stream") else chat()) as server:
        client = blocking(server, governor)
        stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        assert governor.in_flight == 1
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with blocking(server, governor) as own:
                    code = 0 if ask(own) == "fine" and governor.in_flight == 0 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert governor.in_flight == 1
        stream.close()
        assert ask(client) == "fine"
        client.close()
    assert governor.in_flight == 0

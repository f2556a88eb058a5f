"""A governed client against servers that are not ours: what it sends, waits for, tries again, and hands on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from governor import Governor, Policy, governed
from governor.model.requests import Answer, Attempt, Outcome
from governor.model.work import Observer
from tests.live import WAIT_S
from tests.strangers import Reply, Stranger, chat, chat_stream, error, event, stranger

QUICK = Policy().with_(
    stagger_s=0, tpm_limit=1_000_000, charge_rule="prompt_plus_max", backoff_base_s=0.02, max_concurrency=50
)
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
MESSAGES: Any = [{"role": "user", "content": "How are you?"}]


def script(*replies: Reply) -> Callable[[dict[str, Any]], Reply]:
    """Answers in turn, the last one for ever."""
    left = list(replies)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def quiet(governor: Governor) -> None:
    """Nothing is held any more."""
    assert governor.in_flight == 0
    assert governor.may_move


class Told(Observer):
    """What is heard of attempts: outcomes, and the tokens used."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.used: list[tuple[int, int]] = []

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        self.outcomes.append(answer.outcome)
        self.used.append((answer.used_prompt_tokens, answer.used_output_tokens))


def asked(server: Stranger, governor: Governor, **more: Any) -> Any:
    """One plain call of an asynchronous client."""

    async def main() -> Any:
        async with governed(AsyncOpenAI(api_key="k", base_url=server.base_url), governor) as client:
            return await client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=20, **more)

    return asyncio.run(main())


def test_a_throttled_call_is_tried_again_by_the_law_and_ends_as_the_client_knows_it() -> None:
    told = Told()
    governor = Governor(QUICK, observer=told)
    with stranger(
        script(error(429, "slow down", "rate_limit_exceeded", Retry_After="0.02"), error(500, "oops"), chat("hello"))
    ) as server:
        answer = asked(server, governor)
    assert type(answer).__name__ == "ChatCompletion"
    assert answer.choices[0].message.content == "hello"
    assert told.outcomes == [Outcome.THROTTLED, Outcome.SERVER_ERROR, Outcome.OK]
    assert told.used[-1] == (9, 3)
    assert server.bodies == [server.bodies[0]] * 3
    quiet(governor)


def test_what_cannot_pass_is_not_tried_again_and_raises_the_clients_own_exception() -> None:
    governor = Governor(QUICK)
    with stranger(script(error(404, "no such model", "model_not_found"))) as server:
        with pytest.raises(openai.NotFoundError, match="no such model"):
            asked(server, governor)
        assert len(server.bodies) == 1
    quiet(governor)


def test_retries_of_a_wrapper_add_up_and_do_not_multiply() -> None:
    governor = Governor(QUICK.with_(retry_max_attempts=3))

    with stranger(script(error(429, "slow down", "rate_limit_exceeded", Retry_After="0.02"))) as server:
        client = governed(OpenAI(api_key="k", base_url=server.base_url, max_retries=4), governor)
        for _ in range(4):
            with pytest.raises(openai.RateLimitError, match="slow down"):
                client.chat.completions.create(model="m", messages=MESSAGES)
        assert len(server.bodies) == 3 + 1 + 1 + 1
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="another", messages=MESSAGES)
        assert len(server.bodies) == 6 + 3
        client.close()
    quiet(governor)


def test_a_stream_is_passed_on_chunk_by_chunk_and_ends_the_permit_when_it_ends() -> None:
    told = Told()
    governor = Governor(QUICK, observer=told)
    seen = threading.Event()

    def rest() -> bytes:
        assert seen.wait(WAIT_S)  # the first chunk has arrived before the last is sent
        return event("[DONE]")

    async def main(server: Stranger) -> None:
        async with governed(AsyncOpenAI(api_key="k", base_url=server.base_url), governor) as client:
            texts = []
            stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            async for chunk in stream:
                assert governor.in_flight == 1
                texts += [choice.delta.content for choice in chunk.choices if choice.delta.content]
                seen.set()
            assert texts == ["Hel", "lo"]

    with stranger(script((200, {}, [*chat_stream("Hel", "lo", usage=USAGE)[:-1], rest]))) as server:
        asyncio.run(main(server))
    assert told.outcomes == [Outcome.OK]
    assert told.used == [(9, 3)]
    quiet(governor)


def test_a_stream_without_usage_is_estimated_by_what_was_read() -> None:
    told = Told()
    governor = Governor(QUICK, observer=told)
    with stranger(script((200, {}, chat_stream("x" * 400, "y" * 40)))) as server:
        client = governed(OpenAI(api_key="k", base_url=server.base_url), governor)
        with client:
            for _ in client.chat.completions.create(model="m", messages=MESSAGES, stream=True):
                pass
    assert told.used == [(10, 110)]
    quiet(governor)

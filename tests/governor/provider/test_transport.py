"""A governed client against servers that are not ours: what it sends, waits for, tries again, and hands on."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from governor import Governor, PacelineError, Policy, governed, law
from governor.model.errors import BadSetting
from governor.model.requests import Answer, Attempt, Outcome
from governor.model.work import Observer
from governor.run import governed as module
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


def test_an_error_inside_a_stream_is_heard_and_not_tried_again() -> None:
    told = Told()
    governor = Governor(QUICK, observer=told)
    inside = event({"error": {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}})
    with stranger(script((200, {}, [*chat_stream("a")[:1], inside]))) as server:
        client = governed(OpenAI(api_key="k", base_url=server.base_url), governor)
        with client, pytest.raises(openai.APIError, match="slow down"):
            list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
        assert len(server.bodies) == 1
    assert told.outcomes == [Outcome.THROTTLED]
    quiet(governor)


def test_a_stream_that_breaks_off_is_heard_as_dropped() -> None:
    told = Told()
    governor = Governor(QUICK, observer=told)
    with stranger(script((200, {}, [*chat_stream("a")[:1], None]))) as server:
        client = governed(OpenAI(api_key="k", base_url=server.base_url), governor)
        with client, pytest.raises((httpx2.TransportError, openai.APIError)):
            list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    assert told.outcomes == [Outcome.DROPPED]
    quiet(governor)


def test_anthropic_is_read_in_its_own_words() -> None:
    told = Told()
    governor = Governor(QUICK, observer=told)
    usage = {"input_tokens": 11, "output_tokens": 1}
    message = {"id": "m", "type": "message", "role": "assistant", "model": "c", "stop_reason": None, "usage": usage}
    whole = {**message, "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn"}
    events = [
        ("message_start", {"message": {**message, "content": []}}),
        ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
        ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "hi"}}),
        ("content_block_stop", {"index": 0}),
        ("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}}),
        ("message_stop", {}),
    ]
    chunks = [event({"type": name, **data}, name) for name, data in events]
    overloaded = (
        529,
        {"Retry-After": "0.02"},
        {"type": "error", "error": {"type": "overloaded_error", "message": "full"}},
    )
    asked: Any = {"model": "c", "max_tokens": 9, "messages": MESSAGES}
    with stranger(script(overloaded, (200, {}, whole), (200, {}, chunks))) as server:
        address = server.base_url.removesuffix("/v1")
        with governed(anthropic.Anthropic(api_key="k", base_url=address), governor) as client:
            assert client.messages.create(**asked).usage.output_tokens == 1
            with client.messages.stream(**asked) as stream:
                assert stream.get_final_text() == "hi"
    assert told.outcomes == [Outcome.OVERLOADED, Outcome.OK, Outcome.OK]
    assert told.used[1:] == [(11, 1), (11, 7)]
    quiet(governor)


def test_other_endpoints_count_as_one_request_without_tokens() -> None:
    governor = Governor(QUICK.with_(rpm_limit=100))

    def answer(body: dict[str, Any]) -> Reply:
        path = body["path"]
        if path.endswith("/speech"):
            return 200, {"Content-Type": "audio/mpeg"}, b"sound"
        if path.endswith("/transcriptions"):
            assert "listen" in body["raw"]
            return next(transcriptions)
        return 200, {}, {"data": [{"url": "u"}], "results": [{"flagged": False}], "id": "i", "model": "m", "created": 1}

    transcriptions = iter([error(500, "oops", Retry_After="0.02"), (200, {}, {"text": "heard"})])
    with stranger(answer) as server, governed(OpenAI(api_key="k", base_url=server.base_url), governor) as client:
        assert client.audio.speech.create(model="t", voice="alloy", input="a").read() == b"sound"
        assert client.audio.transcriptions.create(model="w", file=("a.mp3", b"listen")).text == "heard"
        images = client.images.generate(model="i", prompt="a").data
        assert images is not None
        assert images[0].url == "u"
        assert not client.moderations.create(input="a").results[0].flagged
        assert client.post("/unheard/of", body={}, cast_to=object) is not None
    assert len(server.bodies) == 6
    assert governor.s.booked[law.TPM] == 0.0
    quiet(governor)


def test_what_is_not_sent_raises_the_clients_own_exception_with_our_reason() -> None:
    governor = Governor(QUICK.with_(tpm_limit=1_000, tpm_window="bucket", tpm_headroom=0.0))
    with (
        stranger(script(chat())) as server,
        governed(OpenAI(api_key="k", base_url=server.base_url), governor, max_wait_s=0.05) as client,
    ):
        ask = client.chat.completions.create
        with pytest.raises(openai.BadRequestError, match="never fits: pool 'default' is limited to 1,000"):
            ask(model="m", messages=MESSAGES, max_tokens=2_000)
        ask(model="m", messages=MESSAGES, max_tokens=980)
        with pytest.raises(openai.InternalServerError, match=r"cannot send a request within 0\.05 s"):
            ask(model="m", messages=MESSAGES, max_tokens=980)
        assert len(server.bodies) == 1
    quiet(governor)


def test_an_httpx_client_of_either_package_is_governed_once_however_often() -> None:
    governor = Governor(QUICK)
    refused = error(429, "slow down", "rate_limit_exceeded", Retry_After="0.02")
    for package in (httpx, httpx2):
        packed = gzip.compress(json.dumps(chat()[2]).encode())
        packed_reply: Reply = 200, {"Content-Encoding": "gzip"}, packed
        with stranger(script(refused, packed_reply)) as server, package.Client() as client:
            ours = governed(governed(client, governor), governor)
            assert ours is client
            url = f"{server.base_url}/chat/completions"
            answer = ours.post(url, json={"model": "m", "messages": MESSAGES})
            assert answer.json()["usage"] == USAGE
            assert len(server.bodies) == 2
    quiet(governor)
    with pytest.raises(PacelineError, match="no httpx client in 'int'"):
        governed(5)
    with pytest.raises(PacelineError, match=r"Client is a class: governed\(Client\(\)\)"):
        governed(httpx2.Client)
    for wrong in ({"governor": {}}, {"max_wait_s": None}, {"max_wait_s": -1.0}, {"max_wait_s": math.nan}):
        with pytest.raises(BadSetting, match=next(iter(wrong))):
            governed(httpx2.Client(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(PacelineError, match="pool 'eu' has no charge rule: make it of a Policy"):
        governed(httpx2.Client(), Governor(QUICK.params(), pool="eu"))


def test_a_client_closed_in_the_midst_of_a_stream_gives_its_permit_back() -> None:
    governor = Governor(QUICK)

    async def main(server: Stranger) -> None:
        client = governed(AsyncOpenAI(api_key="k", base_url=server.base_url), governor)
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        await anext(aiter(stream))
        await client.close()
        with suppress(httpx2.TransportError, openai.APIConnectionError, RuntimeError):
            async for _ in stream:
                pass
        await stream.close()

    with stranger(script((200, {}, chat_stream("a", "b")))) as server:
        asyncio.run(main(server))
    quiet(governor)


def test_clients_without_a_governor_share_one_per_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_quotas", {})
    monkeypatch.setenv("OPENAI_STAGGER_SECONDS", "0")
    here, there = "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"
    one = governed(AsyncOpenAI(api_key="k", base_url=here))
    two = governed(OpenAI(api_key="k", base_url=here))
    other = governed(OpenAI(api_key="k", base_url=there))
    first, second, third = (client._client._transport.portal for client in (one, two, other))
    assert first is second is not third
    assert (one.max_retries, two.max_retries) == (0, 0)

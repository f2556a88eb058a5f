"""Streams, calls of tools and Anthropic's endpoint, asked by the official SDKs over HTTP on loopback."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel

from governor.model.estimate import MESSAGES, RESPONSES, sizes_of
from governor.model.requests import Outcome
from governor.provider import answers
from governor.provider import rate_limit_headers as stated
from sim.model.faults import Event
from sim.model.provider_config import ProviderConfig
from sim.serving.contents import content_of, example_of
from sim.serving.server import ProviderThread, serve
from sim.serving.streams import PIECES_MAX, pieces

QUICK = ProviderConfig(
    tpm=0,
    latency={"first_token_s": 0.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    faults={"refusal_s": 0.0},
)
HELLO: Any = [{"role": "user", "content": "Hello"}]
LONG = {"x-paceline-output-tokens": "90"}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 3}},
    "required": ["city", "days"],
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Forecast.", "parameters": WEATHER}}


def openai_at(server: ProviderThread) -> OpenAI:
    return OpenAI(api_key="none", base_url=server.base_url, max_retries=0, _strict_response_validation=True)


def anthropic_at(server: ProviderThread) -> Anthropic:
    return Anthropic(api_key="none", base_url=server.url, max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="module")
def quick() -> Iterator[ProviderThread]:
    with serve(QUICK) as server:
        yield server


@pytest.fixture(scope="module")
def sdk(quick: ProviderThread) -> Iterator[OpenAI]:
    with openai_at(quick) as client:
        yield client


@pytest.fixture(scope="module")
def claude(quick: ProviderThread) -> Iterator[Anthropic]:
    with anthropic_at(quick) as client:
        yield client


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_streamed_chat_says_what_the_whole_one_says(sdk: OpenAI, with_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if with_usage else {}
    ask: Any = {"model": "gpt-4o", "messages": HELLO, "n": 2, "max_tokens": 400, "extra_headers": LONG}
    whole = sdk.chat.completions.create(**ask)
    chunks = list(sdk.chat.completions.create(**ask, stream=True, **options))
    said = {0: "", 1: ""}
    finished = {}
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finished[choice.index] = choice.finish_reason
    assert [said[choice.index] for choice in whole.choices] == [choice.message.content for choice in whole.choices]
    assert finished == {0: "stop", 1: "stop"}
    assert len(chunks) == 2 + 90 + 2 + with_usage, "one for each token, and the ends"
    assert [chunk.usage for chunk in chunks if chunk.usage] == ([whole.usage] if with_usage else [])
    assert all(chunk.choices for chunk in chunks[: len(chunks) - with_usage])


def test_a_streamed_response_is_put_together_by_the_sdk(sdk: OpenAI, quick: ProviderThread) -> None:
    for cap in (500, 40):
        ask: Any = {"model": "gpt-4o", "input": "Hello", "max_output_tokens": cap, "extra_headers": LONG}
        whole = sdk.responses.create(**ask)
        with sdk.responses.stream(**ask) as stream:
            events = list(stream)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last = events[-1]
        assert last.type == ("response.completed" if cap == 500 else "response.incomplete")
        assert last.response.output_text == whole.output_text
        assert last.response.usage == whole.usage
        deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert deltas == whole.output_text


def test_a_streamed_completion(quick: ProviderThread) -> None:
    sdk = OpenAI(api_key="none", base_url=quick.base_url)  # whose types know no chunk but the last
    ask: Any = {"model": "gpt-3.5-turbo-instruct", "prompt": "Once", "max_tokens": 200, "extra_headers": LONG}
    whole = sdk.completions.create(**ask)
    chunks = list(sdk.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    sdk.close()


def test_pieces_are_the_text() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(200):
        text = "abcdefg"[: rng.randint(0, 7)] * rng.randint(0, 300)
        parts = pieces(text)
        assert "".join(parts) == text, seed
        assert all(parts), seed
        assert len(parts) <= PIECES_MAX, seed


def test_a_stream_comes_over_the_time_that_its_tokens_take() -> None:
    """By the provider's own clock: the first token when it is due, the last at the end."""
    config = QUICK.with_(latency={"first_token_s": 30.0, "per_token_s": 1.0, "sigma": 0.0, "stall_ratio": 0.0})
    with serve(config, time_scale=500.0) as server, openai_at(server) as client:
        stream = client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True, extra_headers=LONG)
        next(stream)
        first_s = server.provider.now()
        list(stream)
        assert first_s >= 30.0
        assert server.provider.now() >= 120.0
        assert server.stats()["outcomes"] == {"ok": 1}


def test_who_closes_a_stream_early_is_not_settled() -> None:
    config = QUICK.with_(latency={"first_token_s": 0.0, "per_token_s": 1.0, "sigma": 0.0, "stall_ratio": 0.0})
    with serve(config, time_scale=200.0) as server:
        with openai_at(server) as client:
            stream = client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True, extra_headers=LONG)
            next(stream)
            stream.close()
        with openai_at(server) as client:
            # As long as the other would have taken: by its end the provider has seen that the first is gone.
            list(client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True, extra_headers=LONG))
        stats = server.stats()
    assert stats["outcomes"] == {"hung_up": 1, "ok": 1}
    assert stats["output_tokens"] == 90
    assert stats["in_flight"] == 0


# ---------------------------------------------------------------- errors inside


INSIDE: list[tuple[Literal["server_error", "rate_limit_exceeded"], Outcome]] = [
    ("server_error", Outcome.SERVER_ERROR),
    ("rate_limit_exceeded", Outcome.THROTTLED),
]


@pytest.mark.parametrize(("inside", "outcome"), INSIDE)
def test_an_error_inside(inside: Any, outcome: Outcome) -> None:
    ask: Any = {"model": "gpt-4o", "extra_headers": LONG}
    with serve(QUICK, events=[Event(kind="error_inside", inside=inside)]) as server, openai_at(server) as client:
        seen = []
        with pytest.raises(openai.APIError) as caught:
            seen += list(client.chat.completions.create(**ask, messages=HELLO, stream=True))
        body: Any = caught.value.body
        assert answers.classify(200, {}, {"error": body}).outcome is outcome
        last = list(client.responses.create(**ask, input="Hello", stream=True))[-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert answers.classify(200, {}, last.response.model_dump()).outcome is outcome
        raw = client.chat.completions.with_raw_response.create(**ask, messages=HELLO)
        assert answers.classify(raw.status_code, raw.headers, raw.content).outcome is outcome
        with anthropic_at(server) as claude, pytest.raises(anthropic.APIStatusError) as broken:
            list(claude.messages.create(model="claude", max_tokens=99, messages=HELLO, stream=True, extra_headers=LONG))
        assert answers.classify(200, {}, broken.value.body).outcome is outcome
        assert server.stats()["outcomes"] == {"error_inside": 4}


def test_a_stream_that_breaks_off_and_one_that_is_garbled() -> None:
    ask: Any = {"model": "gpt-4o", "messages": HELLO, "stream": True, "extra_headers": LONG}
    with serve(QUICK, events=[Event(kind="truncate", times=1), Event(kind="malformed")]) as server:
        with openai_at(server) as client, pytest.raises(openai.APIConnectionError):
            list(client.chat.completions.create(**ask))
        with openai_at(server) as client, pytest.raises(json.JSONDecodeError):
            list(client.chat.completions.create(**ask))


# ---------------------------------------------------------------- tools


def test_a_tool_loop_ends(sdk: OpenAI) -> None:
    messages: Any = [*HELLO]
    first = sdk.chat.completions.create(model="gpt-4o+tools", messages=messages, tools=[TOOL])
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = first.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "text", "days": 3}
    assert first.usage is not None
    assert first.usage.completion_tokens == -(-len("weather" + call.function.arguments) // 4)
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    second = sdk.chat.completions.create(model="gpt-4o+tools", messages=messages, tools=[TOOL])
    assert second.choices[0].finish_reason in ("stop", "length")
    assert second.choices[0].message.content


def test_streamed_calls_of_tools(sdk: OpenAI) -> None:
    header = {"x-paceline-tool-calls": "2"}
    with sdk.chat.completions.stream(model="gpt-4o", messages=HELLO, tools=[TOOL], extra_headers=header) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert [call.function.arguments for call in message.tool_calls or ()] == ['{"city": "text", "days": 3}'] * 2
    tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": False}
    with sdk.responses.stream(model="gpt-4o", input="Hello", tools=[tool], extra_headers=header) as responses:
        final = responses.get_final_response()
    assert [item.type for item in final.output] == ["function_call"] * 2


def test_which_requests_get_calls() -> None:
    chat: dict[str, Any] = {"model": "gpt-4o", "messages": HELLO, "tools": [TOOL]}
    assert not content_of(0, {}, chat).calls
    assert not content_of(0, {}, {**chat, "model": "gpt-4o+tools", "tool_choice": "none"}).calls
    assert not content_of(0, {}, {"model": "gpt-4o+tools", "messages": HELLO}).calls, "no tool to call"
    named = {"type": "function", "function": {"name": "weather"}}
    for forced in ("required", named):
        answered = [*HELLO, {"role": "tool", "content": "rain"}]
        assert len(content_of(0, {}, {**chat, "messages": answered, "tool_choice": forced}).calls) == 1


def test_structured_output(sdk: OpenAI) -> None:
    class City(BaseModel):
        name: str
        people: int
        twins: list[City]

    parsed = sdk.chat.completions.parse(model="gpt-4o", messages=HELLO, response_format=City)
    assert parsed.choices[0].message.parsed is not None
    assert parsed.choices[0].message.parsed.people == 1
    responded = sdk.responses.parse(model="gpt-4o", input="Hello", text_format=Literalist)
    assert responded.output_parsed == Literalist(kind="a", ratio=0.5)


class Literalist(BaseModel):
    kind: Literal["a", "b"]
    ratio: float = 0.5


def test_a_schema_that_refers_to_itself_ends() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    assert json.dumps(example_of({"$ref": "#/$defs/node", "$defs": {"node": node}}))


# ---------------------------------------------------------------- responses in all their forms

PIRATE = "Talk like a pirate."
INPUTS: list[Any] = [
    "Hello",
    [{"role": "user", "content": "Hello"}],
    [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
    [{"role": "user", "content": [{"type": "input_image", "detail": "auto", "image_url": "data:,"}]}],
    [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}],
    [{"type": "item_reference", "id": "msg_1"}],
    [{"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]}],
    [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "12 C"},
        {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "12 C"}]},
    ],
    [
        {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "file_id": "f"}},
        {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "out", "stderr": "", "outcome": {}}]},
        {"type": "custom_tool_call", "call_id": "c", "name": "n", "input": "grep"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "found"},
        {"type": "mcp_call", "id": "m", "name": "n", "arguments": "{}", "server_label": "s", "output": "o"},
        {"type": "image_generation_call", "id": "i", "result": "AAAA", "status": "completed"},
        {"type": "local_shell_call", "id": "l", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}},
    ],
]


@pytest.mark.parametrize("given", INPUTS)
def test_every_form_of_input_is_answered(sdk: OpenAI, given: Any) -> None:
    answer = sdk.responses.create(model="gpt-4o", input=given, instructions=PIRATE)
    assert answer.usage is not None
    expected = sizes_of(RESPONSES, {"input": given, "instructions": PIRATE})
    assert answer.usage.input_tokens == expected.prompt_tokens > 0


def test_a_stored_prompt_and_an_earlier_response(sdk: OpenAI) -> None:
    assert sdk.responses.create(prompt={"id": "pmpt_1", "variables": {"city": "Rome"}}).status in (
        "completed",
        "incomplete",
    )
    first = sdk.responses.create(model="gpt-4o", input="Hello")
    assert sdk.responses.create(model="gpt-4o", input="And?", previous_response_id=first.id).usage


# ---------------------------------------------------------------- Anthropic


def test_messages_whole_and_streamed(claude: Anthropic) -> None:
    ask: Any = {"model": "claude-sonnet", "messages": HELLO, "max_tokens": 500, "system": "Be brief."}
    for cap, reason in ((500, "end_turn"), (40, "max_tokens")):
        ask |= {"max_tokens": cap}
        raw = claude.messages.with_raw_response.create(**ask, extra_headers=LONG)
        read = answers.classify(raw.status_code, raw.headers, raw.http_response.content)
        assert (read.outcome, read.cut_off) == (Outcome.OK, cap == 40)
        whole = raw.parse()
        assert (read.used_prompt_tokens, read.used_output_tokens) == (whole.usage.input_tokens, min(cap, 90))
        assert whole.stop_reason == reason
        assert whole.usage.output_tokens == min(cap, 90)
        assert whole.usage.input_tokens == sizes_of(MESSAGES, ask).prompt_tokens
        with claude.messages.stream(**ask, extra_headers=LONG) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert read.has_text == bool(text)
        assert "".join(block.model_dump()["text"] for block in whole.content) == text
        assert (final.stop_reason, final.usage.output_tokens) == (reason, whole.usage.output_tokens)
        assert final.usage.input_tokens == whole.usage.input_tokens


def test_messages_with_tools(claude: Anthropic) -> None:
    tool: Any = {"name": "weather", "input_schema": WEATHER}
    ask: Any = {"model": "claude+tools", "max_tokens": 500, "tools": [tool]}
    first = claude.messages.create(**ask, messages=HELLO)
    assert first.stop_reason == "tool_use"
    block = first.content[0]
    assert block.type == "tool_use"
    assert block.input == {"city": "text", "days": 3}
    with claude.messages.stream(**ask, messages=HELLO) as stream:
        assert stream.get_final_message().content[0].model_dump()["input"] == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
    turns: Any = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [result]},
    ]
    assert claude.messages.create(**ask, messages=turns).stop_reason in ("end_turn", "max_tokens")


CLAUDE_ERRORS: list[tuple[Any, type[anthropic.APIStatusError], int, Outcome]] = [
    ("throttled", anthropic.RateLimitError, 429, Outcome.THROTTLED),
    ("slow_down", anthropic.RateLimitError, 429, Outcome.THROTTLED),
    ("quota", anthropic.BadRequestError, 400, Outcome.QUOTA),
    ("overloaded", anthropic.InternalServerError, 529, Outcome.OVERLOADED),
    ("unauthorized", anthropic.AuthenticationError, 401, Outcome.UNAUTHORIZED),
    ("model_not_found", anthropic.NotFoundError, 404, Outcome.BAD_REQUEST),
    ("server_error", anthropic.InternalServerError, 500, Outcome.SERVER_ERROR),
]


@pytest.mark.parametrize(("kind", "error", "status", "outcome"), CLAUDE_ERRORS)
def test_errors_in_anthropic_s_forms(
    kind: Any, error: type[anthropic.APIStatusError], status: int, outcome: Outcome
) -> None:
    with serve(QUICK, events=[Event(kind=kind)]) as server, anthropic_at(server) as client:
        with pytest.raises(error) as caught:
            client.messages.create(model="claude", max_tokens=9, messages=HELLO)
        response = caught.value.response
        assert response.status_code == status
        assert answers.classify(status, response.headers, response.content).outcome is outcome
        assert caught.value.request_id


def test_anthropic_s_headers_are_read_as_limits() -> None:
    with serve(QUICK.with_(tpm=1_000, rpm=50, charge_rule="prompt_plus_max")) as server:
        with anthropic_at(server) as client:
            ask: Any = {"model": "claude", "max_tokens": 900, "messages": HELLO}
            raw = client.messages.with_raw_response.create(**ask)
            limits = {limit.dimension: limit for limit in stated.limits_of(raw.headers)}
            charge = 3 + 900
            assert (limits["TPM"].limit, limits["TPM"].remaining) == (1_000, 1_000 - charge)
            assert (limits["RPM"].limit, limits["RPM"].remaining) == (50, 49)
            assert raw.headers["anthropic-ratelimit-tokens-reset"].endswith("Z")
            with pytest.raises(anthropic.RateLimitError) as caught:
                client.messages.create(**ask)
        # Whole seconds: (903 + 903 - 1,000) of 1,000 per minute, less what has flowed back.
        assert caught.value.response.headers["retry-after"] in ("47", "48", "49")
        assert "1,000 tokens per minute" in str(caught.value)


def test_messages_need_a_cap(quick: ProviderThread) -> None:
    with anthropic_at(quick) as client, pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.post("/v1/messages", body={"model": "claude", "messages": HELLO}, cast_to=object)

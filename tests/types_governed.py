"""What type checkers see of a governed client: exactly what they see of the bare one. Checked by mypy with all else;
`pyright tests/types_governed.py` agrees."""

from __future__ import annotations

from typing import Any, assert_type

import httpx2
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import Message
from openai import AsyncAzureOpenAI, AsyncOpenAI, AsyncStream, OpenAI, Stream
from openai._legacy_response import LegacyAPIResponse
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionUserMessageParam
from openai.types.responses import Response

from paceline import Governor, Policy, governed

ASKED = ChatCompletionUserMessageParam(role="user", content="How are you?")


def kinds(governor: Governor, client: Any) -> None:
    assert_type(governed(AsyncOpenAI()), AsyncOpenAI)
    assert_type(governed(OpenAI(), governor), OpenAI)
    assert_type(governed(AsyncAzureOpenAI(), Policy()), AsyncAzureOpenAI)
    assert_type(governed(AsyncAnthropic()), AsyncAnthropic)
    assert_type(governed(httpx2.AsyncClient(), governor, max_wait_s=1.0), httpx2.AsyncClient)


async def awaited(client: AsyncOpenAI) -> None:
    ours = governed(client)
    completions = ours.chat.completions
    assert_type(await completions.create(model="m", messages=[ASKED]), ChatCompletion)
    assert_type(await completions.create(model="m", messages=[ASKED], stream=True), AsyncStream[ChatCompletionChunk])
    raw = await completions.with_raw_response.create(model="m", messages=[ASKED])
    assert_type(raw, LegacyAPIResponse[ChatCompletion])
    assert_type(await ours.responses.create(model="m", input="a"), Response)
    assert_type(await ours.embeddings.create(model="m", input="a"), CreateEmbeddingResponse)


def blocking(client: OpenAI, other: Anthropic) -> None:
    completions = governed(client).chat.completions
    assert_type(completions.create(model="m", messages=[ASKED], stream=True), Stream[ChatCompletionChunk])
    message = governed(other).messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "a"}])
    assert_type(message, Message)

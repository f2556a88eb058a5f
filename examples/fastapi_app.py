"""A backend whose calls of a model are governed: plain, streamed, with tools, embeddings, and from threads.

    uvicorn examples.fastapi_app:app --workers 2

The three lines marked `# governed` are all that a backend needs. Settings are the OPENAI_* variables of `paceline run`;
with PACELINE_REDIS_URL the workers share one quota. `/metrics` is the whole service's where PROMETHEUS_MULTIPROC_DIR
names an empty folder, and one worker's otherwise. Try it without a key: `paceline provider --port 8391 &`, then with
OPENAI_BASE_URL=http://127.0.0.1:8391/v1 and any OPENAI_API_KEY.
"""

import json
import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI, OpenAI
from prometheus_client import CollectorRegistry, make_asgi_app
from prometheus_client.multiprocess import MultiProcessCollector

from paceline import governed  # governed

client = governed(AsyncOpenAI())  # governed
blocking_client = governed(OpenAI())  # governed: threads welcome

app = FastAPI()
MODEL = os.environ.get("MODEL", "gpt-4o-mini")
TOOLS: Any = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


def asked(prompt: str) -> Any:
    return [{"role": "user", "content": prompt}]


@app.get("/ask")
async def ask(prompt: str) -> str | None:
    answer = await client.chat.completions.create(model=MODEL, messages=asked(prompt), max_tokens=200)
    return answer.choices[0].message.content


@app.get("/stream")
async def stream(prompt: str) -> StreamingResponse:
    chunks = await client.chat.completions.create(model=MODEL, messages=asked(prompt), max_tokens=200, stream=True)

    async def texts() -> AsyncIterator[str]:
        async for chunk in chunks:
            yield "".join(choice.delta.content or "" for choice in chunk.choices)

    return StreamingResponse(texts(), media_type="text/plain")


@app.get("/tools")
async def tools(prompt: str) -> str | None:
    messages = asked(prompt)
    for _ in range(5):
        answer = await client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=200)
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message)
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps("12 o'clock")})
    return "too many calls"


@app.get("/embed")
async def embed(text: str) -> int:
    answer = await client.embeddings.create(model="text-embedding-3-small", input=text)
    return len(answer.data[0].embedding)


@app.get("/blocking")  # not async: FastAPI calls it in a thread
def blocking(prompt: str) -> str | None:
    answer = blocking_client.chat.completions.create(model=MODEL, messages=asked(prompt), max_tokens=200)
    return answer.choices[0].message.content


def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    MultiProcessCollector(made)  # type: ignore[no-untyped-call]
    return made


# Without a folder, the process's own registry, in which governed clients count by themselves.
app.mount("/metrics", make_asgi_app(registry()) if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else make_asgi_app())

"""Any `async def call(prompt)` under the governor, where `governed` finds no httpx client.

For OpenAI, Anthropic, LangChain, LiteLLM, Pydantic AI and whatever else is built on httpx, `governed(client)` is all it
takes: see langchain_model.py, pydantic_ai_agent.py and openai_agents.py.

Write `await ask(prompt)` in place of `await call(prompt)`, and switch off the client's own retries. An exception with a
`response` is read as `paceline run` reads it; any other is passed on to the caller.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from openai import AsyncOpenAI

from governor import Governor, governor_from_env
from governor.model.requests import Outcome
from governor.provider.answers import classify

Call = Callable[[str], Awaitable[Any]]
TOO_FAST = (Outcome.THROTTLED, Outcome.SLOW_DOWN)
MAY_PASS = (Outcome.OVERLOADED, Outcome.SERVER_ERROR)


def paced(governor: Governor, call: Call, *, reserve: Callable[[str], float], used: Any = None) -> Call:
    """Return `call`, sent when the governor permits. `reserve(prompt)`, `used(answer)`: tokens, prompt and output."""

    async def ask(prompt: str) -> Any:
        async with governor.permit(reserve(prompt)) as permit:
            while True:
                try:
                    answer = await call(prompt)
                except Exception as error:
                    response = getattr(error, "response", None)
                    if response is None:
                        raise
                    told = classify(response.status_code, response.headers, response.content)
                    again = permit.throttled if told.outcome in TOO_FAST else permit.failed
                    if told.outcome not in TOO_FAST + MAY_PASS or not await again(told.retry_after_s):
                        raise
                else:
                    permit.used(used(answer) if used else reserve(prompt))
                    return answer

    return ask


async def main() -> None:
    async def call(prompt: str) -> str:  # stands in for any client
        answer = await client.responses.create(model="gpt-4o-mini", input=prompt, max_output_tokens=200)
        return answer.output_text

    async with AsyncOpenAI(max_retries=0) as client:
        governor = governor_from_env(os.environ)
        ask = paced(governor, call, reserve=lambda prompt: len(prompt) / 4 + 200)
        for answer in await asyncio.gather(*(ask(f"Say the number {n} in French.") for n in range(10))):
            print(answer)
        await governor.aclose()


if __name__ == "__main__":
    asyncio.run(main())

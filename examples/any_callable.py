"""Any `async def call(prompt)` under the governor: LangChain, LiteLLM, or one's own. Neither of them is needed here.

    LangChain   ask = governed(governor, ChatOpenAI(model="gpt-4o-mini", max_retries=0).ainvoke, reserve=reserve)
    LiteLLM     async def call(prompt): return await litellm.acompletion(
                    model="gpt-4o-mini", messages=[{"role": "user", "content": prompt}], num_retries=0)
                ask = governed(governor, call, reserve=reserve, used=lambda answer: answer.usage.total_tokens)

Then `await ask(prompt)` in place of `await call(prompt)`. Their own retries must be off, as above. An exception with a
`response` (the SDK's, LiteLLM's) is read as `paceline run` reads it; any other is the caller's.
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


def governed(governor: Governor, call: Call, *, reserve: Callable[[str], float], used: Any = None) -> Call:
    """`call`, sent when the governor lets it. `reserve(prompt)`, `used(answer)`: tokens, prompt and output."""

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
    async def call(prompt: str) -> str:  # stands for anybody's client
        answer = await client.responses.create(model="gpt-4o-mini", input=prompt, max_output_tokens=200)
        return answer.output_text

    async with AsyncOpenAI(max_retries=0) as client:
        governor = governor_from_env(os.environ)
        ask = governed(governor, call, reserve=lambda prompt: len(prompt) / 4 + 200)
        for answer in await asyncio.gather(*(ask(f"Say the number {n} in French.") for n in range(10))):
            print(answer)
        await governor.aclose()


if __name__ == "__main__":
    asyncio.run(main())

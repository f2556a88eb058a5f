"""The governor inside one's own asyncio program: a permit before each call, and a word about how the call ended.

Settings are those of `paceline run` (OPENAI_* in the environment), so what was planned holds here too. Try it without
a key: `paceline provider --port 8391 &`, then with OPENAI_BASE_URL=http://127.0.0.1:8391/v1 and any OPENAI_API_KEY.
"""

import asyncio
import os

from openai import AsyncOpenAI, RateLimitError

from governor import Governor, governor_from_env
from governor.model.requests import Outcome
from governor.provider.answers import classify


async def ask(governor: Governor, client: AsyncOpenAI, prompt: str, cap: int = 200) -> str | None:
    async with governor.permit(len(prompt) / 4 + cap) as permit:  # tokens to reserve; waits until they may be used
        while True:
            try:
                answer = await client.chat.completions.create(
                    model="gpt-4o-mini", messages=[{"role": "user", "content": prompt}], max_tokens=cap
                )
            except RateLimitError as error:
                told = classify(429, error.response.headers, error.response.content)  # too fast, or no money left?
                if told.outcome is not Outcome.THROTTLED or not await permit.throttled(told.retry_after_s):
                    raise
            else:
                permit.used(answer.usage.total_tokens if answer.usage else cap)
                return answer.choices[0].message.content


async def main() -> None:
    governor = governor_from_env(os.environ)  # its quota is shared where PACELINE_REDIS_URL is set
    async with AsyncOpenAI(max_retries=0) as client:  # retries are the governor's: the SDK's own would burst
        prompts = [f"Say the number {n} in French." for n in range(10)]
        for answer in await asyncio.gather(*(ask(governor, client, prompt) for prompt in prompts)):
            print(answer)
    await governor.aclose()


if __name__ == "__main__":
    asyncio.run(main())

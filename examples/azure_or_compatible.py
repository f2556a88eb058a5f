"""Azure deployments and OpenAI-compatible addresses, each with its own quota, through Paceline's own settings.

    python examples/azure_or_compatible.py [POOLS.yaml]

With a pools file (see azure_pools.yaml) each request goes to the pool of its model; without one, to OPENAI_BASE_URL or
OpenAI. The adapter makes `AsyncAzureOpenAI` or `AsyncOpenAI` of what a pool says, and takes its key from the variable
that the pool names.
"""

import asyncio
import os
import sys

from governor import Governor, Policy, governor_from_env
from governor.model.estimate import charge_of, sizes_of
from governor.model.pools import Pool, default_pools, pool_for, read_pools
from governor.model.requests import CHAT, Answer, Outcome, Request, url_of
from governor.provider.openai_adapter import Adapter

AGAIN = (Outcome.THROTTLED, Outcome.SLOW_DOWN)


def request_of(index: int, model: str, prompt: str) -> Request:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 100}
    return Request(index, f"q-{index}", url_of(CHAT), model, body, sizes_of(CHAT, body))


async def ask(pool: Pool, governor: Governor, adapter: Adapter, request: Request) -> Answer:
    reserve = charge_of(pool.policy.charge_rule, request.sizes, pool.policy.est_tokens_per_run)
    async with governor.permit(reserve, expected=request.sizes.max_tokens) as permit:
        while True:
            answer = await adapter.send(request)
            if answer.outcome in AGAIN and await permit.throttled(answer.retry_after_s, answer.limits):
                continue
            if answer.outcome is Outcome.OK:
                permit.used(answer.used_prompt_tokens + answer.used_output_tokens, answer.limits)
            return answer


async def main(words: list[str]) -> None:
    policy = Policy.from_env(os.environ)
    pools = read_pools(words[0], policy) if words else default_pools(policy, os.environ)
    governors = {pool.name: governor_from_env(os.environ, pool) for pool in pools}
    adapters = {pool.name: Adapter(pool) for pool in pools}
    calls = []
    for index, model in enumerate(("gpt-4o", "gpt-4o-mini", "llama-3")):
        pool = pool_for(model, pools)
        if pool is not None:
            request = request_of(index, model, "Say hello in French.")
            calls.append(ask(pool, governors[pool.name], adapters[pool.name], request))
    for answer in await asyncio.gather(*calls):
        print(answer.outcome, answer.used_output_tokens, answer.message)
    await asyncio.gather(*(governor.aclose() for governor in governors.values()))
    await asyncio.gather(*(adapter.aclose() for adapter in adapters.values()))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))

"""LiteLLM's Router over several quotas, as a program of its own: run by the interpreter that has litellm.

It reads one line of JSON (bodies, deployments, strategy) and writes one: seconds, answered, lost, refused. 40 requests
are under way at most, as in `bench_pools`; the Router retries five times and cools deployments down as it does by
default. What it gives up (`refused` counts how often) is asked for again after the five seconds that its error states.
"""

import asyncio
import json
import sys
import time

AGAIN_S, TRIES = 5.0, 40


async def main() -> None:
    """Send all bodies and print what came of them."""
    import litellm  # type: ignore[import-not-found, unused-ignore]

    order = json.loads(sys.stdin.readline())
    deployments = [
        {
            "model_name": "gpt-4o",
            "litellm_params": {
                "model": "openai/gpt-4o",
                "api_base": each["base_url"],
                "api_key": "no-key-is-needed",
                "tpm": each["tpm"],
                "rpm": 10_000,
            },
        }
        for each in order["deployments"]
    ]
    litellm.suppress_debug_info = True
    router = litellm.Router(model_list=deployments, routing_strategy=order["strategy"], num_retries=5)
    places = asyncio.Semaphore(40)
    lost = refused = 0

    async def one(body: dict) -> None:  # type: ignore[type-arg]
        nonlocal lost, refused
        async with places:
            for _ in range(TRIES):
                try:
                    await router.acompletion(**body)
                except Exception:
                    refused += 1
                    await asyncio.sleep(AGAIN_S)
                else:
                    return
            lost += 1

    began = time.monotonic()
    await asyncio.gather(*(one(body) for body in order["bodies"]))
    seconds = time.monotonic() - began
    print(
        "\n"
        + json.dumps({"seconds": seconds, "answered": len(order["bodies"]) - lost, "lost": lost, "refused": refused}),
        flush=True,
    )


if __name__ == "__main__":
    asyncio.run(main())

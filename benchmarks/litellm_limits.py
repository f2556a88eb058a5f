"""LiteLLM's own check of a deployment's limits, as a process that is told the time: it answers one JSON line per line.

    PYTHON benchmarks/litellm_limits.py TPM RPM

PYTHON belongs to an environment of its own with `litellm[proxy]`, whose pins clash with ours; nothing of the project
is imported here. `{"at": seconds}` asks for one request, which is let in (`{}`) or refused (`{"retry_after": ...,
"message": ...}`); `{"at": seconds, "used": tokens}` reports an answer. The class is the one that LiteLLM's router and
proxy call before and after each request under `optional_pre_call_checks: ["enforce_model_rate_limits"]`, with its
in-memory cache. Only the clock is ours.
"""

import asyncio
import json
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no request leaves the machine

# A minute of the clock begins here, so that `at` is also how far a minute has gone.
MINUTE_BEGINS = 1_700_000_040.0
MODEL = "openai/gpt-4o"


def main(tpm: int, rpm: int) -> None:
    import litellm
    from litellm.caching.dual_cache import DualCache
    from litellm.router_utils.pre_call_checks import model_rate_limit_check as checks

    at = [0.0]
    time.time = lambda: MINUTE_BEGINS + at[0]
    checks.get_utc_datetime = lambda: datetime.fromtimestamp(time.time(), UTC)
    check = checks.ModelRateLimitingCheck(DualCache())
    limits = {"model_info": {"id": "d"}, "litellm_params": {"model": MODEL}, "model_name": "gpt-4o"}
    deployment = {**limits, "tpm": tpm, "rpm": rpm}
    run = asyncio.Runner().run

    def answer(told: dict[str, Any]) -> dict[str, Any]:
        at[0] = told["at"]
        if "used" in told:
            payload = {
                "model_id": "d",
                "total_tokens": told["used"],
                "hidden_params": {"litellm_model_name": MODEL},
                "metadata": {},
            }
            run(check.async_log_success_event({"standard_logging_object": payload}, None, None, None))
            return {}
        try:
            run(check.async_pre_call_check(deployment))
        except litellm.RateLimitError as error:
            return {"retry_after": error.response.headers["retry-after"], "message": error.message}
        return {}

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

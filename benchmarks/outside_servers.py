"""Endpoints in OpenAI's form behind rate limiters of others: slowapi (over limits), pyrate-limiter, LiteLLM.

    python -m benchmarks.outside_servers KIND TIME_SCALE

Serves on a free port of loopback, which it prints, until its standard input closes. Each endpoint grants `TPM` tokens
and `RPM` requests per minute, charged for the prompt and the declared cap, and answers after 0.3 s and 5 ms per output
token; the request states in its metadata how long its answer is. All clocks run TIME_SCALE times as fast: the
limiters are given one, or the `time.time` that they read is replaced before they are imported. LiteLLM does not install
beside us: its check of a deployment's limits runs in a process of its own (`litellm_limits`), by the interpreter that
`PACELINE_LITELLM_PYTHON` names; without it there are four endpoints.

`described` says what a user would write into provider.yaml who has read the documentation of the limiter.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

TPM, RPM = 30_000, 100
FIRST_TOKEN_S, PER_TOKEN_S = 0.3, 0.005
# The bursts that the GCRA endpoint grants, as seconds of its limits: the second of two numbers that GCRA has.
BURST_S = 6.0
START_S = 60.0
# How far into a minute of the clock LiteLLM's endpoint begins, seconds.
PHASE_S = 23.0
LITELLM_PYTHON = os.environ.get("PACELINE_LITELLM_PYTHON", "")

# Of a limiter whose code one runs, all this is known: a plan need not hold for anything else.
KNOWN = (
    *("limits", "charge rule", "settling", "refused requests"),
    *("Retry-After", "counts in headers", "window", "slices"),
)
_ALL: dict[str, Any] = {
    "learnt": KNOWN,
    "learnt_from": "the limiter's documentation",
    "tpm": TPM,
    "rpm": RPM,
    "charge_rule": "prompt_plus_max",
    "latency": {"first_token_s": FIRST_TOKEN_S, "per_token_s": PER_TOKEN_S, "sigma": 0.0, "stall_ratio": 0.0},
    "faults": {"refusal_s": 0.02},
}
# A request that has too few tokens left has taken its place among the requests: they are asked first, one by one.
DESCRIBED: dict[str, dict[str, Any]] = {
    "slowapi fixed": {"window": "anchored", "failed_requests_count": True, "retry_after": "seconds", "counts": "none"},
    "slowapi moving": {
        "window": "sliding",
        "failed_requests_count": "requests",
        "retry_after": "oldest",
        "counts": "none",
    },
    "pyrate gcra": {
        "burst_s": BURST_S,
        "failed_requests_count": "requests",
        "retry_after": "seconds",
        "counts": "none",
    },
    "pyrate sliding": {
        "window": "sliding",
        "failed_requests_count": "requests",
        "retry_after": "absent",
        "counts": "none",
    },
    # Tokens are added when the answer is there, under its minute; nothing but the requests' own limit counts refusals.
    "litellm deployment": {
        "window": "clock",
        "phase_s": PHASE_S,
        "charged": "answer",
        "failed_requests_count": False,
        "retry_after": 60,
        "counts": "none",
    },
}
KINDS = tuple(kind for kind in DESCRIBED if LITELLM_PYTHON or not kind.startswith("litellm"))


def described(kind: str) -> dict[str, Any]:
    """The provider of that kind, as fields of a provider file."""
    return {**_ALL, **DESCRIBED[kind]}


@contextmanager
def served(kind: str, time_scale: float) -> Iterator[str]:
    """The base URL of such an endpoint, in a process of its own, which ends with this block."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.outside_servers", kind, f"{time_scale:g}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            assert port.isdecimal(), f"the endpoint {kind!r} did not start"
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


class OwnTime:
    """Such an endpoint as an application for `own_time`, which sets its clock."""

    def __init__(self, kind: str) -> None:
        self.clock: Callable[[], float] = time.monotonic
        if kind.startswith("slowapi"):
            import limits.storage.memory
            import limits.strategies
            import slowapi.extension

            clock = SimpleNamespace(time=lambda: START_S + self.clock())
            for module in (limits.storage.memory, limits.strategies, slowapi.extension):
                if "time" in vars(module):
                    vars(module)["time"] = clock
        self._app = _app(kind, lambda: self.clock(), _answer(lambda: self.clock(), 1.0))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


# ---------------------------------------------------------------- the process


Answer = Callable[[dict[str, Any]], Awaitable[tuple[dict[str, Any], dict[str, str]]]]
"""A body in, a completion and its headers out."""


def _charge(body: dict[str, Any]) -> int:
    from governor.model.estimate import CHAT, charge_of, sizes_of

    return charge_of("prompt_plus_max", sizes_of(CHAT, body), 0)


def _answer(clock: Callable[[], float], time_scale: float) -> Answer:
    """The model behind the limiter. `clock`: so many times as fast as the loop's."""
    from governor.model.estimate import CHAT, sizes_of

    async def answer(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        stated = (body.get("metadata") or {}).get("paceline_output_tokens")
        cap = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        output = min(cap, int(stated)) if stated is not None else cap
        begun = clock()
        await asyncio.sleep((FIRST_TOKEN_S + PER_TOKEN_S * output) / time_scale)
        took_ms = round((clock() - begun) * 1_000.0)
        prompt = sizes_of(CHAT, body).prompt_tokens
        completion = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length" if output >= cap else "stop",
                    "message": {"role": "assistant", "content": "word " * min(output, 50)},
                }
            ],
            "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output},
        }
        return completion, {"openai-processing-ms": str(took_ms)}

    return answer


async def _body_of(request: Request) -> dict[str, Any]:
    request.state.body = await request.json()
    return dict(request.state.body)


Body = Annotated[dict[str, Any], Depends(_body_of)]


def _slowapi(strategy: str, answer: Answer) -> Any:
    """slowapi as its documentation shows it: two limits on the route, one of them weighted, and its headers."""
    from slowapi import Limiter, _rate_limit_exceeded_handler
    from slowapi.errors import RateLimitExceeded
    from slowapi.util import get_remote_address

    app = FastAPI()
    limiter = Limiter(key_func=get_remote_address, strategy=strategy, headers_enabled=True)
    app.state.limiter = limiter

    # A handler that is no coroutine would run in a thread, for which `own_time` does not wait.
    @app.exception_handler(RateLimitExceeded)
    async def refused(request: Request, error: RateLimitExceeded) -> Response:
        return _rate_limit_exceeded_handler(request, error)

    @app.post("/v1/chat/completions")
    @limiter.limit(f"{TPM}/minute", cost=lambda request: _charge(request.state.body))
    @limiter.limit(f"{RPM}/minute")
    async def chat(request: Request, response: Response, body: Body) -> dict[str, Any]:
        completion, headers = await answer(body)
        response.headers.update(headers)
        return completion

    return app


def _pyrate(kind: str, seconds: Callable[[], float], answer: Answer) -> Any:
    """pyrate-limiter with a bucket of requests and one of tokens, asked one after the other."""
    import pyrate_limiter as pyrate

    class Clock(pyrate.AbstractClock):  # type: ignore[misc, unused-ignore]
        def now(self) -> int:
            return int(seconds() * 1_000)

    clock, is_gcra = Clock(), kind == "pyrate gcra"

    def limiter(limit: int) -> tuple[Any, Any]:
        if is_gcra:
            rate = pyrate.Rate(limit, 60_000, int(limit * BURST_S / 60.0))
            bucket: Any = pyrate.StateBucket([rate], pyrate.GCRA(), clock=clock)
        else:
            bucket = pyrate.InMemoryBucket([pyrate.Rate(limit, 60_000)])
            bucket._clock = clock
        return pyrate.Limiter(pyrate.SingleBucketFactory(bucket, schedule_leak=False)), bucket

    requests, tokens = limiter(RPM), limiter(TPM)
    app = FastAPI()

    async def chat(request: Request) -> Response:
        body = await request.json()
        for (each, bucket), weight in ((requests, 1), (tokens, _charge(body))):
            if not each.try_acquire("all", weight, blocking=False):
                headers = {}
                if is_gcra:
                    item = pyrate.RateItem("all", clock.now(), weight)
                    headers["retry-after"] = str(max(1, math.ceil(bucket.waiting(item) / 1_000)))
                return JSONResponse({"error": {"message": "Too many requests"}}, 429, headers)
        completion, stated = await answer(body)
        return JSONResponse(completion, headers=stated)

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    return app


def _litellm(seconds: Callable[[], float], answer: Answer) -> Any:
    """LiteLLM's check of a deployment before each request, its count of tokens after each answer."""
    script = Path(__file__).with_name("litellm_limits.py")
    check = subprocess.Popen(
        [LITELLM_PYTHON, str(script), str(TPM), str(RPM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert check.stdin is not None
    assert check.stdout is not None
    assert check.stdout.readline() == "ready\n", f"{LITELLM_PYTHON} has no litellm: pip install 'litellm[proxy]'"
    said, heard, began_at = check.stdin, check.stdout, list[float]()

    def tell(**words: float) -> dict[str, str]:
        now = seconds()
        if not began_at:
            began_at.append(now)  # the loop whose clock it is was made after this endpoint
        print(json.dumps({"at": PHASE_S + now - began_at[0], **words}), file=said, flush=True)
        return dict(json.loads(heard.readline()))

    app = FastAPI()

    async def chat(request: Request) -> Response:
        refused = tell()
        if refused:
            error = {"message": refused["message"], "type": "throttling_error", "param": None, "code": "429"}
            return JSONResponse({"error": error}, 429, {"retry-after": refused["retry_after"]})
        completion, stated = await answer(await request.json())
        tell(used=completion["usage"]["total_tokens"])
        return JSONResponse(completion, headers=stated)

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    weakref.finalize(app, check.kill)
    return app


def _app(kind: str, clock: Callable[[], float], answer: Answer) -> Any:
    if kind.startswith("litellm"):
        return _litellm(clock, answer)
    if kind.startswith("slowapi"):
        return _slowapi("fixed-window" if kind == "slowapi fixed" else "moving-window", answer)
    return _pyrate(kind, clock, answer)


def _serve(kind: str, time_scale: float) -> None:
    import uvicorn

    begun, real = time.time(), time.time
    time.time = lambda: begun + (real() - begun) * time_scale

    def clock() -> float:
        return time.monotonic() * time_scale

    app = _app(kind, clock, _answer(clock, time_scale))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False))

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            print(server.servers[0].sockets[0].getsockname()[1], flush=True)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
            server.should_exit = True
        await serving

    asyncio.run(run())


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        sys.exit(f"name one of {json.dumps(KINDS)} and a time scale")
    _serve(sys.argv[1], float(sys.argv[2]))

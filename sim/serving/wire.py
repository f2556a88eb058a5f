"""Bodies and headers of the synthetic provider in OpenAI's own shapes and words, from numbers that the caller has.

Formats and wordings: docs/explanation/provider.md#headers and #errors; usage and objects as the official SDK 3.54 types
them. Streams: `streams`; Anthropic's forms: `anthropic`.

Answers are assembled as text rather than by a JSON encoder: a body costs microseconds, so one core serves thousands of
tiny answers per second. Text that comes from a request (its model's name) goes through the encoder.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

from governor import law
from governor.model.estimate import CHARS_PER_TOKEN, CHAT, COMPLETIONS, RESPONSES
from governor.provider.rate_limit_headers import duration_text, refill_reset_s
from sim.model import provider as prov
from sim.model import windows as win
from sim.model.provider import ProviderParams, ProviderState
from sim.serving.contents import PROSE, Content

Headers = list[tuple[bytes, bytes]]

ORGANIZATION = "org-paceline"
LIMITS_PAGE = "https://platform.openai.com/account/rate-limits"
DIMENSIONS = ("TPM", "RPM", "TPD", "RPD")
# A profile's further dimensions have places after these four.
_FURTHER = law.DIMENSIONS - len(DIMENSIONS)
_DIMENSION_WORDS = (
    *("tokens per min (TPM)", "requests per min (RPM)", "tokens per day (TPD)", "requests per day (RPD)"),
    *["a further limit"] * _FURTHER,
)
_KINDS = ("tokens", "requests", "tokens", "requests", *["tokens"] * _FURTHER)

_TEXT = "The quick brown fox jumps over the lazy dog, and nobody counts it. " * 64
EMBEDDING_DIMENSIONS = 1_536
EMBEDDING_DIMENSIONS_MAX = 4_096


# ---------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """An answer to encode. `answers`: number of answers requested (embeddings: inputs); tokens are over all of them.

    `key` determines the answer's id: the same request gets the same id again. `empty`: cut off before any usable text.
    `dimensions`, `as_base64`: for embeddings. `content`: its content. `includes_usage`: a stream ends with its usage.
    `cached_tokens`: of the prompt. `tier`: the service tier that it states.
    """

    endpoint: int
    model: str
    key: int
    created: int
    prompt_tokens: int
    output_tokens: int
    answers: int = 1
    cut_off: bool = False
    empty: bool = False
    dimensions: int = EMBEDDING_DIMENSIONS
    as_base64: bool = False
    content: Content = PROSE
    includes_usage: bool = False
    cached_tokens: int = 0
    tier: str = "default"


STATUS = {
    "bad_request": 400,
    "quota": 429,
    "slow_down": 429,
    "throttled": 429,
    "too_large": 429,
    "unauthorized": 401,
    "model_not_found": 404,
    "overloaded": 503,
    "no_capacity": 429,
}


def no_capacity_error() -> bytes:
    """Return the body of a flex attempt for which there is no capacity; the words are from third parties."""
    return error_body("Resource Unavailable", "resource_unavailable", "resource_unavailable")


def answer_body(a: AnswerSpec) -> bytes:
    """Return the body of a 200."""
    if a.endpoint == CHAT:
        text = _chat(a)
    elif a.endpoint == RESPONSES:
        text = _response(a)
    elif a.endpoint == COMPLETIONS:
        text = _completion(a)
    else:
        text = _embeddings(a)
    return text.encode("ascii")


@functools.lru_cache(maxsize=256)
def _quoted(name: str) -> str:
    return json.dumps(name)


def prose(tokens: int) -> str:
    """Return text of this many tokens, 4 characters each, that needs no escaping in JSON."""
    chars = CHARS_PER_TOKEN * tokens
    return (_TEXT * (chars // len(_TEXT) + 1))[:chars]


def text_of(a: AnswerSpec, position: int) -> str:
    """Return the text of one of several answers: the given text, as far as its tokens reach, or prose."""
    if a.empty:
        return ""
    if a.content.tokens() < 0:
        return prose(_share(a, position))
    return (a.content.text or "")[: CHARS_PER_TOKEN * _share(a, position)]


def _json_text(a: AnswerSpec, position: int) -> str:
    """Return the text of one answer as a JSON string; prose needs no escaping."""
    text = text_of(a, position)
    return f'"{text}"' if a.content.text is None else json.dumps(text)


def finish_reason(a: AnswerSpec) -> str:
    """Return how a chat choice ended."""
    return "length" if a.cut_off else "tool_calls" if a.content.calls else "stop"


def call_id(a: AnswerSpec, position: int, call: int) -> str:
    """Return the id of a tool call."""
    return f"call_{a.key:016x}{position:03d}{call:02d}"


def _share(a: AnswerSpec, position: int) -> int:
    """Return the tokens of one of several answers: an even split, with the remainder on the first ones."""
    return a.output_tokens // a.answers + (position < a.output_tokens % a.answers)


def _chat(a: AnswerSpec) -> str:
    reason = finish_reason(a)
    said = _calls if reason == "tool_calls" else lambda a, i: f'"content":{_json_text(a, i)}'
    choices = ",".join(
        f'{{"index":{i},"message":{{"role":"assistant",{said(a, i)},"refusal":null,"annotations":[]}},'
        f'"logprobs":null,"finish_reason":"{reason}"}}'
        for i in range(a.answers)
    )
    return (
        f'{{"id":"chatcmpl-{a.key:016x}","object":"chat.completion","created":{a.created},"model":{_quoted(a.model)},'
        f'"choices":[{choices}],"usage":{json.dumps(chat_usage(a))},"service_tier":"{a.tier}",'
        '"system_fingerprint":"fp_paceline"}'
    )


def _calls(a: AnswerSpec, position: int) -> str:
    calls = [
        {
            "id": call_id(a, position, k),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for k, call in enumerate(a.content.calls)
    ]
    return f'"content":null,"tool_calls":{json.dumps(calls)}'


def chat_usage(a: AnswerSpec) -> dict[str, Any]:
    """Return the usage of a chat answer."""
    return {
        "prompt_tokens": a.prompt_tokens,
        "completion_tokens": a.output_tokens,
        "total_tokens": a.prompt_tokens + a.output_tokens,
        "prompt_tokens_details": {"cached_tokens": a.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": a.output_tokens if a.empty else 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _completion(a: AnswerSpec) -> str:
    reason = "length" if a.cut_off else "stop"
    choices = ",".join(
        f'{{"text":{_json_text(a, i)},"index":{i},"logprobs":null,"finish_reason":"{reason}"}}'
        for i in range(a.answers)
    )
    return (
        f'{{"id":"cmpl-{a.key:016x}","object":"text_completion","created":{a.created},"model":{_quoted(a.model)},'
        f'"choices":[{choices}],"usage":{{"prompt_tokens":{a.prompt_tokens},"completion_tokens":{a.output_tokens},'
        f'"total_tokens":{a.prompt_tokens + a.output_tokens}}}}}'
    )


def _response(a: AnswerSpec) -> str:
    status = "incomplete" if a.cut_off else "completed"
    if a.empty:
        # All output tokens were spent on reasoning.
        output = f'{{"id":"rs_{a.key:016x}","type":"reasoning","summary":[],"status":"incomplete"}}'
    elif a.content.calls and not a.cut_off:
        calls = [
            {
                "id": f"fc_{a.key:016x}{k:02d}",
                "type": "function_call",
                "status": "completed",
                "call_id": call_id(a, 0, k),
                "name": call.name,
                "arguments": call.arguments,
            }
            for k, call in enumerate(a.content.calls)
        ]
        output = json.dumps(calls)[1:-1]
    else:
        output = (
            f'{{"id":"msg_{a.key:016x}","type":"message","status":"{status}","role":"assistant","content":'
            f'[{{"type":"output_text","text":{_json_text(a, 0)},"annotations":[],"logprobs":[]}}]}}'
        )
    details = '{"reason":"max_output_tokens"}' if a.cut_off else "null"
    return (
        f'{{"id":"resp_{a.key:016x}","object":"response","created_at":{a.created},"status":"{status}",'
        f'"background":false,"error":null,"incomplete_details":{details},"instructions":null,"max_output_tokens":null,'
        f'"model":{_quoted(a.model)},"output":[{output}],"parallel_tool_calls":true,"previous_response_id":null,'
        f'"reasoning":{{"effort":null,"summary":null}},"service_tier":"{a.tier}","store":false,"temperature":1.0,'
        '"text":{"format":{"type":"text"}},"tool_choice":"auto","tools":[],"top_p":1.0,"truncation":"disabled",'
        f'"usage":{{"input_tokens":{a.prompt_tokens},"input_tokens_details":{{"cached_tokens":'
        f'{a.cached_tokens},"cache_write_tokens":0}},'
        f'"output_tokens":{a.output_tokens},"output_tokens_details":{{"reasoning_tokens":'
        f'{a.output_tokens if a.empty else 0}}},"total_tokens":{a.prompt_tokens + a.output_tokens}}},'
        '"user":null,"metadata":{}}'
    )


@functools.lru_cache(maxsize=16)
def _vector(dimensions: int, as_base64: bool) -> str:
    """Return a unit vector as JSON; it is the same for every input, since its values are not used."""
    values = [1.0 / math.sqrt(dimensions)] * dimensions
    if as_base64:
        return json.dumps(base64.b64encode(struct.pack(f"<{dimensions}f", *values)).decode("ascii"))
    return json.dumps(values, separators=(",", ":"))


def _embeddings(a: AnswerSpec) -> str:
    vector = _vector(a.dimensions, a.as_base64)
    data = ",".join(f'{{"object":"embedding","index":{i},"embedding":{vector}}}' for i in range(a.answers))
    return (
        f'{{"object":"list","data":[{data}],"model":{_quoted(a.model)},'
        f'"usage":{{"prompt_tokens":{a.prompt_tokens},"total_tokens":{a.prompt_tokens}}}}}'
    )


def models_body(names: tuple[str, ...]) -> bytes:
    """Return the list of models."""
    data = [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "paceline"} for name in names]
    return json.dumps({"object": "list", "data": data}).encode()


# ---------------------------------------------------------------- errors


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> bytes:
    """Return an error body; all errors share this shape."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


# Errors inside an answer, by code: type and words.
_INSIDE = {
    "server_error": ("server_error", "The server had an error while processing your request. Sorry about that!"),
    "server_is_overloaded": ("service_unavailable_error", "The server is currently overloaded. Please retry later."),
    "rate_limit_exceeded": ("tokens", "Rate limit reached on tokens per min (TPM). Please try again in 1s."),
}


def failure_body(a: AnswerSpec, code: str) -> bytes:
    """Return the body of a 200 that holds an error: an error object, or a failed response."""
    kind, message = _INSIDE[code]
    if a.endpoint != RESPONSES:
        return error_body(message, kind, code)
    failed = json.loads(_response(a))
    failed |= {"status": "failed", "output": [], "usage": None, "incomplete_details": None}
    return json.dumps({**failed, "error": {"code": code, "message": message}}).encode()


def wait_text(wait_s: float) -> str:
    """Return the sentence that states a wait, "" if none is stated (-1)."""
    return f" Please try again in {duration_text(wait_s)}." if wait_s >= 0.0 else ""


def rate_error(
    model: str, d: int, limit: float, used: float, requested: float, wait_s: float, code: str = "rate_limit_exceeded"
) -> bytes:
    """Return a 429 of dimension `d`; `wait_s` in the client's seconds, -1 = not stated. `code`: the profile's.

    Used is printed as a whole number, rounded up: the message must not suggest that one more token would fit.
    """
    message = (
        f"Rate limit reached for {model} in organization {ORGANIZATION} on {_DIMENSION_WORDS[d]}: Limit {int(limit)}, "
        f"Used {math.ceil(used - 1e-6)}, Requested {int(requested)}.{wait_text(wait_s)} "
        f"Visit {LIMITS_PAGE} to learn more."
    )
    return error_body(message, _KINDS[d], code)


def too_large_error(model: str, d: int, limit: float, requested: float) -> bytes:
    """Return the 429 of a request that can never fit."""
    message = (
        f"Request too large for {model} in organization {ORGANIZATION} on {_DIMENSION_WORDS[d]}: Limit {int(limit)}, "
        f"Requested {int(requested)}. The input or output tokens must be reduced in order to run successfully. "
        f"Visit {LIMITS_PAGE} to learn more."
    )
    return error_body(message, _KINDS[d], "rate_limit_exceeded")


_QUOTA_WORDS = {
    "insufficient_quota": "You exceeded your current quota, please check your plan and billing details. For more "
    "information on this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors.",
    "credit_balance_exhausted": "You have no credits remaining. Add credits to continue.",
}


def quota_error(code: str = "insufficient_quota") -> bytes:
    """Return the 429 of an account without credit, in the classic form or with one of the newer codes."""
    message = _QUOTA_WORDS.get(code, f"Your account has reached a limit ({code}). Please check your billing details.")
    return error_body(message, "insufficient_quota", code)


def slow_down_error() -> bytes:
    """Return the 429 of a ramp that is too steep."""
    message = "Your request rate is growing too fast. Please slow down and increase it gradually."
    return error_body(message, "rate_limit_error", "slow_down")


def server_error(status: int) -> tuple[bytes, bytes]:
    """Return body and content type of a 5xx: OpenAI's own words, or for 502 and 504 those of a proxy in front of it."""
    if status in (502, 504):
        words = "502 Bad Gateway" if status == 502 else "504 Gateway Time-out"
        page = f"<html>\r\n<head><title>{words}</title></head>\r\n<body><center><h1>{words}</h1></center></body></html>"
        return page.encode(), b"text/html"
    if status == 503:
        message = "The server is currently overloaded with other requests. Sorry about that! Please retry later."
        return error_body(message, "service_unavailable_error", "server_is_overloaded"), JSON
    message = "The server had an error while processing your request. Sorry about that!"
    return error_body(message, "server_error"), JSON


def unauthorized_error(key: str) -> bytes:
    """Return the 401, which quotes part of the refused key, as the real one does."""
    shown = f"{key[:8]}{'*' * 8}{key[-4:]}" if len(key) > 12 else "*" * len(key)
    message = f"Incorrect API key provided: {shown}. You can find your API key at https://platform.openai.com/account/api-keys."
    return error_body(message, "invalid_request_error", "invalid_api_key")


def unknown_model_error(model: str) -> bytes:
    """Return the 404 of a model that does not exist or that the account may not use."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return error_body(message, "invalid_request_error", "model_not_found")


# ---------------------------------------------------------------- headers

JSON = b"application/json"


def floored_ms(seconds: float) -> float:
    """Return seconds floored to milliseconds, as in all printed times."""
    # The small addition keeps 0.644 s at 644 ms after a division by a time scale.
    return math.floor(seconds * 1000.0 + 1e-6) / 1000.0


def retry_after(wait_s: float) -> Headers:
    """Return a stated wait as Retry-After, as an integer if it is whole seconds; no header for -1."""
    return [(b"retry-after", f"{wait_s:.3f}".rstrip("0").rstrip(".").encode())] if wait_s >= 0.0 else []


def retry_after_ms(wait_s: float) -> Headers:
    """Return a stated wait in milliseconds, in the header that the official SDK reads first; no header for -1."""
    return [(b"retry-after-ms", b"%d" % round(wait_s * 1000.0))] if wait_s >= 0.0 else []


def reset_s(pp: ProviderParams, ps: ProviderState, d: int) -> float:
    """Return the provider's seconds until dimension `d` is fully reset, if there is no further use."""
    if pp.window[d] != win.BUCKET:
        return 0.0 if ps.used[d] <= 0.0 else win.empty_at(pp, ps, d) - ps.at
    limit = prov.limit_now(pp, ps, d)
    return refill_reset_s(limit, limit - ps.used[d], pp.length_s[d])


# Prefixes of the names of counts.
_PREFIXES = {"openai": "x-ratelimit-", "api_key": "x-ratelimit-api_key-", "llm_provider": "llm_provider-x-ratelimit-"}


def own_headers(number: int, processing_s: float) -> Headers:
    """Return the headers that every answer carries; `processing_s` in the client's seconds."""
    return [
        (b"x-request-id", b"req_%032x" % number),
        (b"openai-organization", ORGANIZATION.encode()),
        (b"openai-version", b"2020-10-01"),
        (b"openai-processing-ms", b"%d" % (processing_s * 1000.0)),
    ]


def stated_wait_s(wait_s: float, scale: float) -> float:
    """Return a wait as stated to the client, floored to milliseconds; -1 = none."""
    return floored_ms(wait_s / scale) if wait_s >= 0.0 else -1.0


def limit_headers(
    pp: ProviderParams, ps: ProviderState, scale: float, names: str = "openai", epoch_s: float = 0.0
) -> Headers:
    """Return the x-ratelimit-* triples as of the last admission; resets are divided by `scale`. No limit, no triple.

    `names`: OpenAI's names, the same behind a gateway's prefix, or `plain`: only x-ratelimit-limit, -remaining and
    -reset, of the closest limit, in whole seconds, as middleware for web applications states them.
    """
    known = [("requests", prov.requests_dimension(pp, ps)), ("tokens", prov.TPM)]
    known = [(word, d) for word, d in known if d >= 0 and pp.limit[d] > 0.0]
    if names == "plain":
        known = sorted(known, key=lambda each: prov.remaining(pp, ps, each[1]) / pp.limit[each[1]])[:1]
    headers: Headers = []
    for word, d in known:
        limit, left = prov.limit_now(pp, ps, d), prov.remaining(pp, ps, d)
        wait_s = reset_s(pp, ps, d) / scale
        if names == "plain":
            first, last, reset = "x-ratelimit-", "", f"{math.ceil(wait_s)}"
        else:
            first, last, reset = _PREFIXES[names], f"-{word}", duration_text(floored_ms(wait_s))
        for kind, value in (("limit", f"{limit:.0f}"), ("remaining", f"{left:.0f}"), ("reset", reset)):
            headers.append((f"{first}{kind}{last}".encode(), value.encode()))
    return headers

"""Answers, streams, errors and headers of the synthetic provider in Anthropic's forms: its messages endpoint.

The functions have the same names as in `wire` and `streams`, which write OpenAI's forms. Forms: the official SDK 2.14,
which tests drive; wordings: docs/explanation/provider.md. The model has one token limit, so the headers state
`requests` and `tokens` and do not separate input from output.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

from sim.model import provider as prov
from sim.model.provider import ProviderParams, ProviderState
from sim.serving import wire
from sim.serving.streams import Timed, event_bytes, pieces
from sim.serving.wire import AnswerSpec, Headers

_ORGANIZATION = "00000000-0000-4000-8000-7061636c696e"
STATUS = {
    "bad_request": 400,
    "quota": 400,
    "slow_down": 429,
    "throttled": 429,
    "too_large": 429,
    "unauthorized": 401,
    "model_not_found": 404,
    "overloaded": 529,
}


def answer_body(a: AnswerSpec) -> bytes:
    """Return the body of a 200."""
    return json.dumps(_message(a, _blocks(a), _stop_reason(a), a.output_tokens)).encode()


def _message(a: AnswerSpec, content: list[Any], stop_reason: str | None, output_tokens: int) -> dict[str, Any]:
    usage = {
        "input_tokens": a.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }
    return {
        "id": f"msg_{a.key:016x}",
        "type": "message",
        "role": "assistant",
        "model": a.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _stop_reason(a: AnswerSpec) -> str:
    return "max_tokens" if a.cut_off else "tool_use" if a.content.calls else "end_turn"


def _blocks(a: AnswerSpec) -> list[dict[str, Any]]:
    if a.content.calls and not a.cut_off:
        return [{**_tool_use(a, i), "input": json.loads(call.arguments)} for i, call in enumerate(a.content.calls)]
    text = wire.text_of(a, 0)
    return [{"type": "text", "text": text}] if text else []


def _tool_use(a: AnswerSpec, i: int) -> dict[str, Any]:
    """Return the head of a tool call, whose input follows."""
    return {"type": "tool_use", "id": f"toolu_{a.key:016x}{i:02d}", "name": a.content.calls[i].name, "input": {}}


def stream_of(a: AnswerSpec) -> list[Timed]:
    """Return the answer as events; see `streams.Timed`."""
    events: list[Timed] = [(0.0, _event("message_start", message=_message(a, [], None, 1)))]
    calls = a.content.calls if not a.cut_off else ()
    count = len(calls) or int(not a.empty)
    for i in range(count):
        block = _tool_use(a, i) if calls else {"type": "text", "text": ""}
        kind, field = ("input_json_delta", "partial_json") if calls else ("text_delta", "text")
        parts = pieces(calls[i].arguments if calls else wire.text_of(a, 0))
        events.append((i / count, _event("content_block_start", index=i, content_block=block)))
        if i == 0:
            events.append((0.0, _event("ping")))
        for k, part in enumerate(parts):
            delta = {"type": kind, field: part}
            events.append(((i + (k + 1) / len(parts)) / count, _event("content_block_delta", index=i, delta=delta)))
        events.append(((i + 1) / count, _event("content_block_stop", index=i)))
    ended = {"stop_reason": _stop_reason(a), "stop_sequence": None}
    usage = {"input_tokens": a.prompt_tokens, "output_tokens": a.output_tokens}
    events.append((1.0, _event("message_delta", delta=ended, usage=usage)))
    events.append((1.0, _event("message_stop")))
    return events


def _event(kind: str, **fields: Any) -> bytes:
    return event_bytes({"type": kind, **fields}, kind)


_INSIDE = {
    "server_error": ("api_error", "Internal server error"),
    "server_is_overloaded": ("overloaded_error", "Overloaded"),
    "rate_limit_exceeded": ("rate_limit_error", "This request would exceed your organization's rate limit."),
}


def failure_event(a: AnswerSpec, code: str, sequence: int) -> bytes:
    """Return the event that ends a stream with an error."""
    kind, message = _INSIDE[code]
    return event_bytes(json.loads(error_body(message, kind)), "error")


def failure_body(a: AnswerSpec, code: str) -> bytes:
    """Return the body of a 200 that holds an error."""
    kind, message = _INSIDE[code]
    return error_body(message, kind)


# ---------------------------------------------------------------- errors


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> bytes:
    """Return an error body; all errors share this shape."""
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()


_WORDS = ("tokens per minute", "requests per minute", "tokens per day", "requests per day", *["tokens per minute"] * 4)


def rate_error(model: str, d: int, limit: float, used: float, requested: float, wait_s: float) -> bytes:
    """Return a 429 of dimension `d`; its wait is stated only in the header."""
    message = (
        f"This request would exceed your organization's rate limit of {int(limit):,} {_WORDS[d]} "
        f"(org: {_ORGANIZATION}, model: {model}). Please reduce the prompt length or the maximum tokens requested, or "
        "try again later."
    )
    return error_body(message, "rate_limit_error")


def too_large_error(model: str, d: int, limit: float, requested: float) -> bytes:
    """Return the 429 of a request above the limit itself: the same words, with the requested amount."""
    message = (
        f"This request of {int(requested):,} would exceed your organization's rate limit of {int(limit):,} {_WORDS[d]} "
        f"by itself (Limit {int(limit)}, Requested {int(requested)}). Please reduce the prompt length."
    )
    return error_body(message, "rate_limit_error")


def quota_error(code: str = "") -> bytes:
    """Return the error of an account without credit."""
    message = (
        "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade or "
        "purchase credits."
    )
    return error_body(message, "invalid_request_error")


def slow_down_error() -> bytes:
    """Return the 429 of a ramp that is too steep."""
    message = (
        "This request would exceed your organization's maximum usage increase rate for input tokens per minute. Please "
        "scale up your input tokens usage more gradually to stay within the acceleration limit."
    )
    return error_body(message, "rate_limit_error")


def server_error(status: int) -> tuple[bytes, bytes]:
    """Return body and content type of a 5xx."""
    if status in (502, 504):
        return wire.server_error(status)
    kind, message = _INSIDE["server_is_overloaded" if status in (503, 529) else "server_error"]
    return error_body(message, kind), wire.JSON


def unauthorized_error(key: str) -> bytes:
    """Return the 401, which does not quote the key."""
    return error_body("invalid x-api-key", "authentication_error")


def unknown_model_error(model: str) -> bytes:
    """Return the 404 of a model that does not exist."""
    return error_body(f"model: {model}", "not_found_error")


# ---------------------------------------------------------------- headers


def own_headers(number: int, processing_s: float) -> Headers:
    """Return the headers that every answer carries."""
    return [(b"request-id", b"req_%024d" % number), (b"anthropic-organization-id", _ORGANIZATION.encode())]


def stated_wait_s(wait_s: float, scale: float) -> float:
    """Return a wait as stated: whole seconds of the provider, rounded up; -1 = none."""
    return math.ceil(wait_s - 1e-6) / scale if wait_s >= 0.0 else -1.0


def limit_headers(pp: ProviderParams, ps: ProviderState, scale: float, names: str, epoch_s: float) -> Headers:
    """Return the anthropic-ratelimit-* triples as of the last admission; resets are instants. No limit, no triple."""
    headers: Headers = []
    for word, d in (("requests", prov.requests_dimension(pp, ps)), ("tokens", prov.TPM)):
        if d < 0 or pp.limit[d] <= 0.0:
            continue
        reset = datetime.fromtimestamp(epoch_s + wire.reset_s(pp, ps, d) / scale, UTC)
        values = {
            "limit": f"{prov.limit_now(pp, ps, d):.0f}",
            "remaining": f"{prov.remaining(pp, ps, d):.0f}",
            "reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        headers += [(f"anthropic-ratelimit-{word}-{part}".encode(), value.encode()) for part, value in values.items()]
    return headers

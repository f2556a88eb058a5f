"""Answers of the synthetic provider as server-sent events in OpenAI's forms: chat, completions and responses.

An answer is sent in pieces of one token each, or more if it has more than `PIECES_MAX` tokens, spread evenly over the
time that its tokens take. Forms: the official SDK 3.54, which tests drive.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from governor.model.estimate import CHARS_PER_TOKEN, CHAT, RESPONSES
from sim.serving import wire
from sim.serving.wire import AnswerSpec

# An event, and when it is due: 0 = with the first token, 1 = with the last.
Timed = tuple[float, bytes]

PIECES_MAX = 64
CONTENT_TYPE = b"text/event-stream; charset=utf-8"
_DONE = b"data: [DONE]\n\n"


def event_bytes(data: dict[str, Any], name: str = "") -> bytes:
    """Return one event as bytes."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def pieces(text: str) -> list[str]:
    """Return the text in the pieces in which it is sent; none for an empty text."""
    size = max(CHARS_PER_TOKEN, -(-len(text) // PIECES_MAX))
    return [text[at : at + size] for at in range(0, len(text), size)]


def stream_of(a: AnswerSpec) -> list[Timed]:
    """Return the answer as events."""
    if a.endpoint == RESPONSES:
        return _response(a)
    events = _chat(a) if a.endpoint == CHAT else _completion(a)
    return [*events, (1.0, _DONE)]


def _spread(count: int, send: Callable[[int], bytes]) -> list[Timed]:
    return [((k + 1) / count, send(k)) for k in range(count)]


def _chat(a: AnswerSpec) -> list[Timed]:
    head = {
        "id": f"chatcmpl-{a.key:016x}",
        "object": "chat.completion.chunk",
        "created": a.created,
        "model": a.model,
        "service_tier": a.tier,
        "system_fingerprint": "fp_paceline",
    }
    # In a stream that includes usage, every other chunk states null usage.
    usage: dict[str, Any] = {"usage": None} if a.includes_usage else {}

    def chunk(i: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event_bytes({**head, "choices": [choice], **usage})

    calls = a.content.calls if not a.cut_off else ()
    deltas: list[tuple[int, dict[str, Any]]] = []
    events: list[Timed] = []
    for i in range(a.answers):
        content = None if calls else ""
        events.append((0.0, chunk(i, {"role": "assistant", "content": content, "refusal": None})))
        for k, call in enumerate(calls):
            function = {"name": call.name, "arguments": ""}
            called = {"index": k, "id": wire.call_id(a, i, k), "type": "function", "function": function}
            deltas.append((i, {"tool_calls": [called]}))
            for part in pieces(call.arguments):
                deltas.append((i, {"tool_calls": [{"index": k, "function": {"arguments": part}}]}))
        if not calls:
            deltas += [(i, {"content": part}) for part in pieces(wire.text_of(a, i))]
    events += _spread(len(deltas), lambda k: chunk(*deltas[k]))
    reason = wire.finish_reason(a)
    events += [(1.0, chunk(i, {}, reason)) for i in range(a.answers)]
    if a.includes_usage:
        events.append((1.0, event_bytes({**head, "choices": [], "usage": wire.chat_usage(a)})))
    return events


def _completion(a: AnswerSpec) -> list[Timed]:
    head = {"id": f"cmpl-{a.key:016x}", "object": "text_completion", "created": a.created, "model": a.model}
    usage: dict[str, Any] = {"usage": None} if a.includes_usage else {}

    def chunk(i: int, text: str, finish: str | None = None) -> bytes:
        choice = {"text": text, "index": i, "logprobs": None, "finish_reason": finish}
        return event_bytes({**head, "choices": [choice], **usage})

    parts = [(i, part) for i in range(a.answers) for part in pieces(wire.text_of(a, i))]
    events = _spread(len(parts), lambda k: chunk(*parts[k]))
    reason = "length" if a.cut_off else "stop"
    events += [(1.0, chunk(i, "", reason)) for i in range(a.answers)]
    if a.includes_usage:
        total = a.prompt_tokens + a.output_tokens
        counts = {"prompt_tokens": a.prompt_tokens, "completion_tokens": a.output_tokens, "total_tokens": total}
        events.append((1.0, event_bytes({**head, "choices": [], "usage": counts})))
    return events


# ---------------------------------------------------------------- responses


class _Numbered:
    """Events of a response, with their sequence numbers."""

    def __init__(self) -> None:
        self.events: list[Timed] = []

    def add(self, due: float, kind: str, **fields: Any) -> None:
        data = {"type": kind, "sequence_number": len(self.events), **fields}
        self.events.append((due, event_bytes(data, kind)))


def _response(a: AnswerSpec) -> list[Timed]:
    whole = json.loads(wire.answer_body(a))
    begun = {**whole, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    stream = _Numbered()
    stream.add(0.0, "response.created", response=begun)
    stream.add(0.0, "response.in_progress", response=begun)
    items = whole["output"]
    for index, item in enumerate(items):
        _item(stream, index, item, index / len(items), (index + 1) / len(items))
    stream.add(1.0, f"response.{whole['status']}", response=whole)
    return stream.events


def _item(stream: _Numbered, index: int, item: dict[str, Any], begin: float, end: float) -> None:
    """Add one item of a response's output, between these times."""
    place = {"output_index": index, "item_id": item["id"]}
    bare: dict[str, dict[str, Any]] = {"message": {"content": []}, "function_call": {"arguments": ""}}
    empty = bare.get(item["type"], {})
    stream.add(begin, "response.output_item.added", output_index=index, item={**item, "status": "in_progress", **empty})
    if item["type"] == "function_call":
        _deltas(stream, "response.function_call_arguments", item["arguments"], place, begin, end)
        said = {"arguments": item["arguments"], "name": item["name"]}
        stream.add(end, "response.function_call_arguments.done", **place, **said)
    elif item["type"] == "message":
        part = item["content"][0]
        place = {**place, "content_index": 0}
        stream.add(begin, "response.content_part.added", **place, part={**part, "text": ""})
        _deltas(stream, "response.output_text", part["text"], {**place, "logprobs": []}, begin, end)
        stream.add(end, "response.output_text.done", **place, text=part["text"], logprobs=[])
        stream.add(end, "response.content_part.done", **place, part=part)
    stream.add(end, "response.output_item.done", output_index=index, item=item)


def _deltas(stream: _Numbered, kind: str, text: str, place: dict[str, Any], begin: float, end: float) -> None:
    parts = pieces(text)
    for k, part in enumerate(parts):
        stream.add(begin + (end - begin) * (k + 1) / len(parts), f"{kind}.delta", **place, delta=part)


# ---------------------------------------------------------------- errors inside


def failure_event(a: AnswerSpec, code: str, sequence: int) -> bytes:
    """Return the event that ends a stream with an error; `sequence`: its number among the events of a response."""
    failed = json.loads(wire.failure_body(a, code))
    if a.endpoint != RESPONSES:
        return event_bytes(failed)
    return event_bytes({"type": "response.failed", "sequence_number": sequence, "response": failed}, "response.failed")

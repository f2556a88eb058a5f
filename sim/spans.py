"""Exports of traces in JSON as rows of a log: OpenTelemetry's GenAI spans, and what LiteLLM logs of a call.

What lives here: finding the spans in a document and naming their fields. What must not: any check of a value (`logs`).

Theory of operation. Read are OTLP documents (`resourceSpans`, one document or one per line, as collectors write them),
lists or lines of what OpenTelemetry's console exporter prints, and LiteLLM's standard logging payloads, lists or lines.
Spans that are not of a model call are left out. A complaint names the line on which the span's id stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from governor.errors import BadInput
from sim.logs import LogRows
from sim.observed import Observed, observed_of
from sim.readers import Source

Row = dict[str, Any]
# Our column -> the attributes of a GenAI span that may hold it, newest convention first.
ATTRIBUTES = {
    "prompt": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.usage.prompt_tokens"),
    "output": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.usage.completion_tokens"),
    "max_tokens": ("gen_ai.request.max_tokens", "llm.request.max_tokens"),
    "model": ("gen_ai.request.model", "gen_ai.response.model"),
    "status": ("http.response.status_code", "http.status_code", "error.type"),
    "first_token": ("gen_ai.response.time_to_first_chunk", "gen_ai.server.time_to_first_token"),
}
HEADERS = {
    "limit_tokens": "limit-tokens",
    "remaining_tokens": "remaining-tokens",
    "limit_requests": "limit-requests",
    "remaining_requests": "remaining-requests",
}
ROLES: dict[str, tuple[str, str]] = {
    **{role: (role, "") for role in ("id", "model", "prompt", "output", "max_tokens", "status", *HEADERS)},
    **{role: (role, "") for role in ("launched", "finished")},
    "first_token": ("first_token", "s"),
    "retry_after": ("retry_after", "s"),
}


def looks_like_spans(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an export that this module reads."""
    marks = (b'"resourceSpans"', b'"gen_ai.', b'"llm.usage', b'"startTime"', b'"startTimeUnixNano"')
    return any(mark in head for mark in marks)


def of_spans(source: Source) -> Observed:
    """The model calls of an export. BadInput, naming the line, for JSON that cannot be read or where there is none."""
    with source.stream() as stream:
        raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInput(f"not UTF-8 text: {error.reason}", source.name, line) from None
    rows = LogRows(ROLES, source.name)
    skipped = 0
    for line, span in _spans(text, source.name):
        row = _row(span)
        if row is None:
            skipped += 1
            continue
        rows.add(row, line)
    if not rows.lines:
        raise BadInput("no span of a model call in it (gen_ai.usage.* or prompt_tokens)", source.name)
    notes = (f"{source.label}: {skipped:,} spans are not of a model call and are left out",) if skipped else ()
    return observed_of(source.label, rows.columns(), source=source.name, notes=notes)


def _spans(text: str, name: str) -> Iterator[tuple[int, Row]]:
    for first, document in _documents(text, name):
        for span in _of_document(document):
            number = span.get("spanId") or span.get("id") or ""
            place = text.find(f'"{number}"') if number else -1
            yield (text.count("\n", 0, place) + 1 if place >= 0 else first), span


def _documents(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """The JSON documents of a text: one after the other, each wherever the one before ends."""
    decoder = json.JSONDecoder()
    at = 0
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if at >= len(text):
            return
        try:
            document, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            cut = "; the file is cut short: was it written to its end?" if error.pos >= len(text.rstrip()) - 1 else ""
            if error.msg.startswith("Unterminated"):
                cut = "; the line is cut short: was the file written to its end?"
            raise BadInput(f"not JSON: {error.msg} (column {error.colno}){cut}", name, error.lineno) from None
        except RecursionError:
            raise BadInput("not JSON that can be read: nested too deeply", name) from None
        yield text.count("\n", 0, at) + 1, document
        at = end


def _of_document(document: Any) -> Iterator[Row]:
    if isinstance(document, list):
        for part in document:
            yield from _of_document(part)
    elif isinstance(document, dict):
        for resource in _dicts(document.get("resourceSpans")):
            for scope in _dicts(resource.get("scopeSpans")):
                yield from _dicts(scope.get("spans"))
        if "resourceSpans" not in document:
            yield document


def _dicts(value: Any) -> list[Row]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _row(span: Mapping[str, Any]) -> Row | None:
    """The span as a row of a log, None where it is not of a model call."""
    if "startTime" in span and ("prompt_tokens" in span or "call_type" in span):
        return _of_litellm(span)
    attributes = _attributes(span.get("attributes"))
    if not any(name in attributes for name in (*ATTRIBUTES["prompt"], *ATTRIBUTES["model"])):
        return None
    row: Row = {"id": span.get("spanId") or _of(span, "context").get("span_id", "")}
    for role, names in ATTRIBUTES.items():
        row[role] = next((attributes[name] for name in names if name in attributes), None)
    if isinstance(row["status"], str) and not row["status"].isdecimal():
        row["status"] = 429 if "ratelimit" in row["status"].replace("_", "").lower() else "error"
    for role, nanoseconds, date in (
        ("launched", "startTimeUnixNano", "start_time"),
        ("finished", "endTimeUnixNano", "end_time"),
    ):
        row[role] = span.get(nanoseconds, span.get(date))
    for role, word in HEADERS.items():
        row[role] = _header(attributes, word)
    row["retry_after"] = _header(attributes, "retry-after")
    return row


def _of_litellm(span: Mapping[str, Any]) -> Row:
    started, first = span.get("startTime"), span.get("completionStartTime")
    headers = _of(_of(span, "hidden_params"), "additional_headers") | _of(span, "response_headers")
    streamed = bool(span.get("stream"))
    known = isinstance(started, int | float) and isinstance(first, int | float) and streamed
    error = _of(span, "error_information")
    failed = span.get("status") == "failure"
    return {
        "id": span.get("id", ""),
        "model": span.get("model"),
        "prompt": span.get("prompt_tokens"),
        "output": None if failed else span.get("completion_tokens"),
        "max_tokens": _of(span, "model_parameters").get("max_tokens"),
        "status": (error.get("error_code") or "failure") if failed else 200,
        "launched": started,
        "finished": span.get("endTime"),
        "first_token": first - started if known else None,  # type: ignore[operator]
        "retry_after": _header(headers, "retry-after"),
        **{role: _header(headers, word) for role, word in HEADERS.items()},
    }


def _of(span: Mapping[str, Any], key: str) -> Row:
    value = span.get(key)
    return value if isinstance(value, dict) else {}


def _header(headers: Mapping[str, Any], word: str) -> Any:
    """A header's value by the end of its name, however it was written: x-ratelimit-..., x_ratelimit_..., in a list."""
    for name, value in headers.items():
        plain = name.lower().replace("_", "-")
        if plain.endswith(word) and not plain.startswith("gen-ai"):
            return value[0] if isinstance(value, list) and value else value
    return None


def _attributes(value: Any) -> Row:
    """OTLP's list of typed attributes, or the console exporter's plain object."""
    if isinstance(value, dict):
        return value
    found: Row = {}
    for part in _dicts(value):
        typed = _of(part, "value")
        key = next(iter(typed), None)
        if key == "arrayValue":
            found[str(part.get("key"))] = [next(iter(v.values()), None) for v in _dicts(_of(typed, key).get("values"))]
        elif key is not None:
            found[str(part.get("key"))] = typed[key]
    return found

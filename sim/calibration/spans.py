"""Exports of traces in JSON as rows of a log: OpenTelemetry's GenAI spans, and what LiteLLM logs of a call.

What lives here: finding the spans in a document and naming their fields. What must not: any check of a value (`logs`).

Theory of operation. Read are OTLP documents (`resourceSpans`, one document or one per line, as collectors write them),
lists or lines of what OpenTelemetry's console exporter prints, LiteLLM's standard logging payloads, lists or lines, and
the rows of its spend log, also as its proxy and Tempo wrap them (`data`, `batches`). Spans that are not of a model call
are left out, the agent's around them too, whose usage is a sum over its calls; so is what LiteLLM answered out of
its cache, which no provider saw. A call that states no usage was made all the same. A complaint names the line on which
the span's id stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from governor.model.errors import BadInput
from sim.calibration.logs import LogRows
from sim.calibration.observed import Observed, observed_of
from sim.scenario.readers import Source
from sim.scenario.trace_columns import moment_of

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
# Operations that call a model once; a span that names none may be such a call.
CALLS = ("", "chat", "completion", "text_completion", "generate_content", "embeddings", "responses")
# Keys under which documents hold a list of spans, or of calls.
WRAPPED = ("resourceSpans", "batches", "data")
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
    skipped = cached = silent = 0
    for line, span in _spans(text, source.name):
        row, shown = _row(span)
        if row is None:
            skipped += 1
        elif row.pop("cached", False):
            cached += 1
        else:
            silent += _without_usage(row)
            rows.add(row, line, shown)
    if not rows.lines:
        raise BadInput("no span of a model call in it (gen_ai.usage.* or prompt_tokens)", source.name)
    said = (
        (skipped, "spans are not of a model call and are left out"),
        (cached, "calls were answered from LiteLLM's cache and are left out"),
        (silent, "calls state no usage: their lengths are taken from the others"),
    )
    notes = tuple(f"{source.label}: {count:,} {what}" for count, what in said if count)
    return observed_of(source.label, rows.columns(), source=source.name, notes=notes)


def _without_usage(row: Row) -> bool:
    """Whether a call was answered, but its length is not told (streamed, mostly); then its row says so."""
    failed = str(row["status"] or 200)[:1] != "2"
    if failed or (row["prompt"] is not None and row["output"] is not None):
        return False
    row |= {"output": None, "status": "error"}
    return True


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
        wrapped = [part for key in WRAPPED for part in _dicts(document.get(key))]
        for resource in wrapped:
            scopes = resource.get("scopeSpans")
            for scope in _dicts(scopes):
                yield from _dicts(scope.get("spans"))
            if scopes is None:
                yield resource
        if not any(isinstance(document.get(key), list) for key in WRAPPED):
            yield document


def _dicts(value: Any) -> list[Row]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _row(span: Mapping[str, Any]) -> tuple[Row | None, Mapping[str, str]]:
    """The span as a row of a log, None where it is not of a model call, and what the span calls its columns."""
    if "startTime" in span and ("prompt_tokens" in span or "call_type" in span):
        return _of_litellm(span), LITELLM
    attributes = _attributes(span.get("attributes"))
    is_call = attributes.get("gen_ai.operation.name", "") in CALLS
    if not is_call or not any(name in attributes for name in (*ATTRIBUTES["prompt"], *ATTRIBUTES["model"])):
        return None, {}
    row: Row = {"id": span.get("spanId") or _of(span, "context").get("span_id", "")}
    shown: dict[str, str] = {}
    for role, names in ATTRIBUTES.items():
        shown[role] = next((name for name in names if name in attributes), names[0])
        row[role] = attributes.get(shown[role])
    if isinstance(row["status"], str) and not row["status"].isdecimal():
        row["status"] = 429 if "ratelimit" in row["status"].replace("_", "").lower() else "error"
    for role, nanoseconds, date in (
        ("launched", "startTimeUnixNano", "start_time"),
        ("finished", "endTimeUnixNano", "end_time"),
    ):
        shown[role] = nanoseconds if nanoseconds in span else date
        row[role] = span.get(shown[role])
    for role, word in HEADERS.items():
        row[role] = _header(attributes, word)
    row["retry_after"] = _header(attributes, "retry-after")
    return row, shown


LITELLM = {
    "prompt": "prompt_tokens",
    "output": "completion_tokens",
    "launched": "startTime",
    "finished": "endTime",
    "status": "error_code",
}


def _of_litellm(span: Mapping[str, Any]) -> Row:
    """A payload, or a row of the spend log, which holds the error within its metadata, and that as text."""
    headers = _of(_of(span, "hidden_params"), "additional_headers") | _of(span, "response_headers")
    metadata = _of(span, "metadata")
    error = _of(span, "error_information") or _of(metadata, "error_information")
    parameters = _of(span, "model_parameters")
    failed = "failure" in (span.get("status"), metadata.get("status"))
    return {
        "id": span.get("id") or span.get("request_id") or "",
        "model": span.get("model"),
        # A failed call has zero there for want of an answer.
        "prompt": (span.get("prompt_tokens") or None) if failed else span.get("prompt_tokens"),
        "output": None if failed else span.get("completion_tokens"),
        "max_tokens": parameters.get("max_tokens", parameters.get("max_completion_tokens")),
        "status": (error.get("error_code") or "failure") if failed else 200,
        "launched": span.get("startTime"),
        "finished": span.get("endTime"),
        "first_token": _first_token(span),
        "cached": str(span.get("cache_hit")).lower() == "true",
        "retry_after": _header(headers, "retry-after"),
        **{role: _header(headers, word) for role, word in HEADERS.items()},
    }


def _first_token(span: Mapping[str, Any]) -> float | None:
    """Seconds to the first token of a streamed answer; one that was not streamed has it at its end, or at 0."""
    try:
        moments = [moment_of(span.get(key)) for key in ("startTime", "completionStartTime", "endTime")]
    except ValueError:
        return None
    begun, first, ended = (at for _, at in moments)
    if span.get("stream") is False or len({is_date for is_date, _ in moments}) > 1 or not begun < first < ended:
        return None
    return (first - begun) / 1e6 if moments[0][0] else first - begun


def _of(span: Mapping[str, Any], key: str) -> Row:
    """The object under a key, which may be written as text."""
    value = span.get(key)
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
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

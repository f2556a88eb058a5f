"""Contents of the synthetic provider's answers: tool calls, JSON that follows a schema, or else plain prose.

A request gets a call of one of its tools if it forces one (`tool_choice`), if its header `x-paceline-tool-calls` states
a number, or if its model's name ends in `+tools`. The latter two apply until a tool's result is the last turn, so that
an application's tool loop ends. A request for structured output gets the smallest JSON that fits its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from governor.model.errors import BadInput
from governor.model.estimate import CHARS_PER_TOKEN, MESSAGES, RESPONSES

TOOLS_HEADER = b"x-paceline-tool-calls"
TOOLS_SUFFIX = "+tools"
TOOL_CALLS_MAX = 32
# Schemas may refer to themselves: from the first depth on, optional parts are left out; from the second, all parts.
DEPTH_FULL = 4
_DEPTH_MAX = 24


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call; `arguments`: a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Content:
    """The content of one answer. `text`: None = prose of the answer's length; `calls`: tool calls in place of text."""

    text: str | None = None
    calls: tuple[ToolCall, ...] = ()

    def tokens(self) -> int:
        """Return the tokens of the given content, 4 characters each; -1 for prose."""
        if self.text is None and not self.calls:
            return -1
        chars = len(self.text or "") + sum(len(call.name) + len(call.arguments) for call in self.calls)
        return -(-chars // CHARS_PER_TOKEN)


PROSE = Content()


def content_of(endpoint: int, headers: Mapping[bytes, bytes], body: Mapping[str, Any]) -> Content:
    """Return the content of the answer to this request. Raise BadInput if the count of tool calls is no number."""
    tools = _tools_of(endpoint, body)
    choice = body.get("tool_choice")
    kind = choice.get("type") if isinstance(choice, dict) else choice
    forced = _forced_name(choice) if isinstance(choice, dict) else ""
    count = _asked_calls(headers, body)
    if kind in ("required", "any") or forced:
        count = max(count, 1)
    elif _ends_with_a_result(endpoint, body):
        count = 0
    names = [forced] if forced in tools else sorted(tools)
    if kind != "none" and names and count:
        called = [names[i % len(names)] for i in range(count)]
        return Content(calls=tuple(ToolCall(name, _example_text(tools[name])) for name in called))
    schema = _answer_schema(body)
    return PROSE if schema is None else Content(_example_text(schema))


def _asked_calls(headers: Mapping[bytes, bytes], body: Mapping[str, Any]) -> int:
    stated = headers.get(TOOLS_HEADER, b"").decode("latin-1")
    if not stated:
        return int(str(body.get("model", "")).endswith(TOOLS_SUFFIX))
    if not re.fullmatch("[0-9]{1,2}", stated) or int(stated) > TOOL_CALLS_MAX:
        raise BadInput(f"{TOOLS_HEADER.decode()} must be a whole number from 0 to {TOOL_CALLS_MAX}")
    return int(stated)


def _tools_of(endpoint: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request's function tools by name, with the schemas of their arguments."""
    tools = body.get("tools")
    found = {}
    for tool in tools if isinstance(tools, list) else ():
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            found[inner["name"]] = inner.get("input_schema" if endpoint == MESSAGES else "parameters")
    return found


def _forced_name(choice: Mapping[str, Any]) -> str:
    """Return the tool that `tool_choice` names, in any of the endpoints' forms."""
    inner = choice.get("function", choice)
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def _ends_with_a_result(endpoint: int, body: Mapping[str, Any]) -> bool:
    turns = body.get("input" if endpoint == RESPONSES else "messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict):
        return False
    if last.get("role") in ("tool", "function") or str(last.get("type", "")).endswith("_call_output"):
        return True
    parts = last.get("content")
    return isinstance(parts, list) and any(
        isinstance(part, dict) and part.get("type") == "tool_result" for part in parts
    )


def _answer_schema(body: Mapping[str, Any]) -> Any:
    """Return the schema that the answer must follow; None if it may be prose."""
    holders = [body.get("response_format")]
    for name in ("text", "output_config"):
        holder = body.get(name)
        holders.append(holder.get("format") if isinstance(holder, dict) else None)
    for form in holders:
        if not isinstance(form, dict):
            continue
        if form.get("type") == "json_object":
            return {"properties": {"answer": {"type": "string"}}}
        if form.get("type") == "json_schema":
            inner = form.get("json_schema", form)
            return inner.get("schema") or {"type": "object"} if isinstance(inner, dict) else None
    return None


def _example_text(schema: Any) -> str:
    return json.dumps(example_of(schema if isinstance(schema, dict) else {"type": "object"}))


def example_of(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, depth: int = 0) -> Any:
    """Return a value that fits a JSON schema: first choices, lower bounds, one item per list; the minimum deep down."""
    root = schema if root is None else root
    if depth > _DEPTH_MAX:
        return None
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    if schema.get("enum"):
        return schema["enum"][0]
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target: Any = root
        for part in reference.removeprefix("#").strip("/").split("/"):
            target = target.get(part, {}) if isinstance(target, dict) else {}
        return example_of(target if isinstance(target, dict) else {}, root, depth + 1)
    is_deep = depth > DEPTH_FULL
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            return example_of(schema[name][-1 if is_deep else 0], root, depth + 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or "properties" in schema:
        properties = schema.get("properties") or {}
        names = schema.get("required", ()) if is_deep else properties
        return {name: example_of(properties.get(name, {}), root, depth + 1) for name in names}
    if kind == "array":
        count = max(int(schema.get("minItems", 0)), 0 if is_deep else 1)
        return [example_of(schema.get("items") or {}, root, depth + 1)] * count
    if kind in ("integer", "number"):
        return schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    if kind == "boolean":
        return True
    return None if kind == "null" else "text".ljust(int(schema.get("minLength", 0)), ".")

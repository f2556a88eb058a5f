"""Prompt templates: text with `{{ field }}` in it, and the requests that are made of them.

A template fills in the fields of one input and has no logic: `{{ name }}`, `{{ user.name }}`, `{{ items.0 }}`. A text
is inserted as it is, any other value as JSON. Braces that are meant as text are quoted: `{{ "{{" }}`.

Parsing and filling take time proportional to the text. (With a regular expression, each `{{` without an end would be
searched to the end of the text.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from governor.model.errors import BadInput, quoted
from governor.service.api.bodies import Template
from governor.service.errors import BAD_TEMPLATE, ApiError

RENDERED_MOST = 1_000_000
FIELDS_MOST = 5_000
PARAMETERS_MOST = 100_000
_FIELD = re.compile(r"[\w-]{1,100}(\.[\w-]{1,100}){0,20}")
_OPEN, _CLOSE, _LOGIC = "{{", "}}", ("{%", "{#")
# Fields of a request that the template itself fills in, or that a batch cannot have.
_OURS = ("model", "messages", "input", "prompt", "stream", "max_tokens", "max_completion_tokens", "max_output_tokens")


class Part(NamedTuple):
    """Some text, then a field of the input (None = nothing more)."""

    text: str
    field: str | None


def checked(template: Template) -> list[Part]:
    """Return the template, ready to fill in. Raise `ApiError` 422 for an invalid one."""
    for name in template.parameters:
        if name in _OURS:
            raise _bad(f"parameters.{name}: the template fills that in itself")
    if len(json.dumps(template.parameters)) > PARAMETERS_MOST:
        raise _bad(f"parameters are longer than {PARAMETERS_MOST:,} characters")
    return _parts(template.prompt)


def _parts(prompt: str) -> list[Part]:
    parts: list[Part] = []
    literal: list[str] = []
    at = 0
    while True:
        found = prompt.find(_OPEN, at)
        text = prompt[at:] if found < 0 else prompt[at:found]
        for mark in _LOGIC:
            if mark in text:
                begin = text.index(mark)
                raise _bad(
                    f"{_where(prompt, at + begin)}: {quoted(text[begin : begin + 40])} is template logic, and "
                    "templates only fill in fields, as {{ field }}: prepare conditions and lists in the input "
                    f'(or write {{{{ "{mark}" }}}} for these characters)'
                )
        literal.append(text)
        if found < 0:
            return [*parts, Part("".join(literal), None)]
        inner, at = _tag(prompt, found)
        if len(inner) > 1 and inner[0] == inner[-1] and inner[0] in "\"'":
            literal.append(inner[1:-1])
            continue
        if not _FIELD.fullmatch(inner):
            raise _bad(
                f"{_where(prompt, found)}: {quoted(inner[:60])} is not the name of a field: write {{{{ field }}}} or "
                "{{ field.inner }}, without filters and expressions"
            )
        parts.append(Part("".join(literal), inner))
        literal = []
        if len(parts) > FIELDS_MOST:
            raise _bad(f"prompt: more than {FIELDS_MOST:,} fields in it")


def _tag(prompt: str, found: int) -> tuple[str, int]:
    """Return the text between `{{` at `found` and its end, and the place after that; quoted braces do not end it."""
    start = found + len(_OPEN)
    begin = start
    while begin < len(prompt) and prompt[begin].isspace():
        begin += 1
    from_ = start
    if begin < len(prompt) and prompt[begin] in "\"'":
        closing = prompt.find(prompt[begin], begin + 1)
        from_ = closing + 1 if closing >= 0 else start
    end = prompt.find(_CLOSE, from_)
    if end < 0:
        raise _bad(
            f'{_where(prompt, found)}: {{{{ without }}}}: close it, or write {{{{ "{{{{" }}}} for the characters'
        )
    return prompt[start:end].strip(), end + len(_CLOSE)


def _where(prompt: str, at: int) -> str:
    return f"prompt, line {prompt.count(chr(10), 0, at) + 1}"


def _bad(message: str) -> ApiError:
    return ApiError(422, BAD_TEMPLATE, message)


def rendered(parts: Iterable[Part], fields: Mapping[str, Any], place: str) -> str:
    """Return the prompt for one input. Raise BadInput, naming the input, if it cannot be filled in."""
    texts: list[str] = []
    size = 0
    for text, field in parts:
        texts.append(text)
        if field is not None:
            texts.append(_text_of(_value(fields, field, place), field, place))
            size += len(texts[-1])
        size += len(text)
        if size > RENDERED_MOST:
            raise BadInput(f"the prompt becomes longer than {RENDERED_MOST:,} characters", place)
    return "".join(texts)


def _value(fields: Mapping[str, Any], field: str, place: str) -> Any:
    if field in fields:
        return fields[field]  # a column's name may contain a dot
    value: Any = fields
    for name in field.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isascii() and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise BadInput(f"the template fills in {quoted(field)}, which this input lacks", place)
    return value


def _text_of(value: Any, field: str, place: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):
        raise BadInput(f"field {quoted(field)} is nested too deeply", place) from None


# ---------------------------------------------------------------- requests


def lines_of(template: Template, inputs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line of the batch format for each input; custom_id `i3` is the fourth input's."""
    parts = checked(template)
    for i, fields in enumerate(inputs):
        body = body_of(template, rendered(parts, fields, f"input {i}"))
        record = {"custom_id": f"i{i}", "method": "POST", "url": template.endpoint, "body": body}
        yield json.dumps(record, separators=(",", ":"))


def body_of(template: Template, prompt: str) -> dict[str, Any]:
    """Return the body to send for a rendered prompt."""
    body: dict[str, Any] = {"model": template.model, **template.parameters}
    cap = template.max_output_tokens
    if template.endpoint == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": prompt}]
        if cap is not None:
            body["max_completion_tokens" if _reasons(template.model) else "max_tokens"] = cap
    elif template.endpoint == "/v1/responses":
        body["input"] = prompt
        if cap is not None:
            body["max_output_tokens"] = cap
    elif template.endpoint == "/v1/completions":
        body["prompt"] = prompt
        if cap is not None:
            body["max_tokens"] = cap
    else:
        body["input"] = prompt
    return body


def _reasons(model: str) -> bool:
    """Return whether a chat model takes its cap under the newer name only."""
    return model.startswith(("o1", "o3", "o4", "gpt-5", "gpt-6"))

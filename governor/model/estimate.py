"""Estimate a request's tokens before it is sent: how large it is, and what it is charged against the limit.

**Sizes.** Prompt tokens are estimated from text, offline: UTF-8 bytes / 4. That is chars/4 for ASCII (1.06 of the real
tokenizer's count in the median for English, 1.09 for Python) and 0.93 for Chinese, where chars/4 gives 0.57; other
scripts are over-estimated rather than under-estimated. Then 4 are added per message and 3 for the reply
(docs/explanation/provider.md#sizes). JSON schemas of function tools and of structured output count as text too, which
over-estimates them: recordings show about 6 of their characters per token. An under-estimate costs a 429, an
over-estimate only waits.

**Charges.** The formulas are those measured from recorded headers (docs/explanation/provider.md#charge):

    rule             chat                                       completions                  embeddings
    fixed            the policy's estimate per run              the same                     the same
    prompt_chars4    0.2504 x chars + messages + 1.7            ceil(chars/4)                ceil(chars/4)
    prompt_plus_max  ceil((chars + role chars)/4) + n x cap     the same                     ceil(chars/4)
    max_of           max(ceil((chars + role chars)/4), cap)     the same                     ceil(chars/4)
    responses        prompt tokens + 20, or + 217 with function tools, whatever the endpoint
    learned          ours alone, until answers have come: prompt_plus_max, the estimate per run for a missing cap
    auto             what is measured for the endpoint: prompt_chars4, for responses `responses`;
                     before 2025-03-20 prompt_plus_max for chat and completions

The responses endpoint under the character rules takes its own measured count (`responses`) in place of characters, and
`prompt_chars4` is then the same as `responses`. Every image adds 765 except under `fixed`. (Three images given by URL
in early 2024 were charged nothing; later ones were.)

An undeclared cap counts 16 under prompt_plus_max, as measured on the old chat rule, and 0 under max_of: the characters
alone. Neither then covers the answer, so `auto` is no less safe there. The documentation states max_of, but no
recording fits it; with a declared cap, prompt_plus_max is the largest. For a trace that knows tokens only, the caller
passes chars = 4 x prompt tokens, which makes ceil(chars/4) the prompt tokens again.

**Ints and arrays alike.** All formulas are elementwise arithmetic on whole numbers, so that one line charges a single
request and a NumPy column of a million requests: -(-x // 4) is a ceiling, a comparison times a value is a choice. Whole
numbers in give whole numbers of the same type out; `endpoint` may be an array too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from governor.model.errors import BadInput, BadSetting, quoted

CHAT = 0
RESPONSES = 1
EMBEDDINGS = 2
COMPLETIONS = 3
# Anthropic's endpoint is governed and served, but no line of a batch file names it.
MESSAGES = 4

RULES = ("fixed", "prompt_chars4", "prompt_plus_max", "max_of", "responses", "auto")
# How we may reserve: `learned` begins with the declared sizes and goes on with the tokens used (see `learning`).
LEARNED = "learned"

CHARS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
TOKENS_PER_REPLY = 3
TOKENS_PER_IMAGE = 765
# Assumed for each file, recording, film, stored prompt or earlier response that a request only points to: nothing on
# this side tells its length. A PDF counts its text and an image of every page, so this is about three pages.
TOKENS_PER_FILE = 5_000
UNSEEN_PARTS = {
    **dict.fromkeys(("input_file", "file", "document"), "files"),
    **dict.fromkeys(("input_audio", "audio"), "audio"),
    **dict.fromkeys(("input_video", "video_url", "video"), "video"),
}
IMAGE_PARTS = ("image_url", "input_image", "image", "computer_screenshot")
# Fields of a part or an item whose content the model reads as text: tool calls, code, patches, search results.
READ_FIELDS = ("arguments", "input", "code", "action", "operation", "results", "stdout", "stderr", "thinking")
# The completions endpoint's default, which the chat endpoint's old charge shares.
CAP_UNDECLARED = 16
RESPONSES_EXTRA = 20
RESPONSES_EXTRA_TOOLS = 217
# The switch was seen between 17 and 20 March 2025 on chat; completions were not recorded between 2024-04 and 2025-07.
CHARS_ALONE_SINCE = "2025-03-20"
# Far above any model's limit, far below the values at which sums and products of 64-bit arrays overflow.
WHOLE_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a request that are known when it is submitted; never anything of its answer.

    `prompt_tokens`: real or estimated. `chars`: characters of text, roles and schemas excluded; tokens given as numbers
    count 4 each. `role_chars`: characters of role names. `tools`: function tools. `n`: answers asked for (`best_of`
    included). `max_tokens`: the declared cap per answer, -1 = none declared.
    """

    endpoint: int
    prompt_tokens: int
    chars: int
    role_chars: int
    messages: int
    images: int
    tools: int
    n: int
    max_tokens: int


# ---------------------------------------------------------------- charges

# Typed for one request; NumPy arrays of whole numbers, whose comparisons are arrays too, go the same way.


def larger(a: int, b: int) -> int:
    """Return the larger of the two, elementwise."""
    return a + (b - a) * (b > a)


def ceil_div(a: int, b: int) -> int:
    """Return `a / b` rounded up, elementwise."""
    return -(-a // b)


def chosen(condition: bool, yes: int, no: int) -> int:
    """Return `yes` if `condition` holds (True or 1), else `no`, elementwise."""
    return no + (yes - no) * condition


def chat_chars(chars: int, messages: int) -> int:
    """Return 0.2504 x chars + 1.0 per message + 1.7, to the nearest token.

    Measured on chat since 2025-03-20, median error 0.7 of 75.
    """
    # Over 1,250, with 625 for the rounding: small factors do not overflow arrays of narrow integers.
    return (313 * chars + 1_250 * messages + 2_125 + 625) // 1_250


def responses_prompt(prompt_tokens: int, tools: int) -> int:
    """Return the real input tokens + 20, or + 217 with function tools: the responses endpoint, 2025-05 to 2026-06."""
    return prompt_tokens + chosen(tools > 0, RESPONSES_EXTRA_TOOLS, RESPONSES_EXTRA)


def charge_of(rule: str, sizes: Sizes, est_tokens_per_run: int, as_of: str = "") -> int:
    """Return the tokens counted against the limit for one request, elementwise for `sizes` made of arrays.

    `as_of`: the day, YYYY-MM-DD, whose measured formula `auto` takes; "" = the newest. Raise BadSetting for an unknown
    rule and for an invalid day. Formulas: this module's docstring.
    """
    if rule not in RULES and rule != LEARNED:
        raise BadSetting(f"charge rule {quoted(rule)} does not exist: use one of {', '.join((*RULES, LEARNED))}")
    if as_of and not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", as_of):
        raise BadSetting(f"as-of day {quoted(as_of)} is not a day: write YYYY-MM-DD")
    endpoint, chars, max_tokens = sizes.endpoint, sizes.chars, sizes.max_tokens
    if rule == "fixed":
        return est_tokens_per_run + 0 * sizes.prompt_tokens
    undeclared = CAP_UNDECLARED
    if rule == LEARNED:
        rule, undeclared = "prompt_plus_max", est_tokens_per_run
    pictures = TOKENS_PER_IMAGE * sizes.images
    counted = responses_prompt(sizes.prompt_tokens, sizes.tools)
    if rule == "responses":
        return counted + pictures
    if rule == "auto":
        rule = "prompt_plus_max" if as_of and as_of < CHARS_ALONE_SINCE else "prompt_chars4"
        # The responses endpoint was measured only after the switch, and never counted the cap.
        max_tokens = chosen(endpoint == RESPONSES, 0, max_tokens)
    if rule == "prompt_chars4":
        text = chosen(endpoint == CHAT, chat_chars(chars, sizes.messages), ceil_div(chars, CHARS_PER_TOKEN))
        return chosen(endpoint == RESPONSES, counted, text) + pictures
    # Embeddings have neither roles nor an answer.
    speaks = endpoint != EMBEDDINGS
    text = ceil_div(chars + sizes.role_chars * speaks, CHARS_PER_TOKEN)
    text = chosen(endpoint == RESPONSES, counted, text) + pictures
    if rule == "max_of":
        return larger(text, max_tokens * speaks)
    return text + sizes.n * chosen(max_tokens < 0, undeclared, max_tokens) * speaks


# ---------------------------------------------------------------- sizes of a body


class _Tally:
    """Sum up one body: characters for the charge rules, bytes for the estimate of tokens."""

    __slots__ = ("chars", "images", "messages", "role_chars", "unseen", "utf8")

    def __init__(self) -> None:
        self.chars = self.utf8 = self.role_chars = self.messages = self.images = 0
        self.unseen: list[str] = []

    def text(self, text: str) -> None:
        self.chars += len(text)
        self.utf8 += _utf8_bytes(text)

    def message(self, role: object) -> None:
        self.messages += 1
        self.role_chars += len(role) if isinstance(role, str) else 0

    def content(self, content: object, place: str) -> None:
        """Add text, a list of parts, or nothing."""
        if content is None:
            return
        if isinstance(content, str):
            self.text(content)
            return
        if not isinstance(content, list):
            raise BadInput(f"{place} is {kind_of(content)}, not text or a list of parts")
        for part in content:
            if isinstance(part, str):
                self.text(part)
            elif not isinstance(part, dict):
                raise BadInput(f"{place} holds {kind_of(part)} where a part should be")
            elif part.get("type") in IMAGE_PARTS:
                self.images += 1
            elif part.get("type") in UNSEEN_PARTS:
                self.unseen.append(UNSEEN_PARTS[part["type"]])
            elif part.get("type") == "tool_result":
                self.content(part.get("content"), place)
            else:
                self.text(next((part[key] for key in ("text", "refusal") if isinstance(part.get(key), str)), ""))
                self.read_fields(part)

    def read_fields(self, item: Mapping[str, Any]) -> None:
        for name in READ_FIELDS:
            self.unread(item.get(name) or None)

    def unread(self, value: object) -> None:
        """Add text that the model reads but the measured charge does not count: tool calls, schemas."""
        if value is not None:
            self.utf8 += _utf8_bytes(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def sizes_of(endpoint: int, body: Mapping[str, Any]) -> Sizes:
    """Return the `Sizes` of a request's body.

    Raise BadInput, without a place, for a body that the endpoint would reject.
    """
    return measured(endpoint, body)[0]


def measured(endpoint: int, body: Mapping[str, Any], file_tokens: int = TOKENS_PER_FILE) -> tuple[Sizes, list[str]]:
    """Return the `Sizes` of a request's body, and the kinds of content of unknown length that it refers to.

    The kinds ("files", "audio", ...) are named once each. `file_tokens` are assumed for each such reference, as text of
    that length.
    """
    tally = _Tally()
    if endpoint == CHAT:
        _chat(tally, body)
    elif endpoint == RESPONSES:
        _responses(tally, body)
    elif endpoint == MESSAGES:
        tally.content(body.get("system"), "body.system")
        _chat(tally, body)
    elif endpoint == EMBEDDINGS:
        if not body.get("input"):
            raise BadInput("body has no 'input'")
        _texts(tally, body["input"], "body.input")
    else:
        _texts(tally, body.get("prompt") or [], "body.prompt")
        tally.content(body.get("suffix"), "body.suffix")
    tools = body.get("tools") or body.get("functions") or []
    if not isinstance(tools, list):
        raise BadInput(f"body.tools is {kind_of(tools)}, not a list")
    kinds = ("function", "custom") if endpoint == MESSAGES else ("function",)
    functions = [tool for tool in tools if isinstance(tool, dict) and tool.get("type", "function") in kinds]
    for schema in (*functions, _answer_schema(body)):
        tally.unread(schema)
    overhead = TOKENS_PER_MESSAGE * tally.messages + TOKENS_PER_REPLY if endpoint in (CHAT, RESPONSES, MESSAGES) else 0
    assumed = CHARS_PER_TOKEN * file_tokens * len(tally.unseen)
    tally.chars += assumed
    tally.utf8 += assumed
    sizes = Sizes(
        endpoint=endpoint,
        prompt_tokens=ceil_div(tally.utf8, CHARS_PER_TOKEN) + overhead,
        chars=tally.chars,
        role_chars=tally.role_chars,
        messages=tally.messages,
        images=tally.images,
        tools=len(functions),
        n=max(_whole(body, "n", 1, 1), _whole(body, "best_of", 1, 1)),
        max_tokens=_declared_cap(endpoint, body),
    )
    return sizes, tally.unseen


def _chat(tally: _Tally, body: Mapping[str, Any]) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadInput("body has no 'messages': it must be a list of at least one")
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadInput(f"body.messages[{position}] is {kind_of(message)}, not an object")
        tally.message(message.get("role"))
        tally.content(message.get("content"), f"body.messages[{position}].content")
        tally.unread(message.get("tool_calls", message.get("function_call")))
        if isinstance(message.get("audio"), dict):
            # An earlier answer given as audio, by its id.
            tally.unseen.append("audio")


def _responses(tally: _Tally, body: Mapping[str, Any]) -> None:
    if body.get("instructions"):
        tally.message("developer")
        tally.content(body["instructions"], "body.instructions")
    items = body.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if items is not None and not isinstance(items, list):
        raise BadInput(f"body.input is {kind_of(items)}, not text or a list of items")
    # Without any input the prompt is one that the provider stores.
    for field, what in (("prompt", "stored prompts"), ("previous_response_id", "earlier responses")):
        if body.get(field):
            tally.unseen.append(what)
    for position, item in enumerate(items or ()):
        if not isinstance(item, dict):
            raise BadInput(f"body.input[{position}] is {kind_of(item)}, not an object")
        tally.message(item.get("role"))
        if item.get("type") == "item_reference":
            tally.unseen.append("earlier responses")
        content = item.get("content", item.get("output"))
        # A tool's output may be one object: a screenshot.
        tally.content([content] if isinstance(content, dict) else content, f"body.input[{position}].content")
        if item.get("type") == "image_generation_call":
            tally.images += 1
        tally.read_fields(item)


def _texts(tally: _Tally, value: object, place: str) -> None:
    """Add embeddings' `input` or completions' `prompt`: text, texts, tokens, or lists of tokens."""
    items = value if isinstance(value, list) else [value]
    if all(type(item) is int for item in items):
        items = [items]
    for item in items:
        if isinstance(item, str):
            tally.text(item)
        elif isinstance(item, list) and all(type(token) is int for token in item):
            tally.chars += CHARS_PER_TOKEN * len(item)
            tally.utf8 += CHARS_PER_TOKEN * len(item)
        else:
            raise BadInput(f"{place} holds {kind_of(item)}, not text or tokens")


def _answer_schema(body: Mapping[str, Any]) -> object:
    """Return the JSON schema that the answer must follow, from chat's `response_format` or from responses' `text`."""
    chat, responses = body.get("response_format"), body.get("text")
    if isinstance(chat, dict):
        return chat.get("json_schema")
    form = responses.get("format") if isinstance(responses, dict) else None
    return form.get("schema") if isinstance(form, dict) else None


def _declared_cap(endpoint: int, body: Mapping[str, Any]) -> int:
    """Return the output cap that the body declares for each answer; -1 = none.

    All are checked, the first present counts.
    """
    names = ("max_output_tokens",) if endpoint == RESPONSES else ("max_completion_tokens", "max_tokens")
    caps = [_whole(body, name, 0, -1) for name in names]
    return -1 if endpoint == EMBEDDINGS else next((cap for cap in caps if cap >= 0), -1)


def _whole(body: Mapping[str, Any], name: str, low: int, absent: int) -> int:
    value = body.get(name)
    if value is None:
        return absent
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= WHOLE_MAX:
        raise BadInput(f"body.{name} is {quoted(value)}: it must be a whole number from {low} to {WHOLE_MAX:,}")
    return value


def _utf8_bytes(text: str) -> int:
    # JSON may hold half of a surrogate pair, which strict UTF-8 rejects.
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def kind_of(value: object) -> str:
    """Return the kind of a JSON value, for messages: "a list", "text", ..."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

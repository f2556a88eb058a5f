"""What a provider told us: HTTP status, headers and body in, an `Answer` out.

What lives here: which kind of refusal it is, how long it asks us to wait, what its limits are, what was used. What must
not: a clock (the epoch comes in where a date needs it), I/O, and the decision what to do about it (`law`).

Theory of operation. `classify` reads the words of an error body (`code`, `type`, then the message) before the status,
because one status means several things: a 429 is a rate (wait), a quota (never again) or a request that is too large
(never), and a 200 may carry a refusal inside. Whatever it is given, it answers and does not raise; what it cannot read
is absent. Formats and wordings: docs/explanation/provider.md#headers and #errors.

Two formulas describe the providers' continuous buckets (#buckets). They stand here once, for the synthetic provider
that prints them and for the tests that hold them against recordings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

from governor.requests import Answer, Limit, Outcome, usage_of

MINUTE_S = 60.0
DAY_S = 86_400.0
WINDOW_S = {"TPM": MINUTE_S, "RPM": MINUTE_S, "TPD": DAY_S, "RPD": DAY_S}

# No header or figure that means anything is longer; a message's figures stand within its first lines.
HEADER_CHARS_MAX = 64
MESSAGE_CHARS_MAX = 1_000

# ---------------------------------------------------------------- the bucket's two formulas


def refill_wait_s(limit: float, used: float, requested: float, window_s: float) -> float:
    """The wait that a 429 prints: (used + requested - limit) / limit x window, floored to ms; 0 where it fits already.

    Seconds, `limit` > 0 in units per window. The order of the operations is the provider's: of those tried, it alone
    prints 31 of 32 recorded waits to the ms; multiplying first gives 30 (3.859 s for a recorded 3.858 s). A client that
    sleeps exactly this long is up to 1 ms early: docs/explanation/provider.md#buckets.
    """
    return _floored(used + requested - limit, limit, window_s)


def refill_reset_s(limit: float, remaining: float, window_s: float) -> float:
    """The reset that headers print: (limit - remaining) / limit x window, floored to ms: when the bucket is full again.

    Seconds, `limit` > 0. Providers compute it from the bucket's fractional content, of which `remaining` shows the
    floor: a recorded reset is this value, or less by up to one unit's refill: docs/explanation/provider.md#buckets.
    """
    return _floored(limit - remaining, limit, window_s)


def _floored(missing: float, limit: float, window_s: float) -> float:
    if missing <= 0.0:
        return 0.0
    return math.floor(missing / limit * (window_s * 1000.0)) / 1000.0


# ---------------------------------------------------------------- durations

# Divided, not multiplied by 0.001: 118 ms is then the same number wherever it comes from.
_LARGE_S = {"s": 1, "m": 60, "h": 3600}
_SMALL_PER_S = {"ns": 10**9, "us": 10**6, "µs": 10**6, "μs": 10**6, "ms": 1000}
# Possessive: a thousand digits without a unit are given up at once.
_NUMBER = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_GO_PART = re.compile(rf"({_NUMBER})(ns|us|µs|μs|ms|s|m|h)")
_GO = re.compile(rf"\+?(?:{_GO_PART.pattern})+")


def duration_s(text: str) -> float:
    """Seconds of a Go duration ("6m0s", "120ms", "17.399999999s", "0"); -1 for what is none, or is negative."""
    text = text.strip()
    if text in ("0", "+0"):
        return 0.0
    if len(text) > HEADER_CHARS_MAX or not _GO.fullmatch(text):
        return -1.0
    parts = _GO_PART.findall(text)
    return sum(float(number) * _LARGE_S.get(unit, 1) / _SMALL_PER_S.get(unit, 1) for number, unit in parts)


def duration_text(seconds: float) -> str:
    """`seconds`, from 0 up, as Go prints a duration, to the nearest ms: "0s", "120ms", "1m13.588s", "114h18m0s"."""
    ms = round(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    rest = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{rest}" if hours else f"{minutes}m{rest}" if minutes else rest


_WORD_S = {"d": DAY_S, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3}
_WAIT_PART = re.compile(
    r"([0-9][0-9,]*+(?:\.[0-9]++)?)\s*+(days?|d|hours?|hrs?|h|minutes?|mins?|milliseconds?|ms|m|seconds?|secs?|s)"
    r"(?![a-z])",
    re.IGNORECASE,
)
_WAIT = re.compile(
    rf"\b(?:try again|retry)\s+(?:in|after)\s+({_WAIT_PART.pattern}(?:(?:\s|,|and)*{_WAIT_PART.pattern})*)",
    re.IGNORECASE,
)


def stated_wait_s(message: str) -> float:
    """The wait in an error's text ("Please try again in 7m12s", "Please retry after 86400 seconds"); -1 = none."""
    found = _WAIT.search(message[:MESSAGE_CHARS_MAX])
    if not found:
        return -1.0
    total = 0.0
    for number, unit in _WAIT_PART.findall(found[1]):
        unit = unit.lower()
        total += float(number.replace(",", "")) * _WORD_S["ms" if unit.startswith(("ms", "milli")) else unit[0]]
    return total


def retry_after_s(headers: Mapping[Any, Any] | None, message: str = "", now_epoch: float = -1.0) -> float:
    """How long the provider asks us to wait, in seconds; -1 = it does not say.

    In this order: `retry-after-ms`, `retry-after` (seconds, or a date where the epoch `now_epoch` is given), and then
    the error's text. Zero, negative and non-numeric waits count as not said, so that a backoff applies, as in the
    official SDK.
    """
    return _retry_after_s(_fields(headers), message, now_epoch)


def _retry_after_s(fields: Mapping[str, str], message: str, now_epoch: float) -> float:
    ms = _number(fields.get("retry-after-ms", ""))
    header = fields.get("retry-after", "")
    candidates = (ms / 1000.0, _number(header), duration_s(header), _until(header, now_epoch), stated_wait_s(message))
    return next((wait for wait in candidates if 0.0 < wait < math.inf), -1.0)


def _until(date: str, now_epoch: float) -> float:
    """Seconds from `now_epoch` until an HTTP date; -1 for what is none or lies in the past."""
    if now_epoch < 0.0 or not date:
        return -1.0
    try:
        moment = parsedate_to_datetime(date)
        # A date without a zone must not be read in the machine's.
        epoch = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return -1.0
    return max(-1.0, epoch - now_epoch)


# ---------------------------------------------------------------- limits


@dataclass(frozen=True, slots=True)
class Quoted:
    """The figures in an error's text. `dimension`: TPM, RPM, TPD, RPD or "" = not named; numbers: -1 = not named."""

    dimension: str = ""
    limit: float = -1.0
    used: float = -1.0
    requested: float = -1.0


_DIMENSION = re.compile(r"\b(TPM|RPM|TPD|RPD)\b|\b(token|request)s per (min|day)", re.IGNORECASE)
_FIGURES = {
    name: re.compile(rf"\b{word}:? ([0-9][0-9,]*+(?:\.[0-9]++)?)", re.IGNORECASE)
    for name, word in (("limit", "Limit"), ("used", "(?:Used|Current)"), ("requested", "Requested"))
}


def quoted_numbers(message: str) -> Quoted:
    """Limit, Used and Requested as a 429 quotes them: "... (TPM): Limit 30000, Used 29937, Requested 385. ..."."""
    message = message[:MESSAGE_CHARS_MAX]
    named = _DIMENSION.search(message)
    dimension = ""
    if named:
        dimension = (named[1] or f"{named[2][0]}P{named[3][0]}").upper()
    matches = {name: pattern.search(message) for name, pattern in _FIGURES.items()}
    return Quoted(dimension, **{name: float(match[1].replace(",", "")) for name, match in matches.items() if match})


def dimension_of(limit: float, remaining: float, reset_s: float, minute: str, day: str) -> str:
    """`minute` or `day`, whichever dimension a header triple speaks of: the tightest is shown, its window is not named.

    A full bucket takes one window: window = reset x limit / used. `used` = limit - remaining is rounded up by less than
    one, so for a day it comes out between 86,400 x (1 - 1/used) and 86,400 s. All else is a minute, which may also be a
    counter emptied once a minute, whose reset says nothing of what is used; so is what cannot be told: no reset (-1),
    nothing used.
    """
    if limit <= remaining or reset_s < 0.0:
        return minute
    used = limit - remaining
    window_s = reset_s * limit / used
    least_s = DAY_S * max(0.5, 1.0 - 1.0 / used)
    return day if 0.99 * least_s <= window_s <= 1.01 * DAY_S else minute


# OpenAI, Azure and Groq; a project's own limits; Anthropic, whose resets are dates and say nothing of the window.
_TEMPLATES = (
    ("x-ratelimit-{}-requests", "RPM", "RPD"),
    ("x-ratelimit-{}-tokens", "TPM", "TPD"),
    ("x-ratelimit-{}-project-requests", "RPM", "RPD"),
    ("x-ratelimit-{}-project-tokens", "TPM", "TPD"),
    ("anthropic-ratelimit-requests-{}", "RPM", "RPM"),
    ("anthropic-ratelimit-tokens-{}", "TPM", "TPM"),
    ("anthropic-ratelimit-input-tokens-{}", "TPM", "TPM"),
)
_TRIPLES = tuple(
    (*(template.format(part) for part in ("limit", "remaining", "reset")), minute, day)
    for template, minute, day in _TEMPLATES
)


def limits_of(headers: Mapping[Any, Any] | None) -> tuple[Limit, ...]:
    """The limits that headers state, at most one per dimension: where several scopes speak, the smallest limit.

    Left out: what is not a number, a limit of zero, remaining below zero or above the limit (Azure was seen to send
    -1, -1, 0 and -27689), and a remaining without its limit (Azure, 2024). An integer reset (Azure) has no known unit
    and is not used.
    """
    return _limits_of(_fields(headers))


def _limits_of(fields: Mapping[str, str]) -> tuple[Limit, ...]:
    found: dict[str, Limit] = {}
    for limit_name, remaining_name, reset_name, minute, day in _TRIPLES:
        if limit_name not in fields:
            continue
        limit, remaining = _number(fields[limit_name]), _number(fields.get(remaining_name, ""))
        if not (limit > 0.0 and 0.0 <= remaining <= limit):
            continue
        reset_s = duration_s(fields.get(reset_name, ""))
        dimension = dimension_of(limit, remaining, reset_s, minute, day)
        if dimension not in found or limit < found[dimension].limit:
            found[dimension] = Limit(dimension, limit, remaining)
    return tuple(found.values())


def _processing_s(fields: Mapping[str, str]) -> float:
    """The provider's own time for a request, from its admission to its answer; -1 where none is stated."""
    milliseconds = _number(fields.get("openai-processing-ms", ""))
    return milliseconds / 1_000.0 if milliseconds >= 0.0 else -1.0


def _fields(headers: Mapping[Any, Any] | None) -> dict[str, str]:
    """Headers as text, by their names in lower case."""
    items = headers.items() if isinstance(headers, Mapping) else ()
    return {_as_text(name).lower(): _as_text(value).strip() for name, value in items}


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _number(text: str) -> float:
    """A header's number; -1 for what is none, is not finite, or is negative."""
    try:
        value = float(text) if len(text) <= HEADER_CHARS_MAX else -1.0
    except ValueError:
        return -1.0
    return value if 0.0 <= value < math.inf else -1.0


# ---------------------------------------------------------------- which answer is it?

QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
    }
)
_BY_WORD = (
    (QUOTA_CODES, Outcome.QUOTA),
    (frozenset({"slow_down"}), Outcome.SLOW_DOWN),
    (frozenset({"request_too_large"}), Outcome.TOO_LARGE),
    (frozenset({"rate_limit_exceeded", "rate_limit_error", "tokens", "requests"}), Outcome.THROTTLED),
    (frozenset({"model_not_found", "deploymentnotfound", "invalid_api_key"}), Outcome.UNAUTHORIZED),
    (frozenset({"server_is_overloaded", "overloaded_error", "service_unavailable_error"}), Outcome.OVERLOADED),
    (frozenset({"server_error"}), Outcome.SERVER_ERROR),
)
_BY_STATUS = {
    401: Outcome.UNAUTHORIZED,
    402: Outcome.QUOTA,
    403: Outcome.UNAUTHORIZED,
    408: Outcome.TIMEOUT,
    409: Outcome.SERVER_ERROR,  # a conflict passes: the official SDK tries it again
    413: Outcome.TOO_LARGE,
    429: Outcome.THROTTLED,  # "Resource Unavailable" of the flex tier, Azure's code "429", or no body at all
    503: Outcome.OVERLOADED,
    529: Outcome.OVERLOADED,
}
_REQUEST_IDS = ("x-request-id", "apim-request-id", "request-id")
# An error may quote the key that it refuses.
_KEY = re.compile(r"\bsk-[\w*.-]{4,}")
# A tuple, because what it is searched for may be anything that JSON holds, lists included.
_EVENTS = ("response.failed", "response.incomplete", "response.completed")


def classify(status: int, headers: Mapping[Any, Any] | None, body: object, *, now_epoch: float = -1.0) -> Answer:
    """What this HTTP answer means. `body`: parsed JSON, or its text or bytes, or None. Never raises.

    Outcomes: `ok`; `throttled`, `slow_down`, `overloaded`, `server_error`, `timeout` may pass; `quota` and
    `unauthorized` end the batch; `too_large` and `bad_request` end the request; `malformed` is a success that cannot be
    read (truncated, not JSON, no choices) or a status that is none. `now_epoch`: for a Retry-After that is a date.
    """
    content, text = _parsed(body)
    success = 200 <= status < 300
    kind, code, message = _error_words(content, text, success)
    if not success:
        outcome = _refusal(status, kind, code, message) if 400 <= status < 600 else Outcome.MALFORMED
    elif kind or code or message:
        outcome = _refusal(status, kind, code, message)
    elif content is not None and _is_answer(content):
        outcome = Outcome.OK
    else:
        outcome, message = Outcome.MALFORMED, f"status {status} without an answer that can be read"
    ok = outcome is Outcome.OK
    fields = _fields(headers)
    content = content or {}
    prompt, output = usage_of(content)
    return Answer(
        outcome=outcome,
        status=status,
        error_code=code or kind,
        message=_KEY.sub("sk-***", message),
        retry_after_s=-1.0 if ok else _retry_after_s(fields, message, now_epoch),
        used_prompt_tokens=prompt,
        used_output_tokens=output,
        cut_off=ok and _is_cut_off(content),
        has_text=ok and any(words.strip() for words in _texts(content)),
        limits=_limits_of(fields),
        processing_s=_processing_s(fields),
        request_id=next((fields[name] for name in _REQUEST_IDS if fields.get(name)), ""),
        body=content or None,
    )


def timed_out(message: str = "no answer in time") -> Answer:
    """The answer of an attempt that ran into the request's time-out."""
    return Answer(Outcome.TIMEOUT, message=message)


def dropped(message: str = "connection dropped") -> Answer:
    """The answer of an attempt whose connection failed or broke off."""
    return Answer(Outcome.DROPPED, message=message)


def malformed(message: str, status: int = 0) -> Answer:
    """The answer of an attempt whose response could not be read at all."""
    return Answer(Outcome.MALFORMED, status, message=message)


def _refusal(status: int, kind: str, code: str, message: str) -> Outcome:
    words = {kind.lower(), code.lower()}
    worded = next((outcome for known, outcome in _BY_WORD if words & known), None)
    if worded in (Outcome.QUOTA, Outcome.SLOW_DOWN, Outcome.TOO_LARGE):
        return worded
    if status == 429 or worded is Outcome.THROTTLED:
        numbers = quoted_numbers(message)
        if message.lower().startswith("request too large") or numbers.requested > numbers.limit >= 0.0:
            return Outcome.TOO_LARGE
        # Other providers quote this sentence for rates that pass, but name them; a bare one is OpenAI's.
        bare = not kind and not code
        return Outcome.QUOTA if bare and "exceeded your current quota" in message else Outcome.THROTTLED
    if worded is not None:
        return worded
    if status < 300:
        # A failure inside a 200: without a code it is the provider's own, with one the request is at fault.
        return Outcome.BAD_REQUEST if code and "timeout" not in code else Outcome.SERVER_ERROR
    return _BY_STATUS.get(status, Outcome.SERVER_ERROR if status >= 500 else Outcome.BAD_REQUEST)


def _parsed(body: object) -> tuple[dict[str, Any] | None, str]:
    """The JSON object in `body` (that of a stream's last event, too), or None and the text that stands in its place."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body if isinstance(body, str) else ""
    if text:
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            return None, " ".join(text[:MESSAGE_CHARS_MAX].split())
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict):
        return None, ""
    inner = body.get("response")
    return (inner if body.get("type") in _EVENTS and isinstance(inner, dict) else body), ""


def _error_words(content: dict[str, Any] | None, text: str, success: bool) -> tuple[str, str, str]:
    """Type, code and message of the error that a body speaks of; all "" where it speaks of none."""
    if content is None:
        # The text of a success that is no JSON is somebody's answer, cut short: it must not get into a message.
        return "", "", "" if success else text
    error = content.get("error")
    if error is None and (not success or content.get("type") == "error"):
        # Proxies leave the wrapping out; a stream's `error` event has none.
        error = {key: content.get(key) for key in ("type", "code", "message")}
        error["message"] = error["message"] or content.get("detail")
    if not error and content.get("status") == "failed":
        return "server_error", "", "the response failed without a reason"
    if isinstance(error, str):
        return "", "", error[:MESSAGE_CHARS_MAX]
    if not isinstance(error, dict):
        return "", "", ""
    return _word(error.get("type")), _word(error.get("code")), _word(error.get("message"))


def _word(value: object) -> str:
    if isinstance(value, str):
        return value[:MESSAGE_CHARS_MAX]
    # Some write the status as the code.
    return str(value) if type(value) is int and 0 <= value < 1000 else ""


def _is_answer(content: Mapping[str, Any]) -> bool:
    """Whether a body has the part that holds an answer: choices, a finished response's output, or embeddings."""
    choices = content.get("choices")
    if isinstance(choices, list):
        return bool(choices) and all(isinstance(choice, dict) for choice in choices)
    if isinstance(content.get("output"), list):
        # A response that is queued, in progress or cancelled is none yet, or never will be.
        return content.get("status") in (None, "completed", "incomplete")
    return isinstance(content.get("data"), list)


def _objects(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _is_cut_off(content: Mapping[str, Any]) -> bool:
    if any(choice.get("finish_reason") == "length" for choice in _objects(content.get("choices"))):
        return True
    details = content.get("incomplete_details")
    return isinstance(details, dict) and details.get("reason") == "max_output_tokens"


def _texts(content: Mapping[str, Any]) -> Iterator[str]:
    """Every text of an answer that a user could read: chat and completions choices, responses' output."""
    choices = _objects(content.get("choices"))
    messages = _objects([choice.get("message") for choice in choices])
    for holder in (*choices, *messages, *_objects(content.get("output"))):
        parts = holder.get("content")
        for part in (holder, {"text": parts}, *_objects(parts)):
            yield from (str(part[key]) for key in ("text", "refusal") if isinstance(part.get(key), str))

"""Classifies HTTP answers: status, headers and body in, an `Answer` out.

A success must be a success throughout: an error at the top level, in a choice or in a response's own status is read as
if its code had been the HTTP status. The words of an error body (`code`, `type`, then the message) take precedence over
the status, because one status has several meanings: a 429 may be a rate limit (wait), a quota (no credit, or nothing
left for days) or a request that is too large (never). Only the state of the account concerns more than the request
itself (`Scope`).

Codes, statuses and phrases are data, in the profiles (see `codes`). `classify` returns an answer for any input and does
not raise. Formats and wordings: docs/explanation/provider.md#errors; one row for each form seen in the wild:
tests/answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from governor.model.requests import Answer, Outcome, usage_of
from governor.profiles.loader import GENERIC, read_profile
from governor.profiles.schema import Profile
from governor.provider.codes import Codes, codes_of
from governor.provider.rate_limit_headers import (
    MESSAGE_CHARS_MAX,
    access_at,
    fields_of,
    limits_in,
    processing_s,
    quoted_numbers,
    wait_in,
)

# Access that returns later than this ends the run for now; access that returns sooner is a wait.
ACCESS_WAIT_S = 3_600.0
# No answer is nested deeper than this; deeper bodies would overflow recursive code.
DEPTH_MAX = 200
RAW_CHARS_MAX = 1_000_000
# Statuses with which a message is believed, and those with which one about the quota is.
_VAGUE = (None, 400, 403, 500)
_MONEY = (*_VAGUE, 402, 429)
# A message may quote the prompt further on: a user's text must not stop a pool.
_SAID_CHARS = 300
_SAYS_LITTLE = (401, *range(500, 600))
_REQUEST_IDS = ("x-request-id", "apim-request-id", "request-id", "x-amzn-requestid")
_WORDS = ("type", "code", "status", "reason", "error_code", "__type", "error_type")
_MESSAGES = ("message", "Message", "detail", "error_msg", "error_message", "msg", "faultstring", "title")
# How nearly every choice ends, so that a success needs no table of refusals.
_FINISHED = frozenset(("stop", "length", "tool_calls", "function_call", "content_filter"))
# A tuple rather than a set, because the value looked up may be any JSON value, unhashable lists included.
_EVENTS = ("response.failed", "response.incomplete", "response.completed")
# Matches a key, since an error may quote the key that it refuses.
_KEY = re.compile(r"\bsk-[\w*.-]{4,}")
# Characters that control a terminal or reorder its text: C0 and C1 controls, bidirectional marks, half surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HIDDEN = "***"
_JSON = json.JSONDecoder(parse_constant=lambda _: None)
_HOLDERS = {dict, list}


# ---------------------------------------------------------------- answers


class _Error(NamedTuple):
    """The error in a body. `words`: code, type and the like; `holders`: its parts, for `fields_of`."""

    code: str = ""
    words: frozenset[str] = frozenset()
    message: str = ""
    holders: tuple[Mapping[str, Any], ...] = ()


def classify(
    status: int,
    headers: Mapping[Any, Any] | None,
    body: object,
    *,
    now_epoch: float = -1.0,
    hide: str = "",
    profile: Profile | None = None,
) -> Answer:
    """Return the meaning of an HTTP answer. `body`: parsed JSON, or its text or bytes, or None. Never raises.

    Outcomes: `ok`; `throttled`, `slow_down`, `overloaded`, `server_error` and `timeout` may pass; `quota` and
    `unauthorized` concern the account; `too_large` and `bad_request` end the request, and so does `malformed`, a
    success that cannot be read (truncated, not JSON, no choices, only queued). `now_epoch`: seconds since 1970, needed
    for dates on which a wait ends or access returns; -1 = unknown. `hide`: a key that is removed from everything
    returned, however it is written. `profile`: the pool's; None = the generic one.
    """
    profile = profile or read_profile(GENERIC)
    content, text = _parsed(body, hide)
    success = 200 <= status < 300
    error, finished = _error_in(content, text, success), None
    if content is not None and success and not error.words and not error.message:
        error, finished = _failed_choice(content, profile)
    fields = fields_of(headers, *error.holders)
    if hide:
        fields = {name: value.replace(hide, _HIDDEN) for name, value in fields.items()}
    wait_s, returns_at = -1.0, None
    if not success or error.words or error.message or finished is not None:
        wait_s = wait_in(fields, error.message, now_epoch, profile)
        outcome = finished or _refusal(_status_of(status, error), error, wait_s, codes_of(profile))
        outcome, wait_s, returns_at = _dated(outcome, wait_s, access_at(fields, error.message), now_epoch)
    elif content is not None and _is_answer(content):
        outcome = Outcome.OK
    else:
        outcome = Outcome.MALFORMED
    ok = outcome is Outcome.OK
    raw = ""
    if 300 <= status < 400 and (to := fields.get("location")):
        error = error._replace(message=f"status {status}, a redirect to {to}: use that address, if it is right")
    if outcome is Outcome.MALFORMED:
        error = error._replace(message=_unreadable(status, content, text))
        raw = text[:RAW_CHARS_MAX] if content is None else ""
    content = content or {}
    prompt, output = usage_of(content)
    return Answer(
        outcome=outcome,
        status=status,
        error_code="" if ok else printable(error.code),
        message="" if ok else _KEY.sub("sk-***", printable(error.message)) or f"HTTP status {status}",
        retry_after_s=wait_s,
        used_prompt_tokens=prompt,
        used_output_tokens=output,
        cut_off=ok and _is_cut_off(content),
        has_text=ok and any(words.strip() for words in _texts(content)),
        limits=limits_in(fields, now_epoch, profile, is_refusal=not ok),
        processing_s=processing_s(fields),
        request_id=printable(next((fields[name] for name in _REQUEST_IDS if fields.get(name)), "")),
        body=content or None,
        raw=raw,
        returns_at=returns_at,
        misaddressed=300 <= status < 400 or (status in (404, 405) and not error.words) or (success and _is_html(text)),
    )


def timed_out(message: str = "no answer in time") -> Answer:
    """Return the answer of an attempt that exceeded the request's time-out."""
    return Answer(Outcome.TIMEOUT, message=printable(message))


def dropped(message: str = "connection dropped", *, misaddressed: bool = False) -> Answer:
    """Return the answer of an attempt whose connection failed or was broken off."""
    return Answer(Outcome.DROPPED, message=printable(message), misaddressed=misaddressed)


def local(message: str) -> Answer:
    """Return the answer of an attempt that this machine could not make: no descriptors, no memory, no disk space."""
    return Answer(Outcome.LOCAL, message=printable(message))


def malformed(message: str, status: int = 0, raw: str = "") -> Answer:
    """Return the answer of an attempt whose response could not be read at all."""
    return Answer(Outcome.MALFORMED, status, message=printable(message), raw=raw[:RAW_CHARS_MAX])


def printable(text: str) -> str:
    """Return `text` on one line, with escapes in place of characters that control a terminal."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", " ".join(text.split()))


def text_of(content: Mapping[str, Any]) -> str:
    """Return the text of an answer's body, of its first choice if there are several; "" if it has none."""
    choices = _objects(content.get("choices"))
    return "".join(_texts({**content, "choices": choices[:1]} if choices else content))


# ---------------------------------------------------------------- refusals


def _status_of(status: int, error: _Error) -> int | None:
    """Return the status to go by: for a success, the one in the body; None if the body has none."""
    if not 200 <= status < 300:
        return status
    return next((int(word) for word in error.words if re.fullmatch("[45][0-9][0-9]", word)), None)


def _refusal(status: int | None, error: _Error, wait_s: float, codes: Codes) -> Outcome:
    """Return the meaning of a refusal. `status`: None inside a success without one. `wait_s`: -1 = none stated."""
    worded = codes.worded(error.words)
    if worded in (Outcome.QUOTA, Outcome.SLOW_DOWN, Outcome.TOO_LARGE, Outcome.BAD_REQUEST):
        return worded
    said = error.message[:_SAID_CHARS]
    texted = next((outcome for pattern, outcome in codes.messages if pattern.search(said)), None)
    believed = _MONEY if texted is Outcome.QUOTA else _VAGUE
    if texted is Outcome.BAD_REQUEST or (texted is not None and status in believed):
        return texted
    numbers = quoted_numbers(error.message)
    figured = numbers.requested >= 0.0 and numbers.limit >= 0.0
    if status in (413, 429) or worded is Outcome.THROTTLED:
        # The words alone are not believed: "Request too large ... Limit 250000, Requested 546" was seen; it passes.
        if numbers.requested > numbers.limit >= 0.0 or (status == 413 and not figured and worded is None):
            return Outcome.TOO_LARGE
        if any(pattern.search(word) for pattern in codes.daily_quotas for word in error.words):
            return Outcome.QUOTA
        if not error.words - {str(status)}:
            return next((told for pattern, told in codes.bare if pattern.search(error.message)), Outcome.THROTTLED)
        return Outcome.THROTTLED
    if status is None and worded is None:
        # A failure inside a success: without a code it is the provider's fault, with a code the request's.
        coded = error.code and "timeout" not in error.code and error.code != "0"
        return Outcome.BAD_REQUEST if coded else Outcome.SERVER_ERROR
    if worded is not None and (status is None or status in _SAYS_LITTLE or not error.words & codes.generic):
        return worded
    assert status is not None
    if status in codes.statuses:
        return codes.statuses[status]
    if 400 <= status < 500:
        # A stated wait means "later" whatever the status is: OpenRouter's 402 for a budget in flight.
        later = wait_s > 0.0 and status not in (400, 422)
        return Outcome.THROTTLED if later else Outcome.BAD_REQUEST
    # Redirects are not followed: another host would get the prompt.
    return Outcome.BAD_REQUEST if 300 <= status < 400 else Outcome.SERVER_ERROR


def _dated(
    outcome: Outcome, wait_s: float, returns_at: float | None, now_epoch: float
) -> tuple[Outcome, float, float | None]:
    """Adjust a refusal to the moment at which access returns: a wait if that is near, else the end."""
    if returns_at is None or outcome not in (Outcome.THROTTLED, Outcome.QUOTA):
        return outcome, wait_s, None
    if now_epoch < 0.0 or returns_at - now_epoch > ACCESS_WAIT_S:
        ends = outcome is Outcome.QUOTA or now_epoch >= 0.0
        return (Outcome.QUOTA if ends else outcome), wait_s, returns_at
    if outcome is Outcome.THROTTLED and wait_s < 0.0 and returns_at > now_epoch:
        wait_s = returns_at - now_epoch
    return outcome, wait_s, returns_at if outcome is Outcome.QUOTA else None


# ---------------------------------------------------------------- the body


def _parsed(body: object, hide: str) -> tuple[dict[str, Any] | None, str]:
    """Return the JSON object in `body` (or in a stream's last event), or None and the text found instead."""
    text = _decoded(body)
    if not text and isinstance(body, list) and len(body) != 1:
        text = json.dumps(body, default=str)
    if text:
        if hide:
            text = text.replace(hide, _HIDDEN)
        try:
            body = _loaded(text)
        except (ValueError, RecursionError):
            event = _streamed(text)
            if event is None:
                return None, _unescaped(text, hide)
            body = event
        if hide and ("\\u" in text or "\\/" in text) and hide in (again := json.dumps(body)):
            body = json.loads(again.replace(hide, _HIDDEN))
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict) or _is_deep(body):
        return None, _unescaped(text, hide)
    inner = body.get("response")
    return (inner if body.get("type") in _EVENTS and isinstance(inner, dict) else body), ""


def _decoded(body: object) -> str:
    """Return the body's text: bytes in UTF-8, UTF-16 or UTF-32, with or without a byte order mark."""
    if isinstance(body, bytes | bytearray):
        body = body.decode(json.detect_encoding(body), "replace")
    return body.removeprefix("\ufeff") if isinstance(body, str) else ""


def _loaded(text: str) -> object:
    """Parse JSON, reading NaN and Infinity, which Python servers write although JSON lacks them, as null."""
    return _JSON.decode(text)


def _unescaped(text: str, hide: str) -> str:
    """Remove the key from `text` that is not JSON, even if the key is written with escapes."""
    if not hide or "\\" not in text:
        return text
    plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text).replace("\\/", "/")
    return plain.replace(hide, _HIDDEN) if hide in plain else text


def _streamed(text: str) -> dict[str, Any] | None:
    """Return the decisive event of a server-sent stream: an error, or the whole response at the end; None if absent."""
    for line in text.splitlines() if text.startswith(("data:", "event:", ":", "id:")) else ():
        if line.startswith("data:") and ("error" in line or '"response.' in line):
            try:
                event = _loaded(line.removeprefix("data:"))
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and (event.get("error") or event.get("type") in (*_EVENTS, "error")):
                return event
    return None


def _is_deep(body: dict[str, Any]) -> bool:
    """Return whether a body is nested deeper than any answer."""
    level: list[Any] = [body]
    for _ in range(DEPTH_MAX):
        inner: list[Any] = []
        for holder in level:
            values = holder.values() if type(holder) is dict else holder
            # Long lists hold numbers and are skipped as a whole.
            if not _HOLDERS.isdisjoint(map(type, values)):
                inner += [each for each in values if type(each) in _HOLDERS]
        if not inner:
            return False
        level = inner
    return True


def _error_in(content: dict[str, Any] | None, text: str, success: bool) -> _Error:
    """Return the error in a body; an empty one if there is none."""
    if content is None:
        # The text of a success that is not JSON is a user's truncated answer: it must not get into a message.
        return _Error() if success else _Error(message=_headline(text))
    error = content.get("error")
    if isinstance(error, list) or not error:
        error = content.get("errors") or error
    if isinstance(error, list):
        error = next((each for each in error if each), None)
    detail = content.get("detail")
    if not error and isinstance(detail, dict):
        error = detail.get("error") or detail
    base = content.get("base_resp")
    if not error and isinstance(base, dict) and base.get("status_code") not in (None, 0):
        error = {"code": f"minimax_{base['status_code']}", "message": base.get("status_msg")}
    if not error and (not success or content.get("type") == "error" or content.get("error_code")):
        error = content.get("fault") or content  # proxies omit the wrapper; a stream's `error` event has none
    if isinstance(error, str):
        said = [word for key in ("code", "error_type") if (word := _word(content.get(key)))]
        message = _word(content.get("message")) if " " not in error else ""
        words = frozenset(word.lower() for word in said)
        whole = f"{error}: {message}" if message else error[:MESSAGE_CHARS_MAX]
        return _Error(said[0] if said else "", words, whole, (content,))
    if not error and content.get("status") == "failed":
        return _Error("server_error", frozenset({"server_error"}), "the response failed without a reason")
    return _error_of(error, content) if isinstance(error, dict) else _Error()


def _error_of(error: dict[str, Any], content: dict[str, Any]) -> _Error:
    """Return the parts of an error object."""
    inner = error.get("error")
    if isinstance(inner, dict):  # the provider's own, wrapped once more by a gateway
        error = inner
    holders = [error, *_objects(error.get("details"))]
    holders += [each for key in ("metadata", "innererror") if isinstance(each := error.get(key), dict)]
    names = [_word(holder.get(key)) for holder in holders for key in _WORDS]
    violations = [each for holder in holders for each in _objects(holder.get("violations"))]
    names += [_word(each.get("quotaId")) for each in violations]
    code = next((word for key in ("code", "type", "__type", "status") if (word := _word(error.get(key)))), "")
    # Some providers write "0" or "200" if there is no error.
    words = frozenset(name.rpartition("#")[2].lower() for name in names if name not in ("", "0", "200"))
    message = next((text for key in _MESSAGES if (text := _message(error.get(key)))), "")
    raw = next((_word(holder.get("raw")) for holder in holders if holder.get("raw")), "")
    if raw and len(message) < 40:  # OpenRouter: "Provider returned error"
        message = f"{message}: {raw}"
    if not words and message.lower() in ("", "success", "ok"):
        return _Error()
    return _Error(code, words, message[:MESSAGE_CHARS_MAX], (*holders, content))


def _failed_choice(content: dict[str, Any], profile: Profile) -> tuple[_Error, Outcome | None]:
    """Return the error inside a choice, or the outcome of a choice that ended in an error (OpenRouter)."""
    for choice in _objects(content.get("choices")):
        error, finish = choice.get("error"), choice.get("finish_reason")
        found = _error_of(error, content) if isinstance(error, dict) else _Error()
        if found.words or found.message:
            return found, None
        if (
            isinstance(finish, str)
            and finish not in _FINISHED
            and (told := codes_of(profile).finish_reasons.get(finish))
        ):
            return _Error(finish, frozenset(), f"the choice ended as {finish}"), told
    return _Error(), None


def _message(value: object) -> str:
    """Return a message, or the joined messages of a list of complaints (FastAPI's `detail`)."""
    if isinstance(value, list):
        return "; ".join(_word(each.get("msg") or each.get("message")) for each in _objects(value))
    return value if isinstance(value, str) else ""


def _word(value: object) -> str:
    if isinstance(value, str):
        return value[:MESSAGE_CHARS_MAX]
    # Some providers write the status as the code.
    return str(value) if type(value) is int and 0 <= value < 1_000_000 else ""


def _is_html(text: str) -> bool:
    return text[:200].lstrip()[:15].lower().startswith(("<!doctype html", "<html", "<head", "<center"))


def _headline(text: str) -> str:
    """Return a short form of a page or a plain text."""
    title = re.search(r"<(title|h1)[^>]*>([^<]{1,200})", text[:4_000], re.IGNORECASE) if "<" in text[:200] else None
    return title[2].strip() if title else text[:MESSAGE_CHARS_MAX]


def _unreadable(status: int, content: dict[str, Any] | None, text: str) -> str:
    """Return why a success cannot be used, without quoting a body that may be a user's answer."""
    if content is not None and isinstance(state := content.get("status"), str):
        return f"status {status} with a response that is {state}: it runs on at the provider, and is not sent again"
    what = (
        "a page of HTML" if _is_html(text) else "an empty body" if content is None and not text else "no answer in it"
    )
    return f"status {status} with {what}: it cannot be read, and is not sent again"


def _is_answer(content: Mapping[str, Any]) -> bool:
    """Return whether a body has the part that holds an answer: choices, a response's output, a message, embeddings."""
    choices = content.get("choices")
    if isinstance(choices, list):
        return bool(choices) and all(_is_choice(choice) for choice in choices)
    if isinstance(content.get("output"), list):
        # A response that is queued, in progress or cancelled has no answer yet, or never will.
        return content.get("status") in (None, "completed", "incomplete")
    if content.get("type") == "message":
        return isinstance(content.get("content"), list)
    data = content.get("data")
    return isinstance(data, list) and bool(data) and all(isinstance(each, dict) for each in data)


def _is_choice(choice: object) -> bool:
    return isinstance(choice, dict) and (isinstance(choice.get("message"), dict) or isinstance(choice.get("text"), str))


def _objects(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _is_cut_off(content: Mapping[str, Any]) -> bool:
    if any(choice.get("finish_reason") == "length" for choice in _objects(content.get("choices"))):
        return True
    if content.get("type") == "message":
        return content.get("stop_reason") == "max_tokens"
    details = content.get("incomplete_details")
    return isinstance(details, dict) and details.get("reason") == "max_output_tokens"


def _texts(content: Mapping[str, Any]) -> Iterator[str]:
    """Return every text of an answer that a user could read: choices, a response's output, the parts of a message."""
    choices = _objects(content.get("choices"))
    messages = _objects([choice.get("message") for choice in choices])
    whole = [content] if content.get("type") == "message" else []
    for holder in (*choices, *messages, *_objects(content.get("output")), *whole):
        parts = holder.get("content")
        for part in (holder, {"text": parts}, *_objects(parts)):
            yield from (str(part[key]) for key in ("text", "refusal") if isinstance(part.get(key), str))

"""The frozen values that cross boundaries, and the batch file format in and out.

A batch file is read as a stream: one request at a time, and of those already read only the custom_ids are held, to name
both lines of a duplicate (about 15 MB for 100,000). Every error is one line that begins with `file:line:`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from governor import law
from governor.model.errors import BadInput, quoted
from governor.model.estimate import CHAT as CHAT
from governor.model.estimate import COMPLETIONS as COMPLETIONS
from governor.model.estimate import EMBEDDINGS as EMBEDDINGS
from governor.model.estimate import MESSAGES as MESSAGES
from governor.model.estimate import RESPONSES as RESPONSES
from governor.model.estimate import TOKENS_PER_FILE, WHOLE_MAX, kind_of, measured
from governor.model.estimate import Sizes as Sizes
from governor.model.phrases import plural

# Tiers by the names of OpenAI and Groq. Any other name is a misspelling, and its price is unknown.
SERVICE_TIERS = (
    *("auto", "default", "flex", "scale", "priority", "fast", "ultrafast"),
    *("on_demand", "performance"),
)
# Places and tiers with prices of their own, and the other names under which providers state them.
STANDARD, BATCH, _FLEX, PRIORITY = "", "batch", "flex", "priority"
_TIER_OF = {**dict.fromkeys(("default", "standard", "auto", "on_demand"), STANDARD), "fast": PRIORITY}
# Body fields that would leave no answer to keep, or a different one with each attempt: the values that a batch may
# carry besides null, and for all other values the reason with its remedy.
UNSERVED: dict[str, tuple[tuple[object, ...], str]] = {
    "stream": ((False,), "a batch cannot stream: leave it out"),
    "background": (
        (False,),
        "only `paceline run` and /v1/responses know jobs in the background; elsewhere the answer would be a queued job "
        "without a result, and each retry another job that is paid for: leave it out",
    ),
    "conversation": (
        (),
        "each answer would be added to that conversation, in whatever order requests run and once more with each "
        "retry: leave it out and put earlier turns into the input",
    ),
    "service_tier": (SERVICE_TIERS, f"no such tier is known: use one of {', '.join(SERVICE_TIERS)}, or leave it out"),
}

# The first bytes of files that are not text of ours, what such a file is, and the remedy: every command says the same.
GZIP = b"\x1f\x8b"
FOREIGN = {
    GZIP: "gzip-compressed: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack or export it first",
    b"PAR1": "Parquet: export it as JSON lines or CSV first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it first (unzstd)",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


def foreign_format(head: bytes) -> str:
    """Return what a file that begins with these bytes is, with the remedy; "" if it may be text."""
    return next((what for magic, what in FOREIGN.items() if head.startswith(magic)), "")


def one_list(name: str) -> BadInput:
    """Return the error for a file that holds one JSON list of requests instead of one request per line."""
    return BadInput("this is one JSON list: write one object per line (jq -c '.[]')", name, 1)


URLS = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/completions")
# Anthropic's endpoint is governed and served, but not part of OpenAI's batch format.
MESSAGES_URL = "/v1/messages"


def endpoint_of(url: str) -> int:
    """Return the endpoint code of a line's `url`, with or without `/v1` (Azure omits it); -1 = unsupported."""
    full = url if url.startswith("/v1/") else f"/v1{url}"
    return URLS.index(full) if full in URLS else -1


def url_of(endpoint: int) -> str:
    """Return the url of an endpoint code."""
    return URLS[endpoint]


# ---------------------------------------------------------------- values


LANES = ("main", "finalize")
# Waiting causes have the law's numbers; this one follows them and is known to records only.
BACKOFF = law.PAUSED + 1
CAUSES = ("nothing", "concurrency", "stagger", "tpm", "rpm", "day", "hold", "paused", "backoff")


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a batch. `index` counts requests from 0 in file order. `body`: None if it was not kept.

    `unseen`: the kinds of content of unknown length that it points to (see `estimate.measured`).
    `tier`: the service tier that it asks for.
    """

    index: int
    custom_id: str
    url: str
    model: str
    body: dict[str, Any] | None
    sizes: Sizes
    pool: str = "default"
    unseen: tuple[str, ...] = ()
    tier: str = STANDARD


class Outcome(StrEnum):
    """The meaning of an answer for its request. `answers.classify` decides which applies.

    `malformed` is a success that cannot be read: it is paid for, and never bought again. `local` is a failure of this
    machine (descriptors, memory, disk): the provider never saw the attempt, so it does not count as one.
    """

    OK = "ok"
    THROTTLED = "throttled"
    QUOTA = "quota"
    TOO_LARGE = "too_large"
    SLOW_DOWN = "slow_down"
    OVERLOADED = "overloaded"
    SERVER_ERROR = "server_error"
    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    TIMEOUT = "timeout"
    DROPPED = "dropped"
    MALFORMED = "malformed"
    LOCAL = "local"


class Scope(StrEnum):
    """The scope of a refusal: this request, the whole account (money or key), or the address (it is not the API)."""

    REQUEST = "request"
    ACCOUNT = "account"
    ADDRESS = "address"


ACCOUNT_REFUSES = (Outcome.QUOTA, Outcome.UNAUTHORIZED)


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit as the provider states it: `dimension` TPM, RPM, TPD or RPD; `limit` and `remaining` in its units."""

    dimension: str
    limit: float
    remaining: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one attempt.

    `status`: HTTP, 0 if none arrived. `retry_after_s`: the provider's figure, -1 = absent. `used_*_tokens`: -1 = not
    stated. `cut_off`: the answer was ended by its token limit. `has_text`: it holds text that a user could use.
    `limits`: plausible limits, at most one per dimension. `processing_s`: the provider's own processing time, -1 = not
    stated. `body`: the parsed JSON object, None if there was none. `raw`: the text of a success that could not be read
    as an answer. `returns_at`: seconds since 1970 at which the account has access again, None if the refusal does not
    say. `misaddressed`: the response does not look like the API's.
    """

    outcome: Outcome
    status: int = 0
    error_code: str = ""
    message: str = ""
    retry_after_s: float = -1.0
    used_prompt_tokens: int = -1
    used_output_tokens: int = -1
    cut_off: bool = False
    has_text: bool = False
    limits: tuple[Limit, ...] = ()
    processing_s: float = -1.0
    request_id: str = ""
    body: dict[str, Any] | None = None
    raw: str = ""
    returns_at: float | None = None
    misaddressed: bool = False

    @property
    def scope(self) -> Scope:
        """Return the scope: the account's own state stops a pool, other refusals concern their own request."""
        if self.outcome in ACCOUNT_REFUSES:
            return Scope.ACCOUNT
        return Scope.ADDRESS if self.misaddressed else Scope.REQUEST


class Attempt(NamedTuple):
    """One row per attempt, with the same columns in the same order live and simulated.

    Times are seconds since the run began. `lane`: main or finalize. `attempt` counts from 1. `reserved_tokens` is ours,
    `charged_tokens` the provider's; -1 = unknown. `waited_*_s` split by cause the wait that ends at `launched_s`.
    """

    request: int
    custom_id: str
    pool: str
    model: str
    url: str
    lane: str
    attempt: int
    submitted_s: float
    eligible_s: float
    launched_s: float
    finished_s: float
    reserved_tokens: int
    charged_tokens: int
    prompt_tokens: int
    output_tokens: int
    outcome: Outcome
    status: int
    error_code: str
    retry_after_s: float
    waited_concurrency_s: float = 0.0
    waited_stagger_s: float = 0.0
    waited_tpm_s: float = 0.0
    waited_rpm_s: float = 0.0
    waited_day_s: float = 0.0
    waited_hold_s: float = 0.0
    waited_paused_s: float = 0.0
    waited_backoff_s: float = 0.0

    @staticmethod
    def columns() -> tuple[str, ...]:
        """Return the names of the columns, in order."""
        return Attempt._fields

    def row(self) -> tuple[Any, ...]:
        """Return the values, in the order of `columns()`."""
        return tuple(self)


@dataclass(frozen=True, slots=True)
class OldResult:
    """One line of an earlier run's results. `status`: 0 if there was no response; tokens: -1 = not stated."""

    custom_id: str
    status: int
    prompt_tokens: int
    output_tokens: int
    error_code: str


# ---------------------------------------------------------------- reading


def read_requests(
    lines: Iterable[str | bytes],
    name: str,
    *,
    keep_body: bool = True,
    pool: str = "default",
    file_tokens: int = TOKENS_PER_FILE,
    in_background: bool = False,
) -> Iterator[Request]:
    """Yield the requests of a batch file, one at a time, in file order.

    `lines`: an open file or any iterable of lines; if it is opened in binary, a line that is not UTF-8 is named
    exactly. `name`: the file's name in errors. `keep_body=False` drops each body once it is sized. `file_tokens`: as in
    `measured`. `in_background`: background responses are served. Raise BadInput, naming file and line, for the first
    invalid line, and at the end for a file without requests.
    """
    line_of: dict[str, int] = {}
    for line, record in _objects(lines, name):
        try:
            request = _request(record, len(line_of), keep_body, pool, file_tokens, in_background)
        except BadInput as error:
            raise BadInput(error.reason, name, line) from None
        first = line_of.setdefault(request.custom_id, line)
        if first != line:
            raise BadInput(f"custom_id {quoted(request.custom_id)} stands on line {first} already", name, line)
        yield request
    if not line_of:
        raise BadInput("no requests in it", name)


def read_results(lines: Iterable[str | bytes], name: str) -> Iterator[OldResult]:
    """Yield the lines of an old results file (ours or OpenAI's), one at a time.

    Raise BadInput as `read_requests` does.
    """
    empty = True
    for line, record in _objects(lines, name):
        try:
            result = _old_result(record)
        except BadInput as error:
            raise BadInput(error.reason, name, line) from None
        empty = False
        yield result
    if empty:
        raise BadInput("no results in it", name)


def tier_of(body: Mapping[str, Any]) -> str:
    """Return the service tier that a request asks for, or that an answer states."""
    stated = body.get("service_tier")
    return _TIER_OF.get(stated, stated[:40]) if isinstance(stated, str) else STANDARD


def usage_of(body: Mapping[str, Any]) -> tuple[int, int]:
    """Return the prompt and output tokens in a response's `usage`, whatever its endpoint; -1 = absent.

    Embeddings state no output, which is 0. Any value but a whole number from 0 up counts as absent. The prompt
    includes what was read from a cache and written to one, which Anthropic states apart from `input_tokens`.
    """
    usage = body.get("usage")
    if not isinstance(usage, Mapping):
        return -1, -1
    prompt, output = (_count(_first(usage, keys)) for keys in (_PROMPT_KEYS, _OUTPUT_KEYS))
    if prompt >= 0 and usage.get("prompt_tokens") is None and usage.get("input_tokens_details") is None:
        prompt += sum(max(_count(usage.get(key)), 0) for key in (CACHE_READ, CACHE_WRITE))
    no_output = prompt >= 0 and _first(usage, _OUTPUT_KEYS) is None
    return prompt, 0 if no_output else output


CACHE_READ, CACHE_WRITE = "cache_read_input_tokens", "cache_creation_input_tokens"
_PROMPT_KEYS = ("prompt_tokens", "input_tokens")
_OUTPUT_KEYS = ("completion_tokens", "output_tokens")


def _first(usage: Mapping[str, Any], keys: tuple[str, ...]) -> object:
    return next((usage[key] for key in keys if usage.get(key) is not None), None)


def _count(value: object) -> int:
    """Return `value` if it is a whole number from 0 up, else -1."""
    return value if type(value) is int and 0 <= value <= WHOLE_MAX else -1


def _objects(lines: Iterable[str | bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and JSON object of every line that is not blank."""
    line = 0
    try:
        first = True
        for line, raw in enumerate(lines, 1):
            what = foreign_format(raw) if line == 1 and isinstance(raw, bytes) else ""
            if what:
                raise BadInput(f"this is {what}", name)
            text = _text(raw, name, line)
            if not text.strip():
                continue
            if first and text.lstrip().startswith("["):
                raise one_list(name)
            first = False
            record = _json(text, name, line)
            if not isinstance(record, dict):
                raise BadInput(f"{kind_of(record)} where a JSON object should be", name, line)
            yield line, record
    except UnicodeDecodeError as error:
        # A file opened as text decodes ahead of the lines that it yields, so the exact place is unknown.
        raise BadInput(f"not UTF-8 text somewhere after line {line}: {error.reason}", name) from None


def _text(raw: str | bytes, name: str, line: int) -> str:
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 text: {error.reason}", name, line) from None
    return text.removeprefix("\ufeff") if line == 1 else text


def _json(text: str, name: str, line: int) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON: {error.msg} (column {error.colno})", name, line) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not JSON: {error}", name, line) from None


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is not a JSON number")


def _request(
    record: dict[str, Any], index: int, keep_body: bool, pool: str, file_tokens: int, in_background: bool
) -> Request:
    custom_id, url, body = (record.get(key) for key in ("custom_id", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise BadInput("custom_id is missing" if custom_id is None else "custom_id must be non-empty text")
    if not isinstance(url, str):
        raise BadInput("url is missing" if url is None else f"url is {kind_of(url)}, not text")
    endpoint = endpoint_of(url)
    if endpoint < 0:
        raise BadInput(f"url {quoted(url)} is not supported: use one of {', '.join(URLS)}")
    method = record.get("method", "POST")
    if method != "POST":
        raise BadInput(f"method is {quoted(method)}: only POST can be sent")
    if not isinstance(body, dict):
        raise BadInput("body is missing" if body is None else f"body is {kind_of(body)}, not an object")
    _check_served(body, in_background and endpoint == RESPONSES)
    model = body.get("model", "")
    if not isinstance(model, str):
        raise BadInput(f"body.model is {kind_of(model)}, not text")
    if any(each < " " or "\x7f" <= each < "\xa0" for each in model):
        raise BadInput(f"body.model {quoted(model)} holds control characters: no model has such a name")
    sizes, unseen = measured(endpoint, body, file_tokens)
    kept = body if keep_body else None
    return Request(index, custom_id, url, model, kept, sizes, pool, tuple(unseen), tier_of(body))


class UnseenContent:
    """Count requests that point to content of unknown length: a figure that rests on them needs a note."""

    def __init__(self, file_tokens: int = TOKENS_PER_FILE) -> None:
        self.requests = 0
        self._file_tokens = file_tokens
        self._kinds: dict[str, None] = {}

    def add(self, request: Request) -> None:
        """Count a request."""
        if request.unseen:
            self.requests += 1
            self._kinds |= dict.fromkeys(request.unseen)

    @property
    def text(self) -> str:
        """Return one sentence; "" if there are none."""
        if not self.requests:
            return ""
        return (
            f"{plural(self.requests, 'request')} with {', '.join(self._kinds)} whose tokens are unknown: "
            f"{self._file_tokens:,} are assumed for each"
        )


def _check_served(body: dict[str, Any], in_background: bool) -> None:
    """Raise BadInput for a field that changes the kind of answer; see `UNSERVED`."""
    for field, (served, reason) in UNSERVED.items():
        value = body.get(field)
        if in_background and field == "background" and value is True:
            continue
        if value is not None and value not in served:
            raise BadInput(f"body.{field} is {quoted(value)}: {reason}")


def _old_result(record: dict[str, Any]) -> OldResult:
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadInput("custom_id is missing")
    response = _object(record.get("response"))
    body = _object(response.get("body"))
    usage = _object(body.get("usage"))
    for key in (*_PROMPT_KEYS, *_OUTPUT_KEYS):
        if usage.get(key) is not None and _count(usage[key]) < 0:
            raise BadInput(f"usage.{key} is {quoted(usage[key])}: it must be a whole number from 0 up")
    error = _object(record.get("error") or body.get("error"))
    code = error.get("code") or error.get("type") or ""
    return OldResult(custom_id, max(0, _count(response.get("status_code"))), *usage_of(body), str(code))


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- writing


def result_line(request: Request, answer: Answer) -> str:
    """Return the line of the results file for a request that succeeded, without the newline."""
    return _line(request, _response(answer), None)


def error_line(request: Request, code: str, message: str, answer: Answer | None = None) -> str:
    """Return the line of the errors file: our `code` and `message`, and beside them the provider's last response."""
    response = _response(answer) if answer is not None and answer.status else None
    return _line(request, response, {"code": code, "message": message})


def _response(answer: Answer) -> dict[str, Any]:
    return {"status_code": answer.status, "request_id": answer.request_id, "body": answer.raw or answer.body}


def _line(request: Request, response: dict[str, Any] | None, error: dict[str, str] | None) -> str:
    record = {"id": f"batch_req_{request.index}", "custom_id": request.custom_id, "response": response, "error": error}
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False)
    except ValueError:
        # Servers in Python write NaN and Infinity, which JSON does not have: the answer is paid for, so keep it as
        # valid JSON.
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)
        return json.dumps(record, separators=(",", ":"), allow_nan=False)


class Ended(NamedTuple):
    """The end of a request: `failure` is "" or its failure code. A request may end without any attempt."""

    request: int
    ended_s: float
    failure: str

"""The columns of logs and traces: the roles they can play, the names each role is known by, and the check of one value.

One table serves `simulate`, `plan`, `capacity` and `calibrate`. Names are compared without regard to case, separators
and a unit at the end, so that `promptTokens`, `prompt_tokens` and `Prompt Tokens` are one name, and `latency_ms` is
`latency` in milliseconds. Nested fields are named by their path (`usage.prompt_tokens`); the containers that tools wrap
them in are ignored. A role that the user states with `--columns` overrides every guess.

A check raises ValueError with the end of a sentence ("is not a whole number ..."); the reader of the row (`rows`) adds
file, line and column.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Hashable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from governor.model.errors import BadSetting, quoted
from governor.model.requests import Outcome, endpoint_of
from governor.model.work import TURNED_AWAY
from sim.model.workload import TOKENS_MAX

# ---------------------------------------------------------------- the table of roles

# Tokens and other whole numbers of a request; -1 = not stated.
WHOLES: dict[str, tuple[str, ...]] = {
    "prompt": (
        *("prompt_tokens", "input_tokens", "ContextTokens", "num_prefill_tokens", "input_length", "num_prompt_tokens"),
        *("prompt_token_count", "input_token_count", "native_tokens_prompt", "tokens_prompt", "tokens_in", "req_units"),
        *("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.usage.prompt_tokens"),
        *("llm.token_count.prompt", "usage_prompt_tokens", "usage_input_tokens", "response.body.usage.prompt_tokens"),
    ),
    "output": (
        *("output_tokens", "completion_tokens", "GeneratedTokens", "num_decode_tokens", "output_length"),
        *("num_completion_tokens", "completion_token_count", "output_token_count", "candidates_token_count"),
        *("native_tokens_completion", "tokens_completion", "tokens_out", "res_units", "generated_token_count"),
        *("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.usage.completion_tokens"),
        *("llm.token_count.completion", "usage_completion_tokens", "usage_output_tokens"),
    ),
    "cached": (
        *("cached_tokens", "cached_input_tokens", "input_cached_tokens", "cache_read_input_tokens"),
        *(
            "prompt_tokens_details.cached_tokens",
            "input_tokens_details.cached_tokens",
            "input_token_details.cache_read",
        ),
        *("gen_ai.usage.cache_read.input_tokens", "llm.token_count.prompt_details.cache_read"),
        *("prompt_cache_read_tokens", "native_tokens_cached", "prompt_tokens_cached", "input_cache_read"),
    ),
    "max_tokens": (
        *("max_tokens", "max_completion_tokens", "max_output_tokens"),
        *("gen_ai.request.max_tokens", "llm.request.max_tokens"),
    ),
    **{role: (role,) for role in ("chars", "role_chars", "messages", "images", "tools", "n")},
}
# Seconds, unless the name or the user states another unit.
DURATIONS: dict[str, tuple[str, ...]] = {
    "latency": (
        *("latency", "duration", "delay", "elapsed", "elapsed_time", "request_duration", "total_latency"),
        *("total_time", "generation_time", "response_time"),
    ),
    "first_token": (
        *("first_token", "ttft", "time_to_first_token", "time_to_first_chunk"),
        *("gen_ai.response.time_to_first_chunk", "gen_ai.response.time_to_first_token"),
        "gen_ai.server.time_to_first_token",
    ),
    "processing": ("processing", "openai-processing", "llm_provider-openai-processing"),
    "retry_after": ("retry_after", "llm_provider-retry-after", "http.response.header.retry-after"),
}
# Dates, or numbers: since 1970 in s, ms, us or ns by their size, else seconds since any beginning.
MOMENTS: dict[str, tuple[str, ...]] = {
    "arrival": (
        *("arrival", "submitted", "TIMESTAMP", "arrived_at", "submitted_at", "arrival_time", "request_created_at"),
        *("requested_at", "created_at", "request_time", "datetime", "event_time"),
    ),
    "launched": (
        *("launched", "start_time", "started_at", "start_timestamp", "start_time_unix", "sent_at", "start"),
        "request_start_time",
    ),
    "finished": (
        *("finished", "end_time", "ended_at", "finished_at", "completed_at", "end_timestamp", "end_time_unix", "end"),
        *("response_created_at", "request_end_time"),
    ),
    "first_token_at": ("completion_start_time", "first_token_time", "first_token_at"),
}
# What the provider's headers state about its limits.
COUNTS: dict[str, tuple[str, ...]] = {
    role: (role, *(f"{before}x-ratelimit-{role}" for before in ("", "llm_provider-", "http.response.header.")))
    for role in ("limit_tokens", "remaining_tokens", "limit_requests", "remaining_requests")
}
TEXTS: dict[str, tuple[str, ...]] = {
    "id": ("custom_id", "request_id", "id", "span_id", "context.span_id", "generation_id", "run_id", "call_id"),
    "model": (
        *("model", "model_name", "gen_ai.request.model", "gen_ai.response.model", "llm.model_name", "request_model"),
        *("response_model", "provided_model_name", "ai_model", "llm.request.model", "ls_model_name", "model_permaslug"),
    ),
    "endpoint": ("endpoint",),
    "outcome": ("outcome",),
    "status": (
        *("status_code", "response_status_code", "http.response.status_code", "http.status_code", "http_status"),
        *("http_status_code", "response_status", "response.status_code", "status", "state", "is_success", "success"),
        *("status.code", "level"),
    ),
    "error": (
        *("error_code", "error.code", "error.type", "error_type", "error_class", "response.body.error.code"),
        *("error_message", "error.message", "error_str", "status_message", "status.message", "exception.type", "error"),
    ),
    "lane": ("lane",),
    "kind": (
        *("gen_ai.operation.name", "openinference.span.kind", "llm.request.type", "span_kind", "span.kind"),
        *("meta.kind", "meta.span.kind", "run_type", "observation_type", "type"),
    ),
    "cache_hit": ("cache_hit", "cache_status", "is_cached", "cached"),
    "requests": ("num_model_requests", "num_requests", "n_requests", "request_count", "requests_count"),
}
KNOWN: dict[str, tuple[str, ...]] = {**WHOLES, **DURATIONS, **MOMENTS, **COUNTS, **TEXTS}
ROLES = tuple(KNOWN)
# Columns found only in exports of spans and gateways: in such files, rows that are not model calls are skipped.
MARKERS = ("span_id", "context.span_id", "trace_id", "context.trace_id", "call_type", "run_type", "observation_type")

# Containers whose name carries no meaning. The second group also holds text written by users, so only numbers are
# taken from it.
WRAPPERS = (
    *(
        "attributes",
        "span_attributes",
        "data",
        "record",
        "standard_logging_object",
        "meta",
        "hidden_params",
        "span",
        "llm",
    ),
    *("additional_headers", "response_headers", "headers", "error_information", "request", "timing", "json_payload"),
    *("model_parameters", "invocation_params", "invocation_parameters", "optional_params"),
)
USER_WRAPPERS = ("metadata", "extra", "properties", "labels", "body", "response")
_FIGURES = (
    "prompt",
    "output",
    "cached",
    "max_tokens",
    "model",
    "error",
    "status",
    *COUNTS,
    "retry_after",
    "processing",
)
# Containers of a call's usage, at any depth; inside them plain words such as `input` are recognised.
USAGE = ("usage", "usage_details", "token_usage", "usage_metadata", "usage_object", "metrics", "token_counts")
USAGE_NAMES = {"prompt": ("input", "prompt"), "output": ("output", "completion"), "cached": ("cache_read",)}
# Formats that do not state the unit of their times: a column that identifies the format, and the column with its unit.
UNSTATED = {"input_length": ("timestamp", "ms"), "req_units": ("response_time", "ms")}

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_UNIT_WORDS = {
    **dict.fromkeys(("s", "sec", "secs", "seconds"), "s"),
    **dict.fromkeys(("ms", "millis", "milliseconds"), "ms"),
    **dict.fromkeys(("us", "micros", "microseconds"), "us"),
    **dict.fromkeys(("ns", "nano", "nanos", "nanoseconds"), "ns"),
}
_UNIT_END = re.compile(rf"[-_. (]+({'|'.join(_UNIT_WORDS)})\)?$|(?<=[a-z])(Ms|Us|Ns|Nanos?|Millis|Seconds)$")

# Columns that `readers.save_rows` writes: times in seconds, from 0.
OUR_COLUMNS = {
    "prompt": "prompt_tokens",
    "output": "output_tokens",
    "arrival": "arrival_s",
    "latency": "latency_s",
    "id": "custom_id",
    "endpoint": "endpoint",
    "model": "model",
    **{role: role for role in list(WHOLES)[3:]},
}


class Column(NamedTuple):
    """A column and the role it plays. `rank`: the lowest wins; `unit` of a time, "" = inferred from its values."""

    role: str
    name: str
    unit: str
    rank: tuple[int, int]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def unit_named(name: str) -> str:
    """Return the unit that a column's name ends in: "ms" of `latency_ms`, `delayMs` and `Latency (ms)`; "" if none."""
    ending = _UNIT_END.search(name)
    return _UNIT_WORDS[(ending[1] or ending[2]).lower()] if ending else ""


_ROLE_OF = {_plain(name): (role, rank) for role, names in KNOWN.items() for rank, name in enumerate(names)}
_USAGE_ROLE_OF = {_plain(name): (role, rank) for role, names in USAGE_NAMES.items() for rank, name in enumerate(names)}
_WRAPPERS = {_plain(name) for name in WRAPPERS}
_USER_WRAPPERS = {_plain(name) for name in USER_WRAPPERS}
_USAGE = {_plain(name) for name in USAGE}
_MARKERS = {_plain(name) for name in MARKERS}


def is_container(name: str) -> bool:
    """Return whether a cell under that name may hold an object written as text."""
    last = _plain(name.rpartition(".")[2])
    return last in _WRAPPERS or last in _USER_WRAPPERS or last in _USAGE


def is_marker(name: str) -> bool:
    """Return whether only exports of spans and gateways have a column of that name."""
    return _plain(name) in _MARKERS


def guessed(path: str) -> tuple[str, tuple[int, int]] | None:
    """Return the role that a column plays and how well its name fits; None for an unknown column."""
    parts = path.split(".")
    plain = [_plain(part) for part in parts]
    figures_only = False
    for depth in range(len(parts)):
        rest = ".".join(parts[depth:])
        for text in (rest, _UNIT_END.sub("", rest)):
            found = _ROLE_OF.get(_plain(text))
            timed = found is not None and (found[0] in DURATIONS or found[0] in MOMENTS)
            if found is not None and (timed or text == rest) and (found[0] in _FIGURES or not figures_only):
                return found[0], (found[1], depth)
        if plain[depth] in _USAGE:
            found = _ROLE_OF.get("".join(plain[depth + 1 :])) or _USAGE_ROLE_OF.get("".join(plain[depth + 1 :]))
            return (found[0], (found[1], depth)) if found is not None and found[0] in WHOLES else None
        if plain[depth] in _USER_WRAPPERS:
            figures_only = True
        elif plain[depth] not in _WRAPPERS and not (depth == 0 and plain[:2] == ["outputs", "usagemetadata"]):
            later = next((i for i in range(depth + 1, len(parts)) if plain[i] in _USAGE), None)
            return None if later is None else guessed(".".join(parts[later:]))
    return None


class RoleColumns:
    """Map of roles to columns, matched by name as names turn up; the user's choice overrides every guess."""

    def __init__(self, chosen: Mapping[str, str]) -> None:
        self._chosen: dict[str, list[Column]] = {}
        self._roles = set(chosen)
        for role, wanted in chosen.items():
            if role not in KNOWN:
                close = difflib.get_close_matches(role, ROLES, 1)
                meant = f"did you mean {close[0]}?" if close else f"use {', '.join(ROLES)}"
                raise BadSetting(f"--columns: there is no {quoted(role)}: {meant}", "--columns")
            name, colon, unit = wanted.rpartition(":")
            if not (colon and name and unit in UNITS and (role in DURATIONS or role in MOMENTS)):
                name, unit = wanted, unit_named(wanted)
            self._chosen.setdefault(name, []).append(Column(role, name, unit, (-1, 0)))
        self._found: dict[str, list[Column]] = {}
        self._unit = ""
        self._unstated: dict[str, str] = {}
        self.names: list[str] = []
        self.marked = False

    def begin(self, names: list[str]) -> None:
        """Record the column names of the first rows: the unit of a time may be evident only from other columns."""
        self._found.clear()
        self.names = names
        self.marked = any(is_marker(name) for name in names)
        plain = {_plain(name) for name in names}
        self._unstated = dict(pair for mark, pair in UNSTATED.items() if _plain(mark) in plain)
        stated = [(hit, unit_named(name)) for name in names if (hit := guessed(name)) is not None]
        self._unit = next((unit for (role, _), unit in stated if unit and role in ("latency", "launched")), "")

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Return (role, column) for each column that the user chose and no row has had so far."""
        return [(c.role, name) for name, columns in self._chosen.items() if name not in self.names for c in columns]

    def of(self, name: str) -> list[Column]:
        """Return the roles that a column plays.

        Empty if it plays none or if the user gave its role to another column.
        """
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = self._chosen.get(name) or self._guess(name)
        return found

    def _guess(self, name: str) -> list[Column]:
        found = guessed(name)
        if found is None or found[0] in self._roles:
            return []
        role, rank = found
        unit = unit_named(name) or self._unstated.get(name.lower(), "")
        if role in ("latency", "first_token"):
            unit = unit or self._unit
        return [Column(role, name, unit, rank)]


def parse_columns(text: str) -> dict[str, str]:
    """Parse `--columns prompt=NAME,output=NAME,...` into role -> column name. Raise BadSetting if it is malformed."""
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, equals, name = (word.strip() for word in part.partition("="))
        if not equals or not name:
            raise BadSetting(f"--columns {quoted(part)}: write ROLE=NAME, for example prompt=input_tokens", "--columns")
        if role in chosen:
            raise BadSetting(f"--columns names {role} twice", "--columns")
        chosen[role] = name
    if not chosen:
        raise BadSetting("--columns is empty: write ROLE=NAME, for example prompt=input_tokens", "--columns")
    return chosen


# ---------------------------------------------------------------- one value

LOWEST = {"n": 1}
ABSENT = ("", "null", "nan", "none", "na")
SECONDS_MAX = 1e8
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Smallest value at which a moment without a unit is read as time since 1970 in that unit: 1e11 s is the year 5138.
_SINCE_1970 = (("ns", 1e17), ("us", 1e14), ("ms", 1e11))
_UTC = re.compile(r"(?<=\d)\s*(?:UTC|GMT|Z)$|(?<=\d)\s+(?=[+-]\d\d:?\d\d)| UTC$", re.IGNORECASE)


def is_absent(role: str, value: object) -> bool:
    """Return whether the value is absent; -1 also means absent. A custom_id may be any text, including "null"."""
    if value is None or value != value:
        return True
    if isinstance(value, str):
        return not value if role == "id" else value.strip().lower() in ABSENT
    return False


def number_of(value: object) -> float | None:
    """Return the value as a number, or None if it is not one."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if len(text) <= 400 and _NUMBER.fullmatch(text) else None
    if type(value) is int:
        return float(value) if abs(value) < 10**300 else math.inf
    return value if isinstance(value, float) else None


def whole_of(role: str, value: object) -> float:
    """Return a count of tokens, characters or the like; -1 = not stated."""
    low = LOWEST.get(role, 0)
    number = number_of(value)
    if number == -1.0:
        return -1.0
    if number is None or not low <= number <= TOKENS_MAX or number != int(number):
        raise ValueError(f"is not a whole number from {low} to {TOKENS_MAX:,}")
    return number


def amount_of(role: str, unit: str, value: object) -> float:
    """Return a duration in seconds, or a header's count; -1, in any unit, means not stated."""
    number = number_of(value)
    if number is None:
        raise ValueError("is not a number: write it in the column's unit, without one of its own")
    if number == -1.0:
        return -1.0
    number = number * UNITS[unit or "s"] if role in DURATIONS else number
    if not 0.0 <= number <= (SECONDS_MAX if role in DURATIONS else 1e18):
        raise ValueError("is not a time from 0 up" if number > 0.0 else "is a negative time")
    return number


def moment_of(value: object, unit: str) -> tuple[str, float]:
    """Return (unit, number) of a moment: microseconds since 1970 for "date" and "zoned date", else as given."""
    number = number_of(value)
    if number is not None and abs(number) < 1e20:
        if number < 0.0 and number != -1.0:
            raise ValueError("is a negative time")
        return unit or next((unit for unit, least in _SINCE_1970 if number >= least), "s"), number
    try:
        date = value if isinstance(value, datetime) else _date_of(value)
        zoned = date.tzinfo is not None
        number = float(((date if zoned else date.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND)
    except (ValueError, OverflowError, TypeError):
        raise ValueError("is neither a number nor a date like 2026-11-23 18:17:03.97") from None
    if number < 0.0:
        raise ValueError("is a negative time")
    return ("zoned date" if zoned else "date"), number


def _date_of(value: object) -> datetime:
    if not isinstance(value, str):
        raise ValueError
    text = value.strip()
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        # BigQuery writes 2026-03-12 14:05:07 UTC, Go 2026-03-12 14:05:07.5 +0000 UTC.
        bare = _UTC.sub("", text)
        return datetime.fromisoformat(bare if re.search(r"[+-]\d\d:?\d\d$", bare) or bare == text else f"{bare}+00:00")


def unit_words(unit: str) -> str:
    """Return the words for a unit of moments; dates, and dates with a time zone, count as units too."""
    dates = {"date": "dates without a time zone", "zoned date": "dates with a time zone"}
    return dates.get(unit) or ("seconds" if unit == "s" else f"{unit} since 1970")


def seconds_from_first(numbers: NDArray[np.float64], unit: str) -> NDArray[np.float64]:
    """Return moments as seconds from the earliest, same shape as `numbers`.

    Dates are in microseconds: see `moment_of`.
    """
    per_second = 1_000_000 if "date" in unit else round(1.0 / UNITS[unit])
    return (numbers - numbers.min()) / per_second


def text_of(role: str, value: object) -> Any:
    """Return a name as text, or the code of an endpoint for its URL, with or without the host."""
    if isinstance(value, dict | list) or (isinstance(value, bool) and role in ("id", "model", "endpoint")):
        raise ValueError("is not text")
    text = str(value)
    if role != "endpoint":
        return text
    code = endpoint_of(re.sub(r"^https?://[^/]+", "", text.strip()))
    if code < 0:
        raise ValueError("is not a known endpoint: write for example /v1/chat/completions")
    return code


# ---------------------------------------------------------------- what became of an attempt

ANSWERED, REFUSED, SERVER_FAULT, LOST, OTHER = range(5)
_KIND_OF = {
    Outcome.OK: ANSWERED,
    Outcome.THROTTLED: REFUSED,
    Outcome.SLOW_DOWN: REFUSED,
    Outcome.SERVER_ERROR: SERVER_FAULT,
    Outcome.OVERLOADED: SERVER_FAULT,
    Outcome.MALFORMED: ANSWERED,  # paid for, although it could not be parsed
    Outcome.DROPPED: LOST,
}
# Words that logs use for a status, with the equivalent HTTP code; 0: not answered, for an unknown reason.
_WORDS = {
    **dict.fromkeys(("ok", "success", "succeeded", "successful", "completed", "done", "true", "unset", "default"), 200),
    **dict.fromkeys(("info", "debug", "warning", "status_code_ok", "status_code_unset"), 200),
    **dict.fromkeys(("throttled", "rate_limited", "rate_limit_exceeded", "too_many_requests", "ratelimiterror"), 429),
    **dict.fromkeys(("failure", "failed", "error", "false", "timeout", "timed_out", "cancelled", "canceled"), 0),
    **dict.fromkeys(("status_code_error", "pending", "fatal", "critical"), 0),
}
_SAYS_THROTTLED = re.compile(r"rate.?limit|too.?many.?requests|throttl|resource.?exhausted", re.IGNORECASE)


@lru_cache(maxsize=1_024, typed=True)
def status_of(value: Hashable) -> int:
    """Return a status as an HTTP code, 0 for a failure without one.

    Reads "200", 429.0, "429 Too Many Requests", "ok" and "failed".
    """
    text = str(value).strip().lower()
    number = number_of(text.split(" ")[0])
    code = _WORDS.get(re.sub(r"[\s-]+", "_", text)) if number is None else int(number)
    if code is None or (code and not 100 <= code < 600):
        raise ValueError("is not a status: an HTTP code, or a word like ok, failed or throttled")
    return code


def span_status_of(value: Hashable) -> int:
    """Return OpenTelemetry's span status as an HTTP code; in JSON it is a number: 0 unset, 1 ok, 2 error."""
    number = number_of(value)
    return status_of(value) if number is None or number > 2 else (0 if number == 2 else 200)


def kind_of_attempt(outcome: str, status: int, error: str) -> int:
    """Return how an attempt ended: by our outcome word, else status (-1 = not stated) and error, else answered."""
    if outcome:
        try:
            word = Outcome(outcome)
        except ValueError:
            return OTHER
        return REFUSED if word in TURNED_AWAY and word in _KIND_OF else _KIND_OF.get(word, OTHER)
    if status <= 0 and error.lower() not in (*ABSENT, "false", "0", "{}"):
        code = re.search(r"(?<!\d)[45]\d\d(?!\d)", error)
        status = int(code[0]) if code else 429 if _SAYS_THROTTLED.search(error) else 0
    if status < 0 or 200 <= status < 300:
        return ANSWERED
    return REFUSED if status == 429 else SERVER_FAULT if status >= 500 else OTHER

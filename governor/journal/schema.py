"""The journal's tables: one row per request, per attempt, per decision, and facts about the run itself.

    run        one row: versions, fingerprint of the input, seed, epoch of time zero
    legs       one row per process that worked on the run; a resume begins another leg
    pools      number and name; decisions carry the number
    policies   the settings of each pool at the beginning of each leg, and each change with its time
    requests   one row per line of the input: its reservation and its state
    bodies     request bodies, apart from `requests` so that a change of state rewrites a short row
    results    the last response, for requests that ended
    attempts   one row per ended attempt: `Attempt`'s columns, request id, limits and time from the headers
    checkpoints  the use of each pool of the latest leg, rewritten with each commit (`checkpoint`)
    timers     how late each timed launch was
    decisions  with `--record`, every call of the law: one row per pool and commit, from the `first` on
    deferrals  per leg, pool and cause: requests that had to wait for it at the head of the queue
    forecasts  forecasts as JSON; `launched_before` counts the launches before it was written
    commands   commands from other processes: pause, resume, set, unset
    waves      one row per file that went, or is about to go, to the Batch API
    wave_requests  the wave that holds a request: `in_flight` there, whichever process runs
    background  the background response that a request has become at the provider, until it has ended
    deadlines  when the run is to be done, and the words that said so

A request is `pending`, `in_flight` (sent, or about to be), `done` or `failed`. A request that backs off is pending: no
attempt of it is with the provider. Times are seconds since the run began, -1 = not yet.

Nothing else is written: no header except the limits read from it, no key. A key quoted by a refusal is redacted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from sqlalchemy import BigInteger, Column, Dialect, Double, Index, Integer, LargeBinary, MetaData, String, Table, Text
from sqlalchemy.dialects.mysql import LONGBLOB, LONGTEXT
from sqlalchemy.types import TypeDecorator

from governor.journal.checkpoint import Checkpoint, Moment, read_back
from governor.model.errors import PacelineError
from governor.model.needs import Limited
from governor.model.policy import Policy
from governor.model.prices import usage_in
from governor.model.requests import LANES, Answer, Attempt, Limit, Outcome, Request, Sizes
from governor.model.work import Work

SCHEMA = 5
# The schemas that brought in checkpoints and timers, waves, and the tier and cache writes of attempts with deadlines.
CHECKPOINTS_SINCE, WAVES_SINCE, TIERS_SINCE = 3, 4, 5
# The oldest schema that can be read, and that a run brings up to date.
OLDEST_SCHEMA = 2
# "PACE", in the header of the SQLite file, by which `file` and Paceline recognise it.
APPLICATION_ID = 0x50414345

PENDING, IN_FLIGHT, DONE, FAILED = "pending", "in_flight", "done", "failed"
STATES = (PENDING, IN_FLIGHT, DONE, FAILED)

# ---------------------------------------------------------------- text

_UNSTORABLE = re.compile("[\\\\\x00\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u([0-9a-f]{4})")
_KEYS = re.compile(r"\bsk-[\w*.-]{4,}|\bBearer\s+[\w.~+/=-]{8,}", re.IGNORECASE)


def escaped(text: str) -> str:
    """Return `text` with characters that databases cannot hold (NUL, half of a surrogate pair) as \\uXXXX.

    The backslash is escaped as well.
    """
    if _UNSTORABLE.search(text) is None:
        return text
    return _UNSTORABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def unescaped(text: str) -> str:
    """Return the text from which `escaped` made this."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text) if "\\" in text else text


class Words(TypeDecorator[str]):
    """A column of text that takes any Python string and returns the same string."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else escaped(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else unescaped(value)


def to_json(value: object) -> str:
    """Return compact JSON in ASCII, which every database holds; floats come back exactly."""
    return json.dumps(value, separators=(",", ":"))


# ---------------------------------------------------------------- tables

# For text that may exceed 64 kB, which is all that a plain TEXT or BLOB of MySQL holds.
_LONG = Text().with_variant(LONGTEXT(), "mysql", "mariadb")
_LONG_BINARY = LargeBinary().with_variant(LONGBLOB(), "mysql", "mariadb")

metadata = MetaData()


def _id(name: str, *, given: bool = True) -> Column[int]:
    return Column(name, Integer, primary_key=True, autoincrement="auto" if not given else False)


def _wide(name: str = "request") -> Column[int]:
    """Return a 64-bit key on every database: SQLite's own key has 64 bits under the name of INTEGER only."""
    return Column(name, BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False)


def _whole(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _number(name: str) -> Column[float]:
    return Column(name, Double, nullable=False)


def _text(name: str) -> Column[str]:
    return Column(name, Words, nullable=False)


def _short(name: str) -> Column[str]:
    """Return a column for text that we choose ourselves, or that is part of an index."""
    return Column(name, String(255), nullable=False)


# `schema` and `version` stay as they are in every later schema: by them an older Paceline recognises a newer journal.
run = Table(
    "run",
    metadata,
    _id("id"),
    _whole("schema"),
    _short("version"),
    _short("fingerprint"),
    _whole("seed"),
    _number("epoch_s"),
    _whole("requests"),  # -1 until all of them are in
    _number("purged_epoch_s"),
)

legs = Table("legs", metadata, _id("leg"), _number("began_s"), _number("ended_s"), _text("ending"), _short("version"))

pools = Table("pools", metadata, _id("pool"), _short("name"))

policies = Table(
    "policies",
    metadata,
    _id("id", given=False),
    _whole("leg"),
    _whole("pool"),
    _number("at_s"),
    Column("settings", Text, nullable=False),
)

requests = Table(
    "requests",
    metadata,
    _wide(),
    _short("pool"),
    _short("state"),
    _short("lane"),
    _whole("attempt"),  # the one in flight, or the next
    _whole("resent"),
    _number("first_launched_s"),
    _number("launched_s"),
    _number("ended_s"),
    _number("retry_at_s"),  # when its backoff ends
    _short("failure"),
    _number("reserve"),
    _number("expected"),
    _number("finalize_reserve"),
    _whole("charge"),
    _whole("finalize_charge"),
    _text("custom_id"),
    _text("url"),
    _text("model"),
    *(_whole(column.name) for column in fields(Sizes)),
)
# Longest expected answer first, without sorting: see `Records.pending`. The pool is not part of it: with it, SQLite
# would look requests up by pool and sort them anew for every chunk, even in order of the input.
Index("requests_by_length", requests.c.expected.desc(), requests.c.reserve.desc(), requests.c.request)

bodies = Table("bodies", metadata, _wide(), Column("body", _LONG, nullable=False))

results = Table(
    "results",
    metadata,
    _wide(),
    _short("outcome"),
    _whole("status"),
    _text("error_code"),
    _text("message"),
    _number("retry_after_s"),
    _whole("used_prompt_tokens"),
    _whole("used_output_tokens"),
    _whole("cut_off"),
    _whole("has_text"),
    _text("request_id"),
    Column("body", _LONG),
)

_COLUMN_OF: dict[type, Callable[[str], Column[Any]]] = {int: _whole, float: _number, str: _text, Outcome: _short}
attempts = Table(
    "attempts",
    metadata,
    _id("number", given=False),
    *(_COLUMN_OF[type_](name) for name, type_ in get_type_hints(Attempt).items()),
    _text("request_id"),
    _whole("cached_tokens"),  # part of the prompt's, 0 if not stated
    _whole("reasoning_tokens"),  # part of the output's
    _number("processing_s"),  # the provider's own time, -1 if not stated
    Column("limits", Text, nullable=False),
    _short("service_tier"),  # that served it; "" = standard, or not stated
    _whole("cache_write_tokens"),  # part of the prompt's, written to the provider's cache
)
# Those that a journal of an older schema lacks.
TIER_COLUMNS = ("service_tier", "cache_write_tokens")
# In the order of `Usage`.
USAGE_COLUMNS = ("prompt_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", *TIER_COLUMNS)
Index("attempts_by_request", attempts.c.request)

checkpoints = Table(
    "checkpoints",
    metadata,
    _id("leg"),
    _id("pool"),
    _number("at_s"),
    _number("epoch_s"),
    _short("boot"),
    _number("boot_s"),
    Column("state", _LONG, nullable=False),
)

timers = Table("timers", metadata, _id("number", given=False), _whole("pool"), _number("late_s"))

decisions = Table(
    "decisions",
    metadata,
    _id("leg"),
    _id("pool"),
    _id("first"),
    _whole("count"),
    Column("calls", _LONG_BINARY, nullable=False),
)

deferrals = Table("deferrals", metadata, _id("leg"), _id("pool"), _id("cause"), _whole("requests"))

forecasts = Table(
    "forecasts",
    metadata,
    _id("id", given=False),
    _whole("leg"),
    _number("at_s"),
    _whole("launched_before"),
    _text("json"),
)

commands = Table(
    "commands",
    metadata,
    _id("id", given=False),
    _number("asked_epoch_s"),
    _short("name"),
    Column("words", Text, nullable=False),
    _number("taken_s"),
    _text("outcome"),
)

# Times in seconds of the run, and the provider's own stamps as seconds since 1970; -1 = not yet.
waves = Table(
    "waves",
    metadata,
    _wide("wave"),
    _short("pool"),
    _text("model"),
    _text("url"),
    _whole("requests"),
    _number("tokens"),  # of the input, as estimated
    _whole("bytes"),
    _short("stage"),
    _text("file_id"),
    _text("batch_id"),
    _text("output_file_id"),
    _text("error_file_id"),
    _short("status"),
    _whole("total"),
    _whole("completed"),
    _whole("failed"),
    _whole("real_tokens"),  # of the input, as the provider states them; -1 = it does not
    _whole("files_read"),  # of its error and output file, whose answers are in the journal
    _number("planned_s"),
    _number("submitted_s"),
    _number("ended_s"),
    _number("created_epoch_s"),
    _number("ended_epoch_s"),
    _text("message"),  # why it failed
)

wave_requests = Table("wave_requests", metadata, _wide(), _whole("wave"))
Index("requests_by_wave", wave_requests.c.wave)

background = Table("background", metadata, _wide(), _text("response_id"))

deadlines = Table("deadlines", metadata, _id("id", given=False), _text("words"), _number("at_s"))

# ---------------------------------------------------------------- values to rows and back


class DamagedError(ValueError):
    """Raised for a row whose content cannot be right; the caller adds the journal's name."""


SIZES = tuple(column.name for column in fields(Sizes))
_ATTEMPT = Attempt.columns()
_ANSWER = (
    *("status", "error_code", "message", "retry_after_s", "used_prompt_tokens", "used_output_tokens"),
    "request_id",
)


def request_of(row: Any, body: dict[str, Any] | None) -> Request:
    """Return the request of a row of `requests`."""
    return Request(row.request, row.custom_id, row.url, row.model, body, sizes_of(row), row.pool)


def sizes_of(row: Any) -> Sizes:
    """Return the sizes in a row of `requests`."""
    return Sizes(*(getattr(row, name) for name in SIZES))


def sizes_row(sizes: Sizes) -> dict[str, int]:
    """Return the columns of `requests` that hold sizes."""
    return {name: getattr(sizes, name) for name in SIZES}


def result_row(request: int, answer: Answer) -> dict[str, Any]:
    """Return the row of `results`. A refusal may quote the key that it refuses: the key is redacted.

    A response that could not be read as an answer is stored as one JSON string in place of the body.
    """
    body = to_json(answer.raw) if answer.raw else None if answer.body is None else to_json(answer.body)
    row = {name: getattr(answer, name) for name in _ANSWER}
    if answer.outcome is not Outcome.OK:
        row["message"] = without_keys(answer.message)
        body = None if body is None else without_keys(body)
    flags = {"cut_off": int(answer.cut_off), "has_text": int(answer.has_text)}
    return row | flags | {"request": request, "outcome": str(answer.outcome), "body": body}


def without_keys(text: str) -> str:
    """Return `text` with everything that looks like a key redacted."""
    return _KEYS.sub("***", text)


def answer_of(row: Any) -> Answer:
    """Return the answer of a row of `results`; its limits are with the attempts.

    Raise `DamagedError` if it makes no sense.
    """
    try:
        outcome = Outcome(row.outcome)
        raw = str(json.loads(row.body)) if row.body is not None and row.body.startswith('"') else ""
    except ValueError:
        raise DamagedError("an outcome") from None
    body = None if row.body is None or raw else from_json(row.body, "an answer")
    values = {name: getattr(row, name) for name in _ANSWER}
    return Answer(outcome, cut_off=bool(row.cut_off), has_text=bool(row.has_text), body=body, raw=raw, **values)


def attempt_row(attempt: Attempt, answer: Answer) -> dict[str, Any]:
    """Return the row of `attempts`."""
    row = dict(zip(_ATTEMPT, attempt.row(), strict=True))
    limits = [[limit.dimension, limit.limit, limit.remaining] for limit in answer.limits]
    usage = usage_in(answer.body)
    row |= {"cached_tokens": usage.cached, "reasoning_tokens": usage.reasoning, "processing_s": answer.processing_s}
    row |= {"service_tier": usage.tier, "cache_write_tokens": usage.written}
    return row | {"outcome": str(attempt.outcome), "request_id": answer.request_id, "limits": to_json(limits)}


def checkpoint_row(leg: int, pool: int, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the row of `checkpoints`."""
    row = {"leg": leg, "pool": pool, "at_s": checkpoint.at_s, "state": checkpoint.text()}
    return row | checkpoint.moment._asdict()


def checkpoint_of(row: Any) -> Checkpoint:
    """Return the checkpoint of a row. Raise `DamagedError` if it makes no sense."""
    try:
        return read_back(row.state, row.at_s, Moment(row.epoch_s, row.boot, row.boot_s))
    except (TypeError, ValueError):
        raise DamagedError("a checkpoint") from None


def limits_of(row: Any) -> tuple[Limit, ...]:
    """Return the limits of a row of `attempts`."""
    try:
        return tuple(Limit(str(d), float(limit), float(left)) for d, limit, left in json.loads(row.limits))
    except (TypeError, ValueError):
        raise DamagedError("an attempt's limits") from None


def attempt_of(row: Any) -> Attempt:
    """Return the attempt of a row of `attempts`."""
    values = {name: getattr(row, name) for name in _ATTEMPT}
    try:
        return Attempt(**values | {"outcome": Outcome(row.outcome)})
    except ValueError:
        raise DamagedError("an outcome") from None


def settings_of(policy: Policy) -> str:
    """Return a policy as stored: every value, as defaults may change later, and which were named."""
    quota = [asdict(each) for each in policy.quota]
    stated = {"values": policy.model_dump(), "named": sorted(policy.model_fields_set)}
    return to_json({**stated, "quota": quota} if quota else stated)


def policy_of(settings: str) -> Policy:
    """Return the policy of `settings_of`, equal in every value and in the set of named ones.

    Settings unknown to this version are omitted, settings newer than the record have their defaults.
    """
    stored = from_json(settings, "settings")
    try:
        values = {name: value for name, value in stored["values"].items() if name in Policy.model_fields}
        policy = Policy.model_validate(values)
        told = Policy.model_construct(set(stored["named"]) & values.keys(), **policy.model_dump())
        return told.with_quota(tuple(Limited(**each) for each in stored.get("quota", ())))
    except (AttributeError, KeyError, TypeError, PacelineError):
        raise DamagedError("settings") from None


def from_json(text: str, what: str) -> dict[str, Any]:
    """Return the object that `to_json` wrote. Raise `DamagedError`, naming `what`, if it is not an object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DamagedError(what)
    return value


# ---------------------------------------------------------------- a batch

# Requests written in one transaction while a journal is filled, and the approximate bytes of their bodies.
INGEST_ROWS = 500
INGEST_BYTES = 4 * 2**20


def chunks(works: Iterable[Work]) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield rows of `requests` and `bodies`, as many at a time as one transaction takes.

    A request with the same body as the one before it gets no row in `bodies`: see `Records.pending`.
    """
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    size = 0
    last: object = None
    for work in works:
        request = work.request
        assert request.body is not None, "a request without its body cannot be sent"
        repeats, last = request.body is last, request.body
        body = "" if repeats else to_json(request.body)
        names = {"custom_id": request.custom_id, "url": request.url, "model": request.model, "pool": request.pool}
        start = {"state": PENDING, "lane": LANES[0], "attempt": 1, "resent": 0, "failure": ""}
        times = dict.fromkeys(TIMES, -1.0)
        key = {"request": request.index}
        rows.append(key | names | start | times | work_row(work) | sizes_row(request.sizes))
        if not repeats:
            texts.append(key | {"body": body})
        size += len(body)
        if len(rows) == INGEST_ROWS or size >= INGEST_BYTES:
            yield rows, texts
            rows, texts, size = [], [], 0
    if rows:
        yield rows, texts


TIMES = ("first_launched_s", "launched_s", "ended_s", "retry_at_s")
_WORK = ("reserve", "expected", "finalize_reserve", "charge", "finalize_charge")


def work_row(work: Work) -> dict[str, float]:
    return {name: getattr(work, name) for name in _WORK}

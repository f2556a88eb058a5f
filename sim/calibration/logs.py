"""Logs of real requests, one row per attempt, as CSV or JSONL: which column is what, and the checks of each row.

What lives here: the roles that a log's columns can play, the names by which they are known, and `LogRows`, which checks
row by row. What must not: exports of spans (`spans`, which makes such rows), traces of bare token counts (`traces`).

Theory of operation. Everything passes through one check, and every complaint is one line, `file:line:`, that names the
column, the value and the remedy. A time may be a date, seconds since 1970 in s, ms, us or ns, or seconds since any
beginning; a column says its unit with `:ms`, or by a name that ends in `_ms`. One whose values are of two units is
refused, as is a time that is negative or that ends before it begins: a fit of such rows would be wrong without a sign.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.requests import read_results
from sim.calibration.observed import ANSWERED, OTHER, REFUSED, SERVER_FAULT, Observed, observed_of, refused_by
from sim.scenario.readers import BATCH, TRACE_JSONL, Source, explained
from sim.scenario.trace_columns import (
    UNITS,
    date_seen,
    is_absent,
    moment_of,
    number_of,
    text_of,
    unit_seen,
    unit_words,
    whole_of,
)
from sim.scenario.traces import csv_rows, header_of, json_rows

WHOLES = ("prompt", "output", "max_tokens", "chars", "role_chars", "messages", "images", "tools", "n")
DURATIONS = ("latency", "first_token", "processing", "retry_after")
MOMENTS = ("arrival", "launched", "finished")
COUNTS = ("limit_tokens", "remaining_tokens", "limit_requests", "remaining_requests")
TEXTS = ("id", "model", "endpoint", "outcome", "status", "lane")
ROLES = (*WHOLES, *DURATIONS, *MOMENTS, *COUNTS, *TEXTS)

# Names by which a role is known without a mapping, the first that is there: ours, then those of public formats.
KNOWN: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt_tokens", "input_tokens", "ContextTokens", "num_prefill_tokens", "input_length"),
    "output": ("output_tokens", "completion_tokens", "GeneratedTokens", "num_decode_tokens", "output_length"),
    "arrival": ("arrival_s", "submitted_s", "TIMESTAMP", "arrived_at", "timestamp"),
    "launched": ("launched_s", "start_time", "startTime", "started_at"),
    "finished": ("finished_s", "end_time", "endTime", "finished_at"),
    "latency": ("latency_s", "latency_ms", "duration_ms", "latency", "duration"),
    "first_token": ("first_token_s", "ttft_s", "ttft_ms"),
    "processing": ("processing_s", "openai-processing-ms"),
    "retry_after": ("retry_after_s", "retry-after"),
    "id": ("custom_id", "request_id", "id"),
    "status": ("status", "status_code"),
    "max_tokens": ("max_tokens", "max_completion_tokens", "max_output_tokens"),
    "limit_tokens": ("limit_tokens", "x-ratelimit-limit-tokens"),
    "remaining_tokens": ("remaining_tokens", "x-ratelimit-remaining-tokens"),
    "limit_requests": ("limit_requests", "x-ratelimit-limit-requests"),
    "remaining_requests": ("remaining_requests", "x-ratelimit-remaining-requests"),
    **{role: (role,) for role in ("model", "endpoint", "outcome", "lane", *WHOLES[3:])},
}
# No answer takes longer: the longest time-out in use is 600 s. Above it, some other unit was read.
LATENCY_MAX_S = 900.0
# Nor so many times the median of its log, below which seconds among milliseconds lie.
LATENCY_RATIO_MAX = 500.0
# A column of milliseconds with seconds among them: so far below the others per token, and as many rows that grow with
# the answers' lengths. (What a cache answered is as quick, whatever its length.)
APART_RATIO = 100.0
APART_ROWS = 5
APART_CORRELATION = 0.5


def roles_of(names: list[str], chosen: Mapping[str, str], source: str) -> dict[str, tuple[str, str]]:
    """Role -> (column, unit of time or ""): what the user chose, then the names that are known."""
    found = ", ".join(quoted(name, 30) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    roles: dict[str, tuple[str, str]] = {}
    for role, wanted in chosen.items():
        if role not in ROLES:
            close = difflib.get_close_matches(role, ROLES, 1)
            meant = f"did you mean {close[0]}?" if close else f"use {', '.join(ROLES)}"
            raise BadSetting(f"--columns: there is no {quoted(role)}: {meant}", "--columns")
        name, colon, unit = wanted.rpartition(":")
        if not (colon and name and unit in UNITS and role in DURATIONS + MOMENTS):
            name, unit = wanted, ""
        if name not in names:
            raise BadInput(f"there is no column {quoted(name)} for {role}: found {found}", source, 1)
        roles[role] = name, unit
    taken = {name for name, _ in roles.values()}
    for role, known in KNOWN.items():
        there = next((name for name in known if name in names and name not in taken), None)
        if role not in roles and there is not None:
            roles[role] = there, ""
            taken.add(there)
    missing = [role for role in ("prompt", "output") if role not in roles]
    if missing:
        remedy = ",".join(f"{role}=NAME" for role in missing)
        what = " and ".join(missing)
        raise BadInput(f"no column of {what} tokens: found {found}; name it: --columns {remedy}", source, 1)
    return {role: (name, unit or _named_unit(role, name)) for role, (name, unit) in roles.items()}


def _named_unit(role: str, name: str) -> str:
    """The unit that a column's name states; durations are seconds otherwise, moments what their values show."""
    ending = re.search(r"[-_](ms|us|ns|s)$", name)
    return ending[1] if ending and role in DURATIONS + MOMENTS else "s" if role in DURATIONS else ""


class LogRows:
    """Rows checked one by one; `columns()` are what `observed_of` takes. `source`: the name in complaints."""

    def __init__(self, roles: Mapping[str, tuple[str, str]], source: str) -> None:
        self.roles = dict(roles)
        self.source = source
        self.lines: list[int] = []
        self.units: dict[str, str] = {}
        self.values: dict[str, list[Any]] = {role: [] for role in self.roles}
        self.kinds: list[int] = []

    def add(self, row: Mapping[str, Any], line: int, shown: Mapping[str, str] | None = None) -> None:
        """Takes one row; BadInput names the line, the column and the value.

        `shown`: column -> what the file calls it, where the row was put together from something else.
        """
        shown = shown or {}
        taken: dict[str, Any] = {}
        for role, (name, unit) in self.roles.items():
            value = row.get(name)
            if is_absent(role, value) or (role not in TEXTS and number_of(value) == -1.0):
                taken[role] = "" if role in ("id", "model", "outcome", "status", "lane") else -1
                continue
            try:
                taken[role] = self._checked(role, unit, value)
            except ValueError as error:
                column = quoted(shown.get(name, name))
                raise BadInput(f"column {column}: {quoted(value)} {error}", self.source, line) from None
        kind = _kind_of(taken)
        if kind == ANSWERED and (taken["prompt"] < 0 or taken["output"] < 0):
            name = self.roles["prompt" if taken["prompt"] < 0 else "output"][0]
            text = f"column {quoted(shown.get(name, name))} has no value here"
            if "status" not in self.roles and "outcome" not in self.roles:
                text += "; where requests failed, name the column that says so: --columns status=NAME"
            raise BadInput(text, self.source, line)
        self._check_order(taken, line)
        for role, value in taken.items():
            self.values[role].append(value)
        self.kinds.append(kind)
        self.lines.append(line)

    def _checked(self, role: str, unit: str, value: object) -> Any:
        if role in WHOLES:
            return whole_of(role, value)
        if role == "endpoint":
            return text_of(role, value)
        if role == "status":
            return _status_of(value)
        if role in TEXTS:
            return str(value)
        if role in MOMENTS:
            return self._moment(role, unit, value)
        number = number_of(value)
        if number is None:
            raise ValueError("is not a number: write it in the column's unit, without one of its own")
        if number < 0.0:
            raise ValueError("is negative" if role in COUNTS else "is a negative time")
        return number * UNITS[unit] if role in DURATIONS else number

    def _moment(self, role: str, unit: str, value: object) -> float:
        is_date, number = moment_of(value)
        if number < 0.0:
            raise ValueError("is a negative time")
        seen = date_seen(value) if is_date else unit or unit_seen(number)
        first = self.units.setdefault(role, seen)
        if seen != first:
            raise ValueError(f"is in {unit_words(seen)} among values in {unit_words(first)}: one unit per column")
        return number / 1e6 if is_date else number * UNITS[seen]

    def _check_order(self, taken: Mapping[str, Any], line: int) -> None:
        begun = taken.get("launched", -1)
        ended = taken.get("finished", -1)
        if begun < 0 or ended < 0:
            return
        name, first = self.roles["finished"][0], self.roles["launched"][0]
        if ended < begun:
            text = f"column {quoted(name)}: it ended {begun - ended:,.6g} s before it began (column {quoted(first)})"
            raise BadInput(text, self.source, line)
        took = taken.get("latency", -1)
        measured = ended - begun
        if took > 0 and measured > 0 and not 0.02 < took / measured < 50.0:
            column = self.roles["latency"][0]
            text = (
                f"column {quoted(column)}: {took:,.6g} s, but {quoted(first)} to {quoted(name)} is {measured:,.6g} s: "
                f"mixed units? name the unit: --columns latency={column}:ms"
            )
            raise BadInput(text, self.source, line)

    def columns(self) -> dict[str, list[Any]]:
        """The columns by role, `kind` among them. BadInput for a duration that no request can have taken."""
        if not self.lines:
            raise BadInput("no rows in it", self.source)
        for role in ("latency", "first_token"):
            if role in self.values:
                self._check_durations(role)
        if "latency" in self.values:
            self._check_seconds_among_ms()
        found = {role: values for role, values in self.values.items() if role not in ("outcome", "status", "lane")}
        if "outcome" in self.values or "status" in self.values:
            found["kind"] = self.kinds
        if "lane" in self.values:
            found["finalize"] = [float(lane == "finalize") for lane in self.values["lane"]]
        return found

    def _check_durations(self, role: str) -> None:
        values = np.array(self.values[role], np.float64)
        known = values[values > 0.0]
        if not len(known):
            return
        name = self.roles[role][0]
        most = min(LATENCY_MAX_S, LATENCY_RATIO_MAX * float(np.median(known)))
        worst = int(np.argmax(values))
        if values[worst] > most:
            text = (
                f"column {quoted(name)}: {values[worst]:,.6g} s, where the median is {np.median(known):,.6g} s: mixed "
                f"units, or not in seconds? name the unit: --columns {role}={name}:ms"
            )
            raise BadInput(text, self.source, self.lines[worst])

    def _check_seconds_among_ms(self) -> None:
        output, took_s = (np.array(self.values[role], np.float64) for role in ("output", "latency"))
        answered = (np.array(self.kinds) == ANSWERED) & (output > 0.0) & (took_s > 0.0)
        if answered.sum() <= APART_ROWS:
            return
        per_token_s = took_s / np.maximum(output, 1.0)
        median_s = float(np.median(per_token_s[answered]))
        apart = np.flatnonzero(answered & (per_token_s < median_s / APART_RATIO))
        if len(apart) < APART_ROWS or not output[apart].std():
            return
        grows = float(np.corrcoef(np.log(output[apart]), np.log(took_s[apart]))[0, 1])
        if grows > APART_CORRELATION:
            name, first = self.roles["latency"][0], int(apart[0])
            text = (
                f"column {quoted(name)}: {took_s[first]:,.6g} s for {output[first]:,.0f} tokens, where others take "
                f"{median_s / per_token_s[first]:,.0f} times as long: mixed units? {len(apart):,} of "
                f"{len(output):,} rows are like this one: bring them all to one unit"
            )
            raise BadInput(text, self.source, self.lines[first])


# Words that logs have for a status, and the code that says the same; 0: neither answered nor known why not.
_STATUSES = {
    **dict.fromkeys(("ok", "success", "succeeded", "successful", "completed", "done", "true", "unset"), 200),
    **dict.fromkeys(("throttled", "rate_limited", "rate_limit_exceeded", "too_many_requests", "ratelimiterror"), 429),
    **dict.fromkeys(("failure", "failed", "error", "false", "timeout", "timed_out", "cancelled", "canceled"), 0),
}


def _status_of(value: object) -> int:
    """A status as an HTTP code, 0 for a failure without one: "200", 429.0, "429 Too Many Requests", "ok", "failed"."""
    text = str(value).strip().lower()
    number = number_of(text.split(" ")[0])
    code = _STATUSES.get(re.sub(r"[\s-]+", "_", text)) if number is None else int(number)
    if code is None or (code and not 100 <= code < 600):
        raise ValueError("is no status: an HTTP code, or a word like ok, failed or throttled")
    return code


def _kind_of(taken: Mapping[str, Any]) -> int:
    """What became of a row: by our own word, else by the status; one that says neither was answered."""
    outcome, code = taken.get("outcome", ""), taken.get("status", "")
    if outcome:
        return refused_by(outcome)
    if code == "":
        return ANSWERED
    return ANSWERED if 200 <= code < 300 else REFUSED if code == 429 else SERVER_FAULT if code >= 500 else OTHER


# ---------------------------------------------------------------- files


def of_log(source: Source, columns: Mapping[str, str]) -> Observed:
    """The attempts of a CSV or JSONL log. BadInput and BadSetting, in one line, for the first thing that is wrong."""
    rows: LogRows | None = None
    lines: Iterable[tuple[int, Mapping[str, Any]]]
    if source.kind() == TRACE_JSONL:
        lines = json_rows(source)
    else:
        names, separator, header = header_of(source)
        rows = LogRows(roles_of(names, columns, source.name), source.name)
        lines = csv_rows(source, names, separator, header)
    for line, row in lines:
        if rows is None:
            rows = LogRows(roles_of(list(row), columns, source.name), source.name)
        rows.add(row, line)
    if rows is None:
        raise BadInput("no rows in it", source.name)
    return observed_of(source.label, rows.columns(), source=source.name)


def of_results(source: Source) -> Observed:
    """The answers in a file of batch output, OpenAI's or ours: token counts, and nothing of time."""
    assert source.kind() in (BATCH, TRACE_JSONL)
    rows: dict[str, list[Any]] = {"id": [], "prompt": [], "output": [], "kind": []}
    try:
        with source.stream() as stream:
            for result in read_results(stream, source.name):
                answered = result.output_tokens >= 0 and (result.status == 0 or 200 <= result.status < 300)
                rows["id"].append(result.custom_id)
                rows["prompt"].append(result.prompt_tokens)
                rows["output"].append(result.output_tokens)
                rows["kind"].append(ANSWERED if answered else OTHER)
    except BadInput as error:
        raise explained(source, error) from None
    notes = (f"{source.label}: batch output states no times and no headers: only lengths can be learnt from it",)
    return observed_of(source.label, rows, source=source.name, notes=notes)

"""The columns of a trace: which of them plays which role, and the checks of one value.

What lives here: roles, the public formats, the user's mapping, and value -> number or text. What must not: reading rows
(`traces`). A check raises ValueError with the end of a sentence ("is not a whole number ..."); whoever read the value
knows its file, line and column, and says so.

The columns of Azure's, vidur's and Mooncake's public traces are recognised by name, and so are those of our own rows;
a mapping {"prompt": "NAME", ...} names any other, and a time may carry its unit: {"arrival": "NAME:ms"}.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.requests import endpoint_of
from sim.model.workload import TOKENS_MAX

# ---------------------------------------------------------------- which column is what

WHOLES = ("prompt", "output", "max_tokens", "chars", "role_chars", "messages", "images", "tools", "n")
TEXTS = ("id", "model", "endpoint")
ROLES = (*WHOLES, "arrival", "latency", *TEXTS)
NEEDED = ("prompt", "output", "chars", "arrival", "id")
LOWEST = {"max_tokens": -1, "n": 1}
DEFAULTS: dict[str, Any] = {
    "max_tokens": -1,
    "latency": -1,
    "messages": 1,
    "role_chars": 4,
    "n": 1,
    "model": "",
    "endpoint": "/v1/chat/completions",
}
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
# From which number on a moment without a unit is since 1970 in that one: 1e11 s would be in the year 5138.
_SINCE_1970 = (("ns", 1e17), ("us", 1e14), ("ms", 1e11))

# What `readers.save_rows` writes: times in seconds, from 0.
OUR_COLUMNS = {
    "prompt": "prompt_tokens",
    "output": "output_tokens",
    "arrival": "arrival_s",
    "latency": "latency_s",
    "id": "custom_id",
    **{role: role for role in ("max_tokens", "model", "endpoint", *WHOLES[3:])},
}
FORMATS: dict[str, dict[str, str]] = {
    "Azure": {"prompt": "ContextTokens", "output": "GeneratedTokens", "arrival": "TIMESTAMP"},
    "vidur": {"prompt": "num_prefill_tokens", "output": "num_decode_tokens", "arrival": "arrived_at:s"},
    "Mooncake": {"prompt": "input_length", "output": "output_length", "arrival": "timestamp:ms"},
    "Paceline": OUR_COLUMNS,
}


class Column(NamedTuple):
    """Where a role stands in a file: the column's name and, for times, its unit ("" = to be seen from the values)."""

    name: str
    unit: str


def parse_columns(text: str) -> dict[str, str]:
    """The mapping that `--columns prompt=NAME,output=NAME,...` states: role -> column name. BadSetting if malformed."""
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


def resolved(names: list[str], chosen: Mapping[str, str], source: str, drawn: bool = False) -> dict[str, Column]:
    """Role -> column, from the names found: what the user chose, then the first public format that fits.

    `drawn`: answers come from a model, so that no column of them is needed. BadInput names what was found.
    """
    found = ", ".join(quoted(name, 30) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    roles: dict[str, Column] = {}
    for role, wanted in chosen.items():
        if role not in ROLES:
            close = difflib.get_close_matches(role, ROLES, 1)
            meant = f"did you mean {close[0]}?" if close else f"use {', '.join(ROLES)}"
            raise BadSetting(f"--columns: there is no {quoted(role)}: {meant}", "--columns")
        name, unit = _split_unit(role, wanted)
        if name not in names:
            raise BadInput(f"there is no column {quoted(name)} for {role}: found {found}", source)
        roles[role] = Column(name, unit)
    for wanted_by_role in FORMATS.values():
        if wanted_by_role["prompt"] in names or ("prompt" in roles and wanted_by_role["output"] in names):
            taken = {column.name for column in roles.values()}
            for role, wanted in wanted_by_role.items():
                name, unit = _split_unit(role, wanted)
                if name in names and name not in taken:
                    roles.setdefault(role, Column(name, unit))
            break
    missing = [role for role in ("prompt", "output") if role not in roles and not (drawn and role == "output")]
    if missing:
        remedy = ",".join(f"{role}=NAME" for role in missing)
        what = " and ".join(missing)
        raise BadInput(f"no column of {what} tokens: found {found}; name it: --columns {remedy}", source)
    return roles


def _split_unit(role: str, wanted: str) -> tuple[str, str]:
    name, colon, unit = wanted.rpartition(":")
    if colon and name and unit in UNITS and role in ("arrival", "latency"):
        return name, unit
    return wanted, "s" if role == "latency" or wanted == OUR_COLUMNS["arrival"] else ""


# ---------------------------------------------------------------- one value

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
ABSENT = ("", "null", "nan", "none", "na")
SECONDS_MAX = 1e8


def is_absent(role: str, value: object) -> bool:
    """Whether a row has no value there. A custom_id may be any text, "null" included."""
    if role == "id" and isinstance(value, str):
        return not value
    return value is None or (isinstance(value, str) and value.strip().lower() in ABSENT) or value != value


def number_of(value: object) -> float | None:
    """The number that a value of a row is, None where it is none."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if len(text) <= 400 and _NUMBER.fullmatch(text) else None
    if type(value) is int:
        return float(value) if abs(value) < 10**300 else math.inf
    return value if isinstance(value, float) else None


def whole_of(role: str, value: object) -> int:
    """A count of tokens, characters or the like."""
    low = LOWEST.get(role, 0)
    number = number_of(value)
    if number is None or not low <= number <= TOKENS_MAX or number != int(number):
        raise ValueError(f"is not a whole number from {low} to {TOKENS_MAX:,}")
    return int(number)


def seconds_of(unit: str, value: object) -> float:
    """A latency in seconds; -1, in any unit, stands for none."""
    number = number_of(value)
    if number == -1.0:
        return -1.0
    if number is None or not 0.0 <= number * UNITS[unit] <= SECONDS_MAX:
        raise ValueError("is not a time from 0 up")
    return number * UNITS[unit]


def moment_of(value: object) -> tuple[bool, float]:
    """(whether it is a date, its microseconds since 1970 or its plain number)."""
    number = number_of(value)
    if number is not None and abs(number) < 1e20:
        return False, number
    try:
        if not isinstance(value, str):
            raise ValueError
        date = datetime.fromisoformat(value.strip())
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return True, float((date - _EPOCH) // _MICROSECOND)
    except (ValueError, OverflowError):
        raise ValueError("is neither a number nor a date like 2026-11-23 18:17:03.97") from None


def unit_seen(number: float) -> str:
    """The unit of a moment that states none: since 1970 in ms, us or ns by its size, else seconds."""
    return next((unit for unit, least in _SINCE_1970 if number >= least), "s")


def date_seen(value: object) -> str:
    """The unit of a moment that is a date: whether it states its time zone, which a column does for all or for none."""
    return "zoned date" if datetime.fromisoformat(str(value).strip()).tzinfo else "date"


def unit_words(unit: str) -> str:
    """A unit of moments in a sentence; dates are one as well, and those that state their time zone another."""
    dates = {"date": "dates without a time zone", "zoned date": "dates with a time zone"}
    return dates.get(unit) or ("seconds" if unit == "s" else f"{unit} since 1970")


def text_of(role: str, value: object) -> Any:
    """A name as text, or the code of an endpoint's url."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("is not text")
    text = str(value)
    if role != "endpoint":
        return text
    code = endpoint_of(text.strip())
    if code < 0:
        raise ValueError("is no endpoint that is known: write for example /v1/chat/completions")
    return code


# ---------------------------------------------------------------- arrivals


def arrival_seconds(numbers: NDArray[np.float64], dates: bool, unit: str, ours: bool) -> NDArray[np.float64]:
    """Arrivals as seconds from the first one. Numbers without a unit: seconds, or since 1970 in s, ms, us or ns.

    `ours`: the column is seconds since the run began, and stays as it is.
    """
    if ours:
        return numbers
    if dates:
        return (numbers - numbers.min()) / 1e6
    per_second = round(1.0 / UNITS[unit or unit_seen(float(numbers.max()))])
    return (numbers - numbers.min()) / per_second

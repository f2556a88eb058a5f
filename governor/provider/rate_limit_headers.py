"""Reads what a provider states in headers and texts: waits, dates, limits and the figures of a refusal.

Nothing here raises; unreadable values count as absent. Header names and the places of waits are the profile's. Formats
and wordings: docs/explanation/provider.md#headers and #errors.

Two formulas describe the providers' continuous buckets (#buckets). This module is their only source, for the synthetic
provider that prints their values and for the tests that compare them with recordings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache
from typing import Any, NamedTuple

from governor.law import DAY_S, MINUTE_S
from governor.model.requests import Limit
from governor.profiles.loader import GENERIC, read_profile
from governor.profiles.schema import CountHeaders, Profile, TimeFormat, WaitPlace

WINDOW_S = {"TPM": MINUTE_S, "RPM": MINUTE_S, "TPD": DAY_S, "RPD": DAY_S}

# No meaningful header or figure is longer; a message's figures are in its first lines.
HEADER_CHARS_MAX = 64
MESSAGE_CHARS_MAX = 1_000

# ---------------------------------------------------------------- the bucket's two formulas


def refill_wait_s(limit: float, used: float, requested: float, window_s: float) -> float:
    """Return the wait that a 429 prints: (used + requested - limit) / limit x window, rounded down to ms; 0 if it fits.

    Seconds, `limit` > 0 in units per window. The order of the operations is the provider's: of the orders tried, only
    this one prints 31 of 32 recorded waits to the ms; multiplying first gives 30 (3.859 s for a recorded 3.858 s). A
    client that sleeps exactly this long is up to 1 ms early: docs/explanation/provider.md#buckets.
    """
    return _floored(used + requested - limit, limit, window_s)


def refill_reset_s(limit: float, remaining: float, window_s: float) -> float:
    """Return the reset that headers print: (limit - remaining) / limit x window, rounded down to ms.

    Seconds until the bucket is full again, `limit` > 0. Providers compute it from the bucket's fractional content, of
    which `remaining` is the floor: a recorded reset is this value, or less by up to one unit's refill:
    docs/explanation/provider.md#buckets.
    """
    return _floored(limit - remaining, limit, window_s)


def _floored(missing: float, limit: float, window_s: float) -> float:
    if missing <= 0.0:
        return 0.0
    return math.floor(missing / limit * (window_s * 1000.0)) / 1000.0


# ---------------------------------------------------------------- durations

# Divide instead of multiplying by 0.001: 118 ms is then the same number wherever it comes from.
_LARGE_S = {"s": 1, "m": 60, "h": 3600}
_SMALL_PER_S = {"ns": 10**9, "us": 10**6, "µs": 10**6, "μs": 10**6, "ms": 1000}
# The quantifiers are possessive, so that a thousand digits without a unit fail at once.
_NUMBER = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_GO_PART = re.compile(rf"({_NUMBER})(ns|us|µs|μs|ms|s|m|h)")
_GO = re.compile(rf"\+?(?:{_GO_PART.pattern})+")


def duration_s(text: str) -> float:
    """Return the seconds of a Go duration ("6m0s", "120ms", "17.399999999s", "0"); -1 if invalid or negative."""
    text = text.strip()
    if text in ("0", "+0"):
        return 0.0
    if len(text) > HEADER_CHARS_MAX or not _GO.fullmatch(text):
        return -1.0
    parts = _GO_PART.findall(text)
    return sum(float(number) * _LARGE_S.get(unit, 1) / _SMALL_PER_S.get(unit, 1) for number, unit in parts)


def duration_text(seconds: float) -> str:
    """Format `seconds`, 0 or more, as Go does, to the nearest ms: "0s", "120ms", "1m13.588s", "114h18m0s"."""
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
    rf"\b(?:(?:try again|retry|resets?)\s+(?:in|after)|wait(?: for)?)\s+"
    rf"({_WAIT_PART.pattern}(?:(?:\s|,|and)*{_WAIT_PART.pattern})*)",
    re.IGNORECASE,
)


def stated_wait_s(message: str) -> float:
    """Return the wait in an error's text, seconds; -1 = none.

    Examples: "try again in 7m12s", "Please wait 60 seconds before retrying".
    """
    found = _WAIT.search(message[:MESSAGE_CHARS_MAX])
    if not found:
        return -1.0
    total = 0.0
    for number, unit in _WAIT_PART.findall(found[1]):
        unit = unit.lower()
        total += float(number.replace(",", "")) * _WORD_S["ms" if unit.startswith(("ms", "milli")) else unit[0]]
    return total


def retry_after_s(
    headers: Mapping[Any, Any] | None, message: str = "", now_epoch: float = -1.0, profile: Profile | None = None
) -> float:
    """Return how long the provider asks to wait, in seconds; -1 = not stated.

    The places are the profile's, then the generic ones: `retry-after-ms`, `retry-after` (seconds, a duration, or a date
    if the epoch `now_epoch` is given), the error's text, ... Zero, negative and non-numeric waits count as not stated,
    so that a backoff applies, as in the official SDK.
    """
    return wait_in(fields_of(headers), message, now_epoch, profile or read_profile(GENERIC))


def wait_in(fields: Mapping[str, str], message: str, now_epoch: float, profile: Profile) -> float:
    """Return the same as `retry_after_s`, from `fields_of`."""
    for place in _wait_places(profile):
        if place.message:
            wait_s = stated_wait_s(message)
        else:
            text = fields.get(place.header or f"{_FIELD}{str(place.field).lower()}", "")
            wait_s = time_in(text, place.format, now_epoch) if text else -1.0
        if 0.0 < wait_s < math.inf:
            return wait_s
    return -1.0


@lru_cache(64)
def _wait_places(profile: Profile) -> tuple[WaitPlace, ...]:
    return tuple(dict.fromkeys((*profile.retry_after, *read_profile(GENERIC).retry_after)))


def time_in(text: str, form: TimeFormat, now_epoch: float) -> float:
    """Return the seconds from now that a time in this format states; -1 if it is not one, or lies in the past.

    `now_epoch`: seconds since 1970, needed for instants; -1 = unknown.
    """
    if form == "seconds":
        return _number(text)
    if form == "milliseconds":
        return _number(text) / 1000.0
    if form == "duration":
        return duration_s(text)
    if form == "instant":
        return _until(text, now_epoch)
    if form == "epoch":
        moment = _moment(text)
        return -1.0 if moment is None or now_epoch < 0.0 else max(-1.0, moment - now_epoch)
    found = (time_in(text, each, now_epoch) for each in _FORMS)
    return next((seconds for seconds in found if seconds > 0.0), -1.0)


_FORMS: tuple[TimeFormat, ...] = ("seconds", "duration", "instant")


def _until(date: str, now_epoch: float) -> float:
    """Return the seconds from `now_epoch` until an instant; -1 if `date` is not one or lies in the past."""
    if now_epoch < 0.0 or not date:
        return -1.0
    try:
        moment = datetime.fromisoformat(date) if date[:4].isdecimal() else parsedate_to_datetime(date)
    except (ValueError, TypeError, IndexError, OverflowError):
        return -1.0
    return max(-1.0, _epoch(moment) - now_epoch)


def _epoch(moment: datetime) -> float:
    """Return the seconds since 1970; a date without a zone must not be read in the machine's zone."""
    try:
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return -1.0


# "You will regain access on 2026-04-01 at 00:00 UTC", "Limit resets at: 2026-11-30 14:21:04 UTC".
_DATE = re.compile(
    r"\b(?:access|resets?|until|available|again|renews?)\b[^.;]{0,40}?"
    r"\b(\d{4}-\d\d-\d\d)(?:(?:T|,? at |,? )(\d\d:\d\d(?::\d\d)?)(?:\.\d+)? ?(Z|UTC|GMT|[+-]\d\d:?\d\d)?)?",
    re.IGNORECASE,
)


def access_at(fields: Mapping[str, str], message: str) -> float | None:
    """Return when a refusal says that access returns, seconds since 1970; None if it names no moment.

    The moment is a date in the text (without a zone: UTC), or an epoch in the fields, possibly in milliseconds
    (OpenRouter). A header's epoch counts only if the header for the remaining amount is zero or negative.
    """
    if found := _DATE.search(message[:MESSAGE_CHARS_MAX]):
        zone = (found[3] or "UTC").upper().replace("UTC", "+00:00").replace("GMT", "+00:00").replace("Z", "+00:00")
        try:
            return _epoch(datetime.fromisoformat(f"{found[1]}T{found[2] or '00:00'}{zone}"))
        except ValueError:
            return None
    nothing_left = fields.get("x-ratelimit-remaining", "").startswith(("0", "-"))
    stated = fields.get(f"{_FIELD}resets_at", "") or fields.get(f"{_FIELD}reset_at", "")
    return _moment(stated) or _moment(fields.get("x-ratelimit-reset", "") if nothing_left else "")


def _moment(text: str) -> float | None:
    """Return an epoch in seconds, given seconds or milliseconds; None for other numbers, such as seconds to wait."""
    value = _number(text)
    if value >= 1e12:
        value /= 1000.0
    return value if 1e9 <= value < 1e11 else None


# ---------------------------------------------------------------- limits


@dataclass(frozen=True, slots=True)
class QuotedLimit:
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


def quoted_numbers(message: str) -> QuotedLimit:
    """Return the figures that a 429 quotes: "... (TPM): Limit 30000, Used 29937, Requested 385. ..."."""
    message = message[:MESSAGE_CHARS_MAX]
    named = _DIMENSION.search(message)
    dimension = ""
    if named:
        dimension = (named[1] or f"{named[2][0]}P{named[3][0]}").upper()
    matches = {name: pattern.search(message) for name, pattern in _FIGURES.items()}
    return QuotedLimit(
        dimension, **{name: float(match[1].replace(",", "")) for name, match in matches.items() if match}
    )


def dimension_of(limit: float, remaining: float, reset_s: float, minute: str, day: str) -> str:
    """Return `minute` or `day`, whichever a header triple describes: providers show the tightest limit, not its window.

    A full bucket takes one window to refill: window = reset x limit / used. `used` = limit - remaining is rounded up by
    less than one, so for a day the result lies between 86,400 x (1 - 1/used) and 86,400 s. Everything else is a minute,
    including a counter emptied once a minute, whose reset says nothing about the use, and undecidable cases: no reset
    (-1), nothing used.
    """
    if limit <= remaining or reset_s < 0.0:
        return minute
    used = limit - remaining
    window_s = reset_s * limit / used
    least_s = DAY_S * max(0.5, 1.0 - 1.0 / used)
    return day if 0.99 * least_s <= window_s <= 1.01 * DAY_S else minute


# A gateway passes its provider's headers on under this prefix (LiteLLM).
_UPSTREAM = "llm_provider-"
# A limit that resets later than this is a daily one, unless its window is stated.
_HOUR_S = 3_600.0
_NAMED_S = {"second": 1.0, "minute": MINUTE_S, "hour": _HOUR_S, "day": DAY_S}
# A window in the IETF's drafts, "12;w=10" or '"name";q=12;w=10': in RateLimit-Policy, or in RateLimit-Limit itself.
_POLICY = re.compile(r'(?:^|,)\s*+(?:"[^"]*+";\s*+q=)?([0-9]++);\s*+w=([0-9]++)')


def limits_of(
    headers: Mapping[Any, Any] | None, now_epoch: float = -1.0, profile: Profile | None = None
) -> tuple[Limit, ...]:
    """Return the limits that headers state, at most one per dimension: the smallest if several scopes are stated.

    A negative `remaining` is an overshoot, and stays negative. Omitted are values that are not numbers, a limit of zero
    or less (Azure has sent -1, -1, 0), remaining above the limit, and a remaining without its limit (Azure, 2024). An
    integer reset has no known unit unless the profile states one, and is not used.
    """
    return limits_in(fields_of(headers), now_epoch, profile or read_profile(GENERIC))


def limits_in(
    fields: Mapping[str, str], now_epoch: float, profile: Profile, *, is_refusal: bool = False
) -> tuple[Limit, ...]:
    """Return what `limits_of` does, from `fields_of`. For a refusal, counts that do not name their unit are omitted.

    Those are the counts of the limit that refused, which may be the tokens limit: slowapi states 30000 for a weighted
    limit while its answers state 100 requests. Read as requests, that silenced a pool for five hours.
    """
    own, counts = _own_headers(profile), dict[HeaderCount, dict[str, str]]()
    policy = fields.get("ratelimit-policy", "") or fields.get("x-ratelimit-policy", "")
    for name, text in fields.items():
        named = own.get(name) or (_named(name) if "limit" in name else None)
        if named is not None:
            counts.setdefault(named[0], {})[named[1]] = text
    found: dict[str, Limit] = {}
    for counted, parts in counts.items():
        if is_refusal and not counted.what:
            continue
        limit = _limit(counted, parts if counted.what else {"policy": policy, **parts}, now_epoch)
        if limit is not None and (limit.dimension not in found or limit.limit < found[limit.dimension].limit):
            found[limit.dimension] = limit
    return tuple(found.values())


class HeaderCount(NamedTuple):
    """What a triple of headers counts. `minute`, `day`: names of the dimensions that it may describe.

    `what`: tokens or requests, "" if the name does not say; `window`: as named; `scope`: tells triples apart.
    """

    what: str
    minute: str
    day: str
    form: TimeFormat = "auto"
    window: str = ""
    scope: tuple[str, ...] = ()


@lru_cache(64)
def _own_headers(profile: Profile) -> dict[str, tuple[HeaderCount, str]]:
    """Return, by header, what the profile says that it counts, and which part of it."""
    sharing: dict[CountHeaders, list[tuple[float, str, str]]] = {}
    for name, each in profile.dimensions.items():
        if each.headers is not None:
            sharing.setdefault(each.headers, []).append((each.length_s, name, each.unit))
    found: dict[str, tuple[HeaderCount, str]] = {}
    for headers, dimensions in sharing.items():
        (_, minute, what), (_, day, _) = min(dimensions), max(dimensions)
        counted = HeaderCount(what, minute, day, headers.reset_format)
        parts = {"limit": headers.limit, "remaining": headers.remaining, "reset": headers.reset}
        found |= {header: (counted, part) for part, header in parts.items() if header is not None}
    return found


@lru_cache(1_024)
def _named(name: str) -> tuple[HeaderCount, str] | None:
    """Return what a header that no profile names counts, and which part of it; None for any other header."""
    own = name.removeprefix(_UPSTREAM).replace("x-rate-limit-", "x-ratelimit-")
    found = next((match for match in (pattern.fullmatch(own) for pattern in _patterns()) if match), None)
    if found is None:
        return None
    words = found.groupdict()
    what = words.get("what") or ("tokens" if own.startswith("x-ai-") else "")
    upstream = _UPSTREAM if name.startswith(_UPSTREAM) else ""
    minute, day = ("TPM", "TPD") if "token" in what else ("RPM", "RPD")
    scope = (words.get("scope") or "", upstream, own[:2])
    return HeaderCount(what, minute, day, "auto", words.get("window") or "", scope), words["part"]


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern) for pattern in read_profile(GENERIC).header_patterns)


def _limit(counted: HeaderCount, parts: Mapping[str, str], now_epoch: float) -> Limit | None:
    """Return one limit with its dimension; None unless limit and remaining are both plausible."""
    stated = parts.get("limit", "")
    declared = f"{parts.get('policy', '')},{stated}"
    windows = {quota: float(s) for quota, s in _POLICY.findall(declared[:MESSAGE_CHARS_MAX])} if ";" in declared else {}
    if ";" in stated:
        stated = next(iter(windows), "")
    limit, remaining = _number(stated), _signed(parts.get("remaining", ""))
    if not (limit > 0.0 and remaining <= limit):
        return None
    minute, day, reset = counted.minute, counted.day, parts.get("reset", "")
    if minute == day:
        return Limit(minute, limit, remaining)
    if counted.form != "auto":
        reset_s = time_in(reset, counted.form, now_epoch)
        return Limit(dimension_of(limit, remaining, reset_s, minute, day), limit, remaining)
    window_s = _NAMED_S.get(counted.window) or windows.get(stated)
    if window_s is not None:
        return _per(minute, day, limit, limit - remaining, window_s)
    resets_at = _moment(reset)
    if resets_at is None or now_epoch < 0.0:
        return Limit(dimension_of(limit, remaining, duration_s(reset), minute, day), limit, remaining)
    left_s = resets_at - now_epoch
    if not counted.what and left_s <= MINUTE_S / 2.0:
        return None  # the window may be a minute, or as short as slowapi's "12 per 10 second"
    return Limit(day if left_s > _HOUR_S else minute, limit, remaining)


def _per(minute: str, day: str, limit: float, used: float, window_s: float) -> Limit | None:
    """Return a limit per `window_s` seconds as one per minute, or per day if the window is longer than a minute.

    None for a window of nothing, or of more than a year.
    """
    if not 0.0 < window_s <= 366.0 * DAY_S:
        return None
    dimension, length_s = (minute, MINUTE_S) if window_s <= MINUTE_S else (day, DAY_S)
    granted = limit * (length_s / window_s)
    return Limit(dimension, granted, granted - used) if granted < math.inf else None


def processing_s(fields: Mapping[str, str]) -> float:
    """Return the provider's own time for a request, from admission to answer, seconds; -1 if none is stated."""
    milliseconds = _number(fields.get("openai-processing-ms", ""))
    return milliseconds / 1_000.0 if milliseconds >= 0.0 else -1.0


# Marks the fields of an error's body among the headers, whose names hold no blank.
_FIELD = "field "


def fields_of(headers: Mapping[Any, Any] | None, *holders: Mapping[str, Any]) -> dict[str, str]:
    """Return headers as text by lower-case name, plus the plain fields of `holders`, the parts of an error body."""
    items = headers.items() if isinstance(headers, Mapping) else ()
    fields = {_as_text(name).lower(): _as_text(value).strip() for name, value in items}
    for name, text in _hints(holders):
        fields.setdefault(name, text)
    return fields


def _hints(holders: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[str, str]]:
    for holder in holders:
        for key, value in holder.items():
            if isinstance(value, str | int | float):
                yield f"{_FIELD}{str(key).lower()}", str(value)
            elif key == "headers" and isinstance(value, Mapping):  # OpenRouter, in the error's metadata
                yield from fields_of(value).items()


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _number(text: str) -> float:
    """Return a header's number; -1 if it is not a number, not finite or negative."""
    value = _signed(text)
    return value if 0.0 <= value < math.inf else -1.0


def _signed(text: str) -> float:
    """Return a header's number, which may be negative; inf if it is not a number or not finite."""
    if not text:  # by far the most frequent: no such header
        return math.inf
    try:
        value = float(text) if len(text) <= HEADER_CHARS_MAX else math.inf
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf

"""Parse durations, times of day and counts as people write them, and name settings in words. Figures: see `phrases`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from governor.model.errors import BadSetting, quoted
from governor.model.phrases import WAITED_FOR as WAITED_FOR
from governor.model.phrases import duration as duration
from governor.model.phrases import limit_name, whole_number
from governor.model.phrases import percent as percent
from governor.model.phrases import plural as plural
from governor.model.policy import KNOB_BY_ENV, Policy

_UNITS_S = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3_600.0, "d": 86_400.0}

_ZONE = r"[+-]\d\d:?\d\d|[A-Za-z][\w/+-]*"


def seconds_of(text: str, option: str) -> float:
    """Return the seconds of a duration as people write it: 6h, 90m, 1h30m, 45s, 2d, 1.5h.

    Raise BadSetting, naming `option`, for any other text.
    """
    word = re.sub(r"[\s_]+", "", text.lower())
    parts = re.findall(r"(\d+\.?\d*|\.\d+)(sec|min|[smhd])", word, re.ASCII)
    if parts and "".join(number + unit for number, unit in parts) == word:
        seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
        if 0.0 < seconds <= 1e9:
            return seconds
    raise BadSetting(f"{option} {quoted(text)} is not a duration: write 6h, 90m, 1h30m or 45s")


def until_s(text: str, option: str, now: datetime | None = None) -> float:
    """Return seconds from `now` (default: the clock) to a wanted end: a duration, or the next such time of day.

    A time of day is local, or in the zone that follows it: 06:00Z, 06:00+02:00, 06:00 Europe/Berlin.
    """
    clock = re.fullmatch(rf"([01]?\d|2[0-3]):([0-5]\d)(?:\s*({_ZONE}))?", text.strip(), re.ASCII)
    if clock is None:
        return seconds_of(text, option)
    now = (now or datetime.now()).astimezone()
    if clock[3]:
        there = now.astimezone(_zone(clock[3], option))
        end = there.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return (end + timedelta(days=end <= there)).timestamp() - now.timestamp()
    end = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
    if end <= now:
        end += timedelta(days=1)
    # Through naive local times, so that a night in which the clocks change has its own length.
    return end.replace(tzinfo=None).astimezone().timestamp() - now.timestamp()


def _zone(name: str, option: str) -> tzinfo:
    """Return the time zone of that name, or of that offset from UTC."""
    if name.upper() in ("Z", "UTC", "GMT"):
        return UTC
    if name[0] in "+-":
        ahead = timedelta(hours=int(name[1:3]), minutes=int(name[-2:]))
        if ahead < timedelta(days=1):
            return timezone(ahead if name[0] == "+" else -ahead)
    else:
        with suppress(ZoneInfoNotFoundError, ValueError, OSError):
            return ZoneInfo(name)
    raise BadSetting(f"{option}: {quoted(name)} is not a time zone: write 06:00Z, 06:00+02:00 or 06:00 Europe/Berlin")


def count_of(text: str, option: str) -> int:
    """Return a whole number from 0 up, as people write it: 450000, 450_000, 450k, 2M.

    Raise BadSetting, naming `option`, for any other text.
    """
    value = whole_number(text)
    if value is None:
        raise BadSetting(f"{option} {quoted(text)} is not a whole number from 0 to 10^12: write 450000, 450k or 2M")
    return value


def counting(low: int = 0, high: int = 10**12) -> Callable[[str | int], int]:
    """Return a parser of whole numbers in that range, as people write them: 450000, 450_000, 450k, 2M."""

    def parse(text: str | int) -> int:
        word = str(text).strip()
        value = -1 if word == "-1" else whole_number(word)
        if value is None or not low <= value <= high:
            limit = "10^12" if high == 10**12 else f"{high:,}"
            import typer  # only a command line needs it

            raise typer.BadParameter(
                f"{word!r} is not a whole number from {low:,} to {limit}: write 450000, 450k or 2M"
            )
        return value

    return parse


def knob_text(cause: str, policy: Policy) -> str:
    """Return the setting behind a cause of waiting, with its value: "OPENAI_TPM_LIMIT=30000 (less 15 % headroom)".

    `cause`: as in `waits_s`, or the name of a profile's dimension: "OTPM=8000 (less 15 % headroom)".
    """
    if cause in policy.places:
        d = policy.places[cause]
        name = limit_name(policy, d).removeprefix("its limit ")
        less = f" (less {percent(policy.tpm_headroom)} headroom)" if policy.tpm_headroom else ""
        return f"{name}={policy.params().limit[d]:g}{less}"
    env, what = WAITED_FOR.get(cause, ("", ""))
    if cause == "day" and not policy.tpd_limit:
        env = "OPENAI_RPD_LIMIT"
    if not env:
        return what or "the answers' own time"
    knob = KNOB_BY_ENV[env]
    text = f"{env}={knob.text(getattr(policy, knob.name))}"
    if cause in ("tpm", "rpm", "day") and policy.tpm_headroom:
        text += f" (less {percent(policy.tpm_headroom)} headroom)"
    return text


def moment_text(epoch_s: float) -> str:
    """Return a moment for people, in local time: "Wed 25 Nov 18:23"."""
    try:
        return time.strftime("%a %d %b %H:%M", time.localtime(epoch_s))
    except (ValueError, OverflowError, OSError):
        return "never"

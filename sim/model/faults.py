"""Injected faults: the events of a faults file, and which of them strike an attempt.

Example:

    provider:
      limit_changes: [{at_s: 120, factor: 0.5}]         # limits cut to half in the middle
      cotenant: {share: 0.25, burst_s: 15, period_s: 60}
      quota_requests: 40                                # the credit is gone after 40 admitted requests
    events:
      - {kind: server_error, at_s: 30, for_s: 5, status: 503}
      - {kind: stall, ratio: 0.02, stall_s: 30}
      - {kind: throttled, attempts: 2}                  # the first two attempts of every request
      - {kind: error_inside, ratio: 0.05, inside: rate_limit_exceeded}   # in the middle of a stream

Times are the provider's seconds since its first request. Events are checked in order, and the first that
strikes counts. Events at the door (throttled, slow_down, quota, overloaded, unauthorized, model_not_found) replace the
admission: nothing is charged. The others (server_error, stall, drop, truncate, malformed, error_inside) strike after
admission: the charge is taken. `error_inside` is an error within a success: half-way through a stream, or in the body
of a 200. A forced 429 names requests per minute, whatever its headers show. Chance is keyed by request and attempt,
like all chance here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from governor.model.errors import BadSetting
from governor.model.files import read_yaml
from governor.model.keyed import keyed_uniform
from governor.model.requests import Outcome
from governor.profiles.loader import OPENAI, read_profile
from sim.base.arguments import Config, checked
from sim.model.provider_config import ProviderConfig, Ratio, Requests, Seconds

AT_THE_DOOR = ("throttled", "slow_down", "quota", "overloaded", "unauthorized", "model_not_found")
AFTER_ADMISSION = ("server_error", "stall", "drop", "truncate", "malformed", "error_inside")
EVENTS_MAX = 24
# The purposes of `keyed` from this number on belong to the events, one each.
EVENT = 40


_BELONGS = {
    "status": ("server_error",),
    "stall_s": ("stall",),
    "code": ("quota",),
    "inside": ("error_inside",),
    "retry_after_s": ("throttled", "slow_down", "overloaded"),
}


class Event(Config):
    """A fault and when it strikes: in a span of time, after a number of requests, by chance, or on first attempts.

    `at_s`, `for_s`: when it begins and for how long (0 = to the end). `after_requests`: number of requests seen before
    it begins. `times`: most strikes, `attempts`: strikes only the first so many attempts of a request (0 = no bound).
    `ratio`: chance of striking each attempt. `status`: the status of a server_error; `stall_s`: length of a stall;
    `retry_after_s`: the wait that a refusal states (-1 = none); `code`: the error code of a quota refusal.
    """

    kind: Literal[
        "throttled",
        "slow_down",
        "quota",
        "overloaded",
        "unauthorized",
        "model_not_found",
        "server_error",
        "stall",
        "drop",
        "truncate",
        "malformed",
        "error_inside",
    ]
    at_s: float = Field(default=0.0, ge=0, le=10**9)
    for_s: float = Field(default=0.0, ge=0, le=10**9)
    after_requests: Requests = 0
    times: Requests = 0
    attempts: Requests = 0
    ratio: Ratio = 1.0
    status: Annotated[int, Field(ge=500, le=599)] = 500
    stall_s: Seconds = 30.0
    retry_after_s: float = Field(default=-1.0, ge=-1, le=10**9)
    code: str = "insufficient_quota"
    inside: Literal["server_error", "server_is_overloaded", "rate_limit_exceeded"] = "server_error"

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        for name, kinds in _BELONGS.items():
            if name in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"{name} belongs to {' or '.join(kinds)}, not to {self.kind}")
        codes = read_profile(OPENAI).errors.codes[Outcome.QUOTA]
        if self.kind == "quota" and self.code not in codes:
            raise ValueError(f"code must be one of {', '.join(sorted(codes))}")
        return self


class Faults(Config):
    """A faults file: provider fields and events."""

    provider: dict[str, Any] = Field(default_factory=dict)
    events: Annotated[tuple[Event, ...], Field(max_length=EVENTS_MAX, strict=False)] = ()

    def applied(self, config: ProviderConfig) -> ProviderConfig:
        """Return the provider with the file's fields in place of its own. Raise BadSetting as for any provider."""
        return config.with_(**self.provider) if self.provider else config


def read_faults(path: str | Path) -> Faults:
    """Return the faults in a YAML file. Raise BadInput if it cannot be read as YAML, BadSetting for a wrong value."""
    data = read_yaml(path)
    try:
        faults = checked(Faults, data, "")
        faults.applied(ProviderConfig())
    except BadSetting as error:
        raise BadSetting(f"{path}: {error}", error.name) from None
    return faults


class FaultState:
    """The fault events of one run, with the number of times that each has struck."""

    def __init__(self, events: Sequence[Event], seed: int) -> None:
        self.events = tuple(events)
        self.seed = seed
        self.struck = [0] * len(self.events)

    def strikes(self, door: bool, now: float, request: int, attempt: int, arrivals: int, seen: int) -> Event | None:
        """Return the event that strikes this attempt at the door or after its admission; None if no event strikes.

        `request`, `attempt`: the keys of its chance. `arrivals`: how often this request has arrived, including now.
        `seen`: number of requests so far, including this one.
        """
        for i, event in enumerate(self.events):
            if (event.kind in AT_THE_DOOR) is not door:
                continue
            if now < event.at_s or (event.for_s > 0.0 and now >= event.at_s + event.for_s):
                continue
            if seen <= event.after_requests or 0 < event.attempts < arrivals or 0 < event.times <= self.struck[i]:
                continue
            if event.ratio < 1.0 and keyed_uniform(self.seed, request, attempt, EVENT + i % EVENTS_MAX) >= event.ratio:
                continue
            self.struck[i] += 1
            return event
        return None

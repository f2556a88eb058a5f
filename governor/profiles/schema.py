"""The form of a profile file: every field with its unit, range and meaning.

A profile states what a provider publishes or what was measured of it, and nothing about an account: whatever is not
known is left out, and means "unknown". The reference page (docs/reference/profiles.md) is made from this module.
"""

from __future__ import annotations

import re
import string
import zoneinfo
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.estimate import RULES
from governor.model.phrases import plural
from governor.model.pools import checked_url
from governor.model.prices import Price, prices_in
from governor.model.requests import Outcome
from governor.profiles.documents import Config

Component = Literal["requests", "input", "cached_input", "cache_write", "output", "cost"]
# Formats of a time: a number of seconds or of milliseconds; a Go duration ("1m13.5s"); an instant (RFC 3339 or an HTTP
# date); an epoch, seconds or milliseconds since 1970. `auto`: whichever it is; a bare number means seconds in a wait,
# and says nothing in a reset.
TimeFormat = Literal["auto", "seconds", "milliseconds", "duration", "instant", "epoch"]

DIMENSIONS_MAX = 8
_YEAR_S = 366 * 86_400.0
Text = Annotated[str, Field(min_length=1, max_length=300)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
Amount = Annotated[float, Field(gt=0, le=1e15)]
Weights = Annotated[dict[Component, Annotated[float, Field(ge=0, le=1_000)]], Field(min_length=1)]
Meaning = Annotated[Outcome, Field(strict=False)]


def _day(value: Any) -> Any:
    """YAML reads 2026-11-23 as a date, and text as text."""
    if type(value) is date:
        return value
    raise ValueError(f"{quoted(value)} must be a day, YYYY-MM-DD")


Day = Annotated[date, BeforeValidator(_day)]


def _header(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", name):
        raise ValueError(f"{quoted(name)} is not the name of a header")
    return name.lower()


Header = Annotated[str, AfterValidator(_header)]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{quoted(text)} is not a regular expression: {error}") from None
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


def _zone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{quoted(name)} is not a time zone: write one such as America/Los_Angeles or UTC") from None
    return name


def _profile_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name):
        raise ValueError(f"{quoted(name)}: use up to 40 small letters, digits and '-', such as my-gateway")
    return name


def _variable(name: str) -> str:
    """The name of a variable may be the key itself by mistake, so it is not repeated."""
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        raise ValueError("it must be the name of the variable that holds the key, such as OPENAI_API_KEY")
    return name


Variable = Annotated[str, AfterValidator(_variable)]


def _address(url: str) -> str:
    try:
        return checked_url(url, "URL")
    except BadSetting as error:
        raise ValueError(str(error)) from None


Address = Annotated[str, AfterValidator(_address)]


def count_of_refusals(value: Any) -> Any:
    """Check what refusals count against, in one validator: an error is reported once, not once per possible type."""
    if type(value) is bool or value in ("tokens", "requests"):
        return value
    raise ValueError(f"{quoted(value)} must be true, false, tokens or requests")


def _rule(name: str) -> str:
    if name not in RULES:
        raise ValueError(f"{quoted(name)} must be one of {', '.join(RULES)}")
    return name


# ---------------------------------------------------------------- limits


class CountHeaders(Config):
    """The headers that state one dimension's limit, what remains of it, and when it resets."""

    limit: Header
    remaining: Header
    reset: Header | None = None
    reset_format: TimeFormat = "auto"


class Dimension(Config):
    """One limited quantity. A request takes the sum of its components, each times its weight; components without a
    weight take nothing.

    The components of a request do not overlap: `requests` is 1; `input` are prompt tokens that are neither read from a
    cache (`cached_input`) nor written to one (`cache_write`); `output` are answer tokens, before the answer the
    declared cap as far as the charge rule counts it; `cost` is US dollars. `window`: `bucket` refills continuously;
    `sliding` are the last `length_s` seconds; `fixed` begins with the first request after the last window; `clock`
    begins with the minute or day of `time_zone`. `slice_s`: the limit also holds per slice, as its share. `charged`:
    what was estimated, at admission, or what was used, at the answer. `settles`: the estimate is replaced by the use.
    `limit`: the one of an account without a stated tier; left out: unknown.
    """

    unit: Literal["requests", "tokens", "usd"]
    weights: Weights
    length_s: Annotated[float, Field(gt=0, le=_YEAR_S)] = 60.0
    window: Literal["fixed", "clock", "sliding", "bucket"] = "bucket"
    time_zone: Annotated[str, AfterValidator(_zone)] = "UTC"
    slice_s: Annotated[float, Field(gt=0, le=60)] | None = None
    limit: Amount | None = None
    charged: Literal["admission", "answer"] = "admission"
    settles: bool = False
    headers: CountHeaders | None = None

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("weights are all 0: give one component a weight above 0")
        if "time_zone" in self.model_fields_set and self.window != "clock":
            raise ValueError(f"time_zone {self.time_zone} needs window: clock, which alone follows a clock")
        if self.slice_s is not None and self.slice_s > self.length_s:
            raise ValueError(f"slice_s {self.slice_s:g} is above length_s {self.length_s:g}")
        return self


class Charge(Config):
    """How a request's tokens are estimated at the provider's door.

    `rule`: see `governor/model/estimate.py`; `auto` is what was measured of OpenAI's endpoints. `refusals_count`:
    whether a refused request takes its amount, or in which unit alone. `counts`: which answers state what remains, and
    for which moment; left out: unknown, taken as the admission. `counts_rounded_to`: to a multiple of so many units.
    """

    rule: Annotated[str, AfterValidator(_rule)] = "auto"
    refusals_count: Annotated[bool | str, BeforeValidator(count_of_refusals)] = True
    counts: Literal["admission", "answer", "refusals", "none"] = "admission"
    counts_rounded_to: Annotated[int, Field(ge=1, le=10**9)] = 1


class Tier(Config):
    """The limits of one or more models in each usage tier, with their source and the day on which they held."""

    models: Texts
    source: Text
    since: Day
    limits: Annotated[dict[Text, dict[str, Amount]], Field(min_length=1)]


# ---------------------------------------------------------------- refusals


class WaitPlace(Config):
    """A place in which a refusal states its wait: a header, a field of the error's body, or the message's text."""

    header: Header | None = None
    field: Text | None = None
    message: bool = False
    format: TimeFormat = "auto"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.header is not None) + (self.field is not None) + self.message != 1:
            raise ValueError("it must be one of header: NAME, field: NAME, message: true")
        return self


class Message(Config):
    """A wording that says more than code and status: a regular expression, and its meaning.

    `bare`: it counts only for an error without any code or type.
    """

    pattern: Pattern
    outcome: Meaning
    bare: bool = False


class Errors(Config):
    """What a refusal means, by code, HTTP status and wording.

    Meanings: `throttled` and `slow_down` (too fast: again after the wait), `overloaded` (no capacity: again after a
    backoff), `server_error` and `timeout` (again), `quota` and `unauthorized` (the account: the run ends),
    `too_large` and `bad_request` (the request's own: it ends). `codes`: codes, types and gRPC statuses in lower case,
    by meaning, whatever the status is. `generic`: those of the codes that do not overrule a status. `finish_reasons`:
    of choices that hold no answer. `daily_quotas`: names of exhausted quotas that return after a day, not after the
    stated wait.
    """

    codes: dict[Meaning, Texts] = Field(default_factory=dict)
    generic: Texts = ()
    statuses: dict[Annotated[int, Field(ge=300, le=599)], Meaning] = Field(default_factory=dict)
    messages: Annotated[tuple[Message, ...], Field(strict=False)] = ()
    finish_reasons: dict[Text, Meaning] = Field(default_factory=dict)
    daily_quotas: Pattern | None = None

    @model_validator(mode="after")
    def _lower(self) -> Self:
        for code in (code for codes in self.codes.values() for code in codes):
            if code != code.lower():
                raise ValueError(f"code {quoted(code)} must be in lower case: {code.lower()}")
        return self


# ---------------------------------------------------------------- money and time


class ServiceTier(Config):
    """A processing tier of the provider; its price stands with the model's. `shares_limits`: left out, unknown."""

    shares_limits: bool | None = None
    note: Text | None = None


class Reserved(Config):
    """Provisioned capacity of one or more models: what a unit processes, and what it costs per hour.

    `tokens_per_minute` per unit, in which a token of each component counts by its weight. `usd_per_hour` per unit;
    left out: unknown, or by contract. `terms`: hourly price of a unit for a commitment, by its name.
    """

    models: Texts
    unit: Text
    source: Text
    since: Day
    tokens_per_minute: Amount
    weights: Weights
    minimum: Annotated[int, Field(ge=1, le=10**6)] = 1
    increment: Annotated[int, Field(ge=1, le=10**6)] = 1
    usd_per_hour: Amount | None = None
    terms: dict[Text, Amount] = Field(default_factory=dict)


class LatencyLine(Config):
    """Seconds to the first token and per output token of one model, fitted to so many recordings."""

    first_token_s: Annotated[float, Field(ge=0, le=3_600)]
    per_token_s: Annotated[float, Field(ge=0, le=60)]
    recordings: Annotated[int, Field(ge=0)] = 0
    since: Day | None = None


class LimitsEndpoint(Config):
    """The endpoint that states an account's limits. It takes an admin key, and is read by `paceline doctor --limits`.

    `path`: below the base URL, with {project} where the project's id belongs. `key`: the variable of the admin key.
    `models`: the field of an entry that names its model or models. `limits`: the field that holds each dimension's
    limit; or, with `entries`, the type of the entry in that list whose `value` it is.
    """

    path: Text
    key: Variable
    models: Text
    limits: Annotated[dict[str, Text], Field(min_length=1)]
    entries: Text | None = None

    @model_validator(mode="after")
    def _names(self) -> Self:
        for _, name, _, _ in string.Formatter().parse(self.path):
            if name not in (None, "project"):
                raise ValueError(f"path {quoted(self.path)} may hold {{project}} and no other name in braces")
        return self


# ---------------------------------------------------------------- the profile


def _prices(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("prices must be names of models, each with since, input, cached_input and output")
    try:
        return prices_in(value, place="")
    except BadInput as error:
        raise ValueError(error.reason) from None


class Profile(Config):
    """A provider. `checked`: the day on which the file was last compared with its sources.

    `extends`: the profile whose sections hold where this one states none. `base_url`: its address, for a pool that
    names none; "" is the one of OpenAI's SDK; left out: each user has another. `base_urls`: patterns of the base URLs
    that choose this profile (`*` stands for any text). `api`: the form of requests. `key`: the variable of its key.
    `header_patterns`: regular expressions for names of
    headers of unknown servers; see the file `generic.yaml`.
    """

    name: Annotated[str, AfterValidator(_profile_name)]
    title: Text
    checked: Day
    sources: dict[Text, Text] = Field(default_factory=dict)
    extends: Text | None = None
    api: Literal["openai", "anthropic"] = "openai"
    base_url: Address | None = None
    base_urls: Texts = ()
    key: Variable = "OPENAI_API_KEY"
    dimensions: Annotated[dict[str, Dimension], Field(min_length=1, max_length=DIMENSIONS_MAX)]
    header_patterns: Annotated[tuple[Pattern, ...], Field(strict=False)] = ()
    charge: Charge = Charge()
    retry_after: Annotated[tuple[WaitPlace, ...], Field(strict=False)] = ()
    errors: Errors = Errors()
    tiers: Annotated[tuple[Tier, ...], Field(strict=False)] = ()
    service_tiers: dict[Text, ServiceTier] = Field(default_factory=dict)
    prices: Annotated[dict[str, tuple[Price, ...]], BeforeValidator(_prices)] = Field(default_factory=dict)
    prices_checked: Day | None = None
    reserved: Annotated[tuple[Reserved, ...], Field(strict=False)] = ()
    latency: dict[Text, LatencyLine] = Field(default_factory=dict)
    limits_endpoint: LimitsEndpoint | None = None

    def __hash__(self) -> int:
        return id(self)  # tables are made once per profile that was read

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for name in self.dimensions:
            if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,19}", name):
                raise ValueError(f"dimensions.{name}: name it by capitals and digits, such as TPM or RPD")
        stated = {
            f"tiers.{i}.limits.{tier}": limits
            for i, each in enumerate(self.tiers)
            for tier, limits in each.limits.items()
        }
        if self.limits_endpoint is not None:
            stated["limits_endpoint.limits"] = self.limits_endpoint.limits  # type: ignore[assignment]
        for place, limits in stated.items():
            for name in limits:
                if name not in self.dimensions:
                    raise ValueError(
                        f"{place}.{name}: there is no such dimension; this profile has {', '.join(self.dimensions)}"
                    )
        for pattern in self.header_patterns:
            if "part" not in re.compile(pattern).groupindex:
                raise ValueError(f"header_patterns: {quoted(pattern)} needs a group (?P<part>limit|remaining|reset)")
        return self


def summary(profile: Profile) -> str:
    """Return in one line what a profile limits and knows, for people."""
    known = {
        "tier": sum(len(tier.models) * len(tier.limits) for tier in profile.tiers),
        "price": len(profile.prices),
        "latency line": len(profile.latency),
        "reserved unit": len(profile.reserved),
    }
    counts = "".join(f", {plural(number, what)}" for what, number in known.items() if number)
    return f"{profile.title}: {', '.join(profile.dimensions)}{counts}; checked {profile.checked}"

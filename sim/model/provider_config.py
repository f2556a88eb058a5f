"""A provider as a user describes it: every property of the synthetic provider with its unit, range and default.

Defaults follow docs/explanation/provider.md: continuous buckets, the charge measured for the endpoint, no settling, a
stated wait in milliseconds. Refused requests count against the limits because the documentation says so; this has not
been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from governor.forecast.summary import Grant
from governor.model.errors import BadInput
from governor.model.needs import Limited
from governor.profiles.loader import OPENAI, read_profile
from governor.profiles.schema import count_of_refusals
from sim.base.arguments import Config, checked
from sim.model.batches import BatchApi, ServiceTiers
from sim.model.latency import NOISE_GROUPS, NOISE_KNOTS
from sim.model.provider import (
    CHANGES,
    COUNTS_AT_ADMISSION,
    COUNTS_AT_ANSWER,
    COUNTS_NONE,
    COUNTS_ON_REFUSALS,
    DROPS,
    ERRORS,
    HANGS,
    OUTAGES,
    REFUSAL_REQUESTS,
    REFUSAL_TOKENS,
    SAYS_CONSTANT,
    ProviderParams,
)
from sim.model.provider_quota import SAYS, account_quota, granted_text, list_of, named_limits, over_quota, stated_wait
from sim.model.provider_tiers import (
    CHECKED_ON,
    DEFAULT_LATENCY,
    DEFAULT_TIER,
    SIGMA,
    SIMULATED,
    STALL_MAX_S,
    STALL_MIN_S,
    STALL_RATIO,
    completed,
    habits,
    latency_lines,
    latency_preset,
    tier_of,
    tier_preset,
    tier_source,
)
from sim.model.windows import ANCHORED, BUCKET, CLOCK, DIMENSIONS, MINUTE_S, SLIDING
from sim.model.workload import ASSUMED, MEASURED, Provenance

Ratio = Annotated[float, Field(ge=0, le=1)]
Requests = Annotated[int, Field(ge=0, le=10**12)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
Tokens = Annotated[int, Field(ge=0, le=10**12)]


def _real_day(text: str) -> str:
    date.fromisoformat(text)
    return text


Day = Annotated[
    str,
    # YAML reads 2026-11-23 as a date.
    BeforeValidator(lambda value: value.isoformat() if type(value) is date else value),
    Field(pattern=r"^\d{4}-\d{2}-\d{2}$"),
    AfterValidator(_real_day),
]
_COUNTS = {
    "none": COUNTS_NONE,
    "admission": COUNTS_AT_ADMISSION,
    "answer": COUNTS_AT_ANSWER,
    "refusals": COUNTS_ON_REFUSALS,
}
_OUTAGES = {"drops": DROPS, "5xx": ERRORS, "hang": HANGS}
_WINDOWS = {"bucket": BUCKET, "clock": CLOCK, "anchored": ANCHORED, "sliding": SLIDING}
_REFUSALS: dict[bool | str, int] = {
    False: 0,
    "tokens": REFUSAL_TOKENS,
    "requests": REFUSAL_REQUESTS,
    True: REFUSAL_TOKENS | REFUSAL_REQUESTS,
}


class NoiseShape(Config):
    """The measured shape of latency noise for answers of at least `from_tokens` output tokens.

    `log_ratios`: logarithms of time over its median, one per normal score from -4 to 4 in steps of 0.25;
    non-decreasing.
    """

    from_tokens: Annotated[float, Field(ge=0)] = 0.0
    log_ratios: Annotated[tuple[float, ...], Field(strict=False, min_length=NOISE_KNOTS, max_length=NOISE_KNOTS)]

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(after < before for before, after in pairwise(self.log_ratios)):
            raise ValueError("log_ratios must not fall: they are quantiles")
        return self


class Latency(Config):
    """Time of an answer: (first token + per token x output tokens), log-normal noise, rare stalls.

    Written as the name of a measured model, or as fields, with `preset` naming the model that the others start from.
    `scale` multiplies everything except the stalls; `recorded`: use the workload's recorded times if it has any.
    `noise`: measured shapes in place of the log-normal one, in increasing order of answer length.
    """

    preset: str = ""
    first_token_s: Seconds = latency_lines()[DEFAULT_LATENCY].first_token_s
    per_token_s: Seconds = latency_lines()[DEFAULT_LATENCY].per_token_s
    sigma: Annotated[float, Field(ge=0, le=3)] = SIGMA
    stall_ratio: Ratio = STALL_RATIO
    stall_min_s: Seconds = STALL_MIN_S
    stall_max_s: Seconds = STALL_MAX_S
    scale: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    recorded: bool = True
    noise: Annotated[tuple[NoiseShape, ...], Field(max_length=NOISE_GROUPS, strict=False)] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        return completed(data, latency_preset)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.stall_min_s > self.stall_max_s:
            raise ValueError(f"stall_min_s {self.stall_min_s:g} is above stall_max_s {self.stall_max_s:g}")
        if any(after.from_tokens <= before.from_tokens for before, after in pairwise(self.noise)):
            raise ValueError("noise must be in order of from_tokens")
        if self.noise and self.sigma == 0.0:
            raise ValueError("noise has a shape, but sigma is 0: state its spread, or leave the shape out")
        return self

    def provenance(self) -> tuple[str, str]:
        """Return (measured or assumed, how)."""
        line = f"{self.first_token_s:.3g} s + {1_000 * self.per_token_s:.3g} ms per output token"
        if self.scale != 1.0:
            line += f", times {self.scale:g}"
        shape = ", of its measured shape" if self.noise else ""
        rest = f"noise (sigma {self.sigma:.3g}{shape}) and stalls ({self.stall_ratio:.3g} of answers) assumed"
        known = latency_lines().get(self.preset)
        if (
            known is None
            or (self.first_token_s, self.per_token_s) != (known.first_token_s, known.per_token_s)
            or self.scale != 1.0
        ):
            return ASSUMED, f"{line}; {rest}"
        return MEASURED, f"{self.preset}: {line}, from {known.recordings} recordings, checked {CHECKED_ON}; {rest}"


class Cotenant(Config):
    """Others on the same quota: the share that they use, continuously or in bursts once per period."""

    share: Ratio = 0.0
    burst_s: Seconds = 0.0
    period_s: Seconds = 0.0

    @model_validator(mode="after")
    def _burst_within_period(self) -> Self:
        if self.period_s > 0.0 and not 0.0 < self.burst_s <= self.period_s:
            raise ValueError(f"burst_s {self.burst_s:g} must be above 0 and at most period_s {self.period_s:g}")
        if self.burst_s > 0.0 and self.period_s <= 0.0:
            raise ValueError("burst_s needs a period_s: one burst per so many seconds")
        return self


class LimitChange(Config):
    """A change of limits: from `at_s` on, the limits per minute are `factor` times the original ones."""

    at_s: float = Field(ge=0, le=10**9)
    factor: float = Field(gt=0, le=1_000)


class Outage(Config):
    """An outage from `at_s` on, for `length_s`: connections drop, every request gets a 5xx, or answers hang."""

    at_s: float = Field(ge=0, le=10**9)
    length_s: float = Field(gt=0, le=10**9)
    kind: Literal["drops", "5xx", "hang"] = "drops"


class FaultRatios(Config):
    """Faults after admission, each as a share of attempts (cut answers without text: of answers cut by their cap)."""

    error_ratio: Ratio = 0.0
    drop_ratio: Ratio = 0.0
    hang_ratio: Ratio = 0.0
    empty_cut_ratio: Ratio = 0.5
    refusal_s: Seconds = 0.05

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        if self.error_ratio + self.drop_ratio + self.hang_ratio > 1.0:
            raise ValueError("error_ratio, drop_ratio and hang_ratio together are above 1")
        return self


class ProviderConfig(Config):
    """One provider quota. Limits per minute (`tpm`, `rpm`) and day (`tpd`, `rpd`), 0 = none.

    Written as the name of a published tier, or as fields, with `preset` naming the tier that the others start from.
    `profile`: the provider's, by name or file: its habits hold where no field states another. `limits`: of its further
    dimensions, by name. `usd_per_million`: the price of input, output and cached input, where money is limited.
    `charge_rule`, as of a date, is what an admission takes; `ProviderParams` explains the other fields. `counts`:
    whether headers state what remains: at the moment of admission or of the answer, on refusals only, or never.
    `window`: how minutes are counted (see `windows`): by the clock, with the run starting `phase_s` into a minute; from
    the first request on; as a sliding log; or as a bucket, whose capacity is the limit over `burst_s`. `charged`: at
    admission, or by real use at the answer. `failed_requests_count`: whether refusals count, or the only limit that
    they count against (`requests`: the limit that is checked first). `retry_after`: a number states the same seconds
    always. `header_names`: the names under which counts are stated. `day_*_used`: use of the daily limits before the
    run. `batch_api`, `tiers`: see `batches`. `learnt`: inputs (names as in `provenance`) that were learnt from a log,
    and `learnt_from`: that log's name.
    """

    preset: str = ""
    profile: str = OPENAI
    tpm: Tokens = 30_000
    rpm: Requests = 0
    tpd: Tokens = 0
    rpd: Requests = 0
    limits: Annotated[tuple[tuple[str, float], ...], BeforeValidator(named_limits)] = ()
    usd_per_million: Annotated[tuple[float, float, float], Field(strict=False)] = (0.0, 0.0, 0.0)
    day_tokens_used: Tokens = 0
    day_requests_used: Requests = 0
    charge_rule: Literal["fixed", "prompt_chars4", "prompt_plus_max", "max_of", "responses", "auto"] = "auto"
    as_of: Day = CHECKED_ON
    settles: bool = False
    charged: Literal["admission", "answer"] = "admission"
    failed_requests_count: Annotated[bool | str, BeforeValidator(count_of_refusals)] = True
    retry_after: Annotated[str | float, BeforeValidator(stated_wait)] = "ms"
    retry_after_min_s: Seconds = 0.0
    header_names: Literal["openai", "plain", "api_key", "llm_provider"] = "openai"
    counts: Literal["admission", "answer", "refusals", "none"] = "admission"
    counts_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    counts_rounded_to: Annotated[int, Field(ge=1, le=10**9)] = 1
    counts_negative: bool = False
    window: Literal["bucket", "clock", "anchored", "sliding"] = "bucket"
    phase_s: Annotated[float, Field(ge=0, lt=MINUTE_S)] = 0.0
    burst_s: Annotated[float, Field(gt=0, le=MINUTE_S)] = MINUTE_S
    slice_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    slice_tokens: Tokens = 0
    ramp_tpm: Tokens = 0
    quota_requests: Requests = 0
    limit_changes: Annotated[tuple[LimitChange, ...], Field(max_length=CHANGES, strict=False)] = ()
    outages: Annotated[tuple[Outage, ...], Field(max_length=OUTAGES, strict=False)] = ()
    cotenant: Cotenant = Cotenant()
    faults: FaultRatios = FaultRatios()
    latency: Latency = Latency(preset=DEFAULT_LATENCY)
    batch_api: BatchApi = BatchApi()
    tiers: ServiceTiers = ServiceTiers()
    learnt: Annotated[tuple[str, ...], Field(strict=False)] = ()
    learnt_from: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        try:
            profile = str(data.get("profile", "")) if isinstance(data, dict) else ""
            data = completed(data, lambda name: tier_preset(name, profile))
            if isinstance(data, dict) and isinstance(name := data.get("profile"), str) and name != OPENAI:
                own = read_profile(name)
                data = {**habits(own), **data}
                if isinstance(model := data.get("latency"), str) and model in own.latency:
                    # A preset is one of the shipped lines; a profile's own is written out.
                    data["latency"] = own.latency[model].model_dump(include={"first_token_s", "per_token_s"})
        except BadInput as error:
            raise ValueError(str(error)) from None
        if isinstance(data, dict) and type(data.get("minute_reset")) is bool:
            # The old name of `window: clock`.
            resets = {"window": "clock"} if data["minute_reset"] else {}
            data = {**{name: value for name, value in data.items() if name != "minute_reset"}, **resets}
        return data

    @model_validator(mode="after")
    def _changes_in_order(self) -> Self:
        times = [change.at_s for change in self.limit_changes]
        if any(b <= a for a, b in pairwise(times)):
            raise ValueError("limit_changes must be in order of time, each at_s above the one before")
        if any(after.at_s < before.at_s + before.length_s for before, after in pairwise(self.outages)):
            raise ValueError("outages must be in order of time, none before the end of the one before")
        return self

    @model_validator(mode="after")
    def _fits_the_window(self) -> Self:
        if self.phase_s > 0.0 and self.window != "clock":
            raise ValueError(f"phase_s {self.phase_s:g} needs window: clock, which alone has minutes of its own")
        if self.burst_s < MINUTE_S and self.window != "bucket":
            raise ValueError(f"burst_s {self.burst_s:g} needs window: bucket: others hold a whole minute's limit")
        return self

    @staticmethod
    def of(name: str = DEFAULT_TIER) -> ProviderConfig:
        """Return the provider of a published tier. Raise BadSetting if the name does not exist."""
        return checked(ProviderConfig, name, "provider")

    def with_(self, **changes: Any) -> ProviderConfig:
        """Return a revalidated copy with some fields changed: `with_(tpm=450_000, latency="gpt-4o-mini")`."""
        given = {name for field, name in _INPUTS.items() if field in changes}
        learnt = tuple(name for name in self.learnt if name not in given)
        return checked(ProviderConfig, {**self.model_dump(), "learnt": learnt, **changes}, "provider")

    @property
    def quota(self) -> tuple[Limited, ...]:
        """Return the dimensions of the profile under this account's limits; () = the guardrails' four."""
        standard = dict(zip(SIMULATED, (self.tpm, self.rpm, self.tpd, self.rpd), strict=True))
        return account_quota(self.profile, standard, dict(self.limits), self.usd_per_million, self.phase_s)

    def params(self) -> ProviderParams:
        """Return the parameters that the engines use."""
        return over_quota(self._params(), self.quota)

    def _params(self) -> ProviderParams:
        """Return the parameters with the guardrails' four dimensions."""
        changes = ProviderParams()
        for i, change in enumerate(self.limit_changes):
            changes.change_at[i] = change.at_s
            changes.change_factor[i] = change.factor
        for i, outage in enumerate(self.outages):
            changes.outage_at[i] = outage.at_s
            changes.outage_until[i] = outage.at_s + outage.length_s
            changes.outage_kind[i] = float(_OUTAGES[outage.kind])
        late = self.latency
        for i, shape in enumerate(late.noise):
            changes.noise_from[i] = shape.from_tokens
            changes.noise[i * NOISE_KNOTS : (i + 1) * NOISE_KNOTS] = shape.log_ratios
        return ProviderParams(
            limit=list_of(self.tpm, self.rpm, self.tpd, self.rpd),
            window=list_of(_WINDOWS[self.window], _WINDOWS[self.window], BUCKET, BUCKET),
            phase_s=list_of(self.phase_s, self.phase_s),
            burst_ratio=[self.burst_s / MINUTE_S] * 2 + [1.0] * (DIMENSIONS - 2),
            slice_s=self.slice_s,
            slice_tokens=float(self.slice_tokens),
            settles=int(self.settles),
            at_answer=list_of(is_late := self.charged == "answer", 0, is_late),
            failed_count=_REFUSALS[self.failed_requests_count],
            retry_after=SAYS_CONSTANT if isinstance(self.retry_after, float) else SAYS[self.retry_after],
            retry_after_s=self.retry_after if isinstance(self.retry_after, float) else 0.0,
            retry_after_min_s=self.retry_after_min_s,
            ramp_tpm=float(self.ramp_tpm),
            change_at=changes.change_at,
            change_factor=changes.change_factor,
            outage_at=changes.outage_at,
            outage_until=changes.outage_until,
            outage_kind=changes.outage_kind,
            cotenant_share=self.cotenant.share,
            cotenant_burst_s=self.cotenant.burst_s,
            cotenant_period_s=self.cotenant.period_s,
            quota_requests=float(self.quota_requests),
            first_token_s=late.first_token_s * late.scale,
            per_token_s=late.per_token_s * late.scale,
            sigma=late.sigma,
            stall_ratio=late.stall_ratio,
            stall_min_s=late.stall_min_s,
            stall_max_s=late.stall_max_s,
            noise=changes.noise,
            noise_from=changes.noise_from,
            error_ratio=self.faults.error_ratio,
            drop_ratio=self.faults.drop_ratio,
            hang_ratio=self.faults.hang_ratio,
            refusal_s=self.faults.refusal_s,
            empty_cut_ratio=self.faults.empty_cut_ratio,
            counts=_COUNTS[self.counts],
            counts_share=self.counts_share,
            counts_rounded_to=float(self.counts_rounded_to),
            counts_negative=int(self.counts_negative),
        )

    def grant(self) -> Grant:
        """Return the limits, as the lower bound on any schedule needs them."""
        quota = self.quota
        if quota:
            changes = tuple((change.at_s, change.factor) for change in self.limit_changes)
            return Grant(settles=self.settles, changes=changes, quota=quota)
        return Grant(
            # Charges at the answer bind no launch: all requests may go before the first answer arrives.
            tpm_limit=0.0 if self.charged == "answer" else float(self.tpm),
            rpm_limit=float(self.rpm),
            tpd_limit=0.0 if self.charged == "answer" else float(self.tpd),
            rpd_limit=float(self.rpd),
            settles=self.settles,
            minute_reset=self.window != "bucket",
            phase_s=self.phase_s,
            burst_ratio=self.burst_s / MINUTE_S,
            changes=tuple((change.at_s, change.factor) for change in self.limit_changes),
            day_tokens_used=float(self.day_tokens_used),
            day_requests_used=float(self.day_requests_used),
        )

    def provenance(self) -> Provenance:
        """Return input -> (measured or assumed, source or method), for the report."""
        found: Provenance = {"limits": (ASSUMED, f"as given: {granted_text(self.tpm, self.rpm, self.limits)}")}
        if self.preset and self._grants(tier_preset(self.preset, self.profile)):
            found["limits"] = (MEASURED, tier_source(self.preset, self.profile))
        if self.charge_rule == "auto":
            found["charge rule"] = (MEASURED, f"recorded headers, by endpoint, as of {self.as_of}")
        else:
            found["charge rule"] = (ASSUMED, self.charge_rule)
        never = f"no: real use is never booked{_OPEN}"
        found["settling"] = (ASSUMED, "yes: real use is booked on completion" if self.settles else never)
        if self.charged == "answer":
            found["settling"] = (ASSUMED, "tokens are charged at the answer alone, by real use")
        counts = {True: "count against the limits, as documented", False: "do not count"}
        kind = self.failed_requests_count
        found["refused requests"] = (ASSUMED, counts[kind] if isinstance(kind, bool) else f"count as {kind} only")
        stated = {"ms": "the wait formula of logged messages, in ms", "seconds": "whole seconds", "absent": "none"}
        stated["oldest"] = "whole seconds until the oldest entry of a sliding log expires"
        wait = self.retry_after
        text = stated[wait] if isinstance(wait, str) else f"{wait:g} s, whatever is missing"
        text += f", at least {self.retry_after_min_s:g} s" if self.retry_after_min_s and wait != "absent" else ""
        found["Retry-After"] = (MEASURED if text == stated["ms"] else ASSUMED, text)
        plain = self.window == "bucket" and self.burst_s == MINUTE_S
        found["window"] = (MEASURED if plain else ASSUMED, self._window_text())
        tokens = f" and {self.slice_tokens:,} tokens" if self.slice_tokens else ""
        share = f"every {self.slice_s:g} s a share of the requests{tokens}"
        found["slices"] = (ASSUMED, share if self.slice_s else "none: the minute's limit may go at once")
        found["counts in headers"] = (ASSUMED, self._counts_text())
        found["latency"] = self.latency.provenance()
        model = tier_of(self.preset, self.profile).model if self.preset else ""
        if model and model not in latency_lines() and self.latency.preset == DEFAULT_LATENCY:
            text = f"that of {found['latency'][1]}, for want of a measurement of {model}"
            found["latency"] = (ASSUMED, text)
        found["other users of the quota"] = (ASSUMED, _cotenant_text(self.cotenant))
        faults = self.faults
        text = f"{faults.error_ratio:.3g} server errors, {faults.drop_ratio:.3g} dropped"
        text += f", {faults.hang_ratio:.3g} never answered" if faults.hang_ratio else ""
        text += "".join(f", out for {o.length_s:g} s from {o.at_s:g} s on ({o.kind})" for o in self.outages)
        found["faults"] = (ASSUMED, text)
        for name in self.learnt:
            text = found[name][1].removeprefix("as given: ").removesuffix(" assumed").removesuffix(_OPEN)
            found[name] = (MEASURED, f"learnt from {self.learnt_from}: {text}")
        return found

    def _grants(self, preset: Mapping[str, Any]) -> bool:
        """Return whether the limits are those of a preset."""
        return all(getattr(self, name) == preset.get(name, 0) for name in ("tpm", "rpm", "tpd", "rpd"))

    def _window_text(self) -> str:
        burst = f", bursts of at most {self.burst_s:g} s" if self.burst_s < MINUTE_S else ""
        return {
            "bucket": f"a bucket that refills continuously{burst}",
            "clock": f"minutes of the clock; the run begins {self.phase_s:g} s into one",
            "anchored": "minutes that begin with the first request after the last one",
            "sliding": "any 60 s in a row",
        }[self.window]

    def _counts_text(self) -> str:
        text = {
            "admission": "as of the admission",
            "answer": "as of the answer",
            "refusals": "on refusals only",
            "none": "none",
        }[self.counts]
        if self.counts_share < 1.0:
            text += f", {self.counts_share:.0%} of what remains"
        return f"{text}, to {self.counts_rounded_to:,}" if self.counts_rounded_to > 1 else text


# The inputs by the fields that set them.
_INPUTS = {
    "tpm": "limits",
    "rpm": "limits",
    "charge_rule": "charge rule",
    "settles": "settling",
    "failed_requests_count": "refused requests",
    "retry_after": "Retry-After",
    "counts": "counts in headers",
    "window": "window",
    "burst_s": "window",
    "slice_s": "slices",
    "slice_tokens": "slices",
    "charged": "settling",
    "cotenant": "other users of the quota",
    "faults": "faults",
    "latency": "latency",
}
_OPEN = "; what recordings show does not exclude it"


def _cotenant_text(cotenant: Cotenant) -> str:
    if cotenant.share <= 0.0:
        return "none"
    how = f"{cotenant.share:.0%} of it"
    return f"{how}, in bursts of {cotenant.burst_s:g} s every {cotenant.period_s:g} s" if cotenant.burst_s else how

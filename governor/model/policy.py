"""The policy: every knob of the law with its environment name, unit, allowed range, preset values and meaning.

Theory of operation. Each knob is defined once, as a field of `Policy`; pydantic checks it, and `KNOBS`, the `--help`
text, the README's table, `.env` reading and `.env` writing are all derived from the model's own schema. A caller passes
a mapping (`from_env`) or `NAME=VALUE` words (`set_values`) and gets a checked policy or one `BadSetting`.

An env file in production holds foreign names and secrets. A foreign name is left alone and its value is never repeated,
not even in an error; a name that is *nearly* ours is an error, because a limit that is silently ignored is worse than a
run that does not start. `near_miss` decides how near is near.

Presets. `guardrails` holds the defaults: the rate-limit guardrails that the first user runs in production. `paceline`
is a starting point without a plan: more in flight, a short stagger, more attempts, and the law's further abilities.
Knobs that depend on the provider equal `guardrails`: `settle`, the token limit, the RPM and the daily limits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from governor.law import Params
from governor.model.errors import BadSetting
from governor.model.knobs import Knob, Value, nearest, shown
from governor.model.needs import STANDARD, Limited, Weights, weights_of
from governor.model.params import params_of


def _knob(env: str, default: Value, unit: str, meaning: str, *, paceline: Value | None = None, **allowed: Any) -> Any:
    """Return one knob; `allowed` are pydantic's bounds (ge, gt, le, lt).

    Without `paceline` both presets share the default.
    """
    extra: dict[str, Any] = {"env": env, "unit": unit, "paceline": default if paceline is None else paceline}
    return Field(default, description=meaning, json_schema_extra=extra, **allowed)


class Policy(BaseModel):
    """The settings of one pool, checked and frozen.

    `model_fields_set` tells which were named rather than left at default. Knobs go by their field names here, by the
    same with `_s` for `_seconds`, or by their environment names, as in `with_`. Raise BadSetting (one line, with the
    allowed values) for a value out of range and for an unknown name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # The eight guardrail knobs.
    max_concurrency: int = _knob(
        "OPENAI_MAX_CONCURRENCY", 3, "requests", "requests in flight, at most", ge=1, le=10**5, paceline=20
    )
    stagger_seconds: float = _knob(
        "OPENAI_STAGGER_SECONDS", 15.0, "s", "time between two launches", ge=0, le=3_600, paceline=0.2
    )
    tpm_limit: int = _knob(
        "OPENAI_TPM_LIMIT", 30_000, "tokens/min", "tokens per minute that the provider grants", ge=1, le=10**12
    )
    tpm_headroom: float = _knob("OPENAI_TPM_HEADROOM", 0.15, "ratio", "share of each limit left unused", ge=0, lt=1)
    est_tokens_per_run: int = _knob(
        "OPENAI_EST_TOKENS_PER_RUN", 7_000, "tokens", "reserved per run if nothing better is known", ge=1, le=10**9
    )
    retry_max_attempts: int = _knob(
        "OPENAI_RETRY_MAX_ATTEMPTS", 5, "attempts", "attempts in all, the first included", ge=1, le=100, paceline=8
    )
    backoff_base_seconds: float = _knob(
        "OPENAI_BACKOFF_BASE_SECONDS", 2.0, "s", "first backoff, doubling from there; Retry-After wins", gt=0, le=3_600
    )
    finalize_lowers_concurrency: bool = _knob(
        "FINALIZE_LOWERS_CONCURRENCY", True, "", "while a finalize pass is open, its lower concurrency cap holds"
    )

    # The knobs beyond the guardrails.
    tpm_window: Literal["fixed", "sliding", "bucket"] = _knob(
        "OPENAI_TPM_WINDOW", "fixed", "", "anchored minutes, the last 60 s, or continuous refill", paceline="bucket"
    )
    burst_seconds: float = _knob(
        "OPENAI_BURST_SECONDS", 60.0, "s", "what a bucket holds, as seconds of its refill", gt=0, le=60
    )
    charge_rule: Literal["fixed", "prompt_chars4", "prompt_plus_max", "max_of", "responses", "auto", "learned"] = _knob(
        "OPENAI_CHARGE_RULE", "fixed", "", "what is reserved: the estimate per run, or by request", paceline="auto"
    )
    settle: bool = _knob("OPENAI_SETTLE", False, "", "book real use on completion; right where the provider does so")
    launch_order: Literal["fifo", "longest_first"] = _knob(
        "OPENAI_LAUNCH_ORDER", "fifo", "", "new work as submitted, or by expected length", paceline="longest_first"
    )
    backoff_keeps_permit: bool = _knob(
        "OPENAI_BACKOFF_KEEPS_PERMIT", True, "", "a request that backs off keeps its place in flight", paceline=False
    )
    hold_on_throttle: bool = _knob(
        "OPENAI_HOLD_ON_THROTTLE", False, "", "a 429 holds all launches for its Retry-After or a backoff", paceline=True
    )
    sync_headers: bool = _knob(
        "OPENAI_SYNC_HEADERS", False, "", "x-ratelimit-* headers correct our budget", paceline=True
    )
    refund_throttled: bool = _knob(
        "OPENAI_REFUND_THROTTLED", False, "", "a 429 gives its reservation back; right if refusals are not charged"
    )
    interactive_reserve: float = _knob(
        "OPENAI_INTERACTIVE_RESERVE", 0.0, "ratio", "share of each limit that batch work leaves free", ge=0, lt=1
    )
    rpm_limit: int = _knob(
        "OPENAI_RPM_LIMIT", 0, "requests/min", "requests per minute that are granted; 0 = no limit", ge=0, le=10**9
    )
    rpd_limit: int = _knob(
        "OPENAI_RPD_LIMIT", 0, "requests/day", "requests per day that are granted; 0 = no limit", ge=0, le=10**12
    )
    tpd_limit: int = _knob(
        "OPENAI_TPD_LIMIT", 0, "tokens/day", "tokens per day that are granted; 0 = no limit", ge=0, le=10**15
    )
    find_limits: Literal["none", "tokens", "requests", "both"] = _knob(
        "OPENAI_FIND_LIMITS",
        "none",
        "",
        "limits per minute that nobody knows: found from refusals, whatever the limits above say",
    )
    batch_queue_tokens: int = _knob(
        "OPENAI_BATCH_QUEUE_TOKENS",
        0,
        "tokens",
        "input tokens per model that the Batch API's queue takes; 0 = as it says itself",
        ge=0,
        le=10**12,
    )
    jitter_ratio: float = _knob(
        "OPENAI_JITTER_RATIO", 0.2, "ratio", "jitter: share of a stagger (+-) or of a backoff (+)", ge=0, le=1
    )
    jitter_cap_seconds: float = _knob("OPENAI_JITTER_CAP_SECONDS", 3.0, "s", "jitter, at most", ge=0, le=3_600)
    backoff_cap_seconds: float = _knob("OPENAI_BACKOFF_CAP_SECONDS", 60.0, "s", "one backoff, at most", gt=0, le=86_400)
    retry_after_cap_seconds: float = _knob(
        "OPENAI_RETRY_AFTER_CAP_SECONDS",
        600.0,
        "s",
        "longest Retry-After that is obeyed; a 429 above it ends its request, three in a row the run",
        gt=0,
        le=31_536_000,
    )
    request_timeout_seconds: float = _knob(
        "OPENAI_REQUEST_TIMEOUT_SECONDS", 600.0, "s", "time to wait for an answer", gt=0, le=86_400
    )
    deadline_seconds: float = _knob(
        "OPENAI_DEADLINE_SECONDS",
        0.0,
        "s",
        "from a request's first launch to giving up; 0 = never",
        ge=0,
        le=31_536_000,
    )
    finalize_max_concurrency: int = _knob(
        "FINALIZE_MAX_CONCURRENCY", 2, "requests", "in flight at most while a finalize pass is open", ge=1, le=10**5
    )
    finalize_max_tokens: int = _knob(
        "FINALIZE_MAX_TOKENS", 6_000, "tokens", "output tokens of a finalize pass", ge=1, le=10**9
    )
    preflight_mode: Literal["strict", "paced"] = _knob(
        "PREFLIGHT_MODE", "paced", "", "refuse what exceeds one minute's budget, or only what can never run or finish"
    )

    # The dimensions of the provider's profile, in place of the guardrails' four; not a knob, see `with_quota`.
    quota: tuple[Limited, ...] = Field(default=(), exclude=True)

    @model_validator(mode="wrap")
    @classmethod
    def _one_line_errors(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(by_field(data) if isinstance(data, dict) else data)
        except ValidationError as error:
            raise _bad_setting(error) from None

    @classmethod
    def preset(cls, name: str) -> Policy:
        """Return the preset of that name: `guardrails` (the defaults) or `paceline`, a starting point without a plan.

        The 200 requests of examples/batch.jsonl take 2,986 s under the guardrails' pace and 392 s under the preset's
        (30,000 tokens per minute; 55 s at 450,000), without a 429. Where the provider grants half of what it is
        believed to grant and states no counts, 8 attempts lose no request; 5 lose 6 of 1,600.
        """
        if name == "guardrails":
            return cls()
        if name == "paceline":
            return cls(**{k.name: k.paceline for k in KNOBS if k.paceline != k.guardrails})  # type: ignore[arg-type]
        raise BadSetting(f"there is no preset {name!r}: guardrails or paceline")

    @classmethod
    def from_env(cls, environment: Mapping[str, str | None], base: Policy | None = None) -> Policy:
        """Return `base` (else the defaults) overlaid with the knobs that an environment or a parsed env file names.

        Foreign names are ignored, and an empty value counts as absent. Raise BadSetting for a value that is not allowed
        and for a near-miss of one of our names.
        """
        for env in environment:
            meant = near_miss(env)
            if meant:
                # Do not show the value: only the name is nearly ours, the value may be a secret.
                raise BadSetting(f"there is no setting {shown(env)}: did you mean {meant}?", env)
        changes: dict[str, Value] = {}
        for knob in KNOBS:
            text = environment.get(knob.env)
            if text is not None and text.strip():
                changes[knob.name] = knob.parsed(text)
        return (base or cls()).with_(**changes)

    def set_values(self, assignments: Iterable[str]) -> Policy:
        """Return this policy overlaid with `NAME=VALUE` words (a command line's `--set`); the last of equal names wins.

        Raise BadSetting for a value that is not allowed and for any unknown name: here none can be foreign.
        """
        changes: dict[str, Value] = {}
        for assignment in assignments:
            env, equals, text = assignment.partition("=")
            knob = knob_named(env.strip())
            if knob is None:
                raise BadSetting(f"there is no setting {shown(env)}{_suggestion(env)}", env)
            if not equals or not text.strip():
                raise BadSetting(f"{knob.env} was given no value: write {knob.env}=VALUE, {knob.allowed}", knob.env)
            changes[knob.name] = knob.parsed(text)
        return self.with_(**changes)

    def with_(self, **changes: Value) -> Policy:
        """Return this policy with some knobs changed, and checked again.

        A knob goes by its Python name, by that with `_s` for `_seconds`, or by its environment name: `stagger_s=5` is
        `stagger_seconds=5` is `OPENAI_STAGGER_SECONDS=5`. Raise BadSetting for any other name, and for a knob given
        twice.
        """
        named: dict[str, Value] = {name: getattr(self, name) for name in self.model_fields_set}
        return Policy.model_validate(named | by_field(changes))

    def with_quota(self, quota: tuple[Limited, ...]) -> Policy:
        """Return this policy over the dimensions of a profile (`governor.profiles.quotas`), () = the guardrails' four.

        Limits of tokens and requests per minute and per day that are named as knobs hold where the profile has such a
        dimension. Windows, weights and settling are the profile's.
        """
        return self if quota == self.quota else self.model_copy(update={"quota": quota})

    def believing(self, tpm: float = 0.0, rpm: float = 0.0) -> Policy:
        """Return this policy with limits instead of a search: these per minute if they are known (0 = not).

        For limits that are not, the settings' own stand, as an assumption.
        """
        if self.find_limits == "none":
            return self
        known = {"tpm_limit": round(tpm), "rpm_limit": round(rpm)}
        return self.model_copy(update={name: n for name, n in known.items() if n} | {"find_limits": "none"})

    @property
    def weights(self) -> Weights:
        """Return what a request and its tokens take of the dimensions."""
        return weights_of(self.quota)

    @property
    def places(self) -> dict[str, int]:
        """Return the places of the dimensions in the law's arrays, by name."""
        return {each.name: each.place for each in self.quota} or STANDARD

    def to_env(self, old: Policy | None = None, *, everything: bool = False) -> str:
        """Return this policy as the text of an env file, our names only; `from_env` of it gives an equal policy.

        The text holds the knobs that differ from the guardrails default or from `old` and those that were named; with
        `everything`, all of them. A value that differs from `old` has the old value beside it as a comment.
        """
        blocks = []
        for knob in KNOBS:
            value = getattr(self, knob.name)
            before = value if old is None else getattr(old, knob.name)
            named = everything or knob.name in self.model_fields_set
            if named or value != knob.guardrails or before != value:
                lines = [f"# {knob.meaning}: {knob.allowed}"]
                if before != value:
                    lines.append(f"# was: {knob.text(before)}")
                blocks.append("\n".join([*lines, f"{knob.env}={knob.text(value)}\n"]))
        return "\n".join(blocks)

    def params(self) -> Params:
        """Return the numbers that the law works on. The headroom applies to each limit, daily ones included."""
        return params_of(self)


# ---------------------------------------------------------------- the table of knobs, derived from the model


def _knobs() -> tuple[Knob, ...]:
    """Return the table's rows, in the order of the fields."""
    rows = []
    for name, schema in Policy.model_json_schema()["properties"].items():
        if "env" not in schema:
            continue
        rows.append(
            Knob(
                name=name,
                env=schema["env"],
                unit=schema["unit"],
                meaning=schema["description"],
                kind=schema["type"],
                guardrails=schema["default"],
                paceline=schema["paceline"],
                choices=tuple(schema.get("enum", ())),
                low=schema.get("minimum", schema.get("exclusiveMinimum", 0)),
                high=schema.get("maximum", schema.get("exclusiveMaximum", 0)),
                low_open="exclusiveMinimum" in schema,
                high_open="exclusiveMaximum" in schema,
            )
        )
    return tuple(rows)


# States further limits of the profile: ITPM=30000,OTPM=8000, or tier=NAME.
LIMITS = "PACELINE_LIMITS"
KNOBS = _knobs()
KNOB_BY_ENV = {knob.env: knob for knob in KNOBS}
KNOB_BY_NAME = {knob.name: knob for knob in KNOBS}
# Programs name knobs with `_s` for the unit, as everywhere outside the env files.
KNOB_BY_SHORT_NAME = {knob.name.replace("_seconds", "_s"): knob for knob in KNOBS}
# The knobs that a deployment running the guardrails can change today, without new code.
GUARDRAIL_KNOBS = KNOBS[:8]


def knob_named(name: str) -> Knob | None:
    """Return the knob of that field, short or environment name; None if there is none."""
    return KNOB_BY_NAME.get(name) or KNOB_BY_SHORT_NAME.get(name) or KNOB_BY_ENV.get(name)


def by_field(changes: Mapping[str, Value]) -> dict[str, Value]:
    """Return changes under the names of the fields, however they were named (see `Policy.with_`), values unchanged."""
    found: dict[str, Value] = {}
    for name, value in changes.items():
        knob = knob_named(name)
        if knob is not None and knob.name in found:
            raise BadSetting(f"{knob.env} is given twice, once as {name}", knob.env)
        found[name if knob is None else knob.name] = value
    return found


def knob_table() -> str:
    """Return the README's table of knobs as markdown."""
    lines = ["| env name | guardrails | paceline | allowed | meaning |", "|---|---|---|---|---|"]
    for k in KNOBS:
        lines.append(f"| {k.env} | {k.text(k.guardrails)} | {k.text(k.paceline)} | {k.allowed} | {k.meaning} |")
    return "\n".join(lines) + "\n"


def _bad_setting(error: ValidationError) -> BadSetting:
    """Return the first of pydantic's complaints as a BadSetting."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    knob = KNOB_BY_NAME.get(name)
    if knob is None:
        if not name:
            return BadSetting("a policy is a mapping of settings to values")
        ours = {knob.name: short for short, knob in KNOB_BY_SHORT_NAME.items()}
        # A name that carries a unit means the knob whose name has one of ours.
        meant = near_miss(name) if name.isupper() else None
        near_by = [meant] if meant else difflib.get_close_matches(name.lower(), [*ours.values(), *ours], 1)
        close = [f": did you mean {near}?" for near in near_by]
        return BadSetting(f"there is no setting {shown(name)}{''.join(close)}", name)
    value = first["input"]
    return knob.refused(knob.text(value) if isinstance(value, bool | int | float) else value)


def near_miss(env: str) -> str | None:
    """Return the name of ours that `env` was probably meant to be; None for a name that is ours or foreign."""
    return nearest(env, (*KNOB_BY_ENV, LIMITS))


def _suggestion(env: str) -> str:
    """Return the hint for a name that must be ours and is not."""
    meant = near_miss(env)
    close = [meant] if meant else difflib.get_close_matches(env.strip().upper(), KNOB_BY_ENV, 1, 0.6)
    return f": did you mean {close[0]}?" if close else "; `paceline settings` lists them all"

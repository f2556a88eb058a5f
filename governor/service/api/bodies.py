"""Request and response bodies, as OpenAPI describes them. Outside input is checked here and nowhere else."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from governor.model.requests import URLS

_Endpoint = Literal["/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/completions"]
assert _Endpoint.__args__ == URLS  # type: ignore[attr-defined]

_Value = bool | int | float | Annotated[str, Field(max_length=100)]
Settings = Annotated[
    dict[str, _Value], Field(max_length=100, description="Settings by their environment names.", examples=[{}])
]
# The deepest nesting of a request sent on to the provider.
DEPTH_MOST = 100


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return the value. Raise ValueError for one that could be read, but never sent on or shown again."""
    waiting: list[tuple[Any, int]] = [(value, 1)]
    for each, depth in waiting:
        if depth > DEPTH_MOST:
            raise ValueError(f"nested more than {DEPTH_MOST} deep")
        if isinstance(each, dict):
            waiting += [(name, depth) for name in each] + [(inner, depth + 1) for inner in each.values()]
        elif isinstance(each, list):
            waiting += [(inner, depth + 1) for inner in each]
        elif isinstance(each, float) and not math.isfinite(each):
            raise ValueError("a number that is not finite: JSON has none")
        elif isinstance(each, str) and not each.isascii():
            try:
                each.encode()
            except UnicodeEncodeError:
                raise ValueError("a text with half of a surrogate pair: no text in UTF-8") from None
    return value


Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
# A batch's name, for people; no control characters.
BatchName = Annotated[
    str, Field(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$", description="What the batch is called, for people.")
]
Via = Annotated[
    Literal["live", "batch", "auto"],
    Field(
        description="live: calls as the limits allow; batch: the Batch API, at half the price, within a day; auto: "
        "the cheapest mix of both that is done by finish_by."
    ),
]
FinishByText = Annotated[
    str, Field(max_length=100, description="When it must be done, for via=auto: 06:00, 06:00Z or 6h; else in a day.")
]
DEADLINE = Field(None, gt=0, le=1e9, description="Seconds from now in which the last answer must be there.")


class In(BaseModel):
    """A request body: unknown fields and infinities are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Out(BaseModel):
    """A response body."""

    model_config = ConfigDict(extra="allow")


# ---------------------------------------------------------------- templates


class Template(In):
    """A prompt with fields to fill in, and how it is sent."""

    name: str = Field(min_length=1, max_length=200)
    model: str = Field(min_length=1, max_length=200)
    prompt: str = Field(
        min_length=1,
        max_length=200_000,
        description='Text with {{ field }} or {{ field.inner }}; {{ "{{" }} is braces.',
    )
    endpoint: _Endpoint = "/v1/chat/completions"
    parameters: Plain = Field(
        default_factory=dict, max_length=50, description="Further fields of the request, such as temperature."
    )
    max_output_tokens: int | None = Field(None, ge=1, le=10**9)


class TemplateOut(Out):
    """A version of a template."""

    template_id: str
    version: int
    name: str
    model: str
    prompt: str
    endpoint: str
    parameters: dict[str, Any]
    max_output_tokens: int | None
    created_at: float = Field(description="When this version was made, seconds since 1970.")
    created_by: str


class TemplateList(Out):
    """Templates, by id. `next`: the id after which the next page begins."""

    templates: list[TemplateOut]
    next: str | None = None


class TemplateVersions(Out):
    """Every version of a template, the oldest first."""

    versions: list[TemplateOut]


# ---------------------------------------------------------------- batches


class BatchRun(In):
    """Inputs for a template; each becomes `runs` requests."""

    inputs: list[Plain] = Field(min_length=1, max_length=200_000)
    runs: int = Field(1, ge=1, le=100_000, description="Requests per input.")
    deadline_s: float | None = DEADLINE
    finalize: bool = Field(False, description="Finish answers cut off without text by one more call.")
    settings: Settings = Field(default_factory=dict)
    name: BatchName = ""
    via: Via = "live"
    finish_by: FinishByText = ""


class VerdictOut(Out):
    """The verdict on a batch: whether it may start."""

    ok: bool
    code: str
    reason: str
    pool: str
    projected_tokens: int
    budget_tokens: int
    in_use_tokens: int
    suggested_wait_s: int | None
    retryable: bool
    max_runs_now: int
    forecast_finish_s: float | None
    forecast_by: str
    forecast_bound: str


class Accepted(Out):
    """A batch that will run."""

    batch_id: str
    state: str
    requests: int
    forecast_finish_s: float | None = Field(description="Seconds from now; null = unknown.")
    forecast_by: str = Field(
        description="simulation; fluid: a rough estimate; turnaround: of the Batch API, measured or assumed."
    )
    forecast_bound: str = Field(description="The setting that holds it back.")


class WaveOut(Out):
    """One file at the Batch API. `total`, `completed`, `failed`: requests, by the provider's count."""

    wave: int = Field(description="From 1.")
    pool: str
    model: str
    stage: str = Field(description="planned, uploaded, submitted, ended, collected or closed, as far as is on record.")
    status: str = Field(description="The provider's, such as in_progress; empty before its first answer.")
    requests: int
    total: int
    completed: int
    failed: int
    provider_id: str = Field(description="The provider's id of the batch.")
    message: str = Field(description="Why it failed or was cancelled.")


class BatchOut(Out):
    """A batch as it stands."""

    batch_id: str
    name: str = Field(description="What it is called, for people; may be empty.")
    state: str = Field(description="queued, running, paused, stopped, cancelling, cancelled or completed.")
    reason: str = Field(description="Why it is stopped.")
    requests: int
    done: int
    failed: int
    in_flight: int
    pending: int
    attempts: int
    throttled: int
    resent: int = Field(description="In flight when a process died, and sent again.")
    eta_s: float | None = Field(description="Seconds until the last answer; null = unknown, or held.")
    forecast_finish_s: float | None = Field(description="What was forecast when it was accepted, seconds from then.")
    created_at: float
    ended_at: float | None
    created_by: str
    template_id: str | None
    template_version: int | None
    deadline_s: float | None
    finalize: bool
    via: str = Field(description="live, batch or auto.")
    finish_by: float | None = Field(description="Of via=auto, seconds since 1970.")
    waves: list[WaveOut] = Field(description="The latest files at the Batch API.")
    settings: dict[str, str]
    pools: list[str]


class BatchList(Out):
    """Batches, newest first. `next`: the value of `before` for the next page."""

    batches: list[BatchOut]
    next: int | None = None


# ---------------------------------------------------------------- settings


class SettingsChange(In):
    """Settings to change, by name; null takes one back to what the service was started with."""

    settings: dict[str, _Value | None] = Field(min_length=1, max_length=100)
    pool: str = Field("", max_length=64, description="Which pool; may be left out where there is one.")


class ChangeOut(Out):
    """One change: name -> [before, after]."""

    at: float
    who: str
    pool: str
    changes: dict[str, list[str | None]]


class SettingsOut(Out):
    """The policy in force."""

    pool: str
    settings: dict[str, Any]
    pools: dict[str, dict[str, Any]]
    changes: list[ChangeOut] = Field(description="The latest ones, newest first.")


# ---------------------------------------------------------------- what-if


class Shape(In):
    """A batch described by its numbers: so many equal requests."""

    requests: int = Field(ge=1, le=100_000)
    prompt_tokens: int = Field(ge=1, le=10**7)
    max_output_tokens: int | None = Field(None, ge=1, le=10**7)
    output_tokens: int | None = Field(None, ge=0, le=10**7, description="What answers have; null = assumed.")
    model: str = Field("gpt-4o-mini", min_length=1, max_length=200)


class WhatIf(In):
    """Which batch, and which settings. Exactly one of `batch_id`, `lines` and `shape`."""

    batch_id: str | None = Field(None, pattern="^[a-z]+_[0-9a-f]{1,64}$")
    lines: list[dict[str, Any]] | None = Field(
        None, min_length=1, max_length=100_000, description="Requests in the batch format."
    )
    shape: Shape | None = None
    settings: Settings = Field(default_factory=dict)
    pool: str = Field("", max_length=64)
    runs: int = Field(0, ge=0, le=200, description="Simulated runs per setting; 0 = as many as are quick.")
    seed: int = Field(0, ge=0, le=2**31)


class Bands(Out):
    """The course of a batch over simulated runs: quantiles of when each share of it is done."""

    finish_s: dict[str, float] = Field(description="p5, p50 and p95.")
    throttled: dict[str, float]
    failed: float
    waits_s: dict[str, float] = Field(description="Mean over the runs, by cause.")
    bound: str
    efficiency: float | None
    milestones: list[dict[str, float]] = Field(description="share, p5_s, p50_s, p95_s.")
    settings: dict[str, Any]


class WhatIfOut(Out):
    """Today's settings and those asked about, on the same batch under the same chances."""

    requests: int
    runs: int
    took_ms: float
    today: Bands
    proposed: Bands
    changes: dict[str, list[str]]


# ---------------------------------------------------------------- the rest


class ErrorContent(Out):
    """The error."""

    code: str
    message: str
    details: dict[str, Any]


class ErrorOut(Out):
    """Every answer with a status from 400 on."""

    error: ErrorContent


class Health(Out):
    """`ok`, or the fault."""

    status: str
    detail: str = ""


class Live(Out):
    """The live state of this replica."""

    at: float
    pools: list[dict[str, Any]]
    batches: list[BatchOut]
    replicas: int

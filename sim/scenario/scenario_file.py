"""The written form of a scenario: its workload's source, its YAML document, and how both are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, TypedDict

from pydantic import Field, model_validator

from governor.model.errors import BadInput, BadSetting
from governor.model.estimate import TOKENS_PER_FILE, kind_of
from governor.model.files import parsed_yaml
from governor.model.policy import KNOB_BY_ENV, Policy
from sim.base.arguments import Config, checked
from sim.model.provider_config import ProviderConfig
from sim.model.provider_tiers import DEFAULT_TIER
from sim.model.synthetic import CAP_ASSUMED, parametric, redrawn
from sim.model.workload import TOKENS_MAX, Workload
from sim.scenario.readers import Source, read_workload

Quantiles = Annotated[tuple[float, float], Field(strict=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Cap = Annotated[int, Field(ge=-1, le=TOKENS_MAX)]


class FileSource(Config):
    """A workload in a file (`-`: standard input) and how to read it; see `read_workload` for the options.

    `draw`: number of requests drawn from the file's, in stretches of `block_s` seconds (see `redrawn`); 0 = its own
    rows. `provenance`: kept for rows saved from standard input, since the saved file no longer shows it.
    """

    path: Annotated[str, Field(min_length=1)]
    columns: dict[str, str] = Field(default_factory=dict)
    outputs_from: str = ""
    output_tokens: Quantiles | None = None
    max_tokens: Cap | None = None
    first: Annotated[int, Field(ge=0)] = 0
    file_tokens: Annotated[int, Field(ge=0, le=TOKENS_MAX)] = TOKENS_PER_FILE
    seed: Seed = 0
    draw: Annotated[int, Field(ge=0, le=10**8)] = 0
    block_s: Annotated[float, Field(gt=0, le=10**9)] = 60.0
    provenance: dict[str, Annotated[tuple[str, str], Field(strict=False)]] = Field(default_factory=dict)

    def load(self, opened: Source | None = None) -> Workload:
        """Read the workload, from `opened` if its bytes were read already."""
        workload = read_workload(
            opened or Source.open(self.path),
            columns=self.columns,
            outputs_from=self.outputs_from or None,
            output_tokens=self.output_tokens,
            max_tokens=self.max_tokens,
            first=self.first,
            seed=self.seed,
            file_tokens=self.file_tokens,
        )
        if self.provenance:
            workload = replace(workload, provenance=dict(self.provenance))
        return redrawn(workload, self.draw, self.block_s, self.seed) if self.draw else workload

    def moved(self, move: Callable[[str], str]) -> FileSource:
        """Return this source with its paths rewritten by `move`."""
        changes = {"path": self.path if self.path == "-" else move(self.path)}
        if self.outputs_from:
            changes["outputs_from"] = move(self.outputs_from)
        return self.model_copy(update=changes)


class ModelSource(Config):
    """A workload drawn from a model: see `parametric`."""

    requests: Annotated[int, Field(ge=1, le=10**8)]
    prompt_tokens: Quantiles
    output_tokens: Quantiles
    max_tokens: Cap = CAP_ASSUMED
    arrival_rate_per_s: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    seed: Seed = 0

    @model_validator(mode="after")
    def _quantiles_in_order(self) -> Self:
        for name in ("prompt_tokens", "output_tokens"):
            p50, p95 = getattr(self, name)
            if not 1.0 <= p50 <= p95 <= TOKENS_MAX:
                raise ValueError(f"{name} [{p50:g}, {p95:g}] must be P50 and P95 from 1 up, P95 not below P50")
        return self

    def load(self, opened: Source | None = None) -> Workload:
        """Draw the workload."""
        return parametric(
            self.requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            max_tokens=self.max_tokens,
            arrival_rate_per_s=self.arrival_rate_per_s,
            seed=self.seed,
        )

    def moved(self, move: Callable[[str], str]) -> ModelSource:
        """Return this source unchanged: it has no paths."""
        return self


class Document(Config):
    """The YAML form of a scenario; its parts are checked one by one, each under its own name.

    `plan`: the options of a plan of this scenario, read by `sim.app.inputs`; they do not affect any run.
    """

    workload: dict[str, Any]
    provider: str | dict[str, Any] = DEFAULT_TIER
    policy: str | dict[str, Any] = "guardrails"
    seed: Seed = 0
    replications: Annotated[int, Field(ge=0, le=10**6)] = 0
    arrivals: Literal["batch", "trace"] = "batch"
    finalize: bool = False
    skip_oversized: bool = False
    plan: dict[str, Any] = Field(default_factory=dict)


# ---------------------------------------------------------------- policy


def policy_of(stated: str | dict[str, Any]) -> Policy:
    """Return the policy that a scenario states: a preset's name, or our environment names with values and `preset`.

    Raise BadSetting for an unknown name: unlike an environment, a scenario holds no foreign names.
    """
    if isinstance(stated, str):
        return Policy.preset(stated)
    names = dict(stated)
    preset = names.pop("preset", "guardrails")
    if not isinstance(preset, str):
        raise BadSetting(f"policy.preset is {kind_of(preset)}, not guardrails or paceline", "policy.preset")
    words = []
    for env, value in names.items():
        if not isinstance(value, str | int | float):
            raise BadSetting(f"policy.{env} is {kind_of(value)}, not a value", f"policy.{env}")
        knob = KNOB_BY_ENV.get(env)
        words.append(f"{env}={knob.text(value) if knob else ''}")
    return Policy.preset(preset).set_values(words)


# ---------------------------------------------------------------- YAML


# ---------------------------------------------------------------- how inputs are read


class Reading(TypedDict, total=False):
    """Keywords with which a program states how rows, settings and a provider are read: the command line's options.

    `env_file`: today's settings; of several files the last wins, and the process's environment is never read. `tpm`,
    `rpm`: limits that the provider grants per minute (0 = no limit); the settings' own limits follow unless stated.
    `provider_charge`: the provider's charge rule; `provider_settles`: whether real use replaces the charge. `latency`:
    a measured model's name, or "S,S" for seconds to the first token and per token. `columns`: role -> column of a trace
    (prompt, output, arrival, max_tokens, latency, id, model). `outputs_from`: old results that supply answer lengths;
    `output_tokens`: P50 and P95 of answer lengths. `max_tokens`: the output cap that every row of a trace declares,
    -1 = none. `first`: read only this many rows. `file_tokens`: tokens assumed for each file and the like that a
    request only points to.
    """

    env_file: str | Path | Sequence[str | Path] | None
    tpm: int | None
    rpm: int | None
    provider_charge: Literal["auto", "prompt_chars4", "prompt_plus_max", "max_of", "responses", "fixed"] | None
    provider_settles: bool | None
    latency: str | None
    columns: Mapping[str, str] | None
    outputs_from: str | Path | None
    output_tokens: tuple[float, float] | None
    max_tokens: int | None
    first: int
    file_tokens: int | None


class Frame(Protocol):
    """A table with named columns, such as a pandas DataFrame."""

    def to_csv(self, path_or_buf: None = ..., *, index: bool = ...) -> str: ...


Requests = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Frame


def named_provider(name: str, profile: str = "") -> ProviderConfig:
    """Return a published tier by name, or the provider in a YAML file: its own keys, or those of a scenario.

    `profile`: the name or file of the profile that holds where the file states none; its tiers are known, too.
    """
    stated = {"profile": profile} if profile else {}
    if not (name.lower().endswith((".yaml", ".yml")) or os.sep in name or os.path.exists(name)):
        return checked(ProviderConfig, {**stated, **({"preset": name} if name else {})}, "provider")
    source = Source.open(name)
    with source.stream() as stream:
        data = parsed_yaml(stream.read().decode("utf-8-sig", errors="replace"), source.name)
    try:
        provider = data.get("provider", data)
        return checked(ProviderConfig, {**stated, **provider} if isinstance(provider, dict) else provider, "provider")
    except BadSetting as error:
        raise BadInput(str(error), source.name) from None


def latency_of(text: str) -> str | dict[str, float]:
    """Return a measured model's name unchanged, or `S,S_PER_TOKEN` as the fields of a latency."""
    words = text.split(",")
    if len(words) == 1:
        return text
    try:
        first_token_s, per_token_s = (float(word) for word in words)
    except ValueError:
        raise BadSetting(
            f"--latency {text!r} is neither a measured model nor seconds to the first token and per token (0.6,0.008)"
        ) from None
    return {"first_token_s": first_token_s, "per_token_s": per_token_s}

"""The written form of a scenario: where its workload comes from, its YAML document, and the reading of both."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.estimate import TOKENS_PER_FILE, kind_of
from governor.model.policy import KNOB_BY_ENV, Policy
from sim.model.presets import DEFAULT_TIER
from sim.model.provider_config import Config
from sim.model.workload import CAP_ASSUMED, TOKENS_MAX, Workload, parametric, redrawn
from sim.scenario.readers import Source, read_workload

Quantiles = Annotated[tuple[float, float], Field(strict=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Cap = Annotated[int, Field(ge=-1, le=TOKENS_MAX)]


class FileSource(Config):
    """A workload in a file (`-`: standard input) and how to read it; see `read_workload` for the options.

    `draw`: so many requests drawn from the file's, in stretches of `block_s` seconds (see `redrawn`); 0 = its own rows.
    `provenance`: that of rows saved from standard input, whose own file no longer tells.
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
        """Reads the workload, from `opened` where its bytes are at hand already."""
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
        """The same with other paths to the same files."""
        changes = {"path": self.path if self.path == "-" else move(self.path)}
        if self.outputs_from:
            changes["outputs_from"] = move(self.outputs_from)
        return self.model_copy(update=changes)


class ModelSource(Config):
    """A workload that is drawn: see `parametric`."""

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
        """Draws the workload."""
        return parametric(
            self.requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            max_tokens=self.max_tokens,
            arrival_rate_per_s=self.arrival_rate_per_s,
            seed=self.seed,
        )

    def moved(self, move: Callable[[str], str]) -> ModelSource:
        """Has no paths."""
        return self


class Document(Config):
    """The YAML form; its parts are checked one by one, each under its own name.

    `plan`: what a plan of it was asked for, which is `sim.app.inputs`'s to read and changes no run.
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
    """The policy that a scenario states: a preset's name, or our environment names with values, `preset` among them.

    BadSetting for a name that is not ours: in a scenario none can be foreign.
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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that stands twice is an error: one of the two values would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{quoted(key.value)} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            # A scalar that only looks like a date or a number: PyYAML would not say where.
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def parsed_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping that a YAML text holds. BadInput names the line where the text is not YAML."""
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"not YAML: {problem}", name, mark.line + 1 if mark else 0) from None
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
        raise BadInput(f"not YAML that can be read: {error}".splitlines()[0], name) from None
    if not isinstance(data, dict):
        raise BadInput(f"{kind_of(data)} where a scenario should be (workload:, provider:, policy:, ...)", name)
    for key in data:
        if not isinstance(key, str):
            raise BadInput(f"{quoted(key)} is not a key of a scenario", name)
    return data

"""A forecast's assumptions on the provider and the answers: those of a plan, of an earlier forecast, or defaults.

A plan writes its assumptions into its scenario file, and every forecast of the same batch reads them there, so that one
batch has one forecast. Without a scenario the provider grants and charges as the settings state, and answers have the
default assumed lengths.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.forecast.forecast import Outlook
from governor.model.errors import BadInput, BadSetting
from governor.model.estimate import EMBEDDINGS, Sizes
from governor.model.files import parsed_yaml
from governor.model.policy import Policy
from governor.profiles.loader import habits_of
from governor.profiles.quotas import SLICE
from sim.base.arguments import checked
from sim.model.provider_config import ProviderConfig
from sim.model.provider_tiers import SNAPSHOT, latency_lines
from sim.model.synthetic import from_tokens, similar_outputs, with_outputs_assumed, with_outputs_drawn
from sim.model.windows import MINUTE_S
from sim.model.workload import ASSUMED, Workload
from sim.scenario.readers import BATCH, SCENARIO, Source
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import FileSource
from sim.scenario.unknowns import Unknowns

# In a larger batch no single drawn answer matters, so the plan's file need not be read for them.
BATCH_BYTES_MOST = 20 * 2**20


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Assumptions. `provider`: None = as the settings state. `answers`: P50 and P95 of their tokens, None = not stated.

    `rows`: the scenario's requests with their answers, measured ones (a log's, old results') or, with `is_drawn`, those
    that the plan drew. `path`: the scenario file, "" = none. `unknowns`: what its plan took for unknown.
    `profile`: the name or file of the pool's, "" = OpenAI's; a stated provider has its own.
    """

    provider: ProviderConfig | None = None
    answers: tuple[float, float] | None = None
    rows: Workload | None = None
    is_drawn: bool = False
    path: str = ""
    unknowns: Unknowns = field(default_factory=Unknowns)
    profile: str = ""

    def provider_for(self, policy: Policy, models: NDArray[Any]) -> ProviderConfig:
        """Return the provider of these requests, whose models have shape (requests,)."""
        return self.provider or believed_provider(policy, models, self.profile)

    def answered(self, workload: Workload, seed: int) -> Workload:
        """Return the requests with answers: known ones as recorded, the rest drawn."""
        if self.rows is not None and not self.is_drawn:
            return _answered_like(workload, self.rows, seed)
        if self.answers is not None:
            return with_outputs_drawn(workload, *self.answers, seed)
        return with_outputs_assumed(workload, seed)

    def as_planned(self, workload: Workload) -> Workload | None:
        """Return the requests with the plan's drawn answers; None if it drew none, or planned other requests."""
        if self.rows is None or not self.is_drawn:
            return None
        found = _same_sizes(workload, self.rows)
        return None if (found < 0).any() else workload.with_(output_tokens=self.rows.output_tokens[found])

    def to_json_dict(self) -> dict[str, Any] | None:
        """Return plain values for a journal, which a later forecast reads (`assumptions_of`).

        None if nothing is stated.
        """
        if self.provider is None:
            return None
        answers = self.answers
        if self.rows is not None and not self.is_drawn:
            found = np.quantile(np.maximum(1, self.rows.output_tokens), (0.5, 0.95))
            answers = float(found[0]), float(found[1])
        provider = self.provider.model_dump(mode="json")
        return {"scenario": os.path.abspath(self.path), "provider": provider, "answers": answers and list(answers)}


def assumptions_of(outlook: Outlook) -> Assumptions:
    """Return the pool's scenario's, else the last forecast's, else no assumptions.

    Raise BadInput for a bad scenario.
    """
    if outlook.pool.scenario:
        return scenario_assumptions(outlook.pool.scenario)
    if outlook.assumed is None:
        pool = outlook.pool
        return Assumptions(profile=habits_of(pool.profile, pool.base_url, azure=pool.azure is not None))
    provider = checked(ProviderConfig, outlook.assumed["provider"], "provider")
    with suppress(BadInput):
        # The scenario file holds more about the answers, if it has not changed since the forecast read it.
        found = scenario_assumptions(str(outlook.assumed["scenario"]))
        if found.provider == provider:
            return found
    answers = outlook.assumed["answers"]
    return Assumptions(provider, None if answers is None else (float(answers[0]), float(answers[1])))


def scenario_assumptions(path: str) -> Assumptions:
    """Return the assumptions in a scenario file or a file with only a provider; cached until the file changes."""
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError:
        changed = 0
    return _read(path, changed)


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Assumptions:
    source = Source.open(path)
    if source.kind() != SCENARIO:
        raise BadInput("this is not a scenario (YAML with workload: and provider:, as `paceline plan` writes it)", path)
    with source.stream() as stream:
        data = parsed_yaml(stream.read().decode("utf-8-sig", errors="replace"), path)
    try:
        provider = checked(ProviderConfig, data.get("provider", data), "provider")
    except BadSetting as error:
        raise BadInput(str(error), path) from None
    plan = data.get("plan")
    ranges = plan.get("unknowns") if isinstance(plan, Mapping) else None
    unknowns = checked(Unknowns, ranges or {}, "plan.unknowns")
    told = data.get("workload")
    if not isinstance(told, Mapping):
        return Assumptions(provider, path=path, unknowns=unknowns)
    answers = None
    if told.get("path") and told.get("output_tokens"):
        p50, p95 = told["output_tokens"]
        answers = float(p50), float(p95)
    file = os.path.join(Path(path).parent, str(told["path"])) if told.get("path") else ""
    if file and (not os.path.isfile(file) or (not told.get("outputs_from") and _is_large_batch(file))):
        # A scenario is useful without its rows: the provider is what matters.
        return Assumptions(provider, answers, path=path, unknowns=unknowns)
    scenario = Scenario.read(source)
    is_drawn = isinstance(scenario.source, FileSource) and scenario.provenance()["output tokens"][0] == ASSUMED
    return Assumptions(provider, answers, scenario.workload, is_drawn and not told.get("outputs_from"), path, unknowns)


def _is_large_batch(file: str) -> bool:
    return os.path.getsize(file) > BATCH_BYTES_MOST and Source.open(file).kind() == BATCH


def _same_sizes(workload: Workload, rows: Workload) -> NDArray[np.int64]:
    """Return for each request a row of `rows` with its sizes, in turn if there are several; -1 = none."""
    known: dict[tuple[int, ...], list[int]] = {}
    for i, key in enumerate(_keys(rows)):
        known.setdefault(key, []).append(i)
    seen: dict[tuple[int, ...], int] = {}
    found = np.full(len(workload), -1, np.int64)
    for i, key in enumerate(_keys(workload)):
        if key in known:
            turn = seen[key] = seen.get(key, -1) + 1
            found[i] = known[key][turn % len(known[key])]
    return found


def _answered_like(workload: Workload, rows: Workload, seed: int) -> Workload:
    """Return the workload with answers from rows with the same sizes, else from rows with similar prompts."""
    found = _same_sizes(workload, rows)
    outputs = np.where(found >= 0, np.asarray(rows.output_tokens, np.int64)[found], -1)
    outputs[np.asarray(workload.endpoint) == EMBEDDINGS] = 0
    if (outputs < 0).any():
        both = from_tokens(
            np.concatenate([np.asarray(workload.prompt_tokens), np.asarray(rows.prompt_tokens)]),
            np.concatenate([outputs, np.asarray(rows.output_tokens)]),
            max_tokens=np.concatenate([np.asarray(workload.max_tokens), np.asarray(rows.max_tokens)]),
        )
        outputs = similar_outputs(both, np.asarray(both.output_tokens), seed)[: len(workload)]
    return workload.with_(output_tokens=outputs, recorded_s=np.where(found >= 0, rows.recorded_s[found], -1.0))


def _keys(workload: Workload) -> list[tuple[int, ...]]:
    return list(zip(*(np.asarray(getattr(workload, name)).tolist() for name in Sizes.__slots__), strict=True))


def believed_provider(policy: Policy, models: NDArray[Any], profile: str = "") -> ProviderConfig:
    """Return the provider as the settings state it; `profile`: the name or file of its profile, "" = OpenAI's."""
    names, counts = np.unique(models.astype(str), return_counts=True)
    model = SNAPSHOT.sub("", str(names[counts.argmax()]))
    given: dict[str, Any] = {"latency": model} if model in latency_lines() else {}
    if policy.charge_rule not in ("fixed", "learned"):
        given["charge_rule"] = policy.charge_rule
    if profile:
        given["profile"] = profile
    if policy.settle or not profile:
        given["settles"] = policy.settle
    if policy.tpm_window == "bucket" and policy.burst_seconds < MINUTE_S:
        given["burst_s"] = policy.burst_seconds
    limits: dict[str, Any] = {name: getattr(policy, f"{name}_limit") for name in ("tpm", "rpm", "tpd", "rpd")}
    if policy.quota:
        p = policy.params()
        held = {each.name: p.limit[each.place] for each in policy.quota if not each.name.endswith(SLICE)}
        limits = {name: int(held.pop(name.upper(), 0.0)) for name in limits}
        limits["limits"] = {name: limit for name, limit in held.items() if limit}
    return checked(ProviderConfig, {**limits, **given}, "provider")

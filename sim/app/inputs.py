"""What the options mean together: a workload, a provider, a policy and a seed become one `Scenario`.

Precedence of settings: the guardrails' defaults, then the environment or, where one is named, the env file, then
`--set`. A scenario file stands in place of defaults and environment: it re-runs as it was written, wherever it is run.

Limits. The provider grants what `--tpm` and `--rpm` or its preset or file say; where nothing says it, what the settings
believe is taken for true, and labelled as assumed. The other way round the settings' own limits follow the provider's,
unless the settings name them: in a scenario file they are always named, and follow where they agreed with its provider.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field

from governor.model.env_files import environment_of, policy_of, settings_digest, stated_profile
from governor.model.errors import BadInput, BadSetting
from governor.model.files import parsed_yaml
from governor.model.policy import Policy
from governor.model.pools import BASE_URL, is_name
from governor.profiles.loader import habits_of, read_profile
from sim.app.options import Options, quantiles
from sim.base.arguments import Config, checked
from sim.base.progress import Progress
from sim.des import engines
from sim.experiment.experiment import Pool
from sim.model.provider_config import ProviderConfig
from sim.model.provider_tiers import SNAPSHOT, latency_lines
from sim.model.workload import Workload
from sim.scenario.columns import parse_columns
from sim.scenario.readers import SCENARIO, UNSEEN, Source, is_journal
from sim.scenario.scenario import Scenario, following, limits_moved
from sim.scenario.scenario_file import FileSource, ModelSource, latency_of, named_provider
from sim.scenario.unknowns import Unknowns
from sim.selection.search import Goal

EFFORTS = Literal["quick", "normal", "thorough"]


class PlanOptions(Config):
    """The requirements of a plan: the `plan` section of a scenario file. See `Goal`; `effort` as in `plan`.

    `unknowns`: the ranges that conditions are drawn from. `prices`: a file of prices; "" = the one that comes along.
    `settings_read`: the digest of the settings as they were read, before `--set` and limits were put on top.
    """

    objective: Literal["makespan", "p95_latency"] = "makespan"
    max_throttled_per_100: Annotated[float, Field(ge=0, le=10**6)] = 1.0
    max_lost: Annotated[float, Field(ge=0, le=1)] = 0.0
    finish_by_s: Annotated[float, Field(gt=0, le=10**9)] | None = None
    effort: EFFORTS = "normal"
    prices: str = ""
    unknowns: Unknowns = Unknowns()
    settings_read: Annotated[str, Field(pattern="^([0-9a-f]{16})?$")] = ""

    def goal(self) -> Goal:
        """Return the goal of the search."""
        return Goal(self.objective, self.max_throttled_per_100, self.max_lost, self.finish_by_s)

    def with_given(self, **changes: Any) -> PlanOptions:
        """Return these options with those of the command line that were given (not None) on top."""
        given = {name: value for name, value in changes.items() if value is not None}
        return checked(PlanOptions, {**self.model_dump(), **given}, "plan")


@dataclass(frozen=True, slots=True)
class Inputs:
    """A scenario, what a plan of it is asked for, and what its user should know: one line each."""

    scenario: Scenario
    plan_options: PlanOptions
    notes: tuple[str, ...]


def read_inputs(
    o: Options,
    environment: Mapping[str, str],
    *,
    fit: bool = True,
    opened: Source | None = None,
    settings: Policy | None = None,
    habits: ProviderConfig | Mapping[str, Any] | None = None,
) -> Inputs:
    """Read everything that the options name. Raise BadInput, BadSetting or, as `fitted` does, Oversized.

    Without `fit`, requests that are charged more than the limit stay, unless they are to be left out. `opened`: the
    workload's bytes where they have no file. `settings`: what an env file and `--set` go on top of, in place of the
    defaults or of a scenario file's; `habits`: a provider in place of `--provider`, or some of its keys on top.
    """
    if o.pools:
        raise BadSetting("--pools is for simulate and plan: name one quota's limits with --tpm and --rpm", "--pools")
    stated: Scenario | None = None
    told: tuple[str, ...] = ()
    plan_options = PlanOptions()
    if opened is None and is_journal(o.workload):
        stated, plan_options, told = _of_run(o)
    elif o.pool:
        raise BadSetting(f"--pool is for journals: {o.workload} has no pools", "--pool")
    else:
        opened = opened or Source.open(o.workload)
        if opened.kind() == SCENARIO:
            stated, plan_options = _stated(opened)
    # Before the rows are read: a slip in a setting should show at once.
    as_read = policy_of(
        o.env_file,
        environment=environment if stated is None else {},
        base=settings or (None if stated is None else stated.policy),
    )
    if o.env_file or stated is None:
        plan_options = plan_options.with_given(settings_read=settings_digest(as_read))
    policy = as_read.set_values(o.assignments or ())
    provider = _provider(o, policy, stated, habits, _profile(o, environment if stated is None else {}))
    if stated is None:
        source: FileSource | ModelSource = checked(FileSource, {"path": o.workload, **_row_options(o)}, "")
        workload = source.load(opened)
        provider = _with_latency_of(provider, workload, o, habits)
    else:
        source = _changed_source(stated.source, o)
        workload = stated.workload if source == stated.source else source.load()
    policy = _agreed(policy, provider, stated, o)
    scenario = Scenario(
        source=source,
        workload=workload,
        provider=provider,
        policy=following(policy, provider),
        seed=_first(o.seed, stated.seed if stated else 0),
        replications=_first(o.replications, stated.replications if stated else 0),
        arrivals=_first(o.arrivals, stated.arrivals if stated else "batch"),
        finalize=_first(o.finalize, stated.finalize if stated else False),
    )
    skip = o.skip_oversized or (stated is not None and stated.skip_oversized)
    fitted = scenario.fitted(skip_oversized=skip) if fit or skip else scenario
    # Asked here and not in mid-run: whether the trace has arrivals at all.
    fitted.columns()
    return Inputs(fitted, plan_options, (*told, *_notes(scenario, fitted, o)))


def inputs_of(given: Options, *, fit: bool = True) -> Inputs:
    """Return the inputs that the options and the environment name; see `read_inputs`. Notes name an engine's limits."""
    engines.checked(given.engine)
    inputs = read_inputs(given, os.environ, fit=fit)
    notes = engines.checked(given.engine, learns=inputs.scenario.policy.charge_rule == "learned")
    return replace(inputs, notes=(*inputs.notes, *notes))


def pool_of(given: Options, bar: Progress, foreseen: float = 0.0) -> Pool:
    """Return the workers that the options ask for; `bar` is told of each run. `foreseen`: simulated requests in all."""
    return Pool(given.workers, bar.add, engine=given.engine, foreseen=foreseen, backend=given.backend)


def _first(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given


# ---------------------------------------------------------------- scenario files


def _stated(source: Source) -> tuple[Scenario, PlanOptions]:
    """Return the scenario in a file and, where it has a section `plan`, what a plan of it was asked for."""
    with source.stream() as stream:
        text = stream.read().decode("utf-8-sig", errors="replace")
    data = parsed_yaml(text, source.name, "a scenario (workload:, provider:, policy:, ...)")
    if "plan" not in data:
        return Scenario.read(source), PlanOptions()
    try:
        plan_options = checked(PlanOptions, data.pop("plan"), "plan")
    except BadSetting as error:
        raise BadInput(str(error), source.name) from None
    folder = Path(".") if source.path == "-" else Path(source.path).parent
    return Scenario.from_yaml(yaml.safe_dump(data, sort_keys=False), folder=folder, name=source.name), plan_options


def _of_run(o: Options) -> tuple[Scenario, PlanOptions, tuple[str, ...]]:
    """Return the requests of a journal with their answers, its settings, and the provider that it teaches."""
    for name in _row_options(o):
        option = f"--{name.replace('_', '-')}"
        raise BadSetting(
            f"{option} is for files: {o.workload} is a journal, which has its requests and answers", option
        )
    # The fits need half a second of imports, which only a journal is worth.
    from sim.calibration.calibrate import calibrate
    from sim.calibration.observed import of_journal
    from sim.validation.assumptions import believed_provider

    observed = of_journal(o.workload, o.pool)
    models = np.array([observed.tries.model(i) for i in range(len(observed))])
    base = believed_provider(observed.policy or Policy(), models)
    found = calibrate(observed, base=base)
    learnt = ", ".join(found.scenario.provider.learnt) or "nothing"
    note = (
        f"requests, answers and settings of {observed.label}; learnt of the provider: {learnt}; the rest is as the "
        "settings believe"
    )
    return found.scenario, PlanOptions(unknowns=found.unknowns), (note, *found.notes)


def scenario_text(scenario: Scenario, plan_options: PlanOptions, folder: str | Path) -> str:
    """Return the scenario as YAML, with paths relative to `folder`, and those plan options that are not the default."""
    text = scenario.to_yaml(folder)
    asked = plan_options.model_dump(mode="json", exclude_defaults=True)
    return text + yaml.safe_dump({"plan": asked}, sort_keys=False) if asked else text


def _row_options(o: Options) -> dict[str, Any]:
    """Return the options that say how a workload is read, as fields of its source; only those that were given."""
    given = {
        "columns": parse_columns(",".join(o.columns)) if o.columns else None,
        "outputs_from": o.outputs_from,
        "output_tokens": quantiles(o.output_tokens) if o.output_tokens is not None else None,
        "max_tokens": o.max_tokens,
        "first": o.first or None,
        "file_tokens": o.file_tokens,
    }
    return {name: value for name, value in given.items() if value is not None}


def _changed_source(source: FileSource | ModelSource, o: Options) -> FileSource | ModelSource:
    """Return a scenario file's source with the command line's options on top; the same object where none was given."""
    changes = _row_options(o)
    if not changes:
        return source
    if isinstance(source, ModelSource):
        for name in ("columns", "outputs_from", "file_tokens"):
            if name in changes:
                raise BadSetting(f"--{name.replace('_', '-')} is for files: this scenario draws its workload")
        first = changes.pop("first", source.requests)
        changes["requests"] = min(first, source.requests)
        return checked(ModelSource, {**source.model_dump(), **changes}, "workload")
    if source.path == "-":
        raise BadInput("the scenario reads its rows from standard input: name a file", "-")
    return checked(FileSource, {**source.model_dump(), **changes}, "workload")


# ---------------------------------------------------------------- provider


def _provider(
    o: Options,
    policy: Policy,
    stated: Scenario | None,
    habits: ProviderConfig | Mapping[str, Any] | None,
    profile: str,
) -> ProviderConfig:
    """Return the provider that the options, the scenario file or, for want of both, the settings describe."""
    named = {"profile": profile} if profile else {}
    if isinstance(habits, ProviderConfig):
        provider = habits
    elif o.provider is not None:
        provider = named_provider(o.provider, profile)
    elif stated is not None:
        provider = stated.provider
    else:
        limits = {name: getattr(policy, f"{name}_limit") for name in ("tpm", "rpm", "tpd", "rpd")}
        provider = checked(ProviderConfig, {**named, **limits}, "provider")
    changes: dict[str, Any] = {
        "tpm": o.tpm,
        "rpm": o.rpm,
        "charge_rule": o.provider_charge,
        "settles": o.provider_settles,
        "latency": None if o.latency is None else latency_of(o.latency),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if isinstance(habits, Mapping):
        changes |= habits
    return provider.with_(**changes) if changes else provider


def _profile(o: Options, environment: Mapping[str, str]) -> str:
    """Return the profile that the options, the env file or the environment name, or the base URL's; "" = none."""
    stated = o.profile or stated_profile(o.env_file, environment)
    if stated:
        read_profile(stated)
        return stated if is_name(stated) else os.path.abspath(stated)
    return habits_of("", environment_of(o.env_file, environment).get(BASE_URL, "").strip())


def _with_latency_of(
    provider: ProviderConfig, workload: Workload, o: Options, habits: ProviderConfig | Mapping[str, Any] | None
) -> ProviderConfig:
    """Return the provider with the latency of the one model that the requests name, unless something else states it."""
    given = "latency" in habits if isinstance(habits, Mapping) else habits is not None
    if o.latency is not None or o.provider is not None or given or not isinstance(workload.models, str):
        return provider
    model = SNAPSHOT.sub("", workload.models)
    return provider.with_(latency=model) if model in latency_lines(provider.profile) else provider


def _agreed(policy: Policy, provider: ProviderConfig, stated: Scenario | None, o: Options) -> Policy:
    """Return a scenario file's policy; limits that equalled the provider's, and are not named, change with them.

    `--set` and an env file name a limit; the scenario file names all of them, by writing them down.
    """
    if stated is None:
        return policy
    moved = limits_moved(stated.policy, stated.provider, provider)
    changes = {name: limit for name, limit in moved.items() if getattr(policy, name) == getattr(stated.policy, name)}
    named = policy_of(o.env_file, assignments=o.assignments or ()).model_fields_set
    return policy.with_(**{name: value for name, value in changes.items() if name not in named})


def _notes(scenario: Scenario, fitted: Scenario, o: Options) -> list[str]:
    """Return what the user should know of these inputs beyond their sources."""
    notes = [text for name, (_, text) in scenario.workload.provenance.items() if name == UNSEEN]
    left_out = len(scenario.workload) - len(fitted.workload)
    if left_out:
        limit = min(limit for limit in (scenario.provider.tpm, scenario.provider.tpd) if limit)
        notes.append(
            f"{left_out:,} of {len(scenario.workload):,} requests left out: charged more than {limit:,} tokens"
        )
    policy, provider = fitted.policy, fitted.provider
    for env, ours, theirs, what in (
        ("OPENAI_TPM_LIMIT", policy.tpm_limit, provider.tpm, "tokens"),
        ("OPENAI_RPM_LIMIT", policy.rpm_limit, provider.rpm, "requests"),
    ):
        if ours and theirs and ours > theirs:
            notes.append(f"{env}={ours:,} is more than the {theirs:,} {what} per minute that the provider grants")
        elif ours and theirs and ours < theirs:
            notes.append(
                f"{env}={ours:,} leaves unused what the provider grants beyond it: {theirs:,} {what} per minute"
            )
    if not provider.tpm and not provider.rpm:
        notes.append("the provider has no limit per minute: only the settings hold the batch back")
    return notes

"""`simulate` and `plan` with `--pools`: a batch over the pools of a file, those of one group by the live run's router.

Each pool's provider is what its scenario states, else what its settings believe, as in the forecast of a run. The joint
simulation is SimPy's, a few runs only. A plan searches settings for each pool on its share of the requests (divided in
advance by its limits, so that all end together), and then simulates today's and the recommended ones together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from governor.forecast.forecast import FIRST_TOKEN_S, PER_TOKEN_S
from governor.forecast.pooled import merged, pooled_bound_s
from governor.forecast.summary import Summary
from governor.model import pools as model
from governor.model.env_files import environment_of, policy_of
from governor.model.errors import BadInput, BadSetting, quoted
from governor.model.phrases import plural
from governor.model.words import duration, percent
from governor.profiles.loader import habits_of, with_profile
from governor.scheduler.router import Spread
from sim.app.inputs import PlanOptions, pool_of, read_inputs
from sim.app.options import Options
from sim.app.outputs import RECOMMENDED, planned
from sim.base.layout import facts, table, wrapped
from sim.base.progress import Progress
from sim.des.engines import simulated
from sim.des.several import SeveralTallies, simulated_over
from sim.experiment.experiment import Case, case_of
from sim.reporting.terminal import headline
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import FileSource, latency_of
from sim.validation.assumptions import Assumptions, scenario_assumptions

POOLED_RUNS = 3

Group = dict[str, Scenario]  # the same requests under the settings of each pool, in order


@dataclass(frozen=True, slots=True)
class PoolsForecast:
    """A batch over pools. `runs`: by replication, for each group. `without_s`: the finish without a pool of a group."""

    groups: Sequence[Group]
    runs: Sequence[Sequence[SeveralTallies]]
    without_s: Mapping[str, float]

    @property
    def finishes_s(self) -> list[float]:
        """Return when the last request of each run ends, seconds from the start."""
        return [max(each.makespan_s for each in run) for run in self.runs]

    @property
    def by_pool(self) -> dict[str, Summary]:
        """Return the figures of each pool in the first run."""
        pairs = zip(self.groups, self.runs[0], strict=True)
        return {
            name: tally.summary(case_of(scenario).grant)
            for group, run in pairs
            for (name, scenario), tally in zip(group.items(), run.tallies, strict=True)
        }

    @property
    def summary(self) -> Summary:
        """Return the figures of the first run, against the sum of each group's limits."""
        bounds = [
            pooled_bound_s([case_of(each).grant for each in group.values()], [tally.work for tally in run.tallies])
            for group, run in zip(self.groups, self.runs[0], strict=True)
        ]
        return merged(list(self.by_pool.values()), max(bounds), None)

    def to_json_dict(self) -> dict[str, Any]:
        """Return the first run's `Summary`, the finish of every run, and each pool."""
        pools = {
            name: {**summary.to_json_dict(), "without_it_s": self.without_s.get(name)}
            for name, summary in self.by_pool.items()
        }
        return {**self.summary.to_json_dict(), "finishes_s": self.finishes_s, "pools": pools}


def groups_read(o: Options, environment: Mapping[str, str]) -> tuple[list[Group], Scenario, tuple[str, ...]]:
    """Return the groups of the pools file that have requests, the whole batch, and notes.

    Raise BadSetting for an option that a pool states itself, BadInput if no pool takes a request.
    """
    for name in ("tpm", "rpm", "provider", "profile"):
        if getattr(o, name) is not None:
            raise BadSetting(f"--{name} is for one quota: state it in the pools file", f"--{name}")
    surroundings = environment_of(o.env_file, environment)
    policy = policy_of(o.env_file, environment=environment)
    stated = model.read_pools(o.pools, policy, o.assignments or ())
    pools = [with_profile(pool, surroundings) for pool in stated]
    plain = replace(o, pools="", env_file=None, assignments=None)
    inputs = read_inputs(plain, {}, fit=False, settings=pools[0].policy, habits={})
    whole = inputs.scenario
    if whole.arrivals == "trace":
        raise BadSetting("--pools is for a batch, and these requests arrive over time: use --arrivals batch")
    rows: dict[str, list[int]] = {}
    for i in range(len(whole.workload)):
        pool = model.pool_for(whole.workload.model(i), pools)
        if pool is None:
            what = f"request {i} asks for model {quoted(whole.workload.model(i))}"
            raise BadInput(f"{what}, which no pool takes: add a pattern for it to the pools file", o.workload)
        rows.setdefault(pool.name, []).append(i)
    found = []
    for members in model.groups_of(pools):
        if members[0].name in rows:
            part = whole.with_(workload=whole.workload.take(np.array(rows[members[0].name])))
            found.append({pool.name: _of_pool(part, pool, o) for pool in members})
    return found, whole, inputs.notes


def _of_pool(part: Scenario, pool: model.Pool, o: Options) -> Scenario:
    """Return the requests on the provider that the pool's scenario or, for want of one, its settings describe."""
    profile = habits_of(pool.profile, pool.base_url, azure=pool.azure is not None)
    assumed = scenario_assumptions(pool.scenario) if pool.scenario else Assumptions(profile=profile)
    models = np.array([part.workload.model(i) for i in range(len(part.workload))])
    changes = {
        "charge_rule": o.provider_charge,
        "settles": o.provider_settles,
        "latency": None if o.latency is None else latency_of(o.latency),
    }
    provider = assumed.provider_for(pool.policy, models)
    found = part.with_(
        policy=pool.policy, provider=provider.with_(**{k: v for k, v in changes.items() if v is not None})
    )
    if case_of(found).columns.kind is not None:
        raise BadSetting(f"pool {pool.name}: estimates that learn are not simulated over several pools")
    return found


def forecast(groups: Sequence[Group], seed: int, runs: int, say: Callable[[], object] = lambda: None) -> PoolsForecast:
    """Simulate the batch over its pools, and once without each pool that shares its requests."""
    cases = [[case_of(scenario) for scenario in group.values()] for group in groups]
    found = []
    for r in range(runs):
        found.append([_once(each, seed + r) for each in cases])
        say()
    without_s = {}
    for g, group in enumerate(groups):
        others_s = max((run.makespan_s for i, run in enumerate(found[0]) if i != g), default=0.0)
        for i, name in enumerate(group if len(group) > 1 else ()):
            run = _once([case for k, case in enumerate(cases[g]) if k != i], seed)
            without_s[name] = max(others_s, run.makespan_s)
            say()
    return PoolsForecast(groups, found, without_s)


def _once(cases: Sequence[Case], seed: int) -> SeveralTallies:
    return SeveralTallies((simulated(cases[0], seed),), 0) if len(cases) == 1 else simulated_over(cases, seed)


def steps(groups: Sequence[Group], runs: int) -> int:
    """Return how many steps `forecast` tells of."""
    return runs + sum(len(group) for group in groups if len(group) > 1)


def forecast_text(found: PoolsForecast, whole: Scenario, width: int) -> str:
    """Return the forecast as text: the batch, then its pools."""
    s, finishes_s = found.summary, found.finishes_s
    span = f"; {len(finishes_s)} runs: {duration(min(finishes_s))} to {duration(max(finishes_s))}"
    lost = f"{s.failed:,} of {s.requests:,}"
    pairs = [
        ("finishes after", f"{duration(float(np.mean(finishes_s)))}{span if len(finishes_s) > 1 else ''}"),
        ("shortest possible", f"{duration(s.bound_s)} with the limits of a group together, whatever the settings"),
        ("efficiency", "not quoted: requests were lost" if s.efficiency is None else percent(s.efficiency)),
        ("429s", f"{s.throttled:,} in {s.attempts:,} attempts"),
        ("lost", lost + "".join(f", {code} {count:,}" for code, count in s.failures.items())),
    ]
    rows = [["pool", "tokens/min", "requests", "last answer", "429s", "the batch without it"]]
    for name, each in found.by_pool.items():
        limit = next(group[name].policy.tpm_limit for group in found.groups if name in group)
        without = found.without_s.get(name)
        later = "–" if without is None else f"{duration(without)} ({without - finishes_s[0]:+.0f} s)"
        rows.append([name, f"{limit:,}", f"{each.requests:,}", duration(each.makespan_s), f"{each.throttled:,}", later])
    told = (
        "Pools of a group: SimPy and the router of the live run, few runs; pools by themselves, as without --pools. "
        "Each pool's provider is what its scenario states, else what its settings believe."
    )
    parts = [wrapped(headline(whole), width), facts(pairs, width), table(rows)]
    most = max(found.without_s, key=found.without_s.__getitem__, default=None)
    if most is not None:
        parts.append(f"Pool {most} matters most: without it the batch ends after {duration(found.without_s[most])}.")
    return "\n\n".join([*parts, wrapped(told, width)])


def simulated_pools(o: Options, width: int) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Return the batch over the pools as an object and as text, and notes."""
    groups, whole, notes = groups_read(o, os.environ)
    runs = o.replications or POOLED_RUNS
    with Progress("simulating", steps(groups, runs)) as bar:
        found = forecast(groups, whole.seed, runs, lambda: bar.add(1))
    return found.to_json_dict(), forecast_text(found, whole, width), notes


# ---------------------------------------------------------------- plan


def shares_of(group: Group) -> Group:
    """Return each pool with its part of the requests, so that all are expected to end together by their limits."""
    cases = {name: case_of(scenario) for name, scenario in group.items()}
    policies = [scenario.policy.with_(stagger_seconds=0.0) for scenario in group.values()]
    spread = Spread([policy.params() for policy in policies])
    rows: dict[str, list[int]] = {name: [] for name in group}
    first = next(iter(cases.values())).columns
    for i in range(len(first)):
        needs = [
            policy.weights.of(float(case.columns.reserve[i]), float(first.prompt_tokens[i]))
            for policy, case in zip(policies, cases.values(), strict=True)
        ]
        chosen = spread.choose(needs, FIRST_TOKEN_S + PER_TOKEN_S * float(first.output_tokens[i]))
        rows[list(group)[chosen]].append(i)
    # (A share has no file of its own: the plan writes its rows beside the scenario.)
    return {
        name: scenario.with_(
            workload=scenario.workload.take(np.array(rows[name])),
            source=FileSource(path="-", provenance=dict(scenario.workload.provenance)),
        )
        for name, scenario in group.items()
        if rows[name]
    }


def planned_pools(
    o: Options, plan_options: PlanOptions, folder: Path, bar: Progress, width: int
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Plan each pool on its share into a folder of its name; return today's and the planned settings, simulated."""
    groups, whole, notes = groups_read(o, os.environ)
    runs = o.replications or POOLED_RUNS
    before = forecast(groups, whole.seed, runs)
    after: list[Group] = []
    for group in groups:
        shares = shares_of(group) if len(group) > 1 else group
        policies = {}
        for name, share in shares.items():
            bar.say(f"pool {name}: {plural(len(share.workload), 'request')}")
            into = folder / name
            into.mkdir(exist_ok=True)
            workers = pool_of(o, bar, float(len(share.workload)))
            outcome = planned(share.fitted(), plan_options, into, notes=(), pool=workers, say=bar.say)
            policies[name] = outcome.plan.full.policy
        after.append({name: each.with_(policy=policies.get(name, each.policy)) for name, each in group.items()})
    then = forecast(after, whole.seed, runs)
    files = facts([(name, str(folder / name / RECOMMENDED)) for group in groups for name in group], width)
    text = "\n\n".join(
        [
            f"Now:\n\n{forecast_text(before, whole, width)}",
            f"With the settings planned for each pool on its share:\n\n{forecast_text(then, whole, width)}",
            f"Settings, for `settings` of each pool in {o.pools}:\n\n{files}",
        ]
    )
    return {"now": before.to_json_dict(), "recommended": then.to_json_dict()}, text, notes

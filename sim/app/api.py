"""The Python API for programs and notebooks: `simulate`, `compare` and `plan`, and the results that they return.

A result keeps its scenario and computes tables and figures on demand: rows of attempts come from a second run with the
same seed, which repeats the first run exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from governor.forecast.pooled import merged, pooled_bound_s
from governor.forecast.summary import Summary
from governor.model.errors import BadSetting
from governor.model.files import prepared_folder
from governor.model.policy import Policy, knob_named
from governor.model.requests import Attempt
from sim.app.inputs import EFFORTS, PlanOptions
from sim.app.outputs import GUARDRAILS, RECOMMENDED, ROLLBACK, page, prices_of, settings_files, write_plan
from sim.base.arguments import is_a, number, one_of, whole
from sim.des.engines import Engine
from sim.des.several import SeveralTallies, simulated_over
from sim.experiment.experiment import Pool, attempts_of, case_of, replicate, summary_of
from sim.experiment.results import Estimate, Forecast, Heat, Plan, paired_difference
from sim.reporting import dataframes as frames
from sim.reporting import figures
from sim.reporting import terminal as shown
from sim.scenario.scenario import Scenario
from sim.selection import planner

if TYPE_CHECKING:
    from sim.experiment.shared_quota import SharedRun

TEXT_WIDTH = 100
PROCESSES_MAX = 64
MAKE_ONE = "make one of your file, Scenario('requests.jsonl', tpm=30_000)"


@dataclass(frozen=True)
class SimulationResult:
    """The predicted outcome of a scenario, returned by `simulate`. Its `str()` is what `paceline simulate` prints."""

    scenario: Scenario
    forecast: Forecast
    """Every figure over the replications, with intervals; `forecast["makespan_s"].mean` in seconds."""

    @cached_property
    def summary(self) -> Summary:
        """Return the first run's figures, as `paceline simulate --json` prints them."""
        return summary_of(case_of(self.scenario), self.scenario.seed)

    @cached_property
    def rows(self) -> list[Attempt]:
        """Return the first run's attempts, ordered by when they ended."""
        return attempts_of(self.scenario, self.scenario.seed)[0]

    @cached_property
    def attempts(self) -> pd.DataFrame:
        """Return one row per attempt of the first run; `governor.model.requests.Attempt` describes the columns."""
        return frames.attempts_frame(self.rows)

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """Return the first run over time: tokens charged in the last minute, requests in flight, launches and 429s."""
        return frames.timeline_frame(self.rows)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """Return one row per replication, indexed by seed."""
        return frames.runs_frame(self.forecast.runs)

    @cached_property
    def estimates(self) -> pd.DataFrame:
        """Return one row per figure: its mean, the 95 % interval of that mean, and quantiles over the runs."""
        return frames.estimates_frame(self.forecast)

    @cached_property
    def waits(self) -> pd.DataFrame:
        """Return what made the requests wait and which knob controls each cause, as means over the runs."""
        return frames.waits_frame(self.forecast.waits_s, self.forecast.requests)

    def minus(self, other: SimulationResult, figure: str = "makespan_s") -> Estimate:
        """Return this result's `figure` minus that of `other`, paired by seed, with a 95 % interval of the mean.

        Raise BadSetting if the two results share no seeds or if `figure` does not exist.
        """
        is_a("other", other, SimulationResult, "simulate the other scenario, too")
        one_of("figure", figure, tuple(self.runs.columns))
        found = paired_difference(self.forecast, other.forecast, figure)
        if not found.n:
            raise BadSetting("the two results share no seeds: simulate both with the same seed")
        return found

    def figure(self, title: str = "") -> Figure:
        """Plot the first run: tokens per minute, requests in flight, launches with 429s, and causes of waiting."""
        from sim.reporting.figures_time import timeline

        return timeline(self.rows, self.scenario.grant(), title=title)

    def __repr__(self) -> str:
        span, lost = self.forecast["makespan_s"], self.forecast.lost
        return (
            f"<SimulationResult: {self.forecast.requests:,} requests in {span.mean:,.1f} s, "
            f"{self.forecast['throttled_per_100'].mean:.3g} 429s per 100, {lost:,} lost; runs: {span.n or 1}>"
        )

    def _repr_html_(self) -> str:
        from sim.reporting.notebook import simulation_html

        return simulation_html(self)

    def __str__(self) -> str:
        if len(self.forecast.runs) == 1:
            return shown.summary_text(self.scenario, self.summary, TEXT_WIDTH)
        return shown.forecast_text(self.scenario, self.forecast, TEXT_WIDTH)


def simulate(
    scenario: Scenario,
    *,
    replications: int | None = None,
    seed: int | None = None,
    workers: int = 0,
    engine: Engine = "auto",
) -> SimulationResult:
    """Simulate a scenario and return its finish time, 429s, losses, and what makes its requests wait.

    `replications`: number of runs, each with its own seed; defaults to the scenario's number, or one if it states none.
    `seed`: seed of the first run, from 0; defaults to the scenario's. `workers`: number of runs in parallel, 0 = one
    per core. `engine`: as for `--engine`. The same arguments give the same figures, to the bit. Raise Oversized if a
    request can never run.
    """
    is_a("scenario", scenario, Scenario, MAKE_ONE)
    if replications is not None:
        whole("replications", replications, 1)
    whole("workers", workers, 0)
    one_of("engine", engine, get_args(Engine))
    changes = {"seed": seed, "replications": replications}
    scenario = scenario.with_(**{name: value for name, value in changes.items() if value is not None}).fitted()
    return SimulationResult(
        scenario, replicate(scenario, scenario.replications or 1, pool=Pool(workers, engine=engine))
    )


@dataclass(frozen=True)
class Comparison:
    """Several scenarios simulated under the same seeds, by name; returned by `compare`."""

    results: Mapping[str, SimulationResult]

    def __getitem__(self, name: str) -> SimulationResult:
        return self.results[name]

    @cached_property
    def table(self) -> pd.DataFrame:
        """Return one row per name: finish time with its 95 % interval, latency, efficiency, 429s and losses."""
        return frames.forecasts_frame({name: result.forecast for name, result in self.results.items()})

    def figure(self) -> Figure:
        """Plot finish time, 429s and losses as bars, in the order of the names."""
        from sim.reporting.figures_compare import compared

        return compared({name: result.forecast for name, result in self.results.items()})

    def __repr__(self) -> str:
        return f"<Comparison: {', '.join(self.results)}>"


def compare(
    scenarios: Mapping[str, Scenario], *, replications: int | None = None, seed: int | None = None, workers: int = 0
) -> Comparison:
    """Simulate several scenarios, each `replications` times under the same seeds, and return the comparison.

    Common seeds narrow the intervals of the differences. The arguments are those of `simulate`. Raise BadSetting if
    there is nothing to compare.
    """
    if not isinstance(scenarios, Mapping) or not scenarios:
        raise BadSetting('nothing to compare: name scenarios, {"today": ..., "quicker": ...}')
    for name, scenario in scenarios.items():
        is_a(f"scenarios[{name!r}]", scenario, Scenario, MAKE_ONE)
    first = next(iter(scenarios.values())).seed if seed is None else seed
    return Comparison(
        {
            name: simulate(scenario, replications=replications, seed=first, workers=workers)
            for name, scenario in scenarios.items()
        }
    )


def simulate_processes(
    scenario: Scenario, processes: int, *, store_rtt_s: float = 0.001, crash_at_s: float | None = None
) -> SharedRun:
    """Simulate the batch split over `processes` processes that share its quota through a store.

    `store_rtt_s`: round-trip time to the store, in seconds. `crash_at_s`: when the first process dies, in seconds from
    the start; another process takes over its work. Needs the extra `redis`. Raise BadSetting if the scenario has
    arrivals over time: only a batch can be split.
    """
    from sim.experiment.shared_quota import Arrangement, shared_run

    if is_a("scenario", scenario, Scenario, MAKE_ONE).arrivals == "trace":
        raise BadSetting("processes share a batch: this scenario's requests arrive over time")
    whole("processes", processes, 1, PROCESSES_MAX)
    number("store_rtt_s", store_rtt_s)
    if crash_at_s is not None:
        number("crash_at_s", crash_at_s)
    crash_at = math.inf if crash_at_s is None else crash_at_s
    arrangement = Arrangement(processes=processes, rtt_s=store_rtt_s, crash_at=crash_at)
    # Its virtual-time event loop cannot run inside another event loop, and a notebook's is always running.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(shared_run, scenario.fitted(), arrangement).result()


@dataclass(frozen=True)
class PoolsResult:
    """The predicted outcome of a batch over several quotas, returned by `simulate_pools`."""

    scenarios: Mapping[str, Scenario]
    runs: Sequence[SeveralTallies]
    """One per replication: the tallies of the quotas in order, `completed`, `lost`, `makespan_s`."""

    @property
    def makespan_s(self) -> float:
        """Return the mean time until the last request ends, in seconds."""
        return float(np.mean([run.makespan_s for run in self.runs]))

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """Return the first run's figures by pool."""
        cases = zip(self.scenarios.items(), self.runs[0].tallies, strict=True)
        return {name: tally.summary(case_of(scenario).grant) for (name, scenario), tally in cases}

    @cached_property
    def summary(self) -> Summary:
        """Return the first run's figures of all pools together, against the sum of their limits."""
        grants = [case_of(scenario).grant for scenario in self.scenarios.values()]
        bound = pooled_bound_s(grants, [tally.work for tally in self.runs[0].tallies])
        return merged(list(self.summaries.values()), bound, None)


def simulate_pools(scenarios: Mapping[str, Scenario], *, replications: int = 1) -> PoolsResult:
    """Simulate a batch whose requests several quotas share, as pools of one `group` do.

    `scenarios`: by the pool's name, in order of preference: the same batch, each with the provider and the settings of
    that pool (`scenario.with_(provider=..., policy=...)`). Simulated with SimPy. Raise BadSetting if the batches
    differ, arrive over time, or have estimates that learn.
    """
    whole("replications", replications, 1)
    found = {name: is_a("scenarios", each, Scenario, MAKE_ONE) for name, each in scenarios.items()}
    if not found:
        raise BadSetting("scenarios is empty: give one by pool")
    cases = [case_of(scenario) for scenario in found.values()]
    for name, case in zip(found, cases, strict=True):
        if case.from_trace:
            raise BadSetting(f"pool {name}: pools share a batch, and these requests arrive over time")
        if case.columns.kind is not None:
            raise BadSetting(f"pool {name}: estimates that learn are not simulated over several pools")
        if not np.array_equal(case.columns.prompt_tokens, cases[0].columns.prompt_tokens):
            raise BadSetting(f"pool {name}: its batch is not that of pool {next(iter(found))}")
    seed = next(iter(found.values())).seed
    return PoolsResult(found, [simulated_over(cases, seed + r) for r in range(replications)])


def knob_map(
    scenario: Scenario, x: str, xs: Sequence[float], y: str, ys: Sequence[float], *, replications: int = 1
) -> Heat:
    """Return finish time, 429s and losses over two knobs (by any of their names) as means over replications.

    `figures.heat` draws it. The recommended cell is the fastest one that loses nothing and stays within one 429 per 100
    requests; if no cell stays within that, it is the fastest one that loses nothing.
    """
    is_a("scenario", scenario, Scenario, MAKE_ONE)
    whole("replications", replications, 1)
    if not len(xs) or not len(ys):
        raise BadSetting(f"a map needs values of {x if not len(xs) else y}: write some")
    if x == y:
        raise BadSetting(f"a map is over two knobs, not over {x} twice")
    policies = [[scenario.policy.with_(**{x: a, y: b}) for a in xs] for b in ys]
    seeds = range(scenario.seed, scenario.seed + replications)
    tasks = [(case_of(scenario, policy), seeds) for row in policies for policy in row]
    runs = Pool(foreseen=float(len(tasks) * replications * len(scenario.workload))).run(tasks)
    shape = len(ys), len(xs)
    values = {
        name: np.array([np.mean([run[name] for run in cell]) for cell in runs]).reshape(shape)
        for name in ("makespan_s", "throttled_per_100", "failed")
    }
    too_many = values["throttled_per_100"] > 1.0
    order = np.lexsort([values["makespan_s"].ravel(), too_many.ravel(), values["failed"].ravel()])
    best_y, best_x = divmod(int(order[0]), len(xs))
    knobs = [knob for knob in (knob_named(x), knob_named(y)) if knob is not None]
    return Heat(
        x_env=knobs[0].env,
        y_env=knobs[1].env,
        x_values=tuple(float(a) for a in xs),
        y_values=tuple(float(b) for b in ys),
        objective_s=values["makespan_s"],
        throttled_per_100=values["throttled_per_100"],
        lost=values["failed"],
        now=(float(getattr(scenario.policy, knobs[0].name)), float(getattr(scenario.policy, knobs[1].name))),
        recommended=(float(xs[best_x]), float(ys[best_y])),
    )


@dataclass(frozen=True)
class PlanResult:
    """Recommended settings and their evidence, returned by `plan`. Its `str()` is what `paceline plan` prints."""

    scenario: Scenario
    plan_options: PlanOptions
    found: Plan
    """Everything that the search found, with its evidence; see `sim.experiment.results.Plan`."""

    @property
    def policy(self) -> Policy:
        """Return the recommended settings when every knob of the law may change."""
        return self.found.full.policy

    @property
    def guardrails(self) -> Policy:
        """Return the recommended settings when only the eight guardrail knobs may change."""
        return self.found.guardrails.policy

    @cached_property
    def env(self) -> str:
        """Return the recommended settings as the text of an env file, with today's values as comments."""
        return settings_files(self.found)[RECOMMENDED]

    @cached_property
    def guardrails_env(self) -> str:
        """Return the `guardrails` settings as the text of an env file, with today's values as comments."""
        return settings_files(self.found)[GUARDRAILS]

    @cached_property
    def rollback_env(self) -> str:
        """Return today's settings as the text of an env file, to roll back to."""
        return settings_files(self.found)[ROLLBACK]

    @property
    def recommended(self) -> Scenario:
        """Return the scenario under the recommended settings, ready for `simulate`."""
        return self.scenario.with_(policy=self.policy)

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """Return the deciding means on the same new seeds: today, guardrails only, recommended, runner-up."""
        return frames.comparison_frame(self.found)

    @cached_property
    def changes(self) -> pd.DataFrame:
        """Return one row per changed knob: the change's gain with all other knobs as recommended, and the reason."""
        return frames.changes_frame(self.found)

    @cached_property
    def front(self) -> pd.DataFrame:
        """Return the Pareto front of time against 429s, fastest first, with the knobs that differ."""
        return frames.points_frame([p for p in self.found.points if p.on_front], self.found.objective)

    @cached_property
    def tried(self) -> pd.DataFrame:
        """Return every candidate that was tried and kept for the figure, in the same form as `front`."""
        return frames.points_frame(self.found.points, self.found.objective)

    @cached_property
    def stress(self) -> pd.DataFrame:
        """Return how the plan's settings perform if one assumption is wrong, one row per condition and settings."""
        return frames.stress_frame(self.found)

    def figure(self) -> Figure:
        """Plot the front: 429s against the objective, for every candidate that was tried."""
        marks = {"now": self.found.now, "guardrails": self.found.guardrails.forecast}
        marks["recommended"] = self.found.full.forecast
        limit = self.plan_options.max_throttled_per_100
        return figures.front(self.found.points, marks, objective=self.found.objective, throttled_limit=limit)

    def write(self, folder: str | Path) -> Path:
        """Write the files of `paceline plan --out` (report, env files, scenario) and return the report's path.

        Raise BadInput if the folder cannot be written to.
        """
        with prepared_folder(str(folder)) as place:
            text = page(self.scenario, self.found, place)
            notes = tuple(shown.plan_notes(self.scenario, self.found))
            return write_plan(place, self.scenario, self.plan_options, self.found, text, notes).report

    def __repr__(self) -> str:
        now, then = self.found.now["makespan_s"].mean, self.found.full.forecast["makespan_s"].mean
        changed = ", ".join(step.env for step in self.found.full.steps) or "nothing"
        return f"<PlanResult: {now:,.1f} s now, {then:,.1f} s recommended; changes {changed}>"

    def _repr_html_(self) -> str:
        from sim.reporting.notebook import plan_html

        return plan_html(self)

    def __str__(self) -> str:
        return shown.plan_text(self.scenario, self.found, TEXT_WIDTH)


def plan(
    scenario: Scenario,
    *,
    objective: Literal["makespan", "p95_latency"] = "makespan",
    max_throttled_per_100: float = 1.0,
    max_lost: float = 0.0,
    finish_by_s: float | None = None,
    effort: EFFORTS = "normal",
    prices: str | Path | None = None,
    workers: int = 0,
    say: Callable[[str], None] | None = None,
) -> PlanResult:
    """Find the settings that would do better, with the evidence, as `paceline plan` does.

    `objective`: what to minimise. `max_throttled_per_100`: most 429s allowed per 100 requests; `max_lost`: largest
    share of requests that may be lost, 0 to 1. `finish_by_s`: deadline in seconds from the start. `effort`: how long to
    search. `prices`: a price file to use in place of the built-in prices. `workers`: 0 = one per core. `say` is called
    with progress messages. The same arguments give the same plan, to the bit. Raise BadSetting if a limit is out of
    range.
    """
    scenario = is_a("scenario", scenario, Scenario, MAKE_ONE).fitted()
    whole("workers", workers, 0)
    plan_options = PlanOptions().with_given(
        objective=objective,
        max_throttled_per_100=number("max_throttled_per_100", max_throttled_per_100),
        max_lost=number("max_lost", max_lost),
        finish_by_s=None if finish_by_s is None else number("finish_by_s", finish_by_s),
        effort=effort,
        prices=None if prices is None else str(Path(prices).absolute()),
    )
    foreseen = planner.requests_foreseen(scenario, plan_options.effort)
    found = planner.plan(
        scenario,
        plan_options.goal(),
        effort=plan_options.effort,
        pool=Pool(workers, foreseen=foreseen),
        say=say or (lambda what: None),
        unknowns=plan_options.unknowns,
        prices=prices_of(plan_options, scenario),
    )
    return PlanResult(scenario, plan_options, found)

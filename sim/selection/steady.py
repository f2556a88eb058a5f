"""Steady traffic: how long requests wait once a run has settled, and the smallest limit at which that is short enough.

Theory of operation. With arrivals from a trace there is no deadline but a wish for the wait: from a request's arrival
to the launch of the attempt that answered it, its 95th percentile over the run. A run begins with an empty queue and a
full bucket, which is not what steady traffic meets: the first requests are left out, as many as MSER-5 says (White
1997, "An effective truncation heuristic for bias reduction in simulation output"): of all points at which the sequence
of waits, averaged by fives in order of arrival, could be cut, the one that leaves the smallest variance of the mean;
at most half of it. A limit below the load that the trace offers on average has no steady state at all: waits there grow
for as long as the traffic lasts, so such a limit is never an answer, however short the trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from governor.model.errors import BadInput
from governor.model.policy import Policy
from sim.des.engines import Engine, simulated
from sim.experiment.experiment import Case, figures_of
from sim.experiment.results import Figures, Forecast, estimate, forecast_of
from sim.scenario.scenario import Scenario
from sim.selection.capacity import How, Search, found_by, model_of
from sim.selection.capacity_results import Capacity
from sim.selection.search import Goal

_BATCH = 5
WAIT, WARM_UP = "wait_p95_s", "warm_up_requests"
# Fewer arrivals than this say nothing of a 95th percentile in a steady state.
_LEAST = 100


def truncation(waits_s: NDArray[np.float64]) -> int:
    """Return how many initial values MSER-5 discards; a multiple of five, at most half of them."""
    whole = len(waits_s) // _BATCH
    if whole < 2:
        return 0
    means = waits_s[: whole * _BATCH].reshape(whole, _BATCH).mean(axis=1)
    # Of the last k means: sum of squares about their mean, over k^2, for every k at once.
    left = np.arange(whole, 0, -1)
    total = np.cumsum(means[::-1])[::-1]
    squares = np.cumsum((means**2)[::-1])[::-1]
    criterion = np.maximum(squares - total**2 / left, 0.0) / left**2
    return _BATCH * int(np.argmin(criterion[: whole // 2 + 1]))


def waits_of(case: Case, seed: int, engine: Engine) -> tuple[Figures, NDArray[np.float64]]:
    """Return one run, and the wait of each request in order of arrival, seconds; inf for a lost one."""
    waits = np.full(len(case.columns), math.inf)

    def sink(job: Any, now: float, failure: str) -> None:
        waits[job.index] = math.inf if failure else job.launched_s - job.submitted_s

    tally = simulated(case, seed, sink, engine=engine)
    return figures_of(tally, case.grant, seed), waits


def steady_figures(case: Case, seeds: Sequence[int], *, engine: Engine) -> list[Figures]:
    """Return the runs under these seeds, each with the 95th percentile of its waits, and the length of the warm-up."""
    found = []
    for seed in seeds:
        figures, waits = waits_of(case, seed, engine)
        cut = truncation(np.where(np.isfinite(waits), waits, 0.0))
        # "higher": what was lost is infinite, and between two values nothing can be made of that.
        more = {WAIT: float(np.quantile(waits[cut:], 0.95, method="higher")), WARM_UP: float(cut)}
        found.append(replace(figures, values={**figures.values, **more}))
    return found


class _Steady(Search):
    """A search by waits."""

    goal = Goal("p95_latency")
    figure = WAIT

    def in_time(self, run: Figures) -> bool:
        """Return whether the wait was short enough."""
        return run["failed"] == 0 and run[WAIT] <= self.finish_by_s

    def made(self, case: Case, seeds: range) -> list[Figures]:
        """Return the runs of a case, with their waits."""
        task = partial(steady_figures, engine=self.pool.engine)
        found = self.pool.crew.map(task, [(case, (seed,)) for seed in seeds])
        runs = [run for each in found for run in each]
        self.pool.requests += len(case.columns) * len(runs)
        self.pool.on_runs(len(runs))
        return runs

    def forecast(self, policy: Policy, runs: Sequence[Figures]) -> Forecast:
        """Return the runs of one probe together, with their waits."""
        found = forecast_of(policy, runs)
        more = {name: estimate([run[name] for run in runs]) for name in (WAIT, WARM_UP)}
        return replace(found, estimates={**found.estimates, **more})

    def fluid_tpm(self) -> float:
        """Return the load, below which there is no steady state."""
        return load_tpm(self.scenario)


def load_tpm(scenario: Scenario) -> float:
    """Return the tokens per minute that the trace is charged on average, over the time in which its requests arrive."""
    columns = scenario.columns()
    span_s = float(columns.arrival_s.max(initial=0.0))
    if len(columns) < _LEAST or span_s <= 0.0:
        raise BadInput(f"--p95-wait needs a trace of at least {_LEAST} arrivals, this one has {len(columns):,}")
    return 60.0 * float(columns.charge.sum()) / span_s


def steady_capacity(
    scenario: Scenario, wait_p95_s: float, *, model: str = "", grid: bool = False, **how: Unpack[How]
) -> Capacity:
    """Return the smallest limit at which the 95th percentile of waits is at most `wait_p95_s`, after the warm-up.

    The other arguments are those of `capacity`. BadInput where the workload's arrivals are not those of a trace.
    """
    if scenario.arrivals != "trace":
        raise BadInput("--p95-wait is for steady traffic: add --arrivals trace, or ask by --finish-by")
    load = load_tpm(scenario)
    found = found_by(_Steady(scenario, wait_p95_s, **how), model_of(scenario, model), grid=grid)
    warm_up = (found.smallest or found.unlimited).forecast[WARM_UP].p50
    return replace(found, wait_p95_s=wait_p95_s, steady_load_tpm=load, warm_up_requests=warm_up)

"""Which knob matters: Morris' elementary effects or Sobol's indices of the simulated figures.

What lives here: from a scenario and a space of values to `Sensitivity`. What must not: the indices' own formulas
(`morris`; for Sobol's, SALib), their look (`figures_robust`).

Theory of operation. Each knob is one input, uniform over the rungs of its ladder (`space`); a design says which
settings to run, all of them under the same seeds, so that noise does not count as an effect. Morris (1991; with
Campolongo, Cariboni and Saltelli's mu*, 2007) moves one knob at a time by two thirds of its ladder, from many random
places: cheap, and in the figure's own unit. Sobol's total and first-order indices (Saltelli et al., 2010; intervals by
bootstrap) are shares of variance and cost about ten times as many runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from governor.model.policy import KNOB_BY_NAME, Policy
from sim.experiment.effects import Effect, Sensitivity
from sim.experiment.experiment import Pool
from sim.experiment.results import Figures
from sim.experiment.runs import Condition, Runs
from sim.scenario.scenario import Scenario
from sim.selection import morris
from sim.selection.search import Goal
from sim.selection.space import Space, full_space

Method = Literal["morris", "sobol"]

# Morris: levels of each input; a move is two thirds of the range with four of them.
LEVELS = 4
MOVE = morris.move_of(LEVELS)
# How far `near` reaches on each ladder, in rungs.
NEAR = 2
RESAMPLES = 200
Design = NDArray[np.float64]


def sensitivity(
    scenario: Scenario,
    goal: Goal,
    *,
    base: Policy | None = None,
    method: Method = "morris",
    size: int = 24,
    seeds: int = 1,
    near: bool = False,
    runs: Runs | None = None,
) -> Sensitivity:
    """The effect of each knob on objective, throttles and losses.

    `base`: the settings of the knobs that are not in the space, today's if not given. `size`: trajectories (Morris) or
    the base sample, a power of 2 (Sobol). `near`: only values within two rungs of `base`. `seeds`: runs per setting.
    """
    runs = runs or Runs(Pool())
    base = base or scenario.policy
    ladders = _ladders(full_space(scenario), base, near)
    names = list(ladders)
    problem = {"num_vars": len(names), "names": names, "bounds": [[0.0, 1.0]] * len(names)}
    design, analysed = (_morris if method == "morris" else _sobol)(problem, size, scenario.seed)
    policies = [base.with_(**_values(ladders, names, row, method)) for row in design]
    condition = Condition("", scenario)
    span = range(scenario.seed, scenario.seed + seeds)
    before = runs.made
    runs.require((condition, policy, span) for policy in policies)
    found = [runs.figures(condition, policy, span) for policy in policies]
    figures: dict[str, Callable[[Figures], float]] = {
        goal.figure: lambda run: run[goal.figure],
        "throttled_per_100": lambda run: run["throttled_per_100"],
        "lost_per_100": lambda run: 100.0 * run["failed"] / run.requests,
    }
    effects = {name: analysed(design, _outputs(found, figure)) for name, figure in figures.items()}
    return Sensitivity(
        method=method,
        objective=goal.objective,
        values={KNOB_BY_NAME[name].env: ladder for name, ladder in ladders.items()},
        effects={name: tuple(sorted(each, key=lambda e: (-e.size, e.env))) for name, each in effects.items()},
        settings=len({tuple(row) for row in design}),
        runs=runs.made - before,
        seed=scenario.seed,
    )


def _ladders(space: Space, base: Policy, near: bool) -> dict[str, tuple[Any, ...]]:
    """The values of each knob; those with a single one are left out."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, ladder in space.ladders.items():
        values = ladder
        if near and not isinstance(ladder[0], str | bool):
            at = min(range(len(ladder)), key=lambda i: abs(ladder[i] - getattr(base, name)))
            values = ladder[max(0, at - NEAR) : at + NEAR + 1]
        if len(values) > 1:
            found[name] = tuple(values)
    return found


def _values(ladders: dict[str, tuple[Any, ...]], names: Sequence[str], row: Design, method: str) -> dict[str, Any]:
    """One row of the design, from 0 to 1 in each knob, as rungs."""
    picked = {}
    for name, u in zip(names, row, strict=True):
        ladder = ladders[name]
        # Levels of Morris reach both ends; Sobol's points are spread evenly over equal parts.
        at = round(u * (len(ladder) - 1)) if method == "morris" else min(len(ladder) - 1, int(u * len(ladder)))
        picked[name] = ladder[at]
    return picked


def _outputs(found: Sequence[Sequence[Figures]], figure: Callable[[Figures], float]) -> NDArray[np.float64]:
    """The figure's mean by setting; where nothing was answered, the worst of the others."""
    means = np.array([float(np.mean([figure(run) for run in figures])) for figures in found])
    known = np.isfinite(means)
    return np.where(known, means, means[known].max() if known.any() else 0.0)


Analysis = Callable[[Design, NDArray[np.float64]], list[Effect]]


def _morris(problem: dict[str, Any], size: int, seed: int) -> tuple[Design, Analysis]:
    names = problem["names"]
    design = morris.trajectories(len(names), size, levels=LEVELS, seed=seed)

    def analysed(x: Design, y: NDArray[np.float64]) -> list[Effect]:
        found = morris.mean_effects(morris.elementary_effects(x, y), resamples=RESAMPLES, seed=seed)
        # Effects are stated per whole range; shown is what one move does.
        rows = zip(names, *(MOVE * each for each in found), strict=True)
        return [Effect(KNOB_BY_NAME[name].env, float(m), float(c), float(s)) for name, m, c, s in rows]

    return design, analysed


def _sobol(problem: dict[str, Any], size: int, seed: int) -> tuple[Design, Analysis]:
    from SALib.analyze import sobol as analysis
    from SALib.sample import sobol as sampling

    design = sampling.sample(problem, size, calc_second_order=False, seed=seed)

    def analysed(x: Design, y: NDArray[np.float64]) -> list[Effect]:
        if not y.std() > 0.0:
            return [Effect(KNOB_BY_NAME[name].env, 0.0, 0.0, 0.0) for name in problem["names"]]
        with warnings.catch_warnings():
            # A resample in which a knob changed nothing: no index, which reads as none.
            warnings.simplefilter("ignore", UserWarning)
            found = analysis.analyze(problem, y, calc_second_order=False, num_resamples=RESAMPLES, seed=seed)
        indices = (np.nan_to_num(found[name]) for name in ("ST", "ST_conf", "S1"))
        rows = zip(problem["names"], *indices, strict=True)
        return [Effect(KNOB_BY_NAME[n].env, float(t), float(c), float(s)) for n, t, c, s in rows]

    return design, analysed

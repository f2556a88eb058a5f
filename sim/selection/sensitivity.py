"""Which setting matters: quantities by Morris' or Sobol's method, rules and switches by comparing each with the base.

A quantity is one input, uniform over the rungs of its ladder (`space`); a design says which settings to run, all
of them under the same seeds, so that noise does not count as an effect. Morris (1991; with Campolongo, Cariboni and
Saltelli's mu*, 2007) moves one quantity at a time by two thirds of its ladder, from many random places: cheap, and in
the figure's own unit. Sobol's total and first-order indices (Saltelli et al., 2010; by SALib) are shares of variance
and cost about ten times as many runs.

Rules and switches have no order, so no step of theirs is larger than another: each other value takes the base's place
alone, and the two are compared run by run under the same chance.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from governor.model.policy import KNOB_BY_NAME, Policy
from sim.experiment.effects import Effect, Level, Sensitivity
from sim.experiment.experiment import Pool
from sim.experiment.results import CONFIDENCE, Figures, estimate
from sim.experiment.runs import Runs
from sim.scenario.scenario import Scenario
from sim.scenario.stress import Condition
from sim.selection.search import Goal
from sim.selection.space import full_space

Method = Literal["morris", "sobol"]

# Morris: levels of each input; a move is half of them, which is two thirds of the range with four.
_LEVELS = 4
MOVE = _LEVELS / (2.0 * (_LEVELS - 1.0))
# How far `near` reaches on each ladder, in rungs.
NEAR = 2
_RESAMPLES = 200
# Runs by which a rule or a switch is compared, at most; as many as there are trajectories if those are fewer.
LEVEL_SEEDS = 20
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
    """Return the effect of each setting on objective, throttles and losses.

    `base`: the settings around which is asked, today's if not given. `size`: trajectories (Morris) or the base sample,
    a power of 2 (Sobol). `near`: only quantities within two rungs of `base`. `seeds`: runs per setting of the design.
    """
    runs = runs or Runs(Pool())
    base = base or scenario.policy
    ladders, levels = _split(scenario, base, near)
    names = list(ladders)
    problem = {"num_vars": len(names), "names": names, "bounds": [[0.0, 1.0]] * len(names)}
    design, analysed = (_morris if method == "morris" else _sobol)(problem, size, scenario.seed)
    policies = [base.with_(**_values(ladders, names, row, method)) for row in design]
    others = [base.with_(**{name: value}) for name, value in levels]
    condition = Condition("", scenario)
    span = range(scenario.seed, scenario.seed + seeds)
    paired = range(scenario.seed, scenario.seed + max(seeds, min(LEVEL_SEEDS, size)))
    before = runs.made
    runs.require([*((condition, p, span) for p in policies), *((condition, p, paired) for p in (base, *others))])
    found = [runs.figures(condition, policy, span) for policy in policies]
    figures: dict[str, Callable[[Figures], float]] = {
        goal.figure: lambda run: run[goal.figure],
        "throttled_per_100": lambda run: run["throttled_per_100"],
        "lost_per_100": lambda run: 100.0 * run["failed"] / run.requests,
    }
    effects = {name: analysed(design, _outputs(found, figure)) for name, figure in figures.items()}
    kept = runs.figures(condition, base, paired)
    compared = [
        (KNOB_BY_NAME[name].env, value, runs.figures(condition, other, paired))
        for (name, value), other in zip(levels, others, strict=True)
    ]
    changes = {
        which: [_level(env, value, changed, kept, figure) for env, value, changed in compared]
        for which, figure in figures.items()
    }
    return Sensitivity(
        method=method,
        objective=goal.objective,
        values={KNOB_BY_NAME[name].env: ladder for name, ladder in ladders.items()},
        effects={name: tuple(sorted(each, key=lambda e: (-e.size, e.env))) for name, each in effects.items()},
        levels={name: tuple(sorted(each, key=lambda level: -abs(level.change))) for name, each in changes.items()},
        settings=len({tuple(row) for row in design}) + len(others) + 1,
        runs=runs.made - before,
        seed=scenario.seed,
    )


def _split(
    scenario: Scenario, base: Policy, near: bool
) -> tuple[dict[str, tuple[Any, ...]], list[tuple[str, str | bool]]]:
    """Return the values of each quantity that has several, and each other value of each rule and switch."""
    ladders: dict[str, tuple[Any, ...]] = {}
    levels: list[tuple[str, str | bool]] = []
    for name, ladder in full_space(scenario).ladders.items():
        if isinstance(ladder[0], str | bool):
            levels += [(name, value) for value in ladder if value != getattr(base, name)]
            continue
        values = ladder
        if near:
            at = min(range(len(ladder)), key=lambda i: abs(ladder[i] - getattr(base, name)))
            values = ladder[max(0, at - NEAR) : at + NEAR + 1]
        if len(values) > 1:
            ladders[name] = tuple(values)
    return ladders, levels


def _values(ladders: dict[str, tuple[Any, ...]], names: Sequence[str], row: Design, method: str) -> dict[str, Any]:
    """Return one row of the design, from 0 to 1 in each quantity, as rungs."""
    picked = {}
    for name, u in zip(names, row, strict=True):
        ladder = ladders[name]
        # Levels of Morris reach both ends; Sobol's points are spread evenly over equal parts.
        at = round(u * (len(ladder) - 1)) if method == "morris" else min(len(ladder) - 1, int(u * len(ladder)))
        picked[name] = ladder[at]
    return picked


def _outputs(found: Sequence[Sequence[Figures]], figure: Callable[[Figures], float]) -> NDArray[np.float64]:
    """Return the figure's mean by setting; where nothing was answered, the worst of the others."""
    means = np.array([float(np.mean([figure(run) for run in figures])) for figures in found])
    known = np.isfinite(means)
    return np.where(known, means, means[known].max() if known.any() else 0.0)


def _level(
    env: str, value: str | bool, changed: Sequence[Figures], kept: Sequence[Figures], figure: Callable[[Figures], float]
) -> Level:
    """Return the change that the value makes, run by run; nan if no pair of runs has the figure."""
    pairs = [figure(mine) - figure(theirs) for mine, theirs in zip(changed, kept, strict=True)]
    known = [change for change in pairs if math.isfinite(change)]
    e = estimate(known or [math.nan])
    return Level(env, value, e.mean, e.low, e.high)


Analysis = Callable[[Design, NDArray[np.float64]], list[Effect]]


# SALib draws in pandas and scipy.stats, a second of a plan's processor time: a test holds these two equal to its own.


def _morris(problem: dict[str, Any], size: int, seed: int) -> tuple[Design, Analysis]:
    rng, count = np.random.default_rng(seed), problem["num_vars"]
    design = np.concatenate([_trajectory(count, rng) for _ in range(size)])

    def analysed(x: Design, y: NDArray[np.float64]) -> list[Effect]:
        from scipy.special import ndtri

        # Each step moves one quantity, up or down. Shape (size, count).
        steps = np.diff(x.reshape(size, count + 1, count), axis=1)
        changes = np.sign(steps.sum(axis=2)) * np.diff(y.reshape(size, count + 1), axis=1)
        moved = np.abs(steps).argmax(axis=2)
        effects = np.take_along_axis(changes, np.argsort(moved, axis=1), axis=1)
        resampling = np.random.default_rng(seed)
        picked = [resampling.integers(size, size=(_RESAMPLES, size)) for _ in range(count)]
        sizes = np.abs(effects)
        means = np.array([sizes[at, j].mean(axis=1) for j, at in enumerate(picked)])
        half = ndtri(0.5 + CONFIDENCE / 2.0) * means.std(axis=1, ddof=1)
        rows = zip(problem["names"], sizes.mean(axis=0), half, effects.std(axis=0, ddof=1), strict=True)
        return [Effect(KNOB_BY_NAME[n].env, float(m), float(c), float(s)) for n, m, c, s in rows]

    return design, analysed


def _trajectory(count: int, rng: np.random.Generator) -> Design:
    """Return settings that differ from the one before in one quantity each, by a move. Shape (count + 1, count)."""
    order = np.eye(count)
    rng.shuffle(order)
    up = rng.choice([-1, 1], count)
    least = rng.choice(np.linspace(0.0, 1.0 - MOVE, _LEVELS // 2), count)
    has_moved = np.tril(np.ones((count + 1, count)), -1) @ order.T
    return np.asarray(least + MOVE / 2.0 * ((2.0 * has_moved - 1.0) * up + 1.0))


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
            found = analysis.analyze(problem, y, calc_second_order=False, num_resamples=_RESAMPLES, seed=seed)
        indices = (np.nan_to_num(found[name]) for name in ("ST", "ST_conf", "S1"))
        rows = zip(problem["names"], *indices, strict=True)
        return [Effect(KNOB_BY_NAME[n].env, float(t), float(c), float(s)) for n, t, c, s in rows]

    return design, analysed

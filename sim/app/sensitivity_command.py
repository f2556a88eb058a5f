"""`paceline sensitivity` from its inputs to a table and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from governor.model.files import write_atomically
from sim.base import words
from sim.base.layout import table, wrapped
from sim.experiment.effects import Effect, Level, Sensitivity
from sim.experiment.experiment import Pool
from sim.experiment.runs import Runs
from sim.scenario.scenario import Scenario
from sim.selection.search import Goal
from sim.selection.sensitivity import LEVEL_SEEDS, Method, sensitivity
from sim.selection.space import full_space

# Trajectories (Morris) or base samples (Sobol; a power of 2) if none are named.
SIZES: dict[Method, int] = {"morris": 48, "sobol": 256}
_UNITS = {
    "makespan_s": ("finish time", words.duration),
    "latency_p95_s": ("P95 latency", words.duration),
    "throttled_per_100": ("429s/100", words.number),
    "lost_per_100": ("lost/100", words.number),
}


def runs_foreseen(scenario: Scenario, method: Method, size: int, seeds: int) -> int:
    """About how many runs it takes: a design of size x (quantities + 1), or + 2, and pairs for rules and switches."""
    ladders = full_space(scenario).ladders.values()
    levels = [len(ladder) - 1 for ladder in ladders if isinstance(ladder[0], str | bool)]
    quantities = len(ladders) - len(levels)
    return seeds * size * (quantities + (1 if method == "morris" else 2)) + LEVEL_SEEDS * (1 + sum(levels))


def sensed(
    scenario: Scenario, objective: str, *, method: Method, size: int, seeds: int, near: bool, pool: Pool
) -> Sensitivity:
    """Return the effect of each setting around the scenario's own settings."""
    goal = Goal(objective=objective)
    return sensitivity(scenario, goal, method=method, size=size, seeds=seeds, near=near, runs=Runs(pool))


def sensitivity_text(scenario: Scenario, found: Sensitivity, width: int) -> str:
    """Return the effects as two tables, for people: quantities, then rules and switches."""
    names = list(found.effects)
    by_env = {name: {e.env: e for e in effects} for name, effects in found.effects.items()}
    heads = [_UNITS[name][0] for name in names]
    rows = [["quantity", *(head for name in heads for head in (name, "95 % interval")), "tried"]]
    for effect in found.effects[names[0]]:
        row = [effect.env]
        for name in names:
            row += _cells(by_env[name][effect.env], _UNITS[name][1], found.method)
        rows.append([*row, _values(found.values[effect.env])])
    by_level = {name: {level.assignment: level for level in levels} for name, levels in found.levels.items()}
    changes = [["rule or switch", *(head for name in heads for head in (name, "95 % interval"))]]
    for level in found.levels[names[0]]:
        row = [level.assignment]
        for name in names:
            row += _change(by_level[name][level.assignment], _UNITS[name][1])
        changes.append(row)
    about = {
        "morris": "Mean change of each figure, up or down, when that quantity alone moves by two thirds of its values, "
        "from many places (Morris' mu*).",
        "sobol": "Share of each figure's variance that would remain if all other quantities were known (Sobol's total "
        "index); shares overlap where quantities interact.",
    }
    parts = [
        table(rows, width=width),
        wrapped(about[found.method], width),
        table(changes, width=width),
        wrapped(
            "Change of each figure when that value alone takes the place of the present one, run by run under the same "
            "chance.",
            width,
        ),
        wrapped(
            f"{found.settings:,} settings in {found.runs:,} runs of {len(scenario.workload):,} requests (seed "
            f"{found.seed}).",
            width,
        ),
    ]
    return "\n\n".join(parts)


def _cells(effect: Effect, write: Callable[[float], str], method: str) -> list[str]:
    """Return a mean change, or a share of variance; a share that the sample cannot tell from any other says so."""
    size, half = effect.size, effect.half_width
    if method == "sobol":
        if half >= 1.0:
            return ["not known", "-"]
        write = words.number
    return [write(size), f"{write(max(0.0, size - half))} to {write(size + half)}"]


def _change(level: Level, write: Callable[[float], str]) -> list[str]:
    if math.isnan(level.change):
        return ["not known", "-"]
    plus = "+" if level.change > 0.0 else ""
    return [f"{plus}{write(level.change)}", f"{write(level.low)} to {write(level.high)}"]


def _values(values: tuple[object, ...]) -> str:
    words_ = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return ", ".join(words_) if len(words_) <= 3 else f"{words_[0]} ... {words_[-1]}"


def write_figure(path: str | Path, found: Sensitivity) -> None:
    """Return the figure as SVG or PNG, by the ending of the name."""
    # Drawing takes long to import, and only this needs it.
    from sim.base import style
    from sim.reporting import figures

    drawn = figures.sensitivity(found)
    data = style.png_of(drawn) if str(path).lower().endswith(".png") else style.svg_of(drawn).encode()
    with write_atomically(path) as unfinished:
        unfinished.write_bytes(data)

"""`paceline sensitivity` from its inputs to a table and a figure.

What lives here: how many settings are run, the text for people, the figure's file. What must not: the computation
(`sensitivity`), the drawing (`figures_robust`), options (`cli`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sim.base import words
from sim.base.files import write_atomically
from sim.base.layout import table, wrapped
from sim.experiment.effects import Effect, Sensitivity
from sim.experiment.experiment import Pool
from sim.experiment.runs import Runs
from sim.scenario.scenario import Scenario
from sim.selection.search import Goal
from sim.selection.sensitivity import Method, sensitivity
from sim.selection.space import full_space

# Trajectories (Morris) or base samples (Sobol; a power of 2) if none are named.
SIZES: dict[Method, int] = {"morris": 48, "sobol": 256}
UNITS = {
    "makespan_s": ("finish time", words.duration),
    "latency_p95_s": ("P95 latency", words.duration),
    "throttled_per_100": ("429s/100", words.number),
    "lost_per_100": ("lost/100", words.number),
}


def runs_foreseen(scenario: Scenario, method: Method, size: int, seeds: int) -> int:
    """About how many runs it takes: a design of size x (knobs + 1), or + 2."""
    knobs = len(full_space(scenario).ladders)
    return seeds * size * (knobs + (1 if method == "morris" else 2))


def sensed(
    scenario: Scenario, objective: str, *, method: Method, size: int, seeds: int, near: bool, pool: Pool
) -> Sensitivity:
    """The effect of each knob around the scenario's own settings."""
    goal = Goal(objective=objective)
    return sensitivity(scenario, goal, method=method, size=size, seeds=seeds, near=near, runs=Runs(pool))


def sensitivity_text(scenario: Scenario, found: Sensitivity, width: int) -> str:
    """The effects as a table, for people."""
    names = list(found.effects)
    by_env = {name: {e.env: e for e in effects} for name, effects in found.effects.items()}
    heads = [UNITS[name][0] for name in names]
    rows = [["setting", *(head for name in heads for head in (name, "± 95 %")), "tried"]]
    for effect in found.effects[names[0]]:
        row = [effect.env]
        for name in names:
            mine = by_env[name][effect.env]
            row += _cells(mine, UNITS[name][1]) if found.method == "morris" else _shares(mine)
        rows.append([*row, _values(found.values[effect.env])])
    about = {
        "morris": "Mean change of each figure when that setting alone moves by two thirds of its values, from many "
        "places (Morris' mu*), with its 95 % interval.",
        "sobol": "Share of each figure's variance that would remain if all other settings were known (Sobol's total "
        "index), with its 95 % interval; shares overlap where settings interact.",
    }
    parts = [
        table(rows, width=width),
        wrapped(about[found.method], width),
        wrapped(
            f"{found.settings:,} settings in {found.runs:,} runs of {len(scenario.workload):,} requests, all under the "
            f"same chance (seed {found.seed}).",
            width,
        ),
    ]
    return "\n\n".join(parts)


def _cells(effect: Effect, write: Callable[[float], str]) -> list[str]:
    return [write(effect.size), write(effect.half_width)]


def _shares(effect: Effect) -> list[str]:
    """A share of variance; one that the sample cannot tell from any other says so."""
    return _cells(effect, words.number) if effect.half_width < 1.0 else ["not known", "-"]


def _values(values: tuple[object, ...]) -> str:
    words_ = [str(v).lower() if isinstance(v, bool) else f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return ", ".join(words_) if len(words_) <= 3 else f"{words_[0]} ... {words_[-1]}"


def write_figure(path: str | Path, found: Sensitivity) -> None:
    """The figure as SVG or PNG, by the ending of the name."""
    # Drawing takes long to import, and only this needs it.
    from sim.base import style
    from sim.reporting import figures_robust

    drawn = figures_robust.sensitivity(found)
    data = style.png_of(drawn) if str(path).lower().endswith(".png") else style.svg_of(drawn).encode()
    with write_atomically(path) as unfinished:
        unfinished.write_bytes(data)

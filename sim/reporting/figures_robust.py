"""Figures of a plan's sensitivity: which knob matters, and the spread over drawn conditions.

Pure functions: values in, a matplotlib Figure out. The look that all figures share is in `style`.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from sim.base.palette import BLUE, INK, MUTED, OBJECTIVES, ORANGE, STYLES
from sim.base.style import in_time_units, new_figure, styled, time_scale
from sim.base.words import duration, number
from sim.experiment.effects import Sensitivity
from sim.experiment.robustness import DrawnConditions

# Knobs below this share of the largest effect would not be visible.
_LEAST = 0.002
# A figure per 100 requests gets no panel if all effects on it are below this.
LEAST_PER_100 = 0.05


@styled
def sensitivity(found: Sensitivity) -> Figure:
    """Plot the effect of each quantity and of each alternative rule or switch: one panel per figure with any effect.

    Panels share their rows, ordered by the effect on the objective; lines are 95 % intervals. Shares of variance
    (Sobol) are of quantities alone.
    """
    name, objective = OBJECTIVES[found.objective]
    panels = [(figure, rows) for figure in found.effects if (rows := _bars(found, figure, figure == objective))]
    if not panels:
        figure = new_figure(9.0, 1.2)
        figure.text(0.5, 0.5, "No setting changes anything here.", ha="center", va="center")
        return figure
    shown = list(dict.fromkeys(row for _, rows in panels for row in rows))
    shown.sort(key=lambda row: "=" in row)
    figure = new_figure(9.0, 1.15 + 0.28 * len(shown))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (which, bars) in zip(axes, panels, strict=True):
        in_time = found.method == "morris" and which == objective
        values = [bars.get(row, (0.0, 0.0, 0.0)) for row in shown]
        least, most = min(0.0, *(low for _, low, _ in values)), max(0.0, *(high for _, _, high in values))
        per, title = 1.0, _title(which, name)
        if in_time:
            per = in_time_units(ax.xaxis, max(most, -least), title)
        else:
            ax.set_xlabel(title if found.method == "morris" else f"{title}: share of variance")
        sizes = np.array([size for size, _, _ in values]) / per
        ends = np.array([(size - low, high - size) for size, low, high in values]).T / per
        at = range(len(shown))
        colour = BLUE if which == objective else ORANGE
        ax.barh(at, sizes, height=0.62, color=colour, edgecolor=INK, linewidth=0.5)
        ax.errorbar(sizes, at, xerr=ends, fmt="none", ecolor=MUTED, elinewidth=1.3, capsize=2.5, zorder=4)
        for row, (size, _, high) in zip(at, values, strict=True):
            text = duration(size) if in_time else number(size)
            place = (max(0.0, high) / per, row)
            ax.annotate(text, place, (5, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_xlim(1.05 * least / per, 1.25 * (most or 1.0) / per)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    axes[0].set_yticks(range(len(shown)), shown)
    axes[0].invert_yaxis()
    return figure


def _bars(found: Sensitivity, figure: str, is_objective: bool) -> dict[str, tuple[float, float, float]]:
    """Return the bars worth drawing: size, low and high end, by the name of the row. Empty if there is no effect."""
    effects = found.effects[figure]
    if found.method == "sobol" and any(e.half_width >= 1.0 for e in effects):
        return {}
    bars = {e.env: (e.size, max(0.0, e.size - e.half_width), e.size + e.half_width) for e in effects}
    if found.method == "morris":
        known = (level for level in found.levels[figure] if math.isfinite(level.change))
        bars |= {level.assignment: (level.change, level.low, level.high) for level in known}
    most = max((abs(size) for size, _, _ in bars.values()), default=0.0)
    if most <= (0.0 if is_objective or found.method == "sobol" else LEAST_PER_100):
        return {}
    return {row: bar for row, bar in bars.items() if abs(bar[0]) > _LEAST * most}


def _title(figure: str, objective: str) -> str:
    return {"throttled_per_100": "429s per 100 requests", "lost_per_100": "lost per 100 requests"}.get(
        figure, f"change of {objective}"
    )


@styled
def drawn(found: DrawnConditions, *, objective: str = "makespan", throttled_limit: float = 1.0) -> Figure:
    """Plot time against the share of drawn conditions in which a policy is done by then, one curve per policy.

    429s have a second panel, if there are any. Marked: the value that one draw in 20 exceeds, and the worst.
    """
    panels = [("objective_s", OBJECTIVES[objective][0])]
    if any(each.worst("throttled_per_100") > 0.0 for each in found.outcomes.values()):
        panels.append(("throttled_per_100", "429s per 100 requests"))
    figure = new_figure(9.0, 3.3)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (name, title) in zip(axes, panels, strict=True):
        values = {who: np.sort(getattr(each, name)) for who, each in found.outcomes.items() if who in STYLES}
        finite = [v[np.isfinite(v)] for v in values.values()]
        low, high = min(float(v.min()) for v in finite if len(v)), max(float(v.max()) for v in finite if len(v))
        per = 1.0
        if name == "objective_s":
            per = time_scale(ax.xaxis, low, high, title)
        else:
            ax.set_xlabel(title)
            ax.axvline(throttled_limit, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for who, times in values.items():
            style = STYLES[who]
            share = (np.arange(len(times)) + 1.0) / len(times)
            ax.step(times / per, 100.0 * share, where="post", color=style.colour, linewidth=1.5, label=style.label)
            bad, worst = found.outcomes[who].bad(name), found.outcomes[who].worst(name)
            for value, height in ((bad, 95.0), (worst, 100.0)):
                if math.isfinite(value):
                    size = 80 if style.marker == "*" else 28
                    mark = {"s": size, "marker": style.marker, "color": style.colour, "edgecolors": INK}
                    ax.scatter(value / per, height, linewidths=0.5, zorder=4, **mark)
        ax.grid(axis="both")
        ax.set_ylim(0.0, 104.0)
    axes[0].set_ylabel("draws done by then, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure

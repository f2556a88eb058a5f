"""Figures of a plan: what held the batch back, maps of the knobs, the front, stress, sensitivity, drawn conditions.

Pure functions: values in, a matplotlib Figure out. Figures with a time axis are in `figures_time`, the shared look is
in `style`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from governor.model.policy import KNOB_BY_ENV
from governor.model.requests import CAUSES
from sim.base.palette import BLUE, CAUSE_LABELS, GRID, INK, MUTED, OBJECTIVES, ORANGE, SKY, STYLES, SURFACE, VERMILLION
from sim.base.style import arranged, in_time_units, new_figure, styled, time_scale
from sim.base.words import duration, number, time_unit
from sim.experiment.effects import Sensitivity
from sim.experiment.results import Forecast, Heat, Point, StressRow
from sim.experiment.robustness import DrawnConditions

# Knobs below this share of the largest effect would not be visible.
_LEAST = 0.002
# A figure per 100 requests gets no panel if all effects on it are below this.
LEAST_PER_100 = 0.05

# ---------------------------------------------------------------- what held the batch back


@styled
def waits(forecasts: Mapping[str, Forecast]) -> Figure:
    """Plot the mean wait per request over all runs by cause: one bar per policy, only for causes that occur.

    `forecasts`: by a name of STYLES; the causes are in order of the first forecast's waits.
    """
    means = {who: {cause: seconds / f.requests for cause, seconds in f.waits_s.items()} for who, f in forecasts.items()}
    longest = max((seconds for waited in means.values() for seconds in waited.values()), default=0.0)
    # A cause too small to show as a bar, which reads "0 s", gets no row.
    seen = [c for c in CAUSES[1:] if any(w.get(c, 0.0) > max(0.05, 0.0005 * longest) for w in means.values())]
    seen.sort(key=lambda cause: -max(next(iter(means.values()))[cause], 1e-3 * sum(m[cause] for m in means.values())))
    figure = new_figure(9.0, 1.1 + 0.27 * len(means) * max(1, len(seen)))
    ax = figure.add_subplot()
    if not seen:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "No request waited for anything.", ha="center", va="center", transform=ax.transAxes)
        return figure
    per = in_time_units(ax.xaxis, longest, "waited per request, mean")
    height = 0.8 / len(means)
    for i, (who, waited) in enumerate(means.items()):
        style = STYLES[who]
        rows = [k + (i - (len(means) - 1) / 2.0) * height for k in range(len(seen))]
        values = [waited[cause] for cause in seen]
        ax.barh(
            rows,
            [v / per for v in values],
            height=0.9 * height,
            color=style.colour,
            edgecolor=INK,
            linewidth=0.5,
            hatch=style.hatch,
            label=style.label,
        )
        for row, value in zip(rows, values, strict=True):
            ax.annotate(
                duration(value) if value > 0.05 else "0 s",
                (value / per, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    ax.set_yticks(range(len(seen)), [CAUSE_LABELS[cause][0] for cause in seen])
    ax.invert_yaxis()
    ax.set_xlim(0.0, 1.13 * longest / per)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=len(means))
    return figure


# ---------------------------------------------------------------- maps of the knobs


@styled
def heat(map_: Heat, *, objective: str = "makespan", throttled_limit: float = 1.0) -> Figure:
    """Plot the objective over two knobs, a number in each cell; too many 429s and lost requests are marked on top.

    Today's settings and the recommendation are marked at their position, between cells or at the edge if necessary.
    """
    rows, cols = map_.objective_s.shape
    figure = new_figure(1.3 + 0.48 * max(cols, 8), 1.75 + 0.4 * max(rows, 4))
    ax = figure.add_subplot()
    known = map_.objective_s[np.isfinite(map_.objective_s)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    per, unit = time_unit(low + (high - low) / 4.0)
    norm: Normalize = LogNorm(low / per, high / per) if high > 3.0 * low > 0.0 else Normalize(low / per, high / per)
    # Light means fast: the eye goes there, and the numbers in the cells stay readable in print.
    image = ax.pcolormesh(map_.objective_s / per, cmap="cividis_r", norm=norm, edgecolors=SURFACE, linewidth=0.8)
    _knob_axis(ax.xaxis, map_.x_env, map_.x_values)
    _knob_axis(ax.yaxis, map_.y_env, map_.y_values)
    ax.spines[:].set_visible(False)
    ax.set_title(f"{OBJECTIVES[objective][0]}, {unit}")
    handles: list[Any] = []
    places = [(_index(map_.x_values, x), _index(map_.y_values, y)) for x, y in (map_.now, map_.recommended)]
    for y in range(rows):
        for x in range(cols):
            shared = any(abs(x + 0.5 - px) < 0.5 and abs(y + 0.5 - py) < 0.5 for px, py in places)
            _cell(ax, image, map_, x, y, per, throttled_limit, 0.18 if shared else 0.0)
    # Below the number, not on it; and side by side if both fall into one cell.
    apart = 0.2 if math.dist(*places) < 0.4 else 0.0
    for who, place, side in zip(("now", "recommended"), places, (-apart, apart), strict=True):
        style = STYLES[who]
        handles += ax.plot(
            place[0] + side,
            place[1] - 0.22,
            linestyle="none",
            marker=style.marker,
            markersize=11 if style.marker == "*" else 6.5,
            color=style.colour,
            markeredgecolor=SURFACE,
            markeredgewidth=0.9,
            label=f"{style.label}: these two settings",
            clip_on=False,
            zorder=5,
        )
    over = (map_.throttled_per_100 > throttled_limit) & (map_.lost <= 0)
    if over.any():
        handles += ax.plot([], [], color="none", label=f"▲ more than {throttled_limit:g} per 100 refused (429)")
    if (map_.lost > 0).any():
        handles += ax.plot([], [], color="none", label="✕ requests lost")
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if cols < 9 else 4, handletextpad=0.3)
    return figure


def _cell(ax: Axes, image: Any, map_: Heat, x: int, y: int, per: float, throttled_limit: float, raised: float) -> None:
    """Draw one cell's number and marks, in an ink that contrasts with its colour; `raised` above the middle."""
    value = map_.objective_s[y, x] / per
    known = math.isfinite(value)
    mark = "✕" if map_.lost[y, x] > 0 else "▲" if map_.throttled_per_100[y, x] > throttled_limit else ""
    colour = image.cmap(image.norm(value)) if known else (1.0, 1.0, 1.0)
    # Relative luminance (WCAG 2): above 0.18 black has the better contrast.
    luminance = sum(w * c**2.2 for w, c in zip((0.2126, 0.7152, 0.0722), colour[:3], strict=True))
    ink = "black" if luminance > 0.18 else "white"
    text = "–" if not known else f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
    ax.text(x + 0.5, y + 0.48 + raised, f"{text}{mark}", ha="center", va="center", fontsize=8, color=ink)


def _knob_axis(axis: Any, env: str, values: Sequence[float]) -> None:
    knob = KNOB_BY_ENV.get(env)
    unit = f", {knob.unit}" if knob is not None and knob.unit else ""
    axis.set_ticks([i + 0.5 for i in range(len(values))], [f"{value:g}" for value in values])
    axis.set_tick_params(length=0)
    axis.set_label_text(f"{env}{unit}")


def _index(values: Sequence[float], at: float) -> float:
    """Return a value's position among the cells: at a middle, between two, or at the edge if beyond the ends."""
    if at < values[0]:
        return 0.0
    if at > values[-1]:
        return float(len(values))
    return float(np.interp(at, values, range(len(values)))) + 0.5


# ---------------------------------------------------------------- the front


@styled
def front(
    points: Sequence[Point],
    forecasts: Mapping[str, Forecast],
    *,
    objective: str = "makespan",
    throttled_limit: float = 1.0,
) -> Figure:
    """Plot every setting tried: 429s per 100 requests against the objective, with the front marked.

    `forecasts`: the published estimates, by a name of STYLES, marked and labelled.
    """
    name, figure_name = OBJECTIVES[objective]
    marks = {who: (f["throttled_per_100"].mean, f[figure_name].mean) for who, f in forecasts.items()}
    marks = {who: mark for who, mark in marks.items() if math.isfinite(mark[1])}
    shown = [p for p in points if math.isfinite(p.objective_s)]
    figure = new_figure(9.0, 4.4)
    ax = figure.add_subplot()
    times = [p.objective_s for p in shown] + [mark[1] for mark in marks.values()]
    per = time_scale(ax.yaxis, min(times), max(times), name)
    ax.grid(axis="y")
    _throttle_axis(ax, [p.throttled_per_100 for p in shown] + [mark[0] for mark in marks.values()])
    ax.axvspan(throttled_limit, 1e6, facecolor=GRID, alpha=0.35, linewidth=0)
    ax.axvline(throttled_limit, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    if throttled_limit < 0.9 * ax.get_xlim()[1]:
        text = f"more than the {throttled_limit:g} per 100 allowed"
        ax.annotate(text, (throttled_limit, 0), (5, 4), ("data", "axes fraction"), "offset points", color=MUTED)
    for origin, label, colour, marker in (
        ("guardrails", "guardrail knobs only", SKY, "s"),
        ("paceline", "everything the law can do", BLUE, "o"),
    ):
        kept = [p for p in shown if p.origin == origin and p.lost <= 0]
        _dots(ax, kept, per, label, color=colour, marker=marker, s=16, alpha=0.55, linewidths=0)
    lossy = [p for p in shown if p.lost > 0]
    _dots(ax, lossy, per, "loses requests", color=VERMILLION, marker="x", s=18, alpha=0.8, linewidths=0.9)
    best = sorted((p for p in shown if p.on_front), key=lambda p: (p.throttled_per_100, -p.objective_s))
    if best:
        x, y = [p.throttled_per_100 for p in best], [p.objective_s / per for p in best]
        (line,) = ax.plot(x, y, "o-", drawstyle="steps-post", color=INK, linewidth=1.1, markersize=6, zorder=3)
        line.set(markerfacecolor="none", label="front: none is better in both")
    for who, (throttled, seconds) in marks.items():
        style = STYLES[who]
        size = 190 if style.marker == "*" else 70
        look: dict[str, Any] = {"s": size, "facecolor": style.colour, "edgecolor": INK, "marker": style.marker}
        ax.scatter(throttled, seconds / per, zorder=5, **look)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, handletextpad=0.4)
    texts = {who: f"{STYLES[who].label}: {duration(seconds)}" for who, (_, seconds) in marks.items()}
    texts |= {who: f"{texts[who]}, loses requests" for who in marks if forecasts[who].lost}
    obstacles = [(p.throttled_per_100, p.objective_s / per) for p in shown]
    # The line of the limit is an obstacle for labels too, at any height.
    obstacles += [(throttled_limit, y) for y in np.geomspace(*ax.get_ylim(), 60).tolist()]
    _label_marks(figure, ax, texts, {who: (x, y / per) for who, (x, y) in marks.items()}, obstacles)
    return figure


def _dots(ax: Axes, points: Sequence[Point], per: float, label: str, **how: Any) -> None:
    if points:
        x = [p.throttled_per_100 for p in points]
        y = [p.objective_s / per for p in points]
        # Thousands of vector marks make a large file and a slow page.
        ax.scatter(x, y, label=f"{label} ({len(points):,})", rasterized=len(points) > 1_500, **how)


def _throttle_axis(ax: Axes, throttled: Sequence[float]) -> None:
    """Scale the axis of 429s per 100 requests from 0: linear to 1, logarithmic beyond if much lies beyond."""
    most = max(throttled)
    ax.set_xlabel("429s per 100 requests")
    if most > 5.0:
        ax.set_xscale("symlog", linthresh=1.0, linscale=0.7)
        ticks = [0.0, 0.5, 1.0, *(m * 10.0**d for d in range(6) for m in (2, 5, 10))]
        ax.set_xticks([t for t in ticks if t <= 1.1 * most], minor=False)
        ax.set_xticks([], minor=True)
        ax.set_xlim(-0.12, 1.35 * most)
    else:
        ax.set_xlim(-0.04 * max(most, 1.25), 1.15 * max(most, 1.25))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _label_marks(
    figure: Figure,
    ax: Axes,
    texts: Mapping[str, str],
    marks: Mapping[str, tuple[float, float]],
    obstacles: Sequence[tuple[float, float]],
) -> None:
    """Write each mark's text beside it, on the side where it covers the fewest obstacles and no other label."""
    # The positions of the axes are known only after layout.
    arranged(figure)
    to_points = 72.0 / figure.dpi
    dots = (to_points * ax.transData.transform(obstacles)).tolist() if obstacles else []
    places = {who: to_points * ax.transData.transform(at) for who, at in marks.items()}
    frame = ax.get_window_extent()
    left, bottom, right, top = (to_points * edge for edge in frame.extents)
    taken = [(x - 7.0, y - 7.0, x + 7.0, y + 7.0) for x, y in places.values()]
    for who, (x, y) in places.items():
        width, height = 5.1 * len(texts[who]), 11.0
        boxes = []
        for dx, dy in _OFFSETS:
            x0 = x + dx if dx > 0 else x + dx - width if dx < 0 else x - width / 2.0
            boxes.append((x0, y + dy - height / 2.0, x0 + width, y + dy + height / 2.0))
        covered = [
            100.0 * (box[0] < left or box[2] > right or box[1] < bottom or box[3] > top)
            + 30.0
            * sum(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            )
            + sum(box[0] < px < box[2] and box[1] < py < box[3] for px, py in dots)
            for box in boxes
        ]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        dx, dy = _OFFSETS[best]
        ax.annotate(
            texts[who],
            marks[who],
            (dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            bbox={"facecolor": SURFACE, "alpha": 0.75, "linewidth": 0, "pad": 1.0},
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7} if math.hypot(dx, dy) > 20 else None,
            zorder=6,
        )


# Nearest first: of two places that cover equally many obstacles the nearer is taken.
_OFFSETS = [
    (math.copysign(reach, side) if side else 0.0, up * reach)
    for reach in (12.0, 24.0, 40.0, 60.0, 90.0)
    for side, up in ((1, 0.0), (1, 0.8), (1, -0.8), (0, 1.1), (0, -1.1), (-1, 0.0), (-1, 0.8), (-1, -0.8))
]


# ---------------------------------------------------------------- the stress set


@styled
def stress(
    rows: Sequence[StressRow],
    plain: Mapping[str, Forecast],
    *,
    objective: str = "makespan",
) -> Figure:
    """Plot the objective of each policy under each condition, as dots on one line per condition; `plain`: as assumed.

    The dot is crossed if the policy loses requests under that condition.
    """
    name, figure_name = OBJECTIVES[objective]
    lines: list[tuple[str, Mapping[str, Forecast]]] = [
        ("as assumed", plain),
        *((row.name, row.forecasts) for row in rows),
    ]
    figure = new_figure(9.0, 1.15 + 0.34 * len(lines))
    ax = figure.add_subplot()
    times = [f[figure_name].mean for _, found in lines for f in found.values() if math.isfinite(f[figure_name].mean)]
    if not times:
        ax.set_axis_off()
        return figure
    per = time_scale(ax.xaxis, min(times), max(times), name)
    for who, style in STYLES.items():
        aside = 0.15 * (list(STYLES).index(who) - 1.5)
        at = [(f[who][figure_name].mean / per, i + aside) for i, (_, f) in enumerate(lines) if who in f]
        if at:
            x, y = [place[0] for place in at], [place[1] for place in at]
            size = 90 if style.marker == "*" else 34
            ax.scatter(x, y, s=size, marker=style.marker, color=style.colour, edgecolors=INK, linewidths=0.5, zorder=3)
            ax.scatter([], [], s=size, marker=style.marker, color=style.colour, label=style.label)
        lossy = [
            (f[who][figure_name].mean / per, i + aside) for i, (_, f) in enumerate(lines) if who in f and f[who].lost
        ]
        if lossy:
            x, y = [place[0] for place in lossy], [place[1] for place in lossy]
            ax.scatter(x, y, s=90, marker="x", color=VERMILLION, linewidths=1.6, zorder=4)
    ax.set_yticks(range(len(lines)), [condition for condition, _ in lines])
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="both")
    figure.legend(loc="outside upper left", ncols=5)
    return figure


# ---------------------------------------------------------------- sensitivity and drawn conditions


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

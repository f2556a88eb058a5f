"""Figures of several settings side by side, and of recorded against simulated: for notebooks.

Pure functions: values in, a matplotlib Figure out. The look is in `style`; maps of two knobs are in `figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from governor.model.prices import dollars_text
from governor.model.requests import Attempt
from sim.base.palette import BLUE, GREY, INK, MUTED, ORANGE, VERMILLION
from sim.base.style import in_time_units, new_figure, styled, time_scale
from sim.base.words import duration, number
from sim.experiment.results import Forecast
from sim.reporting import series
from sim.selection.batch_api import Way
from sim.selection.capacity_results import Capacity, LimitProbe


@styled
def compared(forecasts: Mapping[str, Forecast]) -> Figure:
    """Plot finish time, 429s and losses of several settings, one row each, in the given order from the top.

    Bars are means over the runs; the line on a finish time spans the 5th to the 95th percentile of the runs.
    """
    names = list(forecasts)
    figure = new_figure(9.0, 0.9 + 0.34 * len(names))
    axes: list[Axes] = list(figure.subplots(1, 3, sharey=True, width_ratios=(1.5, 1.0, 1.0)))
    spans = [forecasts[name]["makespan_s"] for name in names]
    per = in_time_units(axes[0].xaxis, max(e.p95 for e in spans), "")
    axes[0].set_xlabel("")
    rows = np.arange(len(names))
    axes[0].barh(rows, [e.mean / per for e in spans], color=BLUE, height=0.62)
    axes[0].hlines(rows, [e.p5 / per for e in spans], [e.p95 / per for e in spans], color=INK, linewidth=1.4)
    _told(axes[0], rows, [e.p95 / per for e in spans], [duration(e.mean) for e in spans])
    unit = {1.0: "s", 60.0: "min", 3_600.0: "h"}.get(per, "days")
    axes[0].set_title(f"finishes after, {unit}")
    for ax, figure_name, title, colour in (
        (axes[1], "throttled_per_100", "429s per 100 requests", ORANGE),
        (axes[2], "failed", "requests lost per run", VERMILLION),
    ):
        values = [forecasts[name][figure_name].mean for name in names]
        ax.barh(rows, values, color=colour, height=0.62)
        _told(ax, rows, values, [number(value) for value in values])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        ax.set_title(title)
    axes[0].set_yticks(rows, names)
    axes[0].invert_yaxis()
    for ax in axes:
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.locator_params(axis="x", nbins=5)
        ax.spines["left"].set_visible(False)
    return figure


def _told(ax: Axes, rows: Sequence[int] | np.ndarray, ends: Sequence[float], texts: Sequence[str]) -> None:
    """Write a text after the end of each bar, and make room for it."""
    for row, end, text in zip(rows, ends, texts, strict=True):
        ax.annotate(text, (end, float(row)), (4, 0), textcoords="offset points", va="center", fontsize=8)
    # If all values are 0, matplotlib's own axis would end at a billionth.
    ax.set_xlim(0.0, 1.35 * (max(ends) or 1.0))


@styled
def side_by_side(measured: Sequence[Attempt], simulated: Mapping[int, Sequence[Attempt]], limit: float = 0.0) -> Figure:
    """Plot requests answered over time, a live run against simulations of it by seed, and the rate against the limit.

    `limit`: the provider's tokens per minute, 0 = none.
    """
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    end_s = max(a.finished_s for rows in (measured, *simulated.values()) for a in rows)
    for ax in (left, right):
        per = in_time_units(ax.xaxis, end_s, "time since the start")
        ax.set_xlim(0.0, 1.01 * end_s / per)
        ax.grid(axis="both")
    for i, (rows, colour, width, label) in enumerate(
        [*((rows, ORANGE, 0.9, "simulated") for rows in simulated.values()), (measured, BLUE, 1.8, "measured")]
    ):
        done = np.sort([a.finished_s for a in rows if a.outcome == "ok"])
        label = label if label == "measured" or not i else "_"
        look = {"color": colour, "linewidth": width, "label": label}
        left.step(np.append(done, end_s) / per, np.append(np.arange(1, len(done) + 1), len(done)), where="post", **look)
        times, tokens = series.charged_per_minute(rows)
        kept = times <= end_s
        right.step(times[kept] / per, tokens[kept], where="post", **look)
    left.set_title("Requests answered")
    right.set_title("Tokens charged in the last 60 s")
    if limit > 0.0:
        right.axhline(limit, color=INK, linewidth=1.1, linestyle="--", label=f"limit: {limit:,.0f} per minute")
    for ax in (left, right):
        ax.set_ylim(bottom=0.0)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3)
    return figure


# ---------------------------------------------------------------- live, flex, the Batch API


@styled
def ways_figure(ways: Sequence[Way], deadline_s: float) -> Figure:
    """Plot the cost of each way against the time that holds in 95 of 100 runs, with the front and the deadline.

    Ways that are never done, or whose cost is not known, are left out.
    """
    shown = [(way, way.cost_usd) for way in ways if math.isfinite(way.promise_s) and way.cost_usd is not None]
    figure = new_figure(9.0, 3.4)
    ax = figure.subplots()
    end_s, top = max([deadline_s, *(way.promise_s for way, _ in shown)]), max((usd for _, usd in shown), default=1.0)
    per = in_time_units(ax.xaxis, end_s, "done in 95 of 100 runs after")
    front = sorted((way.promise_s / per, usd) for way, usd in shown if way.on_front)
    ax.step([at for at, _ in front], [usd for _, usd in front], where="post", color=BLUE, linewidth=1.4)
    named: list[tuple[float, float]] = []
    for way, usd in shown:
        x, colour = way.promise_s / per, BLUE if way.on_front else GREY
        ax.plot(x, usd, "o", color=colour, markersize=6)
        name = way.name if way.deadline_s is None else f"{way.name}, {duration(way.deadline_s)}"
        # Two names at one place could not be read; the table has all of them.
        if all(abs(x - at) > 0.02 * end_s / per or abs(usd - cost) > 0.03 * top for at, cost in named):
            ax.annotate(name, (x, usd), (5, 5), textcoords="offset points", fontsize=8)
            named.append((x, usd))
    ax.axvline(deadline_s / per, color=INK, linewidth=1.1, linestyle="--", label="the deadline")
    ax.set_xlim(left=0.0)
    ax.set_ylim(0.0, 1.15 * top)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: dollars_text(value)))
    ax.set_title("Cost")
    ax.grid(axis="both")
    ax.margins(x=0.12)
    ax.legend(loc="upper right")
    return figure


# ---------------------------------------------------------------- capacity


# Waits are drawn up to this multiple of the target.
STEADY_TOP = 4.0


@styled
def capacity_figure(found: Capacity) -> Figure:
    """Plot finish time (P50 and the band from P5 to P95 of the runs) against the limit, with target, answer and tiers.

    Limits abandoned early because too many runs were late are left out, and so are tiers off the scale.
    """
    steady = found.wait_p95_s >= 0.0
    name, label = ("wait_p95_s", "95th percentile of waits") if steady else ("makespan_s", "finish time")
    wish_s = found.wait_p95_s if steady else found.finish_by_s
    whole = [p for p in found.probes if p.runs == found.replications and not p.forecast.lost]
    if found.smallest:
        whole.append(found.smallest)
    whole = sorted({p.tpm: p for p in whole}.values(), key=lambda p: p.tpm)
    figure = new_figure(9.0, 4.6)
    ax = figure.add_subplot()
    values = [getattr(p.forecast[name], q) for p in whole for q in ("p5", "p95")] + [wish_s]
    if steady:
        # Waits can be zero, and grow without bound if the limit is below the load: neither fits a logarithmic axis.
        top_s = min(max(values), STEADY_TOP * wish_s)
        per = in_time_units(ax.yaxis, top_s, label)
        ax.set_ylim(-0.02 * top_s / per, 1.05 * max(top_s, 1.2 * wish_s) / per)
    else:
        per = time_scale(ax.yaxis, min(values), max(values), label)
    x = [p.tpm for p in whole]
    p5, p50, p95 = ([getattr(p.forecast[name], q) / per for p in whole] for q in ("p5", "p50", "p95"))
    ax.fill_between(x, p5, p95, color=BLUE, alpha=0.2, linewidth=0, label="P5 to P95 of the runs")
    ax.plot(x, p50, color=BLUE, marker="o", markersize=3.5, linewidth=1.4, label="P50")
    ax.axhline(wish_s / per, color=VERMILLION, linestyle="--", linewidth=1.1, label=f"asked for: {duration(wish_s)}")
    if found.smallest:
        ax.plot(
            [found.smallest.tpm],
            [found.smallest.forecast[name].p50 / per],
            linestyle="none",
            marker="*",
            markersize=14,
            color=ORANGE,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            zorder=5,
            label=f"smallest that meets it: {found.smallest.tpm:,}",
        )
    ax.set_xscale("log")
    low, high = min(x, default=1), max(x, default=10)
    ax.set_xlim(low / 1.08, max(high * 1.08, low * 1.2))
    _tiers(ax, found.tiers)
    ticks = [m * 10.0**decade for decade in range(13) for m in ((1, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5))]
    ax.set_xticks([tick for tick in ticks if low / 1.08 <= tick <= high * 1.08])
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
    ax.set_xlabel("tokens per minute")
    ax.grid(axis="both")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _tiers(ax: Axes, tiers: tuple[LimitProbe, ...]) -> None:
    low, high = ax.get_xlim()
    for tier in tiers:
        if low <= tier.tpm <= high:
            ax.axvline(tier.tpm, color=GREY, linewidth=0.9, linestyle=":")
            ax.annotate(
                tier.name,
                (tier.tpm, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=8,
                color=MUTED,
            )


def _thousands(value: float) -> str:
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:,.10g}{suffix}"
    return f"{value:,.10g}"

"""Figures over the time of a run: tokens per minute against the limit, requests in flight, launches and 429s, waits.

Pure functions: attempts in, a matplotlib Figure out. The series come from `series`, the look from `style`. A curve with
more steps than the page has pixels is drawn as its envelope (maxima), so that no peak above a limit is hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from governor.forecast.summary import Grant
from governor.model.requests import Attempt
from governor.model.work import THROTTLES
from sim.base.palette import BLUE, CAUSE_LABELS, INK, MUTED, STYLES, VERMILLION, Style
from sim.base.style import in_time_units, new_figure, styled
from sim.base.words import duration
from sim.reporting import series

# Steps per curve, and marks per series, above which a page would only grow.
CURVE_STEPS = 700
VECTOR_MARKS = 1_000
MEAN_SPANS = 120
WAIT_SPANS = 150
_PLAIN = Style("", BLUE, "o", "")


@styled
def over_time(timelines: Mapping[str, Sequence[Attempt]], grant: Grant) -> Figure:
    """Plot one run of each policy: tokens per minute and requests in flight in columns, all launches on one time axis.

    `timelines`: by a name of STYLES, one column each, in that order. Columns share the vertical scale, but each has its
    own time axis, because a run ten times as fast would be unreadable on the slower run's axis.
    """
    columns = max(1, len(timelines))
    figure = new_figure(9.0, 7.6)
    grid = figure.add_gridspec(3, columns, height_ratios=(1.0, 0.8, 1.1))
    tokens: list[Axes] = []
    flight: list[Axes] = []
    for i, (who, attempts) in enumerate(timelines.items()):
        style, end_s = STYLES[who], _end_s(attempts)
        top = figure.add_subplot(grid[0, i], sharey=tokens[0] if i else None)
        low = figure.add_subplot(grid[1, i], sharex=top, sharey=flight[0] if i else None)
        per = _time_axis([top, low], end_s)
        _tokens(top, per, attempts, style)
        _limit(top, per, grant, end_s)
        _in_flight(low, per, attempts, style)
        top.set_title(f"{style.label}\ndone after {duration(end_s)} in this run")
        for ax in (top, low):
            ax.tick_params(labelleft=not i)
            ax.set_ylabel(ax.get_ylabel() if not i else "")
        tokens, flight = [*tokens, top], [*flight, low]
    last = figure.add_subplot(grid[2, :])
    per = _time_axis([last], max((_end_s(attempts) for attempts in timelines.values()), default=0.0))
    for who, attempts in timelines.items():
        _launches(last, per, attempts, STYLES[who])
    _from_zero([*tokens[:1], *flight[:1], last])
    named: dict[str, Any] = {}
    for ax in (*tokens, last):
        named = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)) | named
    policies = {STYLES[who].label for who in timelines}
    labels = sorted(named, key=lambda label: label not in policies)
    figure.legend([named[label] for label in labels], labels, loc="outside lower left", ncols=6)
    return figure


@styled
def timeline(attempts: Sequence[Attempt], grant: Grant, *, title: str = "") -> Figure:
    """Plot one run: tokens per minute against the limit, requests in flight, launches with 429s, causes of waiting."""
    end_s = _end_s(attempts)
    figure = new_figure(9.0, 9.0)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    axes: list[Axes] = list(figure.subplots(4, 1, sharex=True))
    per = _time_axis(axes, end_s)
    _tokens(axes[0], per, attempts, _PLAIN)
    _limit(axes[0], per, grant, end_s)
    _in_flight(axes[1], per, attempts, _PLAIN)
    _launches(axes[2], per, attempts, _PLAIN)
    _from_zero(axes[:3])
    _waits(axes[3], per, attempts, end_s)
    for ax, name in zip(
        axes, ("Tokens charged", "Requests in flight", "Launches", "The queue's head waited for"), strict=True
    ):
        ax.set_title(name)
    for ax in (axes[0], axes[2]):
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2, borderaxespad=0.1)
    # Up to seven causes: they need the whole width.
    handles, labels = axes[3].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=4)
    return figure


@styled
def glance(attempts: Sequence[Attempt], grant: Grant, *, title: str = "") -> Figure:
    """Plot one run in small: tokens per minute against the limit, requests in flight, launches with 429s, in a row."""
    end_s = _end_s(attempts)
    figure = new_figure(9.0, 2.3)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=9.5)
    axes: list[Axes] = list(figure.subplots(1, 3))
    for ax in axes:
        per = _time_axis([ax], end_s)
    _tokens(axes[0], per, attempts, _PLAIN)
    _limit(axes[0], per, grant, end_s)
    _in_flight(axes[1], per, attempts, _PLAIN)
    _launches(axes[2], per, attempts, _PLAIN)
    _from_zero(axes)
    return figure


def _time_axis(axes: Sequence[Axes], end_s: float) -> float:
    """Scale and label the time axis that these stacked panels share; return its seconds per unit."""
    per = in_time_units(axes[-1].xaxis, end_s, "time since the start")
    for ax in axes:
        ax.set_xlim(0.0, max(end_s, 1e-3) * 1.01 / per)
        ax.grid(axis="both")
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False)
    return per


def _from_zero(axes: Sequence[Axes]) -> None:
    """Make the scales begin at 0 and cover everything drawn, including on axes that share them."""
    for ax in axes:
        together = ax.get_shared_y_axes().get_siblings(ax)
        ax.set_ylim(0.0, 1.06 * max([1e-3, *(other.dataLim.y1 for other in together)]))


def _end_s(attempts: Sequence[Attempt]) -> float:
    return max((a.finished_s for a in attempts), default=0.0)


def _curve(ax: Axes, per: float, steps: series.Steps, end_s: float, style: Style, *, filled: bool) -> None:
    """Draw a step curve from the start to `end_s`, filled below or as a line alone."""
    times, values = steps
    times = np.concatenate([[0.0], times, [end_s]]) / per
    values = np.concatenate([[0.0], values, values[-1:]]) if len(values) else np.zeros(2)
    if filled:
        ax.fill_between(times, values, step="post", color=style.colour, alpha=0.35, linewidth=0)
    ax.step(times, values, where="post", color=style.colour, linewidth=1.1)


def _tokens(ax: Axes, per: float, attempts: Sequence[Attempt], style: Style) -> None:
    end_s = _end_s(attempts)
    ax.set_ylabel("tokens in the last 60 s")
    _curve(ax, per, series.envelope(series.charged_per_minute(attempts), end_s, CURVE_STEPS), end_s, style, filled=True)
    ax.yaxis.set_major_formatter(FuncFormatter(_thousands))


def _thousands(value: float, _: int | None = None) -> str:
    """Return a token count as an axis label: 500, 30k, 2.5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _limit(ax: Axes, per: float, grant: Grant, end_s: float) -> None:
    """Draw the provider's limit per minute, with its changes; nothing if there is none."""
    if grant.tpm_limit <= 0.0:
        return
    changes = [(at_s, factor) for at_s, factor in grant.changes if at_s < end_s]
    times = [0.0, *(at_s for at_s, _ in changes), max(end_s, 1e-3) * 1.01]
    factors = [1.0, *(factor for _, factor in changes)]
    limits = [grant.tpm_limit * factor for factor in (*factors, factors[-1])]
    label = f"limit: {grant.tpm_limit:,.0f} per minute{' at first' if changes else ''}"
    ax.step([t / per for t in times], limits, where="post", color=INK, linewidth=1.2, linestyle="--", label=label)


def _in_flight(ax: Axes, per: float, attempts: Sequence[Attempt], style: Style) -> None:
    """Draw requests in flight as means of short spans: for short requests the steps themselves look like a comb."""
    end_s = _end_s(attempts)
    ax.set_ylabel("in flight")
    steps = series.in_flight(attempts)
    if len(steps[0]) > MEAN_SPANS:
        steps = series.means(steps, end_s, MEAN_SPANS)
    _curve(ax, per, steps, end_s, style, filled=True)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _launches(ax: Axes, per: float, attempts: Sequence[Attempt], style: Style) -> None:
    """Draw attempts launched so far, with marks for 429s that were retried and for lost requests."""
    ax.set_ylabel("attempts launched")
    ordered = sorted(attempts, key=lambda a: a.launched_s)
    end_s = _end_s(attempts)
    launched = series.steps(np.array([a.launched_s for a in ordered]), np.ones(len(ordered)))
    _curve(ax, per, series.envelope(launched, end_s, CURVE_STEPS), end_s, style, filled=False)
    if style.label:
        ax.plot([], [], color=style.colour, label=style.label)
    refused = [i for i, a in enumerate(ordered) if a.outcome in THROTTLES and not a.error_code]
    lost = [i for i, a in enumerate(ordered) if a.error_code]
    known = ax.get_legend_handles_labels()[1]
    for found, label, marker, colour, size in (
        (refused, "429: refused, tried again", "x", VERMILLION, 26),
        (lost, "request lost", "v", INK, 18),
    ):
        if found:
            x, y = [ordered[i].launched_s / per for i in found], [i + 1 for i in found]
            look: dict[str, Any] = {"s": size, "marker": marker, "color": colour, "linewidths": 1.0, "zorder": 4}
            ax.scatter(x, y, label=None if label in known else label, rasterized=len(found) > VECTOR_MARKS, **look)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


_HATCHES = {"concurrency": "", "stagger": "//", "tpm": "", "rpm": "..", "day": "xx", "hold": "\\\\", "paused": "--"}


def _waits(ax: Axes, per: float, attempts: Sequence[Attempt], end_s: float) -> None:
    ax.set_ylabel("share of the time")
    edges, shares = series.waiting_shares(series.head_waits(attempts), end_s, WAIT_SPANS)
    below = np.zeros(len(edges))
    for cause, share in shares.items():
        text, colour = CAUSE_LABELS[cause]
        above = below + np.append(share, share[-1])
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": MUTED, "linewidth": 0.0, "hatch": _HATCHES[cause]}
        ax.fill_between(edges / per, below, above, step="post", label=text, **look)
        below = above
    ax.set_ylim(0.0, 1.0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100.0 * value:.0f} %"))

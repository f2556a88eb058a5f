"""The figure of a calibration: the log beside the fitted models.

It has four panels: lengths, latency by output length, the shape of the noise, and either the fit of charge rules to the
headers or the arrivals.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy import stats

from sim.base.palette import BLUE, GREY, INK, MUTED, ORANGE, VERMILLION
from sim.base.style import new_figure, styled
from sim.calibration.calibrate import Calibration
from sim.calibration.fits import FAMILIES, SCORES, Family

POINTS_MOST = 4_000
BINS = 12


@styled
def calibration_figure(found: Calibration) -> Picture:
    """Plot data against fit. A panel states when the log lacks its data."""
    picture = new_figure(9.0, 6.8)
    axes = picture.subplots(2, 2)
    _lengths(axes[0, 0], found)
    _latency(axes[0, 1], found)
    _noise(axes[1, 0], found)
    _headers_or_arrivals(axes[1, 1], found)
    return picture


def write_figure(found: Calibration, path: Path) -> None:
    """Write the figure as a PNG, atomically."""
    unfinished = path.with_name(path.name + ".part")
    calibration_figure(found).savefig(unfinished, format="png")
    unfinished.replace(path)


def _lengths(axes: Any, found: Calibration) -> None:
    """Plot distribution functions of prompts and answers, with the best parametric family dashed."""
    rows = found.observed.rows()
    for name, values, families, colour in (
        ("prompt", found.observed.tries.prompt_tokens[rows], found.prompts, BLUE),
        ("output", found.observed.tries.output_tokens[rows[found.observed.answered[rows]]], found.outputs, ORANGE),
    ):
        ordered = np.sort(values)
        axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", color=colour, label=name)
        if families:
            best: Family = families[0]
            x = np.geomspace(max(1, ordered[0]), max(2, ordered[-1]), 200)
            cdf = FAMILIES[best.name].cdf(x, *best.parameters)
            axes.plot(x, cdf, color=INK, linestyle="--", linewidth=0.9, label=f"{best.name} (KS {best.ks:.3f})")
    axes.set_xscale("log")
    _plainly(axes.xaxis)
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of requests")
    axes.set_title("Lengths; the scenario has the rows themselves")
    axes.legend(loc="best", frameon=False)


def _latency(axes: Any, found: Calibration) -> None:
    """Plot each answer's latency by its length, the fitted line, and the middle 90 % as measured and as expected."""
    axes.set_title("Time of an answer")
    fit, seen = found.latency, found.observed
    if fit is None:
        _nothing(axes, "the log states no times")
        return
    done = seen.answered
    x, y, stalled = seen.tries.output_tokens[done].astype(float), seen.took_s[done], fit.stall > 0.5
    timed = y > 0.0
    x, y, stalled = x[timed], y[timed], stalled[timed]
    step = max(1, len(x) // POINTS_MOST)
    axes.plot(x[~stalled][::step], y[~stalled][::step], ".", color=GREY, markersize=2, alpha=0.5, label="answers")
    axes.plot(x[stalled], y[stalled], "x", color=VERMILLION, markersize=4, label=f"stalls ({stalled.sum():,})")
    line_x = np.linspace(0.0, max(1.0, float(x.max())), 100)
    line = fit.line(line_x)
    wide = np.exp(1.645 * fit.sigma.used)
    axes.plot(line_x, line, color=BLUE, label="fitted")
    axes.fill_between(line_x, line / wide, line * wide, color=BLUE, alpha=0.15, linewidth=0, label="90 % expected")
    edges = np.unique(np.quantile(x, np.linspace(0.0, 1.0, BINS + 1)))
    for low, high in pairwise(edges.tolist()):
        here = y[(x >= low) & (x <= high) & ~stalled]
        if len(here) >= 10:
            p5, p95 = np.quantile(here, [0.05, 0.95])
            axes.plot([(low + high) / 2.0] * 2, [p5, p95], color=ORANGE, linewidth=2.0)
    axes.plot([], [], color=ORANGE, linewidth=2.0, label="90 % measured")
    axes.set_yscale("log")
    _plainly(axes.yaxis)
    axes.set_xlabel("output tokens")
    axes.set_ylabel("seconds")
    axes.legend(loc="lower right", frameon=False)


def _noise(axes: Any, found: Calibration) -> None:
    """Plot quantiles of the noise against those of the normal shape that the model draws from."""
    axes.set_title("Shape of the noise about the line")
    fit, seen = found.latency, found.observed
    if fit is None:
        _nothing(axes, "the log states no times")
        return
    done = seen.answered
    x, y = seen.tries.output_tokens[done].astype(float), seen.took_s[done]
    body = (y > 0.0) & (fit.stall < 0.5)
    z = np.sort(np.log(y[body] / fit.line(x[body])) / max(1e-9, fit.sigma.used))
    expected = stats.norm.ppf((np.arange(len(z)) + 0.5) / len(z))
    axes.plot(expected, z, ".", color=BLUE, markersize=3)
    ends = [float(expected[0]), float(expected[-1])]
    axes.plot(ends, ends, color=INK, linestyle="--", linewidth=0.9)
    for i, (_, shape) in enumerate(fit.noise.groups):
        scaled = shape / max(1e-9, fit.sigma.used)
        axes.plot(SCORES, scaled, color=ORANGE, linewidth=0.9, label=None if i else "drawn")
    axes.text(0.03, 0.95, f"drawn: {fit.noise.name}", transform=axes.transAxes, va="top")
    axes.set_xlim(expected[0] - 0.2, expected[-1] + 0.2)
    axes.set_xlabel("standard normal")
    axes.set_ylabel("measured, in sigmas")


def _headers_or_arrivals(axes: Any, found: Calibration) -> None:
    """Plot how well each charge rule explains the headers; without headers, arrivals by minute."""
    rules = found.quota.rules
    if rules:
        axes.set_title("Counts that each charge rule explains")
        names = [f"{rule.rule}{', settles' if rule.settles else ''}" for rule in rules]
        values = [100.0 * (1.0 - rule.mean_loss) for rule in rules]
        colours = [BLUE if i == 0 else GREY for i in range(len(rules))]
        axes.barh(names[::-1], values[::-1], color=colours[::-1])
        axes.set_xlabel("% of counts")
        return
    axes.set_title("Arrivals")
    workload = found.scenario.workload
    if not workload.has_arrivals:
        _nothing(axes, "neither headers nor times of arrival in the log")
        return
    per_minute = np.bincount((workload.arrival_s / 60.0).astype(int))
    axes.stairs(per_minute, np.arange(len(per_minute) + 1), color=BLUE, baseline=None)
    axes.axhline(
        60.0 * found.arrivals.rate_per_s.used if found.arrivals else 0.0, color=INK, linestyle="--", linewidth=0.9
    )
    axes.set_ylim(0.0, None)
    axes.set_xlabel("minute")
    axes.set_ylabel("requests")


def _plainly(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers: at 1, 2 and 5 if it spans little, else at the powers of ten."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0) if high < 30.0 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])

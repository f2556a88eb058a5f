"""The figure of `capacity`: finish time, or wait, against the limit of tokens per minute, with its band.

Pure: values in, a matplotlib Figure out. The look stands in `style`.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sim.base.palette import BLUE, GREY, INK, MUTED, ORANGE, VERMILLION
from sim.base.style import in_time_units, new_figure, styled, time_scale
from sim.base.words import duration
from sim.selection.capacity_results import Capacity, Probe

# Waits are drawn up to so many times the one that was asked for.
STEADY_TOP = 4.0


@styled
def capacity_figure(found: Capacity) -> Figure:
    """Finish time (P50 and the band from P5 to P95 of the runs) against the limit; the wish, the answer and the tiers.

    Limits that were given up early, because too many runs were late, are left out, and so are tiers off the scale.
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
        # Waits go down to none, and up without end where the limit is below the load: neither fits a logarithm.
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


def _tiers(ax: Axes, tiers: tuple[Probe, ...]) -> None:
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

"""The look of every figure: colours, markers, the house style, time axes, and saving to SVG and PNG.

Theory of operation. The module uses only Matplotlib's object interface: no pyplot, no global state that outlives a
call, no choice of backend. A function marked `styled` runs under the house style regardless of the user's matplotlibrc,
and the same values give the same bytes. Ink, grid and surface are four colours that occur nowhere else, so that the
report can replace them by those of the reader's light or dark theme.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import matplotlib.style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sim.base.palette import GRID, INK, MUTED, SURFACE
from sim.base.words import time_unit

RC: dict[str, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.5,
    "figure.facecolor": SURFACE,
    "svg.fonttype": "none",
    "svg.hashsalt": "paceline",
}

# CSS pixels per inch: a page shows 9 inches as 864 pixels.
POINTS_PER_INCH = 96.0

Arguments = ParamSpec("Arguments")
_Result = TypeVar("_Result")


def styled(function: Callable[Arguments, _Result]) -> Callable[Arguments, _Result]:
    """Return the function wrapped to run under the house style alone."""

    @functools.wraps(function)
    def inner(*args: Arguments.args, **kwargs: Arguments.kwargs) -> _Result:
        with matplotlib.style.context(["default", RC]):
            return function(*args, **kwargs)

    return inner


@styled
def svg_of(figure: Figure) -> str:
    """Return the figure as one `<svg>` element, without prologue, date or random ids; text stays text."""
    arranged(figure)
    out = io.StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set(facecolor="none", edgecolor="none")
    # What `savefig` calls in the end; it would draw everything once more before, for figures not yet arranged.
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    text = out.getvalue()
    return re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def arranged(figure: Figure) -> None:
    """Lay out the figure once: saving would do so twice, and draw everything twice."""
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")


@styled
def png_of(figure: Figure) -> bytes:
    """Return the figure as a PNG on a white background."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


class Picture(Figure):
    """A figure that a notebook displays by itself, in the house style and at its intended size."""

    def _repr_png_(self) -> tuple[bytes, dict[str, float]]:
        width_in, height_in = self.get_size_inches()
        # More pixels than the page's own, for high-density screens.
        return png_of(self), {"width": POINTS_PER_INCH * width_in, "height": POINTS_PER_INCH * height_in}


def new_figure(width_in: float, height_in: float) -> Picture:
    """Return an empty figure of that size in inches, with automatic layout."""
    return Picture(figsize=(width_in, height_in), layout="constrained")


def in_time_units(axis: Any, span_s: float, label: str) -> float:
    """Label an axis of seconds in the unit that suits the span; return seconds per unit for the data."""
    per, unit = time_unit(span_s)
    steps = [1, 2, 2.5, 5, 10] if unit == "days" else [1, 2, 3, 5, 10] if unit == "min" else [1, 2, 5, 10]
    axis.set_major_locator(MaxNLocator(nbins=8, steps=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_label_text(f"{label}, {unit}" if label else unit)
    return per


def time_scale(axis: Any, low_s: float, high_s: float, label: str) -> float:
    """Label an axis as `in_time_units` does, for times between `low_s` and `high_s`: logarithmic if they are far apart.

    Set scale, limits, round ticks and label; return seconds per unit for the data.
    """
    per, unit = time_unit(max(low_s, high_s / 8.0))
    axis.set_label_text(f"{label}, {unit}")
    x_or_y = axis.axis_name
    low, high = low_s / per, high_s / per
    if high > 3.0 * low > 0.0:
        axis.axes.set(**{f"{x_or_y}scale": "log"})
        fine = (1, 2, 3, 4, 6) if high < 30.0 * low else (1, 2, 5) if high < 300.0 * low else (1,)
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        ticks = [m * 10.0**decade for decade in decades for m in fine]
        axis.set_ticks([tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high])
        axis.set_ticks([], minor=True)
        axis.axes.set(**{f"{x_or_y}lim": (0.85 * low, 1.18 * high)})
    else:
        margin = max(0.08 * (high - low), 0.02 * high) or 1.0
        axis.axes.set(**{f"{x_or_y}lim": (low - margin, high + margin)})
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    return per

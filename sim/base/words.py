"""Figures in words: durations, shares, intervals and "none seen", the same in tables, figures and on the terminal.

A text never claims more than is known: figures are rounded to what a reader can use, upper limits are rounded up, and
nan reads "not known".
"""

from __future__ import annotations

import math

from governor.model.phrases import duration as duration
from governor.model.phrases import percent as percent

# Seconds per unit of a time axis, from small to large, and the span from which the unit reads better.
TIME_UNITS = ((1.0, "s", 0.0), (60.0, "min", 180.0), (3_600.0, "h", 3.0 * 3_600.0), (86_400.0, "days", 3.0 * 86_400.0))


def seconds_text(seconds: float) -> str:
    """Return a duration in seconds alone, for tooltips and calculations: "5,280 s"."""
    if not math.isfinite(seconds):
        return duration(seconds)
    return f"{seconds:,.0f} s" if abs(seconds) >= 100.0 else f"{seconds:.3g} s"


def number(value: float) -> str:
    """Return a count or mean of counts: whole numbers as such, others with two decimals below 10 and one below 100."""
    if math.isnan(value):
        return "not known"
    if value < 0.0:
        return f"−{number(-value)}"
    if value == round(value) or value >= 100.0:
        return f"{round(value):,}"
    text = f"{value:.{2 if value < 9.995 else 1}f}"
    return f"{value:.1g}" if float(text) == 0.0 else text


def percent_at_most(ratio: float) -> str:
    """Return an upper limit as a share, rounded up to two digits so that it stays an upper limit."""
    value = 100.0 * ratio
    if value <= 0.0:
        return "0 %"
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    # 1e-9: a value that has two digits already stays unchanged.
    return f"{min(100.0, math.ceil(value / step - 1e-9) * step):.6g} %"


def time_unit(span_s: float) -> tuple[float, str]:
    """Return the unit in which a time axis of this length reads best: (seconds per unit, its name)."""
    found = TIME_UNITS[0]
    for unit in TIME_UNITS:
        if span_s >= unit[2]:
            found = unit
    return found[0], found[1]


def longer(what: str, change_s: float) -> str:
    """Return how much a change adds to a time or takes off it: "OPENAI_SETTLE=true (4 s longer)"."""
    return f"{what} ({duration(abs(change_s))} {'longer' if change_s > 0.0 else 'shorter'})"


def between(low: float, high: float, form: str = "duration") -> str:
    """Return two figures as a range: "24 min to 25 min"; one figure if they read the same."""
    write = {"duration": duration, "number": number, "percent": percent}[form]
    first, last = write(low), write(high)
    return first if first == last else f"{first} to {last}"


def below(ratio: float) -> str:
    """Return an upper confidence limit of a probability in words: "below 0.025 % at 95 % confidence"."""
    return f"below {percent_at_most(ratio)} at 95 % confidence"

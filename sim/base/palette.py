"""Names and colours that figures and texts share: policies, causes of waiting, objectives.

The colours are Okabe and Ito's (2008), which colour-blind readers can tell apart, and never the only distinction:
series also differ in marker or hatch and carry labels.
"""

from __future__ import annotations

from typing import NamedTuple

from governor.forecast.summary_html import COLOURS
from governor.model.phrases import WAITED_FOR

# Okabe and Ito's palette, without its yellow, which is invisible on white, and its black, which is the ink.
ORANGE, SKY = "#e69f00", "#56b4e9"
BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#8c8c8c"
# The report replaces these by colours of the reader's theme, so they must not be used for anything else.
INK, MUTED, GRID, SURFACE = "#1b1e23", "#5a616b", "#d8dce2", "#fefefe"


class Style(NamedTuple):
    """The look of one of the plan's policies in every figure."""

    label: str
    colour: str
    marker: str
    hatch: str


STYLES = {
    "now": Style("now", ORANGE, "D", "//"),
    "guardrails": Style("guardrails only", SKY, "s", r"\\\\"),
    "recommended": Style("recommended", BLUE, "*", ""),
    "runner_up": Style("runner-up", GREY, "^", "xx"),
}
# The name of each cause of waiting, and its colour.
CAUSE_LABELS = {cause: (what, COLOURS[cause]) for cause, (_, what) in WAITED_FOR.items()}
# The objective of a plan: its readable name, and the figure of a run that measures it.
OBJECTIVES = {"makespan": ("finish time", "makespan_s"), "p95_latency": ("P95 latency", "latency_p95_s")}

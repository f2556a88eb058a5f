"""Names and colours that figures and texts share: policies, causes of waiting, objectives.

Colours are Okabe and Ito's (2008), told apart by the colour-blind, and never alone: series differ in marker or hatch as
well and carry labels.
"""

from __future__ import annotations

from typing import NamedTuple

from governor.forecast.summary_html import COLOURS
from governor.model.phrases import WAITED_FOR

# Okabe and Ito's palette; without its yellow, which does not show on white, and its black, which is the ink.
ORANGE, SKY = "#e69f00", "#56b4e9"
BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#8c8c8c"
# Exchanged by the report for those of the reader's theme: used for nothing else.
INK, MUTED, GRID, SURFACE = "#1b1e23", "#5a616b", "#d8dce2", "#fefefe"


class Style(NamedTuple):
    """How one of the plan's policies looks wherever it is drawn."""

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
# What each cause of waiting is called, and its colour.
CAUSE_LABELS = {cause: (what, COLOURS[cause]) for cause, (_, what) in WAITED_FOR.items()}
# What a plan is for: its name for people, and the figure of a run that it is.
OBJECTIVES = {"makespan": ("finish time", "makespan_s"), "p95_latency": ("P95 latency", "latency_p95_s")}

"""Sliders for notebooks: move a setting, and see the run under it.

Needs ipywidgets (the extra `notebook`). Without a browser the widgets show their first state, so that a notebook that
holds them can be executed anywhere. The picture is a separate widget and not captured output: a client without a
browser answers captured output on the channel on which it waits for the cell's end, and may then wait until its
time-out (nbclient 0.11: occasionally two minutes in place of a second).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipywidgets import HTML, FloatSlider, Image, IntSlider, VBox, Widget

from governor.model.policy import KNOB_BY_NAME, Policy, knob_named
from sim.base.layout import html_paragraph
from sim.base.style import POINTS_PER_INCH, png_of
from sim.base.words import duration, percent
from sim.des.engines import begin, is_available
from sim.experiment.experiment import attempts_of
from sim.reporting import terminal as shown
from sim.reporting.figures_time import glance
from sim.scenario.scenario import Scenario

# (first, last, step) of a slider; a setting beyond its ends widens it.
RANGES = {
    "stagger_seconds": (0.0, 30.0, 0.5),
    "tpm_headroom": (0.0, 0.5, 0.01),
    "max_concurrency": (1, 50, 1),
    "est_tokens_per_run": (200, 10_000, 100),
    "retry_max_attempts": (1, 12, 1),
    "backoff_base_seconds": (0.5, 30.0, 0.5),
}
USUAL = ("stagger_s", "tpm_headroom", "max_concurrency", "est_tokens_per_run")
# Size of the figure, in inches.
WIDTH_IN = 9.0
# From this size on a SimPy run takes noticeable time, so machine code is prepared in the background.
LARGE = 5_000


def what_if(scenario: Scenario, *knobs: str) -> Widget:
    """Return one slider per knob (by any of its names; the usual four by default) and the run under their settings.

    Each move simulates the scenario once; settings without a slider keep their values. Raise ValueError if a knob
    cannot have a slider.
    """
    if is_available() and len(scenario.workload) >= LARGE:
        begin()
    sliders = {name: _slider(name, scenario.policy) for name in knobs or USUAL}

    picture = Image(format="png", width=round(POINTS_PER_INCH * WIDTH_IN))
    words = HTML()

    def show(_: object = None) -> None:
        picture.value, text = _seen(scenario, {name: slider.value for name, slider in sliders.items()})
        words.value = html_paragraph(text)

    for slider in sliders.values():
        slider.observe(show, "value")
    show()
    return VBox([*sliders.values(), picture, words])


def _seen(scenario: Scenario, values: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return one run under these settings: a picture with its figures, and the knob that holds it back."""
    policy = scenario.policy.with_(**values)
    changed = scenario.with_(policy=policy).fitted()
    rows, tally = attempts_of(changed, changed.seed)
    summary = tally.summary(changed.grant())
    efficiency = "not quoted" if summary.efficiency is None else percent(summary.efficiency)
    title = (
        f"{duration(summary.makespan_s)}; efficiency {efficiency}; {summary.throttled:,} 429s, {summary.failed:,} lost"
    )
    held = shown.held_back(summary.waits_s, policy, summary.reserved_tokens, summary.charged_tokens)
    return png_of(glance(rows, changed.grant(), title=title)), held


def _slider(name: str, policy: Policy) -> Widget:
    knob = knob_named(name)
    if knob is None or knob.name not in RANGES:
        raise ValueError(f"{name} has no slider: choose from {', '.join(RANGES)}")
    value = getattr(policy, knob.name)
    low, high, step = RANGES[knob.name]
    kind = IntSlider if KNOB_BY_NAME[knob.name].kind == "integer" else FloatSlider
    unit = f", {knob.unit}" if knob.unit not in ("", "ratio") else ""
    label = f"{name.removesuffix('_s').replace('_', ' ')}{unit}"
    return kind(
        value=value,
        min=min(low, value),
        max=max(high, value),
        step=step,
        description=label,
        continuous_update=False,
        style={"description_width": "14em"},
        layout={"width": "40em"},
    )

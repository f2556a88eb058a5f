"""Results as notebooks display them: HTML with the tables that the command line prints, and a small figure.

Text and lines use the notebook's own colours, in light and dark themes.
"""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from governor.forecast.summary_html import summary_html
from sim.base.layout import html_paragraph, html_table
from sim.base.style import POINTS_PER_INCH, png_of
from sim.reporting import terminal as shown

if TYPE_CHECKING:
    from sim.app.api import PlanResult, SimulationResult

# A run with more attempts than this is not simulated again only for an unrequested figure.
GLANCE_ATTEMPTS = 50_000


def simulation_html(result: SimulationResult) -> str:
    """Return a simulation's result: the figures (with intervals for several runs), and the first run over time."""
    from sim.reporting.figures_time import glance

    forecast, scenario = result.forecast, result.scenario
    held = shown.held_back(
        forecast.waits_s, scenario.policy, forecast["reserved_tokens"].mean, forecast["charged_tokens"].mean
    )
    parts = [html_paragraph(shown.headline(scenario))]
    if len(forecast.runs) == 1:
        parts.append(summary_html(result.summary))
    else:
        parts += [html_table(shown.figures_rows(forecast)), html_paragraph(f"Runs: {len(forecast.runs):,}.")]
    parts.append(html_paragraph(held))
    if forecast["attempts"].mean <= GLANCE_ATTEMPTS:
        parts.append(picture(glance(result.rows, scenario.grant()), "the first run over time"))
    return f"<div>{''.join(parts)}</div>"


def plan_html(result: PlanResult) -> str:
    """Return a plan's result: the comparison, the changes with their reasons, the warnings, the front."""
    found = result.found
    parts = [html_paragraph(shown.headline(result.scenario)), html_table(shown.comparison_rows(found))]
    for title, recommendation in (("Recommended", found.full), ("Guardrails only", found.guardrails)):
        if recommendation.steps:
            parts.append(html_table(shown.changes_rows(title, recommendation, result.found)))
    parts += [html_paragraph(note) for note in shown.plan_notes(result.scenario, found)]
    parts.append(picture(result.figure(), "settings that were tried: 429s against the objective"))
    return f"<div>{''.join(parts)}</div>"


# ---------------------------------------------------------------- parts of a page


def picture(figure: Figure, alt: str) -> str:
    """Return a figure as an image embedded in the page."""
    data = base64.b64encode(png_of(figure)).decode()
    width = POINTS_PER_INCH * figure.get_size_inches()[0]
    return (
        f'<img alt="{html.escape(alt)}" style="max-width:100%" width="{width:.0f}" src="data:image/png;base64,{data}">'
    )

"""The report's figures: drawn from the plan, captioned, and embedded in the page as inline SVG.

In the page a figure's text stays text, its ids are unique, and the four neutral colours are the page's own variables,
so that it follows the reader's light or dark theme and prints on white.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from governor.forecast.summary import Grant
from governor.model.prices import dollars_text
from sim.base import palette, style
from sim.base.words import duration
from sim.experiment.results import Forecast, Plan
from sim.reporting import figures, figures_compare, figures_time
from sim.reporting.report_text import policies_of, throttled_limit
from sim.selection.batch_api import Way

# A figure's neutral colours become the page's variables, and so does the blue, which is too dark for a dark page.
_THEME = {
    palette.BLUE: "--blue",
    palette.INK: "--ink",
    palette.MUTED: "--muted",
    palette.GRID: "--grid",
    palette.SURFACE: "--surface",
}


def drawn(plan: Plan, grant: Grant) -> dict[str, Any]:
    """Return the figures by name, as elements of the page; "" if there is nothing to draw."""
    return {name: draw(plan, grant) for name, draw in _FIGURES.items()}


def inline_ways(ways: Sequence[Way], deadline_s: float) -> Any:
    """Return the cost of each way against its finish time, as an element of the page; "" if no cost is known."""
    listed = {
        way.name if way.deadline_s is None else f"{way.name} for {duration(way.deadline_s)}": (
            f"{dollars_text(way.cost_usd)}, {duration(way.promise_s)}"
        )
        for way in ways
        if math.isfinite(way.promise_s) and way.cost_usd is not None
    }
    if not listed:
        return ""
    return inline(figures_compare.ways_figure(ways, deadline_s), "ways", f"Cost and finish time. {_listing(listed)}.")


def _forecasts(plan: Plan) -> dict[str, Forecast]:
    """Return the policies that are drawn."""
    forecasts = policies_of(plan)
    if not plan.guardrails.steps:
        # Equal to today's settings: a second curve on top of the first would only hide it.
        del forecasts["guardrails"]
    return forecasts


def _look(plan: Plan) -> dict[str, Any]:
    return {"objective": plan.objective, "throttled_limit": throttled_limit(plan)}


def _facts(plan: Plan) -> str:
    figure = palette.OBJECTIVES[plan.objective][1]
    forecasts = _forecasts(plan)
    return _listing({palette.STYLES[who].label: f"{duration(f[figure].mean)}" for who, f in forecasts.items()})


def _waits(plan: Plan, grant: Grant) -> str:
    forecasts = _forecasts(plan)
    waited = _listing({palette.STYLES[who].label: _waited(f) for who, f in forecasts.items()})
    return inline(figures.waits(forecasts), "waits", f"Mean wait per request by cause. {waited}.")


def _over_time(plan: Plan, grant: Grant) -> str:
    timelines = {who: plan.timelines[who] for who in _forecasts(plan) if plan.timelines.get(who)}
    if not timelines:
        return ""
    name = palette.OBJECTIVES[plan.objective][0]
    return inline(
        figures_time.over_time(timelines, grant),
        "time",
        "Tokens per minute against the limit, requests in flight, and launches with 429s over time, one run of "
        f"each policy. Mean {name}: {_facts(plan)}.",
    )


def _front(plan: Plan, grant: Grant) -> str:
    name = palette.OBJECTIVES[plan.objective][0]
    return inline(
        figures.front(plan.points, _forecasts(plan), **_look(plan)),
        "front",
        f"The settings tried, by 429s per 100 requests and {name}. {_facts(plan)}.",
    )


def _heats(plan: Plan, grant: Grant) -> list[str]:
    name = palette.OBJECTIVES[plan.objective][0]
    return [
        inline(
            figures.heat(each, **_look(plan)),
            f"heat{i}",
            f"Map of the {name} over {each.x_env} and {each.y_env}, all other settings as recommended. "
            f"Recommended: {_pair(each.recommended)}; now {_pair(each.now)}.",
        )
        for i, each in enumerate(plan.heats)
    ]


def _stress(plan: Plan, grant: Grant) -> str:
    return inline(
        figures.stress(plan.stress, policies_of(plan) | {"runner_up": plan.runner_up}, objective=plan.objective),
        "stress",
        f"The {palette.OBJECTIVES[plan.objective][0]} of each policy under each condition of the stress set; the table "
        "below has the figures.",
    )


def _drawn(plan: Plan, grant: Grant) -> str:
    if plan.drawn is None:
        return ""
    return inline(
        figures.drawn(plan.drawn, **_look(plan)),
        "drawn",
        f"The share of {plan.drawn.draws} drawn conditions in which each policy is done by a time, and by which "
        "it draws so many 429s; the table below has what one in 20 exceeds, and the worst.",
    )


def _sensitivity(plan: Plan, grant: Grant) -> str:
    if plan.sensitivity is None:
        return ""
    return inline(
        figures.sensitivity(plan.sensitivity),
        "sensitivity",
        f"How much each setting changes the {palette.OBJECTIVES[plan.objective][0]} around the recommendation, largest "
        f"first, with intervals. {_largest(plan)}",
    )


# The function that draws each named figure of a plan; besides the forecasts, it needs only the plan's part of that
# name.
_FIGURES: dict[str, Callable[[Plan, Grant], Any]] = {
    "waits": _waits,
    "over_time": _over_time,
    "front": _front,
    "heats": _heats,
    "stress": _stress,
    "drawn": _drawn,
    "sensitivity": _sensitivity,
}


def _largest(plan: Plan) -> str:
    assert plan.sensitivity is not None
    objective = palette.OBJECTIVES[plan.objective][1]
    quantities = {e.env: duration(e.size) for e in plan.sensitivity.effects[objective][:3]}
    levels = [level for level in plan.sensitivity.levels[objective] if level.shows][:3]
    return _listing(quantities | {level.assignment: duration(level.change) for level in levels}) + "."


def _waited(f: Forecast) -> str:
    seen = {palette.CAUSE_LABELS[cause][0]: s / f.requests for cause, s in f.waits_s.items() if s > 0.05 * f.requests}
    return ", ".join(f"{duration(s)} for {cause}" for cause, s in seen.items()) or "nothing"


def _listing(facts: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {fact}" for name, fact in facts.items())


def inline(figure: Figure, name: str, alt: str) -> str:
    """Return the figure as an element of the page, with an accessible name, in the page's colours and font."""
    svg = style.svg_of(figure)
    head, body = svg.split(">", 1)
    size = re.search(r'viewBox="[^"]*"', head)
    assert size is not None
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    # Group ids are never referenced; all other ids must differ from those of the page's other figures.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"; font-family: [^;\"]*", "", body)
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    for colour, variable in _THEME.items():
        body = body.replace(f": {colour}", f": var({variable})")
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size[0]}'
    return f'{opening} role="img" aria-label="{html.escape(alt)}">{body.strip()}'


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:g} and {values[1]:g}"

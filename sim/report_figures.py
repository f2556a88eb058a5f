"""The report's figures: drawn from the plan, captioned, and put into the page as inline SVG.

What lives here: which figures the report shows, what they say to those who cannot see them, and how an SVG becomes part
of a page. What must not: the drawing itself (`figures`, `figures_time`), tables, files.

In the page a figure's text stays text, its ids are unique, and the four neutral colours are the page's own variables,
so that it follows the reader's light or dark theme and prints on white.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from governor.summary import Grant
from sim import figures, figures_robust, figures_time, style
from sim.report_text import policies_of, throttled_limit
from sim.results import Forecast, Plan
from sim.words import duration

# A figure's neutral colours are the page's variables, and so is the blue, too dark for a dark page.
_THEME = {
    style.BLUE: "--blue",
    style.INK: "--ink",
    style.MUTED: "--muted",
    style.GRID: "--grid",
    style.SURFACE: "--surface",
}


def drawn(plan: Plan, grant: Grant) -> dict[str, Any]:
    """The figures by name, as elements of the page; "" where there is nothing to draw."""
    forecasts = policies_of(plan)
    if not plan.guardrails.steps:
        # Today's settings once more: a second curve on top of the first would only hide it.
        del forecasts["guardrails"]
    name, figure = style.OBJECTIVES[plan.objective]
    look: dict[str, Any] = {"objective": plan.objective, "throttled_limit": throttled_limit(plan)}
    timelines = {who: plan.timelines[who] for who in forecasts if plan.timelines.get(who)}
    facts = _listing({style.STYLES[who].label: f"{duration(f[figure].mean)}" for who, f in forecasts.items()})
    waited = _listing({style.STYLES[who].label: _waited(f) for who, f in forecasts.items()})
    return {
        "waits": inline(figures.waits(forecasts), "waits", f"Mean wait per request by cause. {waited}."),
        "over_time": inline(
            figures_time.over_time(timelines, grant),
            "time",
            "Tokens per minute against the limit, requests in flight, and launches with 429s over time, one run of "
            f"each policy. Mean {name}: {facts}.",
        )
        if timelines
        else "",
        "front": inline(
            figures.front(plan.points, forecasts, **look),
            "front",
            f"Settings that were tried, by 429s per 100 requests and {name}. {facts}.",
        ),
        "heats": [
            inline(
                figures.heat(each, **look),
                f"heat{i}",
                f"Map of the {name} over {each.x_env} and {each.y_env}, all other settings as recommended. "
                f"Recommended: {_pair(each.recommended)}; now {_pair(each.now)}.",
            )
            for i, each in enumerate(plan.heats)
        ],
        "stress": inline(
            figures.stress(plan.stress, policies_of(plan) | {"runner_up": plan.runner_up}, objective=plan.objective),
            "stress",
            f"The {name} of each policy under each condition of the stress set; the table below has the figures.",
        ),
        "drawn": ""
        if plan.drawn is None
        else inline(
            figures_robust.drawn(plan.drawn, **look),
            "drawn",
            f"The share of {plan.drawn.draws} drawn conditions in which each policy is done by a time, and by which "
            "it draws so many 429s; the table below has the 5th percentile and the worst.",
        ),
        "sensitivity": ""
        if plan.sensitivity is None
        else inline(
            figures_robust.sensitivity(plan.sensitivity),
            "sensitivity",
            f"How much each setting changes the {name} around the recommendation, largest first, with intervals. "
            f"{_largest(plan)}",
        ),
    }


def _largest(plan: Plan) -> str:
    assert plan.sensitivity is not None
    effects = plan.sensitivity.effects[style.OBJECTIVES[plan.objective][1]][:3]
    return _listing({e.env: duration(e.size) for e in effects}) + "."


def front_caption(plan: Plan) -> str:
    """How to read the front."""
    return (
        "Every mark is a setting; further down is faster, further left is refused less often. Large marks are the "
        "published estimates, on fresh seeds; small ones are from the search, with fewer runs each. Right of the "
        f"dashed line the provider refuses more than {throttled_limit(plan):g} per 100 requests."
    )


def _waited(f: Forecast) -> str:
    seen = {style.CAUSE_LABELS[cause][0]: s / f.requests for cause, s in f.waits_s.items() if s > 0.05 * f.requests}
    return ", ".join(f"{duration(s)} for {cause}" for cause, s in seen.items()) or "nothing"


def _listing(facts: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {fact}" for name, fact in facts.items())


def inline(figure: Figure, name: str, alt: str) -> str:
    """The figure as an element of the page: named for those who cannot see it, in the page's colours and font."""
    svg = style.svg_of(figure)
    head, body = svg.split(">", 1)
    size = re.search(r'viewBox="[^"]*"', head)
    assert size is not None
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    # Groups have ids that nobody refers to; the others must differ from those of the page's other figures.
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

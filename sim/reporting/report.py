"""The report: one HTML file that a manager can read, with all the evidence, usable without a network.

Theory of operation. A plan goes in, a text comes out. The same plan gives the same bytes, because nothing here depends
on a clock or a machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from governor.forecast.summary import Grant
from governor.model.files import write_atomically
from governor.model.policy import KNOB_BY_ENV
from sim.base import palette
from sim.base.words import duration, number, percent, seconds_text
from sim.experiment.results import Forecast, Plan, Recommendation, Step
from sim.reporting import report_text as text
from sim.reporting.capacity_text import ways_choice, ways_note, ways_rows
from sim.reporting.comparison import Cell, comparison
from sim.selection.batch_api import Terms, Way

_Provenance = Mapping[str, tuple[str, str]]
ProviderText = Mapping[str, tuple[str, str]] | Iterable[tuple[str, str, str]]

NEVER = "never yet"
_MARKS = {"": "✓", "over": "▲", "lost": "✕"}


def render(
    plan: Plan,
    *,
    title: str,
    command: str,
    grant: Grant,
    provenance: _Provenance,
    provider_text: ProviderText = (),
    version: str,
    generated: str = "",
    validated: str = NEVER,
    stress_notes: Iterable[tuple[str, str]] = (),
    figures: Mapping[str, Any] | None = None,
    ways: Mapping[str, Any] | None = None,
) -> str:
    """Return the report as one HTML text.

    `command`: the command that reproduces the plan. `grant`: the provider's limits, for the curves. `provenance`:
    input -> (measured or assumed, source); `provider_text`: further inputs, as (name, value, measured or assumed) or as
    a mapping like `provenance`. `generated`: a date to print, none by default, so that equal plans give equal files.
    `validated`: how often the forecasts were checked against live runs. `stress_notes`: conditions left out, and why.
    `figures`: as returned by `report_figures.drawn`; drawn now if not given. `ways`: the comparison with the Batch API,
    as returned by `ways_part`.
    """
    inputs = _inputs(provenance, provider_text)
    assumed = [each["name"] for each in inputs if each["kind"] == "assumed"]
    page = _environment().from_string(_template())
    return page.render(
        title=title,
        command=command,
        version=version,
        generated=generated,
        validated=validated,
        inputs=inputs,
        about=text.about(grant),
        sentences=text.answer(plan),
        promise=text.promise(plan),
        promise_note=text.promise_note(plan),
        broken=plan.broken,
        find_out=text.find_out(plan),
        replications=_count(len(plan.now.runs), "run"),
        columns=_columns(plan),
        headline=_headline(plan),
        objective=palette.OBJECTIVES[plan.objective][0],
        recommendations=[_recommendation(plan, plan.full, "all"), _recommendation(plan, plan.guardrails, "few")],
        held=text.held_back(plan),
        figures=_drawn(plan, grant) if figures is None else figures,
        over_time_caption=text.over_time_caption(grant),
        ways=ways,
        tried=text.tried(plan),
        front_caption=text.front_caption(plan),
        stress_text=text.kept_counts(plan),
        stress_names=[palette.STYLES[who].label for who in _stress_order(plan)],
        stress_rows=_stress_rows(plan),
        stress_runs=_count(min((len(f.runs) for row in plan.stress for f in row.forecasts.values()), default=0), "run"),
        stress_notes=list(stress_notes),
        drawn_text=text.drawn_text(plan),
        drawn_rows=_drawn_rows(plan),
        sensitivity_text=text.sensitivity_text(plan),
        throttled_limit=f"{text.stress_limits(plan)['max_throttled_per_100']:g}",
        lost_allowed=f" (allowed: {percent(plan.limits['max_lost'])})" if plan.limits.get("max_lost") else "",
        noise_text=_noise_text(plan),
        noise=text.noise(plan),
        unknown_text="More runs do not help here; measuring the assumed inputs does. From the stress set:",
        unknown=text.unknown(plan, assumed),
        effort=(
            f"Seed {plan.seed}; {_count(plan.settings_tried, 'setting')} tried, {_count(plan.runs_simulated, 'run')} "
            f"of {_count(plan.now.requests, 'request')} simulated. Published figures come from seeds that the search "
            "never saw."
        ),
    )


def ways_part(ways: Sequence[Way], terms: Terms, deadline_s: float, confidence: float) -> dict[str, Any]:
    """Return what the page shows of live calls, flex, the Batch API and mixes."""
    from sim.reporting.report_figures import inline_ways

    header, *rows = ways_rows(ways)
    return {
        "choice": ways_choice(ways, terms, deadline_s, confidence).partition("? ")[2],
        "header": ["way", *header[1:]],
        "rows": rows,
        "note": ways_note(ways, terms),
        "figure": inline_ways(ways, deadline_s),
    }


def _drawn(plan: Plan, grant: Grant) -> dict[str, Any]:
    # Importing the drawing library takes longer than everything else here.
    from sim.reporting import report_figures

    return report_figures.drawn(plan, grant)


def write(path: str | Path, plan: Plan, **options: Any) -> None:
    """Write the report atomically; `options` are those of `render`. Raise BadInput, naming the path, if that fails."""
    page = render(plan, **options)
    with write_atomically(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_unbroken)
    environment.filters["code"] = _code
    return environment


def _code(text: str) -> Markup:
    """Return the text with commands in backquotes marked up as code."""
    parts = [_unbroken(escape(part)) for part in text.split("`")]
    return Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


_UNIT = re.compile(r"(?<=\d) (?=(?:%|s|min|h|d)(?![\w]))")


def _unbroken(value: Any) -> Any:
    """Return text with each number and its unit kept on one line; markup is returned unchanged."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", value) if type(value) is str else value


def _template() -> str:
    return (resources.files("sim.reporting") / "templates" / "report.html.j2").read_text(encoding="utf-8")


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def _inputs(provenance: _Provenance, provider_text: ProviderText) -> list[dict[str, str]]:
    """Return every input once, the assumed ones first, since a reader must know them."""
    found = {name: (kind, words) for name, (kind, words) in provenance.items()}
    if isinstance(provider_text, Mapping):
        found |= dict(provider_text)
    else:
        found |= {name: (kind, value) for name, value, kind in provider_text}
    rows = [{"name": name, "kind": kind, "text": words} for name, (kind, words) in found.items()]
    return sorted(rows, key=lambda row: row["kind"] != "assumed")


# ---------------------------------------------------------------- the headline


def _columns(plan: Plan) -> list[dict[str, str]]:
    about = {
        "now": "today's settings",
        "guardrails": f"{_changes(plan.guardrails)} among the eight guardrail settings, no new code",
        "recommended": f"{_changes(plan.full)}, everything Paceline can do",
    }
    return [{"name": who, "label": palette.STYLES[who].label, "about": about[who]} for who in text.policies_of(plan)]


def _changes(found: Recommendation) -> str:
    return _count(len(found.steps), "change") if found.steps else "no change"


def _headline(plan: Plan) -> list[dict[str, Any]]:
    """Return the table of the answer: a row per figure, a column per policy."""
    return [
        {
            "name": f"{row.name[0].upper()}{row.name[1:]}",
            "about": row.about,
            "cells": [cell._replace(text=f"{cell.mark} {cell.text}".strip()) for cell in row.cells],
        }
        for row in comparison(plan)
    ]


def _noise_text(plan: Plan) -> str:
    n = len(plan.now.runs)
    return (
        f"Other seeds would have given other figures, within the intervals (95 %). They rest on {_count(n, 'run')} per "
        "policy; four times as many would halve them."
    )


# ---------------------------------------------------------------- what to change


def _recommendation(plan: Plan, found: Recommendation, which: str) -> dict[str, Any]:
    headings = {
        "all": "Recommended, using everything that Paceline can do",
        "few": "With the eight guardrail settings alone",
    }
    about = "These are today's settings: nothing that was tried is better."
    if found.passed_over:
        about = "These are today's settings: nothing faster keeps the limits whatever the provider does."
    if found.steps:
        name, figure = palette.OBJECTIVES[plan.objective]
        mean, today = found.forecast[figure].mean, plan.now[figure].mean
        about = (
            f"{_count(len(found.steps), 'setting')} changed: mean {name} from {duration(today)} to {duration(mean)}."
        )
    widest = max((abs(step.worth_s.mean) for step in found.steps), default=0.0)
    return {
        "heading": headings[which],
        "about": about,
        "steps": [_step(plan, step, widest) for step in found.steps],
        "robustness": text.robustness(found, plan),
    }


def _step(plan: Plan, step: Step, widest: float) -> dict[str, Any]:
    knob, gain = KNOB_BY_ENV[step.env], step.worth_s
    worth = text.worth(step, plan)
    nothing = worth == "none as assumed"
    return {
        "env": step.env,
        "meaning": knob.meaning,
        "unit": knob.unit,
        "old": knob.text(step.old),
        "new": knob.text(step.new),
        "worth": worth,
        "worth_tip": seconds_text(gain.mean),
        "interval": "" if nothing else text.interval(gain),
        "width": 0 if nothing else max(1, round(100.0 * abs(gain.mean) / widest)),
        "less": gain.mean < 0.0,
        "stress": duration(step.stress_worth_s),
        "throttled": number(step.throttled_per_100),
        "lost": number(step.lost),
        "reason": text.why(step, plan),
    }


# ---------------------------------------------------------------- the stress table


def _stress_order(plan: Plan) -> list[str]:
    known = {who for row in plan.stress for who in row.forecasts}
    return [who for who in ("now", "guardrails", "recommended", "runner_up") if who in known]


def _stress_rows(plan: Plan) -> list[dict[str, Any]]:
    plain = text.policies_of(plan) | {"runner_up": plan.runner_up}
    rows = (
        [("as assumed", f"the published estimate, {_count(len(plan.now.runs), 'run')}", plain)] if plan.stress else []
    )
    rows += [(row.name, "", dict(row.forecasts)) for row in plan.stress]
    order = _stress_order(plan)
    return [
        {"name": name, "note": note, "cells": [_stress_cell(plan, found.get(who)) for who in order]}
        for name, note, found in rows
    ]


def _stress_cell(plan: Plan, f: Forecast | None) -> Cell:
    if f is None:
        return Cell("–")
    kind = text.broken_in(f, text.stress_limits(plan))
    name, figure = palette.OBJECTIVES[plan.objective]
    mean = f[figure].mean
    detail = f"429s per 100: {number(f['throttled_per_100'].mean)}\nlost: {f.lost:,} of {f.trials:,}"
    return Cell(duration(mean), detail, f"{name} {seconds_text(mean)}", kind or "kept", _MARKS[kind])


# ---------------------------------------------------------------- the drawn conditions


def _drawn_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return a row per policy: median, 95th percentile and worst of the objective; of other figures the last two."""
    if plan.drawn is None:
        return []
    rows = []
    for who, found in plan.drawn.outcomes.items():
        cells = [duration(value("objective_s")) for value in (found.median, found.bad, found.worst)]
        for name in ("throttled_per_100", "lost_per_100"):
            cells.append(f"{number(found.bad(name))} / {number(found.worst(name))}")
        rows.append({"name": palette.STYLES[who].label, "cells": cells})
    return rows

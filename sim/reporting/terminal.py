"""Results as text for a terminal or a pipe: the tables of `simulate` and `plan`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from typing import Any

from governor.forecast.summary import Summary
from governor.model.phrases import WAITED_FOR, plural
from governor.model.policy import KNOB_BY_ENV, Policy
from governor.model.requests import CAUSES
from governor.model.words import knob_text
from sim.base import words
from sim.base.layout import facts, table, wrapped
from sim.experiment.results import Forecast, Plan, Recommendation, at_most
from sim.model.workload import ASSUMED, MEASURED, Provenance
from sim.reporting.comparison import comparison
from sim.reporting.report_text import (
    find_out,
    interval,
    lost_text,
    promise,
    robustness,
    why,
    worth,
)
from sim.scenario.scenario import Scenario
from sim.scenario.stress import stress_notes

# A flat reservation of this many times the charge is named as the reason why the budget binds.
OVER_RESERVED = 1.5
# A second cause of at least this share of the first is named too: fixing only one would gain little.
EQUALLY = 0.8

FORMS = {
    "makespan_s": ("finishes after", "duration"),
    "efficiency": ("efficiency", "percent"),
    "throttled": ("429s", "number"),
    "throttled_per_100": ("429s per 100 requests", "number"),
    "failed": ("requests lost", "number"),
    "attempts": ("attempts", "number"),
    "latency_p50_s": ("latency P50", "duration"),
    "latency_p95_s": ("latency P95", "duration"),
    "bound_s": ("shortest possible", "duration"),
    "reserved_tokens": ("tokens reserved", "number"),
    "charged_tokens": ("tokens charged", "number"),
    "used_tokens": ("tokens used", "number"),
    "peak_in_flight": ("in flight, at most", "number"),
    "stagger_delays": ("requests that waited for a slot", "number"),
    "tpm_deferrals": ("requests that waited for tokens", "number"),
    "finalize_passes": ("finalize passes", "number"),
}
_WRITE: dict[str, Callable[[float], str]] = {
    "duration": words.duration,
    "percent": words.percent,
    "number": words.number,
}


# ---------------------------------------------------------------- sentences


def headline(scenario: Scenario) -> str:
    """Return the workload in a few words."""
    workload = scenario.workload
    label, text = workload.provenance.get("requests", (ASSUMED, "drawn"))
    models = sorted(set(workload.models)) if isinstance(workload.models, list) else [workload.models or ""]
    named = ", ".join(filter(None, models[:3])) + (", ..." if len(models) > 3 else "")
    what = plural(len(workload), "request") + (f" to {named}" if named else "")
    return f"{what} ({text})" if label == MEASURED else f"{what} ({label}: {text})"


def waits_text(waits_s: Mapping[str, float]) -> str:
    """Return the causes of waiting as shares of all waiting, the largest first."""
    total = sum(waits_s.values())
    if total <= 0.0:
        return "no request waited"
    ranked = sorted(waits_s.items(), key=lambda item: -item[1])
    return ", ".join(f"{cause} {words.percent(wait / total)}" for cause, wait in ranked if wait / total >= 0.005)


def held_back(waits_s: Mapping[str, float], policy: Policy, reserved: float, charged: float) -> str:
    """Return the knob that holds the batch back, in one sentence; two knobs if they hold it back about equally.

    `reserved`, `charged`: tokens of the run.
    """
    total = sum(waits_s.values())
    ranked = sorted(CAUSES[1:], key=lambda name: -waits_s.get(name, 0.0))
    if total <= 0.0 or waits_s[ranked[0]] <= 0.0:
        return "Nothing held it back: no request waited, so the time of the answers alone decides."
    causes = [cause for cause in ranked[:2] if waits_s[cause] >= EQUALLY * waits_s[ranked[0]]]
    named = [knob_text(cause, policy) for cause in causes]
    shares = [f"{words.percent(waits_s[cause] / total)} for {WAITED_FOR[cause][1]}" for cause in causes]
    parts = [f"of all waiting, {' and '.join(shares)}"]
    flat = charged > 0.0 and policy.charge_rule == "fixed" and reserved > OVER_RESERVED * charged
    if "tpm" in causes and flat:
        est = f"OPENAI_EST_TOKENS_PER_RUN={policy.est_tokens_per_run}"
        parts.append(f"{est} reserves {reserved / charged:.1f} times what the provider charges")
    return f"Held back by {' and '.join(named)}: {'; '.join(parts)}."


def inputs_text(provenance: Provenance, width: int) -> str:
    """Return which inputs were measured, with their sources, and which were assumed."""
    rows = [("", name, text, label) for name, (label, text) in provenance.items()]
    rows.sort(key=lambda row: row[3] != MEASURED)
    lines = [[row[3], row[1], row[2]] for row in rows]
    for before, row in reversed(list(pairwise(lines))):
        if row[0] == before[0]:
            row[0] = ""
    widths = [max(len(row[i]) for row in lines) for i in range(2)]
    room = max(24, width - sum(widths) - 4)
    out = []
    for row in lines:
        first, *rest = textwrap.wrap(row[2], room) or [""]
        out.append(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {first}")
        out += [" " * (sum(widths) + 4) + more for more in rest]
    return "\n".join(out)


# ---------------------------------------------------------------- simulate


def summary_text(scenario: Scenario, s: Summary, width: int) -> str:
    """Return one run as readable text."""
    n = s.requests
    lost = f"{s.failed:,} of {n:,}, {words.below(at_most(s.failed, n))}"
    if s.failures:
        lost += ": " + ", ".join(f"{code} {count:,}" for code, count in s.failures.items())
    efficiency = "not quoted: requests were lost" if s.efficiency is None else words.percent(s.efficiency)
    pairs = [
        ("finishes after", f"{words.duration(s.makespan_s)} ({words.seconds_text(s.makespan_s)})"),
        ("shortest possible", f"{words.duration(s.bound_s)} on this provider, whatever the settings"),
        ("efficiency", efficiency),
        ("429s", f"{s.throttled:,} in {s.attempts:,} attempts"),
        ("lost", lost),
        ("in flight, at most", f"{s.peak_in_flight:,}"),
        ("tokens", f"{s.reserved_tokens:,} reserved, {s.charged_tokens:,} charged, {s.used_tokens:,} used"),
        ("waited for", waits_text(s.waits_s)),
    ]
    parts = [
        wrapped(headline(scenario), width),
        facts(pairs, width),
        wrapped(held_back(s.waits_s, scenario.policy, s.reserved_tokens, s.charged_tokens), width),
        inputs_text(scenario.provenance(), width),
        wrapped(
            f"One run (seed {scenario.seed}); --replications N shows how much runs differ, not what happens "
            "if an assumption above is wrong (`paceline plan` draws that).",
            width,
        ),
    ]
    return "\n\n".join(parts)


def figures_table(forecast: Forecast) -> str:
    """Return a table of every figure over replications."""
    return table(figures_rows(forecast))


def figures_rows(forecast: Forecast) -> list[list[str]]:
    """Return every figure over replications as rows of cells, the first a header."""
    rows = [["", "mean", "95 % interval of it", "P5", "P50", "P95"]]
    for name, (title, form) in FORMS.items():
        e = forecast[name]
        write = _WRITE[form]
        rows.append([title, write(e.mean), interval(e, form), write(e.p5), write(e.p50), write(e.p95)])
    return rows


def forecast_text(scenario: Scenario, forecast: Forecast, width: int) -> str:
    """Return many runs of one policy as readable text."""
    reserved, charged = forecast["reserved_tokens"].mean, forecast["charged_tokens"].mean
    lost = lost_text(forecast)
    if forecast.failures:
        lost += ": " + ", ".join(f"{code} {words.number(mean)} per run" for code, mean in forecast.failures.items())
    runs = len(forecast.runs)
    parts = [
        wrapped(headline(scenario), width),
        figures_table(forecast),
        facts([("lost, all runs", lost), ("waited for", waits_text(forecast.waits_s))], width),
        wrapped(held_back(forecast.waits_s, scenario.policy, reserved, charged), width),
        inputs_text(scenario.provenance(), width),
        wrapped(
            f"{runs:,} runs (seeds {scenario.seed} to {scenario.seed + runs - 1}); the intervals show how much runs "
            "differ, not what happens if an assumption above is wrong (`paceline plan` draws that).",
            width,
        ),
    ]
    return "\n\n".join(parts)


# ---------------------------------------------------------------- plan


def forecast_json(scenario: Scenario, forecast: Forecast) -> dict[str, Any]:
    """Return many runs as one object: the keys of `Summary` hold means, `estimates` every figure with its intervals.

    `efficiency` is null as soon as one run lost a request, as for a single run; `estimates.efficiency.n` is the number
    of runs that have one. `waits_s` and `failures` are means per run. `lost` covers all runs together.
    """
    means = {name: e.mean for name, e in forecast.estimates.items()}
    failed = means["failed"]
    values: dict[str, Any] = {
        "requests": forecast.requests,
        "completed": forecast.requests - failed,
        "efficiency": means["efficiency"] if not forecast.lost else None,
        "waits_s": dict(forecast.waits_s),
        "failures": dict(forecast.failures),
        "cost_usd": None,
    }
    found = {column.name: values.get(column.name, means.get(column.name)) for column in fields(Summary)}
    return found | {
        "replications": len(forecast.runs),
        "seed": scenario.seed,
        "lost": {"seen": forecast.lost, "of": forecast.trials, "probability_at_most": forecast.lost_at_most},
        "estimates": {name: asdict(e) for name, e in forecast.estimates.items()},
    }


# ---------------------------------------------------------------- plan


def plan_text(scenario: Scenario, plan: Plan, width: int) -> str:
    """Return a plan as readable text: the comparison, the changes, the inputs, what to find out before the batch."""
    parts = [wrapped(headline(scenario), width), wrapped(f"Done in {promise(plan)}.", width)]
    parts.append(table(comparison_rows(plan)))
    now = plan.now
    reserved, charged = now["reserved_tokens"].mean, now["charged_tokens"].mean
    parts.append(wrapped("Now: " + held_back(now.waits_s, now.policy, reserved, charged), width))
    if plan.already_good:
        parts.append(wrapped("Nothing that was tried is better than today's settings.", width))
    for title, found in (("Recommended", plan.full), ("Guardrails only", plan.guardrails)):
        parts.append(_changes(title, found, plan, width))
    robust = [line for line in (_drawn(plan), _matters(plan)) if line]
    if robust:
        parts.append("\n".join(wrapped(line, width) for line in robust))
    parts.append(inputs_text(scenario.provenance(), width))
    questions = find_out(plan)
    if questions:
        parts.append("\n".join(["What to find out first:", *(wrapped(each, width) for each in questions)]))
    return "\n\n".join(parts)


def _drawn(plan: Plan) -> str:
    """Return the recommendation's outcome with all unknowns drawn at once."""
    if plan.drawn is None:
        return ""
    best = plan.drawn.outcomes["recommended"]
    times = [words.duration(value("objective_s")) for value in (best.median, best.bad, best.worst)]
    return (
        f"If the assumptions are wrong: over {plan.drawn.draws} drawn conditions ({plan.drawn.ranges}), the "
        f"recommendation takes {times[0]} in the median; one condition in 20 takes longer than {times[1]}, the worst "
        f"takes {times[2]}. None has more than {words.number(best.worst('throttled_per_100'))} 429s or loses more than "
        f"{words.number(best.worst('lost_per_100'))} per 100 requests."
    )


def _matters(plan: Plan) -> str:
    """Return which settings the recommendation depends on."""
    if plan.sensitivity is None:
        return ""
    objective = {"makespan": "makespan_s", "p95_latency": "latency_p95_s"}[plan.objective]
    quantities = [e for e in plan.sensitivity.effects[objective][:3] if e.size > 0.0]
    levels = [level for level in plan.sensitivity.levels[objective] if level.shows][:3]
    parts = []
    if quantities:
        told = [f"{e.env} ({words.duration(e.size)})" for e in quantities]
        parts.append(f"Quantities that matter most, by the mean change when they move: {', '.join(told)}.")
    if levels:
        told = [words.longer(level.assignment, level.change) for level in levels]
        parts.append(f"Rules and switches: {', '.join(told)}.")
    return " ".join(parts)


def comparison_rows(plan: Plan) -> list[list[str]]:
    """Return the comparison of now, guardrails only and recommended as rows of text; the first row is a header."""
    rows = [["", "now", "guardrails only", "recommended"]]
    for name, _, cells, more in comparison(plan):
        rows.append([name, *(cell.text for cell in cells)])
        if more is not None:
            rows.append([f"  {more[0]}", *more[1]])
    return rows


def _changes(title: str, found: Recommendation, plan: Plan, width: int) -> str:
    """Return the changed settings with the gain of each and the reason."""
    if not found.steps:
        return f"{title}: change nothing."
    text = table(changes_rows(title, found, plan), width=width)
    return "\n".join([text, *(wrapped(each, width) for each in robustness(found, plan))])


def changes_rows(title: str, found: Recommendation, plan: Plan) -> list[list[str]]:
    """Return the changed settings as rows of cells, the first a header; gains are with all others as recommended."""
    rows = [[title, "now", "then", "worth", "why"]]
    for step in found.steps:
        knob = KNOB_BY_ENV[step.env]
        rows.append([step.env, knob.text(step.old), knob.text(step.new), worth(step, plan), why(step, plan)])
    return rows


def plan_notes(scenario: Scenario, plan: Plan) -> list[str]:
    """Return warnings: constraints that cannot be met, and conditions that could not be tried."""
    notes = [f"a limit is not kept: {what}" for what in plan.broken]
    if plan.out_of_time:
        notes.append("the search ended at its limit of time, see --effort: settings that were not tried may be better")
    notes += [f"stress condition '{name}': {why}" for name, why in stress_notes(scenario)]
    if plan.now.lost:
        notes.append(f"today's settings lose {lost_text(plan.now)}")
    return notes


# ---------------------------------------------------------------- notes and JSON


def notes_text(notes: Sequence[str], width: int) -> str:
    """Return warnings, one line each."""
    return "\n".join(wrapped(f"note: {note}", width, "  ") for note in notes)


def plain(value: Any) -> Any:
    """Return `value` with nan and infinities replaced by null, since JSON has neither."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value

"""The comparison of a plan's policies: one list of rows, which the terminal, notebooks and the report write out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from governor.model.prices import dollars_text
from sim.base.palette import OBJECTIVES
from sim.base.words import below, duration, number, percent, percent_at_most, seconds_text
from sim.experiment.results import Forecast, Plan, Recommendation, at_most
from sim.reporting.report_text import gain_share, interval, limits_text, policies_of, throttled_limit


class Cell(NamedTuple):
    """One table cell: text, small print below it, a tooltip; `kind` lost, over, kept or "", and that kind's symbol."""

    text: str
    detail: str = ""
    tip: str = ""
    kind: str = ""
    mark: str = ""


class ComparisonRow(NamedTuple):
    """One figure of each policy: its name, a line of small print, and the cells.

    `more`: a second line where there is no room for small print: its name and its texts, none for a policy of which
    there is nothing to say.
    """

    name: str
    about: str
    cells: list[Cell]
    more: tuple[str, list[str]] | None = None


def comparison(plan: Plan) -> list[ComparisonRow]:
    """Return the deciding figures of today's settings, guardrails only and recommended, in this order."""
    forecasts = policies_of(plan).values()

    def row(name: str, about: str, cell: Callable[[Forecast], Cell], more: str = "") -> ComparisonRow:
        cells = [cell(f) for f in forecasts]
        return ComparisonRow(name, about, cells, (more, [each.detail for each in cells]) if more else None)

    rows = [
        row("finish time, P50", "half of the runs are done by then", lambda f: _percentile(f, 0.5)),
        row("finish time, P95", "19 of 20 runs are done by then", lambda f: _percentile(f, 0.95), "its 95 % limits"),
    ]
    if plan.drawn is not None:
        drawn = [Cell(duration(plan.drawn.outcomes[who].bad("makespan_s"))) for who in policies_of(plan)]
        rows.append(ComparisonRow("in 95 of 100 conditions", "with all that is not known drawn", drawn))
    if plan.objective == "p95_latency":
        rows.append(row("latency, P95", "19 of 20 requests are answered within", _latency))
    lost = [percent_at_most(f.lost_at_most) for f in forecasts]
    rows += [
        row("429s per 100 requests", "attempts that the provider refuses", lambda f: _throttled(f, plan)),
        row("requests lost", "of all that were simulated", _lost)._replace(more=("below at 95 % conf.", lost)),
        row("efficiency", "shortest possible time / time needed", _efficiency),
    ]
    if plan.answers_usd is not None:
        answers_usd = plan.answers_usd
        extra = [f["extra_usd"].mean for f in forecasts]
        costs = row("cost", "all answers once, and what is paid beside", lambda f: _cost(f, answers_usd))
        rows.append(
            costs._replace(more=("beyond the answers", list(map(dollars_text, extra)))) if any(extra) else costs
        )
    gains = [Cell("–", "the baseline"), *(_gained(plan, found) for found in (plan.guardrails, plan.full))]
    about = f"in mean {OBJECTIVES[plan.objective][0]}, run by run under the same chance"
    return [
        *rows,
        ComparisonRow("gain", about, gains, ("its 95 % interval", ["", *(cell.detail for cell in gains[1:])])),
    ]


def _percentile(f: Forecast, ratio: float) -> Cell:
    found = f.percentile("makespan_s", ratio)
    return Cell(duration(found.value), limits_text(found), seconds_text(found.value))


def _latency(f: Forecast) -> Cell:
    e = f["latency_p95_s"]
    return Cell(duration(e.mean), interval(e), seconds_text(e.mean))


def _throttled(f: Forecast, plan: Plan) -> Cell:
    e = f["throttled_per_100"]
    attempts = round(sum(run["attempts"] for run in f.runs))
    if e.mean == 0.0:
        return Cell("0", f"0 of {attempts:,} attempts, {below(at_most(0, attempts))}")
    kind, mark = ("over", "▲") if e.mean > throttled_limit(plan) else ("", "")
    return Cell(number(e.mean), interval(e, "number"), f"{number(f['throttled'].mean)} in a run", kind, mark)


def _lost(f: Forecast) -> Cell:
    limit = below(f.lost_at_most)
    codes = ", ".join(f"{code}: {number(count)} per run" for code, count in f.failures.items())
    seen = f"{f.lost:,} of {f.trials:,}"
    if not f.lost:
        return Cell(seen, limit, codes)
    return Cell(seen, f"{percent(f.lost / f.trials)}, {limit}", codes, "lost", "✕")


def _efficiency(f: Forecast) -> Cell:
    e = f["efficiency"]
    if f.lost:
        return Cell("not quoted", "because requests were lost")
    if not e.n:
        return Cell("not known", "the bound does not apply here")
    return Cell(percent(e.mean), interval(e, "percent"))


def _cost(f: Forecast, answers_usd: float) -> Cell:
    extra = f["extra_usd"]
    beside = f"{dollars_text(extra.mean)} for time-outs, re-sends and finalize passes"
    return Cell(dollars_text(answers_usd + extra.mean), beside if extra.mean > 0.0 else "no extra cost")


def _gained(plan: Plan, found: Recommendation) -> Cell:
    gain, share = found.gain_s, gain_share(found, plan)
    if not found.steps:
        return Cell("none", "today's settings")
    return Cell(f"{duration(gain.mean)} ({percent(share)})", interval(gain), seconds_text(gain.mean))

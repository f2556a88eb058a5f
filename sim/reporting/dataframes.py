"""Results as pandas DataFrames, with units in the column names: `_s` seconds, `_tokens`, `_ratio` 0 to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from governor.model.phrases import WAITED_FOR
from governor.model.policy import KNOBS
from governor.model.requests import CAUSES, Attempt
from governor.model.work import THROTTLES
from sim.experiment.results import Figures, Forecast, Plan, Point
from sim.reporting import series

if TYPE_CHECKING:
    from sim.calibration.fits import Figure
    from sim.experiment.shared_quota import SharedRun

# The figures whose names do not state their units.
_UNITS = {"efficiency": "efficiency_ratio"}


def attempts_frame(attempts: Sequence[Attempt]) -> pd.DataFrame:
    """Return one row per attempt in the given order, with the columns of every run's record (`Attempt`).

    -1 = unknown.
    """
    frame = pd.DataFrame([attempt.row() for attempt in attempts], columns=list(Attempt.columns()))
    return frame.assign(outcome=frame["outcome"].astype(str))


def timeline_frame(attempts: Sequence[Attempt]) -> pd.DataFrame:
    """Return the run over time: one row per moment of change, each value holding until the next row.

    `charged_last_60s_tokens`: what the provider charged in the last minute; `launched_attempts` and
    `throttled_attempts` (refused with a 429, at the moment of the refusal) count from the start.
    """
    refused = [a.finished_s for a in attempts if a.outcome in THROTTLES]
    found = {
        "charged_last_60s_tokens": series.charged_per_minute(attempts),
        "in_flight_requests": series.in_flight(attempts),
        "launched_attempts": series.steps(np.array([a.launched_s for a in attempts]), np.ones(len(attempts))),
        "throttled_attempts": series.steps(np.array(refused), np.ones(len(refused))),
    }
    # Charges also leave the last minute after the last answer, when the run is already over.
    end_s = max((a.finished_s for a in attempts), default=0.0)
    moments = np.unique(np.concatenate([[0.0, end_s], *(times for times, _ in found.values())]))
    moments = moments[moments <= end_s]
    columns: dict[str, Any] = {"time_s": moments}
    for name, (times, values) in found.items():
        held = np.searchsorted(times, moments, side="right")
        columns[name] = np.concatenate([[0.0], values])[held].astype(np.int64)
    return pd.DataFrame(columns)


def waits_frame(waits_s: Mapping[str, float], requests: int) -> pd.DataFrame:
    """Return the causes of waiting, largest first: total seconds, mean per request, share, and the deciding knob."""
    total = sum(waits_s.values())
    rows = [
        {
            "cause": cause,
            "waited_s": waits_s[cause],
            "waited_per_request_s": waits_s[cause] / max(1, requests),
            "share_ratio": waits_s[cause] / total if total > 0.0 else 0.0,
            "knob": WAITED_FOR[cause][0],
        }
        for cause in sorted(CAUSES[1:], key=lambda cause: -waits_s.get(cause, 0.0))
        if cause in waits_s
    ]
    return pd.DataFrame(rows).set_index("cause")


def runs_frame(runs: Sequence[Figures]) -> pd.DataFrame:
    """Return one row per replication: its seed, the figures of the run, and seconds waited by cause."""
    rows = [
        {
            "seed": run.seed,
            "requests": run.requests,
            "completed": run.completed,
            **{_UNITS.get(name, name): value for name, value in run.values.items()},
            **{f"waited_{cause}_s": seconds for cause, seconds in run.waits_s.items()},
        }
        for run in runs
    ]
    return pd.DataFrame(rows).set_index("seed")


def estimates_frame(forecast: Forecast) -> pd.DataFrame:
    """Return one row per figure: the mean with its 95 % interval (`low`, `high`), quantiles and number of runs."""
    rows = {_UNITS.get(name, name): asdict(estimate) for name, estimate in forecast.estimates.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("figure")


def points_frame(points: Sequence[Point], objective: str) -> pd.DataFrame:
    """Return the settings tried, best first: their figures, and the knobs in which they differ, by environment name."""
    values = {knob.env: [getattr(point.policy, knob.name) for point in points] for knob in KNOBS}
    frame = pd.DataFrame(
        {
            f"{objective}_s": [point.objective_s for point in points],
            "throttled_per_100": [point.throttled_per_100 for point in points],
            "lost_requests": [point.lost for point in points],
            "extra_usd": [point.extra_usd for point in points],
            "origin": [point.origin for point in points],
            **{env: column for env, column in values.items() if len(set(column)) > 1},
        }
    )
    return frame.sort_values(["lost_requests", f"{objective}_s", "throttled_per_100"], ignore_index=True)


def comparison_frame(plan: Plan) -> pd.DataFrame:
    """Return the means of the deciding figures for today's settings, guardrails only, recommended and runner-up."""
    forecasts = {
        "now": plan.now,
        "guardrails only": plan.guardrails.forecast,
        "recommended": plan.full.forecast,
        "runner-up": plan.runner_up,
    }
    return forecasts_frame(forecasts)


def forecasts_frame(forecasts: Mapping[str, Forecast]) -> pd.DataFrame:
    """Return one row per name: finish time with its 95 % interval, efficiency, 429s and losses."""
    rows = {
        name: {
            "makespan_s": f["makespan_s"].mean,
            "makespan_low_s": f["makespan_s"].low,
            "makespan_high_s": f["makespan_s"].high,
            "latency_p95_s": f["latency_p95_s"].mean,
            "efficiency_ratio": f["efficiency"].mean,
            "throttled_per_100": f["throttled_per_100"].mean,
            "lost_requests": f["failed"].mean,
            "lost_at_most_ratio": f.lost_at_most,
        }
        for name, f in forecasts.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("settings")


def changes_frame(plan: Plan, *, guardrails_only: bool = False) -> pd.DataFrame:
    """Return the recommended changes: the knob, its values, and the gain of each with all others as recommended."""
    found = plan.guardrails if guardrails_only else plan.full
    columns = ["knob", "now", "then", "worth_s", "worth_low_s", "worth_high_s", "stress_worth_s", "reason"]
    rows: list[list[Any]] = [
        [s.env, s.old, s.new, s.worth_s.mean, s.worth_s.low, s.worth_s.high, s.stress_worth_s, s.reason]
        for s in found.steps
    ]
    return pd.DataFrame(rows, columns=columns).set_index("knob")


def calibration_frame(figures: Sequence[Figure]) -> pd.DataFrame:
    """Return what was learnt from a log, one row per figure: the value with its interval, its unit, and the method.

    `known`: whether the log could determine it; if not, `value` is the default that was kept.
    """
    rows = [
        {
            "figure": figure.name,
            "value": figure.value if figure.known else figure.default,
            "low": figure.low,
            "high": figure.high,
            "unit": figure.unit,
            "known": figure.known,
            "how": figure.how,
        }
        for figure in figures
    ]
    return pd.DataFrame(rows).set_index("figure")


def processes_frame(runs: Mapping[str, SharedRun]) -> pd.DataFrame:
    """Return one row per named run of a batch by several processes that share its quota.

    `share_min_ratio`, `share_max_ratio`: launches of the process that got least and most, over an equal share.
    """
    rows = {
        name: {
            "processes": len(run.launches),
            "makespan_s": run.summary.makespan_s,
            "efficiency_ratio": run.summary.efficiency,
            "throttled": run.summary.throttled,
            "lost_requests": run.summary.failed,
            "sent_twice_requests": run.resent,
            "used_max_tokens": run.used_max,
            "share_min_ratio": min(run.shares()),
            "share_max_ratio": max(run.shares()),
        }
        for name, run in runs.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def stress_frame(plan: Plan) -> pd.DataFrame:
    """Return the outcome of the plan's policies if one assumption is wrong: a row per condition and policy."""
    rows = [
        {
            "condition": row.name,
            "settings": who,
            "makespan_s": f["makespan_s"].mean,
            "throttled_per_100": f["throttled_per_100"].mean,
            "lost_requests": f["failed"].mean,
        }
        for row in plan.stress
        for who, f in row.forecasts.items()
    ]
    return pd.DataFrame(rows).set_index(["condition", "settings"])

"""The evidence for a plan's recommendations: what each change gains, the stress rows, the maps, the drawn conditions.

What lives here: pure questions to the runs once the settings are chosen. What must not: choosing them (`planner`), and
how the answers look (`report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from governor.model.policy import KNOB_BY_NAME, Policy
from sim.base.words import number
from sim.experiment.results import Forecast, Heat, Recommendation, Step, StressRow, forecast_of, paired_difference
from sim.experiment.robustness import Drawn, Outcomes
from sim.experiment.runs import Condition, Runs
from sim.scenario.unknowns import Unknowns, drawn
from sim.selection.hardening import Stress
from sim.selection.reasons import reason_for
from sim.selection.search import INDIFFERENCE, Goal, Searcher, better, score_of
from sim.selection.space import changed_knobs, full_space

# The plan's policies, in the order in which they are shown.
NAMES = ("now", "guardrails", "recommended", "runner_up")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the questions are put to. `seeds`: runs in the scenario itself.

    `listed`: the rows of the stress set that have names of their own; the others are drawn.
    """

    searcher: Searcher
    stress: Stress
    seeds: int
    listed: range

    @property
    def goal(self) -> Goal:
        """What the plan is for."""
        return self.searcher.goal

    def recommendation(self, now: Forecast, found: Forecast, bold: Forecast) -> Recommendation:
        """Each change on top of those before it, what leaving out that one would cost, and what was passed over."""
        names = changed_knobs(now.policy, found.policy)
        path = [now.policy]
        for name in names:
            path.append(path[-1].with_(**{name: getattr(found.policy, name)}))
        without = [found.policy.with_(**{name: getattr(now.policy, name)}) for name in names]
        seeds = self.seeds
        self.searcher.run([*path, *without, found.policy], seeds)
        figure = self.goal.figure
        along = [forecast_of(policy, self.searcher.figures(policy, seeds)) for policy in path]
        end = self.searcher.score(found.policy, seeds)[2]
        steps = []
        for i, name in enumerate(names):
            before, after = along[i], along[i + 1]
            left_out_s = self.searcher.score(without[i], seeds)[2] - end
            steps.append(
                Step(
                    env=KNOB_BY_NAME[name].env,
                    old=getattr(now.policy, name),
                    new=getattr(found.policy, name),
                    objective_s=after[figure].mean,
                    gain_s=before[figure].mean - after[figure].mean,
                    left_out_s=left_out_s,
                    throttled_per_100=after["throttled_per_100"].mean,
                    reason=reason_for(name, now.policy, found.policy, now.waits_s, left_out_s, self.searcher.scenario),
                )
            )
        gain = paired_difference(now, found, figure)
        if better(score_of(bold.runs, self.goal), score_of(found.runs, self.goal), 2.0 * INDIFFERENCE):
            return Recommendation(found, tuple(steps), gain, bold, self._risk(bold.policy))
        return Recommendation(found, tuple(steps), gain)

    def _risk(self, policy: Policy) -> str:
        """Under which condition a policy breaks the limits worst, in words."""
        stress = self.stress
        stress.run([policy])
        _, worst = max((stress.score(policy, row), row) for row in range(len(stress.conditions)))
        figures = stress.figures(policy, worst)
        lost = sum(f["failed"] for f in figures) / len(figures)
        throttled = sum(f["throttled_per_100"] for f in figures) / len(figures)
        name, requests = stress.conditions[worst].name, figures[0].requests
        # Drawn conditions stand in no table: their number tells a reader nothing.
        place = f"under '{name}'" if worst in self.listed else "in one of the drawn conditions"
        gone = f"loses {number(lost)} of {requests:,}" if lost else "loses none"
        return f"{place} it draws {number(throttled)} throttles per 100 requests and {gone}"

    def stress_rows(self, policies: Sequence[Policy], rows: Sequence[int]) -> tuple[StressRow, ...]:
        """What the plan's policies (see NAMES) do under these conditions of the stress set."""
        self.stress.run(policies, rows)
        found = []
        for row in rows:
            forecasts = {
                name: forecast_of(policy, self.stress.figures(policy, row))
                for name, policy in zip(NAMES, policies, strict=True)
            }
            found.append(StressRow(self.stress.conditions[row].name, forecasts))
        return tuple(found)

    def heats(self, best: Policy, size: int) -> tuple[Heat, ...]:
        """Maps of stagger against concurrency and of headroom against stagger, around the recommendation."""
        ladders = full_space(self.searcher.scenario).ladders
        pairs = (("stagger_seconds", "max_concurrency"), ("stagger_seconds", "tpm_headroom"))
        return tuple(self._heat(best, x, y, ladders, size) for x, y in pairs)

    def _heat(self, best: Policy, x: str, y: str, ladders: Mapping[str, tuple[Any, ...]], size: int) -> Heat:
        now = self.searcher.scenario.policy
        xs = _spread(ladders[x], (getattr(now, x), getattr(best, x)), size)
        ys = _spread(ladders[y], (getattr(now, y), getattr(best, y)), size)
        grid = [[best.with_(**{x: a, y: b}) for a in xs] for b in ys]
        self.searcher.run([policy for row in grid for policy in row], 1)
        figures = [[self.searcher.figures(policy, 1)[0] for policy in row] for row in grid]
        return Heat(
            x_env=KNOB_BY_NAME[x].env,
            y_env=KNOB_BY_NAME[y].env,
            x_values=tuple(float(a) for a in xs),
            y_values=tuple(float(b) for b in ys),
            objective_s=np.array([[f[self.goal.figure] for f in row] for row in figures]),
            throttled_per_100=np.array([[f["throttled_per_100"] for f in row] for row in figures]),
            lost=np.array([[f["failed"] for f in row] for row in figures]),
            now=(float(getattr(now, x)), float(getattr(now, y))),
            recommended=(float(getattr(best, x)), float(getattr(best, y))),
        )


def proved(
    searcher: Searcher, policies: Sequence[Policy], *, first: int, most: int, seed: int, precision_ratio: float
) -> list[Forecast]:
    """Forecasts under the fresh seeds seed, seed + 1, ..., the same for all policies.

    Starts with `first` runs each and doubles until the half-width (95 %) of every paired difference to the first policy
    in the objective is at most `precision_ratio` of that policy's mean, or `most` runs are done.
    """
    runs, condition, figure = searcher.runs, searcher.condition, searcher.goal.figure
    count = min(first, most)
    while True:
        span = range(seed, seed + count)
        runs.require((condition, policy, span) for policy in policies)
        forecasts = [forecast_of(policy, runs.figures(condition, policy, span)) for policy in policies]
        base = forecasts[0]
        widths = [paired_difference(base, other, figure).half_width for other in forecasts[1:]]
        if count >= most or (count > 1 and max(widths) <= precision_ratio * abs(base[figure].mean)):
            return forecasts
        count = min(2 * count, most)


def drawn_outcomes(
    searcher: Searcher, runs: Runs, unknowns: Unknowns, policies: Sequence[Policy], draws: range, seeds: int
) -> Drawn:
    """The plan's policies (see NAMES) under conditions that the search has not seen, `seeds` runs in each."""
    conditions = drawn(searcher.scenario, unknowns, draws)
    named = dict(zip(NAMES, policies, strict=True))
    first = searcher.scenario.seed
    span = range(first, first + seeds)
    runs.require((condition, policy, span) for condition in conditions for policy in named.values())
    outcomes = {who: _outcomes(runs, conditions, policy, span, searcher.goal) for who, policy in named.items()}
    return Drawn(unknowns.text(), len(conditions), seeds, outcomes)


def _outcomes(runs: Runs, conditions: Sequence[Condition], policy: Policy, span: range, goal: Goal) -> Outcomes:
    rows = []
    for condition in conditions:
        figures = runs.figures(condition, policy, span)
        requests = sum(run.requests for run in figures)
        throttled = sum(run["throttled_per_100"] for run in figures) / len(figures)
        rows.append((score_of(figures, goal)[2], throttled, 100.0 * sum(run["failed"] for run in figures) / requests))
    objective, throttles, lost = np.array(rows, dtype=np.float64).T
    return Outcomes(objective, throttles, lost)


def _spread(ladder: Sequence[Any], wanted: Sequence[Any], size: int) -> list[Any]:
    """About `size` rungs over the ladder, those `wanted` among them."""
    picked = np.unique(np.linspace(0, len(ladder) - 1, size).round().astype(int))
    return sorted({*(ladder[i] for i in picked), *wanted})

"""The evidence for a plan's recommendations: what each change is worth, stress rows, maps, drawn conditions.

All of it is simulated on fresh seeds, which nothing was chosen by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from governor.model.policy import KNOB_BY_NAME, Policy
from sim.base.words import duration, number, percent
from sim.experiment.results import (
    Estimate,
    Figures,
    Forecast,
    Heat,
    Recommendation,
    RejectedSetting,
    Step,
    StressRow,
    forecast_of,
    paired_difference,
)
from sim.experiment.robustness import DrawnConditions, Outcomes
from sim.scenario.scenario import Scenario
from sim.scenario.stress import Condition
from sim.scenario.unknowns import FRESH_SEEDS
from sim.selection.hardening import Stress
from sim.selection.search import Goal, Searcher, score_of
from sim.selection.space import changed_knobs, full_space

# The plan's policies, in the order in which they are shown.
NAMES = ("now", "guardrails", "recommended", "runner_up")
LABELS = {
    "now": "today's settings",
    "guardrails": "the guardrails-only settings",
    "recommended": "the recommended settings",
    "runner_up": "the runner-up",
}
# What is faster by more than this share is recommended, or passed over for a stated condition. Half of what is promised
# (see `benchmarks/bench_scenarios.py`): a mean of some hundred runs may be off by the other half.
WORTH_A_WORD = 0.005
# Every so many seeds is the precision looked at: the widths of two looks differ by less than they cost.
_GROWTH = 2


@dataclass(frozen=True, slots=True)
class Evidence:
    """Questions to runs on fresh seeds.

    `seeds`: runs per setting where only means are shown; `pairs`: of two settings of which the faster is wanted.
    """

    searcher: Searcher
    stress: Stress
    seeds: int
    pairs: int = 1

    @property
    def goal(self) -> Goal:
        """Return the objective of the plan."""
        return self.searcher.goal

    def forecast(self, policy: Policy, seeds: int | None = None) -> Forecast:
        """Return a policy's forecast in the scenario as assumed."""
        return forecast_of(policy, self.searcher.figures(policy, seeds or self.seeds))

    def proved(self, policies: Sequence[Policy], *, first: int, most: int, precision_ratio: float) -> list[Forecast]:
        """Return forecasts of the policies under the same seeds.

        Starts with `first` runs each and doubles until the half-width (95 %) of each mean objective is at most
        `precision_ratio` of it, or `most` runs are done.
        """
        count, figure = min(first, most), self.goal.figure
        while True:
            self.searcher.run(policies, count)
            found = [self.forecast(policy, count) for policy in policies]
            sharp = all(f[figure].half_width <= precision_ratio * abs(f[figure].mean) for f in found)
            if count >= most or (count > 1 and sharp):
                return found
            count = min(_GROWTH * count, most)

    def recommendation(self, now: Forecast, found: Forecast, faster: Mapping[str, Policy]) -> Recommendation:
        """Return the worth of each change, and which `faster` settings (by name) were passed over, and why."""
        steps = self._steps(now, found)
        gain = paired_difference(now, found, self.goal.figure)
        passed = []
        for name, policy in faster.items():
            price, other = self.price(found.policy, policy)
            reason = self.forbids(policy, found.policy)
            if self.is_ahead(found.policy, policy) and reason:
                passed.append(RejectedSetting(name, other, price, reason))
        return Recommendation(found, steps, gain, tuple(passed))

    def price(self, policy: Policy, other: Policy) -> tuple[Estimate, Forecast]:
        """Return by how much `other` is faster as assumed, seed by seed, and its forecast."""
        mine, its = (self.forecast(each, max(self.pairs, self.seeds)) for each in (policy, other))
        return paired_difference(mine, its, self.goal.figure), its

    def is_ahead(self, policy: Policy, other: Policy) -> bool:
        """Return whether `other` is faster as assumed by enough to be mentioned."""
        price, its = self.price(policy, other)
        return price.mean > WORTH_A_WORD * (its[self.goal.figure].mean + price.mean)

    def _steps(self, now: Forecast, found: Forecast) -> tuple[Step, ...]:
        names = changed_knobs(now.policy, found.policy)
        without = {name: found.policy.with_(**{name: getattr(now.policy, name)}) for name in names}
        self.searcher.run([*without.values(), found.policy], self.seeds)
        self.stress.run([*without.values(), found.policy])
        figure, under = self.goal.figure, self.stress.objective(found.policy)
        steps = []
        for name, policy in without.items():
            other = self.forecast(policy)
            worth = paired_difference(other, found, figure)
            steps.append(
                Step(
                    env=KNOB_BY_NAME[name].env,
                    old=getattr(now.policy, name),
                    new=getattr(found.policy, name),
                    worth_s=worth,
                    stress_worth_s=self.stress.objective(policy) - under,
                    throttled_per_100=other["throttled_per_100"].mean,
                    lost=other["failed"].mean,
                    breaks=self.forbids(policy, found.policy),
                    reason=reason_for(name, now.policy, found.policy, now.waits_s, worth.mean, self.searcher.scenario),
                )
            )
        return tuple(sorted(steps, key=lambda step: -step.worth_s.mean))

    def forbids(self, policy: Policy, instead: Policy) -> str:
        """Return where `policy` breaks the limits by most more than `instead` does, with figures; "" = nowhere."""
        worst: tuple[tuple[float, float], str] | None = None
        for where, goal, mine, other in self._under(policy, instead):
            (lost, throttled), (least, less) = score_of(mine, goal)[:2], score_of(other, goal)[:2]
            excess = lost - least, throttled - less if lost >= least else 0.0
            if excess > (1e-12, 0.0) and (worst is None or excess > worst[0]):
                worst = excess, f"{where} it {_refusals(mine)}; those recommended: {_figures(other)}"
        return "" if worst is None else worst[1]

    def _under(self, policy: Policy, instead: Policy) -> Iterator[tuple[str, Goal, list[Figures], list[Figures]]]:
        """Return the runs of two policies in each condition, as assumed first."""
        here, seeds, stress = self.searcher, self.seeds, self.stress
        yield "as assumed", self.goal, here.figures(policy, seeds), here.figures(instead, seeds)
        stress.run([policy, instead])
        for row, condition in enumerate(stress.conditions):
            yield f"under '{condition.name}'", stress.goal, stress.figures(policy, row), stress.figures(instead, row)

    def stress_rows(self, policies: Sequence[Policy]) -> tuple[StressRow, ...]:
        """Return how the plan's policies (see NAMES) do under each condition of the stress set."""
        self.stress.run(policies)
        found = []
        for row, condition in enumerate(self.stress.conditions):
            named = zip(NAMES, policies, strict=True)
            forecasts = {who: forecast_of(policy, self.stress.figures(policy, row)) for who, policy in named}
            found.append(StressRow(condition.name, forecasts))
        return tuple(found)

    def heats(self, best: Policy, size: int) -> tuple[Heat, ...]:
        """Return maps of stagger against concurrency and of headroom against stagger, around the recommendation."""
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

    def drawn(self, ranges: str, policies: Sequence[Policy], conditions: Sequence[Condition]) -> DrawnConditions:
        """Return the plan's policies (see NAMES) under conditions drawn from these ranges, one run in each."""
        named = dict(zip(NAMES, policies, strict=False))
        self.searcher.runs.require((c, policy, [_seed(c)]) for c in conditions for policy in named.values())
        outcomes = {who: self._outcomes(conditions, policy) for who, policy in named.items()}
        return DrawnConditions(ranges, len(conditions), 1, outcomes)

    def _outcomes(self, conditions: Sequence[Condition], policy: Policy) -> Outcomes:
        rows = []
        for condition in conditions:
            (run,) = self.searcher.runs.figures(condition, policy, [_seed(condition)])
            lost = 100.0 * run["failed"] / run.requests
            rows.append((run["makespan_s"], score_of([run], self.goal)[2], run["throttled_per_100"], lost))
        makespan, objective, throttles, lost_per_100 = np.array(rows, dtype=np.float64).T
        return Outcomes(makespan, objective, throttles, lost_per_100)


def _seed(condition: Condition) -> int:
    return condition.scenario.seed + FRESH_SEEDS


def broken_limits(
    goal: Goal, stressed: Goal, forecasts: Mapping[str, Forecast], stress: Sequence[StressRow]
) -> tuple[str, ...]:
    """Return which limits a recommendation breaks, in words with the figures.

    As assumed, by `goal`; or under a condition in which another of the plan's settings keeps them, by `stressed`.
    """
    said = []
    best = forecasts["recommended"]
    for what, breaks in _breaks(goal, best):
        said += [f"as assumed the recommended settings {what}"] if breaks else []
    wish = goal.finish_by_s
    if wish is not None:
        late = best.percentile("makespan_s", 0.95)
        if not late.bounded:
            said.append(f"{late.n} runs cannot say whether 19 of 20 finish within the wanted {duration(wish)}")
        elif late.high > wish:
            said.append(
                f"19 of 20 runs finish after {duration(late.value)}, at 95 % confidence after {duration(late.high)} at "
                f"the latest; wanted: {duration(wish)}"
            )
    for row in stress:
        for who in ("recommended", "guardrails"):
            mine = row.forecasts[who]
            for i, (what, breaks) in enumerate(_breaks(stressed, mine)):
                keeps = [n for n, f in row.forecasts.items() if not any(b for _, b in _breaks(stressed, f)[: i + 1])]
                if breaks and keeps:
                    # Whoever cannot change code has no use for more than today's settings.
                    open_to = [n for n in keeps if n == "now"] if who == "guardrails" else keeps
                    least = min(open_to or keeps, key=lambda name: forecasts[name][goal.figure].mean)
                    mean_s, other_s = (forecasts[name][goal.figure].mean for name in (who, least))
                    said.append(
                        f"under '{row.name}' {LABELS[who]} {what}; {LABELS[least]} would keep the limit there, with "
                        f"{duration(other_s)} in place of {duration(mean_s)} as assumed"
                    )
                    break
    return tuple(said)


def _breaks(goal: Goal, f: Forecast) -> list[tuple[str, bool]]:
    """Return each limit's figure in a forecast, in words, and whether it breaks the limit: losses first."""
    lost, throttled = f.lost / max(1, f.trials), f["throttled_per_100"].mean
    return [
        (f"lose {f.lost:,} of {f.trials:,} requests (allowed: {goal.max_lost:.3g})", lost > goal.max_lost),
        (
            f"draw {number(throttled)} 429s per 100 requests (limit: {goal.max_throttled_per_100:g})",
            throttled > goal.max_throttled_per_100,
        ),
    ]


def _figures(figures: Sequence[Figures]) -> str:
    throttled = sum(f["throttled_per_100"] for f in figures) / len(figures)
    lost, requests = sum(f["failed"] for f in figures), sum(f.requests for f in figures)
    return f"{number(throttled)} 429s per 100 requests, {lost:,.0f} of {requests:,} lost"


def _refusals(figures: Sequence[Figures]) -> str:
    throttled = sum(f["throttled_per_100"] for f in figures) / len(figures)
    lost, requests = sum(f["failed"] for f in figures), sum(f.requests for f in figures)
    gone = f"loses {lost:,.0f} of {requests:,} requests" if lost else "loses none"
    return f"draws {number(throttled)} 429s per 100 requests and {gone}"


def _spread(ladder: Sequence[Any], wanted: Sequence[Any], size: int) -> list[Any]:
    """About `size` rungs over the ladder, those `wanted` among them."""
    picked = np.unique(np.linspace(0, len(ladder) - 1, size).round().astype(int))
    return sorted({*(ladder[i] for i in picked), *wanted})


# ---------------------------------------------------------------- why a setting changes


# What is less reads as nothing.
SECONDS_WORTH_A_WORD = 0.5


def reason_for(
    name: str, old: Policy, new: Policy, waits_s: Mapping[str, float], left_out_s: float, scenario: Scenario
) -> str:
    """Why this knob changes.

    `waits_s`: mean waits by cause under today's settings, seconds over all requests. `left_out_s`: what the
    recommendation loses without this change.
    """
    before, after = getattr(old, name), getattr(new, name)
    waited = _share(waits_s)
    rule = scenario.provider.charge_rule
    tpm = scenario.provider.tpm
    if name == "stagger_seconds":
        held = f"{waited('stagger')} of all waiting was for the next launch slot"
        if after < before:
            return f"{held}; the token budget paces launches by itself"
        return "spaces launches, so that a burst does not meet a limit that the budget cannot see"
    if name == "max_concurrency":
        if after > before and waits_s["concurrency"] > 0.05 * sum(waits_s.values()):
            return f"{waited('concurrency')} of all waiting was for a free place in flight"
        if after > before and left_out_s < SECONDS_WORTH_A_WORD:
            return "as assumed this gains nothing; it is room for the case that answers take longer"
        if after > before:
            return f"{before} in flight would hold back what the other changes gain, by {duration(left_out_s)}"
        return "more in flight brings nothing here, and fewer are exposed when the provider refuses"
    if name == "tpm_headroom":
        if after < before:
            return f"the budget follows the provider's own refill; {percent(before)} of {tpm:,.0f} tokens/min lay idle"
        return "leaves room for what the reservation does not cover"
    texts = {
        "est_tokens_per_run": f"nearer to what the provider charges ({rule}) than {old.est_tokens_per_run:,} tokens",
        "retry_max_attempts": "a request survives a longer run of refusals" if after > before else "fewer suffice",
        "backoff_base_seconds": "returns sooner after a refusal" if after < before else "waits out a refusal",
        "finalize_lowers_concurrency": "finalize passes need not slow the others down",
        "tpm_window": {
            "bucket": "the provider refills continuously: no waiting for a minute to expire",
            "sliding": "tokens free as they age, not all at once when a minute expires",
            "fixed": "whole minutes fit this batch",
        }[new.tpm_window],
        "burst_seconds": f"the provider grants bursts of {scenario.provider.burst_s:g} s of its limits",
        "charge_rule": {
            "fixed": "one flat reservation is enough here",
            "max_of": "reserves what the documentation says is charged, request by request",
            "prompt_plus_max": "reserves the most that could be charged, request by request: safe under every rule",
        }.get(new.charge_rule, f"reserves request by request what is measured to be charged ({new.charge_rule})"),
        "launch_order": "starts the longest declared answers first, so that the batch does not end on a long tail"
        if new.launch_order == "longest_first"
        else "the order of submission is as good",
        "sync_headers": "the provider's own count corrects the budget: a neighbour or another charge rule shows",
        "hold_on_throttle": "after a 429 no request runs into the same refusal"
        if after
        else "a 429 concerns one request",
        "backoff_keeps_permit": "a place in flight is not blocked while its request backs off"
        if not after
        else "a request that backs off keeps its place, which slows the others down",
        "settle": "books what was really used as soon as it is known" if after else "the provider does not settle",
    }
    return texts.get(name, "better in the simulation")


def _share(waits_s: Mapping[str, float]):  # type: ignore[no-untyped-def]
    total = sum(waits_s.values())

    def of(cause: str) -> str:
        return percent(waits_s[cause] / total) if total > 0.0 else "none"

    return of

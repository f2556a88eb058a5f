"""The search for better settings, and the evidence for them: what `paceline plan` does.

What lives here: the order of the work, from today's settings to two recommendations with their proof. How settings are
compared and tried stands in `search`, how they are run in `experiment`, how the result looks in `report`.

The steps, the same for both recommendations (the eight guardrail knobs alone; everything the law can do):

1. Race anchors (today's settings, a fixed recipe, presets at several concurrencies), climb from the best.
2. Harden: among the best and their safer variants, prefer what keeps the limits under every condition of the stress set
   in which anything tried keeps them.
3. Drop every change that gains nothing and protects from nothing: a shorter list is easier to trust.
4. Estimate again on fresh seeds, which nothing was chosen by; only these figures are published. Replications go on
   until the paired differences to today's settings are sharp enough.

No oracle: a setting is a policy, and a policy sees what is known at submission; the hidden answers reach the search
only through the runs' outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from governor.policy import KNOB_BY_NAME, Policy
from governor.requests import Attempt
from sim.experiment import Pool, attempts_of, replicate_until
from sim.reasons import reason_for
from sim.results import Forecast, Heat, Plan, Recommendation, Step, StressRow, forecast_of, paired_difference
from sim.scenario import Scenario, stress_set
from sim.search import (
    INDIFFERENCE,
    Goal,
    Hardening,
    Searcher,
    Space,
    Stress,
    better,
    changed_knobs,
    full_anchors,
    full_space,
    gap_s,
    guardrail_anchors,
    guardrail_space,
    key_of,
    score_of,
)

# Simulated requests, by level of effort; about 100,000 a second on two cores.
EFFORTS = {"quick": 600_000, "normal": 3_000_000, "thorough": 12_000_000}
# Large workloads get at least so many runs, whatever the effort.
LEAST_RUNS = 240
# Published figures come from seeds that the search has never seen.
FRESH_SEEDS = 1_000_000
PRECISION = 0.01
# Today's settings are good enough if the best gains less than this share of the objective.
GOOD_ENOUGH = 0.01

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be spent on each part, in simulated requests and in runs, for a workload of n requests."""

    search: int
    hardening: int
    seeds: int
    stress_seeds: int
    variants: int
    steps: int
    final_first: int
    final_most: int
    grid: int

    @classmethod
    def of(cls, effort: int, n: int, conditions: int) -> Budget:
        """Shares of the effort: a quarter for the two searches, half for hardening, the rest for the proof."""
        per_candidate = n * conditions
        stress_seeds = max(1, min(3, effort // (90 * per_candidate)))
        return cls(
            search=effort // 8,
            hardening=effort // 3,
            seeds=max(1, min(6, effort // (300 * n))),
            stress_seeds=stress_seeds,
            variants=max(4, min(16, effort // (12 * per_candidate * stress_seeds))),
            steps=4 if effort // (48 * per_candidate) >= 4 else 2,
            final_first=max(3, min(10, effort // (60 * n))),
            final_most=max(5, min(80, effort // (16 * n))),
            grid=max(3, min(7, int((effort / (24 * n)) ** 0.5))),
        )


class Planner:
    """One plan in the making. Make it, call `plan()` once."""

    def __init__(self, scenario: Scenario, goal: Goal, *, effort: str, pool: Pool, say: Say) -> None:
        self.scenario = scenario
        self.goal = goal
        self.pool = pool
        self.say = say
        rows = stress_set(scenario)
        n = len(scenario.workload)
        self.budget = Budget.of(max(EFFORTS[effort], LEAST_RUNS * n), n, len(rows))
        self.searcher = Searcher(scenario, goal.allowing(1, n), pool, self.budget.search)
        self.stress = Stress(rows, goal.allowing(2, n), pool, self.budget.stress_seeds)
        self.gap_s = gap_s(scenario)

    def plan(self) -> Plan:
        """The whole search and its proof."""
        now = self.scenario.policy
        self.searcher.run([now], self.budget.seeds)
        self.say("searching the eight guardrail knobs")
        few, bold_few = self._found("guardrails", guardrail_anchors(self.scenario), guardrail_space(self.scenario), [])
        self.say("searching everything that the law can do")
        everything = [*full_anchors(self.scenario), few[0]]
        best, bold = self._found("paceline", everything, full_space(self.scenario), few[:1])
        self.say("estimating again on fresh seeds")
        runner_up = self._runner_up(best)
        policies = [now, few[0], best[0], runner_up, bold_few, bold]
        forecasts = replicate_until(
            self.scenario,
            policies,
            figure=self.goal.figure,
            precision_ratio=PRECISION,
            first=self.scenario.replications or self.budget.final_first,
            most=self.scenario.replications or self.budget.final_most,
            seed=self.scenario.seed + FRESH_SEEDS,
            pool=self.pool,
        )
        self.say("weighing each change")
        recommendations = [
            self._recommendation(forecasts[0], forecasts[1], forecasts[4]),
            self._recommendation(forecasts[0], forecasts[2], forecasts[5]),
        ]
        self.say("mapping the neighbourhood")
        heats = self._heats(best[0])
        gain = recommendations[1].gain_s
        kept = score_of(forecasts[0].runs, self.goal)[:2] <= score_of(forecasts[2].runs, self.goal)[:2]
        return Plan(
            objective=self.goal.objective,
            now=forecasts[0],
            guardrails=recommendations[0],
            full=recommendations[1],
            runner_up=forecasts[3],
            points=self.searcher.points(self.budget.seeds),
            stress=self._stress_rows(policies[:4]),
            heats=heats,
            timelines=self._timelines(now, few[0], best[0]),
            limits=self._limits(),
            already_good=kept and gain.mean <= GOOD_ENOUGH * forecasts[0][self.goal.figure].mean,
            broken=self._broken(forecasts[2]),
            settings_tried=len(self.searcher.runs),
            runs_simulated=self.pool.runs,
            requests_simulated=self.pool.requests,
            seed=self.scenario.seed,
        )

    # ------------------------------------------------------------ finding

    def _found(
        self, origin: str, anchors: list[Policy], space: Space, more: list[Policy]
    ) -> tuple[list[Policy], Policy]:
        """Recommendable settings of one space, best first, and the fastest one whatever it risks."""
        searcher, budget = self.searcher, self.budget
        searcher.origin = origin
        searcher.effort = self.pool.requests - searcher.start + budget.search
        rounds = [*(n for n in (1, 2, 4, 8) if n < budget.seeds), budget.seeds]
        leaders = searcher.race(anchors, 3, rounds)
        best = searcher.climb(leaders[0], space.neighbours, budget.seeds)
        self.say("hardening against the stress set")
        hardening = Hardening(
            searcher,
            self.stress,
            seeds=budget.seeds,
            most=budget.variants,
            steps=budget.steps,
            effort=budget.hardening,
        )
        # Today's settings first: what they keep under stress is possible, and so is asked of the others.
        hardening.require([self.scenario.policy, *more])
        for start in dict.fromkeys((best, leaders[0])):
            safe = hardening.walk(start, lambda policy: self._variants(policy, space))
            hardening.polish(safe, space.neighbours)
        ranked = hardening.ranked()
        return [self._pruned(ranked[0]), *ranked[1:]], min(ranked, key=lambda p: searcher.score(p, budget.seeds))

    def _variants(self, policy: Policy, space: Space) -> list[Policy]:
        """Safer relatives of a policy, the most useful first; only knobs of the space."""
        ladders = space.ladders
        wished: list[dict[str, Any]] = []
        if "sync_headers" in ladders:
            watchful = {"sync_headers": True, "hold_on_throttle": True, "tpm_window": "bucket"}
            spaced = {
                "stagger_seconds": _nearest(ladders["stagger_seconds"], max(policy.stagger_seconds, 0.5 * self.gap_s))
            }
            wished += [watchful, watchful | spaced]
            wished += [
                watchful | more | {"charge_rule": rule}
                for rule in ("prompt_plus_max", "max_of")
                for more in (spaced, {})
            ]
            wished += [watchful | {"backoff_keeps_permit": not policy.backoff_keeps_permit}]
        if policy.charge_rule == "fixed":
            higher = [est for est in ladders["est_tokens_per_run"] if est > policy.est_tokens_per_run]
            wished += [{"est_tokens_per_run": est} for est in higher[-2:] + higher[:2]]
        stagger = [s for s in (0.1, 0.5, 1.0, 2.0, 0.5 * self.gap_s, self.gap_s) if s > policy.stagger_seconds]
        wished += [{"stagger_seconds": _nearest(ladders["stagger_seconds"], s)} for s in stagger]
        higher = [h for h in ladders["tpm_headroom"] if h > policy.tpm_headroom]
        wished += [{"tpm_headroom": h} for h in higher[:4:2] + higher[4:5]]
        wished += [{"retry_max_attempts": a} for a in ladders["retry_max_attempts"] if a > policy.retry_max_attempts]
        wished += [{"max_concurrency": c} for c in ladders["max_concurrency"] if c < policy.max_concurrency][-1:-6:-2]
        if "sync_headers" in ladders:
            wished += [{"hold_on_throttle": not policy.hold_on_throttle}, {"settle": not policy.settle}]
        return [policy.with_(**changes) for changes in wished]

    def _pruned(self, policy: Policy) -> Policy:
        """The policy without the changes that neither gain anything nor protect from anything."""
        searcher, stress, seeds = self.searcher, self.stress, self.budget.seeds
        now = self.scenario.policy
        for name in changed_knobs(now, policy):
            simpler = policy.with_(**{name: getattr(now, name)})
            if better(searcher.score(policy, seeds), searcher.score(simpler, seeds)):
                continue
            stress.run([simpler])
            if stress.violations(simpler) <= stress.violations(policy):
                policy = simpler
        return policy

    def _runner_up(self, ranked: list[Policy]) -> Policy:
        """The next best setting that differs from the recommendation in more than a nuance."""
        best = self.searcher.score(ranked[0], self.budget.seeds)
        for policy in ranked[1:]:
            if key_of(policy) != key_of(ranked[0]) and len(changed_knobs(ranked[0], policy)) > 1:
                return policy
        assert best is not None
        return ranked[-1]

    # ------------------------------------------------------------ proof

    def _recommendation(self, now: Forecast, found: Forecast, bold: Forecast) -> Recommendation:
        """Each change on top of those before it, what leaving out that one would cost, and what was passed over."""
        names = changed_knobs(now.policy, found.policy)
        path = [now.policy]
        for name in names:
            path.append(path[-1].with_(**{name: getattr(found.policy, name)}))
        without = [found.policy.with_(**{name: getattr(now.policy, name)}) for name in names]
        seeds = self.budget.seeds
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
                    reason=reason_for(name, now.policy, found.policy, now.waits_s, left_out_s, self.scenario),
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
        scored = [(searcher.score(policy, stress.seeds)[:2], i) for i, searcher in enumerate(stress.searchers)]
        _, worst = max(scored)
        figures = stress.searchers[worst].figures(policy, stress.seeds)
        lost = sum(f["failed"] for f in figures) / len(figures)
        throttled = sum(f["throttled_per_100"] for f in figures) / len(figures)
        return f"under '{stress.names[worst]}' it draws {throttled:.3g} throttles per 100 requests and loses {lost:.3g}"

    def _stress_rows(self, policies: Sequence[Policy]) -> tuple[StressRow, ...]:
        names = ("now", "guardrails", "recommended", "runner_up")
        self.stress.run(policies)
        rows = []
        for title, searcher in zip(self.stress.names, self.stress.searchers, strict=True):
            found = {
                name: forecast_of(policy, searcher.figures(policy, self.stress.seeds))
                for name, policy in zip(names, policies, strict=True)
            }
            rows.append(StressRow(title, found))
        return tuple(rows)

    def _heats(self, best: Policy) -> tuple[Heat, ...]:
        """Maps of stagger against concurrency and of headroom against stagger, around the recommendation."""
        ladders = full_space(self.scenario).ladders
        pairs = (("stagger_seconds", "max_concurrency"), ("stagger_seconds", "tpm_headroom"))
        return tuple(self._heat(best, x, y, ladders) for x, y in pairs)

    def _heat(self, best: Policy, x: str, y: str, ladders: Mapping[str, tuple[Any, ...]]) -> Heat:
        now, size = self.scenario.policy, self.budget.grid
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

    def _timelines(self, now: Policy, few: Policy, best: Policy) -> dict[str, list[Attempt]]:
        seed = self.scenario.seed + FRESH_SEEDS
        named = {"now": now, "guardrails": few, "recommended": best}
        return {name: attempts_of(self.scenario, seed, policy)[0] for name, policy in named.items()}

    def _limits(self) -> dict[str, float]:
        limits = {"max_throttled_per_100": self.goal.max_throttled_per_100, "max_lost": self.goal.max_lost}
        if self.goal.finish_by_s is not None:
            limits["finish_by_s"] = self.goal.finish_by_s
        return limits

    def _broken(self, found: Forecast) -> tuple[str, ...]:
        """The constraints that even the recommendation cannot keep, in words with the figures."""
        broken = []
        lost = found.lost / max(1, found.trials)
        if lost > self.goal.max_lost:
            broken.append(f"{found.lost:,} of {found.trials:,} requests are lost, allowed: {self.goal.max_lost:.3g}")
        throttled = found["throttled_per_100"].mean
        if throttled > self.goal.max_throttled_per_100:
            broken.append(f"{throttled:.2f} throttles per 100 requests, allowed: {self.goal.max_throttled_per_100:g}")
        wish = self.goal.finish_by_s
        if wish is not None and found["makespan_s"].p95 > wish:
            late = found["makespan_s"].p95
            broken.append(f"finishes after {late:,.0f} s in one run of 20, wanted: {wish:,.0f} s")
        return tuple(broken)


def _nearest(ladder: Sequence[float], value: float) -> float:
    return min(ladder, key=lambda rung: abs(rung - value))


def _spread(ladder: Sequence[Any], wanted: Sequence[Any], size: int) -> list[Any]:
    """About `size` rungs over the ladder, those `wanted` among them."""
    picked = np.unique(np.linspace(0, len(ladder) - 1, size).round().astype(int))
    return sorted({*(ladder[i] for i in picked), *wanted})


def plan(
    scenario: Scenario,
    goal: Goal | None = None,
    *,
    effort: str = "normal",
    pool: Pool | None = None,
    say: Say = lambda what: None,
) -> Plan:
    """The best settings for the scenario, with the evidence. `effort`: quick, normal or thorough.

    `say` is told what is going on, for a progress display. The same scenario, goal, effort and seed give the same plan
    on any machine and for any number of workers.
    """
    return Planner(scenario, goal or Goal(), effort=effort, pool=pool or Pool(), say=say).plan()

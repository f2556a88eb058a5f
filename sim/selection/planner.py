"""The search for better settings, and the evidence for them: what `paceline plan` does.

What lives here: the order of the work, from today's settings to two recommendations with their proof. How settings are
compared and tried stands in `search`, what protects them in `hardening`, the proof in `evidence`, how the result looks
in `report`.

The steps, the same for both recommendations (the eight guardrail knobs alone; everything the law can do):

1. Race anchors (today's settings, a fixed recipe, presets at several concurrencies), climb from the best.
2. Harden: among the best and their safer variants, prefer what keeps the limits under every condition of the stress
   set, listed or drawn, in which anything tried keeps them.
3. Drop every change that gains nothing and protects from nothing: a shorter list is easier to trust.
4. Estimate again on fresh seeds, which nothing was chosen by; only these figures are published. Replications go on
   until the paired differences to today's settings are sharp enough.

No oracle: a setting is a policy, and a policy sees what is known at submission; the hidden answers reach the search
only through the runs' outcomes.

Interrupted, a search leaves what it has found so far (`SoFar`), and with a journal it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from governor.model.policy import Policy
from governor.model.prices import Prices
from governor.model.requests import Attempt
from sim.base.words import duration
from sim.experiment.effects import Sensitivity
from sim.experiment.experiment import Pool, attempts_of
from sim.experiment.results import Forecast, Plan, SoFar
from sim.experiment.robustness import Drawn
from sim.experiment.runs import Condition, Runs, key_of
from sim.experiment.spread import WorkersLost
from sim.scenario.scenario import Scenario
from sim.scenario.stress import stress_set
from sim.scenario.unknowns import Unknowns, drawn
from sim.selection.evidence import NAMES, Evidence, drawn_outcomes, proved
from sim.selection.hardening import Hardening, Stress
from sim.selection.search import Goal, Searcher, better, score_of
from sim.selection.searchlog import SearchLog
from sim.selection.sensitivity import sensitivity
from sim.selection.space import (
    Space,
    changed_knobs,
    full_anchors,
    full_space,
    gap_s,
    guardrail_anchors,
    guardrail_space,
    safer_variants,
)
from sim.selection.tariff import tariff_of

# Simulated requests, by level of effort.
EFFORTS = {"quick": 600_000, "normal": 3_000_000, "thorough": 12_000_000}
# Large workloads get at least so many runs, whatever the effort.
LEAST_RUNS = 240
# Published figures come from seeds that the search has never seen, and so do the shown draws of the unknowns.
FRESH_SEEDS = 1_000_000
FRESH_DRAWS = 1_000
PRECISION = 0.01
# Today's settings are good enough if the best gains less than this share of the objective.
GOOD_ENOUGH = 0.01
# A change that shortens the objective under stress by this share, in the mean over the conditions, is kept.
HOLDS = 0.01

Say = Callable[[str], None]
OnPart = Callable[[str, Plan], None]
"""Told as soon as what a figure of the report shows is known: its name (see `drawing`), the plan as far as it goes."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or workers that were lost, in a search that had found something: `so_far`. `reason`: "" = Ctrl-C."""

    def __init__(self, so_far: SoFar, reason: str = "") -> None:
        super().__init__()
        self.so_far = so_far
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be spent on each part, in simulated requests and in runs, for a workload of n requests."""

    search: int
    hardening: int
    race: int
    seeds: int
    stress_seeds: int
    drawn: int
    variants: int
    steps: int
    final_first: int
    final_most: int
    grid: int
    draws: int
    trajectories: int

    @classmethod
    def of(cls, effort: int, n: int, listed: int) -> Budget:
        """Shares of the effort: a quarter for the two searches, half for hardening, the rest for the proof."""
        drawn = max(0, min(6, effort // (600 * n)))
        per_candidate = n * (listed + drawn)
        stress_seeds = max(1, min(3, effort // (90 * per_candidate)))
        return cls(
            search=effort // 8,
            hardening=effort // 3,
            race=max(1, min(40, effort // (90 * n))),
            seeds=max(1, min(6, effort // (300 * n))),
            stress_seeds=stress_seeds,
            drawn=drawn,
            variants=max(4, min(16, effort // (12 * per_candidate))),
            steps=4 if effort // (24 * per_candidate) >= 4 else 2,
            final_first=max(3, min(10, effort // (60 * n))),
            final_most=max(5, min(80, effort // (16 * n))),
            grid=max(3, min(7, int((effort / (24 * n)) ** 0.5))),
            draws=max(0, min(60, effort // (40 * n))),
            trajectories=max(0, min(40, effort // (100 * n))),
        )


class Planner:
    """One plan in the making. Make it, call `plan()` once."""

    def __init__(
        self,
        scenario: Scenario,
        goal: Goal,
        *,
        effort: str,
        pool: Pool,
        say: Say,
        unknowns: Unknowns,
        prices: Prices | None,
        log: SearchLog | None,
        on_part: OnPart = lambda name, plan: None,
    ) -> None:
        self.scenario = scenario
        self.on_part = on_part
        self.goal = goal
        self.unknowns = unknowns
        self.say = say
        self.stage = "beginning"
        self.best_s: float | None = None
        n = len(scenario.workload)
        listed = [Condition(name, changed) for name, changed in stress_set(scenario)]
        self.budget = Budget.of(max(EFFORTS[effort], LEAST_RUNS * n), n, len(listed))
        self.listed = range(len(listed))
        self.runs = Runs(pool, log=log, tariff=tariff_of(scenario, prices))
        conditions = [*listed, *drawn(scenario, unknowns, range(self.budget.drawn))]
        self.searcher = Searcher(Condition("", scenario), goal.allowing(1, n), self.runs, on_best=self._best)
        self.stress = Stress(conditions, goal.allowing(2, n), self.runs, self.budget.stress_seeds)
        self.gap_s = gap_s(scenario)

    def plan(self) -> Plan:
        """The whole search and its proof. Interrupted (a KeyboardInterrupt) holds what had been found."""
        try:
            return self._plan()
        except (KeyboardInterrupt, WorkersLost) as stop:
            so_far = self.so_far()
            if so_far is None:
                raise
            raise Interrupted(so_far, str(stop) if isinstance(stop, WorkersLost) else "") from None

    def _plan(self) -> Plan:
        now = self.scenario.policy
        self.searcher.run([now], self.budget.seeds)
        self._now("searching the eight guardrail knobs")
        few, bold_few = self._found("guardrails", guardrail_anchors(self.scenario), guardrail_space(self.scenario), [])
        self._now("searching everything that the law can do")
        everything = [*full_anchors(self.scenario), few[0]]
        best, bold = self._found("paceline", everything, full_space(self.scenario), few[:1])
        self._now("estimating again on fresh seeds")
        policies = [now, few[0], best[0], self._runner_up(best), bold_few, bold]
        fixed = self.scenario.replications
        forecasts = proved(
            self.searcher,
            policies,
            first=fixed or self.budget.final_first,
            most=fixed or self.budget.final_most,
            seed=self.scenario.seed + FRESH_SEEDS,
            precision_ratio=PRECISION,
        )
        goal = self.searcher.goal
        if better(score_of(forecasts[0].runs, goal), score_of(forecasts[1].runs, goal)):
            # No change that makes a run slower is recommended: today's settings stand in its place.
            forecasts = [forecasts[0], forecasts[0], *forecasts[2:]]
        return self._with_evidence(forecasts)

    def _with_evidence(self, forecasts: Sequence[Forecast]) -> Plan:
        """The plan around the chosen settings: NAMES, then the fastest of either space whatever they risk."""
        now, few, best, runner_up, bold_few, bold = forecasts
        chosen = [forecast.policy for forecast in forecasts[: len(NAMES)]]
        evidence = Evidence(self.searcher, self.stress, self.budget.seeds, self.listed)
        self._now("weighing each change")
        guardrails, full = evidence.recommendation(now, few, bold_few), evidence.recommendation(now, best, bold)
        kept = score_of(now.runs, self.goal)[:2] <= score_of(best.runs, self.goal)[:2]
        tariff = self.runs.tariff
        plan = Plan(
            objective=self.goal.objective,
            now=now,
            guardrails=guardrails,
            full=full,
            runner_up=runner_up,
            points=(),
            stress=(),
            heats=(),
            timelines={},
            limits=self._limits(),
            already_good=kept and full.gain_s.mean <= GOOD_ENOUGH * now[self.goal.figure].mean,
            broken=self._broken(best),
            settings_tried=0,
            runs_simulated=0,
            requests_simulated=0,
            seed=self.scenario.seed,
            answers_usd=tariff.answers_usd if tariff is not None else None,
        )
        plan = replace(plan, timelines=self._timelines(*chosen[:3]))
        self.on_part("over_time", plan)
        self.on_part("waits", plan)
        self._now("mapping the neighbourhood")
        plan = replace(plan, heats=evidence.heats(best.policy, self.budget.grid))
        self.on_part("heats", plan)
        self._now("drawing what is not known")
        plan = replace(plan, points=self.searcher.points(self.budget.seeds))
        self.on_part("front", plan)
        plan = replace(plan, stress=evidence.stress_rows(chosen, self.listed))
        self.on_part("stress", plan)
        plan = replace(plan, drawn=self._drawn(chosen))
        self.on_part("drawn", plan)
        plan = replace(plan, sensitivity=self._sensitivity(best.policy))
        self.on_part("sensitivity", plan)
        return replace(
            plan,
            settings_tried=len(self.searcher.policies),
            runs_simulated=self.runs.made,
            requests_simulated=self.runs.requests,
        )

    def _drawn(self, chosen: Sequence[Policy]) -> Drawn | None:
        if not self.budget.draws:
            return None
        draws = range(FRESH_DRAWS, FRESH_DRAWS + self.budget.draws)
        return drawn_outcomes(self.searcher, self.runs, self.unknowns, chosen, draws, 1)

    def _sensitivity(self, best: Policy) -> Sensitivity | None:
        if not self.budget.trajectories:
            return None
        self._now("asking which knob matters")
        return sensitivity(
            self.scenario, self.goal, base=best, size=self.budget.trajectories, near=True, runs=self.runs
        )

    # ------------------------------------------------------------ on the way

    def _now(self, stage: str) -> None:
        self.stage = stage
        self.say(stage if self.best_s is None else f"{stage}; best so far {duration(self.best_s)}")

    def _best(self, objective_s: float) -> None:
        self.best_s = objective_s
        self._now(self.stage)

    def so_far(self) -> SoFar | None:
        """What the search has found until now, from the runs that there are; None if nothing yet."""
        points = {key_of(point.policy): point for point in self.searcher.front()}
        today = self.scenario.policy
        now = points.get(key_of(today))
        if now is None:
            return None
        best = today if self.searcher.leader is None else self.searcher.leader[0]
        return SoFar(
            objective=self.goal.objective,
            now=now,
            best=points[key_of(best)],
            front=tuple(point for point in points.values() if point.on_front),
            settings_tried=len(self.searcher.policies),
            runs_simulated=self.runs.made,
            stage=self.stage,
        )

    # ------------------------------------------------------------ finding

    def _found(
        self, origin: str, anchors: list[Policy], space: Space, more: list[Policy]
    ) -> tuple[list[Policy], Policy]:
        """Recommendable settings of one space, best first, and the fastest one whatever it risks."""
        searcher, budget = self.searcher, self.budget
        searcher.origin = origin
        searcher.spend(budget.search)
        leaders, _ = searcher.race(anchors, budget.race)
        best = searcher.climb(leaders[0], space.neighbours, budget.race)
        self._now("hardening against the stress set")
        hardening = Hardening(
            searcher,
            self.stress,
            seeds=budget.seeds,
            most=budget.variants,
            steps=budget.steps,
            effort=budget.hardening,
        )
        # Today's settings first: what they keep under stress is possible, and so is asked of the others.
        yardsticks = [self.scenario.policy, *more]
        with self.stress.quick():
            hardening.require(yardsticks)
            for start in dict.fromkeys((best, *leaders[:2])):
                safe = hardening.walk(start, lambda policy: safer_variants(policy, space, self.gap_s))
                hardening.polish(safe, space.neighbours)
            # And from the other side: today's settings are safe as often as not, and step by step they get faster.
            hardening.polish(self.scenario.policy, space.neighbours)
        bold = min(hardening.tried.values(), key=lambda p: searcher.score(p, budget.seeds))
        ranked = hardening.ranked(yardsticks)
        return [self._pruned(ranked[0]), *ranked[1:]], bold

    def _pruned(self, policy: Policy) -> Policy:
        """The policy without the changes that neither gain anything nor protect from anything."""
        searcher, stress, seeds = self.searcher, self.stress, self.budget.seeds
        now = self.scenario.policy
        for name in changed_knobs(now, policy):
            simpler = policy.with_(**{name: getattr(now, name)})
            if better(searcher.score(policy, seeds), searcher.score(simpler, seeds)):
                continue
            if stress.violations(simpler) > stress.violations(policy):
                continue
            # What gains nothing as assumed may gain elsewhere: room for more in flight, if answers take longer.
            if stress.objective(policy) >= (1.0 - HOLDS) * stress.objective(simpler):
                policy = simpler
        return policy

    def _runner_up(self, ranked: list[Policy]) -> Policy:
        """The next best setting that differs from the recommendation in more than a nuance."""
        for policy in ranked[1:]:
            if len(changed_knobs(ranked[0], policy)) > 1:
                return policy
        return ranked[-1]

    # ------------------------------------------------------------ the rest of the plan

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


def plan(
    scenario: Scenario,
    goal: Goal | None = None,
    *,
    effort: str = "normal",
    pool: Pool | None = None,
    say: Say = lambda what: None,
    unknowns: Unknowns | None = None,
    prices: Prices | None = None,
    log: SearchLog | None = None,
    on_part: OnPart = lambda name, plan: None,
) -> Plan:
    """The best settings for the scenario, with the evidence. `effort`: quick, normal or thorough.

    `say` is told what is going on, for a progress display. `unknowns`: ranges of what is not known, the usual ones
    if not given. With `prices`, what settings pay beside the answers counts on the front. `log`: the journal of the
    search; Interrupted (a KeyboardInterrupt) holds what had been found. `on_part`: see OnPart.

    The same scenario, goal, effort and seed give the same plan on any machine, for any number of workers, and however
    often it was interrupted.
    """
    planner = Planner(
        scenario,
        goal or Goal(),
        effort=effort,
        pool=pool or Pool(),
        say=say,
        unknowns=unknowns or Unknowns(),
        prices=prices,
        log=log,
        on_part=on_part,
    )
    return planner.plan()

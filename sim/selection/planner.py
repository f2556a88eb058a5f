"""The search for better settings, and the evidence for them: what `paceline plan` does.

The steps, the same for both recommendations (the eight guardrail knobs alone; everything the law can do):

1. Race anchors (today's settings, a fixed recipe, presets at several concurrencies), climb from the best.
2. Harden: among the best and their safer variants, prefer what keeps the limits under every condition of the stress
   set, listed or drawn, in which anything tried keeps them.
3. Choose among the finalists, a plain mirrored window with them, on seeds of their own: those by which settings were
   found flatter them.
4. Drop every change that gains nothing and protects from nothing: a shorter list is easier to trust.
5. Estimate everything that is published on fresh seeds, which nothing was chosen by.

No oracle: a setting is a policy, and a policy sees what is known at submission; the hidden answers reach the search
only through the runs' outcomes. The search is bounded by simulated requests (`EFFORTS`) and by time (`LASTS_S`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from governor.model.policy import KNOB_BY_NAME, Policy
from governor.model.prices import Prices
from governor.model.requests import Attempt
from sim.base.words import duration
from sim.experiment.effects import Sensitivity
from sim.experiment.experiment import Pool, attempts_of
from sim.experiment.parallel import WorkersLost
from sim.experiment.results import Plan
from sim.experiment.runs import Runs, key_of, tariff_of
from sim.scenario.scenario import Scenario
from sim.scenario.stress import Condition, stress_set
from sim.scenario.unknowns import FRESH_DRAWS, FRESH_SEEDS, Unknowns, drawn
from sim.selection.evidence import NAMES, Evidence, broken_limits
from sim.selection.hardening import Hardening, Stress
from sim.selection.information import Costs, Information
from sim.selection.search import FIRST_STAGE, Goal, Searcher, better, score_of
from sim.selection.sensitivity import sensitivity
from sim.selection.space import (
    Space,
    changed_knobs,
    full_anchors,
    full_space,
    gap_s,
    guardrail_anchors,
    guardrail_space,
    plain_mirror,
    safer_variants,
)

# Simulated requests, by level of effort; the proof has its own.
EFFORTS = {"quick": 600_000, "normal": 3_000_000, "thorough": 12_000_000}
# Large workloads get at least so many runs, whatever the effort.
LEAST_RUNS = 240
# A search may go beyond its effort to finish what it compares, and the proof has runs of its own: see `most_requests`.
SEARCH_RATIO, PROOF_RUNS = 3, 6_000
# No new settings are tried after so many seconds, by level of effort.
LASTS_S = {"quick": 120.0, "normal": 600.0, "thorough": 3_600.0}
# Simulated requests of each of the published policies, and of each over the drawn conditions: what bounds the number of
# runs from above. A percentile needs about 100 of them.
PROOF, RUNS, _LEAST = 10_000_000, 100, 10
# Finalists are told apart on seeds that the search has not seen; what is published comes from still others.
CONFIRM_SEEDS = 500_000
# Published means: half the 95 % interval, as a share of the mean.
PRECISION = 0.01
# Today's settings are good enough if the best gains less than this share of the objective.
GOOD_ENOUGH = 0.01
# A change that shortens the objective under stress by this share, in the mean over the conditions, is kept.
HOLDS = 0.01
# Throttles in a run that are allowed under stress, where the stated limit per 100 requests comes to less: what one or
# two refusals in a small batch are worth is nothing to be slower for.
STRESSED = 2
_FINALISTS = 5

_Say = Callable[[str], None]


def most_requests(effort: str, n: int) -> int:
    """Return the simulated requests that a plan of `n` requests never exceeds, proof and all."""
    return SEARCH_RATIO * max(EFFORTS[effort], LEAST_RUNS * n) + PROOF_RUNS * n


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or workers that were lost, in a search that had found something: `so_far`. `reason`: "" = Ctrl-C."""

    def __init__(self, so_far: str, reason: str = "") -> None:
        super().__init__()
        self.so_far = so_far
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Budget:
    """The budget of each part, for a workload of n requests: in simulated requests, runs and draws."""

    search: int
    hardening: int
    race: int
    seeds: int
    drawn: int
    variants: int
    steps: int
    own: int
    confirm: int
    fresh: int
    pairs: int
    stress: int
    grid: int
    information: int
    trajectories: int

    @classmethod
    def of(cls, effort: int, n: int, listed: int) -> Budget:
        """Half of the effort for the two searches, two thirds for hardening; the proof by `PROOF` alone."""
        runs = effort // n
        drawn = max(0, min(6, runs // 600))
        return cls(
            search=effort // 4,
            hardening=effort // 3,
            race=max(1, min(40, runs // 90)),
            seeds=max(1, min(6, runs // 300)),
            drawn=drawn,
            variants=max(4, min(16, runs // (12 * (listed + drawn)))),
            steps=4 if runs // (24 * (listed + drawn)) >= 4 else 2,
            own=max(1, min(RUNS, runs // 70)),
            confirm=max(1, min(6, runs // 1_000)),
            fresh=max(_LEAST, min(RUNS, PROOF // n)),
            pairs=min(2 * RUNS, runs // 30),
            stress=max(1, min(20, runs // 400)),
            grid=max(3, min(7, int((runs / 24) ** 0.5))),
            information=max(75, min(480, runs // 15)),
            trajectories=max(0, min(40, runs // 100)),
        )


def requests_foreseen(scenario: Scenario, effort: str) -> float:
    """About how many simulated requests a plan will take."""
    return float(max(EFFORTS[effort], LEAST_RUNS * len(scenario.workload)))


class Planner:
    """One plan in the making. Make it, call `plan()` once."""

    def __init__(
        self,
        scenario: Scenario,
        goal: Goal,
        *,
        effort: str,
        pool: Pool,
        say: _Say,
        unknowns: Unknowns,
        prices: Prices | None,
    ) -> None:
        self.scenario = scenario
        self.goal = goal
        self.unknowns = unknowns
        self.prices = prices
        self.say = say
        self.stage = "beginning"
        self.best_s: float | None = None
        n = len(scenario.workload)
        listed = [Condition(name, changed) for name, changed in stress_set(scenario)]
        self.budget = budget = Budget.of(max(EFFORTS[effort], LEAST_RUNS * n), n, len(listed))
        self.runs = Runs(pool, tariff=tariff_of(scenario, prices), ends_at=time.monotonic() + LASTS_S[effort])
        conditions = [*listed, *drawn(scenario, unknowns, range(budget.drawn))]
        here = Condition("", scenario)
        self.searcher = Searcher(here, goal.allowing(1, n), self.runs, on_best=self._best)
        hard = goal.allowing(STRESSED, n)
        self.stress = Stress(conditions, hard, self.runs, 1)
        again = Stress(conditions, hard, self.runs, budget.confirm, CONFIRM_SEEDS)
        self.confirming = self._hardening(Searcher(here, goal, self.runs, first=CONFIRM_SEEDS), again, budget.own)
        fresh = Stress(listed, hard, self.runs, budget.stress, FRESH_SEEDS)
        seeds = max(1, min(20, (scenario.replications or budget.fresh) // 5))
        self.evidence = Evidence(Searcher(here, goal, self.runs, first=FRESH_SEEDS), fresh, seeds, budget.pairs)
        self.plain = plain_mirror(scenario)
        self.gap_s = gap_s(scenario)

    def plan(self) -> Plan:
        """Search, prove the result, and return the plan. A KeyboardInterrupt says what had been found."""
        try:
            return self._plan()
        except (KeyboardInterrupt, WorkersLost) as stop:
            so_far = self.so_far()
            if not so_far:
                raise
            raise Interrupted(so_far, str(stop) if isinstance(stop, WorkersLost) else "") from None

    def _plan(self) -> Plan:
        now = self.scenario.policy
        self.searcher.run([now], self.budget.seeds)
        self._now("searching the eight guardrail knobs")
        few, bold_few = self._found("guardrails", guardrail_anchors(self.scenario), guardrail_space(self.scenario), [])
        self._now("searching everything that the law can do")
        everything = [*full_anchors(self.scenario), self.plain, few[0]]
        best, bold = self._found("paceline", everything, full_space(self.scenario), [few[0], self.plain])
        out_of_time = self.runs.out_of_time
        self._now("estimating again on fresh seeds")
        for other in (bold, self.plain):
            if self._is_better(other, best[0]):
                best = [other, *(policy for policy in best if policy != other)]
        found = self._with_evidence([now, few[0], best[0], self._runner_up(best)], bold_few, bold)
        return replace(found, out_of_time=out_of_time)

    def _is_better(self, other: Policy, best: Policy) -> bool:
        """Return whether another setting is faster as assumed and no condition forbids it."""
        return self.evidence.is_ahead(best, other) and not self.evidence.forbids(other, best)

    def _with_evidence(self, chosen: list[Policy], bold_few: Policy, bold: Policy) -> Plan:
        """Return the plan around the chosen settings, in the order of NAMES, and each space's fastest at any risk."""
        evidence, budget, goal = self.evidence, self.budget, self.goal
        fixed = self.scenario.replications
        most = fixed or (4 * RUNS if budget.fresh == RUNS else budget.fresh)
        forecasts = evidence.proved(chosen[:3], first=fixed or budget.fresh, most=most, precision_ratio=PRECISION)
        if better(score_of(forecasts[0].runs, goal), score_of(forecasts[1].runs, goal)):
            # No change that makes a run slower is recommended: today's settings stand in its place.
            forecasts[1], chosen[1] = forecasts[0], chosen[0]
        now, few, best = forecasts
        runner_up = evidence.forecast(chosen[3])
        self._now("weighing each change")
        guardrails = evidence.recommendation(now, few, {"the fastest combination of these settings": bold_few})
        plain = {} if key_of(self.plain) == key_of(best.policy) else {"a plain mirrored window": self.plain}
        fastest = {} if key_of(bold) == key_of(self.plain) else {"the fastest setting tried": bold}
        full = evidence.recommendation(now, best, plain | fastest)
        kept = score_of(now.runs, goal)[:2] <= score_of(best.runs, goal)[:2]
        tariff = self.runs.tariff
        plan = Plan(
            objective=goal.objective,
            now=now,
            guardrails=guardrails,
            full=full,
            runner_up=runner_up,
            points=(),
            stress=(),
            heats=(),
            timelines={},
            limits=self._limits(),
            already_good=kept and full.gain_s.mean <= GOOD_ENOUGH * now[goal.figure].mean,
            broken=(),
            settings_tried=0,
            runs_simulated=0,
            requests_simulated=0,
            seed=self.scenario.seed,
            answers_usd=tariff.answers_usd if tariff is not None else None,
        )
        plan = replace(plan, timelines=self._timelines(*chosen[:3]))
        self._now("mapping the neighbourhood")
        plan = replace(plan, heats=evidence.heats(best.policy, budget.grid))
        plan = replace(plan, points=self.searcher.points(budget.seeds))
        self._now("putting the settings under stress")
        stress = evidence.stress_rows(chosen)
        named = dict(zip(NAMES, (*forecasts, runner_up), strict=True))
        plan = replace(plan, stress=stress, broken=broken_limits(goal, self.stress.goal, named, stress))
        self._now("drawing what is not known")
        fresh = drawn(self.scenario, self.unknowns, range(FRESH_DRAWS, FRESH_DRAWS + budget.fresh))
        plan = replace(plan, drawn=evidence.drawn(self.unknowns.text(), chosen[:3], fresh))
        self._now("asking what is worth finding out")
        information = Information(evidence, self.hardened, best.policy, fresh=fresh, most=budget.information)
        costs = Costs(self.scenario, best["makespan_s"].p50, tariff, self.prices)
        plan = replace(plan, find_out=information.findings(self.unknowns, costs))
        plan = replace(plan, sensitivity=self._sensitivity(best.policy))
        return replace(
            plan,
            settings_tried=len(self.searcher.policies),
            runs_simulated=self.runs.made,
            requests_simulated=self.runs.requests,
        )

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

    def so_far(self) -> str:
        """Return what the search has found so far, in one line with its settings; "" if nothing."""
        now = self.scenario.policy
        points = {key_of(point.policy): point for point in self.searcher.front()}
        if self.searcher.leader is None or key_of(now) not in points:
            return ""
        best = self.searcher.leader[0]
        changes = changed_knobs(now, best)
        return (
            f"interrupted while {self.stage}, after {self.runs.made:,} runs: best so far "
            f"{duration(points[key_of(best)].objective_s)} (now {duration(points[key_of(now)].objective_s)}), not yet "
            f"proved: {' '.join(_assignment(name, best) for name in changes) or 'no change'}"
        )

    # ------------------------------------------------------------ finding

    def _hardening(self, searcher: Searcher, stress: Stress, seeds: int) -> Hardening:
        budget = self.budget
        return Hardening(
            searcher, stress, seeds=seeds, most=budget.variants, steps=budget.steps, effort=budget.hardening
        )

    def _found(
        self, origin: str, anchors: list[Policy], space: Space, yardsticks: list[Policy]
    ) -> tuple[list[Policy], Policy]:
        """Recommendable settings of one space, best first, and the fastest one whatever it risks."""
        searcher, budget, today = self.searcher, self.budget, self.scenario.policy
        searcher.origin = origin
        searcher.spend(budget.search)
        leaders, _ = searcher.race(anchors, budget.race)
        best = searcher.climb(leaders[0], space.neighbours, min(FIRST_STAGE, budget.race))
        self._now("hardening against the stress set")
        hardening = self._hardening(searcher, self.stress, budget.seeds)
        # Today's settings first: what they keep under stress is possible, and so is asked of the others.
        hardening.require([today, *yardsticks])
        for start in dict.fromkeys((best, *leaders[:2])):
            safe = hardening.walk(start, lambda policy: safer_variants(policy, space, self.gap_s))
            hardening.polish(safe, space.neighbours)
        # And from the other side: today's settings are safe as often as not, and step by step they get faster.
        hardening.polish(today, space.neighbours)
        self.hardened = hardening
        bold = min(hardening.tried.values(), key=lambda p: searcher.score(p, budget.seeds))
        finalists = hardening.finalists(_FINALISTS)
        self._now("choosing among the finalists")
        field = [*finalists, today, *yardsticks]
        best, *others = self._chosen(field, never_slower=origin == "guardrails")
        return [self._pruned(best), *others], bold

    def _chosen(self, field: Sequence[Policy], *, never_slower: bool) -> list[Policy]:
        """Return the field, best first, judged on seeds that it was not found by.

        `never_slower`: nothing that is slower than today's settings, where those keep the limits as assumed: who cannot
        change any code gains nothing by a recommendation to wait.
        """
        judge, today = self.confirming, self.scenario.policy
        field = list({key_of(policy): policy for policy in field}.values())
        judge.require(field)
        own = {key_of(policy): judge.searcher.score(policy, judge.seeds) for policy in field}
        now = own[key_of(today)]
        if never_slower and now[:2] == (0.0, 0.0):
            field = [policy for policy in field if not better(now, own[key_of(policy)], GOOD_ENOUGH)]
        return judge.chosen(field)

    def _pruned(self, policy: Policy) -> Policy:
        """Return the policy without the changes that neither gain anything nor protect from anything."""
        judge, now = self.confirming, self.scenario.policy
        for name in changed_knobs(now, policy):
            simpler = policy.with_(**{name: getattr(now, name)})
            judge.require([simpler])
            if judge.beats(policy, simpler):
                continue
            # What gains nothing as assumed may gain elsewhere: room for more in flight, if answers take longer.
            if judge.stress.objective(policy) >= (1.0 - HOLDS) * judge.stress.objective(simpler):
                policy = simpler
        return policy

    def _runner_up(self, ranked: list[Policy]) -> Policy:
        """Return the next best setting that differs from the recommendation in more than a nuance."""
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
        limits = {
            "max_throttled_per_100": self.goal.max_throttled_per_100,
            "max_throttled_per_100_under_stress": self.stress.goal.max_throttled_per_100,
            "max_lost": self.goal.max_lost,
        }
        if self.goal.finish_by_s is not None:
            limits["finish_by_s"] = self.goal.finish_by_s
        return limits


def _assignment(name: str, policy: Policy) -> str:
    knob = KNOB_BY_NAME[name]
    return f"{knob.env}={knob.text(getattr(policy, name))}"


def plan(
    scenario: Scenario,
    goal: Goal | None = None,
    *,
    effort: str = "normal",
    pool: Pool | None = None,
    say: _Say = lambda what: None,
    unknowns: Unknowns | None = None,
    prices: Prices | None = None,
) -> Plan:
    """Return the best settings for the scenario, with the evidence. `effort`: quick, normal or thorough.

    `say` is told what is going on, for a progress display. `unknowns`: ranges of what is not known, the usual ones
    if not given. With `prices`, what settings pay beyond the answers counts on the front. Interrupted (a
    KeyboardInterrupt) says what had been found.

    The same scenario, goal, effort and seed give the same plan on any machine, for any number of workers, as long as
    the limit of time (`LASTS_S`) does not end the search (`out_of_time`).
    """
    planner = Planner(
        scenario,
        goal or Goal(),
        effort=effort,
        pool=pool or Pool(),
        say=say,
        unknowns=unknowns or Unknowns(),
        prices=prices,
    )
    return planner.plan()

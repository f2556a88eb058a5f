"""Searching settings: a ladder of values per knob, a race under common random numbers, and a climb over neighbours.

What lives here: how settings are compared and which are tried next. What must not: what a plan shows (`plan`), how runs
are made (`experiment`), and any rule of the law.

Theory of operation. Settings are compared lexicographically: first what must hold (requests lost, throttles per 100),
then the objective. `race` gives every contestant one seed, drops the clearly worse, and doubles the seeds of those that
are left: differences are paired, seed by seed, so that little is needed to tell them apart. `climb` races an incumbent
against its neighbours until none is better by more than the indifference zone. `harden` does the same with the stress
set's violations before the objective. Effort is counted in simulated requests, not in seconds, so that the same seed
finds the same settings on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from governor.policy import KNOB_BY_NAME, Policy
from sim.experiment import Case, Pool, case_of
from sim.results import Figures, Point
from sim.scenario import Scenario

# Objectives closer than this share of one another are equal: the safer or simpler setting is taken.
INDIFFERENCE = 0.003
# In a race's first round, and later ones, a contestant that is so much worse than the leader is dropped.
DROP_FIRST = 0.25
DROP_LATER = 0.05

# Excess throttles per 100, summed over the conditions, that a handful of runs cannot tell from none.
THROTTLE_NOISE = 0.25
# Variants of one step that are put under the whole of the stress set.
FINALISTS = 4

CONCURRENCY = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800, 1200, 2000)
STAGGER = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 15.0, 20.0, 30.0)
HEADROOM = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.15, 0.2, 0.3)
ATTEMPTS = (3, 5, 8, 12)
BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0)
CHARGE_RULES = ("prompt_chars4", "auto", "responses", "max_of", "prompt_plus_max")
FLAGS = ("sync_headers", "hold_on_throttle", "backoff_keeps_permit", "settle")


@dataclass(frozen=True, slots=True)
class Goal:
    """What a plan is for. `objective`: makespan or p95_latency. `max_lost`: probability that a request is lost.

    `finish_by_s`: wanted end, seconds from the run's beginning; None = no wish.
    """

    objective: str = "makespan"
    max_throttled_per_100: float = 1.0
    max_lost: float = 0.0
    finish_by_s: float | None = None

    @property
    def figure(self) -> str:
        """The objective's name among the figures."""
        return {"makespan": "makespan_s", "p95_latency": "latency_p95_s"}[self.objective]

    def allowing(self, throttles: int, requests: int) -> Goal:
        """The same goal, but never stricter than so many throttles in a run of `requests`: a rate says little there."""
        return replace(self, max_throttled_per_100=max(self.max_throttled_per_100, 100.0 * throttles / requests))


Score = tuple[float, float, float]
"""Loss above what is allowed, throttles above what is allowed, objective: smaller is better, in this order."""


def score_of(runs: Sequence[Figures], goal: Goal) -> Score:
    """The score of a setting from its runs, at least one. A run that answers nothing has an infinite objective."""
    requests = sum(run.requests for run in runs)
    lost = sum(run["failed"] for run in runs) / requests
    throttled = sum(run["throttled_per_100"] for run in runs) / len(runs)
    objective = sum(run[goal.figure] for run in runs) / len(runs)
    if math.isnan(objective):
        objective = math.inf
    return max(0.0, lost - goal.max_lost), max(0.0, throttled - goal.max_throttled_per_100), objective


def better(a: Score, b: Score, indifference: float = INDIFFERENCE) -> bool:
    """Whether `a` beats `b` by more than the indifference zone."""
    if a[:2] != b[:2]:
        return a[:2] < b[:2]
    return a[2] < b[2] * (1.0 - indifference)


def key_of(policy: Policy) -> tuple[Any, ...]:
    """What makes two policies the same, whichever knobs were named."""
    return tuple(policy.model_dump().values())


class Searcher:
    """Settings tried on one scenario, with all their runs: nothing is run twice. Effort is in simulated requests."""

    def __init__(self, scenario: Scenario, goal: Goal, pool: Pool, effort: int) -> None:
        self.scenario = scenario
        self.goal = goal
        self.pool = pool
        self.effort = effort
        self.start = pool.requests
        self.runs: dict[tuple[Any, ...], dict[int, Figures]] = {}
        self.policies: dict[tuple[Any, ...], Policy] = {}
        self.origins: dict[tuple[Any, ...], str] = {}
        self.origin = "now"
        # The candidate that needs fewest runs to be told from the rest is met first: see `race`.
        self.seeds = range(scenario.seed, scenario.seed + 64)

    @property
    def exhausted(self) -> bool:
        """Whether the effort is used up."""
        return self.pool.requests - self.start >= self.effort

    def run(self, policies: Iterable[Policy], seeds: int) -> None:
        """Makes sure that each policy has run under the first `seeds` seeds."""
        tasks: list[tuple[Case, list[int]]] = []
        waiting: list[tuple[Any, ...]] = []
        for policy in policies:
            key = key_of(policy)
            if key not in self.runs:
                self.runs[key] = {}
                self.policies[key] = policy
                self.origins[key] = self.origin
            missing = [seed for seed in self.seeds[:seeds] if seed not in self.runs[key]]
            if missing and key not in waiting:
                tasks.append((case_of(self.scenario, policy), missing))
                waiting.append(key)
        for key, figures in zip(waiting, self.pool.run(tasks), strict=True):
            self.runs[key].update((f.seed, f) for f in figures)

    def figures(self, policy: Policy, seeds: int) -> list[Figures]:
        """The policy's runs under the first `seeds` seeds, made now if they are missing."""
        self.run([policy], seeds)
        mine = self.runs[key_of(policy)]
        return [mine[seed] for seed in self.seeds[:seeds]]

    def score(self, policy: Policy, seeds: int) -> Score:
        """The policy's score over the first `seeds` seeds."""
        return score_of(self.figures(policy, seeds), self.goal)

    def race(self, policies: Sequence[Policy], keep: int, rounds: Sequence[int] = (1, 2, 4)) -> list[Policy]:
        """The best `keep` of the policies, best first. Those clearly worse are dropped after each round of seeds."""
        alive = list({key_of(policy): policy for policy in policies}.values())
        for i, seeds in enumerate(rounds):
            self.run(alive, seeds)
            alive.sort(key=lambda policy: self.score(policy, seeds))
            if len(alive) > keep and seeds < rounds[-1]:
                alive = self._survivors(alive, keep, seeds, DROP_FIRST if i == 0 else DROP_LATER)
        return alive[:keep]

    def _survivors(self, ranked: list[Policy], keep: int, seeds: int, margin: float) -> list[Policy]:
        """The leaders: at most half of the field, without those that are clearly worse than the best."""
        most = max(keep, math.ceil(len(ranked) / 2))
        best = self.score(ranked[0], seeds)
        near = [p for p in ranked[:most] if not self._clearly_worse(p, best, seeds, margin)]
        return near if len(near) >= keep else ranked[:keep]

    def _clearly_worse(self, policy: Policy, best: Score, seeds: int, margin: float) -> bool:
        mine = self.score(policy, seeds)
        return mine[0] > best[0] or mine[1] > best[1] + 1.0 or mine[2] > best[2] * (1.0 + margin)

    def climb(self, start: Policy, neighbours: Callable[[Policy], list[Policy]], seeds: int) -> Policy:
        """From `start` to a setting that none of its neighbours beats, or to the end of the effort."""
        best = start
        while not self.exhausted:
            found = self.race(neighbours(best), 1, [*(n for n in (1, 2, 4, 8) if n < seeds), seeds])
            if not found or not better(self.score(found[0], seeds), self.score(best, seeds)):
                return best
            best = found[0]
        return best

    def points(self, seeds: int) -> tuple[Point, ...]:
        """Everything that was tried, with the front of objective against throttles among what loses least.

        Who seems to stand on the front after few runs has often just been lucky: such points are run under `seeds`
        seeds first, until nobody new appears there.
        """
        while True:
            points = self._points()
            hasty = [point.policy for point in points if point.on_front and point.replications < seeds]
            if not hasty:
                return points
            self.run(hasty, seeds)

    def _points(self) -> tuple[Point, ...]:
        rows = []
        for key, runs in self.runs.items():
            figures = list(runs.values())
            lost = sum(run["failed"] for run in figures) / len(figures)
            throttled = sum(run["throttled_per_100"] for run in figures) / len(figures)
            rows.append((lost, throttled, score_of(figures, self.goal)[2], -len(figures), key))
        rows.sort(key=lambda row: row[:4])
        points, fastest = [], math.inf
        for lost, throttled, objective, runs_made, key in rows:
            on_front = lost <= rows[0][0] and objective < fastest
            if on_front:
                fastest = objective
            points.append(
                Point(self.policies[key], self.origins[key], objective, throttled, lost, -runs_made, on_front)
            )
        return tuple(points)


# ---------------------------------------------------------------- the space


@dataclass(frozen=True, slots=True)
class Space:
    """The values that each knob may take, in order. Knobs that are missing stay as they are."""

    ladders: Mapping[str, tuple[Any, ...]]

    def neighbours(self, policy: Policy, reach: Sequence[int] = (-1, 1)) -> list[Policy]:
        """Policies that differ in one knob, `reach` rungs away; switches and rules in every other value."""
        found = []
        for name, ladder in self.ladders.items():
            value = getattr(policy, name)
            if isinstance(value, str | bool):
                found += [policy.with_(**{name: other}) for other in ladder if other != value]
            elif name != "est_tokens_per_run" or policy.charge_rule == "fixed":
                at = int(np.searchsorted(ladder, value))
                exact = at < len(ladder) and ladder[at] == value
                for step in reach:
                    rung = at + step if exact or step < 0 else at + step - 1
                    if 0 <= rung < len(ladder):
                        found.append(policy.with_(**{name: ladder[rung]}))
        return found


def _ladder(values: Iterable[float], kind: type, most: float = math.inf) -> tuple[Any, ...]:
    return tuple(sorted({kind(value) for value in values if value <= most}))


def gap_s(scenario: Scenario) -> float:
    """The mean time between launches that the provider's limits allow in the long run, seconds; 0 = no limit."""
    provider = scenario.provider
    charge = scenario.columns(scenario.policy).charge
    by_tokens = 60.0 * float(charge.mean()) / provider.tpm if provider.tpm else 0.0
    by_requests = 60.0 / provider.rpm if provider.rpm else 0.0
    return max(by_tokens, by_requests)


def guardrail_space(scenario: Scenario) -> Space:
    """The knobs of a deployment that cannot change its code; the TPM limit follows the provider and stays."""
    now, n = scenario.policy, len(scenario.workload)
    charge = scenario.columns(now).charge
    quantiles = [float(q) for q in np.quantile(charge, (0.5, 0.75, 0.9, 0.95, 0.99, 1.0))] + [float(charge.mean())]
    estimates = [50.0 * math.ceil(q / 50.0) for q in quantiles] + [now.est_tokens_per_run]
    gap = gap_s(scenario)
    return Space(
        {
            "stagger_seconds": _ladder(
                [*STAGGER, now.stagger_seconds, *(_rounded(gap * f) for f in (0.5, 0.8, 1.0, 1.2))], float
            ),
            "max_concurrency": _ladder([*CONCURRENCY, now.max_concurrency], int, max(n, now.max_concurrency)),
            "tpm_headroom": _ladder([*HEADROOM, now.tpm_headroom], float),
            "est_tokens_per_run": _ladder(estimates, int),
            "retry_max_attempts": _ladder([*ATTEMPTS, now.retry_max_attempts], int),
            "backoff_base_seconds": _ladder([*BACKOFF, now.backoff_base_seconds], float),
        }
    )


def full_space(scenario: Scenario) -> Space:
    """Everything that the law can do."""
    ladders = dict(guardrail_space(scenario).ladders)
    ladders["tpm_window"] = ("fixed", "sliding", "bucket")
    ladders["charge_rule"] = ("fixed", *CHARGE_RULES)
    ladders["launch_order"] = ("fifo", "longest_first")
    for flag in FLAGS:
        ladders[flag] = (False, True)
    return Space(ladders)


def _rounded(value: float) -> float:
    """Two significant digits: a setting that a person would write."""
    if value <= 0.0:
        return 0.0
    digits = 1 - math.floor(math.log10(value))
    return round(value, digits)


def guardrail_anchors(scenario: Scenario) -> list[Policy]:
    """Where the search over the eight knobs begins: today's settings, and reservations near the real charge."""
    now = scenario.policy
    space = guardrail_space(scenario).ladders
    gap = _rounded(gap_s(scenario))
    most = space["max_concurrency"][-1]
    anchors = [now]
    for est in space["est_tokens_per_run"]:
        for concurrency in (min(20, most), min(200, most)):
            for stagger in {0.0, gap, now.stagger_seconds}:
                anchors.append(
                    now.with_(
                        est_tokens_per_run=est, max_concurrency=concurrency, stagger_seconds=stagger, tpm_headroom=0.05
                    )
                )
    return anchors


def recipe(scenario: Scenario) -> Policy:
    """A fixed recipe without any search: the provider's bucket mirrored, 1 % headroom, first in first out."""
    provider = scenario.provider
    return scenario.policy.with_(
        tpm_window="bucket",
        charge_rule=provider.charge_rule,
        tpm_headroom=0.01,
        stagger_seconds=0.0,
        max_concurrency=1_000,
        launch_order="fifo",
        backoff_keeps_permit=False,
    )


def full_anchors(scenario: Scenario) -> list[Policy]:
    """Where the search over everything begins: the recipe, and the presets' switches at several concurrencies."""
    base = recipe(scenario)
    n = len(scenario.workload)
    rules = dict.fromkeys((scenario.provider.charge_rule, "max_of", "prompt_plus_max"))
    anchors = [scenario.policy, base]
    for rule in rules:
        for concurrency in sorted({min(c, max(1, n)) for c in (20, 80, 300, 1200)}):
            for order in ("fifo", "longest_first"):
                for sync in (False, True):
                    anchors.append(
                        base.with_(
                            charge_rule=rule,
                            max_concurrency=concurrency,
                            launch_order=order,
                            sync_headers=sync,
                            hold_on_throttle=sync,
                            settle=scenario.provider.settles,
                        )
                    )
    return anchors


# ---------------------------------------------------------------- robustness


class Stress:
    """How settings fare under each condition of a stress set, and what is possible there at all."""

    def __init__(self, rows: Sequence[tuple[str, Scenario]], goal: Goal, pool: Pool, seeds: int) -> None:
        self.names = [name for name, _ in rows]
        self.searchers = [Searcher(scenario, goal, pool, 1 << 62) for _, scenario in rows]
        self.seeds = seeds
        # The least loss and the least excess of throttles (without loss) that anything tried has reached, by row.
        self.least: list[tuple[float, float]] = [(math.inf, math.inf)] * len(rows)

    def run(self, policies: Sequence[Policy], rows: Sequence[int] | None = None) -> None:
        """Runs the policies under every condition (or those of `rows`), all in one go."""
        picked = range(len(self.names)) if rows is None else rows
        tasks = []
        for i in picked:
            searcher = self.searchers[i]
            for policy in policies:
                key = key_of(policy)
                searcher.policies.setdefault(key, policy)
                missing = [s for s in searcher.seeds[: self.seeds] if s not in searcher.runs.setdefault(key, {})]
                if missing:
                    tasks.append((searcher, key, missing))
        if tasks:
            pool = self.searchers[0].pool
            found = pool.run([(case_of(s.scenario, s.policies[key]), seeds) for s, key, seeds in tasks])
            for (searcher, key, _), figures in zip(tasks, found, strict=True):
                searcher.runs[key].update((f.seed, f) for f in figures)
        for i in picked:
            for policy in policies:
                self.least[i] = min(self.least[i], self.searchers[i].score(policy, self.seeds)[:2])

    def excess(self, policy: Policy, row: int) -> tuple[float, float]:
        """Loss and throttles beyond the limits under one condition, as far as something that was tried does better."""
        mine, least = self.searchers[row].score(policy, self.seeds), self.least[row]
        return max(0.0, mine[0] - least[0]), max(0.0, mine[1] - (least[1] if mine[0] <= least[0] else 0.0))

    def violations(self, policy: Policy, rows: Sequence[int] | None = None) -> tuple[float, float]:
        """The sums of `excess` over all conditions, or those of `rows`."""
        picked = range(len(self.names)) if rows is None else rows
        found = [self.excess(policy, row) for row in picked]
        return sum(lost for lost, _ in found), sum(throttled for _, throttled in found)

    def violated(self, policy: Policy) -> list[int]:
        """The conditions under which the policy goes beyond the limits."""
        return [row for row in range(len(self.names)) if self.excess(policy, row) > (0.0, 0.0)]


class Hardening:
    """Settings that must keep the limits under stress wherever anything tried does, ranked by that, then by the score.

    `seeds`: runs in the scenario itself. `most`: variants tried at a time. `steps`: how often the walk goes on.
    `effort`: simulated requests that may be spent.
    """

    def __init__(self, searcher: Searcher, stress: Stress, *, seeds: int, most: int, steps: int, effort: int) -> None:
        self.searcher = searcher
        self.stress = stress
        self.seeds = seeds
        self.most = most
        self.steps = steps
        self.spend_until = searcher.pool.requests + effort
        self.cost = len(searcher.scenario.workload) * (len(stress.names) * stress.seeds + seeds)
        self.tried: dict[tuple[Any, ...], Policy] = {}

    @property
    def affordable(self) -> int:
        """How many policies can still be put under stress."""
        return max(0, (self.spend_until - self.searcher.pool.requests) // self.cost)

    def rank(self, policy: Policy) -> tuple[float, Score]:
        """Smaller is better: losses under stress, then the score in the scenario itself, its objective at a price.

        The price: as many times the objective again as there are throttles per 100 beyond what is possible, summed
        over the conditions. So the limits are kept wherever that costs less than it is worth: half a throttle per 100
        under one condition is avoided for up to 1.5 times the time, but not for ten times.
        """
        lost, throttled = self.stress.violations(policy)
        own = self.searcher.score(policy, self.seeds)
        price = 1.0 + throttled if throttled > THROTTLE_NOISE else 1.0
        return round(lost, 9), (own[0], own[1], own[2] * price)

    def keeps(self, policy: Policy) -> bool:
        """Whether the policy stays within the limits under every condition, as far as anything tried does."""
        lost, throttled = self.stress.violations(policy)
        return lost <= 0.0 and throttled <= THROTTLE_NOISE

    def admit(self, policies: Sequence[Policy]) -> list[Policy]:
        """Runs policies under stress: those that are new, at most `most` of them and no more than the effort allows."""
        fresh = [p for p in {key_of(p): p for p in policies}.values() if key_of(p) not in self.tried]
        fresh = fresh[: min(self.most, self.affordable)]
        self.require(fresh)
        return fresh

    def require(self, policies: Sequence[Policy]) -> None:
        """Runs policies under stress, whatever it costs: the ones that the others are measured by."""
        self.stress.run(policies)
        self.searcher.run(policies, self.seeds)
        self.tried.update((key_of(policy), policy) for policy in policies)

    def walk(self, start: Policy, variants: Callable[[Policy], list[Policy]]) -> Policy:
        """From a fast setting to one that keeps the limits, by the safer variant that violates least, step by step."""
        self.require([start])
        best = start
        for _ in range(2 * self.steps):
            if self.keeps(best) or not self.affordable:
                break
            found = min([best, *self._most_promising(best, variants(best))], key=self.rank)
            if found is best:
                break
            best = found
        return best

    def _most_promising(self, best: Policy, variants: list[Policy]) -> list[Policy]:
        """The few variants that do best where `best` fails, put under the whole of the stress."""
        failing = self.stress.violated(best)
        fresh = [p for p in {key_of(p): p for p in variants}.values() if key_of(p) not in self.tried][: 2 * self.most]
        self.stress.run(fresh, failing)
        self.searcher.run(fresh, 1)
        fresh.sort(key=lambda p: (*self.stress.violations(p, failing), self.searcher.score(p, 1)))
        return self.admit(fresh[:FINALISTS])

    def polish(self, start: Policy, neighbours: Callable[[Policy], list[Policy]]) -> Policy:
        """From a setting that keeps the limits to a faster one that keeps them as well, by its best neighbours."""
        best = start
        for _ in range(self.steps):
            if not self.affordable:
                break
            near = neighbours(best)
            self.searcher.run(near, 1)
            quick = self.searcher.score(best, 1)
            faster = sorted(
                (p for p in near if better(self.searcher.score(p, 1), quick)), key=lambda p: self.searcher.score(p, 1)
            )
            found = min([best, *self.admit(faster[: self.most // 2])], key=self.rank)
            if found is best:
                break
            best = found
        return best

    def ranked(self) -> list[Policy]:
        """Everything that was put under stress, best first."""
        return sorted(self.tried.values(), key=self.rank)


def changed_knobs(old: Policy, new: Policy) -> list[str]:
    """Python names of the knobs whose values differ and matter, in the order of the table."""
    idle = {"est_tokens_per_run"} if new.charge_rule != "fixed" else set()
    return [name for name in KNOB_BY_NAME if name not in idle and getattr(old, name) != getattr(new, name)]

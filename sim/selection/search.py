"""Searching settings: a race under common random numbers, and a climb over neighbours.

What lives here: how settings are scored, ranked and found in one scenario. What must not: the statistics of a race
(`racing`), the values that are tried (`space`), the stress set (`hardening`), how runs are made and kept (`runs`), and
what a plan shows (`planner`).

Theory of operation. Settings are compared lexicographically: first what must hold (requests lost, throttles per 100),
then the objective. `race` gives every contestant the same few seeds and then more to those alone that are still in
doubt. `climb` races an incumbent against its neighbours until none is better by more than the indifference zone. Effort
is counted in simulated requests, not in seconds, so that the same seed finds the same settings on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from governor.model.policy import Policy
from sim.experiment.results import Figures, Point
from sim.experiment.runs import Condition, PolicyKey, Runs, key_of
from sim.selection.racing import Rule, race

# Objectives closer than this share of one another are equal: the safer or simpler setting is taken.
INDIFFERENCE = 0.003
# Seeds that a search may use; published figures come from others.
SEARCH_SEEDS = 100_000


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


class Searcher:
    """Settings tried in one scenario, with all their runs: nothing is run twice. Effort is in simulated requests.

    `on_best(objective)` is told of the best objective so far that keeps the limits.
    """

    def __init__(
        self,
        condition: Condition,
        goal: Goal,
        runs: Runs,
        effort: int = 1 << 62,
        on_best: Callable[[float], None] = lambda objective: None,
    ) -> None:
        self.condition = condition
        self.scenario = condition.scenario
        self.goal = goal
        self.runs = runs
        self.spend_until = runs.requests + effort
        self.on_best = on_best
        self.policies: dict[PolicyKey, Policy] = {}
        self.origins: dict[PolicyKey, str] = {}
        self.origin = "now"
        # The best so far that was found by a race, with the runs that say so.
        self.leader: tuple[Policy, int] | None = None
        self.seeds = range(self.scenario.seed, self.scenario.seed + SEARCH_SEEDS)
        self._scores: dict[tuple[PolicyKey, int], Score] = {}
        self._points: dict[PolicyKey, Point] = {}

    def spend(self, effort: int) -> None:
        """So much more may be spent from now on."""
        self.spend_until = self.runs.requests + effort

    @property
    def exhausted(self) -> bool:
        """Whether the effort is used up."""
        return self.runs.requests >= self.spend_until

    def run(self, policies: Iterable[Policy], seeds: int) -> None:
        """Makes sure that each policy has run under the first `seeds` seeds."""
        self._run({key_of(policy): (policy, seeds) for policy in policies})

    def _run(self, wanted: Mapping[PolicyKey, tuple[Policy, int]]) -> None:
        for key, (policy, _) in wanted.items():
            if key not in self.policies:
                self.policies[key] = policy
                self.origins[key] = self.origin
        self.runs.require((self.condition, policy, self.seeds[:seeds]) for policy, seeds in wanted.values())

    def figures(self, policy: Policy, seeds: int) -> list[Figures]:
        """The policy's runs under the first `seeds` seeds, made now if they are missing."""
        self.run([policy], seeds)
        return self.runs.figures(self.condition, policy, self.seeds[:seeds])

    def score(self, policy: Policy, seeds: int) -> Score:
        """The policy's score over the first `seeds` seeds."""
        key = key_of(policy), seeds
        if key not in self._scores:
            self._scores[key] = score_of(self.figures(policy, seeds), self.goal)
        return self._scores[key]

    def race(self, policies: Sequence[Policy], most: int) -> tuple[list[Policy], int]:
        """The policies, best first, and the seeds under which the first of them ran (`most` at the most)."""
        field = list({key_of(policy): policy for policy in policies}.values())

        def sample(wanted: Mapping[int, int]) -> dict[int, np.ndarray]:
            self._run({key_of(field[i]): (field[i], n) for i, n in wanted.items()})
            return {i: self._criteria(self.figures(field[i], n)) for i, n in wanted.items()}

        goal = self.goal
        rule = Rule(most, indifference=INDIFFERENCE, allowed=(goal.max_lost, goal.max_throttled_per_100))
        finish = race(len(field), sample, rule)
        best, seeds = field[finish.best], finish.replications[finish.best]
        self._found(best, seeds)
        return [field[i] for i in finish.ranking], seeds

    def _found(self, policy: Policy, seeds: int) -> None:
        score = self.score(policy, seeds)
        if self.leader is None or score < self.score(*self.leader):
            self.leader = policy, seeds
            if score[:2] == (0.0, 0.0):
                self.on_best(score[2])

    def _criteria(self, figures: Sequence[Figures]) -> np.ndarray:
        name = self.goal.figure
        rows = [(run["failed"] / run.requests, run["throttled_per_100"], run[name]) for run in figures]
        found = np.array(rows, dtype=np.float64)
        # A run that answers nothing has no latency: as long as can be.
        found[np.isnan(found)] = np.inf
        return found

    def climb(self, start: Policy, neighbours: Callable[[Policy], list[Policy]], most: int) -> Policy:
        """From `start` to a setting that none of its neighbours beats, or to the end of the effort."""
        best = start
        while not self.exhausted:
            ranked, seeds = self.race([best, *neighbours(best)], most)
            if not better(self.score(ranked[0], seeds), self.score(best, seeds)):
                return best
            best = ranked[0]
        return best

    def points(self, seeds: int) -> tuple[Point, ...]:
        """Everything that was tried, with the front among what loses least: objective, throttles, and money if known.

        Who seems to stand on the front after few runs has often just been lucky: such points are run under `seeds`
        seeds first, until nobody new appears there.
        """
        while True:
            points = self.front()
            hasty = [point.policy for point in points if point.on_front and point.replications < seeds]
            if not hasty:
                return points
            self.run(hasty, seeds)

    def _point(self, key: PolicyKey, policy: Policy, figures: Sequence[Figures]) -> Point:
        n = len(figures)
        lost = sum(run["failed"] for run in figures) / n
        throttled = sum(run["throttled_per_100"] for run in figures) / n
        extra = sum(run["extra_usd"] for run in figures) / n if self.runs.tariff is not None else None
        return Point(policy, self.origins[key], score_of(figures, self.goal)[2], throttled, lost, n, False, extra)

    def front(self) -> tuple[Point, ...]:
        """The same from the runs that there are, none added."""
        found = []
        for key, policy in self.policies.items():
            figures = self.runs.known(self.condition, key, self.seeds)
            if not figures:
                continue
            # Asked again and again, and few settings have had more runs since.
            known = self._points.get(key)
            if known is None or known.replications != len(figures):
                known = self._points[key] = self._point(key, policy, figures)
            found.append(known)
        found.sort(key=lambda p: (p.lost, p.throttled_per_100, p.objective_s, p.extra_usd or 0.0, -p.replications))
        return _with_front(found)


def _with_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points, sorted by loss and throttles; on the front are those that nothing beats in one and equals in all."""
    front: list[tuple[float, float, float]] = []
    marked = []
    for point in points:
        own = point.throttled_per_100, point.objective_s, point.extra_usd or 0.0
        loses_least = point.lost <= points[0].lost
        beaten = any(all(theirs <= mine for theirs, mine in zip(other, own, strict=True)) for other in front)
        on_front = loses_least and not beaten and math.isfinite(point.objective_s)
        if on_front:
            front.append(own)
        marked.append(replace(point, on_front=on_front))
    return tuple(marked)

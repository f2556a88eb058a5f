"""Search settings: sequential halving under common random numbers, and a climb over neighbours.

Settings are compared lexicographically: first what must hold (requests lost, throttles per 100), then the objective.
`race` is sequential halving (Karnin, Koren and Somekh, "Almost optimal exploration in multi-armed bandits", ICML 2013):
all run under the same first seeds, the better half under twice as many, and so on. It estimates nothing but means;
those close to the leader stay until rare long runs have had their chance to show. `climb` races an incumbent against
its neighbours until none is better by more than the indifference zone, and never returns to an incumbent. Effort is
counted in simulated requests, so that the same seed finds the same settings on any machine; a limit of time only ends
what would take too long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from governor.model.policy import Policy
from sim.experiment.results import Figures, Point
from sim.experiment.runs import PolicyKey, Runs, key_of
from sim.scenario.stress import Condition

# Seeds from the first one on that a searcher may use.
MOST_SEEDS = 100_000
# Objectives closer than this share of one another are equal: the safer or simpler setting is taken.
INDIFFERENCE = 0.003
# Replications of each setting before any is left behind, where `most` is at least twice that.
FIRST_STAGE = 10
# An event of one run in 20 shows at least twice in 100 runs (96 %). Until then no setting within CLOSE of the leader is
# dropped, because a rare long run may reverse the order (30 % longer in one run of 20 is 1.5 % of the mean).
RARE, CLOSE = 100, 0.02
# The last few of a race all run to its end: to tell them apart is what a race is for.
LAST = 4

_Rank = Callable[[list[int], int], tuple[list[int], int]]
"""(contestants, n) -> these contestants, best first by their first n replications; how many are close to the leader."""


def sequential_halving(contestants: int, rank: _Rank, most: int) -> tuple[list[int], list[int]]:
    """Race contestants 0, 1, ...; return all of them, the best first, and the replications that each has had.

    The worse half is left behind at each stage, then n doubles, up to `most`: never more replications than equal
    allocation of `most` to each.
    """
    alive = list(range(contestants))
    behind: list[int] = []
    had = [0] * contestants
    n = max(1, min(FIRST_STAGE, most // 2))
    while True:
        alive, close = rank(alive, n)
        for i in alive:
            had[i] = n
        if n >= most or len(alive) == 1:
            return alive + behind, had
        stay = max(LAST, (len(alive) + 1) // 2, close if n < RARE else 0)
        alive, behind = alive[:stay], alive[stay:] + behind
        n = most if len(alive) <= LAST else min(most, 2 * n)


@dataclass(frozen=True, slots=True)
class Goal:
    """The goal of a plan. `objective`: makespan or p95_latency. `max_lost`: probability that a request is lost.

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
        """Return the goal with at least this many throttles allowed in a run of `requests`: a rate is coarse there."""
        return replace(self, max_throttled_per_100=max(self.max_throttled_per_100, 100.0 * throttles / requests))


Score = tuple[float, float, float]
"""Loss above what is allowed, throttles above what is allowed, objective: smaller is better, in this order."""


def score_of(runs: Sequence[Figures], goal: Goal) -> Score:
    """Return the score of a setting from its runs (at least one). A run without answers has an infinite objective."""
    requests = sum(run.requests for run in runs)
    lost = sum(run["failed"] for run in runs) / requests
    throttled = sum(run["throttled_per_100"] for run in runs) / len(runs)
    objective = sum(run[goal.figure] for run in runs) / len(runs)
    if math.isnan(objective):
        objective = math.inf
    return max(0.0, lost - goal.max_lost), max(0.0, throttled - goal.max_throttled_per_100), objective


def better(a: Score, b: Score, indifference: float = INDIFFERENCE) -> bool:
    """Return whether `a` beats `b` by more than the indifference zone."""
    if a[:2] != b[:2]:
        return a[:2] < b[:2]
    return a[2] < b[2] * (1.0 - indifference)


class Searcher:
    """Settings tried in one scenario, with all their runs: nothing is run twice. Effort is in simulated requests.

    `on_best(objective)` is told of the best objective so far that keeps the limits. `first`: the first seed, counted
    from the scenario's own: what confirms a choice must not be what it was chosen by.
    """

    def __init__(
        self,
        condition: Condition,
        goal: Goal,
        runs: Runs,
        effort: int = 1 << 62,
        on_best: Callable[[float], None] = lambda objective: None,
        *,
        first: int = 0,
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
        self.seeds = range(self.scenario.seed + first, self.scenario.seed + first + MOST_SEEDS)
        self._scores: dict[tuple[PolicyKey, int], Score] = {}
        self._points: dict[PolicyKey, Point] = {}

    def spend(self, effort: int) -> None:
        """So much more may be spent from now on."""
        self.spend_until = self.runs.requests + effort

    @property
    def exhausted(self) -> bool:
        """Return whether the effort or the time is used up."""
        return self.runs.requests >= self.spend_until or self.runs.out_of_time

    def run(self, policies: Iterable[Policy], seeds: int) -> None:
        """Make sure that each policy has run under the first `seeds` seeds."""
        wanted = {key_of(policy): policy for policy in policies}
        for key, policy in wanted.items():
            if key not in self.policies:
                self.policies[key] = policy
                self.origins[key] = self.origin
        self.runs.require((self.condition, policy, self.seeds[:seeds]) for policy in wanted.values())

    def figures(self, policy: Policy, seeds: int) -> list[Figures]:
        """Return the policy's runs under the first `seeds` seeds; missing ones are simulated now."""
        self.run([policy], seeds)
        return self.runs.figures(self.condition, policy, self.seeds[:seeds])

    def score(self, policy: Policy, seeds: int) -> Score:
        """Return the policy's score over the first `seeds` seeds."""
        key = key_of(policy), seeds
        if key not in self._scores:
            self._scores[key] = score_of(self.figures(policy, seeds), self.goal)
        return self._scores[key]

    def race(self, policies: Sequence[Policy], most: int) -> tuple[list[Policy], int]:
        """Return the policies, best first, and the seeds under which the first few of them ran (`most`)."""
        field = list({key_of(policy): policy for policy in policies}.values())

        def rank(contestants: list[int], n: int) -> tuple[list[int], int]:
            self.run([field[i] for i in contestants], n)
            scores = {i: self.score(field[i], n) for i in contestants}
            ahead = min(scores.values())
            close = sum(not better(ahead, score, CLOSE) for score in scores.values())
            return sorted(contestants, key=lambda i: scores[i]), close

        ranking, had = sequential_halving(len(field), rank, most)
        best, seeds = field[ranking[0]], had[ranking[0]]
        self._found(best, seeds)
        return [field[i] for i in ranking], seeds

    def _found(self, policy: Policy, seeds: int) -> None:
        score = self.score(policy, seeds)
        if self.leader is None or score < self.score(*self.leader):
            self.leader = policy, seeds
            if score[:2] == (0.0, 0.0):
                self.on_best(score[2])

    def climb(self, start: Policy, neighbours: Callable[[Policy], list[Policy]], most: int) -> Policy:
        """Climb from `start` to a setting that none of its neighbours beats, or until the effort is spent.

        No setting is the incumbent twice, so that it ends whatever the scores say.
        """
        best, visited = start, {key_of(start)}
        while not self.exhausted:
            ranked, seeds = self.race([best, *neighbours(best)], most)
            ahead = ranked[0]
            if key_of(ahead) in visited or not better(self.score(ahead, seeds), self.score(best, seeds)):
                return best
            visited.add(key_of(ahead))
            best = ahead
        return best

    def points(self, seeds: int) -> tuple[Point, ...]:
        """Everything that was tried, with the front among what loses least: objective, throttles, and money if known.

        Who seems to stand on the front after few runs has often just been lucky: such points are run under `seeds`
        seeds first, until no new setting appears there.
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
        """Return the estimate from the runs made so far, without new ones."""
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
    """Return the points by loss and throttles; on the front are those that none beats in one and equals in all."""
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

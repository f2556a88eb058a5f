"""Settings that suit one limit, found cheaply: what `capacity` does again at each limit that it tries.

What lives here: a short search, from today's settings and a fixed recipe by a few steps to better neighbours. What must
not: the full search with its stress set and its evidence (`plan`): what stands here only has to be near enough to it
that a limit is not refused for want of better settings.

Theory of operation. Successive halving (Jamieson and Talwalkar 2016): all candidates run under one seed, the best few
under three, by the same comparison as in `plan` (what must hold first, then time). From the winner a climb over single
knobs, a few steps at most. Candidates that suited another limit are tried first. Effort is counted in simulated
requests: the same seed finds the same settings on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from governor.policy import Policy
from sim.experiment import Pool, case_of
from sim.results import Figures
from sim.scenario import Scenario
from sim.search import Goal, Score, better, full_anchors, full_space, key_of, score_of

# Simulated requests per limit, at most about.
EFFORT = 400_000
SEEDS = 3
FINALISTS = 6
STEPS = 4


def tuned(scenario: Scenario, goal: Goal, *, pool: Pool, first: Sequence[Policy] = ()) -> Policy:
    """Settings that do well in the scenario: at least as well as its own and those of `first`, on the seeds tried."""
    search = _Search(scenario, goal.allowing(1, len(scenario.workload)), pool)
    field = [scenario.policy, *first, *full_anchors(scenario)]
    best = search.best(field[: max(len(first) + 2, search.affordable)])
    space = full_space(scenario)
    for _ in range(STEPS):
        near = space.neighbours(best)
        if search.affordable < len(near):
            break
        found = search.best([best, *near])
        if not better(search.score(found, SEEDS), search.score(best, SEEDS)):
            break
        best = found
    return best


class _Search:
    """Settings tried in one scenario, with their runs."""

    def __init__(self, scenario: Scenario, goal: Goal, pool: Pool) -> None:
        self.scenario = scenario
        self.goal = goal
        self.pool = pool
        self.runs: dict[tuple[object, ...], list[Figures]] = {}
        self.until = pool.requests + EFFORT

    @property
    def affordable(self) -> int:
        """How many more policies can be tried under one seed, with a few of them under all."""
        runs = (self.until - self.pool.requests) // max(1, len(self.scenario.workload))
        return max(0, runs - FINALISTS * SEEDS)

    def best(self, field: Sequence[Policy]) -> Policy:
        """The best of the policies: all under one seed, then the leaders under all seeds."""
        ranked = list({key_of(policy): policy for policy in field}.values())
        for seeds, keep in ((1, FINALISTS), (SEEDS, 1)):
            self._require(ranked, seeds)
            ranked.sort(key=lambda policy: self.score(policy, seeds))
            ranked = ranked[:keep]
        return ranked[0]

    def score(self, policy: Policy, seeds: int) -> Score:
        """The policy's score under the first `seeds` seeds, which it must have run."""
        return score_of(self.runs[key_of(policy)][:seeds], self.goal)

    def _require(self, policies: Sequence[Policy], seeds: int) -> None:
        start = self.scenario.seed
        waiting = [p for p in policies if len(self.runs.setdefault(key_of(p), [])) < seeds]
        tasks = [(case_of(self.scenario, p), range(start + len(self.runs[key_of(p)]), start + seeds)) for p in waiting]
        for policy, found in zip(waiting, self.pool.run(tasks), strict=True):
            self.runs[key_of(policy)] += found

"""Settings that suit one limit, found cheaply: what `capacity` does again at each limit that it tries.

Effort is counted in simulated requests: the same seed finds the same settings on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from governor.model.policy import Policy
from sim.experiment.experiment import Pool
from sim.experiment.runs import Runs, key_of
from sim.scenario.scenario import Scenario
from sim.scenario.stress import Condition
from sim.selection.search import Goal, Searcher
from sim.selection.space import full_anchors, full_space, recipe

# Simulated requests per limit, at most about; half of them for the race that comes first.
EFFORT = 400_000
# Runs of one setting, at most.
SEEDS = 4
# Settings that are handed on.
SPARE = 4


def tuned(scenario: Scenario, goal: Goal, *, pool: Pool, first: Sequence[Policy] = ()) -> list[Policy]:
    """Settings that do well in the scenario, the best first, which does so on the seeds tried.

    That one is at least as good there as the scenario's own settings and those of `first`, which suited limits nearby;
    but a few runs say little of rare losses, and those that come after it are there for them.
    """
    requests = len(scenario.workload)
    searcher = Searcher(Condition("", scenario), goal.allowing(1, requests), Runs(pool), EFFORT)
    affordable = max(2, EFFORT // (2 * SEEDS * max(1, requests)))
    field = [scenario.policy, *first, *[recipe(scenario), *full_anchors(scenario)][:affordable]]
    ranked, _ = searcher.race(field, SEEDS)
    best = searcher.climb(ranked[0], full_space(scenario).neighbours, SEEDS)
    others = [policy for policy in ranked if key_of(policy) != key_of(best)]
    return [best, *others[: SPARE - 1]]

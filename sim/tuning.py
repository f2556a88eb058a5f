"""Settings that suit one limit, found cheaply: what `capacity` does again at each limit that it tries.

What lives here: a short search, from today's settings and a fixed recipe by a few steps to better neighbours. What must
not: the race and the climb themselves (`search`), and the full search with its stress set and its evidence (`planner`):
what is found here only has to be near enough to that one's answer that no limit is refused for want of better settings.

Effort is counted in simulated requests: the same seed finds the same settings on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from governor.policy import Policy
from sim.experiment import Pool
from sim.runs import Condition, Runs
from sim.scenario import Scenario
from sim.search import Goal, Searcher
from sim.space import full_anchors, full_space, recipe

# Simulated requests per limit, at most about; half of them for the race that comes first.
EFFORT = 400_000
# Runs of one setting, at most.
SEEDS = 4


def tuned(scenario: Scenario, goal: Goal, *, pool: Pool, first: Sequence[Policy] = ()) -> Policy:
    """Settings that do well in the scenario: at least as well as its own and those of `first`, on the seeds tried."""
    requests = len(scenario.workload)
    searcher = Searcher(Condition("", scenario), goal.allowing(1, requests), Runs(pool), EFFORT)
    # What suited a limit nearby is a better start than any anchor: only the first search begins with all of them.
    anchors = [recipe(scenario)] if first else full_anchors(scenario)
    affordable = EFFORT // (2 * SEEDS * max(1, requests))
    field = [scenario.policy, *first, *anchors[: max(2, affordable)]]
    ranked, _ = searcher.race(field, SEEDS)
    return searcher.climb(ranked[0], full_space(scenario).neighbours, SEEDS)

"""Settings that hold when the assumptions are wrong: the walk from a fast setting to one that keeps the limits.

Theory of operation. A condition may be beyond help, so a setting need not do what none tried can do: it violates
a condition by the losses, and the throttles beyond the limit, that it has above the best setting tried.
Settings are ranked by their violations first and the objective second, with a price on throttles (`Hardening.rank`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from governor.model.policy import Policy
from sim.experiment.results import Figures
from sim.experiment.runs import PolicyKey, Runs, key_of
from sim.scenario.stress import Condition
from sim.selection.search import Goal, Score, Searcher, better, score_of

# Excess throttles per 100, summed over the conditions, that a handful of runs cannot tell from none.
THROTTLE_NOISE = 0.25
# What avoiding one throttle per 100 in one condition is worth, as a share of the objective as assumed: a refusal costs
# a round trip, and what else it costs stands in the objective of its condition.
THROTTLE_PRICE = 0.01
# Variants of one step that are put under the whole of the stress set.
_FINALISTS = 4
# A walk may take so many times the stated steps, as long as each is better than the one before.
WALKS = 3


class Stress:
    """The results of settings under each condition of a stress set, and the best that is possible there.

    `seeds`: runs of each setting in each condition, under seeds from the scenario's own + `first` on.
    """

    def __init__(self, conditions: Sequence[Condition], goal: Goal, runs: Runs, seeds: int, first: int = 0) -> None:
        self.conditions = list(conditions)
        self.goal = goal
        self.runs = runs
        self.seeds = seeds
        self.first = first
        # Loss and excess of throttles by policy, shape (conditions, 2), nan where it did not run; and the least of them
        # that anything tried has reached: throttles count only among those that lose least.
        self._scores: dict[PolicyKey, np.ndarray] = {}
        self._least = np.full((len(self.conditions), 2), math.inf)

    def run(self, policies: Sequence[Policy], rows: Sequence[int] | None = None) -> None:
        """Run the policies under every condition (or those of `rows`), all at once."""
        picked = range(len(self.conditions)) if rows is None else rows
        wanted = []
        for policy in {key_of(policy): policy for policy in policies}.values():
            mine = self._scores.setdefault(key_of(policy), np.full((len(self.conditions), 2), math.nan))
            wanted += [(row, policy) for row in picked if math.isnan(mine[row, 0])]
        self.runs.require((self.conditions[row], policy, self._seeds(row)) for row, policy in wanted)
        least = self._least
        for row, policy in wanted:
            score = score_of(self.figures(policy, row), self.goal)[:2]
            self._scores[key_of(policy)][row] = score
            if score < tuple(least[row]):
                least[row] = score

    def figures(self, policy: Policy, row: int) -> list[Figures]:
        """Return the policy's runs under one condition."""
        return self.runs.figures(self.conditions[row], policy, self._seeds(row))

    def score(self, policy: Policy, row: int) -> tuple[float, float]:
        """Return loss and throttles beyond the limits under one condition."""
        self.run([policy], [row])
        lost, throttled = self._scores[key_of(policy)][row]
        return float(lost), float(throttled)

    def _seeds(self, row: int) -> range:
        first = self.conditions[row].scenario.seed + self.first
        return range(first, first + self.seeds)

    def _excess(self, policy: Policy, rows: Sequence[int] | None) -> np.ndarray:
        """Return loss and throttles beyond the limits, as far as something that was tried does better, by condition."""
        self.run([policy], rows)
        picked = slice(None) if rows is None else list(rows)
        mine, least = self._scores[key_of(policy)][picked], self._least[picked]
        lost = np.maximum(0.0, mine[:, 0] - least[:, 0])
        throttled = np.maximum(0.0, mine[:, 1] - np.where(lost <= 0.0, least[:, 1], 0.0))
        return np.stack([lost, throttled], axis=1)

    def violations(self, policy: Policy, rows: Sequence[int] | None = None) -> tuple[float, float]:
        """Return loss and throttles beyond what is possible, summed over all conditions, or those of `rows`."""
        lost, throttled = self._excess(policy, rows).sum(axis=0)
        return float(lost), float(throttled)

    def objective(self, policy: Policy) -> float:
        """Return the mean objective over all conditions."""
        self.run([policy])
        found = [score_of(self.figures(policy, row), self.goal)[2] for row in range(len(self.conditions))]
        return sum(found) / len(found)

    def violated(self, policy: Policy) -> list[int]:
        """Return the conditions under which the policy exceeds the limits."""
        return [int(row) for row in np.flatnonzero((self._excess(policy, None) > 0.0).any(axis=1))]


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
        self.spend_until = searcher.runs.requests + effort
        self.cost = len(searcher.scenario.workload) * (len(stress.conditions) + seeds)
        self.tried: dict[PolicyKey, Policy] = {}

    @property
    def affordable(self) -> int:
        """Return how many policies can still be put under stress."""
        if self.searcher.runs.out_of_time:
            return 0
        return max(0, (self.spend_until - self.searcher.runs.requests) // self.cost)

    def rank(self, policy: Policy) -> tuple[float, Score]:
        """Smaller is better: losses under stress, then the score in the scenario itself, its objective at a price.

        The price: THROTTLE_PRICE for each throttle per 100 beyond what is possible, summed over the conditions. So the
        limits are kept wherever that costs less than it is worth: ten throttles per 100 under one condition are avoided
        for up to a tenth more time as assumed, but not for twice the time.
        """
        lost, throttled = self.stress.violations(policy)
        own = self.searcher.score(policy, self.seeds)
        price = 1.0 + THROTTLE_PRICE * throttled if throttled > THROTTLE_NOISE else 1.0
        return round(lost, 9), (own[0], own[1], own[2] * price)

    def keeps(self, policy: Policy) -> bool:
        """Return whether the policy stays within the limits under every condition, as far as anything tried does."""
        lost, throttled = self.stress.violations(policy)
        return lost <= 0.0 and throttled <= THROTTLE_NOISE

    def admit(self, policies: Sequence[Policy]) -> list[Policy]:
        """Run policies under stress: those that are new, at most `most` of them and no more than the effort allows."""
        fresh = [p for p in {key_of(p): p for p in policies}.values() if key_of(p) not in self.tried]
        fresh = fresh[: min(self.most, self.affordable)]
        self.require(fresh)
        return fresh

    def require(self, policies: Sequence[Policy]) -> None:
        """Run policies under stress, whatever it costs: the ones that the others are measured by."""
        self.stress.run(policies)
        self.searcher.run(policies, self.seeds)
        self.tried.update((key_of(policy), policy) for policy in policies)

    def walk(self, start: Policy, variants: Callable[[Policy], list[Policy]]) -> Policy:
        """Go from a fast setting to one that keeps the limits, each time to the safer variant that violates least."""
        self.require([start])
        best = start
        for _ in range(WALKS * self.steps):
            if self.keeps(best) or not self.affordable:
                break
            found = min([best, *self._most_promising(best, variants(best))], key=self.rank)
            if found is best:
                break
            best = found
        return best

    def _most_promising(self, best: Policy, variants: list[Policy]) -> list[Policy]:
        """Return the few variants that do best where `best` fails, put under the whole of the stress."""
        failing = self.stress.violated(best)
        fresh = [p for p in {key_of(p): p for p in variants}.values() if key_of(p) not in self.tried][: 2 * self.most]
        self.stress.run(fresh, failing)
        self.searcher.run(fresh, 1)
        fresh.sort(key=lambda p: (*self.stress.violations(p, failing), self.searcher.score(p, 1)))
        return self.admit(fresh[:_FINALISTS])

    def polish(self, start: Policy, neighbours: Callable[[Policy], list[Policy]]) -> Policy:
        """Go from a setting that keeps the limits to a faster one that keeps them as well, by its best neighbours."""
        best = start
        for _ in range(WALKS * self.steps):
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

    def finalists(self, count: int) -> list[Policy]:
        """Return the best of the policies that were put under stress, best first."""
        return sorted(self.tried.values(), key=self.rank)[:count]

    def beats(self, policy: Policy, other: Policy) -> bool:
        """Return whether one policy ranks before the other by more than the indifference zone."""
        (lost, score), (least, ahead) = self.rank(policy), self.rank(other)
        return lost < least or (lost == least and better(score, ahead))

    def chosen(self, field: Sequence[Policy]) -> list[Policy]:
        """Return the field, the best first: the first of it unless another beats it."""
        self.require(field)
        best = field[0]
        for each in field[1:]:
            if self.beats(each, best):
                best = each
        return [best, *sorted((p for p in field if p != best), key=self.rank)]

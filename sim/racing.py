"""Picking the best of several settings out of noisy runs, with as few of them as a stated confidence allows.

What lives here: the race, a statistical procedure on arrays. What must not: policies, scenarios, running anything (the
caller's `sample` does), and what is tried next (`search`).

Theory of operation. All contestants meet the same chance, replication by replication (common random numbers), so what
counts is the paired difference to the leader, whose spread is far smaller than that of the runs. At each look the
leader is the contestant with the best mean, and for each other one

    p = T((-indifference - d) sqrt(n) / s)

says how plausible it is that it is better by more than the indifference: d and s are mean and standard deviation of its
n paired differences, T is Student's distribution. The race ends when the sum of these p is at most (1 - confidence)/D,
with D the number of doublings from the first look to the last. Until then those that make up most of the sum get more
replications, the others rest; the leader always has as many as anyone. One that rests is asked again at every look, so
that a new leader brings back whom it must.

Error control: the sum over contestants is Bonferroni's bound on the probability of a wrong choice, as in optimal
computing budget allocation (Chen, Lin, Yücesan and Chick, Discrete Event Dynamic Systems 10, 2000, "APCS"), used as a
stopping rule as in Branke, Chick and Schmidt, "Selecting a selection procedure", Management Science 53 (2007); the
division by D pays for looking repeatedly: looks within one doubling share at least half of their runs and count as one.
Standard deviations from a handful of runs are moderated towards that of
their peers, with as many degrees of freedom as the peers' agreement is worth (Smyth, Statistical Applications in
Genetics and Molecular Biology 3, 2004, section 6.2). The rule assumes that mean differences are about normal;
`benchmarks/bench_selection.py` measures how often the choice is right, on landscapes where they are not as well.

Constraints come before the objective. Of several criteria all but the last have an allowed level, and what is within it
counts as equal: the leader is the one that exceeds least, in the order of the criteria, and p is at most the
plausibility that a contestant exceeds no more than the leader. That a leader which seems to stay within exceeds after
all counts like another contestant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float64]

FIRST_LOOK = 3
# Replications grow by this factor from look to look: fewer looks cost less confidence, more of them stop sooner.
GROWTH = 1.4
# The part of the allowed sum that those at rest may make up.
AT_REST = 0.7
# Peers that are needed to say how much standard deviations differ, and what they are worth at the most.
PEERS = 8
PEERS_WORTH = 20.0

Sample = Callable[[Mapping[int, int]], Mapping[int, Real]]
"""{contestant: n} -> for each its first n replications, shape (n, criteria); smaller is better."""


def looks_to(most: int) -> tuple[int, ...]:
    """The replications after which a race of at most `most` may be looked at."""
    found = [min(FIRST_LOOK, most)]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, round(GROWTH * found[-1]))))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Rule:
    """When a race stops. `most`: replications per contestant, at most. `indifference`: share of the leader's objective.

    `allowed`: for each criterion but the last, the level up to which it does not matter.
    """

    most: int
    confidence: float = 0.95
    indifference: float = 0.003
    allowed: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """How a race ended. `ranking`: all contestants, the best first. `replications`: runs made, by contestant.

    `decided`: the stopping rule was met; else the replications were used up before, and the best mean leads.
    """

    ranking: tuple[int, ...]
    replications: tuple[int, ...]
    decided: bool

    @property
    def best(self) -> int:
        """The one that was chosen."""
        return self.ranking[0]


def race(contestants: int, sample: Sample, rule: Rule) -> Finish:
    """Races contestants 0, 1, ... (at least one) until one is the best beyond doubt, or the rule's runs are used up."""
    looks = looks_to(rule.most)
    allowed_sum = (1.0 - rule.confidence) / max(1.0, math.log2(looks[-1] / looks[0]))
    stage = np.zeros(contestants, dtype=np.int64)
    field = _Field(contestants, len(rule.allowed) + 1, rule)
    everybody = range(contestants)
    while True:
        wanted = {i: looks[stage[i]] for i in everybody if looks[stage[i]] > field.n[i]}
        if wanted:
            field.take(sample(wanted))
        leader = field.leader()
        if contestants == 1:
            return Finish((0,), (int(field.n[0]),), True)
        p, doubt = field.plausible(leader), field.doubt(leader)
        decided = float(p.sum()) + doubt <= allowed_sum
        order = np.argsort(p, kind="stable")
        doubtful = [int(i) for i in order[np.cumsum(p[order]) > AT_REST * allowed_sum] if i != leader]
        if doubt > (1.0 - AT_REST) * allowed_sum:
            # Who would lead instead comes along, or nobody could.
            doubtful = list(dict.fromkeys([*doubtful, field.ranking(leader)[1]]))
        going = [i for i in doubtful if stage[i] + 1 < len(looks)]
        if decided or not going:
            return Finish(field.ranking(leader), tuple(int(n) for n in field.n), decided)
        stage[going] += 1
        stage[leader] = stage.max()


class _Field:
    """The contestants' runs so far. `values`: shape (contestants, replications, criteria), the first `n` of each."""

    def __init__(self, contestants: int, criteria: int, rule: Rule) -> None:
        self.rule = rule
        self.n = np.zeros(contestants, dtype=np.int64)
        self.values = np.zeros((contestants, 8, criteria))

    def take(self, runs: Mapping[int, Real]) -> None:
        """More replications: all that a contestant has so far, from the first one on."""
        most = max(len(values) for values in runs.values())
        if most > self.values.shape[1]:
            room = 2 * most - self.values.shape[1]
            self.values = np.concatenate([self.values, np.zeros((len(self.n), room, self.values.shape[2]))], axis=1)
        for i, values in runs.items():
            self.values[i, : len(values)] = values
            self.n[i] = len(values)

    def _moments(self, x: Real) -> tuple[Real, Real]:
        """Mean and variance over each contestant's own replications. `x`: shape (contestants, replications)."""
        known = np.arange(x.shape[1]) < self.n[:, None]
        mean = np.where(known, x, 0.0).sum(axis=1) / self.n
        spread = np.where(known, x - mean[:, None], 0.0)
        return mean, (spread**2).sum(axis=1) / np.maximum(1, self.n - 1)

    def _keys(self, leader: int | None = None) -> list[tuple[float, ...]]:
        """What ranks: the excess in each constraint, then the objective, or its difference to the leader's."""
        columns = []
        for c, allowed in enumerate(self.rule.allowed):
            columns.append(np.maximum(0.0, self._moments(self.values[:, :, c])[0] - allowed))
        objective = self.values[:, :, -1]
        with np.errstate(invalid="ignore"):
            columns.append(self._moments(objective if leader is None else objective - objective[leader])[0])
        return list(zip(*(np.where(np.isnan(column), np.inf, column).tolist() for column in columns), strict=True))

    def leader(self) -> int:
        """The best of those with most replications."""
        keys, most = self._keys(), self.n.max()
        return min((i for i in range(len(self.n)) if self.n[i] == most), key=lambda i: (keys[i], i))

    def ranking(self, leader: int) -> tuple[int, ...]:
        """All, the leader first, then by their means, paired with the leader's."""
        keys = self._keys(leader)
        return (leader, *sorted((i for i in range(len(self.n)) if i != leader), key=lambda i: (keys[i], -self.n[i], i)))

    def doubt(self, leader: int) -> float:
        """How plausible it is that the leader, which seems to keep all limits, exceeds one."""
        found = 0.0
        for c, allowed in enumerate(self.rule.allowed):
            mean, variance = self._moments(self.values[:, :, c])
            if mean[leader] <= allowed and self.n[leader] > 1:
                freedom = (self.n - 1).astype(np.float64)
                found += 1.0 - float(_below(allowed, mean, variance, self.n, freedom)[leader])
        return found

    def plausible(self, leader: int) -> Real:
        """For each contestant how plausible it is that it beats the leader by more than the indifference."""
        if self.n.min() < 2:
            p = np.ones(len(self.n))
            p[leader] = 0.0
            return p
        x = self.values
        mine = np.arange(x.shape[1]) < self.n[:, None]
        freedom = (self.n - 1).astype(np.float64)
        finite = np.all(np.isfinite(x[:, :, -1]) | ~mine, axis=1)
        if finite[leader]:
            objective = np.where(finite[:, None] & mine, x[:, :, -1], 0.0)
            mean, variance = self._moments(np.where(mine, objective - objective[leader], 0.0))
            zone = self.rule.indifference * abs(float(objective[leader, : self.n[leader]].mean()))
            variance, worth = _moderated(variance, freedom, np.arange(len(self.n)) != leader)
            p = np.where(finite, _below(-zone, mean, variance, self.n, worth), 0.0)
        else:
            p = finite.astype(np.float64)
        for c, allowed in enumerate(self.rule.allowed):
            mean, variance = self._moments(x[:, :, c])
            within = _below(allowed, mean, variance, self.n, freedom)
            mean, variance = self._moments(x[:, :, c] - x[leader, :, c])
            no_worse = _below(0.0, mean, variance, self.n, freedom)
            exceeds = float(x[leader, : self.n[leader], c].mean()) > allowed
            # Where even the leader exceeds the level, exceeding it less wins, whatever the objective.
            differs = (mean != 0.0) | (variance > 0.0)
            p = np.where(differs, no_worse, p) if exceeds else np.minimum(p, np.maximum(within, no_worse))
            if exceeds:
                break
        p[leader] = 0.0
        return p


def _below(level: float, mean: Real, variance: Real, n: NDArray[np.int64], freedom: Real) -> Real:
    """How plausible it is that a true mean is at most `level`; sure where nothing varies."""
    from scipy.special import stdtr

    error = np.sqrt(variance / n)
    # What is only rounding apart does not vary.
    sure = error <= 1e-12 * np.maximum(np.abs(mean), abs(level))
    t = (level - mean) / np.where(sure, 1.0, error)
    return np.where(sure, (mean <= level).astype(np.float64), stdtr(freedom, t))


def _moderated(variance: Real, freedom: Real, peers: NDArray[np.bool_]) -> tuple[Real, Real]:
    """Variances drawn towards their peers', and their degrees of freedom; unchanged where there are few peers.

    The peers' variances are taken as scaled inverse chi-square around a common one; its degrees of freedom d0 and scale
    follow from mean and variance of log s^2 (Smyth, 2004, section 6.2).
    """
    from scipy.special import digamma, polygamma

    known = peers & (variance > 0.0)
    if known.sum() < PEERS:
        return variance, freedom
    half = freedom[known] / 2.0
    logs = np.log(variance[known]) - digamma(half) + np.log(half)
    excess = float(logs.var(ddof=1) - polygamma(1, half).mean())
    worth = PEERS_WORTH if excess <= 0.0 else min(PEERS_WORTH, 2.0 * _inverse_trigamma(excess))
    common = float(np.exp(logs.mean() + digamma(worth / 2.0) - np.log(worth / 2.0)))
    moderated = (worth * common + freedom * variance) / (worth + freedom)
    return np.where(known, moderated, variance), np.where(known, freedom + worth, freedom)


def _inverse_trigamma(y: float) -> float:
    """x > 0 with trigamma(x) = y, by Newton's iteration on 1 / trigamma (Smyth, 2004, appendix)."""
    from scipy.special import polygamma

    if y > 1e7:
        return 1.0 / y**0.5
    x = 0.5 + 1.0 / y
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1.0 - trigamma / y) / float(polygamma(2, x))
        x += step
        if -step < 1e-10 * x:
            break
    return x

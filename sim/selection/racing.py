"""Picking the best of several settings out of noisy runs, with as few of them as a stated confidence allows.

What lives here: the race, a statistical procedure on arrays. What must not: policies, scenarios, running anything (the
caller's `sample` does), and what is tried next (`search`).

Theory of operation. All contestants meet the same chance, replication by replication (common random numbers), so what
counts is the paired difference to the leader, whose spread is far smaller than that of the runs. At each look the
leader is the contestant with the best mean, and for each other one

    p = T((-indifference - d) sqrt(n) / s)

says how plausible it is that it is better by more than the indifference: d and s are mean and standard deviation of its
n paired differences, T is Student's distribution. The race ends when the sum of these p is at most (1 - confidence)/D,
with D the number of doublings from the first look that may decide to the last. Until then those that make up most of
the sum get more replications, the others rest; the leader always has as many as anyone. One that rests is asked again
at every look, so that a new leader brings back whom it must.

Everybody runs once. Then the leader, those next to it and some from all over the ranking run again: their differences
say how far differences scatter, and for most of the others a single one is then enough to be out.

Error control: the sum over contestants is Bonferroni's bound on the probability of a wrong choice, as in optimal
computing budget allocation (Chen, Lin, Yücesan and Chick, Discrete Event Dynamic Systems 10, 2000, "APCS"), used as a
stopping rule as in Branke, Chick and Schmidt, "Selecting a selection procedure", Management Science 53 (2007); the
division by D pays for looking repeatedly: looks within one doubling share at least half of their runs and count as one.

Standard deviations from one run (none at all) or a handful are moderated towards what their peers lead to expect, with
as many degrees of freedom as the peers' agreement is worth (Smyth, Statistical Applications in Genetics and Molecular
Biology 3, 2004, section 6.2). The expected variance is a + b d^2, a trend as in Sartor et al., BMC Bioinformatics 7
(2006): settings far from the leader share less of its chance. The rule assumes that mean differences are about normal;
`benchmarks/bench_selection.py` measures how often the choice is right, on landscapes where they are not as well.
Differences that are all exactly zero say nothing about the first that is not: they count as none only after TIES runs.

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

# No race is decided before the leader has run so often: one lucky run is compared with too easily.
DECIDES_FROM = 3
# Replications grow by this factor from look to look: fewer looks cost less confidence, more of them stop sooner.
GROWTH = 1.3
# After the first run so many of the best, and as many spread over the others, run again beside the leader.
PILOTS = 6
# The part of the allowed sum that those at rest may make up.
AT_REST = 0.9
# Peers that are needed to say how much standard deviations differ, and what they are worth at the most.
PEERS = 6
PEERS_WORTH = 30.0
# So many runs without any difference to the leader are needed to be taken for equal: what differs in every other run
# shows by then, with a probability of 97 %.
TIES = 5
# Of the fit of expected variances: weights settle to a few per cent by then.
TREND_STEPS = 8

Sample = Callable[[Mapping[int, int]], Mapping[int, Real]]
"""{contestant: n} -> for each its first n replications, shape (n, criteria); smaller is better."""


def looks_to(most: int) -> tuple[int, ...]:
    """The replications after which a race of at most `most` may be looked at."""
    found = [1]
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
    last = len(looks) - 1
    decides = min(last, looks.index(min(DECIDES_FROM, rule.most)))
    allowed_sum = (1.0 - rule.confidence) / max(1.0, math.log2(looks[last] / looks[decides]))
    stage = np.zeros(contestants, dtype=np.int64)
    field = _Field(contestants, len(rule.allowed) + 1, rule)
    while True:
        field.take(sample({i: looks[stage[i]] for i in range(contestants) if looks[stage[i]] > field.n[i]}))
        leader = field.leader()
        if last > 0 and not stage.any():
            stage[field.pilots(leader)] = 1
            stage[leader] = decides
            continue
        if contestants == 1:
            return Finish((0,), (int(field.n[0]),), True)
        p, doubt = field.plausible(leader), field.doubt(leader)
        decided = float(p.sum()) + doubt <= allowed_sum
        order = np.argsort(p, kind="stable")
        doubtful = [int(i) for i in order[np.cumsum(p[order]) > AT_REST * allowed_sum] if i != leader]
        if doubt > (1.0 - AT_REST) * allowed_sum:
            # Who would lead instead comes along, or nobody could.
            doubtful = list(dict.fromkeys([*doubtful, field.ranking(leader)[1]]))
        going = [i for i in doubtful if stage[i] < last]
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
        self.known = np.zeros((contestants, 0), dtype=np.bool_)

    def take(self, runs: Mapping[int, Real]) -> None:
        """More replications: all that a contestant has so far, from the first one on."""
        most = max(len(values) for values in runs.values())
        if most > self.values.shape[1]:
            room = 2 * most - self.values.shape[1]
            self.values = np.concatenate([self.values, np.zeros((len(self.n), room, self.values.shape[2]))], axis=1)
        for i, values in runs.items():
            self.values[i, : len(values)] = values
            self.n[i] = len(values)
        self.known = np.arange(self.n.max()) < self.n[:, None]

    def _runs(self, criterion: int) -> Real:
        """Shape (contestants, most replications of any)."""
        return self.values[:, : self.known.shape[1], criterion]

    def _means(self, x: Real) -> Real:
        return np.where(self.known, x, 0.0).sum(axis=1) / self.n

    def _moments(self, x: Real) -> tuple[Real, Real]:
        """Mean and variance over each contestant's own replications. `x`: shape (contestants, replications)."""
        mean = self._means(x)
        spread = np.where(self.known, x - mean[:, None], 0.0)
        return mean, (spread**2).sum(axis=1) / np.maximum(1, self.n - 1)

    def _keys(self, leader: int | None = None) -> list[tuple[float, ...]]:
        """What ranks: the excess in each constraint, then the objective, or its difference to the leader's."""
        columns = []
        for c, allowed in enumerate(self.rule.allowed):
            columns.append(np.maximum(0.0, self._means(self._runs(c)) - allowed))
        objective = self._runs(-1)
        with np.errstate(invalid="ignore"):
            columns.append(self._means(objective if leader is None else objective - objective[leader]))
        return list(zip(*(np.where(np.isnan(column), np.inf, column).tolist() for column in columns), strict=True))

    def leader(self) -> int:
        """The best of those with most replications."""
        keys, most = self._keys(), self.n.max()
        return min((i for i in range(len(self.n)) if self.n[i] == most), key=lambda i: (keys[i], i))

    def ranking(self, leader: int) -> tuple[int, ...]:
        """All, the leader first, then by their means, paired with the leader's."""
        keys = self._keys(leader)
        return (leader, *sorted((i for i in range(len(self.n)) if i != leader), key=lambda i: (keys[i], -self.n[i], i)))

    def pilots(self, leader: int) -> list[int]:
        """Those that show how much differences to the leader scatter, near it and far from it."""
        others = self.ranking(leader)[1:]
        far = np.linspace(PILOTS, len(others) - 1, PILOTS).round().astype(int) if len(others) > 2 * PILOTS else ()
        return list(others if len(others) <= 2 * PILOTS else (*others[:PILOTS], *(others[i] for i in far)))

    def doubt(self, leader: int) -> float:
        """How plausible it is that the leader, which seems to keep all limits, exceeds one."""
        found = 0.0
        for c, allowed in enumerate(self.rule.allowed):
            mean, variance = self._moments(self._runs(c))
            if mean[leader] <= allowed and self.n[leader] > 1:
                freedom = (self.n - 1).astype(np.float64)
                found += 1.0 - float(_below(allowed, mean, variance, self.n, freedom)[leader])
        return found

    def plausible(self, leader: int) -> Real:
        """For each contestant how plausible it is that it beats the leader by more than the indifference."""
        objective = self._runs(-1)
        finite = np.all(np.isfinite(objective) | ~self.known, axis=1)
        others = np.arange(len(self.n)) != leader
        if finite[leader]:
            x = np.where(finite[:, None] & self.known, objective, 0.0)
            zone = self.rule.indifference * abs(float(x[leader, : self.n[leader]].mean()))
            p = np.where(finite, self._plausibly_below(-zone, x - x[leader], others & finite), 0.0)
            same = np.all((x == x[leader]) | ~self.known, axis=1)
            p = np.where(same & (self.n < TIES), np.maximum(p, 0.5**self.n), p)
        else:
            p = finite.astype(np.float64)
        for c, allowed in enumerate(self.rule.allowed):
            x = self._runs(c)
            no_worse = self._plausibly_below(0.0, x - x[leader], others)
            if float(x[leader, : self.n[leader]].mean()) > allowed:
                # Where even the leader exceeds the level, exceeding it less wins, whatever the objective.
                differs = np.any((x != x[leader]) & self.known, axis=1)
                p = np.where(differs, no_worse, p)
                break
            p = np.minimum(p, np.maximum(self._plausibly_below(allowed, x, others), no_worse))
        p[leader] = 0.0
        return p

    def _plausibly_below(self, level: float, x: Real, others: NDArray[np.bool_]) -> Real:
        """How plausible it is that each contestant's true mean of `x` is at most `level`; 1 where nothing is known.

        Only peers among `others` tell how much runs scatter.
        """
        mean, variance = self._moments(x)
        variance, worth = _moderated(mean - level, variance, self.n, others)
        return np.where(worth > 0.0, _below(level, mean, variance, self.n, np.maximum(worth, 1.0)), 1.0)


def _below(level: float, mean: Real, variance: Real, n: NDArray[np.int64], freedom: Real) -> Real:
    """How plausible it is that a true mean is at most `level`; sure where nothing varies."""
    from scipy.special import stdtr

    error = np.sqrt(variance / n)
    # What is only rounding apart does not vary.
    sure = error <= 1e-12 * np.maximum(np.abs(mean), abs(level))
    t = (level - mean) / np.where(sure, 1.0, error)
    return np.where(sure, (mean <= level).astype(np.float64), stdtr(freedom, t))


def _moderated(distance: Real, variance: Real, n: NDArray[np.int64], peers: NDArray[np.bool_]) -> tuple[Real, Real]:
    """Variances drawn towards what their peers lead to expect, and their degrees of freedom; 0 = nothing is known.

    Unchanged where there are few peers, or no variance. The peers' variances are taken as scaled inverse chi-square
    around the expected one; its degrees of freedom d0 and a common factor follow from mean and variance of
    log(s^2 / expected) (Smyth, 2004, section 6.2).
    """
    from scipy.special import digamma, polygamma

    freedom = (n - 1).astype(np.float64)
    known = peers & (variance > 0.0) & (n > 1)
    if known.sum() < PEERS:
        return variance, freedom
    expected = _trend(distance, variance, freedom, known)
    half = freedom[known] / 2.0
    logs = np.log(variance[known] / expected[known]) - digamma(half) + np.log(half)
    excess = float(logs.var(ddof=1) - polygamma(1, half).mean())
    worth = PEERS_WORTH if excess <= 0.0 else min(PEERS_WORTH, 2.0 * _inverse_trigamma(excess))
    expected = expected * float(np.exp(logs.mean() + digamma(worth / 2.0) - np.log(worth / 2.0)))
    moderated = (worth * expected + freedom * variance) / (worth + freedom)
    learns = known | (n == 1)
    return np.where(learns, moderated, variance), np.where(learns, freedom + worth, freedom)


def _trend(distance: Real, variance: Real, freedom: Real, known: NDArray[np.bool_]) -> Real:
    """The expected variance a + b distance^2, a and b >= 0, fitted to the known ones by iterated least squares.

    Weights are the reciprocals of a sample variance's own variance, 2 v^2 / freedom.
    """
    x, v = distance**2, variance[known]
    floor = 1e-3 * float(v.mean())
    a, b = float(np.average(v, weights=freedom[known])), 0.0
    for _ in range(TREND_STEPS):
        w = freedom[known] / np.maximum(a + b * x[known], floor) ** 2
        sw, sx, sxx = float(w.sum()), float(w @ x[known]), float(w @ x[known] ** 2)
        sv, sxv = float(w @ v), float(w @ (x[known] * v))
        spread = sw * sxx - sx * sx
        if spread <= 1e-9 * sw * sxx:
            a, b = sv / sw, 0.0
            break
        a, b = (sxx * sv - sx * sxv) / spread, (sw * sxv - sx * sv) / spread
        if b < 0.0:
            a, b = sv / sw, 0.0
        elif a < 0.0:
            a, b = 0.0, sxv / sxx
    return np.maximum(a + b * x, floor)


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

"""What to find out first: the value of knowing each unknown, by choosing anew among the settings already tried.

Where an unknown is known to have the value that it has in a draw, the fastest setting is taken that breaks no limit
there more than the choice without that knowledge; conditions of the stress set that only doubt it no longer count.
Settings are chosen on trial draws, and what is published comes from the plan's own fresh draws, so that luck in
choosing adds nothing. The choice without knowledge is made the same way. Numbers count as known to a third of their
range: perfect knowledge is worth at least as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.model.policy import Policy
from governor.model.prices import Prices
from governor.provider.probe import TAKES_S, foreseen_usd
from sim.experiment.information import Finding, mean_gain, narrowing
from sim.experiment.runs import PolicyKey, Tariff, key_of
from sim.scenario.scenario import Scenario
from sim.scenario.stress import Condition
from sim.scenario.unknowns import FRESH_SEEDS, Unknowns, drawn
from sim.selection.evidence import Evidence
from sim.selection.hardening import THROTTLE_NOISE, Hardening, Stress
from sim.selection.search import score_of

# Draws and seeds that settings are chosen by: neither the search nor what is published has seen them.
TRIAL_DRAWS, TRIAL_SEEDS, TRIALS = 500, 750_000, 48
# Settings that are chosen from, at the least where runs are dear.
CANDIDATES = (3, 10)
# A setting takes the place of another where it is faster by so many standard errors.
PLAINLY = 2.0
# Less than this share of the mean time is not worth a question.
WORTH = 0.01
# The probability that noise alone makes any of the findings.
NOISE = 0.05
SHOWN = 3
# So many requests of the batch tell latency, lengths and neighbours well enough.
_FIRST = 100

PROBE, CALIBRATE, OUTPUTS = "paceline probe", "paceline calibrate", "--outputs-from"

# Columns of outcomes, one row per draw; losses and throttles beyond the limits.
OBJECTIVE, MAKESPAN, _LOST, _THROTTLED = range(4)
_Outcomes = NDArray[np.float64]
Cuts = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """One thing that is not known, as "Knowing ..." goes on.

    `value`: what it is in a drawn condition, None = not drawn. `fields`: of the provider, in which
    conditions of the stress set differ that only doubt this one. `if_so`: it is known only as a condition that does not
    hold, for which there are no odds.
    """

    name: str
    command: str
    value: Callable[[Scenario], Any] | None = None
    fields: tuple[str, ...] = ()
    if_so: bool = False


UNKNOWNS = (
    Unknown("the charge rule", PROBE, lambda s: s.provider.charge_rule, ("charge_rule",)),
    Unknown("whether unused tokens come back", PROBE, lambda s: s.provider.settles, ("settles",)),
    Unknown("what share of the quota others use", CALIBRATE, lambda s: float(s.provider.cotenant.share)),
    Unknown("how fast the provider answers", CALIBRATE, lambda s: math.log(s.provider.latency.scale)),
    Unknown("how long the answers are", OUTPUTS, lambda s: math.log(max(1.0, float(s.workload.output_tokens.sum())))),
    Unknown("that no slices of a second are enforced", PROBE, None, ("slice_s",), True),
    Unknown("that the limit refills continuously", PROBE, None, ("window",), True),
)
# All that one command tells is worth a word where it is worth so many times the best of it alone.
MORE = 1.1


class Information:
    """The questions of one plan. `hardening`: the search that found `best`, with all that it tried.

    `fresh`: the plan's own draws; `most`: runs that may be spent on choosing.
    """

    def __init__(
        self, evidence: Evidence, hardening: Hardening, best: Policy, *, fresh: Sequence[Condition], most: int
    ) -> None:
        self.evidence = evidence
        self.hardening = hardening
        self.best = best
        self.scenario = evidence.searcher.scenario
        self.conditions = evidence.stress.conditions
        self.fresh = Stress(fresh, hardening.stress.goal, hardening.stress.runs, 1, FRESH_SEEDS)
        self.most = most

    def findings(self, unknowns: Unknowns, costs: Costs) -> tuple[Finding, ...]:
        """Return the unknowns that are worth a question, the best first, at most SHOWN."""
        asked = [each for each in UNKNOWNS if self._is_open(each)]
        probed = [each for each in asked if each.command == PROBE]
        asked += [_together(probed)] if len(probed) > 1 else []
        if not asked or len(self.fresh.conditions) < 2:
            return ()
        base, choices = self._chosen(asked, unknowns)
        before = self._under([base] * len(self.fresh.conditions))
        level = NOISE / (2 * len(asked))
        found = [self._finding(each, base, before, *choices.get(each.name, ((), {})), level) for each in asked]
        if len(probed) > 1:
            found = _told_once(found[:-1], found[-1])
        worth = sorted((each for each in found if each.worth_s > 0.0), key=lambda each: -each.worth_s)
        return tuple(costs.added(each) for each in worth[:SHOWN])

    def _is_open(self, unknown: Unknown) -> bool:
        return len(set(_values(unknown, self.fresh.conditions))) > 1 or len(self._rows(unknown)) < len(self.conditions)

    def _rows(self, unknown: Unknown | None) -> list[int]:
        """Return the listed conditions that remain when it is known: all but those that only doubt it."""
        here, fields = self.scenario.provider, () if unknown is None else unknown.fields
        providers = [condition.scenario.provider for condition in self.conditions]
        return [i for i, p in enumerate(providers) if all(getattr(p, f) == getattr(here, f) for f in fields)]

    # ------------------------------------------------------------ which settings

    def _admissible(self, unknown: Unknown | None) -> list[Policy]:
        """Return settings that break no limit more than `best`, as assumed and in these conditions, fastest first."""
        # The search's own stress set begins with the listed conditions.
        h, rows = self.hardening, self._rows(unknown)
        (lost, throttled), own = h.stress.violations(self.best, rows), h.searcher.score(self.best, h.seeds)
        found = []
        for policy in h.tried.values():
            other, score = h.stress.violations(policy, rows), h.searcher.score(policy, h.seeds)
            if other[0] <= lost and other[1] <= throttled + THROTTLE_NOISE and score[:2] <= own[:2]:
                found.append((score[2], policy))
        return [policy for _, policy in sorted(found, key=lambda each: each[0])]

    def _chosen(
        self, asked: Sequence[Unknown], unknowns: Unknowns
    ) -> tuple[Policy, dict[str, tuple[Cuts, dict[Any, Policy]]]]:
        """Return the choice without knowledge and, by unknown, where its range is cut and the choice in each part."""
        stress = self.hardening.stress
        allowed = {each.name: self._admissible(each) for each in asked} | {"": self._admissible(None)}
        wanted = [self.best, *allowed[""][:1]]
        for unknown in asked:
            mine = allowed[unknown.name]
            wanted += mine[:1]
            # The fastest where it is otherwise than assumed.
            for row in sorted({*range(len(self.conditions))} - {*self._rows(unknown)}):
                wanted += sorted(mine, key=lambda p: score_of(stress.figures(p, row), stress.goal))[:1]
        candidates = list({key_of(policy): policy for policy in wanted}.values())
        trials = min(TRIALS, self.most // CANDIDATES[0])
        candidates = candidates[: min(CANDIDATES[1], self.most // trials)]
        if len(candidates) < 2:
            return self.best, {}
        draws = drawn(self.scenario, unknowns, range(TRIAL_DRAWS, TRIAL_DRAWS + trials))
        trial = Stress(draws, stress.goal, stress.runs, 1, TRIAL_SEEDS)
        trial.run(candidates)
        outcomes = {key_of(policy): _outcomes(trial, [policy] * trials) for policy in candidates}

        def choice(name: str, base: Policy, here: NDArray[np.bool_]) -> Policy:
            keys = {key_of(policy) for policy in allowed[name]}
            return _choice([p for p in candidates if key_of(p) in keys], outcomes, base, here)

        base = choice("", self.best, np.ones(trials, dtype=np.bool_))
        choices: dict[str, tuple[Cuts, dict[Any, Policy]]] = {}
        for unknown in asked:
            values = _values(unknown, draws)
            cuts = tuple(np.quantile(values, [1 / 3, 2 / 3])) if isinstance(values[0], float) else ()
            parts = _parts(values, cuts)
            picks = {part: choice(unknown.name, base, np.array([each == part for each in parts])) for part in {*parts}}
            choices[unknown.name] = cuts, picks
        return base, choices

    # ------------------------------------------------------------ what that is worth

    def _finding(
        self,
        unknown: Unknown,
        base: Policy,
        before: _Outcomes,
        cuts: Cuts,
        picks: Mapping[Any, Policy],
        level: float,
    ) -> Finding:
        values = _values(unknown, self.fresh.conditions)
        policies = [picks.get(part, base) for part in _parts(values, cuts)]
        after = self._under(policies)
        if not _no_worse(after, before) or not self._keeps(unknown, policies, base):
            after = before
        sooner = mean_gain(before[:, OBJECTIVE] - after[:, OBJECTIVE], level)
        narrower = None
        if unknown.value is not None:
            narrower = narrowing(before[:, MAKESPAN], after[:, MAKESPAN], values, level, self.scenario.seed)
        least_s, least = WORTH * before[:, MAKESPAN].mean(), WORTH * before[:, OBJECTIVE].mean()
        return Finding(
            unknown=unknown.name,
            sooner=sooner if sooner and sooner.mean_s >= least else None,
            narrower=narrower if narrower and narrower.mean_s >= least_s else None,
            if_so=unknown.if_so,
            command=unknown.command,
        )

    def _under(self, policies: Sequence[Policy]) -> _Outcomes:
        """Run a setting in each of the fresh draws."""
        fresh = self.fresh
        fresh.runs.require(
            (condition, policy, [condition.scenario.seed + fresh.first])
            for condition, policy in zip(fresh.conditions, policies, strict=True)
        )
        return _outcomes(fresh, policies)

    def _keeps(self, unknown: Unknown, policies: Sequence[Policy], base: Policy) -> bool:
        """Whether, in the conditions that remain, the settings break no limit more than `base` on fresh seeds."""
        stress = self.evidence.stress
        for policy in {key_of(policy): policy for policy in policies}.values():
            for row in self._rows(unknown):
                (lost, throttled), (least, less) = stress.score(policy, row), stress.score(base, row)
                if (lost, throttled) > (least, less + THROTTLE_NOISE):
                    return False
        return True


def _together(unknowns: Sequence[Unknown]) -> Unknown:
    """Treat what one command tells as one unknown: a setting that one doubt forbids another may forbid as well."""
    *names, last = [each.name for each in unknowns]
    values = [each.value for each in unknowns if each.value is not None]
    return Unknown(
        f"{', '.join(names)} and {last}",
        unknowns[0].command,
        (lambda s: " ".join(str(value(s)) for value in values)) if values else None,
        tuple(field for each in unknowns for field in each.fields),
        any(each.if_so for each in unknowns),
    )


def _told_once(parts: Sequence[Finding], together: Finding) -> list[Finding]:
    """Either what a command tells all at once, or its parts."""
    mine = [each for each in parts if each.command == together.command]
    if together.worth_s <= MORE * max(each.worth_s for each in mine):
        return list(parts)
    return [together, *(each for each in parts if each not in mine)]


def _values(unknown: Unknown, draws: Sequence[Condition]) -> list[Any]:
    return [None if unknown.value is None else unknown.value(each.scenario) for each in draws]


def _parts(values: Sequence[Any], cuts: Cuts) -> list[Any]:
    """Return each number as the number of the part of the range that holds it, and labels as they are."""
    return [int(np.searchsorted(cuts, value)) for value in values] if cuts else list(values)


def _outcomes(stress: Stress, policies: Sequence[Policy]) -> _Outcomes:
    """Run a setting once in each of the conditions; shape (conditions, 4)."""
    rows = []
    for row, policy in enumerate(policies):
        (run,) = stress.figures(policy, row)
        lost, throttled, objective = score_of([run], stress.goal)
        rows.append((objective, run["makespan_s"], lost, throttled))
    return np.array(rows, dtype=np.float64)


def _no_worse(outcomes: _Outcomes, others: _Outcomes) -> bool:
    """Return whether the limits are broken no more often, over all draws."""
    more = outcomes[:, _LOST:].sum(axis=0) - others[:, _LOST:].sum(axis=0)
    return bool(more[0] <= 1e-12 and more[1] <= THROTTLE_NOISE)


def _choice(
    policies: Sequence[Policy], outcomes: Mapping[PolicyKey, _Outcomes], base: Policy, here: NDArray[np.bool_]
) -> Policy:
    """Return the setting that beats `base` by most in these draws, plainly, and breaks no limit more; else `base`."""
    mine, best, most_s = outcomes[key_of(base)][here], base, 0.0
    for policy in policies:
        other = outcomes[key_of(policy)][here]
        gains = mine[:, OBJECTIVE] - other[:, OBJECTIVE]
        if len(gains) < 2 or not np.isfinite(gains).all() or not _no_worse(other, mine):
            continue
        mean_s = float(gains.mean())
        if mean_s > most_s and mean_s > PLAINLY * float(gains.std(ddof=1)) / len(gains) ** 0.5:
            best, most_s = policy, mean_s
    return best


# ---------------------------------------------------------------- what an answer costs


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of answers: `makespan_s` of the batch, its tariff, and the price of its model, if known."""

    scenario: Scenario
    makespan_s: float
    tariff: Tariff | None
    prices: Prices | None

    def added(self, finding: Finding) -> Finding:
        """Return the finding with what its command costs."""
        if finding.command == PROBE:
            return replace(finding, cost_usd=self._probe_usd(), takes_s=TAKES_S)
        n = len(self.scenario.workload)
        usd = None if self.tariff is None else self.tariff.answers_usd * min(1.0, _FIRST / n)
        takes_s = self.makespan_s * min(1.0, _FIRST / n)
        return replace(finding, requests=min(n, _FIRST), cost_usd=usd, takes_s=(takes_s, takes_s))

    def _probe_usd(self) -> float | None:
        provider, model = self.scenario.provider, self.scenario.workload.model(0)
        price = None if self.prices is None else self.prices.of(model, date.max)
        return None if price is None else foreseen_usd(price, provider.tpm, provider.rpm, provider.charge_rule)

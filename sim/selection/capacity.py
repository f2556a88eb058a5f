"""The inverse question: which limit, or which published tier, is needed to finish by then, and how many requests fit?

A limit meets the deadline if at least a share `confidence` of all runs would end in time, and none of those made loses
a request. It is looked for by bisection, on a logarithmic scale, between

* the limit below which no scheduler could be in time, or the largest request never run: max(largest charge,
  sum of charges / (minutes + 1)), since a bucket gives its capacity once and refills by that per minute; and
* the limit above which the provider's tokens never bind: the whole batch at once. What does not end in time there ends
  in time nowhere: then something else holds the batch back, and the result says what.

A limit meets it where so few of its runs are late that Clopper and Pearson's lower 95 % limit of the share in time is
not below `confidence`, and is dropped as soon as more are. At each limit the settings are tuned anew, unless they are
to stay as they are; settings that suit a limit are tried at the next one as well. All limits are compared under the
same seeds, so that more tokens per minute hardly ever make a run longer.

What was chosen on some seeds looks better on them than it is. So limit and settings are then confirmed on as many runs
that nothing was chosen by; a limit that fails is raised, by twice as much each time, and confirmed on seeds of its own.
Only these runs are published.

How many requests fit under the present limits is the same bisection over their number: rows are drawn from the workload
with replacement, keyed by row, so that a smaller batch is the beginning of a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import numpy as np

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from sim.experiment.experiment import Case, Pool, case_of
from sim.experiment.parallel import WorkersLost
from sim.experiment.results import CONFIDENCE, Figures, Forecast, at_most, forecast_of
from sim.experiment.runs import Runs, key_of
from sim.model.provider_tiers import DEFAULT_TIER, published_tiers, tier_of, tier_preset
from sim.model.synthetic import resampled
from sim.scenario.scenario import Scenario, limits_of
from sim.scenario.stress import Condition
from sim.selection.capacity_results import BOUND, LARGEST, SETTINGS, TAIL, Capacity, DecidedBy, HowMany, LimitProbe
from sim.selection.search import Goal, Searcher
from sim.selection.space import full_anchors, full_space, recipe

# Limits closer than this are one: no provider grants 41,237 tokens per minute.
RESOLUTION = 0.01
# By how much a limit that is not confirmed is raised at first, and how often: to three times as much at the most.
RAISE = 0.02
RAISES = 7
_FRESH_SEEDS = 1_000_000
# Runs per limit: as many as simulated requests allow, at least what it takes to show the share that is asked for.
RUNS_MOST, RUNS_REQUESTS, RUNS_ASKED_MOST = 200, 60_000, 3_000
# A constraint within so much of the answer decides it.
DECIDES_RATIO = 0.05
# Runs are made in so many parts, so that a hopeless limit is dropped early.
_PARTS = 4
# For a progress bar: about so many pairs of limits are tried in full, with so many runs to tune the settings at each.
PROBES_FORESEEN, TUNING_RUNS = 12, 150
# Limits that are tried for the figure alone, and how far they reach beyond the answer.
GRID, GRID_REACH = 7, 4.0
# Settings for a batch of unknown size are found on one of at most so many requests.
EFFORT_REQUESTS = 1_000
# The largest batch that is tried for how many requests fit.
REQUESTS_MOST = 1_000_000


def at_limits(scenario: Scenario, tpm: int, rpm: int) -> Scenario:
    """Return the scenario on a provider with these limits (0 = none), the policy's own limits following."""
    provider = scenario.provider.with_(tpm=tpm, rpm=rpm)
    return scenario.with_(provider=provider, policy=scenario.policy.with_(**limits_of(provider)))


class How(TypedDict, total=False):
    """The method of an answer; see `Search`."""

    confidence: float
    replications: int
    retune: bool
    pool: Pool | None
    say: Callable[[str], None]


class Search:
    """Probes of one scenario against one deadline.

    `confidence`: share of the runs that must be in time. `replications`: runs per limit at the least; see `runs_of`.
    `retune`: find the settings anew at each limit, else they stay but for the limits. `say` is told what goes on.
    """

    goal = Goal()
    figure = "makespan_s"

    def __init__(
        self,
        scenario: Scenario,
        finish_by_s: float,
        *,
        confidence: float = 0.95,
        replications: int = 0,
        retune: bool = True,
        pool: Pool | None = None,
        say: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.scenario = scenario
        self.finish_by_s = finish_by_s
        self.confidence = confidence
        self.replications = runs_of(len(scenario.workload), confidence, replications)
        self.retune = retune
        self.pool = pool or Pool()
        self.say = say
        self.late_allowed = 0
        while at_most(self.late_allowed + 1, self.replications) <= 1.0 - confidence:
            self.late_allowed += 1
        self.confirmations = 0
        self.probes: dict[int, LimitProbe] = {}
        # The settings that suited each pair of limits, the best first.
        self.suited: dict[tuple[int, int], list[Policy]] = {}

    def in_time(self, run: Figures) -> bool:
        """Return whether a run ended in time and lost nothing."""
        return run["failed"] == 0 and run["makespan_s"] <= self.finish_by_s

    def made(self, case: Case, seeds: range) -> list[Figures]:
        """Return the runs of a case."""
        return self.pool.run([(case, seeds)])[0]

    def forecast(self, policy: Policy, runs: Sequence[Figures]) -> Forecast:
        """Return the runs of one probe together."""
        return forecast_of(policy, runs)

    def suited_to(self, scenario: Scenario) -> list[Policy]:
        """Return the settings for a scenario at its limits, the best first: its own alone, or those found for it."""
        if not self.retune:
            return [scenario.policy]
        limits = scenario.provider.tpm, scenario.provider.rpm
        if limits not in self.suited:
            near = sorted(self.suited.items(), key=lambda item: abs(math.log((item[0][0] or 1) / (limits[0] or 1))))
            first = [policies[0].with_(**limits_of(scenario.provider)) for _, policies in near[:2]]
            self.suited[limits] = tuned(scenario, self.goal, pool=self.pool, first=first)
        return self.suited[limits]

    def probe(self, tpm: int, rpm: int, *, whole: bool = False) -> LimitProbe:
        """Run one pair of limits over the replications; stop early if too many are late, unless `whole`."""
        scenario = at_limits(self.scenario, tpm, rpm)
        return self.best_tried(scenario, self.suited_to(scenario), whole=whole)

    def confirmed(
        self, scenario: Scenario, policies: list[Policy], *, name: str = "", whole: bool = False
    ) -> LimitProbe:
        """Run a scenario under what is best on the search's seeds, on seeds of its own; only as searched if it misses.

        With `whole` all these runs are made, however many are late.
        """
        searched = self.best_tried(scenario, policies)
        if not (searched.meets or whole):
            return replace(searched, name=name)
        return self.tried(scenario.with_(policy=searched.forecast.policy), fresh=True, name=name, whole=whole)

    def best_tried(self, scenario: Scenario, policies: list[Policy], **how: Any) -> LimitProbe:
        """Run a scenario under the first of these settings that meets the deadline, and put that one first among them.

        The others are tried only where the first loses requests: a few runs do not show that to who tunes, and it says
        nothing against the limit. Where none meets it: the first one's probe.
        """
        first = found = self.tried(scenario.with_(policy=policies[0]), **how)
        for policy in policies[1:]:
            if found.meets or not first.forecast.lost:
                break
            found = self.tried(scenario.with_(policy=policy), **how)
            if found.meets:
                policies.remove(policy)
                policies.insert(0, policy)
        return found if found.meets else first

    def tried(self, scenario: Scenario, *, fresh: bool = False, name: str = "", whole: bool = False) -> LimitProbe:
        """Run a scenario over the replications; stop early if too many are late, unless `whole`."""
        case = case_of(scenario)
        start, wanted = scenario.seed, self.replications
        if fresh:
            start += _FRESH_SEEDS + self.confirmations * wanted
            self.confirmations += 1
        runs: list[Figures] = []
        step = math.ceil(wanted / _PARTS)
        while len(runs) < wanted:
            done = len(runs)
            runs += self.made(case, range(start + done, start + min(done + step, wanted)))
            if sum(not self.in_time(run) for run in runs) > self.late_allowed and not whole:
                break
        on_time = sum(self.in_time(run) for run in runs)
        return LimitProbe(
            tpm=scenario.provider.tpm,
            rpm=scenario.provider.rpm,
            on_time=on_time,
            meets=len(runs) == wanted and wanted - on_time <= self.late_allowed and not _lost(runs),
            forecast=self.forecast(scenario.policy, runs),
            name=name,
        )

    def bracket(self) -> tuple[int, int]:
        """Return the limit below which no run can be in time, and the one above which tokens never bind."""
        columns, provider = self.scenario.columns(), self.scenario.provider
        low = float(columns.charge.max(initial=1.0))
        # Tokens handed back, or a limit that rises in mid-run, would let more through than this.
        if not provider.settles and all(change.factor <= 1.0 for change in provider.limit_changes):
            low = max(low, self.fluid_tpm())
        usable = 1.0 - self.scenario.policy.tpm_headroom
        high = max(float(columns.charge.sum()), float(columns.reserve.sum())) / usable
        return max(1, math.floor(low)), max(math.ceil(high), math.ceil(low) + 1)

    def fluid_tpm(self) -> float:
        """Return the tokens per minute without which no scheduler could do it."""
        return float(self.scenario.columns().charge.sum()) / (self.finish_by_s / 60.0 + 1.0)

    def decided(self, smallest: LimitProbe) -> DecidedBy:
        """Return what decides the answer: the largest request, any schedule's bound, the tail of runs, or settings."""
        policy, wish_s = smallest.forecast.policy, self.finish_by_s
        columns = at_limits(self.scenario, smallest.tpm, smallest.rpm).columns(policy)
        reserved = float(columns.reserve.max(initial=0.0)) / (1.0 - policy.tpm_headroom)
        largest, bound = max(float(columns.charge.max(initial=0.0)), reserved), self.bound_tpm()
        measured = smallest.forecast[self.figure]
        by = SETTINGS
        if largest >= smallest.tpm * (1.0 - DECIDES_RATIO):
            by = LARGEST
        elif bound >= smallest.tpm * (1.0 - DECIDES_RATIO):
            by = BOUND
        elif measured.p50 <= wish_s * (1.0 - DECIDES_RATIO):
            by = TAIL
        return DecidedBy(by, largest, bound, measured.p50, measured.p95)

    def bound_tpm(self) -> float:
        """Return `fluid_tpm` by real use, where the provider hands back the rest; 0 where the limit rises."""
        provider, columns = self.scenario.provider, self.scenario.columns()
        if any(change.factor > 1.0 for change in provider.limit_changes):
            return 0.0
        if not provider.settles:
            return self.fluid_tpm()
        used = columns.prompt_tokens + np.where(
            columns.cap < 0, columns.output_tokens, np.minimum(columns.output_tokens, columns.cap)
        )
        return self.fluid_tpm() * float(used.sum()) / float(columns.charge.sum())

    def smallest(self, low: int, high: int) -> LimitProbe | None:
        """Return the smallest limit that meets the deadline under fresh seeds as well; None if `high` does not."""
        rpm = self.scenario.provider.rpm
        while high > math.ceil(low * (1.0 + RESOLUTION)):
            middle = min(high - 1, max(low + 1, rounded_up(math.sqrt(low * high))))
            self.say(f"trying {middle:,} tokens per minute")
            self.probes[middle] = self.probe(middle, rpm)
            low, high = (low, middle) if self.probes[middle].meets else (middle, high)
        tpm, step = rounded_up(high), RAISE
        for _ in range(RAISES):
            self.say(f"confirming {tpm:,} tokens per minute on fresh seeds")
            scenario = at_limits(self.scenario, tpm, rpm)
            found = self.confirmed(scenario, self.suited_to(scenario))
            if found.meets:
                return found
            self.probes[tpm] = found
            tpm, step = rounded_up(tpm * (1.0 + step)), 2.0 * step
        return None

    def grid(self, around: int) -> None:
        """Run limits around an answer in full, for the figure."""
        first = max(float(self.scenario.columns().charge.max(initial=1.0)), around / 2.0)
        steps = [first * (GRID_REACH * around / first) ** (i / (GRID - 1)) for i in range(GRID)]
        for tpm in sorted({rounded_up(step) for step in steps} | set(self.probes)):
            before = self.probes.get(tpm)
            if (before is None or before.runs < self.replications) and first <= tpm <= GRID_REACH * around:
                self.say(f"drawing {tpm:,} tokens per minute")
                self.probes[tpm] = self.probe(tpm, self.scenario.provider.rpm, whole=True)

    def how_many(self) -> HowMany:
        """Return the largest batch that is done in time; see `how_many`."""
        scenario = self.scenario
        probes: dict[int, LimitProbe] = {}
        policies = [scenario.policy]
        low, high = 0, min(REQUESTS_MOST, self._fluid_requests())
        if self.retune:
            self.say("tuning the settings")
            policies = self.suited_to(self._resized(min(high, EFFORT_REQUESTS)))

        def probe(n: int) -> LimitProbe:
            self.say(f"trying {n:,} requests")
            return self.best_tried(self._resized(n), policies)

        probes[high] = probe(high)
        if probes[high].meets:
            low = high
        while high - low > max(1, math.floor(RESOLUTION * low)):
            middle = (low + high) // 2 if low == 0 else min(high - 1, max(low + 1, round(math.sqrt(low * high))))
            probes[middle] = probe(middle)
            low, high = (middle, high) if probes[middle].meets else (low, middle)
        most: LimitProbe | None = None
        step = RAISE
        for _ in range(RAISES):
            if low < 1:
                break
            self.say(f"confirming {low:,} requests on fresh seeds")
            found = self.confirmed(self._resized(low), policies)
            if found.meets:
                most = found
                break
            probes[low] = found
            low, step = min(low - 1, math.floor(low / (1.0 + step))), 2.0 * step
        above = [p for n, p in sorted(probes.items()) if not p.meets and n > (most.forecast.requests if most else 0)]
        everything = tuple(p for _, p in sorted(probes.items()))
        return HowMany(self.finish_by_s, self.confidence, self.retune, most, above[0] if above else None, everything)

    def _resized(self, n: int) -> Scenario:
        return self.scenario.with_(workload=resampled(self.scenario.workload, n, self.scenario.seed))

    def _fluid_requests(self) -> int:
        """Return a bound: no scheduler can finish more requests than this by then."""
        provider, minutes = self.scenario.provider, self.finish_by_s / 60.0 + 1.0
        if provider.settles or any(change.factor > 1.0 for change in provider.limit_changes):
            return REQUESTS_MOST
        # The sample's mean may be above that of the rows drawn.
        mean = float(self.scenario.columns().charge.mean())
        most = [1.1 * provider.tpm * minutes / mean] if provider.tpm and mean > 0.0 else []
        most += [provider.rpm * minutes] if provider.rpm else []
        return max(1, math.ceil(min(most, default=REQUESTS_MOST)))

    def tiers(self, model: str) -> tuple[list[LimitProbe], list[str]]:
        """Return the model's tiers up to one that meets the deadline, and those that no request fits into."""
        largest = float(self.scenario.charges().max(initial=0.0))
        tried: list[LimitProbe] = []
        too_small: list[str] = []
        for name, tier in published_tiers(self.scenario.provider.profile).items():
            if tier.model != model:
                continue
            limits = tier_preset(name, self.scenario.provider.profile)
            tpm, rpm = limits.get("tpm", 0), limits.get("rpm", 0)
            if 0 < tpm < largest:
                too_small.append(name)
                continue
            self.say(f"trying {name}")
            scenario = at_limits(self.scenario, tpm, rpm)
            tried.append(self.confirmed(scenario, self.suited_to(scenario), name=name))
            if tried[-1].meets:
                break
        return tried, too_small


def rounded_up(value: float, digits: int = 3) -> int:
    """Return a whole number of so many significant digits, not below `value`."""
    step = 10 ** max(0, math.floor(math.log10(max(1.0, value))) - digits + 1)
    return math.ceil(value / step - 1e-9) * step


def model_of(scenario: Scenario, model: str = "") -> str:
    """Whose tiers to try: the named model's, else the provider preset's, else the workload's, else the default's."""
    known = dict.fromkeys(tier.model for tier in published_tiers(scenario.provider.profile).values())
    if model:
        if model not in known:
            raise BadSetting(f"there are no published tiers of {model!r}: use one of {', '.join(known)}", "--tiers")
        return model
    if scenario.provider.preset:
        return tier_of(scenario.provider.preset, scenario.provider.profile).model
    named = scenario.workload.models
    return named if isinstance(named, str) and named in known else tier_of(DEFAULT_TIER).model


def runs_of(requests: int, confidence: float = CONFIDENCE, least: int = 0) -> int:
    """Return the runs per limit for that many requests: `least`, or as many as show that share in time."""
    # So many without a late one: 59 for a share of 0.95.
    needed = math.ceil(math.log(1.0 - CONFIDENCE) / math.log(confidence)) if confidence < 1.0 else RUNS_ASKED_MOST
    return max(least, min(RUNS_ASKED_MOST, needed), min(RUNS_MOST, RUNS_REQUESTS // max(1, requests)))


def capacity(
    scenario: Scenario, finish_by_s: float, *, model: str = "", grid: bool = False, **how: Unpack[How]
) -> Capacity:
    """Return the smallest limit of tokens per minute and the smallest published tier that finish the scenario in time.

    The limit of requests per minute stays as it is but for tiers, which bring their own. Requests that are charged more
    than the scenario's present limit are no error here: the limit is what is asked for. `grid`: try more limits around
    the answer, for a figure. `how`: see `Search`.
    """
    return found_by(Search(scenario, finish_by_s, **how), model_of(scenario, model), grid=grid)


def found_by(search: Search, model: str, *, grid: bool = False, **more: Any) -> Capacity:
    """Return the answer of a search. `more`: further fields of `Capacity`."""
    low, high = search.bracket()
    search.say("trying without a limit that binds")
    try:
        free = at_limits(search.scenario, high, search.scenario.provider.rpm)
        unlimited = search.confirmed(free, search.suited_to(free))
        smallest = search.smallest(low, high) if unlimited.meets else None
        tried, too_small = search.tiers(model)
    except WorkersLost as lost:
        known = [f"{tpm:,} {'meets it' if p.meets else 'misses it'}" for tpm, p in sorted(search.probes.items())]
        raise WorkersLost(f"{lost}; tokens per minute tried so far: {', '.join(known) or 'none'}") from None
    missed = [p for tpm, p in sorted(search.probes.items()) if not p.meets and (not smallest or tpm < smallest.tpm)]
    if grid and smallest:
        search.grid(smallest.tpm)
    return Capacity(
        finish_by_s=search.finish_by_s,
        confidence=search.confidence,
        replications=search.replications,
        model=model,
        smallest=smallest,
        # Of the limits that missed, the nearest below the answer tells how sharp it is.
        below=missed[-1] if missed else None,
        unlimited=unlimited,
        tier=next((probe for probe in tried if probe.meets), None),
        tiers=tuple(tried),
        too_small_tiers=tuple(too_small),
        probes=tuple(probe for _, probe in sorted(search.probes.items())),
        tuned=search.retune,
        decided=None if smallest is None else search.decided(smallest),
        **more,
    )


def how_many(scenario: Scenario, finish_by_s: float, **how: Unpack[How]) -> HowMany:
    """Return how many requests like the scenario's finish by then under its limits. `how`: see `Search`."""
    return Search(scenario, finish_by_s, **how).how_many()


def _lost(runs: Sequence[Figures]) -> bool:
    return any(run["failed"] > 0 for run in runs)


# ---------------------------------------------------------------- settings tuned to a limit


# Simulated requests per limit, at most about; half of them for the race that comes first.
_EFFORT = 400_000
# Runs of one setting, at most.
SEEDS = 4
# Settings that are handed on.
SPARE = 4


def tuned(scenario: Scenario, goal: Goal, *, pool: Pool, first: Sequence[Policy] = ()) -> list[Policy]:
    """Return settings that do well in the scenario, best first by the seeds tried.

    That one is at least as good there as the scenario's own settings and those of `first`, which suited limits nearby;
    but a few runs say little of rare losses, and those that come after it are there for them.
    """
    requests = len(scenario.workload)
    searcher = Searcher(Condition("", scenario), goal.allowing(1, requests), Runs(pool), _EFFORT)
    affordable = max(2, _EFFORT // (2 * SEEDS * max(1, requests)))
    field = [scenario.policy, *first, *[recipe(scenario), *full_anchors(scenario)][:affordable]]
    ranked, _ = searcher.race(field, SEEDS)
    best = searcher.climb(ranked[0], full_space(scenario).neighbours, SEEDS)
    others = [policy for policy in ranked if key_of(policy) != key_of(best)]
    return [best, *others[: SPARE - 1]]

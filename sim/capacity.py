"""The inverse question: which limit, or which published tier, is needed to finish by then?

What lives here: the search for the smallest limit over replications, and its result. What must not: settings (they stay
as they are, but for the limits, which follow; `plan` looks for better ones) and text for people (`shown`).

A limit meets the deadline if at least a share `confidence` of the runs ends in time and none of them loses a request.
All limits are compared under the same seeds, so the runs that are late at one limit are mostly those that are late at
the next, and more tokens per minute hardly ever make a run longer. That makes the question one of bisection, on a
logarithmic scale, between

* the limit below which no scheduler could be in time, or the largest request never run: max(largest charge,
  sum of charges / (minutes + 1)), since a bucket gives its capacity once and refills by that per minute; and
* the limit above which the provider's tokens never bind: the whole batch at once. What does not end in time there ends
  in time nowhere: then some other knob holds the batch back, and the result says which.

The limit that is found is tried again under fresh seeds, which nothing was chosen by, and raised step by step until it
holds there; only these runs are published. A limit is stopped early when more of its runs were late than are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from governor.errors import BadSetting
from sim.experiment import Pool, case_of
from sim.presets import DEFAULT_TIER, TIERS, tier_names, tier_preset
from sim.results import Figures, Forecast, at_most, forecast_of
from sim.scenario import Scenario

# Limits closer than this are one: nobody is granted 41,237 tokens per minute.
RESOLUTION = 0.01
# The step by which a limit that fails under fresh seeds is raised, and how often.
RAISE = 1.02
RAISES = 40
FRESH_SEEDS = 1_000_000
# Runs are made in so many parts, so that a hopeless limit is dropped early.
PARTS = 4
# Runs per limit: 60 in time are needed to know that 95 % are, at 95 % confidence; large workloads get fewer.
RUNS_MOST, RUNS_LEAST, RUNS_REQUESTS = 60, 20, 30_000
# About so many pairs of limits are tried in full, for a progress bar.
PROBES_FORESEEN = 12


@dataclass(frozen=True, slots=True)
class Probe:
    """One pair of limits that was tried: so many of its runs ended in time without losing anything.

    `forecast`: of the runs that were made; fewer than wanted where the limit was dropped early. `name`: a tier's.
    """

    tpm: int
    rpm: int
    on_time: int
    meets: bool
    forecast: Forecast = field(repr=False)
    name: str = ""

    @property
    def runs(self) -> int:
        """How many runs were made."""
        return len(self.forecast.runs)

    @property
    def on_time_at_least(self) -> float:
        """Lower 95 % limit of the probability that a run ends in time."""
        return 1.0 - at_most(self.runs - self.on_time, self.runs)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        e = self.forecast["makespan_s"]
        found: dict[str, Any] = {"name": self.name} if self.name else {}
        return found | {
            "tpm": self.tpm,
            "rpm": self.rpm,
            "meets": self.meets,
            "runs": self.runs,
            "on_time": self.on_time,
            "on_time_probability_at_least": self.on_time_at_least,
            "makespan_s": {name: getattr(e, name) for name in ("mean", "low", "high", "p5", "p50", "p95", "n")},
            "throttled_per_100": self.forecast["throttled_per_100"].mean,
            "lost": self.forecast.lost,
        }


@dataclass(frozen=True, slots=True)
class Capacity:
    """What is needed to finish by `finish_by_s`. `smallest`: None where no limit is enough; then see `unlimited`.

    `unlimited`: the probe whose limit never binds. `below`: the largest limit that was seen to miss. `tiers`: those of
    `model` from the first one up to the one that meets it, `tier`. `probes`: all limits of the search, by size.
    """

    finish_by_s: float
    confidence: float
    replications: int
    model: str
    smallest: Probe | None
    below: Probe | None
    unlimited: Probe
    tier: Probe | None
    tiers: tuple[Probe, ...]
    too_small_tiers: tuple[str, ...]
    probes: tuple[Probe, ...]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "finish_by_s": self.finish_by_s,
            "confidence": self.confidence,
            "replications": self.replications,
            "smallest_tpm": self.smallest.tpm if self.smallest else None,
            "smallest_tier": self.tier.name if self.tier else None,
            "smallest": self.smallest.to_json_dict() if self.smallest else None,
            "largest_that_misses": self.below.to_json_dict() if self.below else None,
            "unlimited": self.unlimited.to_json_dict(),
            "tier_model": self.model,
            "tiers": [probe.to_json_dict() for probe in self.tiers],
            "tiers_below_the_largest_request": list(self.too_small_tiers),
            "probes": [probe.to_json_dict() for probe in self.probes],
        }


def at_limits(scenario: Scenario, tpm: int, rpm: int) -> Scenario:
    """The scenario on a provider with these limits (0 = none), the policy's own limits following."""
    policy = scenario.policy.with_(rpm_limit=rpm, **({"tpm_limit": tpm} if tpm else {}))
    return scenario.with_(provider=scenario.provider.with_(tpm=tpm, rpm=rpm), policy=policy)


class Search:
    """Probes of one scenario against one deadline. `say` is told what goes on."""

    def __init__(
        self,
        scenario: Scenario,
        finish_by_s: float,
        *,
        confidence: float,
        replications: int,
        pool: Pool,
        say: Callable[[str], None],
    ) -> None:
        self.scenario = scenario
        self.finish_by_s = finish_by_s
        self.confidence = confidence
        self.replications = replications
        self.pool = pool
        self.say = say
        # 1e-9: 20 runs at 0.95 allow one late run, not 0.9999.
        self.late_allowed = math.floor((1.0 - confidence) * replications + 1e-9)
        self.probes: dict[int, Probe] = {}

    def in_time(self, run: Figures) -> bool:
        """Whether a run ended in time without losing anything."""
        return run["failed"] == 0 and run["makespan_s"] <= self.finish_by_s

    def probe(self, tpm: int, rpm: int, *, fresh: bool = False, name: str = "") -> Probe:
        """One pair of limits over the replications, dropped early where too many are late."""
        scenario = at_limits(self.scenario, tpm, rpm)
        case = case_of(scenario)
        start = scenario.seed + (FRESH_SEEDS if fresh else 0)
        runs: list[Figures] = []
        step = math.ceil(self.replications / PARTS)
        while len(runs) < self.replications:
            done = len(runs)
            runs += self.pool.run([(case, range(start + done, start + min(done + step, self.replications)))])[0]
            if sum(not self.in_time(run) for run in runs) > self.late_allowed:
                break
        on_time = sum(self.in_time(run) for run in runs)
        return Probe(
            tpm=tpm,
            rpm=rpm,
            on_time=on_time,
            meets=len(runs) == self.replications and len(runs) - on_time <= self.late_allowed and not _lost(runs),
            forecast=forecast_of(scenario.policy, runs),
            name=name,
        )

    def bracket(self) -> tuple[int, int]:
        """The limit below which nothing can be in time, and the one above which tokens never bind."""
        columns, provider = self.scenario.columns(), self.scenario.provider
        low = float(columns.charge.max(initial=1.0))
        # Tokens handed back, or a limit that rises in mid-run, would let more through than this.
        if not provider.settles and all(change.factor <= 1.0 for change in provider.limit_changes):
            low = max(low, float(columns.charge.sum()) / (self.finish_by_s / 60.0 + 1.0))
        usable = 1.0 - self.scenario.policy.tpm_headroom
        high = max(float(columns.charge.sum()), float(columns.reserve.sum())) / usable
        return max(1, math.floor(low)), max(math.ceil(high), math.ceil(low) + 1)

    def smallest(self, low: int, high: int) -> Probe | None:
        """The smallest limit that meets the deadline under fresh seeds as well; None where `high` does not."""
        rpm = self.scenario.provider.rpm
        while high > math.ceil(low * (1.0 + RESOLUTION)):
            middle = min(high - 1, max(low + 1, rounded_up(math.sqrt(low * high))))
            self.say(f"trying {middle:,} tokens per minute")
            self.probes[middle] = self.probe(middle, rpm)
            low, high = (low, middle) if self.probes[middle].meets else (middle, high)
        tpm = rounded_up(high)
        for _ in range(RAISES):
            self.say(f"checking {tpm:,} tokens per minute on fresh seeds")
            found = self.probe(tpm, rpm, fresh=True)
            if found.meets:
                return found
            self.probes[tpm] = found
            tpm = rounded_up(tpm * RAISE)
        return None

    def tiers(self, model: str) -> tuple[list[Probe], list[str]]:
        """The model's tiers from the first up to one that meets the deadline, and those that no request fits into."""
        largest = float(self.scenario.charges().max(initial=0.0))
        tried: list[Probe] = []
        too_small: list[str] = []
        for name in tier_names():
            if name.rpartition("-tier")[0] != model:
                continue
            limits = tier_preset(name)
            if limits["tpm"] < largest:
                too_small.append(name)
                continue
            self.say(f"trying {name}")
            tried.append(self.probe(limits["tpm"], limits["rpm"], fresh=True, name=name))
            if tried[-1].meets:
                break
        return tried, too_small


def rounded_up(value: float, digits: int = 3) -> int:
    """A whole number of so many significant digits, not below `value`."""
    step = 10 ** max(0, math.floor(math.log10(max(1.0, value))) - digits + 1)
    return math.ceil(value / step - 1e-9) * step


def model_of(scenario: Scenario, model: str = "") -> str:
    """Whose tiers to try: the named model's, else the provider preset's, else the workload's, else the default's."""
    if model:
        if model not in TIERS:
            raise BadSetting(f"there are no published tiers of {model!r}: use one of {', '.join(TIERS)}", "--tiers")
        return model
    named = scenario.workload.models
    for known in (scenario.provider.preset.rpartition("-tier")[0], named if isinstance(named, str) else ""):
        if known in TIERS:
            return known
    return DEFAULT_TIER.rpartition("-tier")[0]


def default_runs(requests: int) -> int:
    """Runs per limit where no number is given, for a workload of so many requests."""
    return max(RUNS_LEAST, min(RUNS_MOST, RUNS_REQUESTS // max(1, requests)))


def capacity(
    scenario: Scenario,
    finish_by_s: float,
    *,
    confidence: float = 0.95,
    replications: int = 0,
    model: str = "",
    pool: Pool | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Capacity:
    """The smallest limit of tokens per minute, and the smallest published tier, that finish the scenario in time.

    The limit of requests per minute stays as it is but for tiers, which bring their own. Requests that are charged more
    than the scenario's present limit are no error here: the limit is what is asked for. `replications`: 0 = see
    `default_runs`.
    """
    model = model_of(scenario, model)
    search = Search(
        scenario,
        finish_by_s,
        confidence=confidence,
        replications=replications or default_runs(len(scenario.workload)),
        pool=pool or Pool(),
        say=say,
    )
    low, high = search.bracket()
    say("trying without a limit that binds")
    unlimited = search.probe(high, scenario.provider.rpm)
    smallest = search.smallest(low, high) if unlimited.meets else None
    tried, too_small = search.tiers(model)
    limits = sorted(search.probes.items())
    # Of the limits that missed, the nearest below the answer tells how sharp it is.
    missed = [probe for tpm, probe in limits if not probe.meets and (smallest is None or tpm < smallest.tpm)]
    return Capacity(
        finish_by_s=finish_by_s,
        confidence=confidence,
        replications=search.replications,
        model=model,
        smallest=smallest,
        below=missed[-1] if missed else None,
        unlimited=unlimited,
        tier=next((probe for probe in tried if probe.meets), None),
        tiers=tuple(tried),
        too_small_tiers=tuple(too_small),
        probes=tuple(probe for _, probe in limits),
    )


def _lost(runs: Sequence[Figures]) -> bool:
    return any(run["failed"] > 0 for run in runs)

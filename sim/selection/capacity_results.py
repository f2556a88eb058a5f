"""What a search for the limit that is needed finds: limits that were tried, and the answer, as values and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sim.experiment.results import Estimate, Forecast, at_most, settings_of


@dataclass(frozen=True, slots=True)
class LimitProbe:
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
        """Return the number of runs made."""
        return len(self.forecast.runs)

    @property
    def on_time_at_least(self) -> float:
        """Return the lower 95 % limit of the probability that a run ends in time."""
        return 1.0 - at_most(self.runs - self.on_time, self.runs)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        e = self.forecast["makespan_s"]
        found: dict[str, Any] = {"name": self.name} if self.name else {}
        if "wait_p95_s" in self.forecast.estimates:
            found["wait_p95_s"] = _spread(self.forecast["wait_p95_s"])
        return found | {
            "requests": self.forecast.requests,
            "tpm": self.tpm,
            "rpm": self.rpm,
            "meets": self.meets,
            "runs": self.runs,
            "on_time": self.on_time,
            "on_time_probability_at_least": self.on_time_at_least,
            "makespan_s": _spread(e),
            "throttled_per_100": self.forecast["throttled_per_100"].mean,
            "lost": self.forecast.lost,
            "settings": settings_of(self.forecast.policy),
        }


LARGEST, BOUND, TAIL, SETTINGS = "largest request", "bound", "tail", "settings"


@dataclass(frozen=True, slots=True)
class DecidedBy:
    """The factor that decides the smallest limit. `by`: one of the four words above.

    `largest_tpm`: below it the largest request is never admitted. `bound_tpm`: below it no scheduler could do it.
    `p50_s`, `p95_s`: of the finish times (in steady traffic: of the waits) at that limit.
    """

    by: str
    largest_tpm: float
    bound_tpm: float
    p50_s: float
    p95_s: float


@dataclass(frozen=True, slots=True)
class Capacity:
    """The limit needed to finish by `finish_by_s`. `smallest`: None if no limit is enough; then see `unlimited`.

    `unlimited`: the probe whose limit never binds. `below`: the largest limit that was seen to miss. `tiers`: those of
    `model` from the first one up to the one that meets it, `tier`. `probes`: all limits of the search, by size.

    `decided`: what holds `smallest` up. `tuned`: whether the settings were found anew at each limit. In steady traffic:
    `wait_p95_s`, the wish in place of `finish_by_s`, `steady_load_tpm`, the tokens per minute that it offers, and
    `warm_up_requests`, how many were left out at the beginning (median over runs); -1 elsewhere.
    """

    finish_by_s: float
    confidence: float
    replications: int
    model: str
    smallest: LimitProbe | None
    below: LimitProbe | None
    unlimited: LimitProbe
    tier: LimitProbe | None
    tiers: tuple[LimitProbe, ...]
    too_small_tiers: tuple[str, ...]
    probes: tuple[LimitProbe, ...]
    tuned: bool = False
    decided: DecidedBy | None = None
    wait_p95_s: float = -1.0
    steady_load_tpm: float = -1.0
    warm_up_requests: float = -1.0

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "finish_by_s": self.finish_by_s if self.wait_p95_s < 0.0 else None,
            "wished_wait_p95_s": self.wait_p95_s if self.wait_p95_s >= 0.0 else None,
            "steady_load_tpm": self.steady_load_tpm if self.wait_p95_s >= 0.0 else None,
            "warm_up_requests": self.warm_up_requests if self.wait_p95_s >= 0.0 else None,
            "settings_tuned": self.tuned,
            "confidence": self.confidence,
            "replications": self.replications,
            "smallest_tpm": self.smallest.tpm if self.smallest else None,
            "smallest_tier": self.tier.name if self.tier else None,
            "decided": asdict(self.decided) if self.decided else None,
            "smallest": self.smallest.to_json_dict() if self.smallest else None,
            "largest_that_misses": self.below.to_json_dict() if self.below else None,
            "unlimited": self.unlimited.to_json_dict(),
            "tier_model": self.model,
            "tiers": [probe.to_json_dict() for probe in self.tiers],
            "tiers_below_the_largest_request": list(self.too_small_tiers),
            "probes": [probe.to_json_dict() for probe in self.probes],
        }


@dataclass(frozen=True, slots=True)
class HowMany:
    """The number of requests that fit until `finish_by_s` under the present limits. `most`: None if not even one does.

    `above`: the smallest batch that was seen to miss; None if the largest that is tried (`REQUESTS_MOST`) fits.
    """

    finish_by_s: float
    confidence: float
    tuned: bool
    most: LimitProbe | None
    above: LimitProbe | None
    probes: tuple[LimitProbe, ...]

    @property
    def requests(self) -> int:
        """Return how many requests fit."""
        return self.most.forecast.requests if self.most else 0

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "finish_by_s": self.finish_by_s,
            "confidence": self.confidence,
            "settings_tuned": self.tuned,
            "requests": self.requests,
            "most": self.most.to_json_dict() if self.most else None,
            "smallest_that_misses": self.above.to_json_dict() if self.above else None,
            "probes": [probe.to_json_dict() for probe in self.probes],
        }


def _spread(e: Estimate) -> dict[str, float]:
    return {name: getattr(e, name) for name in ("mean", "low", "high", "p5", "p50", "p95", "n")}

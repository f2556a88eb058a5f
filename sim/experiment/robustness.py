"""Outcomes of settings under conditions drawn from stated ranges: spread, worst case, and 95th percentile.

A "bad" outcome is one that one draw in 20 exceeds: the 95th percentile of times, throttles and losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BAD_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One policy under each draw, shape (draws,): its mean finish time and objective, throttles and losses per 100."""

    makespan_s: NDArray[np.float64]
    objective_s: NDArray[np.float64]
    throttled_per_100: NDArray[np.float64]
    lost_per_100: NDArray[np.float64]

    def median(self, name: str) -> float:
        """Return the median over the draws."""
        return _quantile(getattr(self, name), 0.5)

    def bad(self, name: str) -> float:
        """Return the value that one draw in 20 exceeds."""
        return _quantile(getattr(self, name), 1.0 - BAD_SHARE)

    def worst(self, name: str) -> float:
        """Return the worst draw."""
        return float(getattr(self, name).max())


@dataclass(frozen=True, slots=True)
class DrawnConditions:
    """The plan's policies by name under the same draws. `ranges`: in words; `runs`: number of runs per draw."""

    ranges: str
    draws: int
    runs: int
    outcomes: Mapping[str, Outcomes]

    def kept(self, who: str, max_throttled: float, max_lost: float) -> int:
        """Return the number of draws in which a policy keeps the limits."""
        found = self.outcomes[who]
        return int(
            ((found.throttled_per_100 <= max_throttled) & (found.lost_per_100 <= 100.0 * max_lost + 1e-12)).sum()
        )

    def to_json_dict(self, objective: str) -> dict[str, Any]:
        """Return plain numbers, by policy and figure."""
        names = {f"{objective}_s": "objective_s"} | {n: n for n in ("throttled_per_100", "lost_per_100")}
        return {
            "ranges": self.ranges,
            "draws": self.draws,
            "runs_per_draw": self.runs,
            **{
                who: {
                    shown: {
                        "median": _plain(found.median(name)),
                        "percentile_95": _plain(found.bad(name)),
                        "worst": _plain(found.worst(name)),
                    }
                    for shown, name in names.items()
                }
                for who, found in self.outcomes.items()
            },
        }


def _quantile(values: NDArray[np.float64], ratio: float) -> float:
    # As in `results.percentile`: the next draw stays below with that probability.
    with np.errstate(invalid="ignore"):
        found = float(np.quantile(values, ratio, method="weibull"))
    return math.inf if math.isnan(found) else found


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None

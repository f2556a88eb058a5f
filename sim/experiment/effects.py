"""Sensitivity results: effects of quantities, and changes by each alternative value of rules and switches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of one quantity on one figure. `half_width`: of the 95 % interval of `size` (bootstrap).

    Morris: `size` is mu*, the mean absolute change of the figure when the quantity alone moves by two thirds of its
    range, in the figure's unit; `other` is sigma, how much that change depends on the other quantities. Sobol:
    `size` is the total index, the share of the figure's variance that would remain if all other quantities were known;
    `other` is the first-order index, the share that would vanish if this one alone were known.
    """

    env: str
    size: float
    half_width: float
    other: float


@dataclass(frozen=True, slots=True)
class Level:
    """The change caused by one other value of a rule or switch: the mean over pairs of runs, and its 95 % interval.

    `change` > 0: the figure is larger with `value` than as recommended. nan if no request was answered.
    """

    env: str
    value: str | bool
    change: float
    low: float
    high: float

    @property
    def shows(self) -> bool:
        """Return whether the interval excludes zero."""
        return self.low > 0.0 or self.high < 0.0

    @property
    def assignment(self) -> str:
        """Return the assignment as written in an env file: NAME=value."""
        return f"{self.env}={str(self.value).lower()}"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The effects on each figure, largest first. `method`: morris or sobol, of the quantities.

    `values`: of the quantities, by env name. `effects`, `levels`: by name of a figure: makespan_s or latency_p95_s,
    throttled_per_100, lost_per_100. `settings` tried, in so many `runs`.
    """

    method: str
    objective: str
    values: Mapping[str, tuple[Any, ...]]
    effects: Mapping[str, tuple[Effect, ...]]
    levels: Mapping[str, tuple[Level, ...]]
    settings: int
    runs: int
    seed: int

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain values; null for an unknown change."""
        return {
            "method": self.method,
            "objective": self.objective,
            "values": {env: list(values) for env, values in self.values.items()},
            "effects": {name: [asdict(effect) for effect in effects] for name, effects in self.effects.items()},
            "levels": {
                name: [
                    {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in asdict(level).items()}
                    for level in levels
                ]
                for name, levels in self.levels.items()
            },
            "settings": self.settings,
            "runs": self.runs,
            "seed": self.seed,
        }

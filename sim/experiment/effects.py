"""Which knob matters, as values: one `Effect` per knob and figure, with its interval.

What lives here: `Sensitivity` and its JSON form. What must not: computing it (`sensitivity`), drawing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Effect:
    """How much one knob moves one figure. `half_width`: of the 95 % interval of `size` (bootstrap).

    Morris: `size` is mu*, the mean absolute change of the figure when the knob alone moves half-way through its range,
    in the figure's unit; `other` is sigma, how much that change itself depends on the other knobs. Sobol: `size` is the
    total index, the share of the figure's variance that would remain if all other knobs were known; `other` is the
    first-order index, the share that would vanish if this knob alone were known.
    """

    env: str
    size: float
    half_width: float
    other: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The effects of each knob on each figure, largest first. `method`: morris or sobol. `values`: tried, by env name.

    `effects`: by name of a figure: makespan_s or latency_p95_s, throttled_per_100, lost_per_100. `runs`: simulated.
    """

    method: str
    objective: str
    values: Mapping[str, tuple[Any, ...]]
    effects: Mapping[str, tuple[Effect, ...]]
    settings: int
    runs: int
    seed: int

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.method,
            "objective": self.objective,
            "values": {env: list(values) for env, values in self.values.items()},
            "effects": {name: [asdict(effect) for effect in effects] for name, effects in self.effects.items()},
            "settings": self.settings,
            "runs": self.runs,
            "seed": self.seed,
        }

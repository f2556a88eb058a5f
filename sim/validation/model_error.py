"""How far a prediction is from a live run for reasons that no replication of it varies: measured, with its date.

`python -m benchmarks.twin --write` makes live runs, and writes `model_error.json` beside this module. Of half of its
pairs it takes the least share of the prediction that, as half-width beside the simulation's own, would hold 95 % of
them and one more (split conformal prediction: Lei and others, 2018); on the other half it counts how often that holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sim.experiment.results import CONFIDENCE

FILE = Path(__file__).with_suffix(".json")


class ModelError(NamedTuple):
    """95 % half-widths as shares of a makespan: of a rehearsal, of a forecast from a calibrated scenario, of a replay.

    `made`: the day on which they were measured; `command`; `runs`: how many predictions each was taken from.
    """

    rehearsal: float
    forecast: float
    replay: float
    made: str
    command: str
    runs: tuple[int, int, int]


@lru_cache(maxsize=1)
def measured() -> ModelError:
    """The one that commands use."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return ModelError(**{**found, "runs": tuple(found["runs"])})


def conformal(ratios: Iterable[float]) -> float:
    """The least share that holds for `CONFIDENCE` of what is like these; their largest where they are too few."""
    found = sorted(ratios)
    return found[min(len(found), math.ceil(CONFIDENCE * (len(found) + 1))) - 1]


def widened(low: float, value: float, high: float, ratio: float) -> tuple[float, float, float]:
    """The interval with the model's error in it, not below 0."""
    more = ratio * value
    return max(0.0, value - math.hypot(value - low, more)), value, value + math.hypot(high - value, more)

"""How far a prediction is from a live run for reasons that no replication of it varies: measured, with its date.

`python -m benchmarks.twin --write` makes live runs, and writes `model_error.json` beside this module. Of half of its
pairs it takes the least share of the prediction that, as half-width beside the simulation's own, would hold 95 % of
them and one more (split conformal prediction: Lei and others, 2018); on the other half it counts how often that holds.
Predictions without a refusal in their interval are apart from those with (Mondrian: Vovk and others, 2003): whether a
first 429 comes can hang on milliseconds, and what follows from it lasts a minute.
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


Ratios = tuple[float, float]


class ModelError(NamedTuple):
    """95 % half-widths as shares of a makespan, each where no refusal is predicted and where some may come.

    Of a rehearsal, of a forecast from a calibrated scenario, of a replay. `made`: the day on which they were measured;
    `runs`: how many predictions each was taken from.
    """

    rehearsal: Ratios
    forecast: Ratios
    replay: Ratios
    made: str
    command: str
    runs: dict[str, list[int]]


@lru_cache(maxsize=1)
def measured() -> ModelError:
    """Return the model error that commands use."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return ModelError(**found)


def conformal(ratios: Iterable[float]) -> float:
    """Return the least share that covers `CONFIDENCE` of ratios like these; the largest of them if they are too few."""
    found = sorted(ratios)
    assert found, "none to learn from"
    return found[min(len(found), math.ceil(CONFIDENCE * (len(found) + 1))) - 1]


def widened(low: float, value: float, high: float, ratio: float) -> tuple[float, float, float]:
    """Return the interval widened by the model's error, not below 0."""
    more = ratio * value
    return max(0.0, value - math.hypot(value - low, more)), value, value + math.hypot(high - value, more)

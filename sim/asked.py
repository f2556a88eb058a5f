"""The command `paceline capacity`: which of its questions is asked, and the answer as object, text and picture.

What lives here: the options together. What must not: their declaration (`cli`), and the answering (`capacity`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from governor.errors import BadInput, BadSetting
from sim.capacity import PROBES_FORESEEN, TUNING_RUNS, capacity, default_runs, how_many
from sim.capacity_results import Capacity
from sim.capacity_text import capacity_text, how_many_text
from sim.experiment import Pool
from sim.files import write_atomically
from sim.inputs import Inputs
from sim.options import Options
from sim.outputs import check_file
from sim.progress import Progress
from sim.results import CONFIDENCE
from sim.steady import steady_capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line asks for; None and "" = not given."""

    finish_by_s: float | None
    p95_wait_s: float | None
    how_many: bool
    confidence: float | None
    retune: bool
    tiers: str
    picture: str | None

    def check(self) -> None:
        """BadSetting or BadInput for options that do not go together, before any work is done."""
        if (self.finish_by_s is None) == (self.p95_wait_s is None):
            raise BadSetting("give one of --finish-by (when the batch should be done) and --p95-wait (steady traffic)")
        if self.how_many and self.p95_wait_s is not None:
            raise BadSetting("--how-many is for a batch: give --finish-by")
        if self.how_many and self.picture:
            raise BadSetting("--out draws finish time against the limit: leave it or --how-many out")
        check_file(self.picture, "--out", (".png",))


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer: as an object, as text, what to be careful about, and whether anything is enough."""

    found: dict[str, Any]
    text: str
    notes: tuple[str, ...]
    enough: bool


def answered(given: Options, inputs: Inputs, asked: Asked, width: int) -> Answered:
    """Answers the question."""
    scenario = inputs.scenario
    if asked.how_many and scenario.arrivals == "trace":
        raise BadInput("--how-many is for a batch: leave out --arrivals trace")
    runs = scenario.replications or default_runs(len(scenario.workload))
    foreseen = (runs + (TUNING_RUNS if asked.retune else 0)) * PROBES_FORESEEN
    with Progress("looking for the smallest limit", foreseen) as bar:
        common: dict[str, Any] = {
            "confidence": CONFIDENCE if asked.confidence is None else asked.confidence,
            "replications": scenario.replications,
            "retune": asked.retune,
            "pool": Pool(
                given.workers,
                bar.add,
                engine=given.engine,
                backend=given.backend,
                foreseen=foreseen * len(scenario.workload),
            ),
            "say": bar.say,
        }
        if asked.how_many:
            assert asked.finish_by_s is not None
            many = how_many(scenario, asked.finish_by_s, **common)
            return Answered(many.to_json_dict(), how_many_text(scenario, many, width), (), many.most is not None)
        common |= {"model": asked.tiers, "grid": bool(asked.picture)}
        if asked.p95_wait_s is not None:
            found = steady_capacity(scenario, asked.p95_wait_s, **common)
        else:
            assert asked.finish_by_s is not None
            found = capacity(scenario, asked.finish_by_s, **common)
        if asked.picture:
            _draw(asked.picture, found)
    enough = found.smallest is not None or found.tier is not None
    return Answered(found.to_json_dict(), capacity_text(scenario, found, width), (), enough)


def _draw(path: str, found: Capacity) -> None:
    from sim.capacity_figure import capacity_figure
    from sim.style import png_of

    picture = png_of(capacity_figure(found))
    with write_atomically(path) as unfinished:
        unfinished.write_bytes(picture)

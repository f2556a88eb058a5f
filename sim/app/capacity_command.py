"""The command `paceline capacity`: which of its questions is asked, and the answer as object, text and picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from governor.model.errors import BadInput, BadSetting
from governor.model.files import write_atomically
from governor.profiles.loader import prices_in_force, read_profile
from sim.app.inputs import Inputs, pool_of
from sim.app.options import Options, duration_s
from sim.app.outputs import check_file
from sim.base.progress import Progress
from sim.experiment.results import CONFIDENCE
from sim.reporting.capacity_text import capacity_text, how_many_text, reserved_text, ways_text
from sim.selection.batch_api import Terms, Way, ways
from sim.selection.capacity import PROBES_FORESEEN, TUNING_RUNS, How, capacity, how_many, runs_of
from sim.selection.capacity_results import Capacity
from sim.selection.reserved import compared
from sim.selection.steady import steady_capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityOptions:
    """The options of `capacity`; None and "" = not given."""

    finish_by_s: float | None
    p95_wait_s: float | None
    how_many: bool
    confidence: float | None
    retune: bool
    tiers: str
    picture: str | None
    batch: Terms | None = None
    prices: str | None = None
    reserved: str = ""
    cached_share: float = 0.0

    def check(self) -> None:
        """BadSetting or BadInput for options that do not go together, before any work is done."""
        if (self.finish_by_s is None) == (self.p95_wait_s is None):
            raise BadSetting("give one of --finish-by (when the batch should be done) and --p95-wait (steady traffic)")
        if self.how_many and self.p95_wait_s is not None:
            raise BadSetting("--how-many is for a batch: give --finish-by")
        if self.how_many and self.picture:
            raise BadSetting("--out draws finish time against the limit: leave it or --how-many out")
        if self.batch is not None and (self.finish_by_s is None or self.how_many):
            raise BadSetting("--batch-queue compares ways to finish a batch: give --finish-by, without --how-many")
        if self.how_many and self.tiers:
            raise BadSetting("--tiers names limits to try, --how-many is for the present ones: leave one of them out")
        if self.batch is None and not self.reserved and self.prices:
            raise BadSetting("--prices is for --batch-queue and --reserved: give one of them")
        if self.reserved and self.how_many:
            raise BadSetting(
                "--reserved compares prices of one load, --how-many looks for another: leave one of them out"
            )
        if self.confidence == 0.0:
            raise BadSetting("--confidence 0 is always met: give a share above 0, for example 0.95")
        check_file(self.picture, "--out", (".png",))


@dataclass(frozen=True, slots=True)
class CapacityAnswer:
    """The answer: as an object, as text, what to be careful about, and whether anything is enough."""

    found: dict[str, Any]
    text: str
    notes: tuple[str, ...]
    enough: bool


def terms_of(
    queue_tokens: int | None, turnaround: str | None, discount: float | None, cached_share: float | None
) -> Terms | None:
    """Return the Batch API as the options assume it, None where it is not asked for.

    BadSetting for a turnaround that is not two durations in this order, and for terms without a queue.
    """
    given = {"--batch-turnaround": turnaround, "--batch-discount": discount, "--cached-share": cached_share}
    if queue_tokens is None:
        for name, value in given.items():
            if value is not None:
                raise BadSetting(f"{name} is for --batch-queue: give both")
        return None
    terms = Terms(queue_tokens)
    if turnaround is not None:
        times = [duration_s(word) or 0.0 for word in turnaround.split(",")]
        if len(times) != 2 or not 0.0 < times[0] < times[1]:
            raise BadSetting(f"--batch-turnaround {turnaround!r} is not P50,P95, the first the smaller: write 4h,20h")
        terms = replace(terms, turnaround_s=(times[0], times[1]))
    if discount is not None:
        terms = replace(terms, discount=discount)
    return terms if cached_share is None else replace(terms, cached_share=cached_share)


def answered(given: Options, inputs: Inputs, asked: CapacityOptions, width: int) -> CapacityAnswer:
    """Answer the question."""
    scenario = inputs.scenario
    if asked.how_many and scenario.arrivals == "trace":
        raise BadInput("--how-many is for a batch: leave out --arrivals trace")
    confidence = CONFIDENCE if asked.confidence is None else asked.confidence
    runs = runs_of(len(scenario.workload), confidence, scenario.replications)
    foreseen = (runs + (TUNING_RUNS if asked.retune else 0)) * PROBES_FORESEEN
    # Read before the work: a list that is not there should show at once.
    prices = prices_in_force(asked.prices, read_profile(scenario.provider.profile))
    # What reserving costs takes no simulation, and a model without units should show at once.
    reserved = None
    if asked.reserved:
        reserved = compared(scenario, prices, asked.finish_by_s, asked.reserved, cached_share=asked.cached_share)
    found_ways: tuple[Way, ...] = ()
    with Progress("looking for the smallest limit", foreseen) as bar:
        common: How = {
            "confidence": confidence,
            "replications": scenario.replications,
            "retune": asked.retune,
            "pool": pool_of(given, bar, foreseen * len(scenario.workload)),
            "say": bar.say,
        }
        if asked.how_many:
            assert asked.finish_by_s is not None
            many = how_many(scenario, asked.finish_by_s, **common)
            return CapacityAnswer(many.to_json_dict(), how_many_text(scenario, many, width), (), many.most is not None)
        more: dict[str, Any] = {"model": asked.tiers, "grid": bool(asked.picture)}
        if asked.p95_wait_s is not None:
            found = steady_capacity(scenario, asked.p95_wait_s, **common, **more)
        else:
            assert asked.finish_by_s is not None
            found = capacity(scenario, asked.finish_by_s, **common, **more)
            if asked.batch is not None:
                found_ways = ways(scenario, asked.batch, prices, asked.finish_by_s, say=bar.say)
        if asked.picture:
            _draw(asked.picture, found)
    enough = found.smallest is not None or found.tier is not None
    shown, text = found.to_json_dict(), capacity_text(scenario, found, width)
    if asked.batch is not None:
        shown |= {"ways": [way.to_json_dict() for way in found_ways], "batch_api_assumed": asdict(asked.batch)}
        text = f"{text}\n\n{ways_text(found_ways, asked.batch, asked.finish_by_s or 0.0, found.confidence, width)}"
    if reserved is not None:
        shown |= {"reserved": reserved.to_json_dict()}
        text = f"{text}\n\n{reserved_text(reserved, width)}"
    return CapacityAnswer(shown, text, (), enough)


def _draw(path: str, found: Capacity) -> None:
    from sim.base.style import png_of
    from sim.reporting.figures_compare import capacity_figure

    picture = png_of(capacity_figure(found))
    with write_atomically(path) as unfinished:
        unfinished.write_bytes(picture)

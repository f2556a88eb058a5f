"""`paceline plan` from its inputs to its folder: the search and its journal, the files, what an interruption leaves.

What lives here: the order of these steps, and what is said where they are broken off. What must not: the search
(`planner`), the contents of the files (`outputs`), options (`cli`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from governor.model.errors import PacelineError
from governor.model.prices import Prices, read_prices
from sim.app.inputs import Wishes, scenario_text
from sim.app.outputs import Written, page, write_plan, write_so_far
from sim.base.words import duration
from sim.experiment.experiment import Pool
from sim.experiment.results import Plan, SoFar
from sim.experiment.spread import WorkersLost
from sim.model.workload import ARRAYS
from sim.reporting.figure_process import Drawing
from sim.reporting.terminal import plan_notes
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource
from sim.selection import planner as planning
from sim.selection.searchlog import NAME, SearchLog, fingerprint

Say = Callable[[str], None]

OBJECTIVES = {"makespan": "finish time", "p95_latency": "P95 latency"}


class Stopped(PacelineError):  # noqa: N818  (a name says what happened)
    """A search was interrupted; what it had found is written, and the message says where."""

    exit_code: ClassVar[int] = 130


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, its files, and what its user should know of it, and of the journal."""

    plan: Plan
    written: Written
    notes: tuple[str, ...]
    journal_notes: tuple[str, ...]


def planned(
    scenario: Scenario, wishes: Wishes, folder: Path, *, notes: tuple[str, ...], pool: Pool, say: Say, resume: bool
) -> Planned:
    """Searches, writes the folder, and returns what was found. With `resume`, an interrupted search there goes on.

    Stopped where it is interrupted after something was found.
    """
    with contextlib.ExitStack() as stack:
        # Begun first: it needs as long to get ready as the search takes.
        drawing = stack.enter_context(Drawing(scenario.grant())) if pool.workers > 1 else None
        log = stack.enter_context(contextlib.closing(SearchLog(folder / NAME, _mark(scenario, wishes), resume=resume)))
        return _planned(scenario, wishes, folder, notes=notes, pool=pool, say=say, log=log, drawing=drawing)


def _planned(
    scenario: Scenario,
    wishes: Wishes,
    folder: Path,
    *,
    notes: tuple[str, ...],
    pool: Pool,
    say: Say,
    log: SearchLog,
    drawing: Drawing | None,
) -> Planned:
    try:
        found = planning.plan(
            scenario,
            wishes.goal(),
            effort=wishes.effort,
            pool=pool,
            say=say,
            unknowns=wishes.unknowns,
            prices=prices_of(wishes),
            log=log,
            **({} if drawing is None else {"on_part": drawing.begin}),
        )
        say("writing the report")
        notes = (*notes, *plan_notes(scenario, found))
        log.close()
        written = write_plan(folder, scenario, wishes, found, page(scenario, found, folder, drawing), notes)
        # How this search was run is for its user, not for the plan's files: those are the same however it was run.
        return Planned(found, written, notes, tuple(log.notes))
    except planning.Interrupted as stop:
        log.flush()
        left = _left(folder, scenario, stop.so_far, log)
        raise (WorkersLost(f"{stop.reason}; {left}") if stop.reason else Stopped(left)) from None


def prices_of(wishes: Wishes) -> Prices:
    """The price list that is asked for, or the one that comes with Paceline."""
    return read_prices(wishes.prices) if wishes.prices else read_prices()


def _mark(scenario: Scenario, wishes: Wishes) -> str:
    """What tells this search from any other: all that its figures depend on."""
    workload = scenario.workload
    arrays = [getattr(workload, name).tobytes() for name in ARRAYS]
    # Not where the rows are read from: what they are.
    text = scenario_text(scenario.with_(source=ModelSource.model_construct()), wishes, ".")
    return fingerprint([text, repr(workload.models), *arrays])


def _left(folder: Path, scenario: Scenario, so_far: SoFar, log: SearchLog) -> str:
    """Writes what was found and says so in one line."""
    names = write_so_far(folder, so_far)
    name = OBJECTIVES[so_far.objective]
    then = "the same command goes on from here" if log.path.exists() else "the same command begins anew"
    return (
        f"interrupted while {so_far.stage}, after {so_far.runs_simulated:,} runs: best {name} so far "
        f"{duration(so_far.best.objective_s)} (now {duration(so_far.now.objective_s)}), not yet proved; "
        f"written: {', '.join(str(folder / each) for each in names)}; {then}"
        + "".join(f" ({note})" for note in log.notes)
    )

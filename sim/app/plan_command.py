"""`paceline plan` from its inputs to its folder: the search, the files, what is said of an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from governor.model.errors import PacelineError
from governor.model.prices import Prices, read_prices
from sim.app.inputs import Wishes
from sim.app.outputs import PlanFiles, page, write_plan
from sim.experiment.experiment import Pool
from sim.experiment.results import Plan
from sim.experiment.spread import WorkersLost
from sim.reporting.terminal import plan_notes
from sim.scenario.scenario import Scenario
from sim.selection import planner as planning

Say = Callable[[str], None]


class Stopped(PacelineError):  # noqa: N818  (a name says what happened)
    """A search was interrupted; the message says what it had found."""

    exit_code: ClassVar[int] = 130


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, its files, and what its user should know of it."""

    plan: Plan
    written: PlanFiles
    notes: tuple[str, ...]


def planned(
    scenario: Scenario, wishes: Wishes, folder: Path, *, notes: tuple[str, ...], pool: Pool, say: Say
) -> Planned:
    """Search, write the folder, and return what was found.

    Stopped where it is interrupted after something was found: nothing is written then.
    """
    try:
        found = planning.plan(
            scenario,
            wishes.goal(),
            effort=wishes.effort,
            pool=pool,
            say=say,
            unknowns=wishes.unknowns,
            prices=prices_of(wishes),
        )
    except planning.Interrupted as stop:
        said = f"{stop.so_far}; no file was written"
        raise (WorkersLost(f"{stop.reason}; {said}") if stop.reason else Stopped(said)) from None
    say("writing the report")
    notes = (*notes, *plan_notes(scenario, found))
    return Planned(found, write_plan(folder, scenario, wishes, found, page(scenario, found, folder), notes), notes)


def prices_of(wishes: Wishes) -> Prices:
    """The price list that is asked for, or the one that comes with Paceline."""
    return read_prices(wishes.prices) if wishes.prices else read_prices()

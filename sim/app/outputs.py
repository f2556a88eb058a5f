"""`plan` from its inputs to its folder: the search, the files that it leaves, and early checks of both.

All files are filled under hidden names first and take their own names in one go at the end: whatever fails before that,
a full disk or Ctrl-C, leaves an older set as it was. Of the settings only our own names are written; what else an env
file holds has never been kept.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from governor import __version__
from governor.model.env_files import MADE_FROM, policy_of, settings_digest
from governor.model.env_files import SCENARIO as NAMED
from governor.model.errors import BadInput, PacelineError
from governor.model.files import check_writable, write_atomically
from governor.model.knobs import Knob
from governor.model.phrases import whole_if
from governor.model.policy import GUARDRAIL_KNOBS, KNOBS, LIMITS, Policy
from governor.model.pools import PROFILE
from governor.model.prices import Prices
from governor.profiles.loader import OPENAI, prices_in_force, read_profile
from sim.app.inputs import PlanOptions, scenario_text
from sim.experiment.experiment import Pool
from sim.experiment.parallel import WorkersLost
from sim.experiment.results import Plan
from sim.model.provider_config import ProviderConfig
from sim.reporting.capacity_text import ways_text
from sim.reporting.terminal import headline, plain, plan_notes
from sim.scenario.readers import save_rows
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import FileSource
from sim.scenario.stress import stress_notes
from sim.selection.batch_api import PROMISE, Say, Terms, Way, terms_of_provider, ways

REPORT = "report.html"
RECOMMENDED = "recommended.env"
GUARDRAILS = "recommended-guardrails.env"
ROLLBACK = "rollback.env"
SCENARIO = "scenario.yaml"
ROWS = "scenario.workload.csv"
PLAN = "plan.json"
LATE_IMPORTS = ("sim.reporting.report", "sim.reporting.report_figures")


def check_file(path: str | None, option: str, endings: tuple[str, ...]) -> None:
    """BadInput, before any work is done, where `path` cannot be written or its ending is none of `endings`."""
    if path is None:
        return
    if not path.lower().endswith(endings):
        raise BadInput(f"{option} writes {' or '.join(endings)}: name a file with that ending", path)
    check_writable(path)


@dataclass(frozen=True, slots=True)
class PlanFiles:
    """A plan's files by name, and the command that makes the same plan again."""

    folder: Path
    names: tuple[str, ...]
    command: str

    @property
    def report(self) -> Path:
        """The page to open."""
        return self.folder / REPORT


def rerun_command(folder: Path) -> str:
    """Return the command that makes the same plan again: everything that it depends on is in the scenario file."""
    out = "" if str(folder) == "out" else f" --out {shlex.quote(str(folder))}"
    return f"paceline plan {shlex.quote(str(folder / SCENARIO))}{out}"


@dataclass(frozen=True, slots=True)
class Front:
    """Live, flex, the Batch API and mixes of them, as `ways` compares them under the recommended settings."""

    ways: tuple[Way, ...]
    terms: Terms
    deadline_s: float

    def text(self, width: int) -> str:
        """Return the comparison as readable text."""
        return ways_text(self.ways, self.terms, self.deadline_s, PROMISE, width)

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"ways": [way.to_json_dict() for way in self.ways], "batch_api_assumed": asdict(self.terms)}


def plan_json(
    scenario: Scenario,
    plan_options: PlanOptions,
    plan: Plan,
    notes: tuple[str, ...],
    command: str,
    front: Front | None = None,
) -> dict[str, Any]:
    """Return the plan with its inputs, each labelled, as plain values: what `--json` prints and plan.json holds."""
    inputs = {name: {"label": label, "text": text} for name, (label, text) in scenario.provenance().items()}
    found: dict[str, Any] = plain(plan.to_json_dict())
    return {
        "paceline_version": __version__,
        "asked": plan_options.model_dump(mode="json", exclude={"settings_read"}),
        "settings_read": plan_options.settings_read,
        **found,
        **(front.to_json_dict() if front is not None else {}),
        "inputs": inputs,
        "notes": list(notes),
        "command": command,
    }


def page(scenario: Scenario, plan: Plan, folder: Path, front: Front | None = None) -> str:
    """Return the report as one self-contained page."""
    # Templates take a moment to import, and only this needs them.
    from sim.reporting.report import render, ways_part

    return render(
        plan,
        title=headline(scenario),
        command=rerun_command(folder),
        grant=scenario.grant(),
        provenance=scenario.provenance(),
        version=__version__,
        stress_notes=stress_notes(scenario),
        ways=None if front is None else ways_part(front.ways, front.terms, front.deadline_s, PROMISE),
    )


def settings_files(plan: Plan, settings_read: str = "", provider: ProviderConfig | None = None) -> dict[str, str]:
    """Return the env files: both recommendations, with today's values as comments, and the way back.

    `settings_read`: the digest of the settings that the plan read. With it the files belong into the plan's folder:
    they name the scenario beside them, the profile and the further limits of the `provider`, and what they were made
    from (see `governor.run.apply`).
    """
    now, full, guardrails = plan.now.policy, plan.full.policy, plan.guardrails.policy
    made_from = [settings_read] if settings_read else []
    named = {} if provider is None else _account(provider)
    recommended = [settings_digest(policy) for policy in (full, guardrails)] if settings_read else []
    titles = {
        RECOMMENDED: "Recommended settings, using everything that Paceline can do.",
        GUARDRAILS: "Recommended settings for a deployment that has only the eight guardrail settings.",
        ROLLBACK: "The settings from before the plan, to go back to.",
    }
    return {
        RECOMMENDED: _env(titles[RECOMMENDED], full, now, made_from, named),
        GUARDRAILS: _env(titles[GUARDRAILS], guardrails, now, made_from, named),
        ROLLBACK: _env(titles[ROLLBACK], now, full, recommended, named),
    }


def _account(provider: ProviderConfig) -> dict[str, str]:
    """Return the variables that state what a run has to know of the account besides its settings."""
    limits = ",".join(f"{name}={whole_if(limit)}" for name, limit in provider.limits)
    return {
        **({} if provider.profile == OPENAI else {PROFILE: provider.profile}),
        **({LIMITS: limits} if limits else {}),
    }


def _env(title: str, policy: Policy, old: Policy, made_from: Sequence[str], named: Mapping[str, str]) -> str:
    # Which names the user's own file held must not matter, or the plan made again would read otherwise.
    # The eight guardrail knobs always stand there, the others where they say something.
    told = {k.name: getattr(policy, k.name) for k in KNOBS if k in GUARDRAIL_KNOBS or _says_something(k, policy, old)}
    head = f"# {title}\n"
    if made_from:
        head += f"{MADE_FROM} {' '.join(made_from)}\n\n"
        head += (
            f"# what the plan assumed of the provider, for every forecast under these settings\n{NAMED}={SCENARIO}\n"
        )
        head += "".join(f"{name}={value}\n" for name, value in named.items())
    return f"{head}\n{Policy.model_validate(told).to_env(old)}"


def _keeps_rollback(folder: Path, now: Policy) -> bool:
    """Return whether the plan started from a recommendation to which this folder's rollback belongs.

    To write the way back anew would lose the settings of before the first plan.
    """
    if not (folder / ROLLBACK).is_file():
        return False
    for name in (RECOMMENDED, GUARDRAILS):
        with contextlib.suppress(PacelineError):
            if policy_of(folder / name).model_dump() == now.model_dump():
                return True
    return False


def _says_something(knob: Knob, policy: Policy, old: Policy) -> bool:
    value = getattr(policy, knob.name)
    return bool(value != knob.guardrails or value != getattr(old, knob.name))


def write_plan(
    folder: Path,
    scenario: Scenario,
    plan_options: PlanOptions,
    plan: Plan,
    report: str,
    notes: tuple[str, ...] = (),
    front: Front | None = None,
) -> PlanFiles:
    """Write all files of a plan, or none. `report`: the page's text."""
    command = rerun_command(folder)
    texts = {
        REPORT: report,
        **settings_files(plan, plan_options.settings_read or settings_digest(plan.now.policy), scenario.provider),
    }
    if _keeps_rollback(folder, plan.now.policy):
        del texts[ROLLBACK]
    rerun = scenario
    if isinstance(scenario.source, FileSource) and scenario.source.path == "-":
        # Rows from standard input have no file to be read from again: they go beside the scenario.
        rows = FileSource(path=str(folder / ROWS), provenance=dict(scenario.workload.provenance))
        rerun = scenario.with_(source=rows, skip_oversized=False)
    texts[SCENARIO] = scenario_text(rerun, plan_options, folder)
    texts[PLAN] = (
        json.dumps(plan_json(scenario, plan_options, plan, notes, command, front), indent=2, allow_nan=False) + "\n"
    )
    _write_together(folder, texts, scenario if rerun is not scenario else None)
    return PlanFiles(folder, tuple(texts), command)


def _write_together(folder: Path, texts: Mapping[str, str], rows: Scenario | None) -> None:
    """Write all files under hidden names, each forced to the disk, then rename them: all of them or none."""
    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            unfinished = stack.enter_context(write_atomically(folder / name))
            with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        if rows is not None:
            save_rows(rows.workload, stack.enter_context(write_atomically(folder / ROWS)))
        # From here on only names change: too short a time to be interrupted in.
        with _undisturbed(), _all_or_none([folder / name for name in (*texts, ROWS)]):
            stack.close()


@contextlib.contextmanager
def _all_or_none(paths: list[Path]) -> Iterator[None]:
    """Restore the files, or remove new ones, if the block fails."""
    before: dict[Path, Path | None] = {}
    try:
        for path in (Path(os.path.realpath(path)) for path in paths):
            before[path] = None
            if path.is_file():
                kept = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.old")
                before[path] = kept
                shutil.copy2(path, kept)
        try:
            yield
        except BaseException:
            for path, kept_as in before.items():
                if kept_as is not None:
                    os.replace(kept_as, path)
                else:
                    path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror or error}", str(paths[0].parent)) from None
    finally:
        for kept_as in filter(None, before.values()):
            with contextlib.suppress(OSError):
                kept_as.unlink()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the block is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            raise KeyboardInterrupt


# ---------------------------------------------------------------- the search and its files


class Stopped(PacelineError):  # noqa: N818  (a name says what happened)
    """A search was interrupted; the message says what it had found."""

    exit_code: ClassVar[int] = 130


@dataclass(frozen=True, slots=True)
class PlanOutcome:
    """A plan, its files, and what its user should know of it. `front`: None without a deadline."""

    plan: Plan
    written: PlanFiles
    notes: tuple[str, ...]
    front: Front | None = None


def planned(
    scenario: Scenario, plan_options: PlanOptions, folder: Path, *, notes: tuple[str, ...], pool: Pool, say: Say
) -> PlanOutcome:
    """Search, write the folder, and return what was found.

    Stopped where it is interrupted after something was found: nothing is written then.
    """
    # Takes long to import, and of those who check or write a file only this needs it.
    from sim.selection import planner as planning

    # The search waits for machine code most of the time; what only its end needs is imported meanwhile.
    threading.Thread(target=_import_each, args=LATE_IMPORTS, daemon=True).start()
    try:
        found = planning.plan(
            scenario,
            plan_options.goal(),
            effort=plan_options.effort,
            pool=pool,
            say=say,
            unknowns=plan_options.unknowns,
            prices=prices_of(plan_options, scenario),
        )
    except planning.Interrupted as stop:
        said = f"{stop.so_far}; no file was written"
        raise (WorkersLost(f"{stop.reason}; {said}") if stop.reason else Stopped(said)) from None
    front = _front(scenario.with_(policy=found.full.policy), plan_options, say)
    say("writing the report")
    notes = (*notes, *plan_notes(scenario, found))
    report = page(scenario, found, folder, front)
    return PlanOutcome(found, write_plan(folder, scenario, plan_options, found, report, notes, front), notes, front)


def _import_each(*modules: str) -> None:
    for module in modules:
        with contextlib.suppress(ImportError):  # raised again, and said, where it is needed
            importlib.import_module(module)


def _front(scenario: Scenario, plan_options: PlanOptions, say: Say) -> Front | None:
    """Compare live calls with the Batch API if there is a deadline, and all requests are there from the start."""
    if plan_options.finish_by_s is None or scenario.arrivals != "batch":
        return None
    api = scenario.provider.batch_api
    terms = terms_of_provider(api)
    return Front(
        ways(scenario, terms, prices_of(plan_options, scenario), plan_options.finish_by_s, say=say),
        terms,
        plan_options.finish_by_s,
    )


def prices_of(plan_options: PlanOptions, scenario: Scenario) -> Prices:
    """Return the price list that is asked for, or the one that comes with Paceline."""
    return prices_in_force(plan_options.prices or None, read_profile(scenario.provider.profile))

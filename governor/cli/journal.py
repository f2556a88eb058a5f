"""The commands about a run's journal: status, export, pause, resume, set, unset, verify, purge.

All but `purge` work while another process runs the journal. A command imports what it needs when it runs.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from governor.cli.run import AsJson, ScenarioFile, scenario_of
from governor.model.errors import BadInput, BadSetting, quoted

if TYPE_CHECKING:
    from governor.journal.journal import Journal
    from governor.model.policy import Policy

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_Where = Annotated[
    str,
    typer.Argument(metavar="JOURNAL.db", help="The journal of a run: a path or a database URL.", show_default=False),
]
PoolName = Annotated[str | None, typer.Option("--pool", metavar="NAME", help="Only this pool; all if not given.")]

# How long a running process is given to apply a command; it looks a few times per second.
TAKEN_S = 5.0


@app.command()
def status(context: typer.Context, where: _Where, scenario: ScenarioFile = None, as_json: AsJson = False) -> None:
    """Show a run's progress against its forecast."""
    from governor.cli.text import pairs_text
    from governor.journal.journal import Journal
    from governor.run.status import status_json, status_pairs

    with Journal.open(where) as journal:
        found = status_json(journal, foresee=context.obj, scenario=scenario_of(scenario, None, {}))
        print(json.dumps(found, indent=2, allow_nan=False) if as_json else pairs_text(status_pairs(found)))


@app.command()
def export(
    where: _Where,
    out: Annotated[
        str, typer.Option(metavar="FILE.jsonl", help="Results; failures go beside it, into FILE.errors.jsonl.")
    ],
    attempts: Annotated[
        str | None, typer.Option(metavar="FILE.csv", help="One row per attempt, with tokens, waits and cost.")
    ] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="FILE.yaml", help="What models cost; a dated list comes with Paceline.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Write the results so far, in input order."""
    from governor.journal.journal import Journal
    from governor.model.files import replaced
    from governor.model.words import plural
    from governor.profiles.loader import prices_in_force
    from governor.run.account import ATTEMPT_COLUMNS, attempt_rows, lines_of
    from governor.run.outputs import check_apart, errors_path, write_results

    results = Path(out)
    listed = prices_in_force(prices)
    files = {"--out": results, "the errors file": errors_path(results)}
    if attempts:
        files["--attempts"] = Path(attempts)
    check_apart(files if "://" in where else {"the journal": Path(where), **files})
    for file in files.values():
        if file.exists() and not overwrite:
            raise BadInput("it exists: name another file, or add --overwrite", str(file))
    with Journal.open(where) as journal:
        if attempts:
            with replaced(Path(attempts)) as table:
                rows = csv.writer(table, lineterminator="\n")
                rows.writerow(ATTEMPT_COLUMNS)
                rows.writerows(attempt_rows(journal, listed, date.today()))
        good, bad = write_results(results, lines_of(journal))
        counts = journal.counts()
    print(f"{results}: {plural(good, 'result')}; {errors_path(results)}: {plural(bad, 'error')}")
    left = counts.requests - good - bad
    if left:
        print(f"{plural(left, 'request')} not done yet")


@app.command()
def pause(where: _Where, pool: PoolName = None) -> None:
    """Stop launching until `resume`.

    Requests in flight continue.
    """
    from governor.journal.journal import PAUSE

    _steer(where, PAUSE, [], pool)


@app.command()
def resume(where: _Where, pool: PoolName = None) -> None:
    """Launch again after `pause`. (To continue a run that has ended, repeat its `paceline run` command.)"""
    from governor.journal.journal import RESUME

    _steer(where, RESUME, [], pool)


@app.command(name="set")
def set_(
    where: _Where,
    assignments: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="Settings to change.", show_default=False)
    ],
    pool: PoolName = None,
) -> None:
    """Change settings of a batch.

    They survive restarts until changed again or `unset`.
    """
    from governor.journal.journal import SET

    _steer(where, SET, assignments, pool)


@app.command()
def unset(
    where: _Where,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Settings; all if not given.", show_default=False)
    ] = None,
    pool: PoolName = None,
) -> None:
    """Withdraw what `set` changed.

    The settings of the run's own command apply again.
    """
    from governor.journal.journal import UNSET

    _steer(where, UNSET, names or [], pool)


def _steer(where: str, name: str, words: Sequence[str], pool: str | None) -> None:
    """Ask the running process, and wait until it has acted on the command."""
    from governor.journal.journal import SET, UNSET, Journal
    from governor.run.steer import POOL_WORD, check_unset, held_settings, split_words

    with Journal.open(where) as journal:
        policies = {stated.pool: stated.policy for stated in journal.settings()}
        words = [_with_its_name(word) for word in words]
        asked = [*([f"{POOL_WORD}{pool}"] if pool is not None else []), *words]
        names, plain = split_words(tuple(asked), policies)
        held = held_settings(journal.commands(), policies)
        changed: dict[str, Policy] = {}
        for each in names:
            # Report a mistake here rather than in the other process's log.
            if name == UNSET:
                check_unset(plain, held[each])
            else:
                changed[each] = policies[each].set_values(plain)
        running = journal.is_running()
        if running:
            for each, policy in changed.items():
                _check_still_fit(journal, each, policies[each], policy)
        if not running and name not in (SET, UNSET):
            raise BadInput("no process is working on it, so there is nothing to pause or resume", where)
        number = journal.ask(name, asked)
        if not running:
            print("recorded: no process is working on this run now; the next one applies it")
            return
        _wait_until_taken(journal, number, name)


def _with_its_name(word: str) -> str:
    """Return the word with a setting's short name replaced by the recorded one."""
    from governor.model.policy import knob_named

    name, equals, value = word.partition("=")
    knob = knob_named(name.strip())
    return word if knob is None else f"{knob.env}{equals}{value}"


def _check_still_fit(journal: Journal, pool: str, old: Policy, new: Policy) -> None:
    """Raise BadSetting for a limit below the need of a request still to be sent: the request would be lost, unsent."""
    from governor.law import TPD, TPM
    from governor.model.work import reserve_of

    before, after = old.params().limit, new.params().limit
    for d, name in ((TPM, "OPENAI_TPM_LIMIT"), (TPD, "OPENAI_TPD_LIMIT")):
        if after[d] <= 0.0 or 0.0 < before[d] <= after[d]:
            continue
        for request in journal.unfinished(pool):
            reserve = reserve_of(new, request.sizes)
            if reserve > after[d]:
                raise BadSetting(
                    f"{name}={after[d]:.0f}: request {quoted(request.custom_id)}, which is still to be sent, needs "
                    f"{reserve:,} tokens and would be lost: set {reserve} or more",
                    name,
                )


def _wait_until_taken(journal: Journal, number: int, name: str) -> None:
    until = time.monotonic() + TAKEN_S
    while time.monotonic() < until:
        command = journal.commands(number - 1)[0]
        if command.taken_s >= 0.0:
            if command.outcome:
                raise BadSetting(command.outcome)
            print({"pause": "paused", "resume": "resumed", "set": "changed", "unset": "withdrawn"}[name])
            return
        time.sleep(0.1)
    print(f"recorded, but the running process has not applied it within {TAKEN_S:.0f} s: see `paceline status`")


@app.command()
def verify(where: _Where, as_json: AsJson = False) -> None:
    """Repeat the decisions that `run --record` recorded.

    Shows the first that differs; the exit code is then 1.
    """
    from governor.journal.journal import Journal
    from governor.journal.verify import verify as decide_again

    with Journal.open(where) as journal:
        found = decide_again(journal.decisions())
        complaints = journal.complaints()
    if not found.chains and not complaints:
        raise BadInput("no decision was recorded in it: `paceline run --record` records them for `verify`", where)
    if as_json:
        difference = None if found.difference is None else str(found.difference)
        content = {"checked": found.checked, "chains": found.chains, "difference": difference, "database": complaints}
        print(json.dumps(content, indent=2))
    else:
        print(found)
        print("database: ok" if not complaints else "database: " + "; ".join(complaints[:5]))
    if found.difference is not None or complaints:
        raise typer.Exit(1)


@app.command()
def purge(
    where: _Where, yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False
) -> None:
    """Remove prompts and answers from a journal.

    Counts, attempts and decisions stay. The run can no longer be resumed or exported.
    """
    from governor.journal.journal import Journal

    with Journal.open(where, to_run=True) as journal:
        counts = journal.counts()
        left = counts.pending + counts.in_flight
        if not yes:
            _confirm(f"Remove all prompts and answers from {where}" + (f", {left:,} of them not done" if left else ""))
        journal.purge()
    print(f"{where}: prompts and answers are removed")


def _confirm(what: str) -> None:
    if not sys.stdin.isatty():
        raise BadInput("there is no terminal to ask for confirmation: add --yes")
    print(f"{what}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BadInput("nothing was removed")

"""Commands about settings: show those in force with their sources, and write them into another env file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from governor.cli.run import AsJson, Assignments, EnvFile, scenario_of

if TYPE_CHECKING:
    from governor.model.policy import Policy

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_DEFAULT, ENVIRONMENT, _SET, HELD, COMMAND = "default", "environment", "--set", "paceline set", "the run's own command"


@app.command()
def settings(
    env_file: EnvFile = None,
    assignments: Assignments = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Start from the preset guardrails or paceline.")
    ] = None,
    journal: Annotated[
        str | None, typer.Option(metavar="FILE.db", help="Show a run's settings, with those changed by `paceline set`.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="NAME", help="With --journal: show this pool's.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table with both presets.")] = False,
    as_json: AsJson = False,
) -> None:
    """List every setting with its value and source.

    Shows meaning and allowed range too. With the options of `run` it shows what that run would use; without any, what
    the environment states.
    """
    from governor.model.env_files import SCENARIO
    from governor.model.errors import BadSetting
    from governor.model.policy import KNOBS, knob_table

    if markdown:
        typer.echo(knob_table(), nl=False)
        return
    if journal is not None:
        if env_file or assignments or preset:
            raise BadSetting("--journal shows a run's own settings: leave out --env-file, --set and --preset")
        policy, origins, scenario = *_of_run(journal, pool), ""
    else:
        policy, origins = in_force(env_file, assignments, preset)
        scenario = scenario_of(None, env_file, os.environ)
    values = {knob.env: knob.text(getattr(policy, knob.name)) for knob in KNOBS}
    if as_json:
        told = {name: {"value": value, "from": origins.get(name, _DEFAULT)} for name, value in values.items()}
        print(json.dumps(told, indent=2))
        return
    for knob in KNOBS:
        typer.echo(f"{knob.env}={values[knob.env]}  ({origins.get(knob.env, _DEFAULT)})")
        typer.echo(f"    {knob.meaning}; {knob.allowed}")
    if scenario:
        typer.echo(f"{SCENARIO}={scenario}\n    what a plan assumed of the provider, for forecasts")


def in_force(
    env_files: list[str] | None, assignments: list[str] | None, preset: str | None
) -> tuple[Policy, dict[str, str]]:
    """Return the settings that these options make, and by name the source of each that is not a default."""
    from governor.model.env_files import paths_of, policy_of, read_env_file
    from governor.model.policy import KNOB_BY_ENV, KNOBS, Policy, knob_named

    base = Policy() if preset is None else Policy.preset(preset)
    policy = policy_of(env_files, environment=os.environ, assignments=assignments or (), base=base)
    origins = {} if preset is None else {k.env: f"preset {preset}" for k in KNOBS if k.name in base.model_fields_set}
    for path in paths_of(env_files):
        for name, stated in read_env_file(path).items():
            if name in KNOB_BY_ENV and (stated.value or "").strip():
                origins[name] = f"{path}:{stated.line}"
    if not env_files:
        origins |= {name: ENVIRONMENT for name in KNOB_BY_ENV if os.environ.get(name, "").strip()}
    named = (knob_named(word.partition("=")[0].strip()) for word in assignments or ())
    origins |= {knob.env: _SET for knob in named if knob is not None}
    return policy, origins


def _of_run(where: str, pool: str | None) -> tuple[Policy, dict[str, str]]:
    """Return the settings in force of a run's pool."""
    from governor.journal.journal import Journal
    from governor.model.errors import BadInput, BadSetting
    from governor.model.policy import KNOBS
    from governor.run.steer import held_settings, words_of

    with Journal.open(where) as journal:
        policies = {stated.pool: stated.policy for stated in journal.settings()}
        held = held_settings(journal.commands(), policies)
    if not policies:
        raise BadInput("no run has begun in it", where)
    if pool is None and len(policies) > 1:
        raise BadSetting(f"the run has several pools: name one with --pool ({', '.join(policies)})")
    name = next(iter(policies)) if pool is None else pool
    if name not in policies:
        raise BadSetting(f"there is no pool {name!r}: {', '.join(policies)}")
    # Commands given while no process ran it count for the next one.
    policy = policies[name].set_values(words_of(held[name]))
    stated = {k.env: COMMAND for k in KNOBS if getattr(policy, k.name) != k.guardrails}
    return policy, stated | dict.fromkeys(held[name], HELD)


@app.command()
def apply(
    source: Annotated[
        str, typer.Argument(metavar="SETTINGS.env", help="Such as out/recommended.env.", show_default=False)
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Your env file.", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and write nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write even if the settings in TARGET have changed since the plan.")
    ] = False,
) -> None:
    """Write a plan's settings into an env file.

    Only those settings change: comments, quotes and other names stay as they are. Shows the changed settings and no
    other line, and leaves a backup beside the file. Refuses if the settings in TARGET have changed since the plan.

    Example: paceline apply out/recommended.env .env
    """
    from governor.model.words import plural
    from governor.run.apply import apply as put_into

    done = put_into(Path(source), Path(target), write=not dry_run, insist=force)
    for change in done.changes:
        print(change)
    if not done.changes:
        print(f"{target}: nothing to change: it has these settings already")
    elif done.backup is None:
        print(f"{target}: {plural(len(done.changes), 'setting')} would change; nothing was written")
    else:
        print(f"{target}: {plural(len(done.changes), 'setting')} changed; the file as it was: {done.backup}")

"""The commands of the live half, as an app that `sim/app/cli.py` mounts; errors and exit codes are handled there.

What lives here: commands that need no simulator. What must not: imports that cost time at start-up; a command fetches
what it needs when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from governor import __version__
from governor.cli.journal import app as journal_app
from governor.cli.probe import app as probe_app
from governor.cli.run import app as live_app
from governor.cli.serve import FORECAST as FORECAST
from governor.cli.serve import WHAT_IF as WHAT_IF
from governor.cli.serve import app as serve_app

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(live_app)
app.add_typer(journal_app)
app.add_typer(probe_app)
app.add_typer(serve_app)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"paceline {__version__}")


@app.command()
def settings(
    env_file: Annotated[
        str | None, typer.Option("--env-file", metavar="FILE", help="Show the settings that this env file makes.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting on top; may be repeated.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Start from the preset guardrails or paceline.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table in markdown, both presets.")] = False,
) -> None:
    """List every setting and what it may be.

    With an option, the settings that are then in force, as an env file.
    """
    from governor.model.policy import Policy, knob_help, knob_table
    from governor.model.settings import policy_of

    if markdown:
        typer.echo(knob_table(), nl=False)
    elif env_file is None and not assignments and preset is None:
        typer.echo(knob_help(), nl=False)
    else:
        base = Policy.preset(preset) if preset is not None else None
        policy = policy_of(env_file, assignments=assignments or (), base=base)
        typer.echo(policy.to_env(everything=True), nl=False)

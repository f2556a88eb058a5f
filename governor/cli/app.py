"""The commands of the live half, as an app that `sim/app/cli.py` mounts; errors and exit codes are handled there."""

from __future__ import annotations

import typer

from governor import __version__
from governor.cli.journal import app as journal_app
from governor.cli.probe import JUDGE as JUDGE
from governor.cli.probe import app as probe_app
from governor.cli.run import app as live_app
from governor.cli.serve import FORECAST as FORECAST
from governor.cli.serve import WHAT_IF as WHAT_IF
from governor.cli.serve import app as serve_app
from governor.cli.settings import app as settings_app

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(live_app)
app.add_typer(journal_app)
app.add_typer(probe_app)
app.add_typer(serve_app)
app.add_typer(settings_app)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"paceline {__version__}")

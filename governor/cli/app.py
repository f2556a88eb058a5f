"""The commands that need no simulator, as one app that `sim/app/cli.py` mounts; it handles errors and exit codes."""

from __future__ import annotations

import typer

from governor.cli.journal import app as journal_app
from governor.cli.probe import JUDGE as JUDGE
from governor.cli.probe import app as probe_app
from governor.cli.profiles import app as profiles_app
from governor.cli.run import app as live_app
from governor.cli.serve import FORECAST as FORECAST
from governor.cli.serve import WHAT_IF as WHAT_IF
from governor.cli.serve import app as serve_app
from governor.cli.settings import app as settings_app

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
for commands in (live_app, journal_app, probe_app, profiles_app, serve_app, settings_app):
    app.add_typer(commands)

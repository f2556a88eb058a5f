"""The command `paceline notebook`: copies of the notebooks in a folder of the user's, and JupyterLab on them."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from governor.model.errors import PacelineError

NEEDS_NOTEBOOK = "notebooks need paceline[notebook]: pip install 'paceline[notebook]'"
NEEDED = ("jupyterlab", "ipywidgets", "numpy", "matplotlib", "pandas")


def notebook(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]", help="Which one to open: its number, or a part of its name.", show_default=False
        ),
    ] = "",
    to: Annotated[
        str, typer.Option("--to", metavar="DIR", help="Folder for your copies; what is there stays as it is.")
    ] = "paceline-notebooks",
    no_open: Annotated[bool, typer.Option("--no-open", help="Copy only; start nothing.")] = False,
) -> None:
    """Open the worked examples as notebooks.

    They answer an operator's questions on the example or on your own data. Copies are made in a folder of yours, where
    you may change them; then JupyterLab starts there.
    """
    if any(find_spec(module) is None for module in NEEDED):
        raise PacelineError(NEEDS_NOTEBOOK)
    from sim.base.packaged import copied_to, named

    first = named(name).name if name else ""
    for copy in copied_to(to):
        note = "  (yours, left as it is; it differs from the one that comes along)" if copy.kept else ""
        print(f"{copy.path}{note}", flush=True)
    if no_open:
        return
    command = [sys.executable, "-m", "jupyterlab", str(Path(to) / first) if first else str(to)]
    try:
        # In the foreground, as if typed: JupyterLab says where it is, and ends with Ctrl-C.
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return
    if code:
        raise typer.Exit(code)

"""The command `paceline notebook`: copies of the notebooks in a folder of the user's, and JupyterLab on them."""

from __future__ import annotations

import difflib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from governor.model.errors import BadInput, BadSetting, PacelineError
from governor.model.files import write_atomically

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

    first = named(name).name if name else ""
    for copy in copied_to(to):
        note = "  (your copy, left as it is; it differs from the shipped one)" if copy.kept else ""
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


# ---------------------------------------------------------------- what comes with the package


_HERE = Path(__file__).resolve().parents[1]
# In a wheel everything lies in one folder; beside it, where each is worked on.
SHARED = _HERE / "share"
_PLACES = {"notebooks": (SHARED / "notebooks", _HERE.parent / "notebooks"), "": (SHARED, _HERE.parent / "examples")}


class NotebookCopy(NamedTuple):
    """A notebook in the user's folder; `kept`: it was there already, and differs from the one that comes along."""

    path: Path
    kept: bool


def example(name: str = "batch.jsonl") -> str:
    """Return the path of an example that comes along: `batch.jsonl`, 200 requests in batch format, or `today.env`."""
    for folder in _PLACES[""]:
        if (folder / name).is_file():
            return str(folder / name)
    raise BadInput("there is no such example: batch.jsonl and today.env come with Paceline", name)


def notebooks() -> list[Path]:
    """Return the notebooks that come along, in order."""
    found = next((folder for folder in _PLACES["notebooks"] if folder.is_dir()), None)
    return sorted(found.glob("[0-9]*.ipynb")) if found else []


def named(name: str) -> Path:
    """Return the notebook of that number, name or part of a name. Raise BadSetting for none or several."""
    found = notebooks()
    word = name.removesuffix(".ipynb").lower().replace("-", "_").replace(" ", "_")
    # "2" and "02" are numbers, not parts of a name.
    meant = [p for p in found if p.stem == word or (word.isdigit() and int(p.stem.split("_")[0]) == int(word))]
    meant = meant or [p for p in found if word and not word.isdigit() and word in p.stem]
    if len(meant) == 1:
        return meant[0]
    stems = [p.stem for p in meant or found]
    if meant:
        raise BadSetting(f"{name!r} may be {' or '.join(stems)}: write more of it")
    near = difflib.get_close_matches(word, [part for stem in stems for part in (stem, *stem.split("_"))], 1)
    raise BadSetting(f"there is no notebook {name!r}: " + (f"did you mean {near[0]}?" if near else ", ".join(stems)))


def copied_to(folder: str | Path) -> list[NotebookCopy]:
    """Copy the notebooks into the folder, which is created if need be; existing files stay as they are.

    BadInput where nothing can be written there.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "this is not a folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise BadInput(f"cannot be written into: {reason}", str(folder)) from None
    done = []
    for path in notebooks():
        target, text = place / path.name, path.read_bytes()
        is_there = target.exists()
        if not is_there:
            with write_atomically(target) as unfinished:
                unfinished.write_bytes(text)
        done.append(NotebookCopy(target, is_there and target.read_bytes() != text))
    return done

"""The notebooks answer when run from clean: every cell runs without a warning, every figure has something on it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from governor.model.errors import BadInput, BadSetting, PacelineError
from sim.app import notebook_command as notebook_cli
from sim.app import notebook_command as packaged
from sim.app.cli import main
from tests.live import WAIT_S

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
# Less would be an empty frame: axes alone have a handful of greys.
COLOURS, BYTES = 20, 5_000


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(path) for output in cell.get("outputs", [])]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of copies, as a user has them, each executed by nbmake in a kernel of its own, two at a time."""
    folder = tmp_path_factory.mktemp("notebooks")
    packaged.copied_to(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV_"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    options = ["--nbmake", "--overwrite", "--nbmake-timeout=400", "-n", "2", "-q", "-W", "error"]
    # Not this project's settings: the copies are no part of it.
    command = [sys.executable, "-m", "pytest", *options, "-c", os.devnull, "--rootdir", str(folder), str(folder)]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580, check=False)
    (folder / "told.txt").write_text(ran.stdout + ran.stderr, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_clean_and_draws_something(name: str, executed: Path) -> None:
    import matplotlib.image

    path = executed / f"{name}.ipynb"
    told = (executed / "told.txt").read_text(encoding="utf-8")
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), told[-6_000:]
    wrong = [o for o in outputs(path) if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not wrong, told[-6_000:]
    pictures = [base64.b64decode(o["data"]["image/png"]) for o in outputs(path) if "image/png" in o.get("data", {})]
    assert pictures
    for png in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(png))[::3, ::3, :3]
        assert len(png) > BYTES
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > COLOURS, "a figure without anything on it"


def test_they_are_kept_without_outputs() -> None:
    """`make strip` takes them out, as the hook of `make hooks` does before each commit."""
    command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, NOTEBOOKS)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not any(outputs(path) for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_asks_answers_and_says_how_to_check(path: Path) -> None:
    first, data, *rest = cells(path)
    title, *answer = source(first).split("\n\n")
    assert title.startswith("# ")
    assert title.endswith("?")
    assert answer
    assert answer[0].startswith("**")
    assert data["cell_type"] == "code"
    assert "MY_" in source(data), "the first code cell takes a path to one's own data"
    headings = [source(cell).split("\n")[0] for cell in rest if cell["cell_type"] == "markdown"]
    assert headings[-1] == "## How to check this"
    # Functions of any length belong into `sim`, where they are tested.
    for cell in cells(path):
        assert source(cell).count("def ") <= 1 or cell["cell_type"] == "markdown"


def test_no_code_stands_in_two_notebooks() -> None:
    seen: dict[str, str] = {}
    for path in NOTEBOOKS:
        for cell in cells(path)[2:]:
            if cell["cell_type"] == "code" and source(cell).count("\n") > 3:
                assert seen.setdefault(source(cell), path.stem) == path.stem


# ---------------------------------------------------------------- what comes along, and the command


def test_the_wheel_holds_them(tmp_path: Path) -> None:
    """Laid out as the wheel lays them out, the notebooks and the example lie where the command looks for them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    mapping = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for origin, target in mapping.items():
        origin = ROOT / origin
        place = tmp_path / target
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if origin.is_dir() else shutil.copy)(origin, place)
    share = tmp_path / packaged.SHARED.relative_to(ROOT)
    assert sorted(path.stem for path in (share / "notebooks").glob("*.ipynb")) == NAMES
    assert (share / "batch.jsonl").read_bytes() == Path(packaged.example()).read_bytes()
    assert (share / "today.env").is_file()


def test_copies_never_overwrite_what_somebody_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    assert main(["notebook", "--no-open", "--to", str(folder)]) == 0
    assert sorted(path.stem for path in folder.iterdir()) == NAMES
    edited, gone = folder / NOTEBOOKS[0].name, folder / NOTEBOOKS[1].name
    edited.write_text("mine")
    gone.unlink()
    capsys.readouterr()
    assert main(["notebook", "--no-open", "--to", str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert edited.read_text() == "mine"
    assert gone.read_bytes() == NOTEBOOKS[1].read_bytes()
    assert [("left as it is" in line) for line in said] == [True] + [False] * (len(NAMES) - 1)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("2", NAMES[1]), ("02", NAMES[1]), (NAMES[3], NAMES[3]), ("429s", NAMES[5]), ("stagger", NAMES[1])],
)
def test_a_part_of_a_name_is_enough(name: str, stem: str) -> None:
    assert packaged.named(name).stem == stem


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("99", "there is no notebook '99'"),
        ("stager", "there is no notebook 'stager': did you mean stagger"),
        ("i", "write more of it"),
    ],
)
def test_a_name_that_is_none_or_several(name: str, message: str) -> None:
    with pytest.raises(BadSetting, match=message):
        packaged.named(name)


def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadInput, match="this is not a folder"):
        packaged.copied_to(file)
    assert main(["notebook", "nothing", "--to", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("there is no notebook 'nothing'")
    assert not (tmp_path / "new").exists()
    with pytest.raises(BadInput, match=r"batch\.jsonl and today\.env come with Paceline"):
        packaged.example("other.jsonl")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(notebook_cli, "NEEDED", ("no_such_module_of_ours",))
    with pytest.raises(PacelineError, match=r"pip install 'paceline\[notebook\]'"):
        notebook_cli.notebook(to=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_jupyterlab_opens_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def started(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", started)
    notebook_cli.notebook("limit", to=str(tmp_path))
    assert commands == [[sys.executable, "-m", "jupyterlab", str(tmp_path / f"{NAMES[2]}.ipynb")]]
    notebook_cli.notebook(to=str(tmp_path))
    assert commands[1][-1] == str(tmp_path)


def test_sliders_show_the_first_state_and_follow() -> None:
    from sim import Scenario
    from sim.reporting.sliders import what_if

    box = what_if(Scenario([{"prompt_tokens": 900, "output_tokens": 100}] * 20, tpm=30_000), "stagger_s")
    slider, picture, words = box.children
    assert slider.value == 15.0
    first = bytes(picture.value), words.value
    assert first[0].startswith(b"\x89PNG")
    assert "OPENAI_STAGGER_SECONDS=15" in first[1]
    slider.value = 0.0
    assert bytes(picture.value) != first[0]
    assert "OPENAI_STAGGER_SECONDS" not in words.value
    with pytest.raises(ValueError, match="stager_s has no slider"):
        what_if(Scenario([{"prompt_tokens": 900, "output_tokens": 100}]), "stager_s")

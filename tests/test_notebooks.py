"""The notebooks answer when run from clean: every cell runs, and every figure has something on it."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# A process of its own: a notebook's client and kernel do not share this one's event loop and warning filters.
RUN = "from nbclient.cli import main; main()"


def _outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def _pictures(notebook: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(o["data"]["image/png"]) for o in _outputs(notebook) if "image/png" in o.get("data", {})]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_clean_and_draws_something(path: Path, tmp_path: Path) -> None:
    import matplotlib.image

    assert not _outputs(json.loads(path.read_text(encoding="utf-8"))), "outputs belong to a run, not to the repository"
    done = tmp_path / path.name
    words = [sys.executable, "-c", RUN, str(path), "--output", str(done), "--timeout", "120"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-2_000:]
    pictures = _pictures(json.loads(done.read_text(encoding="utf-8")))
    assert pictures
    for png in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(png))
        assert pixels[..., :3].std() > 0.05, "a figure without anything on it"

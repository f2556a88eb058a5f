"""The directive `ran`: a `paceline` command, run while the page is built, and what it printed.

    ```{ran} paceline simulate examples/batch.jsonl --env-file examples/today.env
    ```

It runs in the project's folder, without the environment's settings and with a width that fits a page. A command that
fails ends the build.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
TAKES_S = 120


def printed(command: str) -> str:
    """What a command prints. RuntimeError, with its complaint, where it fails."""
    program, *words = shlex.split(command)
    assert program == "paceline", command
    ours = ("OPENAI_", "FINALIZE_", "PREFLIGHT_", "PACELINE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-m", "sim.app.cli", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TAKES_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout.rstrip()


class Ran(SphinxDirective):
    """See the module."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The command and its output, as one block."""
        command = self.arguments[0]
        text = f"$ {command}\n{printed(command)}"
        block = nodes.literal_block(text, text, language="console")
        self.set_source_info(block)
        return [block]


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's hook."""
    app.add_directive("ran", Ran)
    return {"parallel_read_safe": True}

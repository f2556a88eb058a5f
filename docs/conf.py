"""How the documentation is built: `make docs`, warnings are errors, and no page loads anything from elsewhere.

What is made from the code (`_ext/pages.py`, `_ext/diagram.py`) is written to `docs/made` before the pages are read.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

from governor import __version__  # noqa: E402

project = "Paceline"
author = "Paceline"
project_copyright = "Paceline, MIT licence"
version = release = __version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "ran"]
exclude_patterns = ["made"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

# Docstrings are written in plain text with `code` in single quotes of the kind that markdown knows.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"Paceline {version}"
html_static_path = ["_static"]
html_css_files = ["paceline.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
# Furo reads `pygments_style` for light pages and this one for dark ones.
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

# Everything that matplotlib finds to say about fonts and caches is no warning of this build.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _made(app: Sphinx) -> None:
    import diagram
    import pages

    pages.written(HERE / "made")
    diagram.written(HERE / "made")


def _as_written(app: Sphinx, kind: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """An indented block of a docstring is a block of code, as in markdown; Sphinx would take it for a quotation."""
    written: list[str] = []
    for line in lines:
        begins = line.startswith("    ") and bool(written) and not written[-1].strip()
        above = next((each for each in reversed(written) if each.strip()), "")
        if begins and not above.startswith("    "):
            written += ["::", ""]
        written.append(line)
    lines[:] = written


def setup(app: Sphinx) -> None:
    """Sphinx's hook: what is made from the code is there before the sources are looked for."""
    app.connect("builder-inited", _made)
    app.connect("autodoc-process-docstring", _as_written)

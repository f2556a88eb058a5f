"""Builds the documentation and looks it over: `python docs/build.py out/site`, which is what `make docs` does.

The folder is made anew. Any warning of the builder ends it, and so do a link that leads nowhere, a page that loads
anything from elsewhere, and a build that takes too long.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TAKES_S = 300


def built(site: Path) -> int:
    """The builder's exit code; 1 where it had to be stopped."""
    shutil.rmtree(site, ignore_errors=True)
    words = ["-W", "--keep-going", "-q", "-E", "-d", str(site.parent / ".doctrees"), "-b", "html", str(HERE), str(site)]
    try:
        return subprocess.run([sys.executable, "-m", "sphinx", *words], timeout=TAKES_S, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"the documentation was not built within {TAKES_S} s", file=sys.stderr)
        return 1


def main(words: list[str]) -> int:
    """The exit code."""
    if len(words) != 1:
        print("usage: python docs/build.py FOLDER", file=sys.stderr)
        return 2
    site = Path(words[0]).resolve()
    code = built(site)
    if code:
        return code
    sys.path.insert(0, str(HERE / "_ext"))
    from outside import faults

    found = list(faults(site))
    pages = len(list(site.rglob("*.html")))
    print("\n".join(found) or f"documentation: {words[0]}/index.html ({pages} pages, nothing loaded from elsewhere)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

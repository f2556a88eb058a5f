"""`docs/explanation/accuracy.md`, part by part: each command that measures something writes its own part of it."""

from __future__ import annotations

import platform
import re
from datetime import UTC, datetime
from pathlib import Path

from scipy import stats

from governor import __version__
from governor.model.files import write_atomically

PAGE = Path(__file__).resolve().parent.parent / "docs" / "explanation" / "accuracy.md"


def told(hits: int, of: int) -> str:
    """A coverage with its own interval (Clopper and Pearson, 95 %), in words."""
    if not of:
        return "none"
    low, high = stats.binomtest(hits, of).proportion_ci(0.95, method="exact")
    return f"{hits:,} of {of:,}, {hits / of:.1%} ({low:.1%} to {high:.1%})"


def rows(header: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(part: str, text: str, command: str, page: Path = PAGE) -> None:
    """Replaces that part of the page, between its two comments, by `text`, dated and with the command that made it."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    when = datetime.now(UTC).strftime("%-d %B %Y")
    made = f"`{command}`, {when}, version {__version__}, Python {platform.python_version()}."
    old = page.read_text(encoding="utf-8")
    new, found = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{made}\n\n{text}\n{end}", old, flags=re.DOTALL
    )
    assert found == 1, f"{page} has no part {part!r}"
    with write_atomically(page) as unfinished:
        Path(unfinished).write_text(new, encoding="utf-8")

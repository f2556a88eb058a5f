"""Columns and paragraphs of plain text, the same in a terminal and in a pipe; `width` is in characters."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]], *, width: int = 0, ruled: bool = True) -> str:
    """Return rows as aligned columns, with the first row underlined if `ruled`; the last column wraps at `width`.

    Columns after the first are flush right, except a last one that wraps.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if width:
        widths[-1] = max(24, min(widths[-1], width - sum(widths[:-1]) - 2 * (len(widths) - 1)))
    lines = []
    for number, row in enumerate(rows):
        cells = [
            textwrap.wrap(cell, widths[i]) or [""] if width and i == len(row) - 1 else [cell]
            for i, cell in enumerate(row)
        ]
        for depth in range(max(map(len, cells))):
            parts = []
            for i, cell in enumerate(cells):
                text = cell[depth] if depth < len(cell) else ""
                left = i == 0 or (width and i == len(row) - 1)
                parts.append(text.ljust(widths[i]) if left else text.rjust(widths[i]))
            lines.append("  ".join(parts).rstrip())
        if number == 0 and ruled:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def facts(pairs: Sequence[tuple[str, str]], width: int) -> str:
    """Return names with their texts, the texts aligned and wrapped."""
    return table([list(pair) for pair in pairs], width=width, ruled=False)


def wrapped(text: str, width: int, indent: str = "") -> str:
    """Return a wrapped paragraph with later lines indented."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


# ---------------------------------------------------------------- the same as HTML


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table of the cells, with the first row as header."""
    first, *rest = rows
    head = "".join(f'<th style="text-align:left">{html.escape(cell)}</th>' for cell in first)
    lines = [[f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in row] for row in rest]
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f'<table style="margin:0"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def html_paragraph(text: str) -> str:
    """Return plain text as an HTML paragraph."""
    return f"<p>{html.escape(text)}</p>"

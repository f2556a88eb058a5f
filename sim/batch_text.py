"""Batch API results as text for a terminal or a pipe: the files of `split`, and live against Batch.

What lives here: pure functions from results to lines. What must not: printing, and columns and paragraphs (`layout`).
"""

from __future__ import annotations

from sim.layout import table, wrapped
from sim.split import HEADROOM, LIVE, Split


def split_text(found: Split, width: int) -> str:
    """What was written where, for people."""
    rows = [["file", "model", "requests", "MB", "input tokens"]]
    for part in found.parts:
        size = f"{part.bytes / 1e6:,.1f}"
        rows.append([part.name, part.model, f"{part.requests:,}", size, f"{part.input_tokens:,}"])
    said = [f"{found.requests:,} requests in {len(found.parts):,} files in {found.folder}, each in exactly one."]
    if found.waves > 1:
        said.append(f"Hand in a wave when the one before it has ended: {found.waves:,} waves, one fills the queue.")
    if found.queue_tokens:
        said.append(
            f"Input tokens are estimated from the text; for that {HEADROOM:.0%} of the queue of "
            f"{found.queue_tokens:,} per model is left free."
        )
    if any(part.name == LIVE for part in found.parts):
        said.append(f"`paceline run {found.folder}/{LIVE}` sends the rest live.")
    return "\n\n".join((table(rows, width=width), wrapped(" ".join(said), width)))

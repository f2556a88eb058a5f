"""Batch API results as text for a terminal or a pipe: the files of `split`, and live against Batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from governor.model.phrases import plural
from governor.model.prices import dollars_text
from sim.base import words
from sim.base.layout import table, wrapped
from sim.selection.batch_api import Terms, Way
from sim.selection.split import HEADROOM, LIVE, Split


def split_text(found: Split, width: int) -> str:
    """What was written where, for people."""
    rows = [["file", "model", "requests", "MB", "input tokens"]]
    for part in found.parts:
        size = f"{part.bytes / 1e6:,.1f}"
        rows.append([part.name, part.model, f"{part.requests:,}", size, f"{part.input_tokens:,}"])
    files = plural(len(found.parts), "file")
    said = [f"{plural(found.requests, 'request')} in {files} in {found.folder}, each in exactly one."]
    if found.waves > 1:
        said.append(f"Hand in a wave when the one before it has ended: {found.waves:,} waves, one fills the queue.")
    if found.queue_tokens:
        said.append(
            f"Input tokens are estimated from the text; for that {HEADROOM:.0%} of the queue of "
            f"{found.queue_tokens:,} per model is left free."
        )
    if found.note:
        said.append(f"{found.note}.")
    if any(part.name == LIVE for part in found.parts):
        said.append(f"`paceline run {found.folder}/{LIVE}` sends the rest live.")
    return "\n\n".join((table(rows, width=width), wrapped(" ".join(said), width)))


def ways_text(ways: Sequence[Way], terms: Terms, confidence: float, width: int) -> str:
    """Live, Batch or split, for people, with what is assumed."""
    rows = [["", "live", "cost", "done by then", "finishes after, P50", "waves"]]
    for way in ways:
        after = words.duration(way.finish_s) if math.isfinite(way.finish_s) else "never"
        done = words.percent(way.done_probability)
        waves = f"{way.waves:,}" if way.waves else ""
        rows.append([way.name, words.percent(way.live_share), dollars_text(way.cost_usd), done, after, waves])
    p50, p95 = terms.turnaround_s
    queue = (
        f"a queue of {terms.queue_tokens:,} input tokens per model" if terms.queue_tokens else "a queue without limit"
    )
    said = (
        f"Live is at the present limits. The Batch API is assumed: each file takes {words.duration(p50)} (P50) to "
        f"{words.duration(p95)} (P95), log-normal, and expires after 24 h; {queue}; {terms.discount:.0%} off the price."
    )
    if terms.cached_share:
        said += f" {terms.cached_share:.0%} of the prompt tokens are cached live, none in the Batch API."
    return "\n\n".join((wrapped(_choice(ways, confidence), width), table(rows, width=width), wrapped(said, width)))


def _choice(ways: Sequence[Way], confidence: float) -> str:
    """Which way to take, in a sentence."""
    sure = [way for way in ways if way.done_probability >= confidence]
    wish = f"with {words.percent(confidence)} probability"
    if not sure:
        best = max(ways, key=lambda way: way.done_probability)
        return f"Live, Batch or split? None is done by then {wish}; {_named(best)} comes nearest."
    priced = all(way.cost_usd is not None for way in sure)
    # Where nothing is known of prices, less live is cheaper all the same.
    best = min(sure, key=lambda way: (way.cost_usd or 0.0) if priced else way.live_share)
    return f"Live, Batch or split? The cheapest way that is done by then {wish}: {_named(best)}."


def _named(way: Way) -> str:
    return f"a split with {words.percent(way.live_share)} live" if way.name == "split" else way.name

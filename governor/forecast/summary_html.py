"""Render a `Summary` as HTML for a notebook: a table, and a small figure of the time and of the causes of waiting.

Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart; each is named beside the figure with its
share. Text and lines take the notebook's own colour, so that light and dark themes read alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from governor.model.phrases import WAITED_FOR, duration, percent

if TYPE_CHECKING:
    from governor.forecast.summary import Summary

COLOURS = {
    "concurrency": "#0072b2",
    "stagger": "#e69f00",
    "tpm": "#009e73",
    "rpm": "#56b4e9",
    "day": "#cc79a7",
    "hold": "#d55e00",
    "paused": "#8c8c8c",
    "backoff": "#5a616b",
}
# A share below this is a hair on the figure and a needless word beside it.
SMALLEST = 0.005
WIDTH, BAR = 560, 14


def summary_html(s: Summary) -> str:
    """Return the summary as one `<div>`."""
    rows = "".join(
        f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{text}</td></tr>'
        for name, text in _rows(s)
    )
    return f'<div><table style="margin:0">{rows}</table>{_figure(s)}</div>'


def _rows(s: Summary) -> Iterator[tuple[str, str]]:
    yield "finishes after", f"{duration(s.makespan_s)} ({s.makespan_s:,.0f} s)"
    yield "shortest possible", f"{duration(s.bound_s)} on this provider, whatever the settings"
    yield "efficiency", "not quoted: requests were lost" if s.efficiency is None else percent(s.efficiency)
    yield "429s", f"{s.throttled:,} in {s.attempts:,} attempts"
    failures = ", ".join(f"{code} {count:,}" for code, count in s.failures.items())
    yield "lost", f"{s.failed:,} of {s.requests:,}" + (f": {failures}" if failures else "")
    yield "in flight, at most", f"{s.peak_in_flight:,}"
    yield "tokens", f"{s.reserved_tokens:,} reserved, {s.charged_tokens:,} charged, {s.used_tokens:,} used"
    if s.cost_usd is not None:
        yield "cost", f"${s.cost_usd:,.2f}"


def _figure(s: Summary) -> str:
    """Return two bars: how much of the time no scheduler could have saved, and what the requests waited for."""
    shares = shares_of(s.waits_s)
    needed = min(1.0, s.bound_s / s.makespan_s) if s.makespan_s > 0.0 else 0.0
    bars = _bar(0, [("currentColor", needed, f"shortest possible: {duration(s.bound_s)}")], "time")
    bars += _bar(1, [(COLOURS[cause], share, f"{cause}: {percent(share)}") for cause, share in shares], "waiting")
    height = 2 * (BAR + 8)
    legend = " ".join(
        f'<span style="white-space:nowrap"><span style="color:{COLOURS[cause]}">&#9632;</span> '
        f"{WAITED_FOR[cause][1]} {percent(share)}</span>"
        for cause, share in shares
    )
    told = f"dark: {percent(needed)} of the time is the shortest possible; requests waited for "
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="time and waiting" style="max-width:100%">{bars}</svg>'
        f'<div style="font-size:90%;max-width:{WIDTH}px">{told}{legend or "nothing"}</div>'
    )


def shares_of(waits_s: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return causes with their share of all waiting, largest first; none that is too small to be seen."""
    total = sum(waits_s.values())
    ranked = sorted(waits_s.items(), key=lambda item: -item[1])
    return [(cause, wait / total) for cause, wait in ranked if total > 0.0 and wait / total >= SMALLEST]


def _bar(row: int, parts: list[tuple[str, float, str]], name: str) -> str:
    """Return a full-width bar in parts, each with its colour, share and tooltip, with a frame around the rest."""
    left, y = 64.0, row * (BAR + 8) + 4
    room = WIDTH - left - 1.0
    text = f'<text x="0" y="{y + BAR - 3}" font-size="12" fill="currentColor">{name}</text>'
    frame = f'<rect x="{left}" y="{y}" width="{room:.1f}" height="{BAR}" fill="none" stroke="currentColor"/>'
    for colour, share, tooltip in parts:
        shape = f'x="{left:.1f}" y="{y}" width="{share * room:.1f}" height="{BAR}" fill="{colour}"'
        text += f"<rect {shape}><title>{tooltip}</title></rect>"
        left += share * room
    return text + frame

"""Requests and answers that no file states: drawn from a distribution, or taken from rows that are known.

Chance is keyed by seed and row (`governor/model/keyed.py`), evaluated over whole columns by the same function: a row
keeps its answer regardless of the rows before and after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.forecast.mixes import Z95
from governor.model.errors import BadInput
from governor.model.estimate import CHAT, EMBEDDINGS
from governor.model.keyed import ARRIVAL, OUTPUT_LENGTH, RESAMPLE, keyed_uniform
from sim.model.workload import ASSUMED, BLOCK, TOKENS_MAX, Real, Whole, Workload, constant

# Output cap declared by each request of a trace that has no such column. It is the same for every row: a cap derived
# from the row's own answer would tell the governor what it cannot know.
CAP_ASSUMED = 4_096
# Sigma of answer lengths if nothing is known. The public traces have P95/P50 = 3.5 (Azure conversations) and 4.4 (arXiv
# summaries), log-normal sigma 0.76 and 0.90. With the median at a quarter of the cap, the cap cuts 4 % of answers:
# users set caps so that few answers are cut. A cap above 2,000 is taken as a safety net that says nothing about the
# length.
SIGMA_ASSUMED = 0.8
P50_OF_CAP = 0.25
P50_ASSUMED_MAX = 500.0
P50_ASSUMED_NO_CAP = 200.0
# Standard normal value of the 95th percentile.
# A request without an old result takes the answer of one of this many requests with the most similar prompts.
NEIGHBOURS = 32
# Classes of declared caps within which answers are alike: the most classes, and the known answers per class.
CLASSES_MOST, CLASS_LEAST = 16, 15


def uniforms(seed: int, count: int, purpose: int) -> Real:
    """Return one keyed uniform number per row, equal to what `keyed_uniform` gives row by row."""
    drawn = np.empty(count)
    for start in range(0, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count), dtype=np.uint64)
        drawn[start : start + BLOCK] = keyed_uniform(seed, rows, 0, purpose)  # type: ignore[arg-type]
    return drawn


def lognormal_tokens(seed: int, p50: float | Real, sigma: float, count: int, purpose: int = OUTPUT_LENGTH) -> Whole:
    """Return log-normal token counts, at least 1, with median `p50` (one, or one per row), keyed by seed and row."""
    # SciPy's `ndtri` is the same function, but its import takes a quarter of a second, longer than most batches need.
    from statistics import NormalDist

    u = uniforms(seed, count, purpose)
    tokens = np.empty(count, np.int64)
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        normal = np.array([*map(NormalDist().inv_cdf, u[block].tolist())])
        lengths = (p50[block] if isinstance(p50, np.ndarray) else p50) * np.exp(sigma * normal)
        tokens[block] = np.rint(np.clip(lengths, 1.0, TOKENS_MAX))
    return tokens


def sigma_of(p50: float, p95: float) -> float:
    """Return the sigma of the log-normal with this median and 95th percentile: ln(P95 / P50) / 1.645."""
    return math.log(p95 / p50) / Z95


def with_outputs_drawn(workload: Workload, p50: float, p95: float, seed: int) -> Workload:
    """Return the workload with answers drawn from the log-normal of these two quantiles; embeddings have none."""
    drawn = lognormal_tokens(seed, p50, sigma_of(p50, p95), len(workload))
    text = f"log-normal with the given P50 {p50:,.6g} and P95 {p95:,.6g} tokens"
    return workload.with_(
        output_tokens=np.where(workload.endpoint == EMBEDDINGS, 0, drawn),
        provenance={"output tokens": (ASSUMED, text)},
    )


def with_outputs_assumed(workload: Workload, seed: int) -> Workload:
    """Return the workload with answers drawn from the assumed model (SIGMA_ASSUMED gives the reasons)."""
    quarter = np.clip(P50_OF_CAP * workload.max_tokens, 1.0, P50_ASSUMED_MAX)
    p50 = np.where(workload.max_tokens < 0, P50_ASSUMED_NO_CAP, quarter)
    drawn = workload.n * lognormal_tokens(seed, p50, SIGMA_ASSUMED, len(workload))
    text = (
        f"log-normal, P50 a quarter of the declared cap, at most {P50_ASSUMED_MAX:.0f} "
        f"({P50_ASSUMED_NO_CAP:.0f} without a cap), P95 {math.exp(SIGMA_ASSUMED * Z95):.1f} times that; "
        "--outputs-from or --output-tokens replaces it"
    )
    return workload.with_(
        output_tokens=np.where(workload.endpoint == EMBEDDINGS, 0, drawn),
        provenance={"output tokens": (ASSUMED, text)},
    )


def similar_outputs(workload: Workload, known: Whole, seed: int) -> Whole:
    """Return answers for the rows where `known` is -1, from the others' joint distribution of cap, prompt and answer.

    Each row takes the answer of one of 32 rows of its cap class (`cap_classes`), at most half of a small class, whose
    prompts are nearest to its own in rank; keyed by row. At least one answer must be known.
    """
    present, missing = np.flatnonzero(known >= 0), np.flatnonzero(known < 0)
    prompts, of = workload.prompt_tokens, cap_classes(np.asarray(workload.max_tokens), present)
    u = uniforms(seed, len(workload), RESAMPLE)
    filled = known.copy()
    for each in range(int(of.max()) + 1):
        mine, rows = present[of[present] == each], missing[of[missing] == each]
        ordered = mine[np.argsort(prompts[mine], kind="stable")]
        rank = np.searchsorted(prompts[ordered], prompts[rows])
        width = min(NEIGHBOURS, (len(ordered) + 1) // 2)
        first = np.clip(rank - width // 2, 0, len(ordered) - width)
        filled[rows] = known[ordered[first + (u[rows] * width).astype(np.int64)]]
    return filled


def cap_classes(caps: Whole, present: Whole) -> Whole:
    """Return a cap class for each row, from 0, such that each class contains some of the rows `present`. Shape (rows,).

    The present rows are split by declared cap into classes of about equal size; one per distinct cap if caps are few.
    """
    count = min(CLASSES_MOST, len(present) // CLASS_LEAST)
    shares = np.arange(1, count) / max(1, count)
    edges = np.unique(np.quantile(caps[present], shares, method="inverted_cdf")) if count > 1 else np.zeros(0)
    of = np.searchsorted(edges, caps)
    return np.minimum(of, of[present].max())


# ---------------------------------------------------------------- workloads without a file


def _narrow(column: Whole) -> Whole:
    """Return the column in half the memory, if its numbers allow it; charges are still computed in 64 bits."""
    return column.astype(np.int32) if int(column.max(initial=0)) < 2**31 else column


def from_tokens(
    prompt_tokens: Whole,
    output_tokens: Whole,
    *,
    max_tokens: int | Whole = CAP_ASSUMED,
    arrival_s: Real | None = None,
    recorded_s: Real | None = None,
    provenance: Mapping[str, tuple[str, str]] | None = None,
    **columns: Any,
) -> Workload:
    """Return a workload of known token counts without text: chat, one message of 4 characters per token.

    `columns`: any other column of `Workload`, in place of the default used here.
    """
    count = len(prompt_tokens)
    given: dict[str, Any] = {
        "endpoint": constant(CHAT, count),
        "chars": _narrow(4 * prompt_tokens) if len(prompt_tokens) > BLOCK else 4 * prompt_tokens,
        "role_chars": constant(len("user"), count),
        "messages": constant(1, count),
        "images": constant(0, count),
        "tools": constant(0, count),
        "n": constant(1, count),
        "max_tokens": constant(max_tokens, count) if isinstance(max_tokens, int) else max_tokens,
        "arrival_s": constant(0.0, count, np.float64) if arrival_s is None else arrival_s,
        "recorded_s": constant(-1.0, count, np.float64) if recorded_s is None else recorded_s,
        "has_arrivals": arrival_s is not None,
        "provenance": dict(provenance or {}),
        **columns,
    }
    return Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, **given)


def parametric(
    count: int,
    *,
    prompt_tokens: tuple[float, float],
    output_tokens: tuple[float, float],
    max_tokens: int = CAP_ASSUMED,
    arrival_rate_per_s: float = 0.0,
    seed: int = 0,
) -> Workload:
    """Return `count` requests with independent log-normal prompts and answers, each given as (P50, P95) tokens.

    `max_tokens`: the declared cap, -1 = none. `arrival_rate_per_s`: Poisson arrivals from time 0; 0 = unknown arrivals.
    """
    # Prompts and answers need different draws from one row; the resampling purpose is unused here.
    prompts = lognormal_tokens(seed, prompt_tokens[0], sigma_of(*prompt_tokens), count, RESAMPLE)
    outputs = lognormal_tokens(seed, output_tokens[0], sigma_of(*output_tokens), count)
    arrival_s = None
    provenance = {
        "prompt tokens": (ASSUMED, f"log-normal, P50 {prompt_tokens[0]:,.6g}, P95 {prompt_tokens[1]:,.6g}"),
        "output tokens": (ASSUMED, f"log-normal, P50 {output_tokens[0]:,.6g}, P95 {output_tokens[1]:,.6g}"),
        "output cap": (ASSUMED, "none is declared" if max_tokens < 0 else f"{max_tokens:,} for every request"),
    }
    if arrival_rate_per_s > 0.0:
        gaps = -np.log(uniforms(seed, count, ARRIVAL)) / arrival_rate_per_s
        arrival_s = np.cumsum(gaps)
        provenance["arrivals"] = (ASSUMED, f"Poisson, {arrival_rate_per_s:,.6g} per second")
    return from_tokens(prompts, outputs, max_tokens=max_tokens, arrival_s=arrival_s, provenance=provenance)


def resampled(workload: Workload, count: int, seed: int = 0) -> Workload:
    """Return `count` whole rows of `workload` drawn with replacement, keyed by row: prompts and answers stay together.

    Arrivals are dropped, and so are custom ids, which would repeat.
    """
    if not len(workload):
        raise BadInput("an empty workload cannot be resampled: give one with at least one request")
    rows = (uniforms(seed, count, RESAMPLE) * len(workload)).astype(np.int64)
    drawn = replace(workload, custom_ids=None).take(rows)
    return drawn.with_(
        arrival_s=constant(0.0, count, np.float64),
        has_arrivals=False,
        provenance={
            "requests": (ASSUMED, f"{count:,} drawn with replacement from {len(workload):,}, whole rows"),
        },
    )


def redrawn(workload: Workload, count: int, block_s: float, seed: int = 0) -> Workload:
    """Return `count` whole rows as another day like this one might bring them: whole stretches of `block_s` seconds.

    Bursts and slow drift are preserved within a stretch. The draw has two stages, a nested bootstrap: it first redraws
    as many stretches as the log has, then draws rows from those, so that the result differs from the log as much as the
    log may differ from its own distribution. Without arrivals, stretches are sized so that the log has 16. A stretch
    may begin anywhere and wraps around at the end (circular block bootstrap, Politis and Romano, 1992).
    """
    if not len(workload):
        raise BadInput("an empty workload cannot be drawn from: give one with at least one request")
    n = len(workload)
    at_s = workload.arrival_s if workload.has_arrivals else np.arange(n, dtype=np.float64)
    span = float(at_s[-1]) + (float(at_s[-1]) / max(1, n - 1) or 1.0)
    length = min(span, block_s) if workload.has_arrivals else min(span, max(1.0, n / 16.0))
    anchors = max(1, round(span / length))
    starts = uniforms(seed, anchors, RESAMPLE) * span
    rows: list[NDArray[np.int64]] = []
    times: list[Real] = []
    drawn, total = 0, 0
    # Stretches may be empty, although on average they are not; the loop is bounded all the same.
    limit = anchors + 64 * (1 + math.ceil(count * length / max(1e-9, n)) + math.ceil(count / n) * anchors)
    while total < count and drawn < limit:
        pick = keyed_uniform(seed, drawn, 1, RESAMPLE)
        start = float(starts[min(anchors - 1, int(pick * anchors))])
        for low, high, shift in ((start, min(span, start + length), 0.0), (0.0, start + length - span, span)):
            i = np.arange(np.searchsorted(at_s, low), np.searchsorted(at_s, high)) if high > low else np.empty(0, int)
            rows.append(i)
            times.append(at_s[i] + shift - start + drawn * length)
            total += len(i)
        drawn += 1
    picked = np.concatenate(rows)[:count].astype(np.int64)
    arrival_s = np.concatenate(times)[:count]
    return (
        replace(workload, custom_ids=None)
        .take(picked)
        .with_(
            arrival_s=arrival_s - arrival_s[0] if workload.has_arrivals else constant(0.0, len(picked), np.float64),
            provenance={"requests": (ASSUMED, f"{len(picked):,} drawn from {n:,}, in stretches of {length:,.3g} s")},
        )
    )

"""Random draws for first attempts, made for a chunk of requests at a time.

A draw depends on its purpose and not on when it is made (`governor/model/keyed.py`), so the draws of a request's first
attempt can be made together with its neighbours': the same numbers to the bit, at a hundredth of the cost per draw.
Retries and finalize passes draw singly, when they happen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor import law
from governor.model.keyed import JITTER_STAGGER, LATENCY, STALL, attempt_key, keyed_uniform
from sim.model.latency import smooth_latency_s, stall_s
from sim.model.provider import ProviderParams

_FIRST = attempt_key(law.MAIN, 1)


def first_uniforms(seed: int, rows: NDArray[Any], purpose: int) -> NDArray[np.float64]:
    """Return what `keyed_uniform` gives for the first attempts of these requests, shape (rows,)."""
    drawn: NDArray[np.float64] = keyed_uniform(seed, rows.astype(np.uint64), _FIRST, purpose)  # type: ignore[arg-type, assignment]
    return drawn


def first_jitters(p: law.Params, seed: int, rows: NDArray[Any]) -> list[float]:
    """Return the uniform numbers behind the stagger's jitter; -1 each if there is none yet (settings may change)."""
    if p.stagger_s <= 0.0:
        return [-1.0] * len(rows)
    return first_uniforms(seed, rows, JITTER_STAGGER).tolist()


def first_latencies_s(
    pp: ProviderParams, seed: int, rows: NDArray[Any], output: NDArray[np.float64], recorded_s: NDArray[np.float64]
) -> list[float]:
    """Return what `latency_s` gives for the first attempts of these requests; all arrays have the same length."""
    u = first_uniforms(seed, rows, LATENCY).tolist() if pp.sigma > 0.0 else [0.5] * len(rows)
    times = zip(output.tolist(), recorded_s.tolist(), u, strict=True)
    latencies_s = [smooth_latency_s(pp, *row) for row in times]
    if pp.stall_ratio > 0.0:
        for i in np.flatnonzero(first_uniforms(seed, rows, STALL) < pp.stall_ratio).tolist():
            latencies_s[i] += stall_s(pp, seed, int(rows[i]), _FIRST)
    return latencies_s

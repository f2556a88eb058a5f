"""Shared parts of the two engines: the order of launch, the outcomes of attempts, and the tally of a run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from governor import law
from governor.forecast import summary
from governor.model.errors import FailureCode
from sim.model import provider as prov
from sim.model.workload import Columns

# Outcome of an attempt beyond the provider's own: the client no longer waited for its answer.
TIMEOUT = 7

# The failure code of a request whose attempts are spent, by the outcome of the last one.
SPENT = (
    "",
    FailureCode.RATE_LIMIT_EXHAUSTED,
    FailureCode.INSUFFICIENT_QUOTA,
    FailureCode.REQUEST_TOO_LARGE,
    FailureCode.RATE_LIMIT_EXHAUSTED,
    FailureCode.SERVER_ERROR,
    FailureCode.CONNECTION_DROPPED,
    FailureCode.TIMEOUT,
)

# Outcomes of attempts that were admitted, and so charged.
CHARGED = (prov.OK, prov.SERVER_ERROR, prov.DROPPED, TIMEOUT)


@dataclass(slots=True)
class Tally(summary.Tally):
    """The tally of one run: the counts of every run, and in simulation also the values behind quantiles.

    `latencies_s`: per answered request, from its arrival to its last answer, in order of completion. `extra_*_tokens`:
    tokens billed in addition to the answers: attempts whose answer was not received (timed out, dropped), and finalize
    passes.
    """

    finalize_passes: int = 0
    extra_prompt_tokens: float = 0.0
    extra_output_tokens: float = 0.0
    latencies_s: array[float] = field(default_factory=lambda: array("d"))


AttemptSink = Callable[[Any, float, str], None]
"""Called at the end of each attempt: the job, the time, and the failure code ("" unless the request is lost).

The job is the engine's own; what `attempt_rows` reads of it is there with either engine."""


def launch_order(columns: Columns, params: law.Params) -> np.ndarray[Any, Any]:
    """Return the requests' indices in the order in which a batch is launched, by the law's rank. Shape (requests,)."""
    return rows_of(batch_order(columns, params), 0, len(columns))


def batch_order(columns: Columns, params: law.Params) -> np.ndarray[Any, Any] | None:
    """Return the launch order of a batch, or None if it is the order of submission."""
    deciding = deciding_keys(columns, params)
    return np.lexsort(deciding) if deciding else None


def deciding_keys(columns: Columns, params: law.Params) -> list[np.ndarray[Any, Any]]:
    """Return the parts of the law's rank that order the requests, last part first, as `np.lexsort` takes them."""
    sequence = _alike(len(columns))
    keys: tuple[Any, ...] = law.rank(params, law.MAIN, 1, columns.cap, columns.reserve, sequence)  # type: ignore[arg-type]
    # A key equal for all requests decides nothing, and the stable sort itself keeps the sequence among equals.
    return [key for key in reversed(keys) if isinstance(key, np.ndarray) and key is not sequence]


@lru_cache(maxsize=8)
def _alike(count: int) -> np.ndarray[Any, Any]:
    return np.broadcast_to(0.0, (count,))


def arrival_order(columns: Columns) -> np.ndarray[Any, Any] | None:
    """Return the indices of requests that arrive over time, earliest first; None if they are already in that order."""
    at_s = columns.arrival_s
    return None if bool(np.all(at_s[1:] >= at_s[:-1])) else np.argsort(at_s, kind="stable")


def rows_of(order: np.ndarray[Any, Any] | None, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Return the indices of the requests at positions `start` to before `stop` of the order."""
    return np.arange(start, stop) if order is None else order[start:stop]


def quantiles(values: array[float], shares: Sequence[float]) -> list[float]:
    """Return what `np.quantile` gives, to the bit, ten times as fast for a few hundred numbers; nan if there are none.

    Linear between neighbours (Hyndman and Fan 1996, definition 7), computed from the nearer of the two.
    """
    if not len(values):
        return [math.nan] * len(shares)
    ordered = np.sort(np.frombuffer(values))
    found = []
    for share in shares:
        place = (len(ordered) - 1) * share
        below = math.floor(place)
        a, b, t = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)]), place - below
        found.append(a + (b - a) * t if t < 0.5 else b - (b - a) * (1.0 - t))
    return found

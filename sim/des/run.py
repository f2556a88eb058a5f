"""What the two engines have in common: the order of launch, the outcomes of attempts, and what one run leaves."""

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

# Outcomes of an attempt beyond the provider's own: nobody waited for its answer any longer.
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

# Outcomes of attempts that were let in, and so charged.
CHARGED = (prov.OK, prov.SERVER_ERROR, prov.DROPPED, TIMEOUT)


@dataclass(slots=True)
class Tally(summary.Tally):
    """What one run leaves: the counts of every run, and in simulation also what quantiles are made of.

    `latencies_s`: per answered request, from its arrival to its last answer, in order of completion. `extra_*_tokens`:
    of attempts whose answer nobody received (timed out, dropped) and of finalize passes: billed beside the answers.
    """

    finalize_passes: int = 0
    extra_prompt_tokens: float = 0.0
    extra_output_tokens: float = 0.0
    latencies_s: array[float] = field(default_factory=lambda: array("d"))


AttemptSink = Callable[[Any, float, str], None]
"""Called at the end of each attempt: the job, the time, and the failure code ("" unless the request is lost).

The job is the engine's own; what `attempt_rows` reads of it is there with either engine."""


def launch_order(columns: Columns, params: law.Params) -> np.ndarray[Any, Any]:
    """Indices of the requests in the order in which a batch is launched, by the law's rank. Shape (requests,)."""
    return rows_of(batch_order(columns, params), 0, len(columns))


def batch_order(columns: Columns, params: law.Params) -> np.ndarray[Any, Any] | None:
    """The same, or None where they go as they stand."""
    deciding = deciding_keys(columns, params)
    return np.lexsort(deciding) if deciding else None


def deciding_keys(columns: Columns, params: law.Params) -> list[np.ndarray[Any, Any]]:
    """The parts of the law's rank that order the requests, the last one first, as `np.lexsort` takes them."""
    sequence = _alike(len(columns))
    keys: tuple[Any, ...] = law.rank(params, law.MAIN, 1, columns.cap, columns.reserve, sequence)  # type: ignore[arg-type]
    # What is the same for all decides nothing, and the sequence is kept among equals by the sort itself.
    return [key for key in reversed(keys) if isinstance(key, np.ndarray) and key is not sequence]


@lru_cache(maxsize=8)
def _alike(count: int) -> np.ndarray[Any, Any]:
    return np.broadcast_to(0.0, (count,))


def arrival_order(columns: Columns) -> np.ndarray[Any, Any] | None:
    """Indices of requests that arrive over time, earliest first; None where they stand so."""
    at_s = columns.arrival_s
    return None if bool(np.all(at_s[1:] >= at_s[:-1])) else np.argsort(at_s, kind="stable")


def rows_of(order: np.ndarray[Any, Any] | None, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Indices of the requests at these places of the order."""
    return np.arange(start, stop) if order is None else order[start:stop]


def quantiles(values: array[float], shares: Sequence[float]) -> list[float]:
    """What `np.quantile` gives, to the bit, in a tenth of the time for a few hundred numbers; nan where there are none.

    Linear between neighbours (Hyndman and Fan 1996, definition 7), from whichever of the two is nearer.
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

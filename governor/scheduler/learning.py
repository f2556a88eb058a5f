"""Estimates that learn: what requests of a kind really used, as the reservation of the next of that kind.

Theory of operation. Under the charge rule `learned` a request first reserves what it declares: prompt and output cap,
or the estimate per run where it declares no cap. Of every answer the learner notes what was used beyond the estimated
prompt. From LEAST answers of a kind on, a request of that kind reserves its own prompt's estimate plus the QUANTILE of
those. A kind is a model, an endpoint and a declared cap: what the requests of one template share.

The quantile is read off counts in buckets whose edges grow by one ratio (the sketch of Masson, Rim and Lee, DDSketch,
2019), and is at most that ratio too high. Such counts do not depend on the order of the answers and can be made again
from a journal, so that a resumed run, and a simulation of it, know what the run knew. A library would do as well, but
this half of the house takes none, and the sketch is a dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

QUANTILE = 0.95
LEAST = 20
GROWTH = 1.02
_LOG_GROWTH = math.log(GROWTH)


class Learner:
    """What requests of each kind used beyond their estimated prompts, tokens."""

    def __init__(self) -> None:
        self._buckets: dict[Hashable, dict[int, int]] = {}
        self._counts: dict[Hashable, int] = {}
        self._learnt: dict[Hashable, float] = {}

    def saw(self, kind: Hashable, prompt_tokens: float, used: float) -> None:
        """A request of that kind, estimated at so many prompt tokens, was answered and used so many in all."""
        beyond = max(1.0, used - prompt_tokens)
        bucket = math.ceil(math.log(beyond) / _LOG_GROWTH - 1e-9)
        buckets = self._buckets.setdefault(kind, {})
        buckets[bucket] = buckets.get(bucket, 0) + 1
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._learnt.pop(kind, None)

    def estimate(self, kind: Hashable, prompt_tokens: float, declared: float) -> float:
        """Tokens to reserve, whole: as declared, until enough answers of that kind have come."""
        count = self._counts.get(kind, 0)
        if count < LEAST:
            return declared
        if kind not in self._learnt:
            self._learnt[kind] = self._quantile(kind, min(count, math.ceil(QUANTILE * (count + 1))))
        return math.ceil(prompt_tokens + self._learnt[kind])

    def _quantile(self, kind: Hashable, rank: int) -> float:
        """The upper edge of the bucket that holds the value of that rank, counted from 1."""
        seen = 0
        buckets = self._buckets[kind]
        for bucket in sorted(buckets):
            seen += buckets[bucket]
            if seen >= rank:
                return math.exp(bucket * _LOG_GROWTH)
        raise AssertionError(f"rank {rank} of {seen}")

"""Learned estimates: the tokens that requests of a kind used determine the reservation of the next one of that kind.

Theory of operation. Under the charge rule `learned` a request first reserves what it declares: prompt and output cap,
or the estimate per run if it declares no cap. For every answer the learner notes the tokens used beyond the estimated
prompt. After LEAST answers of a kind, a request of that kind reserves its own prompt's estimate plus the QUANTILE of
those amounts. A kind is a model, an endpoint and a declared cap: the properties that requests of one template share.

The quantile is read from counts in buckets whose edges grow by a constant ratio (the sketch of Masson, Rim and Lee,
DDSketch, 2019), and is at most that ratio too high. The counts do not depend on the order of the answers and can be
recomputed from a journal, so that a resumed run, or a simulation of it, has the run's knowledge. The sketch is a
dictionary here because the governor avoids dependencies.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

QUANTILE = 0.95
LEAST = 20
GROWTH = 1.02
_LOG_GROWTH = math.log(GROWTH)


class Learner:
    """Learns how many tokens requests of each kind use beyond their estimated prompts."""

    def __init__(self) -> None:
        self._buckets: dict[Hashable, dict[int, int]] = {}
        self._counts: dict[Hashable, int] = {}
        self._learnt: dict[Hashable, float] = {}

    def saw(self, kind: Hashable, prompt_tokens: float, used: float) -> None:
        """Note that a request of that kind, with an estimated prompt of `prompt_tokens`, used `used` tokens in all."""
        beyond = max(1.0, used - prompt_tokens)
        bucket = math.ceil(math.log(beyond) / _LOG_GROWTH - 1e-9)
        buckets = self._buckets.setdefault(kind, {})
        buckets[bucket] = buckets.get(bucket, 0) + 1
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._learnt.pop(kind, None)

    def estimate(self, kind: Hashable, prompt_tokens: float, declared: float) -> float:
        """Return the whole tokens to reserve: as declared, until enough answers of that kind have come."""
        count = self._counts.get(kind, 0)
        if count < LEAST:
            return declared
        if kind not in self._learnt:
            self._learnt[kind] = self._quantile(kind, min(count, math.ceil(QUANTILE * (count + 1))))
        return math.ceil(prompt_tokens + self._learnt[kind])

    def _quantile(self, kind: Hashable, rank: int) -> float:
        """Return the upper edge of the bucket that holds the value of that rank, counted from 1."""
        seen = 0
        buckets = self._buckets[kind]
        for bucket in sorted(buckets):
            seen += buckets[bucket]
            if seen >= rank:
                return math.exp(bucket * _LOG_GROWTH)
        raise AssertionError(f"rank {rank} of {seen}")

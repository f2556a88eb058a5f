"""What a request takes of each dimension of a quota: the arrays `need` and `used` that the law works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from governor.law import DIMENSIONS

NOTHING_USED = [0.0] * DIMENSIONS
Amounts = tuple[float, ...]


def amounts(*values: float) -> Amounts:
    """Return these amounts for the first dimensions, and 0 for the others."""
    return (*map(float, values), *[0.0] * (DIMENSIONS - len(values)))


@dataclass(frozen=True, slots=True)
class Weights:
    """What one request, and one token of its input and of its output, takes of each dimension."""

    per_request: Amounts
    per_input: Amounts
    per_output: Amounts
    per_cached: Amounts = ()
    per_written: Amounts = ()

    def of(self, tokens: float, prompt: float) -> list[float]:
        """Return what a request of that many tokens, of which at most `prompt` are input, takes of each dimension."""
        into = min(prompt, tokens)
        out = tokens - into
        return [
            request + (each_in * into + each_out * out)
            for request, each_in, each_out in zip(self.per_request, self.per_input, self.per_output, strict=True)
        ]

    def used(self, prompt: float, output: float, cached: float, written: float) -> list[float]:
        """Return what an answered request took, of whose prompt some was read from a cache and some written to one."""
        found = self.of(prompt + output, prompt)
        for d, (full, less) in enumerate(zip(self.per_input, self.per_cached, strict=False)):
            found[d] -= cached * (full - less)
        for d, (full, other) in enumerate(zip(self.per_input, self.per_written, strict=False)):
            found[d] -= written * (full - other)
        return found


@dataclass(frozen=True, slots=True)
class Limited:
    """One dimension of a quota, as a profile states it for an account. `window`: one of the law's.

    `place`: its place in the law's arrays. `phase_s`: of a clock window, seconds from 1970 in UTC to the time zone's.
    `header`: the number of the header that states it, 0 = none. `at_answer`: the use is booked at the answer alone.
    """

    name: str
    place: int
    limit: float
    length_s: float
    window: int
    phase_s: float = 0.0
    per_request: float = 0.0
    per_input: float = 0.0
    per_output: float = 0.0
    per_cached: float = 0.0
    per_written: float = 0.0
    settles: bool = False
    at_answer: bool = False
    header: int = 0


@lru_cache(maxsize=256)
def weights_of(quota: tuple[Limited, ...]) -> Weights:
    """Return the weights of a profile's dimensions; those of the guardrails' if there are none."""
    if not quota:
        return TOKENS
    by_place = {each.place: each for each in quota}
    columns = (
        tuple(float(getattr(by_place[d], name)) if d in by_place else 0.0 for d in range(DIMENSIONS))
        for name in ("per_request", "per_input", "per_output", "per_cached", "per_written")
    )
    return Weights(*columns)


# Those of the guardrails' dimensions: TPM, RPM, TPD, RPD.
TOKENS = Weights(amounts(0, 1, 0, 1), amounts(1, 0, 1, 0), amounts(1, 0, 1, 0))


def of_tokens(tokens: float) -> list[float]:
    """Return what one request of that many tokens takes of the guardrails' dimensions."""
    return TOKENS.of(tokens, 0.0)


def of_amounts(by_dimension: Mapping[int, float]) -> list[float]:
    """Return an array with these amounts, 0 in the other dimensions."""
    return [by_dimension.get(d, 0.0) for d in range(DIMENSIONS)]

"""A request as the scheduler knows it, and what it takes of each dimension of a quota: the arrays `need` and `used`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from governor import law
from governor.law import DIMENSIONS

# The places of the guardrails' dimensions, by the names under which profiles and answers state them.
STANDARD = {"TPM": law.TPM, "RPM": law.RPM, "TPD": law.TPD, "RPD": law.RPD}
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
    # The first three of each dimension that any of them concerns, and zeros for the dimensions behind.
    _rows: list[Amounts] = field(init=False, repr=False, compare=False)
    _rest: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = list(zip(self.per_request, self.per_input, self.per_output, strict=True))
        while rows and not any(rows[-1]):
            rows.pop()
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_rest", [0.0] * (DIMENSIONS - len(rows)))

    def of(self, tokens: float, prompt: float) -> list[float]:
        """Return what a request of that many tokens, of which at most `prompt` are input, takes of each dimension."""
        into = min(prompt, tokens)
        out = tokens - into
        return [request + (each_in * into + each_out * out) for request, each_in, each_out in self._rows] + self._rest

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


class Scheduled:
    """One request on its way: the fields that the scheduler needs.

    `reserve`: the tokens set aside, for records and the order of launches; `need`: what it takes of each dimension,
    by the `weights` of its tokens, of which `prompt` are input.
    `expected`: the declared output cap, -1 = none. `jitter_u`: the uniform number for the stagger of its next launch,
    -1 if it was not drawn ahead. `since`: the clock of causes when it became eligible.
    """

    __slots__ = (
        *("index", "lane", "attempt", "standing", "reserve", "need", "prompt", "weights", "expected", "jitter_u"),
        *("submitted_s", "eligible_s", "first_launched_s", "launched_s", "failed_s"),
        *("since", "asked", "alone", "queued", "flying", "holds", "ended", "booked", "tries", "outages"),
    )
    since: list[float]
    booked: list[float]

    def __init__(
        self,
        index: int,
        reserve: float,
        expected: float,
        submitted_s: float,
        jitter_u: float = -1.0,
        prompt: float = 0.0,
        weights: Weights = TOKENS,
    ) -> None:
        self.index = index
        self.lane = law.MAIN
        self.attempt = 1
        self.standing = law.FIRST
        self.reserve = reserve
        self.prompt = prompt
        self.weights = weights
        self.need = weights.of(reserve, prompt)
        self.expected = expected
        self.jitter_u = jitter_u
        self.submitted_s = submitted_s
        self.eligible_s = submitted_s
        self.first_launched_s = -1.0
        self.launched_s = -1.0
        self.failed_s = -1.0  # when its last attempt failed without an answer
        self.asked = 0  # a bit for each cause that it has waited for at the head
        self.alone = False  # a program's own call: not reported to any batch
        self.queued = False
        self.flying = False
        self.holds = False  # a permit: in flight, or kept during a backoff
        self.ended = False
        self.tries = 0  # launches so far, including those that do not count as attempts
        self.outages = 0  # outages by which it was spared an attempt

    def need_of(self, tokens: float) -> list[float]:
        """Return what the request takes of each dimension if it reserves that many tokens."""
        return self.weights.of(tokens, self.prompt)

    def reserve_anew(self, p: law.Params, found: float, declared: float) -> None:
        """Reserve the tokens found by current knowledge, or the declared ones if the others would never fit."""
        need = self.need_of(found)
        fits = not law.never_fits(p, need)
        self.reserve, self.need = (found, need) if fits else (declared, self.need_of(declared))

"""What a request takes of each dimension of a quota: the arrays `need` and `used` that the law works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    def of(self, tokens: float, prompt: float) -> list[float]:
        """Return what a request of that many tokens, of which at most `prompt` are input, takes of each dimension."""
        into = min(prompt, tokens)
        out = tokens - into
        return [
            request + (each_in * into + each_out * out)
            for request, each_in, each_out in zip(self.per_request, self.per_input, self.per_output, strict=True)
        ]


# Those of the guardrails' dimensions: TPM, RPM, TPD, RPD.
TOKENS = Weights(amounts(0, 1, 0, 1), amounts(1, 0, 1, 0), amounts(1, 0, 1, 0))


def of_tokens(tokens: float) -> list[float]:
    """Return what one request of that many tokens takes of the guardrails' dimensions."""
    return TOKENS.of(tokens, 0.0)


def of_amounts(by_dimension: Mapping[int, float]) -> list[float]:
    """Return an array with these amounts, 0 in the other dimensions."""
    return [by_dimension.get(d, 0.0) for d in range(DIMENSIONS)]

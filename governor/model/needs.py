"""What a request takes of each dimension of a quota: the arrays `need` and `used` that the law works on."""

from __future__ import annotations

from governor.law import DIMENSIONS, RPD, RPM, TPD, TPM

NOTHING_USED = [0.0] * DIMENSIONS


def of_tokens(tokens: float) -> list[float]:
    """Return what one request of that many tokens takes of the guardrails' dimensions: TPM, RPM, TPD and RPD."""
    return [tokens, 1.0, tokens, 1.0, 0.0, 0.0, 0.0, 0.0]


def of_amounts(amounts: dict[int, float]) -> list[float]:
    """Return an array with these amounts by dimension, 0 in the others."""
    return [amounts.get(d, 0.0) for d in range(DIMENSIONS)]


assert of_amounts({TPM: 2.0, RPM: 1.0, TPD: 2.0, RPD: 1.0}) == of_tokens(2.0)

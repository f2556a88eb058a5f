"""Whole numbers on the command line, as people write them."""

from __future__ import annotations

from collections.abc import Callable

import typer

from governor.model.phrases import whole_number


def counting(low: int = 0, high: int = 10**12) -> Callable[[str | int], int]:
    """A parser of whole numbers in that range, as people write them: 450000, 450_000, 450k, 2M."""

    def parse(text: str | int) -> int:
        word = str(text).strip()
        value = -1 if word == "-1" else whole_number(word)
        if value is None or not low <= value <= high:
            limit = "10^12" if high == 10**12 else f"{high:,}"
            raise typer.BadParameter(
                f"{word!r} is not a whole number from {low:,} to {limit}: write 450000, 450k or 2M"
            )
        return value

    return parse

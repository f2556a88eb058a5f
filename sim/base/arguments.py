"""Checks of outside input, arguments of the Python API and YAML, with one-line BadSetting errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from governor.model.errors import BadSetting, quoted
from governor.profiles.documents import Config as Config
from governor.profiles.documents import checked as checked

Kind = TypeVar("Kind")
SEED_MAX = 2**63 - 1


def whole(name: str, value: Any, low: int, high: int = SEED_MAX) -> int:
    """Return the value as a whole number within bounds; NumPy numbers too. Raise BadSetting otherwise."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
        wanted = f"from {low} up" if high == SEED_MAX else f"from {low} to {high:,}"
        raise BadSetting(f"{name}={quoted(value, 40)}: must be a whole number {wanted}", name)
    return int(value)


def number(name: str, value: Any, low: float = 0.0) -> float:
    """Return the value as a finite number, at least `low`; NumPy numbers too. Raise BadSetting otherwise."""
    if not isinstance(value, int | float | np.number) or value is True or not low <= value < math.inf:
        raise BadSetting(f"{name}={quoted(value, 40)}: must be a number from {low:g} up", name)
    return float(value)


def one_of(name: str, value: Kind, allowed: Sequence[str]) -> Kind:
    """Return the value if it is one of these words. Raise BadSetting otherwise."""
    if value not in allowed:
        raise BadSetting(f"{name}={quoted(value, 40)}: must be {', '.join(allowed[:-1])} or {allowed[-1]}", name)
    return value


def is_a(name: str, value: Any, kind: type[Kind], remedy: str) -> Kind:
    """Return the value if it is an instance of `kind`. Raise BadSetting otherwise."""
    if not isinstance(value, kind):
        raise BadSetting(f"{name} is {quoted(value, 40)}, not a {kind.__name__}: {remedy}", name)
    return value

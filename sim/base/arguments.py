"""Checks of outside input, arguments of the Python API and YAML, with one-line BadSetting errors."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from governor.model.errors import BadSetting, quoted
from governor.model.estimate import kind_of

Kind = TypeVar("Kind")
Stated = TypeVar("Stated", bound=BaseModel)
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


# ---------------------------------------------------------------- documents


class Config(BaseModel):
    """The base of all parts of a scenario: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def checked(kind: type[Stated], data: Any, place: str) -> Stated:
    """Return `data` as a `kind`. Raise BadSetting, in one line that begins with `place`, for the first error."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in (*filter(None, [place]), *first["loc"]))
        raise BadSetting(f"{path}{_complaint(kind, first)}", path) from None
    except (OverflowError, RecursionError):
        raise BadSetting(f"{place or 'the document'} holds a number or a nesting beyond all bounds") from None


def _complaint(kind: type[BaseModel], error: Any) -> str:
    what, context, value = error["type"], error.get("ctx", {}), error["input"]
    if what == "extra_forbidden":
        known = _names_at(kind, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, 1)
        return f" is not known: did you mean {close[0]}?" if close else f" is not known: use {', '.join(known)}"
    if what == "missing":
        return " is missing"
    if what == "value_error":
        return f": {context['error']}"
    if what in ("model_type", "model_attributes_type", "dict_type"):
        return f" is {kind_of(value)}, not names with values"
    return f"={quoted(value)}: {_wanted(what, context, error['msg'])}"


def _wanted(what: str, context: Mapping[str, Any], message: str) -> str:
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for key, words in bounds.items():
        if key in context:
            return f"must be {words} {context[key]:,}"
    nouns = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number (as text it does not count: write 1000000, not 1e6)",
        "bool_type": "true or false",
        "string_type": "text (in quotes)",
        "string_pattern_mismatch": "a day, YYYY-MM-DD",
        "finite_number": "a finite number",
        "tuple_type": "a list",
        "too_long": f"a list of at most {context.get('max_length')}",
        "literal_error": context.get("expected", ""),
    }
    return f"must be {nouns[what]}" if what in nouns else message[:1].lower() + message[1:]


def _names_at(kind: type[BaseModel], place: tuple[Any, ...]) -> list[str]:
    """Return the names that are valid at a place inside a model."""
    for part in place:
        if isinstance(part, str) and part in kind.model_fields:
            kind = _model_in(kind.model_fields[part].annotation) or kind
    return list(kind.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)

"""Check documents from outside, such as scenario and profile files, with one-line errors.

An error names the place in the document, the value, and the allowed values or the nearest known name.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from governor.model.errors import BadSetting, quoted
from governor.model.estimate import kind_of

_Stated = TypeVar("_Stated", bound=BaseModel)


class Config(BaseModel):
    """The base of all parts of a document: frozen, strict about types, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def checked(kind: type[_Stated], data: Any, place: str) -> _Stated:
    """Return `data` as a `kind`. Raise BadSetting, in one line that begins with `place`, for the first error."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in (*filter(None, [place]), *first["loc"]) if part != "[key]")
        raise BadSetting(f"{path}{_complaint(kind, first)}".removeprefix(": "), path) from None
    except (OverflowError, RecursionError):
        raise BadSetting(
            f"{place or 'the document'} holds a number too large or a nesting too deep to be read"
        ) from None


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

"""Dataclasses of numbers as NumPy records: the form in which machine code reads and writes them.

Theory of operation. Fields keep their order; a whole number becomes i8, a number f8, a list of numbers an array of f8.
So every field is made of 8-byte numbers, and a record can be read as one flat array of these.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import numpy as np


def dtype_of(bag: Any) -> np.dtype[Any]:
    """The record type with the fields of a dataclass instance, in their order: i8, f8, or arrays of f8 for lists."""
    kind: Any = type(bag)
    return _dtype(kind, _shapes(values_of(bag)))


def array_of(bag: Any, dtype: np.dtype[Any] | None = None) -> np.ndarray[Any, Any]:
    """An array of one record that holds what the dataclass instance holds; of its own record type if none is given."""
    values = values_of(bag)
    kind: Any = type(bag)
    rows = np.empty(1, _dtype(kind, _shapes(values)) if dtype is None else dtype)
    rows[0] = values
    return rows


def record_of(bag: Any) -> Any:
    """A NumPy record that holds what the dataclass instance holds."""
    return array_of(bag).view(np.recarray)[0]


def places(dtype: np.dtype[Any]) -> dict[str, slice]:
    """Where each field stands in a record that is read as one flat array of 8-byte numbers."""
    found = {}
    assert dtype.fields is not None
    for name, (kind, offset, *_) in dtype.fields.items():
        found[name] = slice(offset // 8, (offset + kind.itemsize) // 8)
    return found


def values_of(bag: Any) -> tuple[Any, ...]:
    """The values of a dataclass instance, in order of its fields."""
    kind: Any = type(bag)
    return tuple([getattr(bag, name) for name in _names(kind)])


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _shapes(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What decides the record's type: the length of each list, the type of each number."""
    return tuple([len(value) if type(value) is list else type(value) for value in values])


@functools.cache
def _dtype(kind: Any, shapes: tuple[Any, ...]) -> np.dtype[Any]:
    # A batch is run thousands of times: making the type anew each time took as long as the run.
    columns: list[tuple[Any, ...]] = []
    for name, shape in zip(_names(kind), shapes, strict=True):
        if isinstance(shape, int):
            columns.append((name, np.float64, (shape,)))
        else:
            columns.append((name, np.int64 if issubclass(shape, int) else np.float64))
    return np.dtype(columns)

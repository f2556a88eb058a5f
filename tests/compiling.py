"""A second, compiled copy of the number-only modules, as DESIGN's "Compilable as it stands" describes.

The source is not touched: each module is loaded once more from its file under another name, and every function in it is
replaced by its `numba.njit` form before first use, so that helpers called by helpers are compiled too. An import of one
such module by another (`sim.provider` takes its chance from `governor.keyed`) is redirected to the compiled copy.
Compiled functions take NumPy records with the dataclasses' fields: numbers become i8 or f8, lists become f8 arrays.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np

PREFIX = "compiled_copy_of_"


def compiled(paths: Iterable[Path], root: Path) -> dict[str, ModuleType]:
    """The compiled copies by the original's name; a module comes after those that it imports."""
    copies: dict[str, ModuleType] = {}
    for path in paths:
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        originals = {original: sys.modules.get(original) for original in copies}
        sys.modules.update(copies)
        try:
            copies[name] = _copy(name, path)
        finally:
            for original, module in originals.items():
                if module is None:
                    del sys.modules[original]
                else:
                    sys.modules[original] = module
    return copies


def _copy(name: str, path: Path) -> ModuleType:
    alias = PREFIX + name.replace(".", "_")
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses look their own module up.
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    for attribute, value in list(vars(module).items()):
        if inspect.isfunction(value) and value.__module__ == alias:
            setattr(module, attribute, numba.njit(nogil=True)(value))
    return module


def dtype_of(bag: Any) -> np.dtype[Any]:
    """The record type with the fields of a dataclass instance, in their order."""
    columns: list[tuple[Any, ...]] = []
    for field in fields(bag):
        value = getattr(bag, field.name)
        if isinstance(value, list):
            columns.append((field.name, np.float64, (len(value),)))
        else:
            columns.append((field.name, np.int64 if isinstance(value, int) else np.float64))
    return np.dtype(columns)


def record_of(bag: Any) -> Any:
    """A NumPy record that holds what the dataclass instance holds."""
    rows = np.recarray(1, dtype_of(bag))
    for field in fields(bag):
        rows[0][field.name] = getattr(bag, field.name)
    return rows[0]

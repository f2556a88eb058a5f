"""Compiled copies of the number-only modules, and records in place of their dataclasses.

What lives here: the loader that DESIGN's "Compilable as it stands" describes. What must not: anything of a simulation
(`compiled`), any rule, where machine code is kept (`cache`).

Theory of operation. The source is not touched: each module is loaded once more from its file under another name, and
every function in it is replaced by its `numba.njit` form before first use, so that helpers called by helpers are
compiled too. What such a module has imported from another of them, or that module itself, is replaced by the compiled
copy's. Functions and originals stay apart: an interpreted caller never meets a compiled function.

Only the outermost function is kept on disk: its machine code holds all that it calls. Several processes may compile at
once: numba writes a file under another name and then moves it to its place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np

# numba types neither its settings nor all options.
_njit: Any = numba.njit
_config: Any = numba.config

ALIAS = "compiled_copy_of_"
# No reference is counted: the functions neither allocate nor keep an array, and their counting takes two thirds of the
# time. Division by zero is not looked for; the interpreted form of the same function does.
OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}
# Called by compiled code alone: without the wrappers that Python would call, they compile in two thirds of the time.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

_LOCK = threading.Lock()


def compiled(
    paths: Iterable[Path], root: Path, *, entry: str = "", inlined: Collection[str] = (), cache: Path | None = None
) -> dict[str, ModuleType]:
    """Compiled copies by the original's name; a module comes after those that it imports.

    With `entry`, only the function of that name can be called from Python, and its machine code is kept in `cache`.
    `inlined`: functions whose calls are replaced by their code, whatever LLVM thinks of it.
    """
    copies: dict[str, ModuleType] = {}
    for path in paths:
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        copies[name] = _copy(name, path, copies, lambda function: _compiling(function, entry, inlined, cache))
    return copies


def _copy(name: str, path: Path, copies: dict[str, ModuleType], compiling: Callable[[Any], Any]) -> ModuleType:
    alias = ALIAS + name.replace(".", "_")
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses look their own module up, and numba's cache does.
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    for attribute, value in list(vars(module).items()):
        if inspect.ismodule(value) and value.__name__ in copies:
            setattr(module, attribute, copies[value.__name__])
        elif inspect.isfunction(value) and value.__module__ in copies:
            setattr(module, attribute, getattr(copies[value.__module__], attribute))
        elif inspect.isfunction(value) and value.__module__ == alias:
            setattr(module, attribute, compiling(value))
    return module


def _compiling(function: Any, entry: str, inlined: Collection[str], cache: Path | None) -> Any:
    if not entry:
        return _njit(**OPTIONS)(function)
    if function.__name__ != entry:
        return _one_version(_njit(**OPTIONS, **INNER, forceinline=function.__name__ in inlined)(function))
    if cache is None:
        return _njit(**OPTIONS)(function)
    with _LOCK, _cached_in(cache):
        return _njit(**OPTIONS, cache=True)(function)


def _one_version(dispatcher: Any) -> Any:
    """Constants among the arguments are numbers like others, or numba compiles a version for each of them."""
    template = dispatcher.get_call_template

    def of_numbers(arguments: Any, named: Any) -> Any:
        plain = {name: numba.types.unliteral(kind) for name, kind in named.items()}
        return template(tuple(map(numba.types.unliteral, arguments)), plain)

    dispatcher.get_call_template = of_numbers
    return dispatcher


@contextlib.contextmanager
def _cached_in(folder: Path) -> Iterator[None]:
    """numba looks at its setting when a function is decorated, and not again."""
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        _config.CACHE_DIR = before


# ---------------------------------------------------------------- records


def dtype_of(bag: Any) -> np.dtype[Any]:
    """The record type with the fields of a dataclass instance, in their order: i8, f8, or arrays of f8 for lists."""
    kind: Any = type(bag)
    return _dtype(kind, _shapes(_values(bag)))


def array_of(bag: Any) -> np.ndarray[Any, Any]:
    """An array of one record that holds what the dataclass instance holds."""
    kind: Any = type(bag)
    values = _values(bag)
    rows = np.empty(1, _dtype(kind, _shapes(values)))
    rows[0] = values
    return rows


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _values(bag: Any) -> tuple[Any, ...]:
    kind: Any = type(bag)
    return tuple([getattr(bag, name) for name in _names(kind)])


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


def record_of(bag: Any) -> Any:
    """A NumPy record that holds what the dataclass instance holds."""
    return array_of(bag).view(np.recarray)[0]

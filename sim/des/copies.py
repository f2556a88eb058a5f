"""Compiled copies of the number-only modules, by numba.

Theory of operation. The source is not touched: each module is loaded once more from its file under another name, and
every function in it is replaced by its `numba.njit` form before first use, so that helpers called by helpers are
compiled too. What such a module has imported from another of them, or that module itself, is replaced by the compiled
copy's. Functions and originals stay apart: an interpreted caller never meets a compiled function.

Where machine code is wanted, only the outermost function's is taken: it holds all that it calls.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np

from sim.des.machine import Code

# numba types neither its decorators' options nor its record types.
_njit: Any = numba.njit
_from_dtype: Any = numba.from_dtype

ALIAS = "compiled_copy_of_"
# No reference is counted: the functions neither allocate nor keep an array, and their counting takes two thirds of the
# time. Division by zero is not looked for; the interpreted form of the same function does.
OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}
# Not called from Python: without the wrappers for that, they compile in two thirds of the time.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def compiled(paths: Iterable[Path], root: Path) -> dict[str, ModuleType]:
    """Compiled copies by the original's name, for Python to call; a module comes after those that it imports."""
    return _copies(paths, root, _njit(**OPTIONS))


def machine_code(
    paths: Iterable[Path], root: Path, entry: str, records: Sequence[np.dtype[Any]], inlined: Collection[str] = ()
) -> Code:
    """The machine code of the function `entry` of the last module, over arrays of these records.

    `inlined`: functions whose calls are replaced by their code, whatever LLVM thinks of it.
    """

    def inner(function: Any) -> Any:
        return _one_version(_njit(**OPTIONS, **INNER, forceinline=function.__name__ in inlined)(function))

    *_, module = _copies(paths, root, inner).values()
    function: Any = getattr(module, entry)
    signature = tuple(_from_dtype(record)[::1] for record in records)
    function.compile(signature)
    result = function.overloads[signature]
    _, kind, (data, _) = result.library.serialize_using_object_code()
    assert kind == "object", kind
    return Code(result.fndesc.llvm_func_name, data)


def _copies(paths: Iterable[Path], root: Path, compiling: Callable[[Any], Any]) -> dict[str, ModuleType]:
    copies: dict[str, ModuleType] = {}
    for path in paths:
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        copies[name] = _copy(name, path, copies, compiling)
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


def _one_version(dispatcher: Any) -> Any:
    """Constants among the arguments are numbers like others, or numba compiles a version for each of them."""
    template = dispatcher.get_call_template

    def of_numbers(arguments: Any, named: Any) -> Any:
        plain = {name: numba.types.unliteral(kind) for name, kind in named.items()}
        return template(tuple(map(numba.types.unliteral, arguments)), plain)

    dispatcher.get_call_template = of_numbers
    return dispatcher

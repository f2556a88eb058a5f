"""Compiled copies of the number-only modules, by numba, and dataclasses of numbers as the records that they read.

Theory of operation. The source is unchanged: each module is loaded a second time from its file under another name, and
every function in it is replaced by its `numba.njit` form before first use, so that helpers called by helpers are
compiled too. Names that such a module has imported from another of them, or that module itself, are replaced by the
compiled copy's. Compiled functions and originals stay apart: interpreted code never calls a compiled function by
accident.

numba keeps the machine code of the outermost function, which includes all that it calls, and does not notice a change
in any file but that function's own. So the folder is named by a hash of all sources: an edited rule finds no folder and
is compiled anew. The hash includes the sources' location, because numba finds no code compiled from the same file in
another place, and an existing folder should mean that nothing has to be compiled. The folder is in NUMBA_CACHE_DIR,
else in the user's cache; if the home is not writable, in the temporary directory; if nothing is writable, there is
none, and every process compiles for itself. Several processes may write at once: numba replaces whole files.

A record has the dataclass's fields in their order: a whole number becomes i8, a number f8, a list of numbers an array
of f8. So every field is made of 8-byte numbers, and a record can be read as one flat array of these.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
_COMPILED = (
    "governor/model/keyed.py",
    "governor/law.py",
    "sim/model/windows.py",
    "sim/model/latency.py",
    "sim/model/provider.py",
    "sim/des/engine.py",
)
SOURCES = tuple(ROOT / path for path in _COMPILED)
# What else determines the machine code: constants, and compiler options.
_OURS = tuple(f"sim/des/{name}.py" for name in ("run", "machine", "compiled"))
BESIDE = tuple(ROOT / path for path in ("governor/model/requests.py", *_OURS))

ALIAS = "compiled_copy_of_"
# No reference counting: the functions neither allocate nor keep an array, and counting takes two thirds of the time.
# Division by zero is not checked; the interpreted form of the same function does check it.
OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}
# Not called from Python: without Python wrappers, they compile in two thirds of the time.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

_FOLDER = "engine-"
# Number of folders of other sources that are kept: another branch, another installation.
_KEPT = 4
SETTING = "NUMBA_CACHE_DIR"


# ---------------------------------------------------------------- compiling


def compiled(paths: Iterable[Path], root: Path) -> dict[str, ModuleType]:
    """Return compiled copies by the original's name, for Python to call.

    `paths`: a module after those that it imports.
    """
    return _copies(paths, root, _njit(**OPTIONS))


def function_of(
    sources: Sequence[Path],
    root: Path,
    entry: str,
    records: Sequence[np.dtype[Any]],
    *,
    beside: Iterable[Path] = (),
    inlined: Collection[str] = (),
) -> tuple[Callable[..., Any], bool]:
    """Return the function `entry` of the last source, over arrays of these records, and whether its code was cached.

    If not, it is compiled now, for some seconds, and cached if possible. `beside`: what else determines the code;
    `inlined`: functions that are inlined regardless of LLVM's heuristics.
    """
    import numba  # takes half a second, and small simulations need none of it

    def inner(function: Any) -> Any:
        if function.__name__ == entry:
            return function
        return _njit(**OPTIONS, **INNER, forceinline=function.__name__ in inlined)(function)

    *_, module = _copies(sources, root, inner).values()
    kinds = tuple(numba.typeof(np.zeros(1, record)) for record in records)
    folder = cache_folder((*sources, *beside))
    config: Any = numba.config
    before = config.CACHE_DIR
    try:
        config.CACHE_DIR = str(folder or "")
        function: Any = _njit(cache=folder is not None, **OPTIONS)(getattr(module, entry))
    finally:
        config.CACHE_DIR = before
    try:
        function.compile(kinds)
    except Exception:
        if folder is None:
            raise
        # The cached code may be damaged: it is compiled anew, and if that fails too, the error says why.
        shutil.rmtree(folder, ignore_errors=True)
        function.compile(kinds)
    return function, bool(function.stats.cache_hits)


def _njit(**options: Any) -> Any:
    import numba  # as above

    njit: Any = numba.njit
    return njit(**options)


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


# ---------------------------------------------------------------- the folder


def folder_name(sources: Iterable[Path]) -> str:
    """Return the folder's name: a hash of the sources' text and location and of this numba's version."""
    digest = hashlib.sha256(importlib.metadata.version("numba").encode())
    for path in sources:
        digest.update(os.fsencode(path.absolute()))
        digest.update(path.read_bytes())
    return _FOLDER + digest.hexdigest()[:16]


def has_code(sources: Iterable[Path]) -> bool:
    """Return whether machine code of these sources is cached."""
    name = folder_name(sources)
    return any(next((parent / name).glob("*/*.nbc"), None) is not None for parent in parents())


def cache_folder(sources: Iterable[Path]) -> Path | None:
    """Return the folder for machine code of these sources, created if necessary; None if no place is writable.

    Of the folders of other sources the last used are kept and the others removed.
    """
    name = folder_name(sources)
    for parent in parents():
        folder = parent / name
        if _usable(folder):
            _prune(folder)
            return folder
    return None


def parents() -> Iterator[Path]:
    """Yield the folder's possible parents, in order of preference."""
    from platformdirs import user_cache_path

    if os.environ.get(SETTING):
        yield Path(os.environ[SETTING])
    with contextlib.suppress(RuntimeError, OSError):
        yield user_cache_path("paceline", appauthor=False)
    yield Path(tempfile.gettempdir()) / f"paceline-{getattr(os, 'getuid', int)()}"


def _usable(folder: Path) -> bool:
    """Create the folder if it is missing.

    Return whether only this user can write to it: other users' code is not run.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH):
            return False
        with tempfile.TemporaryFile(dir=folder):
            pass
        os.utime(folder)
    except OSError:
        return False
    return True


def _prune(mine: Path) -> None:
    with contextlib.suppress(OSError):
        others = [folder for folder in mine.parent.glob(_FOLDER + "*") if folder != mine and folder.is_dir()]
        others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in others[_KEPT:]:
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- records


def dtype_of(bag: Any) -> np.dtype[Any]:
    """Return the record type with a dataclass instance's fields, in order: i8, f8, or arrays of f8 for lists."""
    kind: Any = type(bag)
    return _dtype(kind, _shapes(values_of(bag)))


def array_of(bag: Any, dtype: np.dtype[Any] | None = None) -> np.ndarray[Any, Any]:
    """Return an array of shape (1,) with the dataclass instance's values; `dtype` defaults to its own record type."""
    values = values_of(bag)
    kind: Any = type(bag)
    rows = np.empty(1, _dtype(kind, _shapes(values)) if dtype is None else dtype)
    rows[0] = values
    return rows


def places(dtype: np.dtype[Any]) -> dict[str, slice]:
    """Return each field's place in a record that is read as one flat array of 8-byte numbers."""
    found = {}
    assert dtype.fields is not None
    for name, (kind, offset, *_) in dtype.fields.items():
        found[name] = slice(offset // 8, (offset + kind.itemsize) // 8)
    return found


def values_of(bag: Any) -> tuple[Any, ...]:
    """Return the values of a dataclass instance, in order of its fields."""
    kind: Any = type(bag)
    return tuple([getattr(bag, name) for name in _names(kind)])


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _shapes(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what determines the record's type: the length of each list, the type of each number."""
    return tuple([len(value) if type(value) is list else type(value) for value in values])


@functools.cache
def _dtype(kind: Any, shapes: tuple[Any, ...]) -> np.dtype[Any]:
    # A batch is run thousands of times: making the type anew each time would take as long as the run.
    columns: list[tuple[Any, ...]] = []
    for name, shape in zip(_names(kind), shapes, strict=True):
        if isinstance(shape, int):
            columns.append((name, np.float64, (shape,)))
        else:
            columns.append((name, np.int64 if issubclass(shape, int) else np.float64))
    return np.dtype(columns)

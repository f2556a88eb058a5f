"""Compiled copies of the number-only modules, by numba, and dataclasses of numbers as the records that these read.

Theory of operation. The source is not touched: each module is loaded once more from its file under another name, and
every function in it is replaced by its `numba.njit` form before first use, so that helpers called by helpers are
compiled too. What such a module has imported from another of them, or that module itself, is replaced by the compiled
copy's. Functions and originals stay apart: an interpreted caller never meets a compiled function.

numba keeps the machine code of the outermost function, which holds all that it calls, and does not notice a change in
another file than that function's own. So the folder is named by a hash of all sources: an edited rule finds no folder,
and is compiled afresh. Where they stand counts as well, because numba finds no code that was made of the same file in
another place, and a folder that is there should mean that nothing has to be compiled. The folder stands in
NUMBA_CACHE_DIR, else in the user's cache; where a home cannot be written, among the temporary files; where nothing can,
there is none, and every process compiles for itself. Several processes may write at once: numba replaces whole files.

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
    "sim/model/provider.py",
    "sim/des/engine.py",
)
SOURCES = tuple(ROOT / path for path in _COMPILED)
# What else goes into the machine code: constants, and how it is made.
_OURS = tuple(f"sim/des/{name}.py" for name in ("run", "machine", "compiled"))
BESIDE = tuple(ROOT / path for path in ("governor/model/requests.py", *_OURS))

ALIAS = "compiled_copy_of_"
# No reference is counted: the functions neither allocate nor keep an array, and their counting takes two thirds of the
# time. Division by zero is not looked for; the interpreted form of the same function does.
OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}
# Not called from Python: without the wrappers for that, they compile in two thirds of the time.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

FOLDER = "engine-"
# Folders of other sources that are kept: another branch, another installation.
KEPT = 4
SETTING = "NUMBA_CACHE_DIR"


# ---------------------------------------------------------------- compiling


def compiled(paths: Iterable[Path], root: Path) -> dict[str, ModuleType]:
    """Compiled copies by the original's name, for Python to call; a module comes after those that it imports."""
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
    """The function `entry` of the last of the sources, over arrays of these records; whether its code was kept.

    If not, it is compiled now, for some seconds, and kept where that is possible. `beside`: what else decides the code;
    `inlined`: functions whose calls are replaced by their code, whatever LLVM thinks of it.
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
        # What is kept there may be damaged: it is made anew, and where that fails too, it says why.
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
    """The folder's name: what the sources say and where they stand, compiled by this numba."""
    digest = hashlib.sha256(importlib.metadata.version("numba").encode())
    for path in sources:
        digest.update(os.fsencode(path.absolute()))
        digest.update(path.read_bytes())
    return FOLDER + digest.hexdigest()[:16]


def has_code(sources: Iterable[Path]) -> bool:
    """Whether machine code of these sources is there."""
    name = folder_name(sources)
    return any(next((parent / name).glob("*/*.nbc"), None) is not None for parent in parents())


def cache_folder(sources: Iterable[Path]) -> Path | None:
    """The folder for machine code of these sources, made if need be; None where nothing can be written.

    Of folders of other sources those used last are left, the others are removed.
    """
    name = folder_name(sources)
    for parent in parents():
        folder = parent / name
        if _usable(folder):
            _prune(folder)
            return folder
    return None


def parents() -> Iterator[Path]:
    """Where the folder may stand, in order of preference."""
    from platformdirs import user_cache_path

    if os.environ.get(SETTING):
        yield Path(os.environ[SETTING])
    with contextlib.suppress(RuntimeError, OSError):
        yield user_cache_path("paceline", appauthor=False)
    yield Path(tempfile.gettempdir()) / f"paceline-{getattr(os, 'getuid', int)()}"


def _usable(folder: Path) -> bool:
    """Whether the folder is there, can be written to, and by nobody else: code of somebody else's is not run."""
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
        others = [folder for folder in mine.parent.glob(FOLDER + "*") if folder != mine and folder.is_dir()]
        others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in others[KEPT:]:
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- records


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

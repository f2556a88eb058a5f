"""Machine code of one function: kept on the disk, loaded and called without numba.

Theory of operation. numba compiles through LLVM to an object file, and to import numba takes longer than most
simulations do. So the object file is kept by itself: a later process gives it to LLVM's own binding (llvmlite, which
numba brings along) and calls the function by its address. What the code needs from outside is in the C library alone,
but for `numba_ldexp`, numba's name for C's `ldexp`. The file's name tells the processor and the compilers: on another
machine it is not found, and its checksum tells a damaged one.

Arguments are arrays of records, as numba passes them: for each (meminfo, parent, items, item size, data, shape,
strides), the first two empty, since these arrays are Python's own and nothing here counts references. Before them stand
the places for the result and for an exception; what comes back is a status, 0 = well. The call does not hold the
interpreter's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import secrets
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding as llvm
from numpy.typing import NDArray

from sim.des.cache import ENDING, cache_folder

# llvmlite is not typed.
_llvm: Any = llvm

# What steers numba's code generation from outside.
_SETTINGS = tuple(
    f"NUMBA_{name}" for name in ("CPU_NAME", "CPU_FEATURES", "OPT", "ENABLE_AVX", "LOOP_VECTORIZE", "SLP_VECTORIZE")
)
_POINTER, _WHOLE = ctypes.c_void_p, ctypes.c_int64
_PER_ARRAY = (_POINTER, _POINTER, _WHOLE, _WHOLE, _POINTER, _WHOLE, _WHOLE)


class Code(NamedTuple):
    """An object file, and the symbol in it that is to be called."""

    symbol: str
    data: bytes


class Function:
    """A loaded function of so many arrays of records. Keep it as long as it may be called."""

    def __init__(self, code: Code, arrays: int) -> None:
        _llvm.initialize_native_target()
        _llvm.initialize_native_asmprinter()
        _llvm.add_symbol("numba_ldexp", ctypes.cast(_c_library().ldexp, ctypes.c_void_p).value)
        machine = _llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
        self._engine = _llvm.create_mcjit_compiler(_llvm.parse_assembly(""), machine)
        self._engine.add_object_file(_llvm.ObjectFileRef.from_data(code.data))
        self._engine.finalize_object()
        kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *(arrays * _PER_ARRAY))
        self._call = kind(self._engine.get_function_address(code.symbol))

    def __call__(self, result: int, *arguments: int) -> int:
        """Calls it: what it returns. `result`: address of two free 8-byte places; `arguments`: see `argument`."""
        status: int = self._call(result, result + 8, *arguments)
        assert status == 0, f"machine code ended with status {status}: an error that Python would have raised"
        return ctypes.c_int64.from_address(result).value


def argument(array: NDArray[Any]) -> tuple[int, ...]:
    """An array as it is passed. It must be kept, and stay where it is, as long as it may be used."""
    assert array.flags.c_contiguous, "machine code reads records one after the other"
    size = array.itemsize
    return 0, 0, len(array), size, array.ctypes.data, len(array), size


def _c_library() -> Any:
    return ctypes.CDLL("ucrtbase") if sys.platform == "win32" else ctypes.CDLL(None)


# ---------------------------------------------------------------- from the disk, or made


def function_of(
    sources: Sequence[Path],
    root: Path,
    entry: str,
    records: Sequence[np.dtype[Any]],
    *,
    beside: Iterable[Path] = (),
    inlined: Collection[str] = (),
) -> tuple[Function, bool]:
    """The function `entry` of the last of the sources, over arrays of these records; whether its code was kept.

    If not, it is compiled now, for some seconds, and kept where that is possible. `beside`: what else decides the code.
    """
    folder = cache_folder((*sources, *beside))
    path = None if folder is None else folder / file_name(entry)
    code = None if path is None else _read(path)
    kept = code is not None
    if code is None:
        # Takes half a second to import, and only this needs it.
        from sim.des.copies import machine_code

        code = machine_code(sources, root, entry, records, inlined)
        if path is not None:
            _write(path, code)
    return Function(code, len(records)), kept


def file_name(entry: str) -> str:
    """The name of the file for this machine and these compilers."""
    about = [importlib.metadata.version("llvmlite"), sys.platform, platform.machine(), _llvm.get_host_cpu_name()]
    about += [_llvm.get_host_cpu_features().flatten(), *(f"{name}={os.environ.get(name)}" for name in _SETTINGS)]
    return f"{entry}-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}{ENDING}"


def _read(path: Path) -> Code | None:
    """What is kept there; None where nothing is, or nothing sound."""
    try:
        checksum, symbol, data = path.read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    if hashlib.sha256(symbol + data).hexdigest().encode() != checksum:
        return None
    return Code(symbol.decode(), data)


def _write(path: Path, code: Code) -> None:
    """Keeps the code; several processes may do so at once. Where it cannot be kept, the next process makes it anew."""
    symbol = code.symbol.encode()
    checksum = hashlib.sha256(symbol + code.data).hexdigest().encode()
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        try:
            unfinished.write_bytes(b"\n".join([checksum, symbol, code.data]))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

"""Where machine code is kept: one folder per state of the sources.

Theory of operation. numba does not notice a change in a file whose functions are called by the one that it keeps, so
the folder is named by a hash of all of them: an edited rule finds no folder, and is compiled afresh. Where they stand
counts as well, because numba finds no code that was made of the same file in another place, and a folder that is there
should mean that nothing has to be compiled. The folder stands
in NUMBA_CACHE_DIR, else in the user's cache; where a home cannot be written, among the temporary files; where nothing
can, there is none, and every process compiles for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

FOLDER = "engine-"
# What files of machine code end in.
ENDING = ".code"
# Folders of other sources that are kept: another branch, another installation.
KEPT = 4
SETTING = "NUMBA_CACHE_DIR"


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
    return any(next((parent / name).glob("*" + ENDING), None) is not None for parent in parents())


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

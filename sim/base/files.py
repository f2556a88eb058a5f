"""Writing files so that none is ever left half-written: the new content appears whole, under its name, or not at all.

Theory of operation. The content goes into a hidden file beside the target, which is forced to the disk and then takes
the target's name in one step (`os.replace` is atomic within one file system, hence "beside"). Whatever goes wrong
before that step removes the hidden file and leaves an older target as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from governor.model.errors import BadInput

# What a reader can do about it, for the errors of an ordinary day.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: make room, or name another folder",
    errno.EDQUOT: "the disk quota is used up: make room, or name another folder",
    errno.EACCES: "no permission to write there: name another folder",
    errno.EPERM: "no permission to write there: name another folder",
    errno.EROFS: "that file system is read-only: name another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yields the path of an empty file to fill; when the block ends without an error it becomes `path`.

    The block should read and write no other file: an `OSError` in it (a full disk, a folder that vanished) leaves as
    one line of `BadInput` that names `path`. Any other exception passes through; in both cases nothing is left behind.
    A symbolic link stays one, what it points to is replaced.
    """
    name = os.fspath(path)
    target = Path(os.path.realpath(name))
    if target.is_dir():
        raise BadInput("cannot be written: a folder has this name", name)
    if target.exists() and not target.is_file():
        raise BadInput("cannot be written: it exists and is not an ordinary file", name)
    if not target.parent.is_dir():
        raise BadInput(f"cannot be written: there is no folder {target.parent}: create it first", name)
    unfinished = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        # Not tempfile's private 0600: a report is as readable as any other file the user makes.
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, target)
    except (ConnectionError, ChildProcessError):
        raise  # somebody else's pipe or process, never a file
    except OSError as error:
        raise BadInput(f"cannot be written: {_reason(error)}", name) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _reason(error: OSError) -> str:
    """One line for people; the system's own words where there is no better one."""
    known = _REMEDIES.get(error.errno or 0)
    return known or error.strerror or " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def prepared_folder(path: str) -> Iterator[Path]:
    """The folder to write into, made if it is not there, and removed again if the work comes to nothing.

    BadInput where it cannot be made or nothing can be written in it.
    """
    folder = Path(path)
    made: list[Path] = []
    try:
        for each in (*reversed(folder.parents), folder):
            if not each.exists():
                each.mkdir()
                made.append(each)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b" ")
    except OSError as error:
        _remove(made)
        reason = "this is not a folder" if isinstance(error, NotADirectoryError) else error.strerror or str(error)
        raise BadInput(f"cannot be written into: {reason}", path) from None
    try:
        yield folder
    except BaseException:
        _remove(made)
        raise


def _remove(folders: list[Path]) -> None:
    for folder in reversed(folders):
        # One that is not empty stays: somebody else has put something there.
        with contextlib.suppress(OSError):
            folder.rmdir()

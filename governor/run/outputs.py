"""Output files of a live run: written whole under a hidden name, then renamed; or followed while it runs.

Results have been paid for. Their file takes its name in one step, after being forced to the disk, so that a reader
never sees half of it; an existing file that is not this run's is not overwritten unasked. `--follow` trades this for
freshness: its file grows line by line in the order of completion, and is replaced by the ordered one at the end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from governor.model.errors import BadInput
from governor.model.files import replaced, why


def errors_path(out: Path) -> Path:
    """Return the path of the errors file: RESULTS.jsonl -> RESULTS.errors.jsonl."""
    return out.with_name(f"{out.stem}.errors{out.suffix or '.jsonl'}")


def journal_path(out: Path) -> Path:
    """Return the default path of the journal: RESULTS.jsonl -> RESULTS.journal.db."""
    return out.with_name(f"{out.stem}.journal.db")


def check_apart(files: Mapping[str, Path]) -> None:
    """Raise BadInput if two of these files, keyed by their names for the user, are one: it would be overwritten."""
    seen: dict[str, str] = {}
    for what, path in files.items():
        place = os.path.realpath(path)
        if place in seen:
            raise BadInput(f"{seen[place]} and {what} are one file: name another", os.fspath(path))
        seen[place] = what


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold the right to write these results and their errors within the block.

    Raise BadInput if another process has it. Each is held by a lock on a hidden file beside it, which the operating
    system releases however the process ends.
    """
    with contextlib.ExitStack() as stack:
        for path in (out, errors_path(out)):
            target = Path(os.path.realpath(path))
            hidden = target.with_name(f".{target.name[:200]}.lock")
            try:
                handle = lock_file(hidden)
            except BlockingIOError:
                text = "another run writes its results there: wait for its end, or name another --out"
                raise BadInput(text, os.fspath(path)) from None
            except OSError as error:
                raise BadInput(f"cannot be written: {why(error)}", os.fspath(path)) from error
            stack.callback(os.close, handle)
            stack.callback(_unlink, hidden)
        yield


def lock_file(hidden: Path) -> int:
    """Return the handle of a locked lock file. Raise BlockingIOError if another process holds it."""
    while True:
        # Opened for reading: a file open for writing would keep its file system from being remounted read-only.
        handle = os.open(hidden, os.O_CREAT | os.O_RDONLY, 0o600)
        try:
            with _no_locks_no_matter():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, hidden):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has just removed it


@contextlib.contextmanager
def _no_locks_no_matter() -> Iterator[None]:
    """Ignore a missing lock service: some network file systems have none, which is no reason to refuse a run there."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def write_results(out: Path, lines: Iterable[tuple[bool, str]]) -> tuple[int, int]:
    """Write both files from (succeeded, line) in order; return how many lines each has.

    The errors file is written even if nothing failed: an old one must not remain beside new results.
    """
    good = bad = 0
    # Answers are as private as the journal that holds them.
    with replaced(errors_path(out), mode=0o600) as errors, replaced(out, mode=0o600) as results:
        for succeeded, line in lines:
            (results if succeeded else errors).write(line + "\n")
            good += succeeded
            bad += not succeeded
    return good, bad


class Follow(Protocol):
    """Receives each result."""

    def add(self, succeeded: bool, line: str) -> None:
        """Receive the line, in the batch output format, of a request that has ended."""


class FollowedFiles:
    """`--follow`: both files, growing as requests finish. `lines`: those finished before, written first."""

    def __init__(self, out: Path, lines: Iterable[tuple[bool, str]] = ()) -> None:
        # Rewrite the files, since a crash may have left half a line.
        write_results(out, lines)
        self._files = tuple(path.open("a", encoding="utf-8", newline="\n") for path in (out, errors_path(out)))

    def add(self, succeeded: bool, line: str) -> None:
        """Append a line, readable at once. The journal, not this file, makes it durable."""
        file = self._files[0 if succeeded else 1]
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            raise BadInput(f"cannot be written: {why(error)}", file.name) from error

    def close(self) -> None:
        """Stop following; the files stay as they are."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

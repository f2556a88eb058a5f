"""The files that a live run hands over: written whole under a hidden name, then renamed; or followed while it runs.

A file of results is paid for. It takes its name in one step, forced to the disk before, so that a reader never sees
half of it; one that is there already and is not this run's is not overwritten unasked. `--follow` trades this for
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
    """Where the failures go: RESULTS.jsonl -> RESULTS.errors.jsonl."""
    return out.with_name(f"{out.stem}.errors{out.suffix or '.jsonl'}")


def journal_path(out: Path) -> Path:
    """Where the journal stands unless it is named: RESULTS.jsonl -> RESULTS.journal.db."""
    return out.with_name(f"{out.stem}.journal.db")


def check_apart(files: Mapping[str, Path]) -> None:
    """BadInput where two of these, by what a user calls them, are one file: one would take the other's place."""
    seen: dict[str, str] = {}
    for what, path in files.items():
        place = os.path.realpath(path)
        if place in seen:
            raise BadInput(f"{seen[place]} and {what} are one file: name another", os.fspath(path))
        seen[place] = what


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """The right to write these results and their errors; BadInput where another process has it. It ends with the block.

    Held by a lock on a hidden file beside each, which the operating system gives back however the process ends.
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
    """The handle of a lock file that is locked; BlockingIOError where another process holds it."""
    while True:
        # To read: a file that is open for writing would keep its file system from being made read-only.
        handle = os.open(hidden, os.O_CREAT | os.O_RDONLY, 0o600)
        try:
            with _no_locks_no_matter():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, hidden):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it just now


@contextlib.contextmanager
def _no_locks_no_matter() -> Iterator[None]:
    """Some network file systems have no such locks: no reason to refuse a run there."""
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
    """Writes both files from (succeeded, line) in order; returns how many lines each has.

    The errors file appears even where nothing failed: an old one must not stand beside new results.
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
    """Who is told of each result."""

    def add(self, succeeded: bool, line: str) -> None:
        """One request has ended, with this line of the batch output format."""


class Followed:
    """`--follow`: both files, growing as requests finish. `lines`: what had finished before, written first."""

    def __init__(self, out: Path, lines: Iterable[tuple[bool, str]] = ()) -> None:
        # Whole and new, since a crash may have left half a line.
        write_results(out, lines)
        self._files = tuple(path.open("a", encoding="utf-8", newline="\n") for path in (out, errors_path(out)))

    def add(self, succeeded: bool, line: str) -> None:
        """One more line, there to be read at once. Its durability is the journal's matter."""
        file = self._files[0 if succeeded else 1]
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            raise BadInput(f"cannot be written: {why(error)}", file.name) from error

    def close(self) -> None:
        """Ends the following; the files stay as they are."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

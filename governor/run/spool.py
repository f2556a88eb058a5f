"""The hidden batch file of `run_batch`, beside the journal of its run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from governor.model.errors import BadInput
from governor.model.files import why
from governor.run.outputs import lock_file


class Spool:
    """The batch file of a run: hidden, readable by its owner alone, locked against another run of the same journal."""

    def __init__(self, path: Path, journal: str) -> None:
        self.path = path
        self.journal = journal
        self._lock = -1
        self._file: TextIO | None = None

    def __enter__(self) -> Spool:
        try:
            self._lock = lock_file(self.path)
            self._file = self.path.open("w", encoding="utf-8", errors="surrogatepass")
        except BlockingIOError:
            raise BadInput("another run has this journal: wait for its end, or name another", self.journal) from None
        except OSError as error:
            self.remove()
            raise self._unwritten(error) from None
        return self

    def write(self, line: str) -> None:
        """Add a line. Raise BadInput if the disk does not take it."""
        assert self._file is not None
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise self._unwritten(error) from None

    def __exit__(self, kind: object, *rest: object) -> None:
        """Finish the file; if a row was invalid or the disk is full, leave nothing of it."""
        assert self._file is not None
        try:
            self._file.close()
        except OSError as error:
            self.remove()
            if kind is None:
                raise self._unwritten(error) from None
        if kind is not None:
            self.remove()

    def _unwritten(self, error: OSError) -> BadInput:
        return BadInput(f"the rows cannot be written beside it: {why(error)}; nothing was sent", self.journal)

    def of_rows(self, error: BadInput) -> BadInput:
        """Return the error in words of the rows, if it names this file, which its user never sees."""
        if error.path != str(self.path):
            return error
        return BadInput(f"row {error.line - 1}: {error.reason}" if error.line else f"rows: {error.reason}")

    def remove(self) -> None:
        """Remove the file: the run has ended."""
        if self._lock >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

"""The journal of a search: its runs so far, in a file from which an interrupted search goes on.

What lives here: the file's form, reading it back, and what is kept of a damaged one. What must not: which runs are made
(`search`), and what they mean.

Theory of operation. A search is deterministic: told the same figures, it asks for the same runs. So the journal holds
nothing but runs, each with what it was made under, and an interrupted search is simply done again, with every run that
the journal knows taken from there. One line per run, `CRC-32 JSON`; the first line names everything that they
depend on, the code included, as one fingerprint. A journal with another fingerprint is not ours and is begun anew.
From the first line that does not agree with its checksum on nothing is believed: what stands before it is used. A
search of a few seconds costs less than writing it down, so the file begins after `AFTER_S`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from sim.experiment.results import Figures

NAME = "search.journal"
AFTER_S = 3.0
EVERY_S = 1.0
KIND = "paceline search journal 1"

Key = tuple[str, str, int]
"""Condition, digest of the policy, seed."""


def digest_of(policy_key: tuple[Any, ...]) -> str:
    """A policy as a short word."""
    return hashlib.sha256(repr(policy_key).encode()).hexdigest()[:16]


def fingerprint(texts: Iterable[str | bytes]) -> str:
    """Everything that a search depends on, and the source of both packages, as one word."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode() if isinstance(text, str) else text)
        found.update(b"\0")
    for package in ("governor", "sim"):
        for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


class SearchLog:
    """The journal at `path`. `known`: what an earlier search left there. `notes`: what its user should know, in lines.

    Opening reads, with `resume`; nothing is written before a search has lasted for AFTER_S seconds.
    """

    def __init__(self, path: Path, mark: str, *, resume: bool = True) -> None:
        self.path = path
        self.mark = mark
        self.known: dict[Key, Figures] = {}
        self.notes: list[str] = []
        self.resumed = 0
        self._waiting: list[tuple[Key, Figures]] = []
        self._write_at = time.monotonic() + AFTER_S
        self._file: IO[bytes] | None = None
        self._good_bytes = 0
        self._broken = False
        if resume:
            self._read()

    def add(self, found: Sequence[tuple[Key, Figures]]) -> None:
        """These runs were made; they are on the disk a second later, or after `flush`."""
        self._waiting += found
        if time.monotonic() >= self._write_at:
            self.flush()

    def flush(self) -> None:
        """Writes what waits. A file that cannot be written ends the journal, not the search: a note says so."""
        self._write_at = time.monotonic() + EVERY_S
        if self._broken or not self._waiting:
            return
        try:
            if self._file is None:
                self._file = self._opened()
            self._file.write(b"".join(_line([*key, _plain(run)]) for key, run in self._waiting))
            self._file.flush()
        except OSError as error:
            self._broken = True
            self.notes.append(
                f"search journal {self.path} cannot be written ({error.strerror or error}): this search goes on, and "
                "could not be resumed"
            )
        self._waiting = []

    def close(self) -> None:
        """Writes what waits, if the file was begun. What it holds stays until the plan is made."""
        if self._file is not None:
            self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> IO[bytes]:
        if not self._good_bytes:
            file = self.path.open("wb")
            file.write(_line([KIND, self.mark]))
            return file
        # What follows the last sound line is not ours to keep.
        os.truncate(self.path, self._good_bytes)
        return self.path.open("ab")

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self.notes.append(f"search journal {self.path} cannot be read ({error.strerror or error}): begun anew")
            return
        lines = data.split(b"\n")
        # A last line without its end was cut off while it was written.
        lines.pop()
        head = _parsed(lines[0]) if lines else None
        if not isinstance(head, list) or head[:1] != [KIND]:
            if data:
                self._set_aside()
            return
        if head[1:] != [self.mark]:
            self.notes.append(f"search journal {self.path} is of another search: begun anew")
            return
        at = len(lines[0]) + 1
        for number, line in enumerate(lines[1:], start=2):
            run = _run(_parsed(line))
            if run is None:
                self.notes.append(
                    f"search journal {self.path} is damaged at line {number:,}: the {len(self.known):,} runs before it "
                    "are used, the rest is simulated again"
                )
                break
            self.known[run[0]] = run[1]
            at += len(line) + 1
        self._good_bytes = at
        self.resumed = len(self.known)
        if self.resumed:
            self.notes.append(f"resumed: {self.resumed:,} runs of an interrupted search are taken from {self.path}")

    def _set_aside(self) -> None:
        """No head, no telling whose it is: kept under another name, so that nothing is lost."""
        aside = self.path.with_name(self.path.name + ".damaged")
        with contextlib.suppress(OSError):
            os.replace(self.path, aside)
        self.notes.append(f"search journal {self.path} is damaged from its first line on: kept as {aside.name}")


def _line(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> Any:
    """What a line holds; None where it does not agree with its checksum."""
    checksum, _, text = line.partition(b" ")
    try:
        if int(checksum, 16) == zlib.crc32(text):
            return json.loads(text)
    except ValueError:
        pass
    return None


def _plain(run: Figures) -> list[Any]:
    return [run.requests, run.completed, dict(run.values), dict(run.waits_s), dict(run.failures)]


def _run(value: Any) -> tuple[Key, Figures] | None:
    try:
        condition, digest, seed, (requests, completed, values, waits_s, failures) = value
        return (condition, digest, seed), Figures(seed, requests, completed, values, waits_s, failures)
    except (TypeError, ValueError):
        return None

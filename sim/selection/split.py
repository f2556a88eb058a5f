"""A workload as files for the Batch API, and a rest for a live run: what `paceline split` does.

A Batch file (docs/explanation/provider.md#batch-files) holds requests of one model to one endpoint, at most 50,000
lines and 200 MB. The provider also limits the input tokens that are enqueued per model at a time, so files come in
waves: those of one wave fit into the queue together, and the next may be handed in when they have ended. Tokens are
estimated from the text (`governor/model/estimate.py`), hence a share of the queue is left free. Lines go out byte for
byte as they came in, but for a missing `method`, which the Batch API demands.

The input is read once, line by line; of a line that was written only 8 bytes remain, a hash of its custom_id, by which
one that stands there twice is found. Files are written into a hidden folder that takes its name when all are complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from governor.batchapi.limits import FILE_BYTES, FILE_LINES, usable_tokens
from governor.model.errors import BadInput, quoted
from governor.model.estimate import TOKENS_PER_FILE
from governor.model.requests import Request, UnseenContent, read_requests
from sim.scenario.readers import BATCH, Source

LIVE = "live.jsonl"
LIST = "split.json"
Rest = Literal["waves", "live"]


@dataclass(slots=True)
class BatchFile:
    """One file: `wave` counts from 1, 0 = for a live run. `model` and `url` are "" where they differ within it."""

    name: str
    model: str
    url: str
    wave: int
    requests: int = 0
    bytes: int = 0
    input_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """The files written, in the order in which they were begun. `queue_tokens`: 0 = no limit was given.

    `note`: what of the requests could not be counted, one sentence; "" where all was.
    """

    folder: str
    queue_tokens: int
    parts: tuple[BatchFile, ...]
    note: str = ""

    @property
    def requests(self) -> int:
        """Lines over all files."""
        return sum(part.requests for part in self.parts)

    @property
    def waves(self) -> int:
        """Return how often the queue is filled."""
        return max((part.wave for part in self.parts), default=0)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "queue_tokens": self.queue_tokens,
            "requests": self.requests,
            "waves": self.waves,
            "files": [asdict(part) for part in self.parts],
            "note": self.note,
        }


def split(
    path: str | Path,
    out: str | Path,
    *,
    queue_tokens: int = 0,
    rest: Rest = "waves",
    live_share: float = 0.0,
    file_tokens: int = TOKENS_PER_FILE,
) -> Split:
    """Write the files of a batch (JSONL) into the folder `out`, which must be new or empty.

    `queue_tokens`: input tokens that may be enqueued per model, 0 = no limit. `rest`: where what goes beyond it goes:
    into further waves, or into `live.jsonl`. `live_share`: of all requests, evenly spread, that go there in any case.
    `file_tokens`: assumed for each file and the like that a request only points to.
    BadInput, naming the line, for what is wrong; then nothing is left behind.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput("this folder is not empty: name a new one", str(out))
    if not folder.absolute().parent.is_dir():
        raise BadInput(f"there is no folder {folder.absolute().parent}: create it first", str(out))
    source = Source.open(path)
    if source.kind() != BATCH:
        raise BadInput(f"this is a {source.kind()}, not a batch file (JSONL with custom_id, url and body)", source.name)
    name = source.name
    unfinished = folder.absolute().with_name(f".{folder.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        unfinished.mkdir()
        with contextlib.closing(_Writer(unfinished, queue_tokens, rest, name)) as writer:
            ids = array("Q")
            unseen = UnseenContent(file_tokens)
            for line, raw, request in _lines(source, file_tokens):
                unseen.add(request)
                ids.append(_hash_of(request.custom_id))
                seen = len(ids)
                live = int(seen * live_share) > int((seen - 1) * live_share)
                writer.write(line, raw, request, live=live)
            if not ids:
                raise BadInput("no requests in it", name)
            _check_unique(ids, source)
        found = Split(str(out), queue_tokens, tuple(writer.parts), unseen.text and f"{unseen.text} (--file-tokens)")
        _write_list(unfinished / LIST, found)
        os.replace(unfinished, folder)
        return found
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror or error}", str(out)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------------------------------------------------------------- reading


def _lines(source: Source, file_tokens: int = TOKENS_PER_FILE) -> Iterator[tuple[int, bytes, Request]]:
    """Number, bytes with one newline at the end, and request of every line that is not blank."""
    with source.stream() as file:
        for line, raw in enumerate(file, 1):
            text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if not text.strip():
                continue
            try:
                # One line at a time: the reader would keep every custom_id.
                (request,) = read_requests([text], "", file_tokens=file_tokens)
                if not request.model:
                    raise BadInput("body.model is missing: a Batch file is for one model")
            except BadInput as error:
                raise BadInput(error.reason, source.name, line) from None
            yield line, _with_method(text.strip()) + b"\n", request


def _with_method(text: bytes) -> bytes:
    record = json.loads(text)
    if "method" in record:
        return text
    return json.dumps({"custom_id": record["custom_id"], "method": "POST", **record}, separators=(",", ":")).encode()


def _hash_of(custom_id: str) -> int:
    # JSON may spell out half of a surrogate pair, which UTF-8 has no bytes for.
    return int.from_bytes(hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def _check_unique(ids: array[int], source: Source) -> None:
    """BadInput with both lines where a custom_id stands twice."""
    ordered = np.sort(np.frombuffer(ids, np.uint64))
    twice = set(ordered[:-1][ordered[1:] == ordered[:-1]].tolist())
    if not twice:
        return
    # Two ids may share a hash; the file tells.
    first: dict[str, int] = {}
    for line, _, request in _lines(source):
        if _hash_of(request.custom_id) in twice:
            before = first.setdefault(request.custom_id, line)
            if before != line:
                stands = f"custom_id {quoted(request.custom_id)} stands on line {before} already"
                raise BadInput(stands, source.name, line)


# ---------------------------------------------------------------- writing


class _Writer:
    """The files under way: one per model and endpoint, and the one for the live run."""

    def __init__(self, folder: Path, queue_tokens: int, rest: Rest, name: str) -> None:
        self.folder = folder
        self.queue_tokens = queue_tokens
        self.usable = usable_tokens(queue_tokens)
        self.rest = rest
        self.name = name
        self.parts: list[BatchFile] = []
        self._open: dict[tuple[str, str], tuple[BatchFile, BinaryIO]] = {}
        # Per model: the wave that is being filled, and what it holds.
        self._wave: dict[str, int] = {}
        self._queued: dict[str, int] = {}

    def write(self, line: int, raw: bytes, request: Request, *, live: bool) -> None:
        """Put a line into the file where it belongs."""
        model, tokens = request.model, request.sizes.prompt_tokens
        if not live and self._queued.get(model, 0) + tokens > self.usable:
            if self.rest == "live":
                live = True
            elif tokens > self.usable:
                raise BadInput(
                    f"request {quoted(request.custom_id)} has about {tokens:,} input tokens, {self.usable:,.0f} of a "
                    f"queue of {self.queue_tokens:,} are used: it fits into no Batch file, send it live (--rest live)",
                    self.name,
                    line,
                )
            else:
                self._next_wave(model)
        if len(raw) > FILE_BYTES and not live:
            raise BadInput(f"the line has {len(raw):,} bytes, a Batch file at most {FILE_BYTES:,}", self.name, line)
        part, file = self._live() if live else self._part(model, request.url, len(raw))
        file.write(raw)
        part.requests += 1
        part.bytes += len(raw)
        part.input_tokens += tokens
        if not live:
            self._queued[model] = self._queued.get(model, 0) + tokens

    def _next_wave(self, model: str) -> None:
        self._wave[model] = self._wave.get(model, 1) + 1
        self._queued[model] = 0
        for key in [key for key in self._open if key[0] == model]:
            self._close(key)

    def _part(self, model: str, url: str, size: int) -> tuple[BatchFile, BinaryIO]:
        key = model, url
        if key in self._open:
            part, _ = self._open[key]
            if part.requests < FILE_LINES and part.bytes + size <= FILE_BYTES:
                return self._open[key]
            self._close(key)
        wave = self._wave.setdefault(model, 1)
        number = sum(part.wave > 0 for part in self.parts) + 1
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}{url.removeprefix('/v1')}")[:80]
        return self._begin(key, BatchFile(f"wave{wave:02d}-{number:04d}-{label}.jsonl", model, url, wave))

    def _live(self) -> tuple[BatchFile, BinaryIO]:
        key = "", ""
        return self._open[key] if key in self._open else self._begin(key, BatchFile(LIVE, "", "", 0))

    def _begin(self, key: tuple[str, str], part: BatchFile) -> tuple[BatchFile, BinaryIO]:
        self._open[key] = part, open(self.folder / part.name, "xb")  # noqa: SIM115  (closed in `_close`)
        self.parts.append(part)
        return self._open[key]

    def _close(self, key: tuple[str, str]) -> None:
        _, file = self._open.pop(key)
        with file:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the open files, with everything on the disk."""
        for key in list(self._open):
            self._close(key)


def _write_list(path: Path, found: Split) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(found.to_json_dict(), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())

"""Shadow mode: a client's own calls are recorded on their way, and nothing about them is changed.

A transport around the client's own passes everything on as it comes, and notes what was sent and what came back. A
thread reads the notes and appends one JSON line per attempt to the shadow's journal: times, sizes, usage, status and
the provider's counts, without prompts or answers. `paceline shadow` reads logs of this form, and so do the other
commands that read logs (`calibrate`, `plan`, `replay`). Several processes may append to one file.

No error of this module reaches a call: errors are swallowed and counted (`ShadowLog.errors`), and the first is logged.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from queue import Empty, Queue
from typing import Any

from governor.model.errors import BadInput
from governor.model.policy import Policy
from governor.model.prices import usage_in
from governor.model.requests import URLS, Answer, Outcome
from governor.model.work import Work
from governor.provider.rate_limit_headers import fields_of, limits_of, processing_s
from governor.provider.responses import EventStream, answer_of, unanswered
from governor.provider.transport import WrappingTransport, package_of, work_of_request

# The number of notes that may wait to be written; further ones are counted as dropped.
NOTES_MAX = 10_000
# The usage of a longer answer is not read.
_ANSWER_BYTES_MAX = 8 * 2**20
# The same body, sent again within this time after a failure, is a retry of that call.
RETRIED_WITHIN_S = 600.0
CALLS_REMEMBERED = 10_000
FLUSH_S = 5.0
_LOG = logging.getLogger("governor")


@dataclass(slots=True)
class _Note:
    """One attempt as it passed. Seconds: `at` since 1970, `began` monotonic, others since `began`; -1 = unknown."""

    request: Any
    body: bytes | None
    at: float
    began: float
    response: Any = None
    error: Exception | None = None
    chunks: list[bytes] = field(default_factory=list)
    size: int = 0
    first_s: float = -1.0
    took_s: float = -1.0
    is_whole: bool = False


class ShadowLog:
    """The journal of a shadow. `path`: the file, made readable by its owner alone. `prompts`: keep the bodies too.

    `recorded`, `dropped`, `errors`: attempts written, attempts for which there was no room, and errors of this module.
    """

    def __init__(self, path: str | os.PathLike[str], *, prompts: bool = False) -> None:
        self.path = os.fspath(path)
        self.prompts = prompts
        self.recorded = self.dropped = self.errors = 0
        self._queue: Queue[_Note] = Queue(NOTES_MAX)
        self._process = 0
        self._lock = threading.Lock()
        self._run = secrets.token_hex(4)
        self._calls: OrderedDict[bytes, tuple[str, int, float, float]] = OrderedDict()
        self._count = 0
        atexit.register(self.flush)

    def put(self, note: _Note) -> None:
        """Queue one more attempt, to be written soon."""
        if self._process != os.getpid():
            self._start()
        if self._queue.full():
            self.dropped += 1
        else:
            self._queue.put_nowait(note)

    def swallow(self, error: BaseException) -> None:
        """Count an error of this module, and log the first."""
        self.errors += 1
        if self.errors == 1:
            _LOG.warning("shadow %s: %s: %s; calls are not affected", self.path, type(error).__name__, error)

    def flush(self, timeout_s: float = FLUSH_S) -> None:
        """Return when everything has been written, or after `timeout_s` seconds."""
        until = time.monotonic() + timeout_s
        while self._queue.unfinished_tasks and self._process == os.getpid() and time.monotonic() < until:
            time.sleep(0.005)

    def _start(self) -> None:
        """Start the writing thread, once in each process that uses this log."""
        with self._lock:
            if self._process == os.getpid():
                return
            if self._process:
                self._queue, self._run = Queue(NOTES_MAX), secrets.token_hex(4)  # the parent writes its own
            self._process = os.getpid()
            threading.Thread(target=self._write, args=(self._queue,), name="shadow", daemon=True).start()

    def _write(self, queue: Queue[_Note]) -> None:
        while True:
            notes = [queue.get()]
            try:
                while len(notes) < 100:
                    notes.append(queue.get_nowait())
            except Empty:
                pass
            try:
                rows = [row for note in notes if (row := self._row(note)) is not None]
                if rows:
                    # Write all lines at once: lines of several processes then do not run into each other.
                    handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                    try:
                        os.write(handle, "".join(json.dumps(row) + "\n" for row in rows).encode())
                    finally:
                        os.close(handle)
                self.recorded += len(rows)
            except Exception as error:
                self.swallow(error)
            finally:
                for _ in notes:
                    queue.task_done()

    def _row(self, note: _Note) -> dict[str, Any] | None:
        """Return the line of an attempt; None if the request calls no model."""
        work = work_of_request(note.request, note.body, _ANY)
        sizes = work.request.sizes
        if sizes.endpoint < 0:
            return None
        answer = _answer_of(note, work)
        digest = hashlib.blake2b(note.body or b"", digest_size=16).digest()
        name, attempt, arrived = self._call_of(digest, note.at)
        is_ok = answer.outcome is Outcome.OK
        self._calls[digest] = name, attempt, arrived, -1.0 if is_ok else note.at + note.took_s
        while len(self._calls) > CALLS_REMEMBERED:
            self._calls.popitem(last=False)
        fields = fields_of(note.response.headers) if note.response is not None else {}
        counts = {limit.dimension: limit for limit in limits_of(fields, note.at)}
        tokens, requests = (counts.get(dimension) for dimension in ("TPM", "RPM"))
        seen = {
            "custom_id": name,
            "attempt": attempt,
            "endpoint": URLS[sizes.endpoint] if sizes.endpoint < len(URLS) else None,
            "model": work.request.model,
            "prompt_tokens": answer.used_prompt_tokens if answer.used_prompt_tokens >= 0 else sizes.prompt_tokens,
            "output_tokens": answer.used_output_tokens,
            "cached_tokens": usage_in(answer.body).cached or None,
            **{part: getattr(sizes, part) for part in ("max_tokens", "chars", "role_chars", "messages")},
            **{part: getattr(sizes, part) for part in ("images", "tools", "n")},
            "arrival": arrived,
            "launched": note.at,
            "latency": note.took_s,
            "ttft": note.first_s,
            "processing": processing_s(fields),
            "retry_after": answer.retry_after_s,
            "limit_tokens": tokens.limit if tokens else -1,
            "remaining_tokens": tokens.remaining if tokens else -1,
            "limit_requests": requests.limit if requests else -1,
            "remaining_requests": requests.remaining if requests else -1,
            "outcome": answer.outcome.value,
            "status_code": answer.status,
            "error_code": answer.error_code,
        }
        row = {key: value for key, value in seen.items() if value not in (-1, None, "")}
        if self.prompts and note.body is not None:
            row["sent"] = note.body.decode("utf-8", "replace")
        return row

    def _call_of(self, digest: bytes, at: float) -> tuple[str, int, float]:
        """Return the call that an attempt belongs to, its number in it, and when the call arrived."""
        before = self._calls.pop(digest, None)
        if before is not None and 0.0 <= before[3] <= at + RETRIED_WITHIN_S and at - before[3] <= RETRIED_WITHIN_S:
            return before[0], before[1] + 1, before[2]
        self._count += 1
        return f"{self._run}-{self._count}", 1, at


# Any policy will do: only the sizes of its work are used.
_ANY = Policy()


def _answer_of(note: _Note, work: Work) -> Answer:
    """Return the answer of an attempt."""
    package = package_of(note.request)
    if note.error is not None:
        return unanswered(note.error, package)
    response, raw = note.response, b"".join(note.chunks)
    if "event-stream" in response.headers.get("content-type", "") and response.status_code < 300:
        events = EventStream(response, work.request.sizes)
        events.feed(raw)
        return events.answer(is_whole=note.is_whole)
    return answer_of(response, raw, work, package)


class ShadowTransport(WrappingTransport):
    """A transport around another that notes what passes, for either kind of client."""

    def __init__(self, inner: Any, log: ShadowLog) -> None:
        self.inner = inner
        self.log = log

    async def handle_async_request(self, request: Any) -> Any:
        """Pass on one call of an asynchronous client."""
        note = self._noted(request)
        try:
            response = await self.inner.handle_async_request(request)
        except Exception as error:
            self._failed(note, error)
            raise
        return self._followed(note, response)

    def handle_request(self, request: Any) -> Any:
        """Pass on one call of a blocking client."""
        note = self._noted(request)
        try:
            response = self.inner.handle_request(request)
        except Exception as error:
            self._failed(note, error)
            raise
        return self._followed(note, response)

    def _noted(self, request: Any) -> _Note:
        # Do not touch a body that is still to be produced: its content then stays unknown.
        return _Note(request, getattr(request, "_content", None), time.time(), time.monotonic())

    def _failed(self, note: _Note, error: Exception) -> None:
        try:
            note.error, note.took_s = error, time.monotonic() - note.began
            self.log.put(note)
        except Exception as own:
            self.log.swallow(own)

    def _followed(self, note: _Note, response: Any) -> Any:
        try:
            note.response = response
            if response.is_closed:  # from a test transport or a cache: there is no stream to follow
                note.chunks, note.is_whole, note.took_s = [response.content], True, time.monotonic() - note.began
                self.log.put(note)
                return response
            response.stream = _stream_type(package_of(note.request))(response.stream, note, self.log)
        except Exception as own:
            self.log.swallow(own)
        return response


class _Passing:
    """A stream on its way to the client, chunk by chunk as it arrives."""

    def __init__(self, inner: Any, note: _Note, log: ShadowLog) -> None:
        self._inner = inner
        self._note: _Note | None = note
        self._log = log

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            self._saw(chunk)
            yield chunk
        self._over(is_whole=True)

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._inner:
            self._saw(chunk)
            yield chunk
        self._over(is_whole=True)

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            self._over(is_whole=False)

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._over(is_whole=False)

    def _saw(self, chunk: bytes) -> None:
        note = self._note
        if note is not None:
            if note.first_s < 0.0:
                note.first_s = time.monotonic() - note.began
            note.size += len(chunk)
            if note.size <= _ANSWER_BYTES_MAX:
                note.chunks.append(chunk)

    def _over(self, *, is_whole: bool) -> None:
        note, self._note = self._note, None
        if note is None:
            return
        try:
            note.is_whole, note.took_s = is_whole, time.monotonic() - note.began
            self._log.put(note)
        except Exception as own:
            self._log.swallow(own)


@lru_cache
def _stream_type(package: Any) -> Callable[..., Any]:
    return type("ShadowedStream", (_Passing, package.AsyncByteStream, package.SyncByteStream), {})


_logs: dict[str, ShadowLog] = {}


def shadow_log(path: str, *, prompts: bool = False) -> ShadowLog:
    """Return this process's log of the file. Raise BadInput if the file cannot be written."""
    place = os.path.abspath(path)
    if place not in _logs:
        try:
            os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        except OSError as error:
            raise BadInput(f"cannot be written: {error.strerror}: name another shadow journal", path) from None
        _logs[place] = ShadowLog(place, prompts=prompts)
    return _logs[place]

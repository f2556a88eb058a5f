"""The answer to a client's own call: what a response means, and a stream on its way to the client.

An answer in JSON is read whole before it is handed on, since a success may contain an error. Every other answer is a
stream: it goes to the client chunk by chunk as it arrives and is never requested again, and its permit ends when the
stream ends, is closed or is dropped. From a stream of events, usage and errors are extracted on the way.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakSet

from governor.model.estimate import CHARS_PER_TOKEN, Sizes
from governor.model.requests import Answer, Outcome, usage_of
from governor.model.work import Work
from governor.profiles.schema import Profile
from governor.provider.answers import classify, dropped, timed_out
from governor.provider.rate_limit_headers import limits_of
from governor.scheduler.portal import Lease, background_loop, running_loop

# The interval at which streams are checked for unread ones.
IDLE_S = 15.0
# The usage of an event longer than this is not read.
EVENT_BYTES_MAX = 4 * 2**20
_JSON = ("application/json", "text/json")
_EVENTS = "text/event-stream"
# Only the events of a stream that state usage or an error must be parsed as JSON.
_TELLS = re.compile(
    rb'"usage"\s*:\s*\{|"error"\s*:\s*[{"]|"type"\s*:\s*"(?:error|response\.(?:failed|incomplete|completed))"'
)
_TEXT = re.compile(rb'"(?:content|text|delta|arguments|partial_json|thinking)"\s*:\s*"((?:[^"\\]|\\.)*)"')
_LAST = re.compile(rb'^data:\s*\[DONE\]|"type"\s*:\s*"message_stop"', re.MULTILINE)
_BLANK = re.compile(rb"\r?\n\r?\n")


class Operation(Protocol):
    """An object that follows one call: see `governor.telemetry.tracing`."""

    def sends(self, waits_s: Sequence[float]) -> AbstractContextManager[object]:
        """Return a context in which an attempt goes out, with its waits in seconds by cause (`CAUSES`)."""

    def answered(self, answer: Answer) -> None:
        """Report the attempt's answer."""

    def over(self, answer: Answer | None, error: BaseException | None = None) -> None:
        """Report the end of the call."""


def is_read_whole(response: Any) -> bool:
    """Return whether the body is read before it is handed on: refusals, and answers in JSON."""
    kind = _kind_of(response)
    return not 200 <= response.status_code < 300 or kind in _JSON or kind.endswith("+json")


def _kind_of(response: Any) -> str:
    kind: str = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def answer_of(response: Any, raw: bytes, work: Work, package: Any, profile: Profile | None = None) -> Answer:
    content = raw
    if response.headers.get("content-encoding"):
        with suppress(package.DecodingError):
            content = package.Response(200, headers=response.headers, content=raw).content
    answer = classify(response.status_code, response.headers, content, now_epoch=time.time(), profile=profile)
    if answer.outcome is Outcome.MALFORMED and work.request.sizes.endpoint < 0:
        return replace(answer, outcome=Outcome.OK)  # the client reads it, not this module
    return answer


def unanswered(error: Exception, package: Any) -> Answer:
    """Return the `Answer` for an attempt that ended in an exception."""
    words = f"{type(error).__name__}: {str(error)[:300]}"
    return timed_out(words) if isinstance(error, package.TimeoutException) else dropped(words)


def streamed(
    response: Any, lease: Lease, call: Operation, work: Work, package: Any, profile: Profile | None = None
) -> Any:
    """Return the response with a stream that ends the permit at its own end."""
    lease.stated(limits_of(response.headers, time.time(), profile))
    reader = EventStream(response, work.request.sizes) if _kind_of(response) == _EVENTS else _Bytes()
    response.stream = _stream_type(package)(response.stream, lease, call, reader, package)
    return response


class _Bytes:
    """The reader of a stream that does not consist of events: it notes nothing."""

    def feed(self, chunk: bytes) -> None:
        """Take the next chunk."""

    def answer(self, *, is_whole: bool) -> Answer:
        """Return the answer that the stream amounts to so far."""
        return Answer(Outcome.OK, 200)


class EventStream(_Bytes):
    """Reads the usage, or the error, from a stream of server-sent events."""

    def __init__(self, response: Any, sizes: Sizes) -> None:
        self._status = response.status_code
        self._sizes = sizes
        self._unpack = _unpacker(response.headers.get("content-encoding", ""))
        self._rest = b""
        self._usage: dict[str, Any] = {}
        self._error: Answer | None = None
        self._text_bytes = 0
        self._is_whole = False

    def feed(self, chunk: bytes) -> None:
        if self._unpack is not None:
            chunk = self._unpack(chunk)
        *events, self._rest = _BLANK.split(self._rest + chunk)
        for event in events:
            self._event(event)
        if len(self._rest) > EVENT_BYTES_MAX:
            self._rest = b""

    def _event(self, event: bytes) -> None:
        if _TELLS.search(event):
            data = b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
            with suppress(ValueError, RecursionError):
                self._told(json.loads(data))
        elif _LAST.search(event):
            self._is_whole = True
        else:
            self._text_bytes += sum(map(len, _TEXT.findall(event)))

    def _told(self, event: Any) -> None:
        if not isinstance(event, dict):
            return
        holders = [event, *(each for key in ("response", "message") if isinstance(each := event.get(key), dict))]
        for holder in holders:
            usage = holder.get("usage")
            if isinstance(usage, dict):
                self._usage |= {name: value for name, value in usage.items() if value is not None}
        self._is_whole = self._is_whole or event.get("type") in ("response.completed", "response.incomplete")
        if event.get("error") or event.get("type") in ("error", "response.failed"):
            self._error = classify(self._status, None, event, now_epoch=time.time())

    def answer(self, *, is_whole: bool) -> Answer:
        if self._error is not None and self._error.outcome not in (Outcome.OK, Outcome.MALFORMED):
            return self._error
        if not (is_whole or self._is_whole):
            return Answer(Outcome.OK, self._status)  # the provider may continue: the reservation stays booked
        prompt, output = usage_of({"usage": self._usage})
        if prompt < 0 or not self._usage:
            prompt, output = self._sizes.prompt_tokens, -(-self._text_bytes // CHARS_PER_TOKEN)
        return Answer(Outcome.OK, self._status, used_prompt_tokens=prompt, used_output_tokens=output)


def _unpacker(packing: str) -> Callable[[bytes], bytes] | None:
    """Return a function that decompresses a stream, None if it is not compressed. Unknown encodings yield no bytes."""
    packing = packing.strip().lower()
    if packing in ("", "identity"):
        return None
    if packing not in ("gzip", "deflate"):
        return lambda chunk: b""
    unpacked = zlib.decompressobj(wbits=47)  # either kind of header

    def unpack(chunk: bytes) -> bytes:
        with suppress(zlib.error):
            return unpacked.decompress(chunk, EVENT_BYTES_MAX)
        return b""

    return unpack


class _Watched:
    """A stream on its way to the client, chunk by chunk as it arrives."""

    def __init__(self, inner: Any, lease: Lease, call: Operation, reader: _Bytes, package: Any) -> None:
        self._inner = inner
        self._lease = lease
        self._call = call
        self._reader = reader
        self._package = package
        self._loop = running_loop()
        self.is_over = False
        self.is_read = False  # whether its reader is waiting for a chunk right now
        self.rounds = 0
        _idle.watch(self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            self.is_read = True
            async for chunk in self._inner:
                self._reader.feed(chunk)
                self.is_read, self.rounds = False, 0
                yield chunk
                self.is_read = True
        except self._package.TransportError as error:
            self._end(unanswered(error, self._package))
            raise
        finally:
            self.is_read = False
        self._end(self._reader.answer(is_whole=True))

    def __iter__(self) -> Iterator[bytes]:
        try:
            self.is_read = True
            for chunk in self._inner:
                self._reader.feed(chunk)
                self.is_read, self.rounds = False, 0
                yield chunk
                self.is_read = True
        except self._package.TransportError as error:
            self._end(unanswered(error, self._package))
            raise
        finally:
            self.is_read = False
        self._end(self._reader.answer(is_whole=True))

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            self._end(self._reader.answer(is_whole=False))

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._end(self._reader.answer(is_whole=False))

    def __del__(self) -> None:
        if self.is_over:
            return
        self.is_over = True  # dropped, perhaps by the garbage collector in the middle of other work
        self._lease.give_back(later=True)
        with suppress(Exception):
            self._call.over(None)
            if self._loop is None:
                self._inner.close()
            else:
                self._loop.call_soon_threadsafe(_close, self._inner)

    def _end(self, answer: Answer) -> None:
        if not self.is_over:
            self.is_over = True
            self._lease.over(answer)
            self._call.over(answer)


class _Idle:
    """Watches unread streams: they may be garbage that has not been collected yet.

    A client's stream object and its iterator refer to each other, so that a stream dropped before its end is freed only
    by the next full collection. If all tasks wait for its permit, nothing is allocated and no collection happens. So a
    stream that has not been read for one to two rounds of `IDLE_S` triggers one collection.
    """

    def __init__(self) -> None:
        self._streams: WeakSet[_Watched] = WeakSet()
        self._lock = threading.Lock()
        self._loop: Any = None
        self._process = 0

    def watch(self, stream: _Watched) -> None:
        """Watch a stream from its beginning."""
        loop = running_loop() or background_loop()
        with self._lock:
            self._streams.add(stream)
            if self._loop is None or not self._loop.is_running() or self._process != os.getpid():
                self._loop, self._process = loop, os.getpid()
                loop.call_soon_threadsafe(loop.call_later, IDLE_S, self._look)

    def _look(self) -> None:
        if self._is_due():
            gc.collect()

    def _is_due(self) -> bool:
        with self._lock:
            streams = [stream for stream in self._streams if not stream.is_over]
            self._streams = WeakSet(streams)
            if streams:
                self._loop.call_later(IDLE_S, self._look)
            else:
                self._loop = None
        for stream in streams:
            stream.rounds += not stream.is_read
        return any(stream.rounds == 2 for stream in streams if not stream.is_read)


_idle = _Idle()
_closing: set[asyncio.Task[None]] = set()


def _close(stream: Any) -> None:
    """Close a stream that has no owner any more: its connection would stay open."""
    task = asyncio.get_running_loop().create_task(stream.aclose())
    _closing.add(task)
    task.add_done_callback(_closing.discard)


@lru_cache
def _stream_type(package: Any) -> Any:
    return type("GovernedStream", (_Watched, package.AsyncByteStream, package.SyncByteStream), {})

"""A client's own calls under the governor: an httpx (or httpx2) transport around the one that it has.

    client = httpx2.AsyncClient(transport=GovernedTransport(httpx2.AsyncHTTPTransport(), portal, policy))

`governed` (in `governor.run`) puts it into a client that exists already. It reads what is to be sent, asks the
governor, sends, reads status, headers and usage by the table that a batch's answers are read by (`answers`), sends
again as the law says, and hands the client the final response as it came. What the client makes of that (its types,
exceptions, raw responses) is its own.

Theory of operation. An exchange is written once (`_exchange`), as a coroutine over a few steps: send, read, wait. An
asynchronous client awaits them. For a blocking one each step blocks its thread and is done then, so that the coroutine
runs to its end without ever waiting (`at_once`). Where the governor itself works: `portal`.

An answer in JSON is read whole before it is handed on, since an error may be inside a success. All else is a stream: it
goes to the client chunk by chunk as it comes, is never asked for again, and its permit ends when it ends, is closed, or
is dropped. Of a stream of events the usage and an error are picked out on the way.

Retries are the law's. A wrapper that tries again by itself what the law has given up gets one attempt each time, not a
new set of them: its attempts add up with ours and do not multiply.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import math
import os
import re
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from itertools import count
from math import inf
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast
from weakref import WeakSet

from governor.model.errors import BadInput, PacelineError, Refused
from governor.model.estimate import CHARS_PER_TOKEN, CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, Sizes, measured
from governor.model.policy import Policy
from governor.model.requests import Answer, Outcome, Request, usage_of
from governor.model.work import Work, work_of
from governor.provider.answers import classify, dropped, timed_out
from governor.provider.stated import fields_of, limits_in
from governor.scheduler.driver import BATCH
from governor.scheduler.portal import Lease, Portal, background_loop, running_loop

if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport, BaseTransport

    class _Transport(AsyncBaseTransport, BaseTransport):
        """What a client takes for a transport."""
else:
    _Transport = object  # a client asks for the methods alone

T = TypeVar("T")
# What is tried again: a request that ended so was given up.
MAY_PASS = (
    *(Outcome.THROTTLED, Outcome.SLOW_DOWN, Outcome.OVERLOADED),
    *(Outcome.SERVER_ERROR, Outcome.TIMEOUT, Outcome.DROPPED),
)
# Paths by their ends: OpenAI's, Azure's and those of whoever speaks their dialect, and Anthropic's.
_ENDPOINTS = (
    ("/chat/completions", CHAT),
    ("/responses", RESPONSES),
    ("/embeddings", EMBEDDINGS),
    ("/completions", COMPLETIONS),
    ("/messages", MESSAGES),
)
# What is said of a request to any other endpoint: it counts as one, without tokens.
_NO_SIZES = Sizes(-1, 0, 0, 0, 0, 0, 0, 1, -1)
# A body that is sent from a file or a generator is read into memory up to here, so that it can be sent again.
REPLAYED_BYTES_MAX = 32 * 2**20
# For so long a request that was given up is known, so that a wrapper's own retries do not begin anew.
GIVEN_UP_S = 60.0
GIVEN_UP_MAX = 1_000
# How often it is looked whether streams are read.
IDLE_S = 15.0
# An event longer than this is none whose usage could be read.
EVENT_BYTES_MAX = 4 * 2**20
_JSON = ("application/json", "text/json")
_EVENTS = "text/event-stream"
# What must be read as JSON of a stream's events: those that state usage or an error.
_TELLS = re.compile(
    rb'"usage"\s*:\s*\{|"error"\s*:\s*[{"]|"type"\s*:\s*"(?:error|response\.(?:failed|incomplete|completed))"'
)
_TEXT = re.compile(rb'"(?:content|text|delta|arguments|partial_json|thinking)"\s*:\s*"((?:[^"\\]|\\.)*)"')
_LAST = re.compile(rb'^data:\s*\[DONE\]|"type"\s*:\s*"message_stop"', re.MULTILINE)
_BLANK = re.compile(rb"\r?\n\r?\n")
_inside: ContextVar[bool] = ContextVar("paceline_inside", default=False)


class Operation(Protocol):
    """Who follows one call: see `governor.telemetry.tracing`."""

    def sends(self, waits_s: Sequence[float]) -> AbstractContextManager[object]:
        """An attempt goes out in this block, having waited so long for each of `CAUSES`."""

    def answered(self, answer: Answer) -> None:
        """What the attempt came to."""

    def over(self, answer: Answer | None, error: BaseException | None = None) -> None:
        """The call is over."""


class _Unfollowed:
    """Of a call that nobody follows."""

    def sends(self, waits_s: Sequence[float]) -> AbstractContextManager[object]:
        return _NOTHING_TO_DO

    def answered(self, answer: Answer) -> None:
        pass

    def over(self, answer: Answer | None, error: BaseException | None = None) -> None:
        pass


_NOTHING_TO_DO = nullcontext()
_UNFOLLOWED = _Unfollowed()


class GovernedTransport(_Transport):
    """A transport around another, for a client of either kind. Its calls wait until the governor lets them.

    `inner`: the transport that sends. `portal`: the way to the governor (`portal_to`). `policy`: whose charge rule
    says what to reserve. `max_wait_s`: a call that may not be sent within so many seconds is answered with a 503. What
    can never be sent is answered with a 400, so that the client's own exception says why. `lane`: as for
    `Governor.permit`. `follow`: begins to follow a
    call, by what the governor knows of it and its address.
    """

    def __init__(
        self,
        inner: Any,
        portal: Portal,
        policy: Policy,
        *,
        max_wait_s: float = inf,
        lane: str = BATCH,
        follow: Callable[[Work, str], Operation] = lambda work, url: _UNFOLLOWED,
    ) -> None:
        self.inner = inner
        self.portal = portal
        self._policy = policy
        self._max_wait_s = max_wait_s
        self._lane = lane
        self._follow = follow
        self._given_up: dict[bytes, float] = {}
        self._count = count(1)

    # ------------------------------------------------------------ what a client calls

    async def handle_async_request(self, request: Any) -> Any:
        """One call of an asynchronous client."""
        if _inside.get():
            return await self.inner.handle_async_request(request)
        return await self._exchange(request, _Steps(self.inner))

    def handle_request(self, request: Any) -> Any:
        """One call of a blocking client."""
        if _inside.get():
            return self.inner.handle_request(request)
        return at_once(self._exchange(request, _BlockingSteps(self.inner)))

    async def aclose(self) -> None:
        """Closes the transport inside."""
        await self.inner.aclose()

    def close(self) -> None:
        """Closes the transport inside."""
        self.inner.close()

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self.inner.__aexit__(*exception)

    def __enter__(self) -> Self:
        self.inner.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.inner.__exit__(*exception)

    # ------------------------------------------------------------ one exchange

    async def _exchange(self, request: Any, steps: _Steps) -> Any:
        """From the client's request to the response that it gets, over as many attempts as the law grants."""
        package = package_of(request)
        body = await steps.body(request, package)
        work = work_of_request(request, body, self._policy, next(self._count))
        blocking, max_wait_s = steps.blocking, self._max_wait_s
        lease = self.portal.lease(work, blocking=blocking, max_wait_s=max_wait_s, lane=self._lane)
        call = self._follow(work, str(request.url))
        try:
            await lease.begin()
        except PacelineError as error:
            call.over(None, error)
            return _refusal(error, request, package)
        except BaseException as error:
            call.over(None, error)
            raise
        # A body that can be read once only is sent once only.
        left = 1 if body is None or self._was_given_up(request, body) else lease.attempts_max
        response: Any = None
        raised: Exception | None = None
        try:
            while True:
                left -= 1
                token = _inside.set(True)
                try:
                    with call.sends(lease.waits_s):
                        response, raised = await steps.send(request), None
                    if not _is_whole(response):
                        return _streamed(response, lease, call, work, package)
                    answer = answer_of(response, await steps.read(response, package), work, package)
                except (package.UnsupportedProtocol, package.LocalProtocolError, package.PoolTimeout):
                    raise  # nothing was sent
                except package.TransportError as error:
                    raised, answer = error, unanswered(error, package)
                finally:
                    _inside.reset(token)
                call.answered(answer)
                if left <= 0:
                    lease.over(answer)
                    break
                with suppress(PacelineError):  # the pool has stopped: the answer is the last
                    if await lease.answered(answer):
                        continue
                break
        except BaseException as error:
            lease.give_back()
            call.over(None, error)
            raise
        call.over(answer)
        if answer.outcome in MAY_PASS and body is not None:
            self._gave_up(request, body)
        if raised is not None:
            raise raised
        return response

    def _was_given_up(self, request: Any, body: bytes) -> bool:
        """Whether this very request was given up a moment ago: somebody around the client tries again by itself."""
        if not self._given_up:
            return False
        at = self._given_up.get(_digest(request, body))
        return at is not None and time.monotonic() - at < GIVEN_UP_S

    def _gave_up(self, request: Any, body: bytes) -> None:
        digest = _digest(request, body)
        self._given_up.pop(digest, None)
        self._given_up[digest] = time.monotonic()
        while len(self._given_up) > GIVEN_UP_MAX:
            del self._given_up[next(iter(self._given_up))]


class _Steps:
    """What an exchange does with an asynchronous client's transport."""

    blocking = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def body(self, request: Any, package: Any) -> bytes | None:
        """What is to be sent, None where it can be read but once."""
        try:
            return cast(bytes, request.content)
        except package.RequestNotRead:
            return cast(bytes, await request.aread()) if _is_replayed(request) else None

    async def send(self, request: Any) -> Any:
        """The response, whose body has not been read."""
        return await self._inner.handle_async_request(request)

    async def read(self, response: Any, package: Any) -> bytes:
        """The body as it came; the response can be read again from its beginning."""
        try:
            raw = b"".join([part async for part in response.stream])
        finally:
            await response.stream.aclose()
        response.stream = package.ByteStream(raw)
        return raw


class _BlockingSteps(_Steps):
    """The same with a blocking client's: nothing is ever waited for but by the thread itself."""

    blocking = True

    async def body(self, request: Any, package: Any) -> bytes | None:
        try:
            return cast(bytes, request.content)
        except package.RequestNotRead:
            return cast(bytes, request.read()) if _is_replayed(request) else None

    async def send(self, request: Any) -> Any:
        return self._inner.handle_request(request)

    async def read(self, response: Any, package: Any) -> bytes:
        try:
            raw = b"".join(response.stream)
        finally:
            response.stream.close()
        response.stream = package.ByteStream(raw)
        return raw


def at_once(exchange: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        exchange.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    exchange.close()
    raise AssertionError("a blocking exchange has waited")


# ---------------------------------------------------------------- what is sent


def work_of_request(request: Any, body: bytes | None, policy: Policy, index: int = 0) -> Work:
    """What the governor must know of a call: its endpoint, model and sizes, and what to reserve for it.

    What is no call of a model, or of one whose charge is not known (images, sound, files), counts as one request
    without tokens. A body that the endpoint could not take is reserved the policy's estimate per run.
    """
    path = request.url.path
    endpoint = next((code for end, code in _ENDPOINTS if path.endswith(end)), -1) if request.method == "POST" else -1
    if endpoint < 0 or body is None:
        return Work(Request(index, "", path, "", None, _NO_SIZES), 0.0, charge=0)
    try:
        content = json.loads(body)
        sizes, unseen = measured(endpoint, content)
        model = content.get("model")
    except (BadInput, ValueError, RecursionError, AttributeError):
        return Work(Request(index, "", path, "", None, _NO_SIZES), float(policy.est_tokens_per_run))
    known = model if isinstance(model, str) else ""
    return work_of(Request(index, "", path, known, None, sizes, unseen=tuple(unseen)), policy, finalizes=False)


def _is_replayed(request: Any) -> bool:
    length = request.headers.get("content-length", "")
    return length.isdecimal() and int(length) <= REPLAYED_BYTES_MAX


def _digest(request: Any, body: bytes) -> bytes:
    found = hashlib.blake2b(f"{request.method} {request.url}\n".encode(), digest_size=16)
    found.update(body)
    return found.digest()


@lru_cache
def _package(name: str) -> ModuleType:
    return import_module(name)


def package_of(request: Any) -> Any:
    """httpx or httpx2: whichever the client is built on."""
    return _package(type(request).__module__.partition(".")[0])


def _refusal(error: PacelineError, request: Any, package: Any) -> Any:
    """The answer to a call that is not sent: a client would hide an exception behind "connection error"."""
    status, headers = 400, {"x-paceline": "refused"}
    if isinstance(error, Refused):
        status = 503
        if error.retry_after_s >= 0.0:
            headers["retry-after"] = str(math.ceil(error.retry_after_s))
    content = {"error": {"message": str(error), "type": "paceline", "code": type(error).__name__}}
    return package.Response(status, headers=headers, json=content, request=request)


# ---------------------------------------------------------------- what comes back


def _is_whole(response: Any) -> bool:
    """Whether the body is read before it is handed on: refusals, and answers in JSON."""
    kind = _kind_of(response)
    return not 200 <= response.status_code < 300 or kind in _JSON or kind.endswith("+json")


def _kind_of(response: Any) -> str:
    kind: str = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def answer_of(response: Any, raw: bytes, work: Work, package: Any) -> Answer:
    content = raw
    if response.headers.get("content-encoding"):
        with suppress(package.DecodingError):
            content = package.Response(200, headers=response.headers, content=raw).content
    answer = classify(response.status_code, response.headers, content, now_epoch=time.time())
    if answer.outcome is Outcome.MALFORMED and work.request.sizes.endpoint < 0:
        return replace(answer, outcome=Outcome.OK)  # it is read by the client, not by us
    return answer


def unanswered(error: Exception, package: Any) -> Answer:
    """What an attempt without an answer means."""
    words = f"{type(error).__name__}: {str(error)[:300]}"
    return timed_out(words) if isinstance(error, package.TimeoutException) else dropped(words)


def _streamed(response: Any, lease: Lease, call: Operation, work: Work, package: Any) -> Any:
    """The response, whose stream ends the permit when it ends."""
    lease.stated(limits_in(fields_of(response.headers), time.time()))
    reader = EventStream(response, work.request.sizes) if _kind_of(response) == _EVENTS else _Bytes()
    response.stream = _stream_type(package)(response.stream, lease, call, reader, package)
    return response


class _Bytes:
    """What is noted of a stream that is no stream of events: nothing."""

    def feed(self, chunk: bytes) -> None:
        """A chunk has come."""

    def answer(self, *, is_whole: bool) -> Answer:
        """What the stream was, up to here."""
        return Answer(Outcome.OK, 200)


class EventStream(_Bytes):
    """The usage, or the error, of a stream of server-sent events."""

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
            return Answer(Outcome.OK, self._status)  # the provider may go on: the reservation stays booked
        prompt, output = usage_of({"usage": self._usage})
        if prompt < 0 or not self._usage:
            prompt, output = self._sizes.prompt_tokens, -(-self._text_bytes // CHARS_PER_TOKEN)
        return Answer(Outcome.OK, self._status, used_prompt_tokens=prompt, used_output_tokens=output)


def _unpacker(packing: str) -> Callable[[bytes], bytes] | None:
    """What unpacks a stream that is packed, None for one that is not. What is unknown gives nothing to read."""
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
    """A stream on its way to the client, chunk by chunk as it comes."""

    def __init__(self, inner: Any, lease: Lease, call: Operation, reader: _Bytes, package: Any) -> None:
        self._inner = inner
        self._lease = lease
        self._call = call
        self._reader = reader
        self._package = package
        self._loop = running_loop()
        self.is_over = False
        self.is_read = False  # its reader waits for a chunk right now
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
        self.is_over = True  # dropped, perhaps by the garbage collector in the midst of anything
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
    """Looks after streams that nobody reads: they may be garbage that no collector has met yet.

    A client's stream object and its iterator refer to each other, so that one which is dropped unread, or in the midst,
    goes with the next full collection. Where all wait for its permit, nothing is allocated and none comes. So for a
    stream that has not been read for one to two rounds of `IDLE_S` there is a collection, once.
    """

    def __init__(self) -> None:
        self._streams: WeakSet[_Watched] = WeakSet()
        self._lock = threading.Lock()
        self._loop: Any = None
        self._process = 0

    def watch(self, stream: _Watched) -> None:
        """From its beginning."""
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
    """Closes a stream that nobody holds any more: its connection would stay open."""
    task = asyncio.get_running_loop().create_task(stream.aclose())
    _closing.add(task)
    task.add_done_callback(_closing.discard)


@lru_cache
def _stream_type(package: Any) -> Any:
    return type("GovernedStream", (_Watched, package.AsyncByteStream, package.SyncByteStream), {})

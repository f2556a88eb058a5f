"""Governs a client's own calls: an httpx (or httpx2) transport that wraps the client's transport.

    client = httpx2.AsyncClient(transport=GovernedTransport(httpx2.AsyncHTTPTransport(), portal, policy))

`governed` (in `governor.run`) installs it in an existing client. The transport reads the request, asks the governor,
sends, reads status, headers and usage with the same table as a batch (`answers`), sends again as the law decides, and
hands the final response to the client unchanged. The client remains responsible for everything beyond that: its types,
exceptions and raw responses.

Theory of operation. An exchange is written once (`_exchange`), as a coroutine over a few steps: send, read, wait. An
asynchronous client awaits them. For a blocking client each step blocks the thread until it is done, so that the
coroutine runs to its end without ever waiting (`at_once`). For the loop in which the governor works, see `portal`; for
what comes back, see `responses`.

The law decides on retries. If a wrapper retries a request that the law has given up, it gets one attempt each time
instead of a new set: its attempts add to ours rather than multiply them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from itertools import count
from math import inf
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from governor.model.errors import BadInput, PacelineError, Refused
from governor.model.estimate import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, Sizes, measured
from governor.model.policy import Policy
from governor.model.requests import Answer, Outcome, Request
from governor.model.work import Work, work_of
from governor.profiles.schema import Profile
from governor.provider.responses import Operation, answer_of, is_read_whole, streamed, unanswered
from governor.scheduler.driver import BATCH
from governor.scheduler.portal import Portal

if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport, BaseTransport

    class _Transport(AsyncBaseTransport, BaseTransport):
        """Return the class that the client accepts as a transport."""
else:
    _Transport = object  # a client needs only the methods

_T = TypeVar("_T")
# Outcomes that are retried: a request whose last attempt ended in one was given up.
MAY_PASS = (
    *(Outcome.THROTTLED, Outcome.SLOW_DOWN, Outcome.OVERLOADED),
    *(Outcome.SERVER_ERROR, Outcome.TIMEOUT, Outcome.DROPPED),
)
# Endpoints by the ends of their paths: OpenAI's, Azure's, compatible providers' and Anthropic's.
_ENDPOINTS = (
    ("/chat/completions", CHAT),
    ("/responses", RESPONSES),
    ("/embeddings", EMBEDDINGS),
    ("/completions", COMPLETIONS),
    ("/messages", MESSAGES),
)
# The sizes of a request to any other endpoint: it counts as one request without tokens.
_NO_SIZES = Sizes(-1, 0, 0, 0, 0, 0, 0, 1, -1)
# A body from a file or a generator is read into memory up to this size, so that it can be sent again.
REPLAYED_BYTES_MAX = 32 * 2**20
# A request that was given up is remembered for this long, so that a wrapper's own retries do not start afresh.
GIVEN_UP_S = 60.0
GIVEN_UP_MAX = 1_000
_inside: ContextVar[bool] = ContextVar("paceline_inside", default=False)


class _Unfollowed:
    """The operation of a call that is not followed."""

    def sends(self, waits_s: Sequence[float]) -> AbstractContextManager[object]:
        return _NOTHING_TO_DO

    def answered(self, answer: Answer) -> None:
        pass

    def over(self, answer: Answer | None, error: BaseException | None = None) -> None:
        pass


_NOTHING_TO_DO = nullcontext()
_UNFOLLOWED = _Unfollowed()


class WrappingTransport(_Transport):
    """A transport around another, which it opens and closes with itself."""

    inner: Any

    async def aclose(self) -> None:
        """Close the wrapped transport."""
        await self.inner.aclose()

    def close(self) -> None:
        """Close the wrapped transport."""
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


class GovernedTransport(WrappingTransport):
    """A transport around another, for either kind of client. Its calls wait until the governor admits them.

    `inner`: the transport that sends. `portal`: access to the governor (`portal_to`). `policy`: its charge rule
    determines the reservation. `max_wait_s`: a call that may not be sent within that many seconds is answered with a
    503. A call that can never be sent is answered with a 400, so that the client's own exception states the reason.
    `lane`: as for `Governor.permit`. `follow`: returns the `Operation` that follows a call, given its `Work` and its
    address. `profile`: how its answers are read; None = the generic one.
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
        profile: Profile | None = None,
    ) -> None:
        self.inner = inner
        self.portal = portal
        self._policy = policy
        self._max_wait_s = max_wait_s
        self._lane = lane
        self._follow = follow
        self._profile = profile
        self._given_up: dict[bytes, float] = {}
        self._count = count(1)

    # ------------------------------------------------------------ the transport interface

    async def handle_async_request(self, request: Any) -> Any:
        """Carry out one call of an asynchronous client."""
        if _inside.get():
            return await self.inner.handle_async_request(request)
        return await self._exchange(request, _Steps(self.inner))

    def handle_request(self, request: Any) -> Any:
        """Carry out one call of a blocking client."""
        if _inside.get():
            return self.inner.handle_request(request)
        return at_once(self._exchange(request, _BlockingSteps(self.inner)))

    # ------------------------------------------------------------ one exchange

    async def _exchange(self, request: Any, steps: _Steps) -> Any:
        """Return the response to the client's request, after as many attempts as the law grants."""
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
        # A body that can be read only once is sent only once.
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
                    if not is_read_whole(response):
                        return streamed(response, lease, call, work, package, self._profile)
                    answer = answer_of(response, await steps.read(response, package), work, package, self._profile)
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
                with suppress(PacelineError):  # if the pool has stopped, this answer is the last
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
        """Return whether this very request was given up a moment ago: a wrapper around the client is retrying it."""
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
    """The steps of an exchange with an asynchronous client's transport."""

    blocking = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def body(self, request: Any, package: Any) -> bytes | None:
        """Return the request's body, None if it can be read only once."""
        try:
            return cast(bytes, request.content)
        except package.RequestNotRead:
            return cast(bytes, await request.aread()) if _is_replayed(request) else None

    async def send(self, request: Any) -> Any:
        """Return the response, whose body has not been read."""
        return await self._inner.handle_async_request(request)

    async def read(self, response: Any, package: Any) -> bytes:
        """Return the body as it came; the response can be read again from its beginning."""
        try:
            raw = b"".join([part async for part in response.stream])
        finally:
            await response.stream.aclose()
        response.stream = package.ByteStream(raw)
        return raw


class _BlockingSteps(_Steps):
    """The steps of an exchange with a blocking client's transport: each blocks the thread."""

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


def at_once(exchange: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of a coroutine that never waits."""
    try:
        exchange.send(None)
    except StopIteration as end:
        return cast(_T, end.value)
    exchange.close()
    raise AssertionError("a blocking exchange has waited")


# ---------------------------------------------------------------- requests


def work_of_request(request: Any, body: bytes | None, policy: Policy, index: int = 0) -> Work:
    """Return the work that a call means to the governor: its endpoint, model, sizes and reservation.

    A request that calls no model, or a model whose charge is unknown (images, sound, files), counts as one request
    without tokens. A body that the endpoint could not accept reserves the policy's estimate per run.
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
    """Return the package on which the client is built: httpx or httpx2."""
    return _package(type(request).__module__.partition(".")[0])


def _refusal(error: PacelineError, request: Any, package: Any) -> Any:
    """Return the response to a call that is not sent: a client would hide an exception behind "connection error"."""
    status, headers = 400, {"x-paceline": "refused"}
    if isinstance(error, Refused):
        status = 503
        if error.retry_after_s >= 0.0:
            headers["retry-after"] = str(math.ceil(error.retry_after_s))
    content = {"error": {"message": str(error), "type": "paceline", "code": type(error).__name__}}
    return package.Response(status, headers=headers, json=content, request=request)

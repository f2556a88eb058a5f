"""A client's own calls under the governor: an httpx (or httpx2) transport around the one that it has.

    client = httpx2.AsyncClient(transport=GovernedTransport(httpx2.AsyncHTTPTransport(), portal, policy))

`governed` (in `governor.run`) puts it into a client that exists already. It reads what is to be sent, asks the
governor, sends, reads status, headers and usage by the table that a batch's answers are read by (`answers`), sends
again as the law says, and hands the client the final response as it came. What the client makes of that (its types,
exceptions, raw responses) is its own.

Theory of operation. An exchange is written once (`_exchange`), as a coroutine over a few steps: send, read, wait. An
asynchronous client awaits them. For a blocking one each step blocks its thread and is done then, so that the coroutine
runs to its end without ever waiting (`at_once`). Where the governor itself works: `portal`. What comes back:
`responses`.

Retries are the law's. A wrapper that tries again by itself what the law has given up gets one attempt each time, not a
new set of them: its attempts add up with ours and do not multiply.
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
from governor.provider.responses import Operation, answer_of, is_read_whole, streamed, unanswered
from governor.scheduler.driver import BATCH
from governor.scheduler.portal import Portal

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
_inside: ContextVar[bool] = ContextVar("paceline_inside", default=False)


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
                    if not is_read_whole(response):
                        return streamed(response, lease, call, work, package)
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

"""Client connections: how many there may be, how long each may keep the service waiting, and the reserve for calls.

Descriptors go first to the calls in flight and the database; clients share the rest. A connection that has not sent a
whole request head within HEAD_S is closed, and so is one whose body or whose reading stands still, and one that is
still sending its body HEAD_S after its answer. When all places are taken, the connection that has been waiting for a
head, or has been answered, for the longest gives way; while none does, further clients wait in the system's backlog. A
single client has at most CLIENT_RATIO of the places for its requests: further ones are answered with 503.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.run.batch import descriptors
from governor.service.errors import NOT_READY, ApiError, answer_of

log = logging.getLogger("paceline.service")

# Seconds for a request head; without a byte of a body; without a byte of an answer taken.
HEAD_S, BODY_S, READ_S = 10.0, 30.0, 60.0
HEAD_BYTES = 64 * 1024
# A head comes at once from any client that has one: before that, no connection gives way to another.
GRACE_S = 0.25
CLIENT_RATIO = 0.75
# Descriptors besides those of clients and calls: files, the database's connections (15, of 3 files each under SQLite),
# time for connections to the provider to close.
OWN = 80
# A client may hold a file for its upload.
PER_CLIENT = 2
CLIENTS_LEAST = 16


def places(policies: Iterable[Policy], available: int) -> int:
    """Return how many client connections there may be. Raise `BadSetting` if calls in flight leave too few."""
    in_flight = sum(policy.max_concurrency for policy in policies)
    left = (available - OWN - in_flight) // PER_CLIENT
    if left < CLIENTS_LEAST:
        rest = OWN + PER_CLIENT * CLIENTS_LEAST
        most = max(0, available - rest)
        raise BadSetting(
            f"{in_flight:,} calls in flight need {in_flight + rest:,} descriptors, and this process may have "
            f"{available:,}: lower OPENAI_MAX_CONCURRENCY to {most:,} in all, or raise `ulimit -n`",
            "OPENAI_MAX_CONCURRENCY",
        )
    return left


class Gate:
    """Counts connections, closes those that keep the service waiting, and tells whether another may come in.

    `busy`: requests under way, by client.
    """

    def __init__(self, most: int, time_scale: float = 1.0) -> None:
        self.most = most
        self.scale = time_scale
        self.open: set[Connection] = set()
        self.busy: Counter[str] = Counter()

    def change(self, policies: Mapping[str, Policy]) -> None:
        """Adopt changed settings: more or fewer calls may be in flight."""
        self.most = places(policies.values(), descriptors())

    def began(self, host: str) -> bool:
        """Begin a client's request; return False if the client has too many under way."""
        self.busy[host] += 1
        return self.busy[host] <= CLIENT_RATIO * self.most

    def ended(self, host: str) -> None:
        """End a request."""
        self.busy[host] -= 1
        if not self.busy[host]:
            del self.busy[host]

    async def room(self) -> None:
        """Return when another connection may come in."""
        while len(self.open) >= self.most:
            now = asyncio.get_running_loop().time()
            oldest = min(self.open, key=lambda each: each.waits_since)
            if oldest.waits_since <= now - GRACE_S * self.scale:
                self.open.discard(oldest)
                oldest.transport.abort()
            else:
                await asyncio.sleep(0.02 * self.scale)

    def sweep(self) -> None:
        """Close connections that have kept the service waiting for too long."""
        now = asyncio.get_running_loop().time() / self.scale
        for each in [each for each in self.open if each.is_late(now)]:
            each.transport.abort()


async def too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a client that has too many requests under way."""
    text = "too many requests at once from one address: send fewer at a time"
    error = ApiError(503, NOT_READY, text, {"retryable": True}, {"Retry-After": "1"})
    await answer_of(error)(scope, receive, send)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with time limits.

    `waits_since`: when it began to wait for a request's head or was answered, inf = a request is under way.
    """

    def __init__(self, gate: Gate, **rest: Any) -> None:
        super().__init__(**rest)
        self.waits_since = float("inf")
        self._gate = gate
        self._app = self.app
        self._busy = ""  # the client whose request is under way
        self._heads = 0
        self._head_bytes = 0
        self._body_at = float("inf")
        self._read_at = float("inf")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits_since = self.loop.time()
        self._gate.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.open.discard(self)
        self._request_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        heads, is_body = self._heads, self._body_at < float("inf")
        if is_body:
            self._body_at = self.loop.time()
        super().data_received(data)
        if self._heads != heads or is_body:
            self._head_bytes = 0
            return
        # Still no head: a long one would be copied again with each piece of it.
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            log.warning("a client's request head is longer than %d bytes: closed", HEAD_BYTES)
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.waits_since = min(self.waits_since, self.loop.time())

    def on_headers_complete(self) -> None:
        self._heads += 1
        self.waits_since = float("inf")
        self._body_at = self.loop.time()
        self._request_over()  # pipelined: the one before it is over or waits
        self._busy = self.client[0] if self.client else "?"
        self.app = self._app if self._gate.began(self._busy) else too_many
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body_at = float("inf")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._request_over()
        if not self.pipeline:
            # Also where the answer came first, a refusal: no one waits for what is left of the body.
            self.waits_since = self.loop.time()

    def _request_over(self) -> None:
        if self._busy:
            self._gate.ended(self._busy)
            self._busy = ""

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_at = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read_at = float("inf")

    def is_late(self, now: float) -> bool:
        """Return whether it has kept the service waiting for too long. `now`: seconds of the machine's clock."""
        scale = self._gate.scale
        body_at = float("inf") if self.flow.read_paused else self._body_at
        return (
            now - self.waits_since / scale > HEAD_S
            or now - body_at / scale > BODY_S
            or now - self._read_at / scale > READ_S
        )


async def accept(listening: socket.socket, gate: Gate, connection: Any) -> None:
    """Accept connections while there is room for them, for ever. `connection`: creates a connection's protocol."""
    loop = asyncio.get_running_loop()
    listening.setblocking(False)
    while True:
        await gate.room()
        try:
            accepted, _ = await loop.sock_accept(listening)
            await loop.connect_accepted_socket(connection, accepted)
        except OSError as error:
            # No descriptor, no memory, or a client that left at once: the next one may succeed.
            log.warning("a connection was not taken: %s", error.strerror or error)
            await asyncio.sleep(0.05 * gate.scale)

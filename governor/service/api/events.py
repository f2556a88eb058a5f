"""Server-sent events: changes of state, sent to any number of listeners, in memory that does not grow.

No listener has a queue. The worker ticks twice a second; after each tick a listener compares the current state with the
one it sent last, and sends it if it differs. A slow listener skips states, and never has more than one to send. A
comment line goes out every 15 s, so that proxies keep a quiet stream open and a listener that has left is noticed.

Each event holds the whole state, so a client that reconnects needs nothing of what it missed. Only the end has an id: a
browser's EventSource reconnects when a stream ends, for ever, unless it is told that there is no more. A stream ends
when its token is removed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from governor.journal.database import JournalError
from governor.service.api.auth import Authority, Caller
from governor.service.store.store import ENDED, BatchRow, Store
from governor.service.worker.live import batch_json, live_json
from governor.service.worker.worker import Worker

_QUIET_S = 15.0
# The id of the last event of a batch.
END = "end"
# Listeners wake in so many groups, so far apart: hundreds at once would hold up all requests of that moment (figures in
# `quick`). The last group wakes before the next tick.
_GROUPS, APART_S = 8, 0.05


def event(name: str, content: Any) -> bytes:
    """Return one event."""
    last = f"id: {END}\n" if name == END else ""
    return f"event: {name}\n{last}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


class Events:
    """The streams of events; see the module. `close` ends all of them."""

    def __init__(self, worker: Worker, elsewhere: RemoteBatches, authority: Authority) -> None:
        self._worker = worker
        self._elsewhere = elsewhere
        self._authority = authority
        self._ticks = [asyncio.Event() for _ in range(_GROUPS)]
        self._joined = 0
        self._live: tuple[float, bytes] = (-1.0, b"")
        self._closed = False
        self._late: asyncio.TimerHandle | None = None
        self.listeners = 0
        worker.ticked.append(self._ticked)

    def _ticked(self) -> None:
        """Wake all listeners, group by group."""
        self._wake(0)
        if self.listeners:
            loop = asyncio.get_running_loop()
            for group in range(1, _GROUPS):
                loop.call_later(group * APART_S, self._wake, group)
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _wake(self, group: int) -> None:
        tick, self._ticks[group] = self._ticks[group], asyncio.Event()
        tick.set()

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for group in range(_GROUPS):
            self._wake(group)

    async def batch(self, batch_id: str, caller: Caller) -> AsyncIterator[bytes]:
        """Yield each state of a batch, `progress` until it is over and `end` then."""
        self.listeners += 1
        try:
            sent: BatchRow | None = None
            async for quiet in self._moments(caller):
                row = self._worker.batch(batch_id)
                if row is None:
                    try:
                        row = await self._elsewhere.batch(batch_id)
                    except JournalError:
                        continue  # the database is away for a moment: the last state stands
                if row is None:
                    return
                if row != sent:
                    sent = row
                    yield event(END if row.state in ENDED else "progress", batch_json(row))
                elif quiet:
                    yield quiet
                if row.state in ENDED:
                    return
        finally:
            self.listeners -= 1

    async def live(self, caller: Caller) -> AsyncIterator[bytes]:
        """Yield the live state, at each tick."""
        self.listeners += 1
        try:
            async for _ in self._moments(caller):
                yield self._live_bytes()
        finally:
            self.listeners -= 1

    async def _moments(self, caller: Caller) -> AsyncIterator[bytes]:
        """Yield now, then at each tick, now and then with a comment to send if there is nothing else."""
        yield b""
        self._joined += 1
        group, last = self._joined % _GROUPS, time.monotonic()
        while not self._closed:
            if self._late is None:
                # One timer for all: a worker between two lives does not tick.
                self._late = asyncio.get_running_loop().call_later(_QUIET_S, self._ticked)
            await self._ticks[group].wait()
            if self._closed or not await self._authority.still_knows(caller):
                return
            quiet = b""
            if time.monotonic() - last >= _QUIET_S:
                quiet, last = b": \n\n", time.monotonic()
            yield quiet

    def _live_bytes(self) -> bytes:
        now = time.monotonic()
        if now - self._live[0] >= 0.2:
            self._live = (now, event("live", live_json(self._worker, series=False)))
        return self._live[1]


# ---------------------------------------------------------------- batches of other replicas


# A batch's owner records its state twice a second.
AGE_S = 0.25
_KEPT = 1_000


class RemoteBatches:
    """Batches of other replicas; see the module. Used in the event loop only."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, tuple[float, asyncio.Future[BatchRow | None]]] = {}

    async def batch(self, batch_id: str) -> BatchRow | None:
        """Return the batch as stored, at most AGE_S ago: read once for all callers. May raise `JournalError`."""
        now = time.monotonic()
        known = self._read.get(batch_id)
        if known is None or now - known[0] >= AGE_S:
            if len(self._read) >= _KEPT:
                self._read.clear()
            reading = asyncio.ensure_future(asyncio.to_thread(self._store.batch, batch_id))
            known = self._read[batch_id] = (now, reading)
        try:
            # Shielded: a caller that goes away must not cancel the others' read.
            found = await asyncio.shield(known[1])
        except BaseException:
            if known[1].done():
                self._read.pop(batch_id, None)
            raise
        if found is None:
            self._read.pop(batch_id, None)  # it may be accepted the next moment
        return found

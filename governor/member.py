"""One process's membership of a shared pool: what it reports, what it hears, and its turns at deciding.

What lives here: the loop that tells the store what has happened and decides when it is this process's turn, the loop
that waits for news, entering a pool, and what to do when the store is away or has lost its memory. What must not: what
an event means (`quota`), jobs (`shared`), Redis itself (`store`).

Theory of operation. A turn appends what is new to the inbox and reads, in one script. Where anything stands in the
inbox, or the head may launch, or a lease has lapsed, this process decides and replaces the image; if somebody was
quicker it has that one's image in hand already, and is done if its own events are in it. News for others goes into
their lists; our own is heard at once. A turn comes when something was reported, when the head is ours and its moment
has come, and at least RENEW_RATIO of a lease after the last, which renews the lease and catches what a dead process
left undone.

Entering. A process that comes, or has missed anything (a connection broke, its lease lapsed), says all of itself in one
`Join`: what it holds and waits for, and the events and launches that the image may lack. News of before is void: an
entry has its own list.

Memory. An image names the server that holds it. After a restart or a failover it is missing or names another, and
whoever notices meets the others at the muster: each leaves its `Join` and the newest image that it knows. When all
owners of the newest of these have come, or after MUSTER_S, one of them rebuilds the pool and all go on. The newest
image among the living, and the launches that came after it, are everything that was decided unless its decider died.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack

from governor.errors import PacelineError
from governor.law import Params
from governor.quota import (
    CALL,
    HEAD,
    LEAVE,
    REPRICE,
    Call,
    Decided,
    Event,
    Image,
    Join,
    News,
    begun,
    decide,
    newest,
    rebuilt,
)
from governor.timeline import ServerClock, server_s
from governor.verify import Numbers, numbers_of

LEASE_S = 10.0
RENEW_RATIO = 0.25
MUSTER_S = 3.0
MUSTER_TICK_S = 0.1
# After a failure the next attempt comes so much later, doubling, at most.
AGAIN_S, AGAIN_MAX_S = 0.05, 1.0
# Events sent in one batch.
BATCH = 500


class StoreLostError(Exception):
    """The store cannot be reached, for the reason that the text says."""


@dataclass(frozen=True, slots=True)
class Server:
    """Who answers: an id that changes with each start of a server, and for how many seconds it has been up."""

    id: bytes
    up_s: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What the store held at one moment. `image`: empty = none. `leases`: until when, milliseconds since 1970."""

    server_us: int
    image: bytes
    inbox: list[bytes]
    leases: Mapping[str, int]


class Store(Protocol):
    """Keeps one pool for its owners. All methods raise StoreLostError where it is away, PacelineError for good."""

    @property
    def place(self) -> str:
        """Where it is, for people."""

    async def connect(self) -> Server:
        """Connects anew; who answers."""

    async def close(self) -> None:
        """Closes all connections."""

    async def tell(self, batch: bytes) -> Reading:
        """Appends the batch to the inbox if this server holds an image, renews the owner's lease, and reads."""

    async def replace(
        self, head: bytes, image: bytes, taken: int, news: Mapping[tuple[str, int], bytes], gone: Sequence[str]
    ) -> Reading | None:
        """Puts the image in the place of the one named by `head`, and tells the owners; else a reading: too late.

        `taken`: batches of the inbox that it has in it, -1 = all, whatever they are. `news`: by owner and entry.
        """

    async def muster(self, record: bytes) -> tuple[Reading, dict[str, bytes]]:
        """Leaves a record for whoever rebuilds the image; what all have left. None at all where that is done.

        Beside the owners' stands, under "", when the first came: milliseconds since 1970.
        """

    async def news(self, entry: int) -> list[bytes]:
        """Waits for news of this entry, for a while; what came, oldest first."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a process says of itself when it enters: permits, open finalize passes, what waits, and what it launched.

    `launches`, `used`, `before`: see `Join`.
    """

    holds: int
    finalizes: int
    wants: list[Event]
    launches: list[tuple[int, int, float, int, float, float]]
    used: float
    before: tuple[float, ...]


class Host(Protocol):
    """Whose membership it is. All methods are quick; none raises."""

    records: bool

    def standing(self, known: Image | None) -> Standing:
        """What it holds and wants, now. `known`: the newest image that it has."""

    def heard(self, image: Image, news: News | None = None) -> None:
        """The pool as it is now, and what this process has just decided for itself."""

    def news(self, news: News) -> None:
        """What another process decided for it."""

    def decided(self, params: Params, before: Numbers, image: Image, calls: list[Call]) -> None:
        """This process has decided: under which settings, on which state, by which calls, with which outcome.

        Only if it `records`.
        """

    def missed(self, why: str) -> None:
        """The store cannot be reached: nothing is launched."""

    def back(self) -> None:
        """The store is back."""

    def failed(self, error: PacelineError) -> None:
        """For good."""


class _EnterError(Exception):
    """The image does not have us in it (any more), or nobody has it."""


class Member:
    """A membership. Make it, `start()` it inside a running event loop, `aclose()` it in the end."""

    def __init__(
        self,
        host: Host,
        store: Callable[[str], Store],
        params: Params,
        *,
        clock: ServerClock,
        lease_s: float = LEASE_S,
    ) -> None:
        self.owner = os.urandom(6).hex()
        self.clock = clock
        self.image: Image | None = None
        self.is_in = False
        self._host = host
        self._store = store(self.owner)
        self._lease_s = lease_s
        self._known = b""  # the newest image that was in the store, as far as we know
        self._params: tuple[float, ...] | None = packed_params(params)  # to be stated at the next entry
        self._lineage = int.from_bytes(os.urandom(7))
        self._loop = asyncio.get_running_loop()
        self._entry = 0
        self._server_id = b""
        self._number = 0  # of the newest event
        self._unheard: deque[tuple[int, Event]] = deque()  # events that may not be in an image yet, numbered
        self._sent = 0
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_away = False
        self._leaving = False

    def start(self) -> None:
        """Connects, enters the pool and stays until `aclose`."""
        self._task = self._loop.create_task(self._stay())

    def post(self, event: Event) -> None:
        """Something has happened; it is told soon, together with what else happens now."""
        self._number += 1
        self._unheard.append((self._number, event))
        self._due.set()

    def look(self) -> None:
        """It may be time for a decision."""
        self._due.set()

    def reprice(self, params: Params) -> None:
        """Other settings for the whole pool."""
        self._params = packed_params(params)
        self.post([REPRICE, list(self._params)])

    @property
    def reprices(self) -> bool:
        """Whether settings of ours are on their way."""
        return not self.is_in or any(event[0] == REPRICE for _, event in self._unheard)

    async def aclose(self) -> None:
        """Leaves the pool, where it can be reached, and closes all connections."""
        if self._task is None:
            return
        task, self._task = self._task, None
        self._leaving = True
        if self.is_in:
            self.post([LEAVE])
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), 2.0 * self.clock.scale)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self._store.close()

    # ------------------------------------------------------------ staying

    async def _stay(self) -> None:
        again_s = AGAIN_S
        server: Server | None = None
        while True:
            try:
                if server is None:
                    server = await self._store.connect()
                await self._enter(server)
                again_s = AGAIN_S
                await self._both()
                return
            except _EnterError:
                self.is_in = False
            except StoreLostError as error:
                self.is_in, server = False, None
                if not self._is_away:
                    self._is_away = True
                    self._host.missed(f"{self._store.place} cannot be reached ({error})")
                await asyncio.sleep(again_s * self.clock.scale)
                again_s = min(2.0 * again_s, AGAIN_MAX_S)
            except PacelineError as error:
                self._host.failed(error)
                return
            except ValueError as error:
                self._host.failed(PacelineError(f"{self._store.place}: {error}"))
                return

    async def _both(self) -> None:
        """Takes turns and waits for news, until one of both cannot go on, or we have left."""
        turns = self._loop.create_task(self._turns())
        listens = self._loop.create_task(self._listens(self._entry))
        try:
            done, _ = await asyncio.wait({turns, listens}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (turns, listens):
                task.cancel()
            await asyncio.gather(turns, listens, return_exceptions=True)

    async def _listens(self, entry: int) -> None:
        while True:
            for each in await self._store.news(entry):
                self._host.news(News.decoded(each))

    async def _turns(self) -> None:
        pause_s = RENEW_RATIO * self._lease_s * self.clock.scale
        while True:
            if not self._due.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._due.wait()
            self._due.clear()
            await self._turn()
            if self._leaving and not self._unheard:
                return

    # ------------------------------------------------------------ a turn

    async def _turn(self, join: Join | None = None) -> None:
        """Tells what is new, and decides if that is ours to do. `join`: in place of all events."""
        if join is not None:
            batch = [self.owner, join.last, [join.packed()]]
        else:
            fresh = [event for event in self._unheard if event[0] > self._sent][:BATCH]
            batch = [self.owner, fresh[0][0], [event for _, event in fresh]] if fresh else []
            if fresh:
                self._sent = fresh[-1][0]
                if self._sent < self._number:
                    self._due.set()
        asked_at = self._loop.time()
        reading = await self._store.tell(msgpack.packb(batch) if batch else b"")
        while True:
            now = self.clock.heard(reading.server_us, asked_at, self._loop.time())
            leases = self._leases(reading)
            image = self._image_of(reading)
            is_ours = self._takes_over(image, reading.image)
            if join is None and not is_ours:
                raise _EnterError
            if is_ours and not reading.inbox and not image.is_due(now) and not image.lapsed(leases, now):
                self._host.heard(image)
                return
            head, params = image.head, image.p
            before = numbers_of((image.s,)) if self._host.records else ()
            batches = [tuple(msgpack.unpackb(each)) for each in reading.inbox]
            self.image = None  # what is being decided is nobody's image yet
            decided = decide(image, batches, leases, now, self._lease_s * self.clock.scale)
            asked_at = self._loop.time()
            late = await self._replace(head, image, len(reading.inbox), decided, params, before)
            if late is None:
                return
            reading = late

    async def _replace(
        self, head: bytes, image: Image, taken: int, decided: Decided, params: Params, before: Numbers
    ) -> Reading | None:
        """Puts a decision into the store; None = done and heard of, else what was there instead."""
        others = {
            (name, image.owners[name].joined): each.encoded()
            for name, each in decided.news.items()
            if name != self.owner and name in image.owners
        }
        data = image.encoded()
        late = await self._store.replace(head, data, taken, others, decided.gone)
        if late is None:
            self._takes_over(image, data)
            if self._host.records:
                self._host.decided(params, before, image, decided.calls)
            self._host.heard(image, decided.news.get(self.owner))
        return late

    def _image_of(self, reading: Reading) -> Image:
        if not reading.image:
            raise _EnterError
        image = Image.decoded(reading.image)
        if image.server != self._server_id:
            raise _EnterError
        return image

    def _leases(self, reading: Reading) -> dict[str, float]:
        return {name: server_s(until * 1000, self.clock.scale) for name, until in reading.leases.items()}

    def _takes_over(self, image: Image, data: bytes) -> bool:
        """Keeps an image, and forgets the events that are in it; whether it has us in it, as of our latest entry."""
        own = image.owners.get(self.owner)
        if own is None or own.gone_at >= 0.0 or own.joined != self._entry:
            if self._leaving and own is None:
                self._unheard.clear()
                self.image, self._known = image, data
                return True
            return False
        self.image, self._known = image, data
        while self._unheard and self._unheard[0][0] <= own.last:
            self._unheard.popleft()
        return True

    # ------------------------------------------------------------ entering

    async def _enter(self, server: Server) -> None:
        """Enters the pool, which is rebuilt before if it has lost its memory."""
        self._server_id = server.id
        for _ in range(100):
            reading = await self._store.tell(b"")
            if not reading.image or Image.decoded(reading.image).server != server.id:
                await self._muster(server, reading.image)
                reading = await self._store.tell(b"")
            try:
                if not self._takes_over(self._image_of(reading), reading.image):
                    await self._turn(self._join())
            except _EnterError:
                continue  # lost again in this moment
            own = self.image.owners.get(self.owner) if self.image is not None else None
            if own is not None and own.joined == self._entry:
                self._entered()
                return
        raise StoreLostError("it changes faster than anybody can enter")

    def _join(self) -> Join:
        """All that is to be said of this process, as its next entry."""
        self._entry += 1
        self._sent = self._number
        known = Image.decoded(self._known) if self._known else None
        standing = self._host.standing(known)
        return Join(
            number=self._entry,
            last=self._number,
            params=self._params,
            holds=standing.holds,
            finalizes=standing.finalizes,
            calls=[(number, event) for number, event in self._unheard if event[0] == CALL],
            wants=standing.wants,
            launches=standing.launches,
            lineage=known.lineage if known is not None else self._lineage,
            used=standing.used,
            before=standing.before,
        )

    def _entered(self) -> None:
        self.is_in = True
        if not self.reprices:
            self._params = None
        if self._is_away:
            self._is_away = False
            self._host.back()
        self._due.set()

    async def _muster(self, server: Server, stale: bytes) -> None:
        """Meets the others, and sees to it that the pool is rebuilt."""
        join = self._join()
        record = msgpack.packb([join.packed(), self._known])
        while True:
            asked_at = self._loop.time()
            reading, records = await self._store.muster(record)
            now = self.clock.heard(reading.server_us, asked_at, self._loop.time())
            if not records:
                return
            began_ms = int(records.pop(""))
            entries = {name: _record(each) for name, each in records.items()}
            images = [image for _, image in entries.values() if image is not None]
            if stale:
                images.append(Image.decoded(stale))
            waited_s = (reading.server_us / 1000 - began_ms) / 1000
            if _complete(images, entries) or waited_s >= MUSTER_S or (not images and server.up_s >= MUSTER_S):
                joins = {name: entry for name, (entry, _) in entries.items()}
                await self._rebuild(joins, images, reading, now)
                return
            await asyncio.sleep(MUSTER_TICK_S * self.clock.scale)

    async def _rebuild(self, joins: dict[str, Join], images: list[Image], reading: Reading, now: float) -> None:
        """Makes the pool again, unless somebody is quicker."""
        best = newest(images) or begun(joins, now)
        params, before = best.p, numbers_of((best.s,))
        image, decided = rebuilt(joins, best, self._server_id, now, self._lease_s * self.clock.scale)
        await self._replace(reading.image[: HEAD.size], image, -1, decided, params, before)


def packed_params(params: Params) -> tuple[float, ...]:
    """Settings as numbers."""
    return numbers_of((params,))


def _record(data: bytes) -> tuple[Join, Image | None]:
    packed, image = msgpack.unpackb(data)
    return Join(*packed[1:]), Image.decoded(image) if image else None


def _complete(images: list[Image], entries: dict[str, Any]) -> bool:
    """Whether all owners of the newest image have come."""
    best = newest(images)
    return best is not None and all(name in entries for name, owner in best.owners.items() if owner.gone_at < 0.0)

"""One process's membership of a shared pool: its reports, its news, and its turns at deciding.

Theory of operation. A turn appends new events to the inbox and reads, in one script. If the inbox holds anything, or
the head may launch, or a lease has lapsed, this process decides and replaces the image. If another process was quicker,
this one already has that image from the failed attempt, and is done if it contains its own events. News for others goes
into their lists; a process's own news is applied at once. A turn comes when something was reported, when this process
has the head and its moment has come, and at least RENEW_RATIO of a lease after the last turn, which renews the lease
and completes what a dead process left undone.

Entering. A process that enters, or has missed anything, states everything about itself in one `Join`: what it holds and
waits for, and the events and launches that the image may lack. Earlier news is void: each entry has its own list. After
every loss of a connection a process enters anew, even within its lease: an event may have been sent without arriving,
and a grant may have been taken from the list without reaching this process. Two more checks detect losses without a
lost connection: events that were sent must be in the image or the inbox, and the image's count of news must be reached
within a pause.

Memory. An image is valid if it names the server that holds it, can be read, has the lease of each owner beside it, and
is not older than one that this process had heard of before it asked. Otherwise the pool is rebuilt: see `recovery`.

Failures. Once the pool was entered, any failure of the store means "away": it is reported and retried, at the
configured address. An error that must be in the configuration (a password) ends the run, and so does an internal error
that keeps recurring.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import msgpack

from governor.law import Params
from governor.model.errors import PacelineError
from governor.model.lawcalls import Numbers, numbers_of
from governor.sharedquota.image import (
    CALL,
    FORMAT,
    HEAD,
    HERE,
    LEAVE,
    REPRICE,
    SERVER_BYTES,
    Batch,
    Event,
    Image,
    Join,
    OwnerNews,
    UnreadableImageError,
    newest,
)
from governor.sharedquota.interfaces import (
    LEASE_S,
    Host,
    QuotaStore,
    Server,
    ServerClock,
    StoreLostError,
    StoreReading,
    server_s,
)
from governor.sharedquota.quota import DecisionResult, begun, decide, rebuilt
from governor.sharedquota.recovery import GATHER_S, Recovery

RENEW_RATIO = 0.25
RECOVERY_TICK_S, AGAIN_RECOVERY_S = 0.1, 0.02
# The pause after a failure, which doubles, and its maximum.
_AGAIN_S, AGAIN_MAX_S = 0.05, 0.5
_BATCH = 500  # events sent in one batch
# This many unexpected errors in a row are handled by entering anew.
FAULTS = 5


class _EnterError(Exception):
    """This process must enter anew: the image lacks it or is invalid, or it has missed something."""


async def ended(*tasks: asyncio.Task[None], every_s: float) -> None:
    """Cancel tasks until all are done: a client in the middle of a handshake may swallow a cancellation."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=every_s)


class Member:
    """A membership. Create it, `start()` it inside a running event loop, `aclose()` it at the end."""

    def __init__(
        self,
        host: Host,
        store: Callable[[str], QuotaStore],
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
        self._known = b""  # the newest image known to have been in the store
        self._params: tuple[float, ...] | None = packed_params(params)  # to be stated at the next entry
        self._lineage = int.from_bytes(os.urandom(7))
        self._loop = asyncio.get_running_loop()
        self._entry = 0
        self._server_id = b""
        self._newest = (0, 0)  # the age of the newest image that this process has heard of
        self._suspect = b""  # the head of an image on which a decision failed
        self._told = 0  # news heard since the latest entry
        self._owed: tuple[int, float] | None = None  # the image's count of news, if news is missing, and since when
        self._number = 0  # of the newest event
        self._unheard: deque[tuple[int, Event]] = deque()  # events that may not be in an image yet, numbered
        self._sent = 0
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._working: list[asyncio.Task[None]] = []
        self._was_in = False
        self._recovery_at = -inf, -inf  # when this process first and last took part in the present recovery
        self._faults = 0
        self._whys: set[str] = set()  # why the store is away; each reason is reported once
        self._leaving = False

    def start(self) -> None:
        """Connect, enter the pool and stay until `aclose`."""
        self._task = self._loop.create_task(self._stay())
        self._task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        """Report an internal error: it must not leave a run waiting for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._host.broke(PacelineError(f"{self._store.place}: internal error in the shared pool: {error!r}"))

    def post(self, event: Event) -> None:
        """Queue an event; it is sent soon, together with others that happen now."""
        self._number += 1
        self._unheard.append((self._number, event))
        self._due.set()

    def look(self) -> None:
        """Take a turn soon: it may be time for a decision."""
        self._due.set()

    def reprice(self, params: Params) -> None:
        """Change the settings for the whole pool."""
        self._params = packed_params(params)
        self.post([REPRICE, list(self._params)])

    @property
    def reprices(self) -> bool:
        """Return whether settings of this process are on their way to the pool."""
        return not self.is_in or self._has_reprice()

    def _has_reprice(self) -> bool:
        return any(event[0] == REPRICE for _, event in self._unheard)

    async def aclose(self) -> None:
        """Leave the pool, if it can be reached, and close all connections."""
        if self._task is None:
            return
        task, self._task = self._task, None
        self._leaving = True
        if self.is_in:
            self.post([LEAVE])
            await asyncio.wait({task}, timeout=2.0 * self.clock.scale)
        every_s = RECOVERY_TICK_S * self.clock.scale
        await ended(task, every_s=every_s)
        await ended(*self._working, every_s=every_s)
        await self._store.close()

    # ------------------------------------------------------------ the life of a membership

    async def _stay(self) -> None:
        again_s = _AGAIN_S
        server: Server | None = None
        while True:
            try:
                if server is None:
                    server = await self._store.connect()
                await self._enter(server)
                again_s = _AGAIN_S
                await self._both()
                return
            except _EnterError:
                # A client whose wait for news was cancelled has closed its connection, so connect anew.
                self.is_in, server = False, None
            except Exception as error:
                self.is_in, server = False, None
                if not self._survives(error):
                    return
                await asyncio.sleep(again_s * self.clock.scale)
                again_s = min(2.0 * again_s, AGAIN_MAX_S)

    def _survives(self, error: Exception) -> bool:
        """Report an error and return whether to try again; else the host has failed."""
        place = self._store.place
        if isinstance(error, StoreLostError):
            self._away(f"{place} cannot be reached ({error})")
        elif isinstance(error, PacelineError) and self._was_in:
            self._away(str(error))
        elif isinstance(error, PacelineError):
            self._host.broke(error)
            return False
        else:
            self._faults += 1
            if self._faults > FAULTS:
                text = f"{place}: internal error in the shared pool, {self._faults} times in a row: {error!r}"
                self._host.broke(PacelineError(text))
                return False
            self._away(f"{place}: what it holds cannot be used ({error!r})")
        return True

    def _away(self, why: str) -> None:
        if why not in self._whys and self._host.missed(why):
            self._whys.add(why)

    async def _both(self) -> None:
        """Take turns and wait for news, until one of the two fails or this process has left."""
        turns = self._loop.create_task(self._turns())
        listens = self._loop.create_task(self._listens(self._entry))
        self._working = [turns, listens]
        try:
            await asyncio.wait(self._working, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # News that was fetched must be applied before this process enters again and states what it holds.
            await ended(turns, listens, every_s=RECOVERY_TICK_S * self.clock.scale)
        errors = [task.exception() for task in (turns, listens) if not task.cancelled()]
        for error in errors:
            if error is not None:
                raise error
        if not self._leaving:
            raise StoreLostError("its connection has ended")

    async def _listens(self, entry: int) -> None:
        while True:
            for each in await self._store.news(entry):
                try:
                    news = OwnerNews.decoded(each)
                except (TypeError, ValueError):
                    self._due.set()  # the empty bell, which means that the image is gone; or foreign data
                else:
                    self._hear(news)

    def _hear(self, news: OwnerNews) -> None:
        self._told += 1
        self._newest = max(self._newest, (news.incarnation, news.version))
        self._host.news(news)

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

    # ------------------------------------------------------------ turns

    async def _turn(self, join: Join | None = None) -> None:
        """Send new events, and decide if this process has to. `join`: sent in place of all events."""
        if join is not None:
            batch = [self.owner, join.last, [join.packed()]]
        else:
            fresh = [event for event in self._unheard if event[0] > self._sent][:_BATCH]
            batch = [self.owner, fresh[0][0], [event for _, event in fresh]] if fresh else []
            if fresh:
                self._sent = fresh[-1][0]
                if self._sent < self._number:
                    self._due.set()
        known, asked_at = self._newest, self._loop.time()
        reading = await self._store.tell(msgpack.packb(batch) if batch else b"")
        while True:
            now = self.clock.heard(reading.server_us, asked_at, self._loop.time())
            leases = self._leases(reading)
            image = self._image_of(reading, known)
            if image is None:
                raise _EnterError
            try:
                batches = [each for each in map(_batch, reading.inbox) if each is not None]
                is_ours = self._takes_over(image, reading.image)
                if join is None and not (is_ours and self._has_missed_nothing(image, batches)):
                    raise _EnterError
                if is_ours and not reading.inbox and not image.is_due(now) and not image.lapsed(leases, now):
                    self._host.heard(image)
                    self._faults = 0
                    return
                head, params = image.head, image.p
                before = numbers_of((image.s,)) if self._host.records else ()
                self.image = None  # an image that is being decided on is not valid yet
                decided = decide(image, batches, leases, now, self._lease_s * self.clock.scale)
            except _EnterError:
                raise
            except Exception:
                self._suspect = reading.image[: HEAD.size]
                raise
            known, asked_at = self._newest, self._loop.time()
            late = await self._replace(head, image, len(reading.inbox), decided, params, before)
            if late is None:
                self._faults = 0
                return
            reading = late

    def _has_missed_nothing(self, image: Image, batches: Sequence[Any]) -> bool:
        """Return whether all sent events and all news have arrived, except those that may still be on their way."""
        own = image.owners.get(self.owner)
        if own is None:
            return True  # this process has left
        arrived = max((first + len(events) - 1 for name, first, events in batches if name == self.owner), default=0)
        if max(arrived, own.last) < self._sent:
            return False
        now = self._loop.time()
        if own.told <= self._told or (self._owed is not None and self._told >= self._owed[0]):
            self._owed = None
        if own.told > self._told and self._owed is None:
            self._owed = own.told, now
        return self._owed is None or now < self._owed[1] + RENEW_RATIO * self._lease_s * self.clock.scale

    async def _replace(
        self, head: bytes, image: Image, taken: int, decided: DecisionResult, params: Params, before: Numbers
    ) -> StoreReading | None:
        """Put a decision into the store; return None when it is done and applied, else what the store held instead."""
        others = {
            (name, image.owners[name].joined): each.encoded()
            for name, each in decided.news.items()
            if name != self.owner and name in image.owners
        }
        data = image.encoded()
        late = await self._store.replace(head, data, taken, others)
        if late is None:
            self._told += self.owner in decided.news
            self._takes_over(image, data)
            if self._host.records:
                self._host.decided(params, before, image, decided.calls)
            self._host.heard(image, decided.news.get(self.owner))
        return late

    def _image_of(self, reading: StoreReading, known: tuple[int, int]) -> Image | None:
        """Return the image if it is valid. `known`: the newest that this process had heard of before it asked."""
        if self._is_elsewhere(reading) or reading.image[: HEAD.size] == self._suspect:
            return None
        with contextlib.suppress(UnreadableImageError):
            image = Image.decoded(reading.image)
            if image.age >= known and all(name in reading.leases for name in image.living()):
                return image
        return None

    def _is_elsewhere(self, reading: StoreReading) -> bool:
        """Return whether there is no image, or only one of another server or an earlier start of this one."""
        return reading.image[:SERVER_BYTES].rstrip(b"\0") != self._server_id

    def _leases(self, reading: StoreReading) -> dict[str, float]:
        return {name: server_s(until * 1000, self.clock.scale) for name, until in reading.leases.items()}

    def _takes_over(self, image: Image, data: bytes) -> bool:
        """Keep an image and forget the events in it; return whether it has this process as of its latest entry."""
        own = image.owners.get(self.owner)
        if own is None or own.gone_at >= 0.0 or own.joined != self._entry:
            if self._leaving and own is None:
                self._unheard.clear()
                self._keep(image, data)
                return True
            return False
        self._keep(image, data)
        while self._unheard and self._unheard[0][0] <= own.last:
            self._unheard.popleft()
        if not self._has_reprice():
            self._params = None  # the pool has adopted them, or another process has changed them since
        return True

    def _keep(self, image: Image, data: bytes) -> None:
        self.image, self._known = image, data
        self._newest = max(self._newest, image.age)

    # ------------------------------------------------------------ entry

    async def _enter(self, server: Server) -> None:
        """Enter the pool, which is rebuilt first if it has lost its memory."""
        self._server_id = server.id
        entry = self._entry
        for _ in range(100):
            known = self._newest
            reading = await self._store.tell(b"")
            image = self._image_of(reading, known)
            try:
                if image is None:
                    await self._recovery(server, reading)
                # Only a present entry counts: what an earlier connection sent and fetched may be lost.
                elif entry == self._entry or not self._takes_over(image, reading.image):
                    await self._turn(self._join())
            except _EnterError:
                continue  # the image was lost again at this moment
            own = self.image.owners.get(self.owner) if self.image is not None else None
            if own is not None and own.joined == self._entry > entry:
                self._entered(own.silent)
                return
        raise StoreLostError("it changes faster than a process can join")

    def _join(self) -> Join:
        """Return everything to be stated about this process, as its next entry."""
        self._entry += 1
        self._sent = self._number
        self._told, self._owed, self.image = 0, None, None
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
            seen=self._newest[0],
        )

    def _entered(self, silent: bool) -> None:
        self.is_in = self._was_in = True
        if silent:
            self.post([HERE])
        if self._leaving:
            self.post([LEAVE])
        if self._whys:
            self._whys.clear()
            self._host.back()
        self._due.set()

    async def _recovery(self, server: Server, reading: StoreReading) -> None:
        """Meet the other processes and see that the pool is rebuilt. `reading`: has the invalid image, if any."""
        doubted, stale, is_foreign = reading.image[: HEAD.size], None, False
        if reading.image:
            try:
                stale = Image.decoded(reading.image)
            except UnreadableImageError as error:
                is_foreign = error.is_foreign
        known = newest([*([stale] if stale else []), *([Image.decoded(self._known)] if self._known else [])])
        if self._was_in:
            self._away(f"{self._store.place} has lost the state of this pool, which is put together again")
        record = msgpack.packb([FORMAT, self._join().packed(), known.encoded() if known is not None else b""])
        here_at = self._loop.time()
        began_at, last_at = self._recovery_at
        # A recovery continues after a lost connection: it must end however often that happens.
        if last_at < here_at - GATHER_S * self.clock.scale:
            began_at = here_at
        recovery = Recovery(
            self.owner, doubted, server.up_s, began_at, here_at, self.clock.scale, is_foreign=is_foreign
        )
        while True:
            asked_at = self._loop.time()
            self._recovery_at = began_at, asked_at
            reading, records = await self._store.recovery(record, doubted, removes=not is_foreign)
            now = self.clock.heard(reading.server_us, asked_at, self._loop.time())
            if not records:
                break  # another process has rebuilt the pool
            if recovery.may_rebuild(records, self._leases(reading), reading.server_us, now, asked_at):
                best = newest(recovery.images) or begun(recovery.joins, now)
                params, before = best.p, numbers_of((best.s,))
                image, decided = rebuilt(
                    recovery.joins,
                    best,
                    self._server_id,
                    now,
                    self._lease_s * self.clock.scale,
                    by=self.owner,
                    chance=int.from_bytes(os.urandom(4)),
                    absent=recovery.absent,
                )
                await self._replace(reading.image[: HEAD.size], image, -1, decided, params, before)
                break
            # If records were lost, all leave theirs again, and must meet before they are lost once more.
            await asyncio.sleep((RECOVERY_TICK_S if recovery.are_all_here else AGAIN_RECOVERY_S) * self.clock.scale)
        self._recovery_at = -inf, -inf


def packed_params(params: Params) -> tuple[float, ...]:
    """Return settings as numbers."""
    return numbers_of((params,))


def _batch(data: bytes) -> Batch | None:
    """Return a batch of the inbox; None if it was not written by a process of this pool."""
    try:
        name, first, events = msgpack.unpackb(data)
        return (name, int(first), events) if isinstance(name, str) and isinstance(events, list) else None
    except (TypeError, ValueError):
        return None

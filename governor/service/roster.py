"""The batches that this replica owns: fed to their pools, held, resumed, cancelled, counted, finished.

What lives here: `Running`, one batch as it stands in memory, and `Roster`, all of them. What must not: leases and lives
(`worker`), which line is next (`feed`), pacing (the law).

A batch that is held has nothing in a queue: its cursors are closed, what waits is withdrawn, what is in flight ends,
and what would back off or be finalized is withdrawn when it comes back. To go on, it is read again from the records,
once they hold all that has happened.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from governor.driver import Begun, Work
from governor.intake import work_of
from governor.policy import Policy
from governor.records import Pending
from governor.requests import Attempt
from governor.service.feed import Cursor
from governor.service.lane import THROTTLES, Lane
from governor.service.ledger import FencedWriter, Ledger
from governor.service.store import (
    CANCEL,
    CANCELLED,
    CANCELLING,
    COMPLETED,
    PAUSE,
    PAUSED,
    QUEUED,
    RUN,
    RUNNING,
    STOPPED,
    BatchRow,
    Store,
)
from governor.service.tables import BATCH_BITS

log = logging.getLogger("paceline.service")


@dataclass(slots=True)
class Running:
    """One batch that this replica owns. `flying`: the numbers of its requests that are in flight."""

    row: BatchRow
    state: str
    done: int
    failed: int
    attempts: int
    throttled: int
    resent: int
    left_tokens: float
    reason: str = ""
    flying: set[int] = field(default_factory=set)
    changed: bool = True
    eta_s: float = -1.0
    busy: bool = False

    @property
    def number(self) -> int:
        return self.row.number

    @property
    def left(self) -> int:
        """Requests that have not ended."""
        return self.row.requests - self.done - self.failed

    def now(self) -> BatchRow:
        """The batch as it stands, in the shape in which it is stored."""
        return replace(
            self.row,
            state=self.state,
            reason=self.reason,
            done=self.done,
            failed=self.failed,
            in_flight=len(self.flying),
            attempts=self.attempts,
            throttled=self.throttled,
            resent=self.resent,
            eta_s=self.eta_s,
        )


class Roster:
    """See the module. Lives as long as one life of the worker; all of it in the event loop.

    `spawn`: makes a task whose failure ends that life. `since_s`: now, on the clock of the governors. `over`: called
    when a batch has come to its end.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        replica: int,
        writer: FencedWriter,
        lanes: Mapping[str, Lane],
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        since_s: Callable[[], float],
        over: Callable[[], None],
    ) -> None:
        self.running: dict[int, Running] = {}
        self.by_id: dict[str, int] = {}
        self._store = store
        self._ledger = ledger
        self._replica = replica
        self._writer = writer
        self._lanes = lanes
        self._spawn = spawn
        self._since_s = since_s
        self._over = over

    @property
    def flies(self) -> bool:
        """Whether anything is in flight."""
        return any(batch.flying for batch in self.running.values())

    def batch(self, batch_id: str) -> BatchRow | None:
        """A batch as it stands; None where it is not here."""
        number = self.by_id.get(batch_id)
        return None if number is None else self.running[number].now()

    # ------------------------------------------------------------ batches come

    async def adopt(self, row: BatchRow, *, fresh: bool = False) -> None:
        """A batch of this replica's begins, or goes on. One of an earlier life is claimed anew instead."""
        if row.owner != self._replica or row.number in self.running:
            return
        done = failed = resent = 0
        if not fresh:
            counts = await asyncio.to_thread(self._ledger.records(row.number).counts)
            done, failed, resent = counts.done, counts.failed, counts.resent
            if row.owner != self._replica or row.number in self.running:
                return  # this life ended meanwhile
        batch = Running(
            row,
            state=row.state,
            done=done,
            failed=failed,
            attempts=row.attempts,
            throttled=row.throttled,
            resent=max(row.resent, resent),
            left_tokens=float(row.details.get("tokens", 0.0)) * (1.0 - (done + failed) / max(1, row.requests)),
            reason=row.reason,
        )
        self.running[row.number] = batch
        self.by_id[row.batch_id] = row.number
        if row.wanted == CANCEL:
            await self.obey(batch, CANCEL)
        elif row.wanted == PAUSE or row.state in (PAUSED, STOPPED):
            batch.state = STOPPED if row.state == STOPPED and row.wanted == RUN else PAUSED
        elif batch.left <= 0:
            self._spawn(self._finish(batch))
        else:
            self._feed(batch)

    def _feed(self, batch: Running) -> None:
        """Its pending requests join the feeds of their pools."""
        batch.state = RUNNING if batch.attempts else QUEUED
        batch.reason = ""
        batch.changed = True
        for name in batch.row.details.get("pools", list(self._lanes)):
            lane = self._lanes.get(name)
            if lane is None:
                log.error("batch %s: there is no pool %s any more", batch.row.batch_id, name)
                batch.state, batch.reason = STOPPED, f"there is no pool {name}: start the service with it again"
                continue
            if lane.blocked:
                lane.open()
            policy = batch_policy(lane.policy, batch.row)
            lane.feed.add(
                Cursor(
                    batch.number,
                    self._ledger.records(batch.number),
                    name,
                    longest_first=policy.launch_order == "longest_first",
                    work_of=self._work_of(lane, batch.row),
                    begun=lane.governor.mark(),
                )
            )

    def _work_of(self, lane: Lane, row: BatchRow) -> Callable[[Pending, Begun], Work]:
        def made(pending: Pending, begun: Begun) -> Work:
            work = work_of(pending.work.request, batch_policy(lane.policy, row), before=pending.work)
            return replace(work, finalizes=bool(row.finalize), begun=begun)

        return made

    def cap_of(self, number: int) -> int:
        batch = self.running[number]
        name = next(iter(batch.row.details.get("pools", self._lanes)))
        return batch_policy(self._lanes[name].policy, batch.row).finalize_max_tokens

    # ------------------------------------------------------------ what is asked of a batch

    async def obey(self, batch: Running, wanted: str) -> None:
        if batch.busy or batch.state in (CANCELLED, COMPLETED):
            return
        held = batch.state in (PAUSED, STOPPED)
        if wanted == CANCEL:
            batch.state, batch.changed = CANCELLING, True
            await self._withdraw(batch)
            self._end_if_over(batch)
        elif wanted == PAUSE and batch.state in (QUEUED, RUNNING):
            batch.state, batch.changed = PAUSED, True
            await self._withdraw(batch)
        elif wanted == RUN and held and not batch.busy:
            batch.busy = True
            try:
                # What was withdrawn is read again from the records: first they must hold all that has happened.
                await self._writer.flushed()
                await asyncio.to_thread(self._ledger.put_back, batch.number, tuple(batch.flying))
            finally:
                batch.busy = False
            if batch.left - len(batch.flying) > 0:
                self._feed(batch)
            else:
                batch.state, batch.changed = RUNNING, True
                self._end_if_over(batch)

    async def _withdraw(self, batch: Running) -> None:
        """Launches none of its lines any more; those in flight go on."""
        cursors = [cursor for lane in self._lanes.values() if (cursor := lane.feed.remove(batch.number)) is not None]
        self._withdraw_waiting(batch)
        for cursor in cursors:
            await cursor.close()

    def _withdraw_waiting(self, batch: Running) -> None:
        number = batch.number
        for lane in self._lanes.values():
            lane.governor.withdraw(lambda request: request.index >> BATCH_BITS == number)

    def on_blocked(self, pool: str, why: str) -> None:
        """The account refuses: the pool's batches stop where they stand."""
        if why == "SHUTDOWN":
            return
        log.error("pool %s: stopped (%s); resume a batch when that is mended", pool, why)
        for batch in self.running.values():
            if batch.state in (QUEUED, RUNNING) and pool in batch.row.details.get("pools", ()):
                batch.state, batch.reason, batch.changed = STOPPED, why, True
                self._spawn(self._withdraw(batch))

    # ------------------------------------------------------------ what the lanes tell

    def on_launched(self, number: int, index: int) -> None:
        """A request of that batch is about to be sent."""
        batch = self.running[number]
        batch.flying.add(index)
        batch.attempts += 1
        batch.changed = True
        if batch.state == QUEUED:
            batch.state = RUNNING

    def on_attempted(self, number: int, attempt: Attempt) -> None:
        """An attempt is over."""
        batch = self.running[number]
        batch.flying.discard(attempt.request)
        batch.throttled += attempt.outcome in THROTTLES
        batch.changed = True
        if batch.state in (PAUSED, CANCELLING, STOPPED):
            # It may back off, or have a finalize pass before it: neither may be launched.
            asyncio.get_running_loop().call_soon(self._after_hold, batch)

    def _after_hold(self, batch: Running) -> None:
        if batch.state in (PAUSED, CANCELLING, STOPPED) and batch.number in self.running:
            self._withdraw_waiting(batch)
            self._end_if_over(batch)

    def on_ended(self, number: int, failure: str) -> None:
        """A request is over."""
        batch = self.running[number]
        batch.left_tokens *= 1.0 - 1.0 / max(1, batch.left)
        if failure:
            batch.failed += 1
        else:
            batch.done += 1
        batch.changed = True
        self._end_if_over(batch)

    def _end_if_over(self, batch: Running) -> None:
        over = batch.left <= 0 or (batch.state == CANCELLING and not batch.flying)
        if over and not batch.busy and batch.state not in (CANCELLED, COMPLETED):
            batch.busy = True
            self._spawn(self._finish(batch))

    async def _finish(self, batch: Running) -> None:
        """The batch is over, once all of it is on the disk."""
        await self._writer.flushed()
        if batch.left > 0:
            batch.failed += await asyncio.to_thread(self._ledger.cancel, batch.number, self._since_s())
        state = CANCELLED if batch.state == CANCELLING else COMPLETED
        batch.state, batch.reason, batch.eta_s = state, "", 0.0
        ended_at = time.time()
        row = progress_of(batch) | {"ended_at": ended_at}
        await asyncio.to_thread(self._store.progress, self._replica, [row])
        batch.row = replace(batch.row, ended_at=ended_at)
        log.info("batch %s: %s, %d done, %d failed", batch.row.batch_id, state, batch.done, batch.failed)
        self._over()
        self.running.pop(batch.number, None)
        self.by_id.pop(batch.row.batch_id, None)

    # ------------------------------------------------------------ when it will be done

    async def obey_elsewhere(self, batch: Running, wanted: str) -> None:
        """What was asked through another replica."""
        pauses = wanted == PAUSE and batch.state in (QUEUED, RUNNING)
        cancels = wanted == CANCEL and batch.state != CANCELLING
        if pauses or cancels or (wanted == RUN and batch.state == PAUSED):
            await self.obey(batch, wanted)

    def estimate(self) -> None:
        """When each batch will be done: those of a pool share its quota alike, whatever their lengths."""
        for batch in self.running.values():
            eta_s = 0.0
            if batch.state in (PAUSED, STOPPED):
                eta_s = -1.0
            for name in batch.row.details.get("pools", ()) if eta_s == 0.0 else ():
                lane = self._lanes.get(name)
                if lane is None:
                    continue
                requests, tokens = self.ahead_of(batch.left, batch.left_tokens, name, besides=batch.number)
                eta_s = max(eta_s, min(1e9, lane.eta_s(requests, tokens)))
            if abs(eta_s - batch.eta_s) > 0.5:
                batch.changed = True
            batch.eta_s = eta_s

    def ahead_of(self, requests: int, tokens: float, pool: str, besides: int = 0) -> tuple[int, float]:
        """Requests and tokens that a pool will have launched by the end of a batch of that size, itself included."""
        total, sum_tokens = float(requests), tokens
        for other in self.running.values():
            if other.number != besides and other.state in (QUEUED, RUNNING) and pool in other.row.details["pools"]:
                # Turns go by tokens: of a longer batch only as much goes first as this one has itself.
                share = min(1.0, tokens / other.left_tokens) if other.left_tokens > 0.0 else 0.0
                total += share * other.left
                sum_tokens += share * other.left_tokens
        return round(total), sum_tokens


def batch_policy(policy: Policy, row: BatchRow) -> Policy:
    """The settings of a pool with a batch's own on top."""
    own: Mapping[str, str] = row.details.get("settings", {})
    return policy.set_values([f"{name}={value}" for name, value in own.items()]) if own else policy


def progress_of(batch: Running) -> dict[str, Any]:
    """The columns of a batch that change while it runs."""
    names = ("state", "reason", "done", "failed", "in_flight", "attempts", "throttled", "resent", "eta_s")
    row = batch.now()
    return {"number": batch.number} | {name: getattr(row, name) for name in names}

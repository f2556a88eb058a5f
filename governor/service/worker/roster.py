"""The batches that this replica owns: fed to their pools, held, resumed, cancelled, counted, finished.

A batch that is held has nothing in a queue: its cursors are closed, waiting requests are withdrawn, requests in flight
end, and those that would back off or be finalized are withdrawn when they come back. When it resumes, it is read again
from the records, once they hold everything that has happened.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from governor.journal.rows import Pending
from governor.journal.schema import to_json
from governor.model.policy import Policy
from governor.model.requests import BATCH, Answer, Attempt, Outcome, Request
from governor.model.work import THROTTLES, Begun, Work, work_of
from governor.scheduler.repeated_refusals import Refusals
from governor.service.store.ledger import DatabaseRetries, FencedWriter, Ledger
from governor.service.store.store import (
    CANCEL,
    CANCELLED,
    CANCELLING,
    COMPLETED,
    PAUSE,
    PAUSED,
    QUEUED,
    RESUME,
    RUN,
    RUNNING,
    STOPPED,
    BatchRow,
    Store,
)
from governor.service.store.tables import BATCH_BITS
from governor.service.worker.feed import Cursor, RosterLine
from governor.service.worker.lane import Lane
from governor.service.worker.waves import REASON_MOST, BatchWaves, WaveContext

# The batches estimated at a time; and the relative change below which an ETA is not written again.
ESTIMATED, ETA_RATIO = 50, 0.02

log = logging.getLogger("paceline.service")


@dataclass(slots=True)
class RunningBatch:
    """One batch that this replica owns. `flying`: the numbers of its requests that are in flight, by live calls.

    `waves`: its way through the Batch API, while that is under way; `held`: its requests in waves.
    """

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
    refusals: Refusals | None = None
    waves: BatchWaves | None = None
    held: int = 0

    @property
    def is_live(self) -> bool:
        """Return whether its requests are live calls alone."""
        return self.row.via == "live"

    @property
    def number(self) -> int:
        return self.row.number

    @property
    def left(self) -> int:
        """Return the number of requests that have not ended."""
        return self.row.requests - self.done - self.failed

    @property
    def waiting(self) -> tuple[int, float]:
        """Return requests neither over nor in flight (those are booked already), and their tokens."""
        count = max(0, self.left - len(self.flying))
        return count, self.left_tokens * count / max(1, self.left)

    def now(self) -> BatchRow:
        """Return the present state of the batch, in the shape in which it is stored."""
        return replace(
            self.row,
            state=self.state,
            reason=self.reason,
            done=self.done,
            failed=self.failed,
            in_flight=len(self.flying) + self.held,
            attempts=self.attempts,
            throttled=self.throttled,
            resent=self.resent,
            eta_s=self.eta_s,
        )


class Roster:
    """The batches of one life of the worker; used in the event loop only.

    `spawn`: starts a task whose failure ends that life. `since_s`: now, on the clock of the governors. `over`: called
    when a batch has come to its end.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        replica: int,
        writer: FencedWriter,
        lanes: Mapping[str, Lane],
        patience: DatabaseRetries,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        since_s: Callable[[], float],
        over: Callable[[], None],
        waves: WaveContext,
    ) -> None:
        self.running: dict[int, RunningBatch] = {}
        self.by_id: dict[str, int] = {}
        self._store = store
        self._ledger = ledger
        self._replica = replica
        self._writer = writer
        self._lanes = lanes
        self._patience = patience
        self._spawn = spawn
        self._since_s = since_s
        self._over = over
        self._waves = waves

    def batch(self, batch_id: str) -> BatchRow | None:
        """Return the present state of a batch; None if it is not here."""
        number = self.by_id.get(batch_id)
        return None if number is None else self.running[number].now()

    # ------------------------------------------------------------ batches come

    async def adopt(self, row: BatchRow, *, fresh: bool = False) -> None:
        """Begin or continue a batch of this replica's. One of an earlier life is claimed anew instead."""
        if row.owner != self._replica or row.number in self.running:
            return
        done = failed = resent = 0
        if not fresh:
            counts = await asyncio.to_thread(self._ledger.records(row.number, self._patience).counts)
            done, failed, resent = counts.done, counts.failed, counts.resent
            if row.owner != self._replica or row.number in self.running:
                return  # this life ended meanwhile
        batch = RunningBatch(
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
        self._watch_refusals(batch)
        self.running[row.number] = batch
        self.by_id[row.batch_id] = row.number
        if row.wanted == CANCEL:
            await self.obey(batch, CANCEL)
        elif row.wanted == PAUSE or row.state in (PAUSED, STOPPED):
            batch.state = STOPPED if row.state == STOPPED and row.wanted == RUN else PAUSED
            if not batch.is_live:  # what is at the provider is collected all the same
                self._submit(batch)
        elif batch.left <= 0 and batch.is_live:
            self._spawn(self._finish(batch))
        else:
            self._feed(batch, is_new=fresh)

    def _watch_refusals(self, batch: RunningBatch) -> None:
        """Stop a batch whose first requests all meet the same refusal; other batches of its pools go on."""
        models = batch.row.details.get("models")
        if models is not None and batch.is_live:  # batches accepted by an earlier version do not say
            then, answered = "then resume the batch", batch.done > 0
            batch.refusals = Refusals(models, answered=answered, halt=lambda line: self._halt(batch, line), then=then)

    def _halt(self, batch: RunningBatch, line: str) -> None:
        if batch.state in (QUEUED, RUNNING) and batch.left > 0:
            log.error("batch %s: stopped: %s", batch.row.batch_id, line)
            batch.state, batch.reason, batch.changed = STOPPED, line[:REASON_MOST], True
            self._spawn(self._withdraw(batch))

    def _feed(self, batch: RunningBatch, *, is_new: bool = False) -> None:
        """Add its pending requests to the feeds of their pools. `is_new`: none of them was ever launched."""
        batch.state = RUNNING if batch.attempts else QUEUED
        batch.reason = ""
        batch.changed = True
        if not batch.is_live:
            self._submit(batch)
            return
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
                    self._ledger.records(batch.number, self._patience),
                    name,
                    longest_first=policy.launch_order == "longest_first",
                    is_new=is_new,
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

    # ------------------------------------------------------------ commands for a batch

    async def obey(self, batch: RunningBatch, wanted: str) -> None:
        if batch.busy or batch.state in (CANCELLED, COMPLETED):
            return
        held = batch.state in (PAUSED, STOPPED)
        if wanted == CANCEL:
            batch.state, batch.changed = CANCELLING, True
            await self._withdraw(batch)
            if not batch.is_live:
                await self._resubmit(batch)
                assert batch.waves is not None
                batch.waves.cancel()
            self._end_if_over(batch)
        elif wanted == PAUSE and batch.state in (QUEUED, RUNNING):
            batch.state, batch.changed = PAUSED, True
            await self._hold(batch)
        elif wanted == RUN and held and not batch.busy:
            batch.busy = True
            try:
                if batch.waves is not None:
                    await batch.waves.end()
                    batch.waves = None
                # Withdrawn requests are read again from the records: first these must hold everything that has
                # happened.
                await self._writer.flushed()
                await asyncio.to_thread(self._patience, self._ledger.put_back, batch.number, tuple(batch.flying))
            finally:
                batch.busy = False
            self._watch_refusals(batch)
            if batch.left - len(batch.flying) > 0 or not batch.is_live:
                self._feed(batch)
            else:
                batch.state, batch.changed = RUNNING, True
                self._end_if_over(batch)

    async def _withdraw(self, batch: RunningBatch) -> None:
        """Launch none of its lines any more; those in flight go on."""
        cursors = [cursor for lane in self._lanes.values() if (cursor := lane.feed.remove(batch.number)) is not None]
        self._withdraw_waiting(batch)
        for cursor in cursors:
            await cursor.close()

    def _submit(self, batch: RunningBatch) -> None:
        """Go on with a batch at the Batch API. One that is held submits nothing, but is collected."""
        why = batch.reason or batch.state if batch.state == STOPPED else ""
        mixed = batch if batch.row.via == "auto" and batch.state in (QUEUED, RUNNING) else None
        for name in batch.row.details.get("pools", ()) if mixed else ():
            if name in self._lanes and self._lanes[name].blocked:
                self._lanes[name].open()
        waves = BatchWaves(batch.row, self._waves, halted=why, is_paused=batch.state == PAUSED, mixed=mixed)
        batch.waves = waves
        self._spawn(self._submitted(batch, waves))

    async def _resubmit(self, batch: RunningBatch) -> None:
        """Begin anew in the batch's present state; what is at the provider stays there."""
        batch.busy = True
        try:
            if batch.waves is not None:
                await batch.waves.end()
            await self._writer.flushed()
        finally:
            batch.busy = False
        self._submit(batch)

    async def _hold(self, batch: RunningBatch) -> None:
        """Launch none of its lines any more, and submit none."""
        await self._withdraw(batch)
        if not batch.is_live:
            await self._resubmit(batch)

    async def _submitted(self, batch: RunningBatch, waves: BatchWaves) -> None:
        why = await waves.run()
        if batch.waves is not waves or waves.is_leaving:
            return
        self.look_at_waves(batch)
        batch.waves, batch.held = None, 0
        if batch.left > 0 and batch.state in (QUEUED, RUNNING):
            batch.state, batch.reason, batch.changed = STOPPED, (waves.said or why)[:REASON_MOST], True
        self._end_if_over(batch)

    def look_at_waves(self, batch: RunningBatch) -> None:
        """Take over what has become of a batch's waves."""
        waves = batch.waves
        if waves is None or not waves.drivers or waves.is_leaving:
            return
        shown = waves.shown()
        if shown != batch.row.waves or waves.held != batch.held:
            batch.row, batch.held, batch.changed = replace(batch.row, waves=shown), waves.held, True
        if batch.state == QUEUED and waves.held:
            batch.state = RUNNING
        if waves.halted and batch.state in (QUEUED, RUNNING):
            batch.state, batch.reason, batch.changed = STOPPED, (waves.said or waves.halted)[:REASON_MOST], True

    def leave_waves(self) -> bool:
        """Have the next owner of the batches go on with their waves; return whether a call is still under way."""
        for batch in self.running.values():
            if batch.waves is not None:
                batch.waves.leave()
        return bool(self._waves.running)

    def _withdraw_waiting(self, batch: RunningBatch) -> None:
        number = batch.number
        for lane in self._lanes.values():
            lane.governor.withdraw(lambda request: request.index >> BATCH_BITS == number)

    def on_blocked(self, pool: str, why: str) -> None:
        """Stop the pool's batches where they stand: the account is refused."""
        if why == "SHUTDOWN":
            return
        log.error("pool %s: stopped (%s); resume a batch once that is solved", pool, why)
        for batch in self.running.values():
            is_there = batch.row.via != BATCH and pool in batch.row.details.get("pools", ())
            if is_there and batch.state in (QUEUED, RUNNING):
                batch.state, batch.reason, batch.changed = STOPPED, why, True
                self._spawn(self._hold(batch))

    # ------------------------------------------------------------ reports of the lanes

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
        batch.attempts += attempt.lane == BATCH  # nothing has said that it was launched
        if batch.refusals is not None and attempt.outcome is Outcome.OK:
            batch.refusals.succeeded()
        batch.changed = True
        if batch.state in (PAUSED, CANCELLING, STOPPED):
            # It may back off, or have a finalize pass before it: neither may be launched.
            asyncio.get_running_loop().call_soon(self._after_hold, batch)

    def _after_hold(self, batch: RunningBatch) -> None:
        if batch.state in (PAUSED, CANCELLING, STOPPED) and batch.number in self.running:
            self._withdraw_waiting(batch)
            self._end_if_over(batch)

    def on_ended(self, number: int, failure: str, request: Request, answer: Answer | None) -> None:
        """A request is over."""
        batch = self.running[number]
        batch.left_tokens *= 1.0 - 1.0 / max(1, batch.left)
        if failure:
            batch.failed += 1
        else:
            batch.done += 1
        batch.changed = True
        if batch.waves is not None:
            batch.waves.ended(request.index)
        refusals = batch.refusals
        if failure and answer is not None and refusals is not None and refusals.may_concern_all(answer):
            refusals.refused(request, answer)
        self._end_if_over(batch)

    def _end_if_over(self, batch: RunningBatch) -> None:
        over = batch.left <= 0 or (batch.state == CANCELLING and not batch.flying)
        if over and batch.waves is None and not batch.busy and batch.state not in (CANCELLED, COMPLETED):
            batch.busy = True
            self._spawn(self._finish(batch))

    async def _finish(self, batch: RunningBatch) -> None:
        """End the batch, once all of it is on the disk."""
        await self._writer.flushed()
        if batch.left > 0:
            batch.failed += await asyncio.to_thread(self._patience, self._ledger.cancel, batch.number, self._since_s())
        state = CANCELLED if batch.state == CANCELLING else COMPLETED
        ended_at = time.time()
        row = progress_of(batch) | {"state": state, "reason": "", "eta_s": 0.0, "ended_at": ended_at}
        await asyncio.to_thread(self._patience, self._store.progress, self._replica, [row])
        # The batch counts as over only once that is recorded, with its time.
        batch.state, batch.reason, batch.eta_s = state, "", 0.0
        batch.row = replace(batch.row, ended_at=ended_at)
        log.info("batch %s: %s, %d done, %d failed", batch.row.batch_id, state, batch.done, batch.failed)
        self._over()
        self.running.pop(batch.number, None)
        self.by_id.pop(batch.row.batch_id, None)

    # ------------------------------------------------------------ estimates

    async def obey_elsewhere(self, batch: RunningBatch, wanted: str) -> None:
        """Carry out a command received by another replica."""
        pauses = wanted == PAUSE and batch.state in (QUEUED, RUNNING)
        cancels = wanted == CANCEL and batch.state != CANCELLING
        if wanted == RESUME:
            # Once: it may stop again before long.
            await asyncio.to_thread(self._patience, self._store.resumed, batch.number)
            await self.obey(batch, RUN)
        elif pauses or cancels or (wanted == RUN and batch.state == PAUSED):
            await self.obey(batch, wanted)

    async def estimate(self) -> None:
        """Estimate when each batch will be done: those of a pool share its quota equally, whatever their lengths."""
        lines = {name: self._line(name) for name in self._lanes}
        self._waves.tick()
        for i, batch in enumerate(list(self.running.values()), 1):
            if i % ESTIMATED == 0:
                await asyncio.sleep(0)  # let waiting clients be answered
            self.look_at_waves(batch)
            eta_s = 0.0 if batch.waves is None else batch.waves.eta_s
            if batch.state in (PAUSED, STOPPED):
                eta_s = -1.0
            for name in batch.row.details.get("pools", ()) if eta_s == 0.0 and batch.is_live else ():
                lane = self._lanes.get(name)
                if lane is None:
                    continue
                is_in = batch.state in (QUEUED, RUNNING)
                if batch.waiting[0] and batch.state != CANCELLING:
                    ahead_s = lane.eta_s(*lines[name].ahead_of(*batch.waiting, is_in=is_in))
                else:
                    ahead_s = lane.service_s
                eta_s = max(eta_s, min(1e9, ahead_s))
            if abs(eta_s - batch.eta_s) > max(0.5, ETA_RATIO * batch.eta_s):
                batch.changed = True
            batch.eta_s = eta_s

    def _line(self, pool: str) -> RosterLine:
        """Return the batches that share a pool right now."""
        return RosterLine(
            batch.waiting
            for batch in self.running.values()
            if batch.is_live and batch.state in (QUEUED, RUNNING) and pool in batch.row.details["pools"]
        )

    def ahead_of(self, requests: int, tokens: float, pool: str) -> tuple[int, float]:
        """Return requests and tokens that a pool will have launched by the end of a new batch of that size, with it."""
        return self._line(pool).ahead_of(requests, tokens, is_in=False)


def batch_policy(policy: Policy, row: BatchRow) -> Policy:
    """Return the settings of a pool overlaid with a batch's own."""
    own: Mapping[str, str] = row.details.get("settings", {})
    return policy.set_values([f"{name}={value}" for name, value in own.items()]) if own else policy


def progress_of(batch: RunningBatch) -> dict[str, Any]:
    """Return the columns of a batch that change while it runs."""
    names = ("state", "reason", "done", "failed", "in_flight", "attempts", "throttled", "resent", "eta_s")
    row = batch.now()
    found = {"number": batch.number} | {name: getattr(row, name) for name in names}
    return found if batch.is_live else found | {"waves": to_json(row.waves)}

"""This process as a replica: its lease, the batches that it has claimed, one lane per pool, and their reports.

Theory of operation. A replica holds a lease (`lease`); it runs the batches that it owns and claims those whose owner is
gone. While the database is away or its disk is full, nothing is launched; requests in flight end, and their answers
stay in memory until they can be written. A lost lease or a bug ends this life of the replica: requests in flight may
end (not after a lost lease: another replica sends them), its batches are free to be claimed, and the replica begins
again after a moment by taking stock, as a new process would. A command for a batch (pause, resume, cancel) is recorded
first and then carried out by the replica that owns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from governor.journal.database import JournalError
from governor.journal.recorder import Recorder
from governor.model.errors import PacelineError
from governor.run.via.wave_run import connect_batch_with
from governor.service.config import ServiceConfig
from governor.service.store.base import replica_name
from governor.service.store.ledger import DatabaseRetries, FencedWriter, LeaseLostError, Ledger
from governor.service.store.store import RECEIVING, RESUME, RUN, BatchRow, Key, Store
from governor.service.worker.lane import Lane, LaneSender, lane_of
from governor.service.worker.lease import ReplicaLease
from governor.service.worker.policies import Policies
from governor.service.worker.roster import Roster, RunningBatch, progress_of
from governor.service.worker.waves import WaveContext
from governor.telemetry.metrics import Metrics

_TICK_S = 0.5
# The rest between two lives, and the length of a life that did not fail at once.
_REST_S, REST_MOST_S, LONG_LIFE_S = 0.5, 60.0, 10.0

log = logging.getLogger("paceline.service")


class Worker:
    """A replica; see the module. `ready`: whether it may accept batches; `trouble`: why not, in a line."""

    def __init__(
        self,
        config: ServiceConfig,
        store: Store,
        ledger: Ledger,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.store = store
        self.ledger = ledger
        self.metrics = metrics
        self.policies = Policies(config.pools, store)
        self.lanes: dict[str, Lane] = {}
        self.roster: Roster | None = None
        self.waves: WaveContext | None = None
        self.ready = False
        self.trouble = "it is starting"
        self.neighbours = 0
        self.replica = 0
        self.writer: FencedWriter | None = None
        self.ticked: list[Callable[[], None]] = []
        self._leg = 0
        self._failure: asyncio.Future[None] | None = None
        self._lease: ReplicaLease | None = None
        self._away: dict[str, str] = {}  # why the database cannot be used, by the part that found out
        self._patience = DatabaseRetries(lambda error: None)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()
        self.simulating = asyncio.Lock()
        self.forecasts = 0  # under way or waiting for their turn

    # ------------------------------------------------------------ lives

    async def run(self) -> None:
        """Work until `stop`; begin anew after a failure, after a longer rest each time that it fails at once."""
        rest_s = _REST_S
        while not self._stopping.is_set():
            begun_at = time.monotonic()
            try:
                await self._life()
            except (PacelineError, OSError) as error:
                self._say_trouble(str(error))
            except Exception as error:
                log.exception("the worker failed")
                self._say_trouble(f"internal error: {type(error).__name__}")
            rest_s = _REST_S if time.monotonic() - begun_at > LONG_LIFE_S else min(REST_MOST_S, 2.0 * rest_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), rest_s * self.config.time_scale)

    def stop(self) -> None:
        """Launch nothing more; `run` returns when requests in flight have ended, or the grace period is over."""
        self._stopping.set()

    def _say_trouble(self, text: str) -> None:
        if self.trouble != text:
            log.error("%s", text)
        self.ready, self.trouble = False, text

    async def _life(self) -> None:
        loop = asyncio.get_running_loop()
        self._failure = failure = loop.create_future()
        self._away.clear()
        self._patience = DatabaseRetries(self._teller("writer"))
        tasks: set[asyncio.Task[Any]] = set()
        try:
            await self._join()
            await self._begin()
            tasks |= {asyncio.create_task(lane.live(self.present().on_blocked)) for lane in self.lanes.values()}
            tasks.add(asyncio.create_task(self._tick()))
            stopping = asyncio.create_task(self._stopping.wait())
            tasks.add(stopping)
            await asyncio.wait({*tasks, failure}, return_when=asyncio.FIRST_COMPLETED)
            error = failure.exception() if failure.done() else None
            for task in tasks:
                if task.done() and not task.cancelled():
                    error = error or task.exception()
            if not isinstance(error, LeaseLostError):
                await self._wind_down("it is shutting down" if error is None else f"it begins anew: {error}")
            if error is not None:
                raise error
        finally:
            await self._end(tasks)

    async def _join(self) -> None:
        lease_s, began_at = self.config.lease_s, time.monotonic()
        self.replica = await asyncio.to_thread(self.store.join, replica_name(), lease_s)
        # From the first moment: taking stock may take longer than a lease on a busy machine.
        told = self._teller("lease")
        self._lease = ReplicaLease(self.store, self.replica, lease_s, began_at=began_at, told=told)

    async def _begin(self) -> None:
        config, store = self.config, self.store
        await asyncio.to_thread(self.policies.refresh)
        self.writer = FencedWriter(store, self.replica, self._patience)
        at_s = self._since_s()
        settings = self.policies.in_force()
        states = await asyncio.to_thread(self.ledger.last_states, settings, at_s, config.time_scale)
        self._leg, numbers = await asyncio.to_thread(self.ledger.begin_leg, self.replica, settings, states, at_s)
        for pool in config.pools:
            self.lanes[pool.name] = lane_of(
                pool,
                settings[pool.name],
                Recorder(self.writer, self._leg, numbers[pool.name], states.get(pool.name)),
                seed=self.ledger.seed,
                start_s=self._since_s(),
                metrics=self.metrics,
                worker=self,
                send=LaneSender(
                    pool, config.environment, lambda number: self.present().cap_of(number), self._lease_held
                ),
            )
            if self.lanes[pool.name].governor.s.paused:
                self.lanes[pool.name].governor.resume()  # an earlier life ended while the database was away
        self.waves = WaveContext(
            ledger=self.ledger,
            writer=self.writer,
            lanes=self.lanes,
            patience=self._patience,
            metrics=self.metrics,
            connect=connect_batch_with(config.environment),
            may_call=self._lease_held,
            worker=self,
        )
        self.roster = Roster(
            store,
            self.ledger,
            self.replica,
            self.writer,
            self.lanes,
            self._patience,
            spawn=self._spawn,
            since_s=self._since_s,
            over=self._tell,
            waves=self.waves,
        )
        await self._claim()
        await self._lease_held()  # a frozen process may have been held up for longer than a lease
        self.ready, self.trouble = True, ""

    def _since_s(self) -> float:
        """Return seconds since the journal began, on the clock of the governors."""
        return max(0.0, (time.time() - self.ledger.epoch_s) * self.config.time_scale)

    async def _wind_down(self, why: str) -> None:
        """Launch nothing more; requests in flight have the grace period to end, and to be recorded."""
        self.ready, self.trouble = False, why
        for lane in self.lanes.values():
            lane.governor.stop("SHUTDOWN")
        end = time.monotonic() + self.config.grace_s
        while (self._leaves_waves() or self._has_calls()) and time.monotonic() < end:
            await asyncio.sleep(0.02 * self.config.time_scale)
        if self.writer is not None and self._away:
            with contextlib.suppress(TimeoutError, JournalError):
                await asyncio.wait_for(self.writer.flushed(), max(0.0, end - time.monotonic()) * self.config.time_scale)

    def _leaves_waves(self) -> bool:
        return self.roster is not None and self.roster.leave_waves()

    def _has_calls(self) -> bool:
        return any(lane.governor.attempts.count for lane in self.lanes.values())

    async def _end(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """End this life: release everything, as far as the database can be reached."""
        self.ready = False
        self._patience.end()
        for task in (*tasks, *self._tasks):
            task.cancel()
        await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
        self._tasks.clear()
        for lane in self.lanes.values():
            self.metrics.unwatch(lane.name)
            for cursor in list(lane.feed.cursors.values()):
                await cursor.close()
            await lane.send.aclose()
            await lane.governor.aclose()
        if self.waves is not None:
            await self.waves.aclose()
        batches = list(self.batches.values())
        at_s = self._since_s()
        self.roster, self.waves, self.lanes = None, None, {}
        writer, self.writer = self.writer, None
        lease, self._lease = self._lease, None
        with contextlib.suppress(JournalError):
            await asyncio.to_thread(self._closed, writer, batches, at_s)
        if lease is not None:
            lease.end()

    def _closed(self, writer: FencedWriter | None, batches: list[RunningBatch], at_s: float) -> None:
        try:
            if writer is not None:
                writer.close()
        finally:
            for batch in batches:
                batch.flying.clear()
            self.store.progress(self.replica, [progress_of(batch) for batch in batches])
            self.store.left(self.replica)
            if self._leg:
                self.ledger.end_leg(self._leg, at_s, "ended")

    # ------------------------------------------------------------ the lease

    async def _lease_held(self) -> None:
        if self._lease is None:
            raise LeaseLostError("this life of the replica is over")
        await self._lease.held()

    def _teller(self, source: str) -> Callable[[JournalError | None], None]:
        """Return the function that a thread calls with a failure of the database, and with None once it is over."""
        loop, life = asyncio.get_running_loop(), self._failure

        def heard(error: JournalError | None) -> None:
            if self._failure is life:
                self._on_database(source, error)

        def told(error: JournalError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(heard, error)

        return told

    def _on_database(self, source: str, error: JournalError | None) -> None:
        """Handle a database failure found by `source`, or (None) its end: launches pause while any lasts."""
        if isinstance(error, LeaseLostError):
            self.on_failure(error)
            return
        was_away = bool(self._away)
        if error is None:
            self._away.pop(source, None)
        else:
            self._away[source] = str(error)
        if self._away:
            text = next(iter(self._away.values()))
            if not was_away:
                log.error("%s; nothing is launched until then, what is in flight goes on", text)
                for lane in self.lanes.values():
                    lane.governor.pause()
            if not self._stopping.is_set():
                self.ready, self.trouble = False, text
        elif was_away:
            log.warning("the database can be used again: launches go on")
            for lane in self.lanes.values():
                lane.governor.resume()
            if self.roster is not None and not self._stopping.is_set():
                self.ready, self.trouble = True, ""

    def on_failure(self, error: BaseException) -> None:
        """End this life after a failure that must not happen."""
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    def _spawn(self, work: Any) -> None:
        """Start a task whose failure ends this life."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.on_failure(error)

    # ------------------------------------------------------------ batches come and go

    async def _claim(self) -> None:
        """Take over batches without an owner."""
        for number, owner in await asyncio.to_thread(self.store.free_batches, self.replica):
            row = await asyncio.to_thread(self._patience, self._claimed, number, owner)
            if row is not None:
                await self.present().adopt(row)

    def _claimed(self, number: int, owner: int) -> BatchRow | None:
        with self.store.database.writing() as c:
            row = self.store.claimed(c, number, owner, self.replica)
            if row is None:
                return None
            resent = self.ledger.taken_over(c, number)
            if row.state != RECEIVING:
                self.store.change_batch(c, number, resent=row.resent + resent, in_flight=0)
            row = replace(row, owner=self.replica)
        if row.state == RECEIVING:
            # Its upload ended with its process: no client was told that it was accepted.
            self.ledger.erase(number)
            with self.store.database.writing() as c:
                self.store.remove_batch(c, number)
            return None
        log.info("batch %s: taken over, %d requests in flight were lost", row.batch_id, resent)
        return replace(row, resent=row.resent + resent)

    async def adopt(self, row: BatchRow) -> None:
        """Begin a batch that was accepted. One of an earlier life of this replica is claimed by the present one."""
        if self.roster is not None and row.owner == self.replica:
            await self.roster.adopt(row, fresh=True)

    # ------------------------------------------------------------ commands for a batch

    async def ask(self, row: BatchRow, wanted: str, key: Key | None = None) -> None:
        """Record a command, and carry it out if the batch is this replica's. `key`: see `Store.want`."""
        batch = self.batches.get(row.number)
        # For a batch that has stopped by itself, "run" says nothing new to its owner.
        written = RESUME if wanted == RUN and batch is None else wanted
        await asyncio.to_thread(self.store.want, row.number, written, key)
        batch = self.batches.get(row.number)
        if batch is not None:
            await self.present().obey(batch, wanted)

    def present(self) -> Roster:
        """Return the roster, to which the lanes report."""
        assert self.roster is not None, "a lane outlives its worker's life"
        return self.roster

    # ------------------------------------------------------------ the ticker

    async def _tick(self) -> None:
        """Handle everything that is not an event, twice a second."""
        ticks = 0
        while True:
            await asyncio.sleep(_TICK_S * self.config.time_scale)
            ticks += 1
            await self.present().estimate()
            self._tell()
            try:
                await self._look_around(ticks)
            except JournalError as error:
                if not error.retryable or isinstance(error, LeaseLostError):
                    raise
                self._on_database("tick", error)
            else:
                self._on_database("tick", None)

    async def _look_around(self, ticks: int) -> None:
        """Write progress, carry out commands from other replicas, take over free batches."""
        changed = [batch for batch in self.batches.values() if batch.changed and not batch.busy]
        rows = [progress_of(batch) for batch in changed]
        for batch in changed:
            batch.changed = False
        try:
            wanted, lost = await asyncio.to_thread(self._look, rows)
        except JournalError:
            for batch in changed:
                batch.changed = True
            raise
        for number, each in wanted.items():
            mine = self.batches.get(number)
            if mine is not None:
                await self.present().obey_elsewhere(mine, each)
        if lost:
            await self._claim()
        if await asyncio.to_thread(self.policies.refresh):
            self.apply_policies()
        if ticks % 7_200 == 0:
            await asyncio.to_thread(self.store.forget_keys)

    def _look(self, rows: list[dict[str, Any]]) -> tuple[dict[int, str], bool]:
        """In a thread: write the progress, and read the commands and whether any batches are free."""
        self.store.database.check_room()
        if rows:
            self.store.progress(self.replica, rows)
        self.neighbours = self.store.neighbours(self.replica)
        if self.waves is not None and self.waves.running:
            self.waves.elsewhere = self.ledger.enqueued_elsewhere(self.replica) if self.neighbours else {}
        return self.store.wanted(self.replica), bool(self.store.free_batches(self.replica))

    def _tell(self) -> None:
        for told in self.ticked:
            told()

    # ------------------------------------------------------------ settings

    def apply_policies(self) -> None:
        """Put the settings of `policies` in force from now on."""
        for name, policy in self.policies.in_force().items():
            lane = self.lanes.get(name)
            if lane is not None and lane.policy != policy:
                lane.change(policy)
        for changed in self.policies.changed:
            changed(self.policies.in_force())

    # ------------------------------------------------------------ for requests to the API

    @property
    def batches(self) -> Mapping[int, RunningBatch]:
        """Return the batches that this replica works on, by number."""
        return {} if self.roster is None else self.roster.running

    def batch(self, batch_id: str) -> BatchRow | None:
        """Return the present state of a batch of this replica's; None if it is another's, or over."""
        return None if self.roster is None else self.roster.batch(batch_id)

    def ahead_of(self, requests: int, tokens: float, pool: str) -> tuple[int, float]:
        """See `Roster.ahead_of`."""
        return (requests, tokens) if self.roster is None else self.roster.ahead_of(requests, tokens, pool)

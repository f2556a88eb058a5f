"""One batch's way through the Batch API: a `WaveDriver` per pool, for as long as this replica owns the batch.

Waves are numbered in the batch's own range, as its requests are, so that no two replicas give the same number, and are
found in the account under the batch's id. A driver writes through the replica's fenced writer and asks for the lease
before each step: after a takeover the next owner reads the waves, looks up at the provider what is in doubt, and goes
on. Batches share a pool's queue at the provider: each leaves room for what the others have in it, those of other
replicas included, as of the latest look.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import inf
from typing import Any

from governor.batchapi.client import BatchClient
from governor.batchapi.collect import DriverContext
from governor.batchapi.driver import WaveDriver
from governor.batchapi.limits import FILE_LINES
from governor.batchapi.outlook import foreseen, left_of
from governor.batchapi.waves import WaveStage
from governor.forecast.mixes import batch_lines
from governor.journal.waves import WaveRecorder
from governor.model.errors import BadSetting
from governor.model.pools import Pool
from governor.run.via.guards import WaveBudget
from governor.run.via.wave_run import Spender
from governor.service.store.ledger import DatabaseRetries, FencedWriter, Ledger, part_of
from governor.service.store.store import BatchRow
from governor.service.worker.lane import BatchReports, Lane
from governor.service.worker.mix import BatchMixer
from governor.telemetry.metrics import Metrics
from governor.telemetry.watch import Together

# The latest waves of a batch that are shown.
WAVES_SHOWN = 20
# The length of a stored reason.
REASON_MOST = 255
_BOUGHT = (WaveStage.ENDED, WaveStage.COLLECTED, WaveStage.CLOSED)

log = logging.getLogger("paceline.service")


@dataclass(slots=True, kw_only=True)
class WaveContext:
    """What the drivers of this life of the replica share. `worker`: receives each event by batch.

    `connect`: makes the client of a pool's account. `may_call`: returns while the lease is held. `elsewhere`: tokens
    that batches of other replicas have in the queue, by pool and model.
    """

    ledger: Ledger
    writer: FencedWriter
    lanes: Mapping[str, Lane]
    patience: DatabaseRetries
    metrics: Metrics
    connect: Callable[[Pool], BatchClient]
    may_call: Callable[[], Awaitable[None]]
    worker: Any
    elsewhere: dict[tuple[str, str], float] = field(default_factory=dict)
    running: dict[int, BatchWaves] = field(default_factory=dict)
    _clients: dict[str, BatchClient] = field(default_factory=dict)

    def client(self, pool: Pool) -> BatchClient:
        """Return the client of a pool's account. Raise BadSetting if it has no Batch API."""
        if pool.name not in self._clients:
            self._clients[pool.name] = self.connect(pool)
        return self._clients[pool.name]

    def enqueued(self, pool: str, model: str, *, but: int) -> float:
        """Return the tokens of a model that all other batches than `but` have in a pool's queue, or are to submit."""
        return self.elsewhere.get((pool, model), 0.0) + sum(
            wave.tokens
            for number, batch in self.running.items()
            if number != but and pool in batch.drivers
            for wave in batch.drivers[pool].waves.open.values()
            if wave.lane.model == model and wave.stage not in _BOUGHT
        )

    def tick(self) -> None:
        """Set the gauges, and let drivers decide anew: room in the queue may have come from elsewhere."""
        for batch in self.running.values():
            batch.tick()
        for name in self.lanes:
            drivers = [batch.drivers[name] for batch in self.running.values() if name in batch.drivers]
            held = [driver for driver in drivers if driver.waves.open]
            tokens: dict[str, float] = {}
            for driver in drivers:
                for model in driver.waves.ledgers:
                    tokens[model] = tokens.get(model, 0.0) + driver.waves.enqueued(model)
            # The one that has stood still for the longest: those that move must not hide it.
            moved = min((driver.moved_epoch for driver in held), default=0.0)
            self.metrics.waves(name, sum(len(driver.waves.open) for driver in held), moved, tokens)

    async def aclose(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.aclose()


class BatchWaves:
    """Runs one batch by the Batch API. Create it in the event loop and await `run` once.

    `mixed`: the `RunningBatch` of one that goes live as well, as a planner decides; None = by the Batch API alone.
    `halted`: why nothing is submitted from the beginning, "" = all is. `said`: what was logged last.
    """

    def __init__(
        self, row: BatchRow, context: WaveContext, *, halted: str = "", is_paused: bool = False, mixed: Any = None
    ) -> None:
        self.row = row
        self.drivers: dict[str, WaveDriver] = {}
        self.said = halted
        self.is_leaving = False
        self._context = context
        self._halted = halted
        self._is_paused = is_paused
        self._is_cancelled = False
        self._mixed = mixed
        self._mixers: dict[str, BatchMixer] = {}
        self._tasks: list[asyncio.Task[str]] = []

    # ------------------------------------------------------------ the run

    async def run(self) -> str:
        """Run until nothing is left or nothing more may be submitted; return why the latter, "" = all is done."""
        context = self._context
        context.running[self.row.number] = self
        try:
            try:
                clients = {name: context.client(context.lanes[name].pool) for name in self._pools()}
            except BadSetting as error:
                self.said = str(error)
                return self.said
            drivers = await asyncio.to_thread(self._resumed, clients)
            if self.is_leaving:
                return self._halted
            self.drivers = drivers
            self.tick()
            runs = [driver.run() for driver in drivers.values()] if not self._mixed else []
            runs += [mixer.run() for mixer in self._mixers.values()]
            self._tasks = [asyncio.create_task(run) for run in runs]
            return next(filter(None, await asyncio.gather(*self._tasks)), "")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if context.running.get(self.row.number) is self:
                del context.running[self.row.number]

    def _pools(self) -> list[str]:
        return [name for name in self.row.details.get("pools", ()) if name in self._context.lanes]

    def _resumed(self, clients: Mapping[str, BatchClient]) -> dict[str, WaveDriver]:
        """In a thread: return the drivers, with the waves and the pending requests that are on record."""
        context, number = self._context, self.row.number
        journal = context.ledger.records(number, context.patience)
        before, _ = part_of(number)
        numbers = count(max((row.wave for row in journal.waves()), default=before) + 1)
        found = {}
        for name, client in clients.items():
            lane = context.lanes[name]
            around = DriverContext(
                now=lane.governor.now,
                say=self._say,
                flushed=context.writer.flushed,
                in_thread=asyncio.to_thread,
                numbers=numbers,
                run_id=hashlib.sha256(self.row.batch_id.encode()).hexdigest()[:16],
                began_epoch_s=self.row.created_at,
                seed=context.ledger.seed,
                purse=WaveBudget(lane.meter.spent, inf),
                may_call=context.may_call,
                wave_before=before,
                again="resuming the batch",
                elsewhere=self._elsewhere(name),
                leaves_large=bool(self._mixed),
                lines=batch_lines(self.row.requests, FILE_LINES) if self._mixed else FILE_LINES,
            )
            observers = [
                lane.recorder,  # first: nothing is reported before it is recorded
                Spender(lane.meter.spent),
                context.metrics.observer(name),
                BatchReports(context.worker),
            ]
            pool = replace(lane.pool, policy=lane.policy)
            recorder = WaveRecorder(context.writer, name)
            driver = WaveDriver(pool, client, journal, Together(observers), recorder, around)
            driver.waves.others = partial(self._others, name)
            driver.resume()
            driver.moved_epoch = time.time()
            found[name] = driver
            if self._mixed:
                deadline_at = lane.governor.now() + (self.row.finish_by - time.time()) * lane.time_scale
                self._mixers[name] = BatchMixer(self._mixed, lane, driver, around, journal, deadline_at)
        return found

    def _elsewhere(self, pool: str) -> Callable[[int], bool]:
        if not self._mixed:
            return lambda request: False
        return lambda request: request not in self._mixers[pool].place.batch

    def _others(self, pool: str, model: str) -> float:
        return self._context.enqueued(pool, model, but=self.row.number)

    def _say(self, line: str) -> None:
        self.said = line
        log.warning("batch %s: %s", self.row.batch_id, line)

    # ------------------------------------------------------------ steering

    def tick(self) -> None:
        """Have the drivers decide anew, under what is in force now."""
        for name, driver in self.drivers.items():
            waves = driver.waves
            if not self._mixed:  # there, the planner sees to both
                waves.halted = waves.halted or self._halted or self.halted
                waves.is_paused = self._is_paused
            if self._is_cancelled:
                for wave in waves.open.values():
                    if not wave.is_cancelled:
                        waves.cancel(wave)
            if (limit := self._context.lanes[name].policy.batch_queue_tokens) != waves.queue_tokens:
                waves.limited(limit)
            driver.woken()

    def cancel(self) -> None:
        """Submit nothing more, and have what is at the provider cancelled; what it has answered is kept."""
        self._halted, self._is_cancelled = "cancelled", True
        self.tick()

    async def end(self) -> None:
        """End it at once, for another to go on from what is on record."""
        self.leave()
        for task in self._tasks:
            task.cancel()
        while self._context.running.get(self.row.number) is self:
            await asyncio.sleep(0.01)

    def leave(self) -> None:
        """Let `run` return after the call under way: the next owner of the batch goes on."""
        self.is_leaving = True
        for mixer in self._mixers.values():
            mixer.leave("SHUTDOWN")
        for driver in self.drivers.values():
            driver.leave()

    def ended(self, request: int) -> None:
        """A request is over, by whichever way."""
        for mixer in self._mixers.values():
            mixer.place.ended.add(request)

    @property
    def halted(self) -> str:
        """Return why nothing more is submitted, "" = it is, or a planner sends the rest live."""
        if self._mixed:
            return ""
        return next((driver.waves.halted for driver in self.drivers.values() if driver.waves.halted), "")

    # ------------------------------------------------------------ figures

    @property
    def held(self) -> int:
        """Return how many requests are in waves that have not been collected."""
        waves = [wave for driver in self.drivers.values() for wave in driver.waves.open.values()]
        return sum(wave.requests for wave in waves if wave.stage not in (WaveStage.COLLECTED, WaveStage.CLOSED))

    @property
    def eta_s(self) -> float:
        """Return seconds until the last answer, at the turnaround measured so far, else assumed."""
        if self._mixed:  # it takes the time that it has
            lanes = [self._context.lanes[name] for name in self.drivers]
            return max(0.0, (self.row.finish_by - time.time()) * max((lane.time_scale for lane in lanes), default=1.0))
        return max(
            (
                foreseen(left_of(driver.waves), driver.waves.queue_tokens, driver.ended_rows).finish_s
                for driver in self.drivers.values()
            ),
            default=0.0,
        )

    def shown(self) -> list[dict[str, Any]]:
        """Return the latest waves, in order, as `bodies.WaveOut` describes them."""
        before, _ = part_of(self.row.number)
        found: dict[int, dict[str, Any]] = {}
        for driver in self.drivers.values():
            for row in (*driver.ended_rows, *driver.rows.values()):
                counts = driver.waves.open.get(row.wave, row)
                found[row.wave] = {
                    "wave": row.wave - before,
                    "pool": row.pool,
                    "model": row.model,
                    "stage": str(row.stage),
                    "status": counts.status,
                    "requests": row.requests,
                    "total": counts.total,
                    "completed": counts.completed,
                    "failed": counts.failed,
                    "provider_id": row.batch_id,
                    "message": row.message[:REASON_MOST],
                }
        return [found[number] for number in sorted(found)[-WAVES_SHOWN:]]

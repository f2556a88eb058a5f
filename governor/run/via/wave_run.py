"""One leg of a run by the Batch API, `--via batch`: a driver per pool, until nothing is left or the run is stopped.

Batches at the provider go on without us: the first signal ends the run after the call under way, and the same command
collects what has been answered since.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from governor.batchapi.client import BatchClient
from governor.batchapi.collect import DriverContext
from governor.batchapi.driver import WaveDriver
from governor.batchapi.outlook import Foreseen, foreseen, left_of, progress
from governor.batchapi.sdk_client import SdkBatchClient
from governor.batchapi.waves import WaveStage
from governor.journal.journal import Journal
from governor.journal.recorder import Recorder
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Spending, Usage, usage_in
from governor.model.requests import Answer, Attempt, Outcome, Request
from governor.model.words import duration, plural
from governor.model.work import Observer
from governor.run.account import FAILED_INSIDE
from governor.run.live import COMMANDS_S, TEXTFILE_S, TICK_S, Announcer, Ended, is_time
from governor.run.longwaits import FINISH_BY, STOP_AFTER
from governor.run.pool_run import Follower, RunOptions
from governor.run.steer import Commands, Signals
from governor.run.via.guards import WaveBudget
from governor.telemetry.eventlog import EventLog
from governor.telemetry.progress import Display
from governor.telemetry.watch import Together

ConnectBatch = Callable[[Pool], BatchClient]


def connect_batch_with(environment: Mapping[str, str]) -> ConnectBatch:
    """Return a function that makes the client of a pool's Batch API, with keys from these variables."""
    return lambda pool: SdkBatchClient(pool, environment)


# ---------------------------------------------------------------- the leg


@dataclass(frozen=True, slots=True)
class WaveLeg:
    """The work of one leg. `started`: the pools' policies without the changes of `paceline set`."""

    journal: Journal
    pools: Mapping[str, Pool]
    started: Mapping[str, Policy]
    forecast: Mapping[str, Any]
    spent: Spending
    keep_files: bool = False


@dataclass(slots=True)
class WavePool:
    """One pool under way; `Commands` steers it."""

    policy: Policy
    driver: WaveDriver
    recorder: Recorder
    now: Callable[[], float]
    why: str = ""

    def pause(self) -> None:
        """Submit nothing until `resume`; batches at the provider go on."""
        self.driver.waves.is_paused = True

    def resume(self) -> None:
        """Submit again."""
        self.driver.waves.is_paused = False
        self.driver.woken()

    def change(self, policy: Policy) -> None:
        """Adopt other settings; they are recorded with the time."""
        self.policy = policy
        self.driver.waves.limited(policy.batch_queue_tokens)
        self.recorder.policy_changed(policy, self.now())
        self.driver.woken()


class WaveRun(Announcer):
    """One leg by the Batch API. Create it and await `run()` once."""

    def __init__(self, leg: WaveLeg, connect: ConnectBatch, shown: Display, manner: RunOptions) -> None:
        self._before = leg.journal.counts()
        super().__init__(shown, manner, self._before.requests)
        self.leg = leg
        self.connect = connect
        self.pools: dict[str, WavePool] = {}
        self._ended = _Ends()
        self._stopped = ""

    def ended_requests(self) -> int:
        """Return how many requests have ended in this leg."""
        return self._ended.requests

    async def run(self) -> Ended:
        """Run until no work is left or the run is stopped. Raise JournalError if nothing can be recorded any more."""
        journal, loop = self.leg.journal, asyncio.get_running_loop()

        def on_full(full: str) -> None:
            loop.call_soon_threadsafe(self._on_full, full)

        journal.wait_for_room(on_full)
        zero = loop.time() - journal.now_s(self.manner.time_scale)

        def now() -> float:
            return loop.time() - zero

        began_s = now()
        begun = journal.begin({name: pool.policy for name, pool in self.leg.pools.items()}, began_s)
        for note in begun.notes:
            self.say(f"note: {note}")
        journal.forecast(self.leg.forecast, began_s)
        numbers = count(max((row.wave for row in journal.waves()), default=0) + 1)
        clients = {name: self.connect(pool) for name, pool in self.leg.pools.items()}
        for name, pool in self.leg.pools.items():
            self.pools[name] = self._pool(pool, clients[name], begun.recorders[name], now, numbers)
        signals = Signals(self._on_signal)
        commands = Commands(journal, self.pools, self.leg.started, self.say)
        commands.at_start(began_s)
        self.shown.start()
        try:
            with signals.handled(self.manner.stopper):
                ticker = asyncio.create_task(self._tick(commands, now, began_s))
                try:
                    await self._until_over(signals, ticker)
                finally:
                    ticker.cancel()
                    await asyncio.gather(ticker, return_exceptions=True)
        finally:
            self.shown.stop()
            for client in clients.values():
                await client.aclose()
        await journal.flushed()
        return Ended(
            why={name: run.why or self._stopped for name, run in self.pools.items()},
            granted={},
            tallies={},
            began_s=began_s,
            at_s=now(),
            resent=begun.resent,
            signals=tuple(signals.names),
        )

    def _pool(
        self, pool: Pool, client: BatchClient, recorder: Recorder, now: Callable[[], float], numbers: count[int]
    ) -> WavePool:
        journal, manner = self.leg.journal, self.manner
        log = EventLog(manner.log_format, pool.name) if manner.log_format is not None else None
        if log is not None:
            log.zero_epoch = time.time() - now()
        observers: list[Observer | None] = [
            recorder,  # first: nothing is reported before it is recorded
            Spender(self.leg.spent),
            self._ended,
            Follower(manner.follow) if manner.follow is not None else None,
            manner.metrics.observer(pool.name) if manner.metrics is not None else None,
            log,
        ]
        stated = journal.run()
        around = DriverContext(
            now=now,
            say=lambda line: self.say(f"pool {pool.name}: {line}" if len(self.leg.pools) > 1 else line),
            flushed=journal.flushed,
            in_thread=asyncio.to_thread,
            numbers=numbers,
            run_id=run_id(journal),
            began_epoch_s=stated.epoch_s,
            seed=stated.seed,
            keep_files=self.leg.keep_files,
            spool=journal.downloads,
            purse=None if manner.max_cost is None else WaveBudget(self.leg.spent, manner.max_cost),
        )
        together = Together([observer for observer in observers if observer is not None])
        driver = WaveDriver(pool, client, journal, together, journal.wave_recorder(pool.name), around)
        return WavePool(pool.policy, driver, recorder, now)

    # ------------------------------------------------------------ the work, and its end

    async def _until_over(self, signals: Signals, ticker: asyncio.Task[None]) -> None:
        """Wait until every pool is done or has stopped; a call under way has the grace period to end."""
        work = asyncio.create_task(self._work())
        stopping = asyncio.create_task(signals.stopping.wait())
        cancelling = asyncio.create_task(signals.cancelling.wait())
        try:
            await asyncio.wait({work, stopping, ticker}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.stop(signals.names[0] if signals.names else FAILED_INSIDE)
                grace_s = self.manner.grace_s * self.manner.time_scale
                await asyncio.wait({work, cancelling}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            if ticker.done():
                ticker.result()
        finally:
            for task in (work, stopping, cancelling):
                task.cancel()
            await asyncio.gather(work, stopping, cancelling, return_exceptions=True)

    async def _work(self) -> None:
        async def one(run: WavePool) -> None:
            run.why = await run.driver.run()

        async with asyncio.TaskGroup() as group:
            for run in self.pools.values():
                group.create_task(one(run))

    def stop(self, why: str) -> None:
        """Make no further call; batches at the provider go on without us."""
        self._stopped = self._stopped or why
        for run in self.pools.values():
            run.driver.leave()

    def _on_signal(self, name: str) -> None:
        waves = sum(
            wave.stage is not WaveStage.PLANNED
            for run in self.pools.values()
            for wave in run.driver.waves.open.values()
        )
        if not self._stopped:
            there = f"; {plural(waves, 'wave')} left with the provider: the same command collects what was answered"
            self.say(f"{name}: nothing more is submitted{there if waves else ''}")

    def _on_full(self, full: str) -> None:
        text = f"{full}: nothing more is sent until there is room" if full else "there is room again: the run continues"
        self.say(f"{self.leg.journal.name}: {text}")

    # ------------------------------------------------------------ the ticker

    async def _tick(self, commands: Commands, now: Callable[[], float], began_s: float) -> None:
        """Handle everything that is not a step of a wave."""
        manner, ticks = self.manner, 0
        budgets = ((manner.stop_after_s, STOP_AFTER, "--stop-after"), (manner.finish_by_s, FINISH_BY, "--finish-by"))
        while True:
            await asyncio.sleep(TICK_S * manner.time_scale)
            ticks += 1
            self._show()
            if is_time(ticks, COMMANDS_S):
                commands.look(now())
            if is_time(ticks, TEXTFILE_S):
                self.write_textfile()
            for limit_s, why, option in budgets:
                if limit_s is not None and now() - began_s >= limit_s and not self._stopped:
                    self.say(f"{option} {duration(limit_s)} is over: nothing more is submitted")
                    self.stop(why)

    def _show(self) -> None:
        """Show the progress, and set the gauges."""
        every = [run.driver.waves for run in self.pools.values()]
        ahead = max((self._ahead(name) for name in self.pools), key=lambda found: found.finish_s)
        before = self._before
        shown = progress(
            every,
            ahead,
            total=before.requests,
            ended=before.done + before.failed + self._ended.requests,
            failed=before.failed + self._ended.failed,
            stopped=self._stopped,
        )
        self.shown.show(shown)
        if self.manner.metrics is not None:
            for name, run in self.pools.items():
                waves = run.driver.waves
                tokens = {model: waves.enqueued(model) for model in waves.ledgers}
                self.manner.metrics.waves(name, len(waves.open), run.driver.moved_epoch, tokens)

    def _ahead(self, name: str) -> Foreseen:
        """Return the forecast of what is left of a pool."""
        run = self.pools[name]
        left = left_of(run.driver.waves)
        return foreseen(left, run.policy.batch_queue_tokens, run.driver.ended_rows)


def run_id(journal: Journal) -> str:
    """Return the name under which a run's files and batches are found in the account: 16 hexadecimal digits."""
    stated = journal.run()
    return hashlib.sha256(f"{stated.fingerprint} {stated.epoch_s!r} {stated.seed}".encode()).hexdigest()[:16]


# ---------------------------------------------------------------- observers


class Spender(Observer):
    """Adds up what answers cost. One that states no usage is counted, at its worst, when its request ends."""

    def __init__(self, spent: Spending) -> None:
        self._spent = spent
        self._untold: dict[int, Attempt] = {}

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        usage = usage_in(answer.body)
        if usage.prompt < 0 and attempt.outcome in (Outcome.OK, Outcome.MALFORMED):
            self._untold[attempt.request] = attempt
        else:
            self._spent.attempted(attempt, usage)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        if (attempt := self._untold.pop(request.index, None)) is not None:
            self._spent.attempted(attempt, Usage(), request.sizes)


class _Ends(Observer):
    """Counts the requests that end."""

    def __init__(self) -> None:
        self.requests = self.failed = 0

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self.requests += 1
        self.failed += bool(failure)

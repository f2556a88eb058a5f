"""One leg over live calls, flex and the Batch API, `--via auto`: the cheapest mix that is in time.

Theory of operation. Of each pool a `WaveDriver` hands requests to the Batch API, and a governor calls the provider
live. Between them a planner asks `governor.forecast.mixes.decide`, every so often and whenever a wave has ended: the
driver submits what it places there and nothing else, and the waves that it wants back are cancelled; their unanswered
requests become pending and are decided anew. A request is in one place at a time: the planner reads what is pending
while the driver takes no step, after all reports are on the disk, and leaves out what is live already.

Nothing of this has to survive a crash: waves and answers are in the journal, and all else is pending.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from governor.batchapi.client import BatchClient
from governor.batchapi.collect import DriverContext
from governor.batchapi.driver import MAX_COST, WaveDriver
from governor.batchapi.limits import COMPLETED, EXPIRES_S, FILE_LINES, TURNAROUND_S
from governor.batchapi.waves import WaveLane, WaveStage
from governor.forecast.forecast import assumed_answer
from governor.forecast.mixes import (
    FLEX_BLOCKED_S,
    Candidate,
    OpenBatch,
    Situation,
    Turnaround,
    batch_lines,
    decide,
    fitted,
    live_rate,
    step_s,
    turnaround_of,
)
from governor.journal.rows import Pending
from governor.model.pools import Connect
from governor.model.prices import Usage
from governor.model.requests import BATCH, STANDARD, Answer, Request
from governor.model.words import plural
from governor.model.work import Job, Observer, Work, reserve_of, work_of
from governor.run.live import Ended, Leg, LiveRun
from governor.run.pool_run import Follower, PoolRun, RunOptions
from governor.run.via.guards import WaveBudget
from governor.run.via.wave_run import ConnectBatch, Spender, run_id
from governor.telemetry.progress import Display
from governor.telemetry.watch import Together

FLEX = "flex"
# How often the planner looks whether a wave has ended, or live calls have run dry, in the run's seconds.
LOOK_S = 5.0


@dataclass(slots=True)
class _Place:
    """Requests given to live calls, by number, and the work that the governor has not pulled yet.

    `batch`: those that the latest decision has placed at the Batch API.
    """

    given: set[int] = field(default_factory=set)
    batch: set[int] = field(default_factory=set)
    flex: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    feed: deque[Work] = field(default_factory=deque)

    def __iter__(self) -> Iterator[Work]:
        return self

    def __next__(self) -> Work:
        if not self.feed:
            raise StopIteration
        return self.feed.popleft()


class Mixer:
    """Plans one pool. `deadline_at`: on the run's clock."""

    def __init__(self, run: PoolRun, driver: WaveDriver, around: DriverContext, leg: Leg, deadline_at: float) -> None:
        self.run_ = run
        self.driver = driver
        self.place = _Place()
        self.stopped = ""
        self._around = around
        self._journal = leg.journal
        self._spent = leg.spent
        self._deadline_at = deadline_at
        self._fed = asyncio.Event()
        self._flex_from = 0.0
        self._is_over = False

    async def run(self) -> str:
        """Run until nothing is left or nothing more may be sent; return why the latter, "" = all is done."""
        self.driver.resume()
        self.driver.waves.is_fed = True
        live = asyncio.create_task(self._live())
        plan = asyncio.create_task(self._plan())
        driver = asyncio.create_task(self.driver.run())
        try:
            unfinished: set[asyncio.Task[Any]] = {plan, driver, live}
            while not plan.done():
                done, unfinished = await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    each.result()  # raises what it raised
            self._is_over = True
            self._fed.set()
            self.driver.waves.is_fed = False
            self.driver.woken()
            await asyncio.gather(driver, live)
        finally:
            for task in (plan, live, driver):
                task.cancel()
            await asyncio.gather(plan, live, driver, return_exceptions=True)
        return self.run_.governor.stopped or self.stopped or self.driver.waves.halted if self._has_left() else ""

    def leave(self, why: str) -> None:
        """Send and submit nothing more; what is under way may end."""
        self.stopped = self.stopped or why
        self.driver.leave()

    def _has_left(self) -> bool:
        counts = self._journal.counts(self.run_.name)
        return counts.pending + counts.in_flight > 0

    # ------------------------------------------------------------ live calls

    async def _live(self) -> None:
        governor = self.run_.governor
        while not self._is_over and not governor.stopped:
            await self._fed.wait()
            self._fed.clear()
            if self.place.feed:
                self.run_.ending = await governor.run(self.place, self._send, refusals=self.run_.refusals)
        if governor.stopped:
            self.leave(governor.stopped)

    async def _send(self, job: Job, timeout_s: float) -> Answer:
        """Send one attempt: by flex while there is capacity, else at the standard price."""
        work = job.work
        assert work is not None
        if work.request.index not in self.place.flex or self._around.now() < self._flex_from:
            return await self.run_.send(job, timeout_s)
        body = {**(work.request.body or {}), "service_tier": FLEX}
        job.work = replace(work, request=replace(work.request, body=body))
        try:
            answer = await self.run_.send(job, timeout_s)
        finally:
            job.work = work
        if not is_out_of_capacity(answer):
            return answer
        if self._around.now() >= self._flex_from:
            self._around.say("flex is out of capacity: standard calls for the next five minutes")
        self._flex_from = self._around.now() + FLEX_BLOCKED_S
        return await self.run_.send(job, timeout_s)

    # ------------------------------------------------------------ planning

    async def _plan(self) -> None:
        while not self.stopped:
            seconds = await self._decide()
            if seconds is None:
                return
            seen = self._seen()
            until = self._around.now() + seconds
            while not self.stopped and self._around.now() < until and self._seen() == seen:
                await asyncio.sleep(min(LOOK_S, seconds))

    def _seen(self) -> tuple[int, bool, str]:
        return len(self.driver.ended_rows), not self.place.given - self.place.ended, self.driver.waves.halted

    async def _decide(self) -> float | None:
        """Decide once; return when again, in seconds, None if nothing is left to be decided."""
        driver, place, now = self.driver, self.place, self._around.now()
        driver.waves.is_paused = bool(self.run_.governor.s.paused)
        if driver.waves.halted == MAX_COST:
            self.stopped = MAX_COST
            return None
        async with self._around.lock:
            ended, place.ended = place.ended, set()
            await self._around.flushed()
            waiting = await self._around.in_thread(lambda: list(self._journal.waiting(self.run_.name)))
            place.given -= ended
            waiting = [each for each in waiting if each.work.request.index not in place.given]
            if not waiting and not place.given and not driver.waves.open:
                return None
            situation = self._situation(waiting, now)
            found = decide(situation)
            live, flex = found.live, found.flex
            if driver.waves.halted:
                live, flex = tuple(each.work.request.index for each in waiting), ()
            chosen = sorted({*live, *flex})
            works = await self._around.in_thread(lambda: [self._work_of(each) for each in self._journal.chosen(chosen)])
            place.given.update(chosen)
            place.flex.update(flex)
            place.feed.extend(works)
            place.batch = {number for numbers in found.batch for number in numbers} - place.given
            placed = [each.work.request for each in waiting if each.work.request.index in place.batch]
            driver.waves.replanned((WaveLane(r.model, r.url), float(r.sizes.prompt_tokens)) for r in placed)
        if works:
            self._fed.set()
            self.run_.governor.more()
        for number in found.cancel:
            if number in driver.waves.open:
                driver.waves.cancel(driver.waves.open[number])
        if found.cancel:
            waves = plural(len(found.cancel), "wave")
            self._around.say(f"the slack is gone: {waves} cancelled, and live calls do what these have not")
        driver.woken()
        return situation.step_s

    def _work_of(self, pending: Pending) -> Work:
        before = pending.work
        if before.attempt == 1:
            # It may have been in a wave: only live calls have a history that goes on.
            before = replace(before, first_launched_s=-1.0, retry_at_s=-1.0)
        return work_of(before.request, self.run_.policy, before=before)

    def _situation(self, waiting: list[Pending], now: float) -> Situation:
        run, waves, place = self.run_, self.driver.waves, self.place
        candidates = [self._candidate(each) for each in waiting]
        mean_tokens = run.meter.left_tokens / max(1, run.meter.left)
        batches = []
        for wave in waves.open.values():
            if wave.stage in (WaveStage.COLLECTED, WaveStage.CLOSED):
                continue
            left = wave.requests - wave.completed - wave.failed
            is_cancelling = wave.is_cancelled or wave.stage is WaveStage.ENDED
            submitted_at = wave.submitted_at if wave.stage is WaveStage.SUBMITTED else now
            begun = wave.completed + wave.failed > 0
            tokens = int(wave.tokens)
            batches.append(
                OpenBatch(
                    wave.number, wave.lane.model, tokens, left, left * mean_tokens, submitted_at, begun, is_cancelling
                )
            )
        going = len(place.given - place.ended)
        usable = min((waves.ledger(each.model).usable for each in candidates), default=float("inf"))
        return Situation(
            now=now,
            deadline=self._deadline_at,
            waiting=candidates,
            batches=batches,
            live=live_rate(run.policy, run.meter.service_s or run.assumed_s),
            live_left=(going, going * mean_tokens),
            queue_tokens=usable,
            file_requests=self._around.lines,
            step_s=step_s(now, self._deadline_at),
            turnaround=self._turnaround(),
        )

    def _candidate(self, pending: Pending) -> Candidate:
        request = pending.work.request
        sizes = request.sizes
        used = Usage(sizes.prompt_tokens, round(assumed_answer(sizes)))
        usd = {
            tier: price.cost_usd(used) if (price := self._spent.price(request.model, tier)) else None
            for tier in (STANDARD, BATCH, FLEX)
        }
        standard, batch = usd[STANDARD] or 0.0, usd[BATCH] or 0.0
        can_flex = usd[FLEX] is not None and request.tier == STANDARD and self._around.now() >= self._flex_from
        tokens = float(reserve_of(self.run_.policy, sizes))
        return Candidate(request.index, request.model, sizes.prompt_tokens, tokens, standard - batch, can_flex)

    def _turnaround(self) -> Turnaround:
        """Return what is believed of the turnaround: assumed, until enough batches of this run have been completed."""
        done = [row for row in self.driver.ended_rows if row.status == COMPLETED and row.created_epoch_s >= 0.0]
        times = [row.ended_epoch_s - row.created_epoch_s for row in done]
        found = fitted(times)
        if found is None:
            return turnaround_of(*TURNAROUND_S, expires_s=EXPIRES_S)
        p50, p95, factor = found
        return turnaround_of(p50, p95, expires_s=EXPIRES_S, factor=factor, measured=len(times))


def is_out_of_capacity(answer: Answer) -> bool:
    """Return whether a flex attempt was refused, unbilled, for lack of capacity."""
    said = f"{answer.error_code} {answer.message}".lower().replace("_", " ")
    return answer.status in (429, 498) and ("resource unavailable" in said or answer.status == 498)


class AutoRun(LiveRun):
    """One leg. Create it and await `run()` once. `finish_by_s`: seconds from now."""

    def __init__(
        self,
        leg: Leg,
        connect: Connect,
        connect_batch: ConnectBatch,
        shown: Display,
        manner: RunOptions,
        *,
        finish_by_s: float,
        keep_files: bool,
    ) -> None:
        super().__init__(leg, connect, shown, replace(manner, finish_by_s=None))
        self.connect_batch = connect_batch
        self.mixers: dict[str, Mixer] = {}
        self._clients: list[BatchClient] = []
        self._finish_by_s = finish_by_s
        self._keep_files = keep_files

    async def run(self) -> Ended:
        """Run until no work is left or the run is stopped. Raise JournalError if nothing can be recorded any more."""
        ended = await super().run()
        # Attempts of batches are not in the tallies of live calls.
        return replace(ended, tallies={})

    def _begin(self) -> None:
        super()._begin()
        journal = self.leg.journal
        numbers = count(max((row.wave for row in journal.waves()), default=0) + 1)
        for name, run in self.runs.items():
            self.mixers[name] = self._mixer(name, run, numbers)

    def _mixer(self, name: str, run: PoolRun, numbers: Iterator[int]) -> Mixer:
        journal, manner, pool = self.leg.journal, self.manner, self.leg.pools[name]
        client = self.connect_batch(pool)
        self._clients.append(client)
        around = DriverContext(
            now=run.governor.now,
            say=lambda line: self.say(self._of(name) + line),
            flushed=journal.flushed,
            in_thread=asyncio.to_thread,
            numbers=numbers,
            run_id=run_id(journal),
            began_epoch_s=journal.run().epoch_s,
            seed=journal.run().seed,
            keep_files=self._keep_files,
            spool=journal.downloads,
            purse=None if manner.max_cost is None else WaveBudget(self.leg.spent, manner.max_cost),
            elsewhere=lambda request: request not in self.mixers[name].place.batch,
            leaves_large=True,
            lines=batch_lines(self.leg.left[name][0], FILE_LINES),
        )
        observers: list[Observer | None] = [
            run.recorder,
            Spender(self.leg.spent),
            _Elsewhere(run),
            Follower(manner.follow) if manner.follow is not None else None,
            manner.metrics.observer(name) if manner.metrics is not None else None,
        ]
        together = Together([each for each in observers if each is not None])
        driver = WaveDriver(pool, client, journal, together, journal.wave_recorder(name), around)
        mixer = Mixer(run, driver, around, self.leg, self.began_s + self._finish_by_s)
        run.governor.observe(Together([run.governor.observer, _Heard(mixer)]))
        return mixer

    async def _work(self) -> None:
        async def one(mixer: Mixer) -> None:
            mixer.run_.ending = await mixer.run()

        async with asyncio.TaskGroup() as group:
            for mixer in self.mixers.values():
                group.create_task(one(mixer))

    def stop(self, why: str) -> None:
        """Launch and submit nothing more in any pool; batches at the provider go on without us."""
        super().stop(why)
        for mixer in self.mixers.values():
            mixer.leave(why)

    def _compare(self) -> None:
        """Do nothing: no forecast says how a mix keeps to its time."""

    async def _close_down(self) -> None:
        await super()._close_down()
        for client in self._clients:
            await client.aclose()


# ---------------------------------------------------------------- observers


class _Heard(Observer):
    """Tells the planner which requests live calls have ended."""

    def __init__(self, mixer: Mixer) -> None:
        self._place = mixer.place

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        self._place.ended.add(request.index)
        self._place.flex.discard(request.index)


class _Elsewhere(Observer):
    """Counts the requests that batches have ended in the figures of the pool's progress."""

    def __init__(self, run: PoolRun) -> None:
        self._run = run

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        meter = self._run.meter
        meter.left_tokens -= reserve_of(self._run.policy, request.sizes)
        meter.ended(request, failure, answer, now)

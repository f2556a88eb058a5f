"""Carries out what `Waves` decides for one pool: calls the provider, and records each step before the next is taken.

Nothing counts that is not in the journal: a wave's requests before its file is uploaded, the file's id before a batch
is created of it, the batch's id before it is polled, each answer before the files are deleted. So a process may be
killed at any moment, and the next one goes on from the journal and from what the account holds under the wave's name
(files) or metadata (batches).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, BinaryIO, ClassVar, cast

from governor.batchapi.client import BatchClient, CallFailed, Complaint, RemoteBatch
from governor.batchapi.collect import SPOOL_BYTES, Collector, DriverContext
from governor.batchapi.limits import BATCH_CANCELLED, CANCELLED, FAILED, FINALIZING, TOKEN_LIMIT_EXCEEDED
from governor.batchapi.lines import input_line, inputs_of, limit_in, metadata_of, name_of, prefix_of
from governor.batchapi.waves import ALONE_MOST, Act, PlanWave, Wave, WaveLane, Waves, WaveStage, WaveStep, retry_wait_s
from governor.journal.records import Records
from governor.journal.rows import Pending
from governor.journal.waves import WaveRecorder, WaveRow
from governor.model.errors import FailureCode, quoted
from governor.model.pools import Pool
from governor.model.requests import Answer, Outcome, Scope
from governor.model.words import plural
from governor.model.work import FINAL, STOPPING, Observer

# Reasons to stop, beside the failure codes of an account that is refused.
REFUSED, CANCELLED_THERE, MAX_COST = "REFUSED", "BATCH_CANCELLED", "MAX_COST"
# Why a wave was cancelled, on record before the call: who finds it cancelled then knows that it was us.
MOVED = "cancelled by this run: its slack was gone"
# One line for calls that fail, until none has failed for so long.
_QUIET_S = 300.0
# Times that leftover files are looked for at the end, while calls fail.
_SWEEPS = 5
# The account's batches of a day before the run are looked through too: its clock may differ from ours.
_SINCE_S = 86_400.0


@dataclass(slots=True)
class _Formed:
    """Requests for a wave. `least`: tokens of the next, which did not fit. `is_dear`: it would exceed the budget."""

    taken: list[int] = field(default_factory=list)
    tokens: int = 0
    bytes: int = 0
    usd: float = 0.0
    least: float = 0.0
    is_dear: bool = False
    too_large: list[Pending] = field(default_factory=list)


class WaveDriver:
    """Runs the waves of one pool. Create it in an event loop and await `run` once."""

    def __init__(
        self,
        pool: Pool,
        client: BatchClient,
        journal: Records,
        observer: Observer,
        recorder: WaveRecorder,
        around: DriverContext,
    ) -> None:
        self.pool = pool
        self.client = client
        self.waves = Waves(pool.policy.batch_queue_tokens)
        self.rows: dict[int, WaveRow] = {}
        self._journal = journal
        self._recorder = recorder
        self._around = around
        self._news = asyncio.Event()
        self._collector = Collector(pool, client, journal, observer, recorder, around)
        self._leaving = asyncio.Event()
        self._is_resumed = False
        # When a wave last came further, seconds since 1970; 0 = no wave is open.
        self.moved_epoch = 0.0
        self.ended_rows: list[WaveRow] = []
        self._quiet_until = 0.0

    def halt(self, why: str) -> None:
        """Submit nothing more; waves under way go on, and `run` returns when they have ended."""
        self.waves.halted = self.waves.halted or why
        self._news.set()

    def leave(self) -> None:
        """Let `run` return after the call under way; batches at the provider go on without us."""
        self._leaving.set()
        self._news.set()

    def woken(self) -> None:
        """Ask for decisions again, after a change of `waves` from outside."""
        self._news.set()

    async def run(self) -> str:
        """Run until nothing is left, or nothing more may be submitted; return why the latter, "" = all is done.

        May be cancelled at any moment, and begun again by another driver of the same journal.
        """
        self.resume()
        while not self.waves.is_over and not self._leaving.is_set():
            now = self._around.now()
            due = self.waves.decide(now)
            for instruction in due:
                if self._leaving.is_set():
                    return self.waves.halted
                await self._around.may_call()
                async with self._around.lock:
                    if isinstance(instruction, PlanWave):
                        await self._plan(instruction)
                    else:
                        await self._step(instruction)
            if not due:
                await self._wait(self.waves.wake_at - now)
        if not self._around.keep_files and not self._leaving.is_set():
            await self._sweep()
        return self.waves.halted

    def resume(self) -> None:
        """Take up the waves and the pending requests of the journal; `run` does so if it was not done before."""
        if self._is_resumed:
            return
        self._is_resumed = True
        for row in self._journal.waves(self.pool.name):
            if row.stage == WaveStage.CLOSED:
                continue
            self.rows[row.wave] = row
            lane = WaveLane(row.model, row.url)
            wave = Wave(row.wave, lane, row.requests, row.tokens, stage=WaveStage(row.stage), status=row.status)
            wave.submitted_at = row.submitted_s
            wave.is_cancelled = row.message == MOVED
            self.waves.resumed(wave)
            if (purse := self._around.purse) is not None:
                held = self._journal.held_by(row.wave)
                purse.committed(row.wave, sum(purse.cost_usd(pending.work.request) for pending in held))
        for model, url, retry_at_s, requests, tokens in self._journal.lanes(self.pool.name):
            self.waves.offered(WaveLane(model, url), requests, float(tokens), retry_at_s)
        ended = [row for row in self._journal.waves(self.pool.name) if row.ended_s >= 0.0]
        # Those that are yet to be collected come when they are closed.
        self.ended_rows = [row for row in ended if row.wave not in self.rows]
        for row in ended:
            if row.completed == row.requests and row.real_tokens > 0 and row.tokens > 0.0:
                self.waves.ledger(row.model).measured(row.tokens, row.real_tokens)

    async def _wait(self, seconds: float) -> None:
        """Wait for that time (inf = without end) or for news."""
        try:
            async with asyncio.timeout(None if seconds == inf else max(seconds, 0.0)):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()

    # ------------------------------------------------------------ forming a wave

    async def _plan(self, plan: PlanWave) -> None:
        now, purse = self._around.now(), self._around.purse
        left_usd = purse.left_usd() if purse is not None else inf
        formed = await self._around.in_thread(lambda: self._formed(plan, now, left_usd))
        taken, least, too_large = formed.taken, formed.least, formed.too_large
        for pending in too_large:
            self._collector.never_fits(pending, plan.tokens_ever, self.waves.ledger(plan.lane.model).limit)
            self.waves.withdrawn(plan.lane, 1, pending.work.request.sizes.prompt_tokens)
        await self._around.flushed()
        if not taken:
            if purse is not None and formed.is_dear:
                self._around.say(purse.text())
                self.halt(MAX_COST)
            self.waves.not_planned(plan.lane, least)
            return
        number, tokens = next(self._around.numbers), float(formed.tokens)
        model, url = plan.lane
        row = WaveRow(
            number, self.pool.name, model, url, len(taken), tokens, formed.bytes, WaveStage.PLANNED, planned_s=now
        )
        self._recorder.planned(row, taken)
        await self._around.flushed()
        self.rows[number] = row
        self.waves.planned(plan.lane, number, len(taken), tokens)
        if purse is not None:
            purse.committed(number, formed.usd)

    def _formed(self, plan: PlanWave, now: float, left_usd: float) -> _Formed:
        """Return the requests of the next wave, in the order of the input, as far as they fit."""
        found, purse = _Formed(), self._around.purse
        inputs, most = 0, min(plan.lines, self._around.lines)
        for pending in self._journal.eligible(self.pool.name, plan.lane.model, plan.lane.url, now):
            request = pending.work.request
            if self._around.elsewhere(request.index):
                continue
            more = request.sizes.prompt_tokens
            size, given = len(input_line(request)), inputs_of(request)
            if more > plan.tokens_ever or size > plan.bytes:
                if not self._around.leaves_large:
                    found.too_large.append(pending)
                continue
            usd = purse.cost_usd(request) if purse is not None else 0.0
            is_full = found.tokens + more > plan.tokens and (found.taken or not plan.is_alone)
            is_full = is_full or len(found.taken) == most or found.bytes + size > plan.bytes
            found.is_dear = found.usd + usd > left_usd
            if is_full or found.is_dear or inputs + given > plan.inputs:
                found.least = float(more)
                break
            found.taken.append(request.index)
            found.tokens += more
            found.bytes += size
            found.usd += usd
            inputs += given
        return found

    # ------------------------------------------------------------ the steps of a wave

    async def _step(self, step: WaveStep) -> None:
        wave = step.wave
        if wave.number not in self.waves.open:
            return
        try:
            await self._DO[step.act](self, wave)
        except CallFailed as failed:
            self._failed(step, failed.answer)
            await self._around.flushed()
        except OSError as error:
            # Of the disk, such as no room for a download: what the provider sends or not is a `CallFailed`.
            self._failed(step, Answer(Outcome.LOCAL, message=str(error)))

    def _failed(self, step: WaveStep, answer: Answer) -> None:
        """Decide what follows from a call that did not succeed."""
        wave, row = step.wave, self.rows[step.wave.number]
        what = f"{self._of(wave)}: {step.act} failed" + (f" ({answer.status})" if answer.status else "")
        said = f"{what}: {answer.message}"
        if step.act is Act.CREATE and row.file_id and row.file_id in answer.message and answer.status in (400, 404):
            # The file is gone: it is uploaded again.
            self._changed(wave, stage=WaveStage.PLANNED, file_id="")
            wave.stage = WaveStage.PLANNED
            return
        if step.act is Act.CANCEL and answer.status in (400, 409):
            wave.status = FINALIZING  # it has ended meanwhile, or will before it is cancelled
            return
        if answer.outcome in STOPPING:
            why: str = STOPPING[answer.outcome]
        elif (answer.outcome in FINAL and answer.outcome is not Outcome.MALFORMED) or answer.scope is Scope.ADDRESS:
            why = REFUSED
        else:
            happened = answer.outcome in _UNKNOWN
            wait_s = min(answer.retry_after_s, self.pool.policy.retry_after_cap_seconds)
            self.waves.call_failed(wave, wait_s, self._around.now(), may_have_happened=happened)
            if self._around.now() >= self._quiet_until:
                self._around.say(f"{said}; it is tried again until it succeeds")
            self._quiet_until = self._around.now() + _QUIET_S
            return
        remedy = _REMEDIES.get(why, "") or _REMEDIES_OF.get(answer.status, "")
        self._around.say(f"{said}; nothing more is submitted{remedy}: {self._around.again} goes on from here")
        self.halt(why)
        if step.act in (Act.UPLOAD, Act.CREATE):
            self._give_back(wave)
        else:
            # What is at the provider stays there, and the next process goes on with it.
            self.waves.open.pop(wave.number)

    def _give_back(self, wave: Wave, message: str = "") -> None:
        """Make the requests of a wave that did not come about pending again; its file is deleted."""
        self._recorder.returned(wave.number)
        self._changed(wave, stage=WaveStage.COLLECTED, message=message)
        self.waves.collected(wave)
        self.waves.offered(wave.lane, wave.requests, wave.tokens)

    async def _look_up(self, wave: Wave) -> None:
        """Find out whether the step in doubt has happened."""
        row = self.rows[wave.number]
        if wave.stage is WaveStage.PLANNED:
            name = name_of(self._around.run_id, wave.number)
            found = [file for file in await self.client.files() if file.name == name]
            for file in found[1:]:
                await self.client.delete(file.id)
            if found:
                await self._uploaded(wave, found[0].id)
            else:
                self.waves.looked_up(wave, self._around.now())
            return
        mark = metadata_of(self._around.run_id, wave.number)
        since = self._around.began_epoch_s - _SINCE_S
        ours = [b for b in await self.client.batches(since) if mark.items() <= (b.metadata or {}).items()]
        if not ours:
            self.waves.looked_up(wave, self._around.now())
            return
        assert row.file_id
        for extra in ours[:-1]:
            if not extra.has_ended:
                await self.client.cancel(extra.id)
        await self._created(wave, ours[-1])

    async def _upload(self, wave: Wave) -> None:
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:

            def build() -> None:
                for pending in self._journal.held_by(wave.number, bodies_too=True):
                    spool.write(input_line(pending.work.request))
                spool.seek(0)

            await self._around.in_thread(build)
            # A file in all but its declared type.
            file = await self.client.upload(name_of(self._around.run_id, wave.number), cast(BinaryIO, spool))
        await self._uploaded(wave, file.id)

    async def _uploaded(self, wave: Wave, file_id: str) -> None:
        self._changed(wave, stage=WaveStage.UPLOADED, file_id=file_id)
        await self._around.flushed()
        self.waves.uploaded(wave)
        wave.is_certain = True

    async def _create(self, wave: Wave) -> None:
        mark = metadata_of(self._around.run_id, wave.number)
        await self._created(wave, await self.client.create(self.rows[wave.number].file_id, wave.lane.url, mark))

    async def _created(self, wave: Wave, batch: RemoteBatch) -> None:
        now = self._around.now()
        stamp = batch.created_epoch_s
        self._changed(wave, stage=WaveStage.SUBMITTED, batch_id=batch.id, submitted_s=now, created_epoch_s=stamp)
        await self._around.flushed()
        self.waves.created(wave, now)

    async def _poll(self, wave: Wave) -> None:
        await self._heard(wave, await self.client.retrieve(self.rows[wave.number].batch_id))

    async def _cancel(self, wave: Wave) -> None:
        """Cancel a wave; one that has not become a batch comes back at once."""
        if wave.stage is not WaveStage.SUBMITTED:
            self._give_back(wave)
            await self._around.flushed()
            return
        self._changed(wave, message=MOVED)
        await self._around.flushed()
        await self._heard(wave, await self.client.cancel(self.rows[wave.number].batch_id))

    async def _heard(self, wave: Wave, batch: RemoteBatch) -> None:
        """Take in the state of a batch."""
        counts = {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
        now = self._around.now()
        if not batch.has_ended:
            if (batch.completed, batch.failed) != (wave.completed, wave.failed):
                self.moved_epoch = time.time()
            if batch.status != wave.status or batch.total != wave.total:
                self._changed(wave, status=batch.status, **counts)
                await self._around.flushed()
            self.waves.polled(wave, batch.status, **counts, now=now)
            return
        ids = {"output_file_id": batch.output_file_id, "error_file_id": batch.error_file_id}
        times = {"ended_s": now, "ended_epoch_s": batch.ended_epoch_s, "real_tokens": batch.input_tokens}
        if batch.status == FAILED:
            self._changed(wave, status=FAILED, **counts, **times)
            self.waves.ended(wave, FAILED, 0, 0, 0, -1)
            await self._invalid(wave, batch.complaints)
            await self._around.flushed()
            return
        self._changed(wave, stage=WaveStage.ENDED, status=batch.status, **counts, **ids, **times)
        await self._around.flushed()
        if batch.status == CANCELLED and not wave.is_cancelled:
            self._around.say(
                f"{self._of(wave)} was cancelled by another user or program of the account: nothing more is submitted; "
                f"what it has answered is kept, and {self._around.again} submits the rest again"
            )
            self.halt(CANCELLED_THERE)
        self.waves.ended(wave, batch.status, **counts, real_tokens=batch.input_tokens)

    async def _invalid(self, wave: Wave, complaints: tuple[Complaint, ...]) -> None:
        """Decide what follows from a batch that failed before any of its lines was executed."""
        first = complaints[0] if complaints else Complaint("", "the provider gives no reason", 0)
        full = next((each for each in complaints if each.code == TOKEN_LIMIT_EXCEEDED), None)
        now = self._around.now()
        if full is not None:
            limit = limit_in(full.message)
            known = f" (limit {limit:,})" if limit else ""
            if self.waves.queue_refused(wave, limit, now) and not self._around.leaves_large:
                await self._collector.refused_alone(wave, full.message)
                self._changed(wave, stage=WaveStage.COLLECTED, message=full.message)
                self._around.say(
                    f"{self._of(wave)}: the queue{known} was full for it {ALONE_MOST} times: it has failed"
                )
                return
            self._give_back(wave, full.message)
            self._around.say(f"{self._of(wave)}: the queue of {wave.lane.model} is full{known}: it is submitted later")
            return
        blamed = {each.line: each for each in complaints if each.line > 0}
        if blamed:
            again, tokens = await self._collector.blamed(wave, blamed)
            self._recorder.returned(wave.number)
            self._changed(wave, stage=WaveStage.COLLECTED, message=first.message)
            self.waves.collected(wave)
            self.waves.offered(wave.lane, again, tokens)
            self._around.say(
                f"{self._of(wave)}: {plural(len(blamed), 'line')} refused ({first.message}): recorded as failed; the "
                "others are submitted again"
            )
            return
        self._around.say(
            f"{self._of(wave)} was refused ({first.code or FAILED}): {first.message}; nothing more is submitted, and "
            "its requests are pending: correct it, or run them live"
        )
        self._give_back(wave, first.message)
        self.halt(_STOPS.get(first.code, REFUSED))

    async def _collect(self, wave: Wave) -> None:
        row = self.rows[wave.number]
        found = await self._collector.collect(wave, row)
        self._changed(wave, stage=WaveStage.COLLECTED)
        await self._around.flushed()
        self.waves.collected(wave)
        if found.stops:
            self.halt(found.stops)
        self.waves.offered(wave.lane, found.requests, found.tokens, found.eligible_at)

    async def _clean(self, wave: Wave) -> None:
        """Delete the wave's files, once all they hold is on record."""
        row = self.rows[wave.number]
        self._collector.forget(row)
        if not self._around.keep_files:
            for file_id in filter(None, (row.file_id, row.output_file_id, row.error_file_id)):
                await self.client.delete(file_id)
        self._changed(wave, stage=WaveStage.CLOSED)
        await self._around.flushed()
        self.waves.closed(wave)
        self.ended_rows.append(self.rows.pop(wave.number))

    async def _sweep(self) -> None:
        """Delete input files of this run that an interrupted upload has left without a wave."""
        kept = {row.file_id for row in self.rows.values()}
        for tried in range(1, _SWEEPS + 1):
            try:
                for file in await self.client.files():
                    if file.name.startswith(prefix_of(self._around.run_id)) and file.id not in kept:
                        await self.client.delete(file.id)
                return
            except CallFailed as failed:
                if tried == _SWEEPS or failed.answer.outcome not in _UNKNOWN:
                    self._around.say(f"note: leftover files were not looked for: {failed.answer.message}")
                    return
                await self._wait(retry_wait_s(tried))

    def _changed(self, wave: Wave, **values: Any) -> None:
        self.moved_epoch = time.time() if len(self.waves.open) > 1 or values.get("stage") != WaveStage.CLOSED else 0.0
        if values.get("stage") == WaveStage.COLLECTED and self._around.purse is not None:
            self._around.purse.released(wave.number)
        self.rows[wave.number] = self.rows[wave.number]._replace(**values)
        self._recorder.changed(wave.number, **values)

    def _of(self, wave: Wave) -> str:
        """Return a wave's name for people."""
        batch_id = self.rows[wave.number].batch_id
        batch = f", batch {quoted(batch_id)[1:-1]}" if batch_id else ""
        number = wave.number - self._around.wave_before
        return f"wave {number} ({plural(wave.requests, 'request')} to {wave.lane.model}{batch})"

    _DO: ClassVar[Mapping[Act, Callable[[WaveDriver, Wave], Awaitable[None]]]] = {
        Act.LOOK_UP: _look_up,
        Act.UPLOAD: _upload,
        Act.CREATE: _create,
        Act.POLL: _poll,
        Act.CANCEL: _cancel,
        Act.COLLECT: _collect,
        Act.CLEAN: _clean,
    }


# After these it is unknown whether the call has reached the provider.
_UNKNOWN = (Outcome.TIMEOUT, Outcome.DROPPED, Outcome.SERVER_ERROR, Outcome.OVERLOADED, Outcome.MALFORMED)
_STOPS = {
    "billing_hard_limit_reached": FailureCode.INSUFFICIENT_QUOTA,
    "insufficient_quota": FailureCode.INSUFFICIENT_QUOTA,
    BATCH_CANCELLED: CANCELLED_THERE,
}
_REMEDIES: dict[str, str] = {
    FailureCode.INSUFFICIENT_QUOTA: " until the account has credit",
    FailureCode.UNAUTHORIZED: " until the key is right",
}
_REMEDIES_OF = {
    403: " until the account may use the Batch API (or run it live)",
    404: " until the address and the key are those of an account with the Batch API (or run it live)",
}

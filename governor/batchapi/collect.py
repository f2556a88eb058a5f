"""Takes the answers of an ended batch into the journal, each exactly once, and says what is to be submitted again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from governor.batchapi.client import BatchClient, CallFailed, Complaint
from governor.batchapi.limits import CANCELLED, EXPIRED, FILE_BYTES, FILE_LINES, TOKEN_LIMIT_EXCEEDED
from governor.batchapi.lines import answered_in, expired, verdict
from governor.batchapi.waves import ALONE_MOST, Wave
from governor.journal.records import Records
from governor.journal.rows import Pending
from governor.journal.waves import WaveRecorder, WaveRow
from governor.model.errors import FailureCode
from governor.model.pools import Pool
from governor.model.requests import BATCH, Answer, Attempt, Outcome, Request
from governor.model.words import plural
from governor.model.work import Observer
from governor.provider.answers import dropped, malformed

# Answers recorded in one transaction.
_LINES_AT_A_TIME = 500
# Files above this size are built, or read, on the disk.
SPOOL_BYTES = 16 * 2**20
_GONE = (404, 410)


async def _always() -> None:
    pass


class Purse(Protocol):
    """A budget of money. A wave is committed at what its requests may cost, from its forming to its collection."""

    def cost_usd(self, request: Request) -> float:
        """Return what a request may cost by the Batch API, in US dollars."""

    def left_usd(self) -> float:
        """Return how much may still be committed; negative if the budget is used up."""

    def text(self) -> str:
        """Return the line for a run that the budget has stopped."""

    def committed(self, wave: int, usd: float) -> None:
        """A wave was formed, or found in the journal."""

    def released(self, wave: int) -> None:
        """A wave's answers are known, and what they cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverContext:
    """What a driver needs of the process around it.

    `now`: seconds since the run began, at `began_epoch_s`, since 1970. `flushed`: returns when every report is on
    the disk. `in_thread`: calls a function that takes long, away from the event loop. `numbers`: yields the number
    of the next wave, of all pools. `purse`: the money that waves may cost. `elsewhere`: whether a pending request
    goes another way. `lines`: most requests of a wave. `leaves_large`: what fits into no queue stays pending, for
    another way. `lock`: held during each step, so that what a planner reads in between is consistent. `may_call`:
    awaited before each step; raises once another process has this one's requests. `wave_before`: the number before
    the first wave, for counting them from 1. `spool`: the folder that keeps downloads until they are on record,
    None = none does. `again`: what goes on after a stop.
    """

    now: Callable[[], float]
    say: Callable[[str], None]
    flushed: Callable[[], Awaitable[None]]
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    numbers: Iterator[int]
    run_id: str
    began_epoch_s: float
    seed: int = 0
    keep_files: bool = False
    purse: Purse | None = None
    spool: Path | None = None
    elsewhere: Callable[[int], bool] = lambda request: False
    lines: int = FILE_LINES
    leaves_large: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    may_call: Callable[[], Awaitable[None]] = _always
    wave_before: int = 0
    again: str = "the same command"


class ReturnedRequests(NamedTuple):
    """What comes back of a wave: requests with their tokens, from when on, and why nothing more is submitted, or ""."""

    requests: int
    tokens: float
    eligible_at: float
    stops: str


class Collector:
    """Collects the waves of one pool; the parameters are the driver's."""

    def __init__(
        self,
        pool: Pool,
        client: BatchClient,
        journal: Records,
        observer: Observer,
        recorder: WaveRecorder,
        around: DriverContext,
    ) -> None:
        self._client = client
        self._journal = journal
        self._observer = observer
        self._recorder = recorder
        self._around = around
        # A deadline counts from the first launch, and is one of live requests.
        self._params = pool.policy.with_(deadline_seconds=0.0).params()
        self._stops = ""
        self._eligible_at = -1.0

    async def collect(self, wave: Wave, row: WaveRow) -> ReturnedRequests:
        """Record all answers of a wave, and let go of the rest of its requests. May raise `CallFailed`."""
        self._stops, self._eligible_at = "", -1.0
        held = {p.work.request.custom_id: p for p in await self._held_by(wave)}
        again: list[Pending] = []
        gone = ""
        # The errors first: what is left without the output is then known.
        files = list(filter(None, (row.error_file_id, row.output_file_id))) if held else []
        for number, file_id in enumerate(files[row.files_read :], row.files_read + 1):
            try:
                content = await self._downloaded(file_id)
            except CallFailed as failed:
                if failed.answer.status not in _GONE:
                    raise
                gone = file_id
                continue
            with content:
                await self._read(content, held, again, row)
            if not gone:
                self._recorder.changed(wave.number, files_read=number)
            await self._around.flushed()
        if held:
            self._settle_rest(list(held.values()), again, row, gone)
        self._recorder.returned(wave.number)
        await self._around.flushed()
        tokens = float(sum(p.work.request.sizes.prompt_tokens for p in again))
        return ReturnedRequests(len(again), tokens, self._eligible_at, self._stops)

    def _kept(self, file_id: str) -> Path | None:
        """Return where a download stays until its answers are on record."""
        folder = self._around.spool
        return None if folder is None else folder / f"{re.sub('[^0-9A-Za-z_-]', '_', file_id)}.jsonl"

    async def _downloaded(self, file_id: str) -> BinaryIO:
        """Return the content of a file, downloaded once, also if a process dies before its answers are on record."""
        path = self._kept(file_id)
        if path is None:
            # A file in all but its declared type; the caller closes it.
            spool = cast(BinaryIO, tempfile.SpooledTemporaryFile(SPOOL_BYTES))  # noqa: SIM115
            await self._client.download(file_id, spool)
            spool.seek(0)
            return spool
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as into:
                await self._client.download(file_id, into)
                into.flush()
                os.fsync(into.fileno())
            part.replace(path)
        return path.open("rb")

    def forget(self, row: WaveRow) -> None:
        """Remove what is left of a wave's downloads; its answers are on record."""
        for path in map(self._kept, filter(None, (row.error_file_id, row.output_file_id))):
            if path is not None:
                path.unlink(missing_ok=True)
                path.with_suffix(".part").unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # another wave's download is in it
                    path.parent.rmdir()

    async def _held_by(self, wave: Wave) -> list[Pending]:
        held: list[Pending] = await self._around.in_thread(lambda: list(self._journal.held_by(wave.number)))
        return held

    async def _read(self, content: BinaryIO, held: dict[str, Pending], again: list[Pending], row: WaveRow) -> None:
        """Record the answers in a file; each request is taken out of `held`."""
        settled = 0
        for raw in content:
            found = answered_in(raw, time.time()) if raw.strip() else None
            pending = held.pop(found.custom_id, None) if found is not None else None
            if found is None or pending is None:
                continue
            if found.answer is None:
                again.append(pending)
                continue
            self._settle(pending, found.answer, again, row)
            settled += 1
            if settled % _LINES_AT_A_TIME == 0:
                await self._around.flushed()

    def _settle_rest(self, left: list[Pending], again: list[Pending], row: WaveRow, gone: str) -> None:
        """Decide on the requests of which no file speaks."""
        if gone:
            self._around.say(
                f"wave {row.wave}: file {gone} of batch {row.batch_id} is gone, and with it "
                f"{plural(len(left), 'answer')} that were paid for: recorded as failed; "
                f"--retry-failed={FailureCode.UNREADABLE_ANSWER} buys them again"
            )
        for pending in left:
            if gone:
                self._settle(pending, malformed(f"the file that held its answer is gone ({gone})"), again, row)
            elif row.status == EXPIRED:
                self._settle(pending, expired(), again, row)
            elif row.status == CANCELLED:
                again.append(pending)
            else:
                self._settle(pending, dropped(f"batch {row.batch_id} has no answer to it"), again, row)

    def _settle(self, pending: Pending, answer: Answer, again: list[Pending], row: WaveRow) -> None:
        """Record one answer and what follows from it."""
        work, now = pending.work, self._around.now()
        request = work.request
        launched_at = max(row.submitted_s, 0.0)
        seed = self._around.seed
        found = verdict(self._params, answer, request.index, work.attempt, seed=seed, launched_at=launched_at, now=now)
        attempt = Attempt(
            request=request.index,
            custom_id=request.custom_id,
            pool=request.pool,
            model=request.model,
            url=request.url,
            lane=BATCH,
            attempt=work.attempt,
            submitted_s=0.0,
            eligible_s=max(row.planned_s, 0.0),
            launched_s=launched_at,
            finished_s=now,
            reserved_tokens=0,
            charged_tokens=-1,
            prompt_tokens=answer.used_prompt_tokens,
            output_tokens=answer.used_output_tokens,
            outcome=answer.outcome,
            status=answer.status,
            error_code=found.failure or answer.error_code,
            retry_after_s=answer.retry_after_s,
        )
        self._observer.attempted(attempt, answer, found.failure)
        if found.stops:
            self._stops = found.stops
            self._observer.suspended(attempt, answer)
            again.append(pending)
        elif found.retry_at >= 0.0:
            self._eligible_at = max(self._eligible_at, found.retry_at)
            self._observer.backed_off(attempt, answer, found.retry_at, work.attempt + 1)
            again.append(pending)
        else:
            self._observer.ended(request, found.failure, answer, now)
        self._recorder.let_go([request.index])

    # ------------------------------------------------------------ what never becomes an attempt

    def never_fits(self, pending: Pending, tokens_ever: float, limit: int) -> None:
        """Record a request that fits into no queue or no file as failed, unsent."""
        request = pending.work.request
        tokens = request.sizes.prompt_tokens
        if tokens > tokens_ever:
            text = f"it needs about {tokens:,} input tokens, {tokens_ever:,.0f} of a queue of {limit:,} are used"
        else:
            text = f"its line is longer than the {FILE_BYTES:,} bytes of a Batch file"
        answer = Answer(Outcome.TOO_LARGE, message=f"{text}: run it live")
        self._observer.ended(request, FailureCode.REQUEST_TOO_LARGE, answer, self._around.now())

    async def refused_alone(self, wave: Wave, message: str) -> None:
        """Record the only request of a wave, for which the queue is full whenever it comes, as failed."""
        for pending in await self._held_by(wave):
            request = pending.work.request
            text = f"the queue refused it {ALONE_MOST} times with nothing else of this run in it: {message}"
            answer = Answer(Outcome.TOO_LARGE, error_code=TOKEN_LIMIT_EXCEEDED, message=text)
            self._observer.ended(request, FailureCode.REQUEST_TOO_LARGE, answer, self._around.now())
            self._recorder.let_go([request.index])

    async def blamed(self, wave: Wave, complaints: Mapping[int, Complaint]) -> tuple[int, float]:
        """Record the lines of an invalid file that are at fault as failed; return requests and tokens of the others.

        `complaints`: by line, from 1.
        """
        others = [0]
        for line, pending in enumerate(await self._held_by(wave), 1):
            found, request = complaints.get(line), pending.work.request
            if found is None:
                others.append(request.sizes.prompt_tokens)
                continue
            answer = Answer(Outcome.BAD_REQUEST, error_code=found.code, message=found.message)
            self._observer.ended(request, FailureCode.BAD_REQUEST, answer, self._around.now())
            self._recorder.let_go([request.index])
        return len(others) - 1, float(sum(others))

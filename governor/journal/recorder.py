"""The journal's writing half: a driver's reports are gathered in memory and committed together.

Theory of operation. Reports are plain appends to a batch. The driver awaits `flushed` before it sends, and a commit
takes the whole batch to a thread of its own, which makes the JSON and waits for the disk; meanwhile further reports
gather in the next batch. One commit is under way at a time, so however many tasks wait, the disk sees one fsync after
another and each carries all reports made before it began (group commit). Reports that no task waits for, such as a
result with no launch after it, are committed LINGER_S after the first report.

Order. Batches are committed in order and each in one transaction, so the journal always holds a prefix of the reports:
a result is never there without the launch before it, nor half of an event's report. With each batch goes a checkpoint
of the law's state in every pool that reported, so its use agrees with the launches in the other rows.

Failure. A commit that fails (no room on the disk) leaves nothing behind; its batch goes back in front of later reports,
and every waiting task gets the `JournalError`, so that nothing is sent on an unrecorded launch. The next flush tries
again, unless it is unknowable what the disk has kept. A run would rather wait for room on a full disk
(`wait_for_room`): meanwhile nothing is sent, and arriving answers are kept in memory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from governor.journal.database import Database, JournalError
from governor.journal.reports import Batch, Calls, RequestMove
from governor.journal.schema import IN_FLIGHT, PENDING
from governor.law import State
from governor.model.lawcalls import RESTORED, numbers_of
from governor.model.policy import Policy
from governor.model.requests import LANES, Answer, Attempt, Request
from governor.model.work import Job, Observer, PoolState

# How long a result may be known and not yet on the disk: well below any launch gap or service time.
LINGER_S = 0.02
# Between two attempts to write to a full disk.
ROOM_S = 0.5


# ---------------------------------------------------------------- commits


@dataclass(slots=True, eq=False)
class _Commit:
    """A commit under way. `future` is the thread's; `over` is the event loop's, None outside one."""

    number: int
    batch: Batch
    future: concurrent.futures.Future[None]
    over: asyncio.Future[None] | None = None


class Writer:
    """Commits the reports gathered in `batch`. Used from one thread: the event loop's, or a program's own.

    Once reports have stopped, it may be closed from another thread, while the loop still waits for a commit.

    `trouble`: the error of the latest commit, None once one succeeds; after a lasting error nothing is written any
    more.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.batch = Batch()
        self.trouble: JournalError | None = None
        self.commits = 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "paceline-journal")
        self._filling = 1  # the number of the batch that is being filled
        self._durable = 0
        self._commit: _Commit | None = None
        self._hearing = threading.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._on_full: Callable[[str], None] | None = None
        self._gave_up = threading.Event()

    def wait_for_room(self, tell: Callable[[str], None]) -> None:
        """Wait for room on a full disk from now on.

        `tell`: called from another thread with how full it is, and with "" when there is room again.
        """
        self._on_full = tell

    def give_up(self) -> None:
        """Stop waiting for room: reports that are not on the disk fail."""
        self._gave_up.set()

    def touched(self) -> None:
        """Have the reports committed soon, whether a task waits for it or not."""
        if self._timer is None:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                return  # outside an event loop the reporting program commits, too
            self._timer = loop.call_later(LINGER_S, self._lingered)

    def _lingered(self) -> None:
        self._timer = None
        if self._commit is not None:
            self.touched()
        elif self.batch.holds_any() and not self._is_broken():
            self._begin(asyncio.get_running_loop())

    async def flushed(self) -> None:
        """Return when all earlier reports are on the disk. Raise JournalError if they cannot be written."""
        wanted = self._filling if self.batch.holds_any() else self._filling - 1
        while self._durable < wanted:
            if self._is_broken():
                assert self.trouble is not None
                raise self.trouble
            loop = asyncio.get_running_loop()
            commit = self._commit or self._begin(loop)
            if commit.future.done():
                self._settled(commit)  # over, and the event loop has not yet been told
                continue
            over = commit.over
            if over is None or over.get_loop() is not loop:
                over = asyncio.wrap_future(commit.future, loop=loop)  # of a loop that has ended meanwhile
            # Shielded: a task that is cancelled while it waits must not cancel the others' commit.
            await asyncio.shield(over)

    def commit(self) -> None:
        """Commit and wait in place: for a program without an event loop, and for the end of a run."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        under_way = self._commit
        if under_way is not None:
            concurrent.futures.wait([under_way.future])
            self._settled(under_way)
        if self.batch.holds_any():
            if not self._is_broken():
                commit = self._begin(None)
                concurrent.futures.wait([commit.future])
                self._settled(commit)
            if self.trouble is not None:
                raise self.trouble

    def close(self) -> None:
        """Commit the remaining reports and end the thread, also if that fails (JournalError)."""
        try:
            self.commit()
        finally:
            self._thread.shutdown()

    def abandon(self) -> None:
        """End the thread and drop reports that are not on the disk."""
        self.batch = Batch()
        self._thread.shutdown()

    def _is_broken(self) -> bool:
        return self.trouble is not None and not self.trouble.retryable

    def _begin(self, loop: asyncio.AbstractEventLoop | None) -> _Commit:
        assert self._commit is None, "one commit at a time"
        batch, self.batch = self.batch, Batch()
        batch.checkpoint()
        commit = _Commit(self._filling, batch, self._thread.submit(self._write, batch))
        self._commit = commit
        self._filling += 1
        if loop is not None:
            commit.over = asyncio.wrap_future(commit.future, loop=loop)
            # First in line: tasks that wait for the commit find it settled.
            commit.over.add_done_callback(lambda over: self._heard(over, commit))
        return commit

    def _heard(self, over: asyncio.Future[None], commit: _Commit) -> None:
        if not over.cancelled():
            over.exception()  # else asyncio complains if no task waited
        self._settled(commit)

    def _settled(self, commit: _Commit) -> None:
        """Settle a finished commit: its batch is on the disk, or comes back.

        Runs once per commit, from either thread.
        """
        with self._hearing:
            if commit is not self._commit:
                return
            self._commit = None
            error = commit.future.exception()
            if error is None:
                self.trouble = None
                self.commits += 1
                self._durable = commit.number
            else:
                self.trouble = error if isinstance(error, JournalError) else JournalError(f"internal error: {error!r}")
                self.batch = commit.batch.followed_by(self.batch)

    def _write(self, batch: Batch) -> None:
        was_full = False
        while True:
            try:
                self._write_once(batch)
            except JournalError as error:
                if self._on_full is None or not error.full or self._gave_up.is_set():
                    raise
                if not was_full:
                    self._on_full(error.full)
                was_full = True
                self._gave_up.wait(ROOM_S)
            else:
                if was_full and self._on_full is not None:
                    self._on_full("")
                return

    def _write_once(self, batch: Batch) -> None:
        with self.database.writing() as connection:
            for statement, rows in batch.statements():
                if rows:
                    connection.execute(statement, rows)


# ---------------------------------------------------------------- reports


class Recorder(Observer):
    """Records the reports of one pool's driver in one leg. Reports never raise; `flushed` may (JournalError).

    `state`: the law's state for the governor to continue from; None in a first leg, which begins with a fresh one.
    `trouble`: why the latest commit failed, None if it did not.
    """

    def __init__(self, writer: Writer, leg: int, pool: int, state: State | None = None) -> None:
        self.state = state
        self._writer = writer
        self._chain = leg, pool
        self._pool: PoolState | None = None

    def began(self, governor: PoolState) -> None:
        """Checkpoint this governor's state from now on."""
        self._pool = governor

    @property
    def trouble(self) -> JournalError | None:
        return self._writer.trouble

    def launched(self, job: Job, now: float) -> None:
        """Mark the request `in_flight`; durable, after `flushed`, before it is sent."""
        pool = None if job.request is None else job.request.pool
        move = RequestMove(IN_FLIGHT, LANES[job.lane], job.attempt, now, job.first_launched_s, pool=pool)
        self._reported().moved(job.index, move)
        if self._pool is not None and self._pool.late_s >= 0.0:
            self._writer.batch.timers.append((self._chain[1], self._pool.late_s))

    def _reported(self) -> Batch:
        """Return the batch that takes a report; it is committed soon."""
        batch = self._writer.batch
        if self._pool is not None:
            batch.pools[self._chain] = self._pool
        self._writer.touched()
        return batch

    async def flushed(self) -> None:
        """Return when all reports so far are on the disk."""
        await self._writer.flushed()

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        """Add a row of `attempts`.

        After an answer the request stays `in_flight` until `ended` comes, or the launch of its finalize pass.
        """
        batch = self._reported()
        batch.attempts.append((attempt, answer))

    def suspended(self, attempt: Attempt, answer: Answer) -> None:
        """Mark the request pending, as if this attempt had never been."""
        first_s = -1.0 if attempt.attempt == 1 and attempt.lane == LANES[0] else None
        move = RequestMove(PENDING, _lane_of(attempt), attempt.attempt, attempt.launched_s, first_s)
        self._reported().moved(attempt.request, move)

    def backed_off(self, attempt: Attempt, answer: Answer, retry_at_s: float, next_attempt: int) -> None:
        """Mark the request pending until its next attempt."""
        move = RequestMove(PENDING, _lane_of(attempt), next_attempt, attempt.launched_s, None, retry_at_s)
        self._reported().moved(attempt.request, move)

    def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
        """Mark the request `done` or `failed`, and keep its last answer."""
        self._reported().ends.append((request.index, failure, answer, now))

    def deferred(self, cause: int) -> None:
        """Count one more request that had to wait for that cause."""
        counts = self._reported().deferrals
        key = (*self._chain, cause)
        counts[key] = counts.get(key, 0) + 1

    def policy_changed(self, policy: Policy, at_s: float) -> None:
        """Record the settings from `at_s` on."""
        self._reported().policies.append((*self._chain, at_s, policy))


def _lane_of(attempt: Attempt) -> str:
    """Return the lane in which a request goes on: after an attempt by the Batch API, the one in which it began."""
    return attempt.lane if attempt.lane in LANES else LANES[0]


class FullRecorder(Recorder):
    """A recorder that also records every call of the law, for `verify`."""

    def __init__(self, writer: Writer, leg: int, pool: int, state: State | None = None) -> None:
        super().__init__(writer, leg, pool, state)
        self._sequence = 0
        if state is not None:
            # Converted to numbers at once: the governor changes the state from now on.
            self.decided(RESTORED, numbers_of((state,)), None)

    def decided(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Add one call to `decisions`. Bags among the arguments must not change afterwards."""
        chains = self._reported().decisions
        calls = chains.get(self._chain)
        if calls is None:
            calls = chains[self._chain] = Calls(self._sequence)
        calls.calls.append((name, arguments, result))
        self._sequence += 1

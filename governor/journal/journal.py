"""The journal of one run: every request, attempt and decision, durable before it counts.

A run's life is `create`, `ingest`, `begin`, `finish`; after a crash, or to go on, `open`, `begin`, `finish`.

    with Journal.create("out.db", fingerprint=print_, seed=1, epoch_s=time.time()) as journal:
        journal.ingest(works)
        recorder = journal.begin({"default": policy}, at_s=0.0).recorders["default"]
        governor = Governor(policy.params(), observer=recorder)
        await governor.run((pending.work for pending in journal.pending()), send)
        journal.finish(governor.now(), "finished")

`begin` takes stock: requests in flight when the last process ended are pending again and count as resent, ended
requests are never sent again, and the law's state continues from the last committed checkpoint, so that a new leg does
not burst into a minute that the old leg had used up.

Another process may read at any time (`open`), and may send the run a command (`ask`).
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, inspect, select, update

from governor import __version__
from governor.journal.checkpoint import rebuilt, taken_from
from governor.journal.database import Database, JournalError
from governor.journal.recorder import FullRecorder, Recorder, Writer
from governor.journal.records import Records
from governor.journal.rows import Command
from governor.journal.schema import (
    APPLICATION_ID,
    FAILED,
    IN_FLIGHT,
    PENDING,
    SCHEMA,
    TIMES,
    attempts,
    bodies,
    checkpoint_row,
    checkpoints,
    chunks,
    commands,
    deferrals,
    forecasts,
    legs,
    metadata,
    policies,
    pools,
    requests,
    results,
    run,
    settings_of,
    to_json,
    wave_requests,
)
from governor.journal.upgrade import bring_up_to_date, check_recognised
from governor.journal.waves import WaveRecorder
from governor.law import DAY_S, State
from governor.model.policy import Policy
from governor.model.requests import CAUSES, LANES, Outcome
from governor.model.work import Work

# Requests whose contents are removed in one transaction: overwritten contents pass through the WAL.
PURGE_ROWS = 2_000
PAUSE, RESUME, SET, UNSET = "pause", "resume", "set", "unset"


@dataclass(frozen=True, slots=True)
class LegBegun:
    """The result of `begin`. `leg` counts from 1.

    `resent`: requests that were in flight when the last process ended. `recorders`: one `Observer` per pool; if its
    `state` is not None, the governor must begin with that (`Governor(state=..., start_s=at_s)`). `notes`: messages for
    the user on where those states come from.
    """

    leg: int
    resent: int
    recorders: dict[str, Recorder]
    notes: tuple[str, ...] = ()


class Journal(Records):
    """One run's journal. Use `create` or `open`; close it, or use it as a context manager.

    Every method may raise `JournalError`: one line, with the remedy. Not for use by several threads at once.
    """

    def __init__(self, database: Database, writer: Writer | None) -> None:
        super().__init__(database)
        self._writer = writer
        self._leg = 0
        self._asked = 0

    # ------------------------------------------------------------ making and opening

    @classmethod
    def create(
        cls,
        where: str | os.PathLike[str],
        *,
        fingerprint: str,
        seed: int,
        epoch_s: float,
        version: str = __version__,
    ) -> Self:
        """Create a journal at that path or database URL, with the right to run it.

        `fingerprint`: of the input, see `fingerprint_of`. `epoch_s`: time zero of the run, seconds since 1970. Existing
        contents are never overwritten, except an empty database.
        """
        database = Database(where)
        try:
            database.made()
            database.locked()
            with database.writing() as connection:
                # Check again, since another process may have been quicker; outside SQLite this is the first check.
                taken = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
                if taken:
                    text = f"it holds tables of these names already ({', '.join(taken)}): name an empty database"
                    raise JournalError(f"{database.name}: {text}")
                metadata.create_all(connection)
                if database.is_sqlite:
                    connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
                row = {"fingerprint": fingerprint, "seed": seed, "epoch_s": epoch_s, "version": version}
                row |= {"id": 1, "schema": SCHEMA, "requests": -1, "purged_epoch_s": -1.0}
                connection.execute(insert(run), row)
        except BaseException:
            database.closed()
            raise
        return cls(database, Writer(database))

    @classmethod
    def open(cls, where: str | os.PathLike[str], *, to_run: bool = False, fingerprint: str = "") -> Self:
        """Open an existing journal: to read it and to send its run commands, or `to_run` it.

        Raise JournalError if there is none, if it is not ours, from a newer Paceline or damaged, if its input was
        another one (`fingerprint`, if given), and, `to_run`, if another process runs it.
        """
        database = Database(where, writable=to_run)
        try:
            check_recognised(database)
            if to_run:
                database.locked()
                bring_up_to_date(database)
            journal = cls(database, Writer(database) if to_run else None)
            if fingerprint and journal.run().fingerprint != fingerprint:
                text = "it belongs to another input: name another file with --journal, or use that input"
                raise JournalError(f"{database.name}: {text}")
        except BaseException:
            database.closed()
            raise
        return journal

    @staticmethod
    def exists(where: str | os.PathLike[str]) -> bool:
        """Return whether to `open` rather than to `create`: something is there (`open` determines what it is)."""
        database = Database(where, writable=False)
        try:
            if not database.is_sqlite:
                with database.reading() as connection:
                    return inspect(connection).has_table(run.name)
            return not database.is_empty()
        except JournalError:
            return True
        finally:
            database.closed()

    def is_running(self) -> bool:
        """Return whether a process runs this journal now."""
        return self._database.is_locked()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit the reports and release everything, also if committing fails (JournalError)."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._writer = None
            self._database.closed()

    def remove(self) -> None:
        """Close the journal and remove it: for a journal whose input turned out to be invalid while it was filled."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        if not self._database.is_sqlite:
            with self._database.writing() as connection:
                metadata.drop_all(connection)
        self._database.removed()

    def writing(self) -> AbstractContextManager[Connection]:
        """Open a transaction of the process that runs the journal, for code in separate modules (`amend`)."""
        self._running()
        return self._database.writing()

    @property
    def downloads(self) -> Path | None:
        """The folder beside the journal for what is downloaded and not yet on record; None for a database elsewhere."""
        path = self._database.path
        return None if path is None else path.with_name(f"{path.name}.downloads")

    def reading(self) -> AbstractContextManager[Connection]:
        """Open a connection to read from, for code in separate modules (`facts`)."""
        return self._database.reading()

    def _running(self) -> Writer:
        assert self._writer is not None, "opened for reading, not to run"
        return self._writer

    # ------------------------------------------------------------ filling

    def ingest(self, works: Iterable[Work]) -> int:
        """Store all requests of the input, in its order, and return how many; they must have bodies.

        Streams, in transactions of a few hundred. After a process that was killed before the end, it begins again.
        """
        self._running()
        assert self.run().requests < 0, "filled already"
        with self._database.writing() as connection:
            connection.execute(delete(requests))
            connection.execute(delete(bodies))
        count = 0
        for rows, texts in chunks(works):
            with self._database.writing() as connection:
                connection.execute(insert(requests), rows)
                connection.execute(insert(bodies), texts)
            count += len(rows)
        with self._database.writing() as connection:
            connection.execute(update(run).values(requests=count))
        return count

    def retry_failed(self, code: str = "") -> int:
        """Make failed requests (with that failure code, or all) pending again, as if never sent; return how many.

        Their attempts and their deadline begin anew, on purpose; the rows of the attempts so far stay.
        """
        self._running()
        failed = and_(requests.c.state == FAILED, requests.c.failure == code if code else requests.c.failure != "")
        with self._database.writing() as connection:
            connection.execute(delete(results).where(results.c.request.in_(select(requests.c.request).where(failed))))
            again = {"state": PENDING, "failure": "", "lane": LANES[0], "attempt": 1}
            times = dict.fromkeys(TIMES, -1.0)
            return connection.execute(update(requests).where(failed).values(**again, **times)).rowcount

    # ------------------------------------------------------------ running

    def now_s(self, scale: float = 1.0) -> float:
        """Return this moment in seconds since the run began: 0 before its first leg, and never before the last record.

        `scale`: how many times as fast as the machine's the run's clock is. See `checkpoint` for the assumptions.
        """
        if not self.legs():
            return 0.0
        found = [self.checkpoint(name) for name in {stated.pool for stated in self.settings()}]
        latest = max((each for each in found if each is not None), key=lambda each: each.at_s, default=None)
        now_s = (time.time() - self.run().epoch_s) * scale if latest is None else latest.now_s(scale)
        return max(self.last_s(), now_s)

    def begin(
        self, settings: Mapping[str, Policy], at_s: float, *, records: bool = False, version: str = __version__
    ) -> LegBegun:
        """Begin a leg at `at_s`, seconds since the run began, with these pools and their policies.

        `records`: every call of the law is recorded, for `verify`.
        """
        writer = self._running()
        if self.run().requests < 0:
            raise JournalError(
                f"{self.name}: the process that recorded its requests ended before the last: repeat its command"
            )
        writer.commit()
        notes: list[str] = []
        states = {pool: self._state_of(pool, policy, at_s, notes) for pool, policy in settings.items()}
        with self._database.writing() as connection:
            resent = stock_taken(connection)
            leg = (connection.execute(select(func.max(legs.c.leg))).scalar() or 0) + 1
            row = {"leg": leg, "began_s": at_s, "ended_s": -1.0, "ending": "", "version": version}
            connection.execute(insert(legs), row)
            numbers = pool_numbers(connection, settings)
            for pool, policy in settings.items():
                number = numbers[pool]
                row = {"leg": leg, "pool": number, "at_s": at_s, "settings": settings_of(policy)}
                connection.execute(insert(policies), row)
                counts = [{"leg": leg, "pool": number, "cause": i, "requests": 0} for i in range(len(CAUSES))]
                connection.execute(insert(deferrals), counts)
                # Together with the leg, so that after a kill at any moment the earlier use is known.
                connection.execute(delete(checkpoints).where(checkpoints.c.pool == number))
                state = taken_from(policy.params(), states[pool] or State(), at_s)
                connection.execute(insert(checkpoints), checkpoint_row(leg, number, state))
        self._leg = leg
        kind = FullRecorder if records else Recorder
        recorders = {pool: kind(writer, leg, numbers[pool], states[pool]) for pool in settings}
        writer.commit()
        return LegBegun(leg, resent, recorders, tuple(notes))

    def wave_recorder(self, pool: str) -> WaveRecorder:
        """Return the recorder of a pool's waves; its reports become durable in order with those of the others."""
        return WaveRecorder(self._running(), pool)

    def _state_of(self, pool: str, policy: Policy, at_s: float, notes: list[str]) -> State | None:
        """Return the state from which a pool continues, None in its first leg."""
        if all(stated.pool != pool for stated in self.settings()):
            return None
        of = f"pool {pool!r}: " if len(self.settings()) > 1 else ""
        params = policy.params()
        why = "it was written by an older Paceline"
        try:
            found = self.checkpoint(pool)
        except JournalError:
            found, why = None, "its checkpoint cannot be read"
        if found is None:
            notes.append(f"{of}{why}: what was used is counted from the attempts on record, holds are forgotten")
            return rebuilt(params, self.launches(pool, at_s - DAY_S, settled=policy.settle))
        if found.unlike:
            names = ", ".join(found.unlike)
            notes.append(f"{of}the checkpoint is from another version of Paceline, {names} not carried over")
        return found.carried_over(params, at_s)

    def forecast(self, content: Mapping[str, Any], at_s: float) -> None:
        """Record a forecast; before the first launch, since a later one does not count as a forecast."""
        self._running()
        launched = select(func.count()).select_from(requests).where(requests.c.first_launched_s >= 0)
        with self._database.writing() as connection:
            before = connection.execute(launched).scalar()
            row = {"leg": self._leg, "at_s": at_s, "launched_before": before, "json": to_json(dict(content))}
            connection.execute(insert(forecasts), row)

    def wait_for_room(self, tell: Callable[[str], None]) -> None:
        """See `Writer.wait_for_room`."""
        self._running().wait_for_room(tell)

    def give_up(self) -> None:
        """See `Writer.give_up`."""
        self._running().give_up()

    async def flushed(self) -> None:
        """Return when all reports to the recorders are on the disk."""
        await self._running().flushed()

    def finish(self, at_s: float, ending: str) -> None:
        """End the leg in good order: nothing is in flight any more. `ending`: why, in a word."""
        self._running().commit()
        with self._database.writing() as connection:
            stock_taken(connection)
            connection.execute(update(legs).where(legs.c.leg == self._leg).values(ended_s=at_s, ending=ending))

    # ------------------------------------------------------------ steering from another process

    def ask(self, name: str, words: Iterable[str] = ()) -> int:
        """Send the run a command: `pause`, `resume`, `set` NAME=VALUE words or `unset` names; return the command's id.

        If no process runs the journal, the next one finds the command waiting.
        """
        assert name in (PAUSE, RESUME, SET, UNSET), name
        row = {"asked_epoch_s": time.time(), "name": name, "words": to_json({"words": list(words)})}
        with self._database.writing() as connection:
            inserted = connection.execute(insert(commands), row | {"taken_s": -1.0, "outcome": ""})
            key = inserted.inserted_primary_key
            assert key is not None
            return int(key[0])

    def asked(self) -> list[Command]:
        """Return new commands that wait to be taken up: cheap, to be called a few times per second."""
        found = self.commands(self._asked, waiting=True)
        if found:
            self._asked = found[-1].id
        return found

    def taken(self, command: Command, at_s: float, outcome: str = "") -> None:
        """Mark a command as taken up, or as refused with a reason."""
        writer = self._running()
        writer.batch.taken.append((command.id, at_s, outcome))
        writer.touched()

    # ------------------------------------------------------------ the end

    def purge(self) -> None:
        """Remove request and answer contents for good; counts, attempts and decisions stay.

        SQLite overwrites deleted contents, then the file is rebuilt without them. Copies in blocks that the file system
        or the disk has freed are beyond reach. Raise JournalError while a process runs the journal.
        """
        self._database.locked()
        if self.downloads is not None:
            shutil.rmtree(self.downloads, ignore_errors=True)
        if self._writer is not None:
            self._writer.commit()  # else it would come after the purge
        last = self._all(select(func.max(requests.c.request)))[0][0]
        for start in range(0, (-1 if last is None else last) + 1, PURGE_ROWS):
            with self._database.writing() as connection:
                for table in (bodies, results):
                    place = table.c.request
                    connection.execute(delete(table).where(place >= start, place < start + PURGE_ROWS))
            self._shrink()
        with self._database.writing() as connection:
            connection.execute(update(run).values(purged_epoch_s=time.time()))
        self._shrink("VACUUM")

    def _shrink(self, *first: str) -> None:
        if self._database.is_sqlite:
            with self._database.bare() as connection:
                for statement in (*first, "PRAGMA wal_checkpoint(TRUNCATE)"):
                    connection.execute(statement).fetchall()


def fingerprint_of(file: io.BufferedIOBase) -> str:
    """Return the SHA-256 of a file opened in binary, from its position to its end, as 64 hexadecimal digits."""
    return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- parts


def pool_numbers(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """Return the number of each pool; new pools get the next numbers."""
    numbers = {name: number for number, name in connection.execute(select(pools.c.pool, pools.c.name))}
    for name in names:
        if name not in numbers:
            numbers[name] = len(numbers) + 1
            connection.execute(insert(pools), {"pool": numbers[name], "name": name})
    return numbers


def stock_taken(connection: Connection, among: ColumnElement[bool] | None = None) -> int:
    """Make requests in flight pending again, since their answers cannot be received; return how many are resent.

    `among`: only of these rows of `requests`.

    A request whose main answer did arrive, cut off, and whose finalize pass had not been launched is not resent: only
    that pass is left of it.
    """
    c, a = requests.c, attempts.c
    # What a wave holds is with the Batch API, whichever process runs.
    flying = and_(c.state == IN_FLIGHT, c.request.not_in(select(wave_requests.c.request)))
    flying = flying if among is None else and_(flying, among)
    if not connection.execute(select(c.request).where(flying).limit(1)).all():
        return 0
    same = and_(a.request == c.request, a.lane == c.lane, a.attempt == c.attempt, a.launched_s == c.launched_s)
    answered = select(c.request).join(attempts, same).where(flying, c.lane == LANES[0], a.outcome == Outcome.OK)
    for request in connection.execute(answered).scalars().all():
        finalizes = update(requests).where(c.request == request).values(state=PENDING, lane=LANES[1], attempt=1)
        connection.execute(finalizes)
    return connection.execute(update(requests).where(flying).values(state=PENDING, resent=c.resent + 1)).rowcount

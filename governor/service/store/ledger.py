"""The database as one journal of many batches: requests in and out, legs, and the writer that writes only with a lease.

A batch is the requests numbered from `number << BATCH_BITS` on, in the journal's own tables, so that results, attempts
and remaining requests are read by `Records` with `within`. All pools of a process report to one writer: however many
batches run, one commit carries all of their reports.

Fenced. Each commit checks first, in its own transaction, that this replica still has its lease, and takes that row's
lock. So a replica that was taken for dead writes nothing after another has taken its batches over: none of its launches
becomes durable, and a launch that is not durable is not sent.

Legs. A journal's leg is one process's share. A pool's use continues from the checkpoint of the last replica that is
gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from sqlalchemy import Connection, Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from governor import __version__
from governor.batchapi.waves import WaveStage
from governor.journal.checkpoint import taken_from
from governor.journal.database import JournalError
from governor.journal.journal import pool_numbers, stock_taken
from governor.journal.recorder import Writer
from governor.journal.records import Records
from governor.journal.reports import Batch
from governor.journal.schema import (
    FAILED,
    IN_FLIGHT,
    PENDING,
    SCHEMA,
    DamagedError,
    bodies,
    checkpoint_of,
    checkpoint_row,
    checkpoints,
    chunks,
    deferrals,
    legs,
    policies,
    pools,
    requests,
    run,
    settings_of,
    wave_requests,
    waves,
)
from governor.law import State
from governor.model.errors import FailureCode
from governor.model.policy import Policy
from governor.model.requests import CAUSES
from governor.model.work import Work
from governor.service.store.base import ServiceDatabase
from governor.service.store.store import ACTIVE, Store
from governor.service.store.tables import BATCH_BITS, batches, replicas
from governor.service.store.tables import legs as service_legs

_T = TypeVar("_T")
LOST = "this replica's lease was lost: another one has taken its batches over"
# Between two attempts at a database that is away.
AGAIN_S = 0.5
# Waves whose tokens are in the provider's queue, or are about to be.
IN_QUEUE = (WaveStage.PLANNED, WaveStage.UPLOADED, WaveStage.SUBMITTED)

log = logging.getLogger("paceline.service")


class LeaseLostError(JournalError):
    """Raised when this replica was taken for dead: another one has its batches."""


class DatabaseRetries:
    """Repeats operations that the database refuses for a while (restart, full disk) until they succeed, or `end`.

    `tell`: called with each failure, and with None after a success that followed one. Blocks; safe from any thread.
    """

    def __init__(self, tell: Callable[[JournalError | None], None]) -> None:
        self._tell = tell
        self._ended = threading.Event()

    def end(self) -> None:
        """Raise the next failure instead of waiting."""
        self._ended.set()

    def __call__(self, work: Callable[..., _T], *arguments: Any) -> _T:
        failed = False
        while True:
            try:
                found = work(*arguments)
            except JournalError as error:
                if not error.retryable or isinstance(error, LeaseLostError) or self._ended.is_set():
                    raise
                failed = True
                self._tell(error)
                self._ended.wait(AGAIN_S)
            else:
                if failed:
                    self._tell(None)
                return found


class FencedWriter(Writer):
    """A writer that writes only while its replica has the lease, and retries for as long as it has.

    Launches wait for their commit and answers gather in memory, so an outage of the database costs time, but no answer.
    Commits are numbered in the replica's row: a commit whose acknowledgement was lost with its connection is not
    repeated.
    """

    def __init__(self, store: Store, replica: int, patience: DatabaseRetries) -> None:
        super().__init__(store.database)
        self._store = store
        self._replica = replica
        self._patience = patience
        self._serial = 0

    def _write(self, batch: Batch) -> None:
        self._serial += 1
        self._patience(self._write_once, batch)

    def _write_once(self, batch: Batch) -> None:
        with self.database.writing() as connection:
            last = self._store.commit_of(connection, self._replica)
            if last is None:
                raise LeaseLostError(LOST)
            if last >= self._serial:
                return
            for statement, rows in batch.statements():
                if rows:
                    connection.execute(statement, rows)
            self._store.committed(connection, self._replica, self._serial)


class PatientRecords(Records):
    """Reads that outlast a database that is away."""

    def __init__(self, database: ServiceDatabase, within: tuple[int, int], patience: DatabaseRetries) -> None:
        super().__init__(database, within)
        self._patience = patience

    def _all(self, query: Select[Any]) -> list[Any]:
        return self._patience(super()._all, query)


def part_of(number: int) -> tuple[int, int]:
    """Return the numbers of the first and the last request that a batch can have."""
    first = number << BATCH_BITS
    return first, first + (1 << BATCH_BITS) - 1


class Ledger:
    """The database as a journal of batches; see the module. Every method blocks unless it says otherwise."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.database: ServiceDatabase = store.database
        self._run_row()
        stated = Records(self.database).run()
        self.epoch_s, self.seed = stated.epoch_s, stated.seed

    def _run_row(self) -> None:
        """Write the journal's one row about itself, in the first process."""
        with self.database.writing() as c:
            if c.execute(select(run.c.id)).first() is None:
                row = {"id": 1, "schema": SCHEMA, "version": __version__, "fingerprint": "service", "seed": 0}
                c.execute(insert(run), row | {"epoch_s": time.time(), "requests": -1, "purged_epoch_s": -1.0})

    def records(self, number: int, patience: DatabaseRetries | None = None) -> Records:
        """Return the records of one batch. `patience`: for a reader that waits while the database is away."""
        if patience is not None:
            return PatientRecords(self.database, part_of(number), patience)
        return Records(self.database, part_of(number))

    # ------------------------------------------------------------ requests in

    def write(self, c: Connection, number: int, works: Iterable[Work]) -> int:
        """Write requests, numbered from 0 in their order, under the batch's numbers; return how many."""
        first = number << BATCH_BITS
        count = 0
        for rows, texts in chunks(replace(w, request=replace(w.request, index=first + w.request.index)) for w in works):
            c.execute(insert(requests), rows)
            if texts:
                c.execute(insert(bodies), texts)
            count += len(rows)
        return count

    def erase(self, number: int, is_ours: Callable[[Connection], bool] = lambda c: True) -> None:
        """Remove the requests of a batch that was not accepted, some thousand at a time, as long as it `is_ours`."""
        first, last = part_of(number)
        while True:
            with self.database.writing() as c:
                if not is_ours(c):
                    return
                found = select(requests.c.request).where(requests.c.request.between(first, last)).limit(2_000)
                some = list(c.execute(found).scalars())
                for table in (bodies, requests):
                    c.execute(delete(table).where(table.c.request.in_(some)))
            if len(some) < 2_000:
                return

    # ------------------------------------------------------------ taking over, giving up

    def taken_over(self, c: Connection, number: int) -> int:
        """Make a dead replica's requests in flight pending again; return how many there were."""
        return stock_taken(c, requests.c.request.between(*part_of(number)))

    def put_back(self, number: int, flying: Iterable[int]) -> None:
        """Make requests withdrawn before their finalize pass pending again; `flying`: those really in flight."""
        c = requests.c
        with self.database.writing() as connection:
            among = c.request.between(*part_of(number)) & c.request.not_in(list(flying))
            stock_taken(connection, among)

    def cancel(self, number: int, at_s: float) -> int:
        """End requests that have not ended; none may be in flight. Return how many there were."""
        c = requests.c
        mine = (c.request.between(*part_of(number)), c.state.in_((PENDING, IN_FLIGHT)))
        values = {"state": FAILED, "failure": FailureCode.BATCH_CANCELLED.value, "ended_s": at_s}
        # Waves that could not be cancelled, since the account is refused, are nobody's from now on.
        left = (waves.c.wave.between(*part_of(number)), waves.c.stage != WaveStage.CLOSED)
        with self.database.writing() as connection:
            connection.execute(delete(wave_requests).where(wave_requests.c.request.between(*part_of(number))))
            connection.execute(update(waves).where(*left).values(stage=WaveStage.CLOSED))
            return connection.execute(update(requests).where(*mine).values(values)).rowcount

    # ------------------------------------------------------------ waves

    def enqueued_elsewhere(self, me: int) -> dict[tuple[str, str], float]:
        """Return the tokens that batches of other replicas have at the Batch API, by pool and model."""
        w, b = waves.c, batches.c
        query = select(w.pool, w.model, func.sum(w.tokens)).join(batches, b.number == w.wave.op(">>")(BATCH_BITS))
        query = query.where(b.owner != me, b.state.in_(ACTIVE), w.stage.in_(IN_QUEUE)).group_by(w.pool, w.model)
        with self.database.reading() as c:
            return {(pool, model): float(tokens) for pool, model, tokens in c.execute(query)}

    # ------------------------------------------------------------ legs

    def last_states(self, settings: Mapping[str, Policy], at_s: float, scale: float) -> dict[str, State]:
        """Return the law's state of each pool as the last replica that is gone left it, if there was one.

        Its times are moved to this process's, so that its use keeps its age.
        """
        dead = select(service_legs.c.leg).join(replicas, replicas.c.number == service_legs.c.replica)
        query = select(checkpoints).join(pools, pools.c.pool == checkpoints.c.pool)
        query = query.where(checkpoints.c.leg.in_(dead.where(replicas.c.lost == 1)))
        found = {}
        for pool, policy in settings.items():
            with self.database.reading() as c:
                row = c.execute(query.where(pools.c.name == pool).order_by(checkpoints.c.leg.desc()).limit(1)).first()
            if row is None:
                continue
            try:
                last = checkpoint_of(row)
            except DamagedError as error:
                raise self.database.damaged(f"{error} cannot be read") from None
            if last.unlike:
                log.warning("pool %s: %s of another version not carried over", pool, ", ".join(last.unlike))
            found[pool] = last.carried_over(policy.params(), at_s, at_s - last.now_s(scale))
        return found

    def begin_leg(
        self, replica: int, settings: Mapping[str, Policy], states: Mapping[str, State], at_s: float
    ) -> tuple[int, dict[str, int]]:
        """Begin a leg in these states; return its number and the numbers of the pools."""
        for _ in range(100):
            try:
                with self.database.writing() as c:
                    leg = (c.execute(select(func.max(legs.c.leg))).scalar() or 0) + 1
                    row = {"leg": leg, "began_s": at_s, "ended_s": -1.0, "ending": "", "version": __version__}
                    try:
                        c.execute(insert(legs), row)
                    except IntegrityError:
                        raise _TakenError from None
                    c.execute(insert(service_legs), {"leg": leg, "replica": replica})
                    numbers = pool_numbers(c, settings)
                    for pool, policy in settings.items():
                        number = numbers[pool]
                        row = {"leg": leg, "pool": number, "at_s": at_s, "settings": settings_of(policy)}
                        c.execute(insert(policies), row)
                        counts = [{"leg": leg, "pool": number, "cause": i, "requests": 0} for i in range(len(CAUSES))]
                        c.execute(insert(deferrals), counts)
                        first = taken_from(policy.params(), states.get(pool) or State(), at_s)
                        c.execute(insert(checkpoints), checkpoint_row(leg, number, first))
                return leg, numbers
            except _TakenError:
                continue  # another replica began the same leg at this moment
        raise JournalError(f"{self.database.name}: no leg could be begun: another replica begins them all the time")

    def end_leg(self, leg: int, at_s: float, ending: str) -> None:
        """End a leg in good order."""
        with self.database.writing() as c:
            c.execute(update(legs).where(legs.c.leg == leg).values(ended_s=at_s, ending=ending))


class _TakenError(Exception):
    pass

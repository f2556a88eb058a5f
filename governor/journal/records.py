"""The journal's reading half: stream what a run has done and what is left to do.

Every stream reads in chunks, each in a short transaction of its own that starts after the last row of the one before
(keyset pagination). So memory stays flat, no old snapshot keeps SQLite's WAL from shrinking, and a reader never holds
up the run; it sees the journal as it was when that chunk was read.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from sqlalchemy import Column, ColumnElement, Select, Table, and_, func, or_, select, true

from governor.journal.checkpoint import Checkpoint, Launch
from governor.journal.database import Database, JournalError
from governor.journal.rows import (
    Billed,
    Command,
    Counts,
    ForecastRow,
    HeardAttempt,
    LegRow,
    Pending,
    Pendings,
    PoolNames,
    Prefixed,
    ResultRow,
    RunRow,
    SettingsRow,
    pending_of,
)
from governor.journal.schema import (
    CHECKPOINTS_SINCE,
    DONE,
    FAILED,
    IN_FLIGHT,
    PENDING,
    SIZES,
    STATES,
    TIER_COLUMNS,
    TIERS_SINCE,
    USAGE_COLUMNS,
    WAVES_SINCE,
    DamagedError,
    answer_of,
    attempt_of,
    attempts,
    bodies,
    checkpoint_of,
    checkpoints,
    commands,
    decisions,
    deferrals,
    forecasts,
    from_json,
    legs,
    limits_of,
    policies,
    policy_of,
    pools,
    request_of,
    requests,
    results,
    run,
    sizes_of,
    timers,
    wave_requests,
    waves,
)
from governor.journal.verify import Decision
from governor.journal.waves import WaveRow
from governor.model.errors import FailureCode
from governor.model.lawcalls import BEGAN, numbers_of, read_back
from governor.model.policy import Policy
from governor.model.prices import Usage
from governor.model.requests import CAUSES, LANES, Attempt, Ended, Outcome, Request

# Rows with bodies held in memory at once; rows without.
CHUNK = 100
NARROW_CHUNK = 2_000


class Records:
    """Reads an open journal. Every method may raise `JournalError`.

    `within`: (first, last) number of the requests to read, None = all. Records that do not belong to single requests
    (legs, settings, decisions, deferrals) are still those of the whole journal.
    """

    def __init__(self, database: Database, within: tuple[int, int] | None = None) -> None:
        self._database = database
        self._within = within

    @property
    def name(self) -> str:
        """Return the journal's name for messages: the path as it was given, or the URL without its password."""
        return self._database.name

    # ------------------------------------------------------------ reading

    @contextmanager
    def _undamaged(self) -> Iterator[None]:
        """Treat a row that makes no sense inside this block as a damaged journal."""
        try:
            yield
        except DamagedError as error:
            raise self._database.damaged(f"{error} cannot be read") from None

    def _all(self, query: Select[Any]) -> list[Any]:
        with self._database.reading() as connection:
            return list(connection.execute(query))

    def _stream(self, query: Select[Any], key: Column[int], chunk: int) -> Iterator[Any]:
        """Yield the rows in order of `key`, a whole number that the query selects."""
        rows = self._all(query.order_by(key).limit(chunk))
        while rows:
            yield from rows
            if len(rows) < chunk:
                return
            rows = self._all(query.where(key > getattr(rows[-1], key.name)).order_by(key).limit(chunk))

    def _of(self, query: Select[Any], table: Table, pool: PoolNames | None = None) -> Select[Any]:
        """Return the query limited to the rows of `requests` or `attempts` in range; of one pool, some or all."""
        query = query if self._within is None else query.where(table.c.request.between(*self._within))
        names = (pool,) if isinstance(pool, str) else pool
        return query if names is None else query.where(table.c.pool.in_(names))

    # ------------------------------------------------------------ the run

    def run(self) -> RunRow:
        """Return versions, seed, fingerprint, epoch."""
        return RunRow(*self._all(select(*(run.c[name] for name in RunRow._fields)))[0])

    def legs(self) -> list[LegRow]:
        """Return all legs, in order."""
        return [
            LegRow(*row) for row in self._all(select(*(legs.c[name] for name in LegRow._fields)).order_by(legs.c.leg))
        ]

    def settings(self) -> list[SettingsRow]:
        """Return the history of the policies, in the order in which they were recorded."""
        query = select(policies.c.leg, pools.c.name, policies.c.at_s, policies.c.settings)
        query = query.join(pools, pools.c.pool == policies.c.pool).order_by(policies.c.id)
        with self._undamaged():
            return [SettingsRow(leg, pool, at_s, policy_of(text)) for leg, pool, at_s, text in self._all(query)]

    def forecasts(self) -> list[ForecastRow]:
        """Return the forecasts, in order of writing."""
        with self._undamaged():
            return [
                ForecastRow(row.leg, row.at_s, row.launched_before, from_json(row.json, "a forecast"))
                for row in self._all(select(forecasts).order_by(forecasts.c.id))
            ]

    def last_s(self) -> float:
        """Return the latest recorded moment, seconds since the run began: a new leg must not go back in time."""
        columns = (attempts.c.finished_s, requests.c.launched_s, requests.c.ended_s, legs.c.began_s, legs.c.ended_s)
        latest = [self._all(select(func.max(column)))[0][0] for column in columns]
        return max((float(value) for value in latest if value is not None), default=0.0)

    # ------------------------------------------------------------ requests

    def counts(self, pool: str | None = None) -> Counts:
        """Return the number of requests in each state, as far as it is on the disk; of one pool, or of all."""
        c = requests.c
        query = select(c.state, c.failure, func.count(), func.sum(c.resent)).group_by(c.state, c.failure)
        rows = self._all(self._of(query, requests, pool))
        by_state = dict.fromkeys(STATES, 0)
        for state, _, count, _ in rows:
            by_state[state] = by_state.get(state, 0) + count
        failures = {failure: count for state, failure, count, _ in sorted(rows, key=str) if state == FAILED}
        resent = int(sum(resent for *_, resent in rows))
        states = (by_state[PENDING], by_state[IN_FLIGHT], by_state[DONE], by_state[FAILED])
        return Counts(sum(by_state.values()), *states, resent, failures)

    def pending(self, pool: PoolNames = "default", *, longest_first: bool = False, is_new: bool = False) -> Pendings:
        """Yield what is left to do of a pool, or of several that share it; read once per leg, while that runs.

        `is_new`: none of it can have been launched before, so launched requests are not searched for.

        Requests that were launched before come first, in order of the input, then the rest: in that order, or
        `longest_first`, by expected answer, ties by reservation. Requests that the leg itself puts back (they back off)
        do not come again.

        In a part (`within`), a request without a row in `bodies` has the nearest body before its own, and its dict.
        """
        if self._within is None and self.run().purged_epoch_s >= 0.0:
            raise JournalError(f"{self.name}: the journal was purged, nothing is left to send: start a new one")
        c = requests.c
        query = self._of(self._bodied(), requests, pool).where(c.state == PENDING)
        with self._undamaged():
            fresh = query.where(c.first_launched_s < 0)
            longest = self._longest if self._within is None else self._longest_of_part
            before = () if is_new else self._stream(query.where(c.first_launched_s >= 0), c.request, CHUNK)
            rows = longest(fresh) if longest_first else self._stream(fresh, c.request, CHUNK)
            yield from self._read_bodies(chain(before, rows))

    def _bodied(self) -> Select[Any]:
        """Return the query for requests with their bodies; in a part, with the nearest before their own."""
        c = requests.c
        joined = select(requests, bodies.c.body)
        if self._within is None:
            return joined.join(bodies, bodies.c.request == c.request)
        nearest = select(func.max(bodies.c.request)).where(bodies.c.request <= c.request).correlate(requests)
        found = func.coalesce(bodies.c.request, nearest.scalar_subquery()).label("body_of")
        return joined.add_columns(found).outerjoin(bodies, bodies.c.request == c.request)

    def _read_bodies(self, rows: Iterable[Any]) -> Iterator[Pending]:
        number, body = -1, None
        for row in rows:
            of = row.request if self._within is None else row.body_of
            if of != number:
                number, body = of, from_json(self._body(of) if row.body is None else row.body, "a body")
            assert body is not None
            yield pending_of(row, body)

    def _body(self, request: int | None) -> str:
        for (body,) in self._all(select(bodies.c.body).where(bodies.c.request == request)):
            return str(body)
        raise DamagedError("a body")

    def _longest(self, query: Select[Any]) -> Iterator[Any]:
        """Yield the rows by expected answer and reservation, largest first, ties in order of the input.

        "After the last row" in an order of mixed directions is three ranges, each of which the index finds at once.
        """
        c = requests.c
        ranges: list[ColumnElement[bool]] = [true()]
        while True:
            rows: list[Any] = []
            for after in ranges:
                ordered = query.where(after).order_by(c.expected.desc(), c.reserve.desc(), c.request)
                rows += self._all(ordered.limit(CHUNK - len(rows)))
                if len(rows) == CHUNK:
                    break
            yield from rows
            if len(rows) < CHUNK:
                return
            last = rows[-1]
            same = c.expected == last.expected
            ranges = [
                and_(same, c.reserve == last.reserve, c.request > last.request),
                and_(same, c.reserve < last.reserve),
                c.expected < last.expected,
            ]

    def _longest_of_part(self, query: Select[Any]) -> Iterator[Any]:
        """Yield a part's rows in that order; no index serves a part, so they are sorted once: 8 bytes a request."""
        c = requests.c
        keys = query.with_only_columns(c.request).order_by(c.expected.desc(), c.reserve.desc(), c.request)
        with self._database.reading() as connection:
            numbers = array("q", connection.execution_options(yield_per=NARROW_CHUNK).execute(keys).scalars())
        for start in range(0, len(numbers), CHUNK):
            part = numbers[start : start + CHUNK].tolist()
            rows = {row.request: row for row in self._all(query.where(c.request.in_(part)))}
            # Leave out a row that has been launched or has ended since.
            yield from (rows[number] for number in part if number in rows)

    def overdue(self, pool: str, before_s: float) -> int:
        """Return how many requests of a pool have not ended and were first launched at that time or earlier."""
        c = requests.c
        launched = c.first_launched_s.between(0.0, before_s)
        query = select(func.count()).where(c.state.in_((PENDING, IN_FLIGHT)), launched)
        return int(self._all(self._of(query, requests, pool))[0][0])

    def custom_id(self, request: int) -> str | None:
        """Return the custom_id of the request of that number, None if there is none."""
        found = self._all(select(requests.c.custom_id).where(requests.c.request == request))
        return str(found[0][0]) if found else None

    def results(self) -> Iterator[ResultRow]:
        """Yield the requests that have ended, in order of the input."""
        if self.run().purged_epoch_s >= 0.0:
            raise JournalError(f"{self.name}: the journal was purged: its results are gone")
        c = requests.c
        columns = [column.label(f"r_{column.name}") for column in results.columns if column.name != "request"]
        query = select(requests, results.c.request.label("answered"), *columns)
        query = query.outerjoin(results, results.c.request == c.request).where(c.state.in_((DONE, FAILED)))
        part = self._of(query, requests)
        with self._undamaged():
            for row in self._stream(part, c.request, CHUNK):
                answer = None if row.answered is None else answer_of(Prefixed(row))
                yield ResultRow(request_of(row, None), row.failure, answer, row.ended_s, row.resent)

    def unfinished(self, pool: str | None = None, *, failed: str | None = None) -> Iterator[Request]:
        """Yield the requests that have not ended, of one pool or of all, without bodies, in order of the input.

        `failed`: include those that failed with that code, "" = with any.
        """
        c = requests.c
        wanted: ColumnElement[bool] = c.state.in_((PENDING, IN_FLIGHT))
        if failed is not None:
            wanted = or_(wanted, and_(c.state == FAILED, c.failure == failed if failed else true()))
        query = self._of(select(requests).where(wanted), requests, pool)
        for row in self._stream(query, requests.c.request, NARROW_CHUNK):
            yield request_of(row, None)

    # ------------------------------------------------------------ the Batch API

    def waves(self, pool: str | None = None) -> list[WaveRow]:
        """Return the waves that went to the Batch API, of one pool or of all, in order.

        The waves of a part (`within`) have its numbers, as its requests do.
        """
        if self.run().schema < WAVES_SINCE:
            return []
        query = select(*(waves.c[name] for name in WaveRow._fields)).order_by(waves.c.wave)
        if self._within is not None:
            query = query.where(waves.c.wave.between(*self._within))
        return [WaveRow(*row) for row in self._all(query if pool is None else query.where(waves.c.pool == pool))]

    def held_by(self, wave: int, *, bodies_too: bool = False) -> Iterator[Pending]:
        """Yield the requests that a wave holds, in order of the input; with their bodies, or with empty ones."""
        query = self._bodied() if bodies_too else select(requests)
        query = query.join(wave_requests, wave_requests.c.request == requests.c.request)
        yield from self._each(query.where(wave_requests.c.wave == wave), bodies_too)

    def eligible(self, pool: str, model: str, url: str, now_s: float) -> Iterator[Pending]:
        """Yield the pending requests of a model and endpoint that do not back off, with bodies, in order."""
        c = requests.c
        query = self._bodied().where(c.state == PENDING, c.model == model, c.url == url)
        yield from self._each(self._of(query.where(c.retry_at_s <= now_s), requests, pool), True)

    def waiting(self, pool: str) -> Iterator[Pending]:
        """Yield a pool's pending requests, those that back off included, with empty bodies, in order."""
        query = select(requests).where(requests.c.state == PENDING)
        yield from self._each(self._of(query, requests, pool), False)

    def chosen(self, numbers: Sequence[int]) -> Iterator[Pending]:
        """Yield these requests with their bodies, in order."""
        for start in range(0, len(numbers), CHUNK):
            some = requests.c.request.in_(numbers[start : start + CHUNK])
            yield from self._each(self._bodied().where(some), True)

    def _each(self, query: Select[Any], bodies_too: bool) -> Iterator[Pending]:
        with self._undamaged():
            rows = self._stream(query, requests.c.request, CHUNK if bodies_too else NARROW_CHUNK)
            yield from self._read_bodies(rows) if bodies_too else (pending_of(row, {}) for row in rows)

    def lanes(self, pool: str) -> list[tuple[str, str, float, int, int]]:
        """Return (model, url, end of the backoff, requests, prompt tokens) of a pool's pending requests."""
        c = requests.c
        keys = (c.model, c.url, c.retry_at_s)
        query = select(*keys, func.count(), func.sum(c.prompt_tokens)).where(c.state == PENDING).group_by(*keys)
        rows = self._all(self._of(query, requests, pool).order_by(func.min(c.request)))
        return [(model, url, retry_at_s, int(count), int(tokens)) for model, url, retry_at_s, count, tokens in rows]

    # ------------------------------------------------------------ input of a summary

    def _attempt_columns(self) -> list[ColumnElement[Any]]:
        """Return the columns of `attempts` that this journal has."""
        is_old = self.run().schema < TIERS_SINCE
        return [column for column in attempts.columns if not (is_old and column.name in TIER_COLUMNS)]

    def attempts(self, pool: str | None = None) -> Iterator[Attempt]:
        """Yield all ended attempts, of one pool or of all, in the order in which they ended."""
        query = self._of(select(*self._attempt_columns()), attempts, pool)
        with self._undamaged():
            for row in self._stream(query, attempts.c.number, NARROW_CHUNK):
                yield attempt_of(row)

    def billed(self, pool: str | None = None) -> Iterator[Billed]:
        """Yield all ended attempts with the tokens used in each, for bills and exports."""
        sizes = [requests.c[name].label(f"r_{name}") for name in SIZES]
        query = select(*self._attempt_columns(), *sizes).join(requests, requests.c.request == attempts.c.request)
        with self._undamaged():
            for row in self._stream(self._of(query, attempts, pool), attempts.c.number, NARROW_CHUNK):
                usage = Usage(*(getattr(row, name) for name in USAGE_COLUMNS if hasattr(row, name)))
                yield Billed(attempt_of(row), row.request_id, usage, sizes_of(Prefixed(row)))

    def heard(self, pool: str | None = None) -> Iterator[HeardAttempt]:
        """Yield all ended attempts with the figures that the headers of each stated."""
        with self._undamaged():
            query = self._of(select(*self._attempt_columns()), attempts, pool)
            for row in self._stream(query, attempts.c.number, NARROW_CHUNK):
                yield HeardAttempt(attempt_of(row), limits_of(row), row.processing_s)

    def ends(self, pool: str | None = None) -> Iterator[Ended]:
        """Yield the end of each request that has ended, of one pool or of all, in order of the input."""
        c = requests.c
        query = select(c.request, c.ended_s, c.failure).where(c.state.in_((DONE, FAILED)))
        for row in self._stream(self._of(query, requests, pool), c.request, NARROW_CHUNK):
            yield Ended(row.request, row.ended_s, row.failure)

    def lost(self, pool: str | None = None) -> Iterator[tuple[int, int]]:
        """Yield charge and prompt tokens of each failed request that may succeed if it is sent again unchanged."""
        c = requests.c
        codes = [code.value for code in FailureCode if code.retryable]
        query = select(c.request, c.charge, c.prompt_tokens).where(c.state == FAILED, c.failure.in_(codes))
        for row in self._stream(self._of(query, requests, pool), c.request, NARROW_CHUNK):
            yield row.charge, row.prompt_tokens

    def deferrals(self, pool: str | None = None) -> list[int]:
        """Return how many requests had to wait at the head, by the law's causes: a list like `Tally.deferrals`."""
        counts = [0] * len(CAUSES)
        query = select(deferrals.c.cause, func.sum(deferrals.c.requests)).group_by(deferrals.c.cause)
        query = query.join(pools, pools.c.pool == deferrals.c.pool)
        for cause, count in self._all(query if pool is None else query.where(pools.c.name == pool)):
            counts[cause] = int(count)
        return counts

    def outcomes(self) -> dict[Outcome, int]:
        """Return the number of ended attempts by outcome."""
        query = select(attempts.c.outcome, func.count()).group_by(attempts.c.outcome).order_by(attempts.c.outcome)
        try:
            return {Outcome(outcome): count for outcome, count in self._all(self._of(query, attempts))}
        except ValueError:
            raise self._database.damaged("an outcome cannot be read") from None

    def lateness(self, pool: str) -> list[float]:
        """Return how late each timed launch of a pool was, seconds; empty if it was not recorded."""
        if self.run().schema < CHECKPOINTS_SINCE:
            return []
        query = select(timers.c.late_s).join(pools, pools.c.pool == timers.c.pool).where(pools.c.name == pool)
        return [float(row.late_s) for row in self._all(query.order_by(timers.c.number))]

    # ------------------------------------------------------------ use

    def checkpoint(self, pool: str) -> Checkpoint | None:
        """Return a pool's use as of the latest commit; None if no leg of it was begun, or by an older Paceline."""
        if self.run().schema < CHECKPOINTS_SINCE:
            return None
        query = select(checkpoints).join(pools, pools.c.pool == checkpoints.c.pool).where(pools.c.name == pool)
        rows = self._all(query.order_by(checkpoints.c.leg.desc()).limit(1))
        with self._undamaged():
            return checkpoint_of(rows[0]) if rows else None

    def launches(self, pool: str, since_s: float, *, settled: bool = False) -> list[Launch]:
        """Return a pool's launches since that time, in order of time, with their reservations.

        `settled`: with the tokens that answers used, if they say so.
        """
        query = select(*self._attempt_columns()).where(attempts.c.pool == pool, attempts.c.launched_s >= since_s)
        found = []
        for row in self._all(query):
            told = settled and row.outcome == Outcome.OK and row.prompt_tokens >= 0 and row.output_tokens >= 0
            tokens = float(row.prompt_tokens + row.output_tokens if told else row.reserved_tokens)
            found.append(Launch(row.launched_s, tokens, row.attempt == 1 and row.lane == LANES[0]))
        c = requests.c
        flying = select(c.launched_s, c.reserve, c.attempt).where(c.pool == pool, c.state == IN_FLIGHT)
        found += [Launch(row.launched_s, row.reserve, row.attempt == 1) for row in self._all(flying)]
        return sorted(found)

    # ------------------------------------------------------------ decisions

    def decisions(self, pool: str | None = None, leg: int | None = None) -> Iterator[Decision]:
        """Yield the recorded decisions for `verify` to repeat: each chain opened by `began`, made from its policy.

        `pool`, `leg`: only that pool's or leg's; None = all, chain after chain.
        """
        chains: dict[tuple[int, str], Policy] = {}
        for settings in self.settings():
            if pool in (None, settings.pool) and leg in (None, settings.leg):
                chains.setdefault((settings.leg, settings.pool), settings.policy)
        numbers = {row.name: row.pool for row in self._all(select(pools))}
        c = decisions.c
        for (number, name), policy in chains.items():
            query = select(c.first, c.calls).where(c.leg == number, c.pool == numbers[name])
            for i, row in enumerate(self._stream(query, c.first, CHUNK)):
                if i == 0:
                    yield Decision(name, number, -1, BEGAN, numbers_of((policy.params(),)), ())
                try:
                    for sequence, call in enumerate(read_back(row.calls), row.first):
                        yield Decision(name, number, sequence, *call)
                except ValueError:
                    raise self._database.damaged("a decision cannot be read") from None

    # ------------------------------------------------------------ commands

    def commands(self, after: int = 0, *, waiting: bool = False) -> list[Command]:
        """Return the commands given after the command of that id, in order; `waiting`: only those not yet taken up."""
        query = select(*(commands.c[name] for name in Command._fields)).where(commands.c.id > after)
        if waiting:
            query = query.where(commands.c.taken_s < 0)
        with self._undamaged():
            return [
                Command(row.id, row.asked_epoch_s, row.name, _words(row.words), row.taken_s, row.outcome)
                for row in self._all(query.order_by(commands.c.id))
            ]

    # ------------------------------------------------------------ health

    def complaints(self) -> list[str]:
        """Return SQLite's complaints about the whole file (`PRAGMA integrity_check`): normally none.

        Reads all of it.
        """
        if not self._database.is_sqlite:
            return []
        with self._database.bare() as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found


def _words(text: str) -> tuple[str, ...]:
    return tuple(str(word) for word in from_json(text, "a command").get("words", ()))

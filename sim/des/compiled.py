"""The compiled engine: law, chance, provider and event loop as machine code, by numba, from their own sources.

Theory of operation. `proceed_all` runs until the end, or until it needs more rows, an emptied buffer or larger arrays.
It releases the interpreter's lock meanwhile, so that runs in several threads proceed in parallel. Nothing is kept per
request: latencies go into the tally's sketch and answered requests into its sums, buffer by buffer.

A plan makes thousands of runs of a few hundred requests, each done in a fraction of a millisecond. So anything that
runs share is made once: a `Batch` for all runs of a case, the rows of a workload for all cases that launch it in the
same order, and the working arrays, which the next run takes over.

The first use on a machine compiles for some seconds; later ones load the machine code (see `machine`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from governor import law
from governor.model.errors import FailureCode
from governor.model.needs import of_amounts
from governor.model.policy import Policy
from sim.des import engine
from sim.des.machine import BESIDE, ROOT, SOURCES, array_of, dtype_of, function_of, places
from sim.des.run import SPENT, AttemptSink, Tally, arrival_order, deciding_keys, rows_of
from sim.model import provider as prov

if TYPE_CHECKING:
    from sim.experiment.experiment import Case

ENTRY = "proceed_all"
# Functions on every request's path: inlined, they run half as fast again. (Inlining all would take longer to compile.)
INLINED = frozenset(
    (
        *("_step", "_on_answer", "_on_ok", "_worked", "_ended", "_close", "_launch", "_taken", "_next", "_advance"),
        *("_schedule", "_drop_soonest", "_sooner", "_has_room", "admission", "launched", "settled"),
        *("answered", "admitted", "drained", "taken", "room_in_ms", "capacity_of"),
    )
)

CHUNK = 8192
BUFFER = 4096
SLOTS = 512
# Most chunks of rows kept for the next case.
ROWS_KEPT = 256
# Of cases up to this size the last few are kept prepared, rows and all (100 bytes a request), for their next runs:
# preparing takes as long as a third of a run.
KEPT_REQUESTS = 200_000
CODES = (*SPENT, FailureCode.DEADLINE_EXCEEDED, FailureCode.OUTWAITED)

PARAMS = dtype_of(Policy().params())
STATE = dtype_of(law.State())
PROVIDER = dtype_of(prov.ProviderParams())
PROVIDER_STATE = dtype_of(prov.ProviderState())
# Size of a provider's initial state, in 8-byte numbers: all but the sliding log, which is never read before it is
# written.
_WITHOUT_LOG = places(PROVIDER_STATE)["log_at"].start
RUN = dtype_of(engine.Run())
ROW = dtype_of(engine.Row())
JOB = dtype_of(engine.Job())
EVENT = dtype_of(engine.Event())
ENTRY_OF_QUEUE = dtype_of(engine.Entry())
ANSWERS = dtype_of(engine.Answers())
ENDED = dtype_of(engine.Ended())
RECORDS = (PARAMS, STATE, PROVIDER, PROVIDER_STATE, RUN, ROW, JOB, EVENT, ENTRY_OF_QUEUE, ANSWERS, ENDED)
_FLAT = (np.dtype(np.int64),) * 4

# The run's record as one flat array of numbers, as it is before a run.
PLACES = places(RUN)
BEGINNING = array_of(engine.Run(), RUN).view(np.int64)
_SEED, _REQUESTS, _FINALIZE, _FROM_TRACE, _RECORDING, _ROWS_UNTIL, _LATENCIES, _ANSWERED = (
    PLACES[name].start
    for name in (
        *("seed", "requests", "finalize_max_tokens", "from_trace", "recording", "rows_until"),
        *("latencies_size", "answered_size"),
    )
)

_LOCK = threading.Lock()
_LOADED: list[Callable[..., int]] = []


def load() -> Callable[..., int]:
    """Return the compiled event loop, loaded once per process."""
    if not _LOADED:
        with _LOCK:
            if not _LOADED:
                function, _ = function_of(SOURCES, ROOT, ENTRY, (*RECORDS, *_FLAT), beside=BESIDE, inlined=INLINED)
                _LOADED.append(function)
    return _LOADED[0]


def is_loaded() -> bool:
    """Return whether the machine code is loaded in this process."""
    return bool(_LOADED)


# ---------------------------------------------------------------- what runs have in common


class _Kept:
    """A cache of values derived from objects, keyed by identity (the objects are kept alive): the `most` last used."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.found: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, objects: tuple[Any, ...], make: Callable[[], Any], more: tuple[Any, ...] = ()) -> Any:
        """Return the value for these objects (and for `more`, by value), making it if it is missing."""
        key = (*map(id, objects), *more)
        with self.lock:
            if key in self.found:
                self.found.move_to_end(key)
                return self.found[key][1]
        made = make()
        with self.lock:
            self.found[key] = objects, made
            while len(self.found) > self.most:
                self.found.popitem(last=False)
        return made


_policies, _providers, _orders, _rows = _Kept(64), _Kept(64), _Kept(256), _Kept(ROWS_KEPT)
_batches = _Kept(4)
_NEW = array_of(law.State(), STATE).view(np.int64)


def _law_started(params: law.Params, day_tokens: float, day_requests: float) -> NDArray[np.int64]:
    if not day_tokens and not day_requests:
        return _NEW
    s = law.State()
    law.started(params, s, of_amounts({law.TPD: day_tokens, law.RPD: day_requests}), 0.0)
    return array_of(s, STATE).view(np.int64)


@lru_cache(maxsize=64)
def _provider_started(day_tokens: float, day_requests: float) -> NDArray[np.int64]:
    # The log's numbers, made anew for each batch, would take longer than a run.
    ps = prov.ProviderState()
    prov.day_started(ps, day_tokens, day_requests)
    return array_of(ps, PROVIDER_STATE).view(np.int64)[:_WITHOUT_LOG].copy()


class Batch:
    """A prepared case: everything that its runs share. Runs of one batch may proceed in several threads.

    `s`, `ps`: the initial states of law and provider, as flat arrays.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.p = _policies.get((case.params,), lambda: array_of(case.params, PARAMS))
        self.pp = _providers.get((case.provider,), lambda: array_of(case.provider, PROVIDER))
        used = case.grant.day_tokens_used, case.grant.day_requests_used
        self.s, self.ps = _law_started(case.params, *used), _provider_started(*used)
        columns = case.columns
        self.requests = len(columns)
        self.order = self._order()
        self.first = self._first()
        self._chunks: dict[int, NDArray[Any]] = {}

    def _order(self) -> NDArray[Any] | None:
        c = self.case.columns
        if self.case.from_trace:
            return arrival_order(c)
        keys = deciding_keys(c, self.case.params)
        if not keys or self.requests > CHUNK:
            return np.lexsort(keys) if keys else None
        order: NDArray[Any] = _orders.get((), lambda: np.lexsort(keys), tuple(key.tobytes() for key in keys))
        return order

    def _first(self) -> NDArray[Any]:
        """Return the first rows, cached for every case that launches them in this order.

        In a small workload, all rows.
        """
        if self.requests > CHUNK:
            return self.rows(0)
        c = self.case.columns
        read: tuple[Any, ...] = (c.arrival_s, c.cap, c.output_tokens, c.reserve, c.charge, c.prompt_tokens)
        read += (c.recorded_s, c.finalize_reserve, c.finalize_charge)
        order = b"" if self.order is None else self.order.tobytes()
        more = (order, self.case.from_trace, self.case.finalize_max_tokens)
        rows: NDArray[Any] = _rows.get(read, lambda: self.rows(0), more)
        return rows

    def chunk(self, start: int) -> NDArray[Any]:
        """Return these rows, as far as memory allows made once."""
        if self.requests > KEPT_REQUESTS:
            return self.rows(start)
        if start not in self._chunks:
            self._chunks[start] = self.rows(start)
        return self._chunks[start]

    def rows(self, start: int) -> NDArray[Any]:
        """Return a chunk of the requests in order of launch or of arrival, from the `start`-th on."""
        case, c = self.case, self.case.columns
        i = rows_of(self.order, start, min(start + CHUNK, self.requests))
        rows = np.zeros(len(i), ROW)
        cap, uncapped = c.cap[i], c.output_tokens[i]
        rows["index"] = i
        if case.from_trace:
            rows["arrival_s"] = c.arrival_s[i]
        rows["expected"] = cap
        rows["reserve"] = c.reserve[i]
        rows["charge"] = c.charge[i]
        rows["prompt"] = c.prompt_tokens[i]
        rows["output"] = np.where(cap > 0, np.minimum(uncapped, cap), uncapped)
        rows["recorded_s"] = c.recorded_s[i]
        if case.finalize_max_tokens:
            rows["cut"] = (cap > 0) & (cap < uncapped)
            rows["last_reserve"] = c.finalize_reserve[i]
            rows["last_charge"] = c.finalize_charge[i]
            rows["last_output"] = np.minimum(uncapped, case.finalize_max_tokens)
        return rows


# ---------------------------------------------------------------- a run


class EndedAttempt:
    """A completed attempt, with the same names as the SimPy driver's `Job`."""

    __slots__ = (
        *("index", "lane", "attempt", "outcome", "code", "arrived_s", "submitted_s", "eligible_s", "launched_s", "now"),
        *("reserve", "charged", "output", "retry_after_s", "waits_s"),
    )

    code: int
    now: float

    def __init__(self, values: Iterable[Any]) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            setattr(self, name, value)


class Runner:
    """The working arrays of a run, reused by one run after another: leftovers of the last run are never read."""

    def __init__(self) -> None:
        self.s, self.ps, self.state = np.zeros(1, STATE), np.zeros(1, PROVIDER_STATE), np.zeros(1, RUN)
        self.jobs = np.zeros(SLOTS, JOB)
        self.calendar = np.zeros(2 * SLOTS, EVENT)
        self.queue = np.zeros(SLOTS, ENTRY_OF_QUEUE)
        self.answers = np.zeros(BUFFER, ANSWERS)
        self.attempts = np.zeros(1, ENDED)
        # Records as flat arrays: copying them field by field would take a tenth of the run.
        self._s_numbers, self._ps_numbers = self.s.view(np.int64), self.ps.view(np.int64)[:_WITHOUT_LOG]
        self.run = self.state[0]
        self.whole, self.real = self.state.view(np.int64), self.state.view(np.float64)

    def simulate(self, batch: Batch, seed: int, on_attempt: AttemptSink | None = None) -> Tally:
        """Run to the end of the last request and return the tally.

        Every request has then ended exactly once (asserted).
        """
        recording = on_attempt is not None
        if recording and len(self.attempts) < BUFFER:
            self.attempts = np.zeros(BUFFER, ENDED)
        self.whole[:] = _beginning(batch, seed, recording)
        rows, tally, run = batch.first, Tally(), self.run
        while not self._proceed(batch, self.state, rows, self.answers):
            self._emptied(tally, on_attempt)
            if run["row"] == run["rows_until"] < run["requests"]:
                rows = batch.chunk(int(run["row"]))
                run["rows_from"] = run["row"]
                run["rows_until"] += len(rows)
            self._enlarged()
        self._emptied(tally, on_attempt)
        left = self.s[0]
        assert left["in_flight"] == 0, f"{left['in_flight']} permits leaked"
        assert left["finalize_open"] == 0, f"{left['finalize_open']} finalize passes never closed"
        return _tallied(batch, tally, self.whole, self.real)

    def simulate_several(self, batch: Batch, seeds: Sequence[int]) -> list[Tally]:
        """Return the tallies of runs under these seeds, up to the first that needs larger arrays than these.

        They are made by one call, so that several threads do not wait for the interpreter's lock between short runs.
        """
        whole = np.tile(_beginning(batch, 0, False), (len(seeds), 1))
        whole[:, _SEED] = seeds
        real = whole.view(np.float64)
        answers = self.answers[: len(seeds) * _room(batch)].reshape(len(seeds), -1)
        made = self._proceed(batch, whole.view(RUN).reshape(len(seeds)), batch.first, answers.reshape(-1))
        tallies = []
        for i in range(made):
            tally = Tally()
            _worked(tally, answers[i], whole[i, _LATENCIES], whole[i, _ANSWERED])
            tallies.append(_tallied(batch, tally, whole[i], real[i]))
        return tallies

    def _proceed(self, batch: Batch, runs: NDArray[Any], rows: NDArray[Any], answers: NDArray[Any]) -> int:
        states = self._s_numbers, batch.s, self._ps_numbers, batch.ps
        arrays = rows, self.jobs, self.calendar, self.queue, answers, self.attempts
        return load()(batch.p, self.s, batch.pp, self.ps, runs, *arrays, *states)

    def _emptied(self, tally: Tally, on_attempt: AttemptSink | None) -> None:
        """Move the outputs into the tally, and attempts to `on_attempt` if given."""
        run = self.run
        _worked(tally, self.answers, run["latencies_size"], run["answered_size"])
        run["latencies_size"] = run["answered_size"] = 0
        if on_attempt is not None:
            for values in self.attempts[: run["attempts_size"]].tolist():
                ended = EndedAttempt(values)
                on_attempt(ended, ended.now, CODES[ended.code] if ended.code > 0 else "")
            run["attempts_size"] = 0

    def _enlarged(self) -> None:
        """Double every array that is half full."""
        run = self.run
        if 2 * run["jobs_made"] >= len(self.jobs):
            self.jobs = _twice(self.jobs)
        if 2 * run["calendar_size"] >= len(self.calendar):
            self.calendar = _twice(self.calendar)
        if 2 * run["queue_size"] >= len(self.queue):
            self.queue = _twice(self.queue)


def _room(batch: Batch) -> int:
    """Return how many answers a run may have to keep."""
    return batch.requests + 1


def _beginning(batch: Batch, seed: int, recording: bool) -> NDArray[np.int64]:
    """Return the run's record, as flat numbers, before it begins."""
    case, whole = batch.case, BEGINNING.copy()
    whole[_SEED] = seed
    whole[_REQUESTS] = batch.requests
    whole[_FINALIZE] = case.finalize_max_tokens
    whole[_FROM_TRACE] = case.from_trace
    whole[_RECORDING] = recording
    whole[_ROWS_UNTIL] = len(batch.first)
    return whole


def _worked(tally: Tally, answers: NDArray[Any], latencies: int, answered: int) -> None:
    """Add so many of the answers to the tally."""
    tally.latencies_s.frombytes(answers["latency_s"][:latencies].tobytes())
    if answered:
        late, work = answers[:answered], tally.work
        work.arrivals_s.frombytes(late["arrived_s"].tobytes())
        work.charges.frombytes(late["charge"].tobytes())
        work.counts.frombytes(late["counted"].tobytes())
        work.services_s.frombytes(late["service_s"].tobytes())


def _tallied(batch: Batch, tally: Tally, whole_numbers: NDArray[Any], real_numbers: NDArray[Any]) -> Tally:
    """Add the run's record to the tally, and return it."""
    # Reading a record's fields one by one would take longer than the run.
    whole, real, work = whole_numbers.tolist(), real_numbers.tolist(), tally.work
    tally.requests = whole[PLACES["ended"].start]
    assert tally.requests == batch.requests, (
        f"{batch.requests - tally.requests} of {batch.requests} requests never ended"
    )
    for name, at in _COUNTS:
        setattr(tally, name, whole[at])
    for name, at in _SUMS:
        setattr(tally, name, real[at])
    tally.waits_s = real[PLACES["waits_s"]]
    tally.deferrals = [int(count) for count in real[PLACES["deferrals"]]]
    for code, count in zip(CODES, real[PLACES["failures"]], strict=True):
        if count:
            tally.failures[code] = tally.failures.get(code, 0) + int(count)
    tally.failures = dict(sorted(tally.failures.items()))
    work.requests = whole[PLACES["work_requests"].start]
    for name, at in _WORK:
        setattr(work, name, real[at])
    return tally


def _at(names: Iterable[str], prefix: str = "") -> tuple[tuple[str, int], ...]:
    return tuple((name, PLACES[prefix + name].start) for name in names)


_COUNTS = _at(("completed", "failed", "attempts", "throttled", "peak_in_flight", "finalize_passes"))
_SUMS = _at(
    ("last_s", "reserved_tokens", "charged_tokens", "used_tokens", "extra_prompt_tokens", "extra_output_tokens")
)
_WORK = _at(("charged", "counted", "inputs", "returned", "shortest_s", "latest_s"), "work_")


def _twice(array: NDArray[Any]) -> NDArray[Any]:
    larger = np.zeros(2 * len(array), array.dtype)
    larger[: len(array)] = array
    return larger


# ---------------------------------------------------------------- runs

# Idle runners; one that has grown is not kept.
_idle: list[Runner] = []


@contextmanager
def _runner() -> Iterator[Runner]:
    try:
        runner = _idle.pop()
    except IndexError:
        runner = Runner()
    yield runner
    if len(runner.jobs) <= SLOTS and len(runner.queue) <= SLOTS:
        _idle.append(runner)


def simulated(case: Case, seed: int, on_attempt: AttemptSink | None = None) -> Tally:
    """Return one run of the case, equal to the SimPy driver's to the bit."""
    with _runner() as runner:
        return runner.simulate(Batch(case), seed, on_attempt)


def simulations(case: Case, seeds: Iterable[int]) -> Iterator[Tally]:
    """Yield runs of the case under these seeds, one after the other."""
    is_kept = CHUNK < len(case.columns) <= KEPT_REQUESTS
    batch: Batch = _batches.get((case,), lambda: Batch(case)) if is_kept else Batch(case)
    left = list(seeds)
    at_once = BUFFER // _room(batch)
    while left:
        with _runner() as runner:
            made = runner.simulate_several(batch, left[:at_once]) if min(at_once, len(left)) > 1 else []
            if not made:
                at_once = 1
                made = [runner.simulate(batch, left[0])]
        yield from made
        left = left[len(made) :]

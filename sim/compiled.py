"""The compiled engine: law, chance, provider and event loop as machine code, by numba, from their own sources.

What lives here: what stands around the event loop of `sim/engine.py`: a case as records and arrays, the chunks that it
reads and the buffers that it fills, and the `Tally` that comes out. What must not: any rule, and any event.

Theory of operation. `proceed` runs until the end, or until it wants something: more rows, an emptied buffer, or larger
arrays. It holds no lock of the interpreter meanwhile, so that runs in several threads go on side by side. Per request
nothing is kept: latencies go into the tally's sketch and answered requests into its sums, buffer by buffer.

The first use on a machine compiles for some seconds; later ones load the machine code (see `copies`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from governor import law
from governor.errors import FailureCode
from sim import engine
from sim import provider as prov
from sim.cache import cache_folder
from sim.copies import array_of, compiled, dtype_of
from sim.engines import BESIDE, ROOT, SOURCES
from sim.run import SPENT, AttemptSink, Tally, arrival_order, batch_order, rows_of

if TYPE_CHECKING:
    from sim.experiment import Case

ENTRY = "proceed"
# What every request passes through: inlined it is half as fast again. (All of it would take longer to compile.)
INLINED = frozenset(
    (
        *("_step", "_on_answer", "_on_ok", "_worked", "_ended", "_close", "_launch", "_taken", "_next", "_advance"),
        *("_schedule", "_drop_soonest", "_sooner", "_has_room", "admission", "launched", "settled"),
        *("answered", "admitted", "_drained"),
    )
)

CHUNK = 8192
BUFFER = 4096
SLOTS = 512
CODES = (*SPENT, FailureCode.DEADLINE_EXCEEDED)

BEGINNING = array_of(engine.Run())
ROW = dtype_of(engine.Row())
JOB = dtype_of(engine.Job())
EVENT = dtype_of(engine.Event())
ENTRY_OF_QUEUE = dtype_of(engine.Entry())
ANSWERS = dtype_of(engine.Answers())
ENDED = dtype_of(engine.Ended())

_LOCK = threading.Lock()
_LOADED: list[Any] = []


def _proceed() -> Any:
    """The compiled event loop, loaded once per process."""
    if not _LOADED:
        with _LOCK:
            if not _LOADED:
                folder = cache_folder((*SOURCES, *BESIDE))
                copies = compiled(SOURCES, ROOT, entry=ENTRY, inlined=INLINED, cache=folder)
                _LOADED.append(getattr(copies["sim.engine"], ENTRY))
    return _LOADED[0]


def is_loaded() -> bool:
    """Whether the machine code is in this process."""
    return bool(_LOADED)


class EndedAttempt:
    """An attempt as it comes out: what the SimPy driver's `Job` says of it, under the same names."""

    __slots__ = (
        *("index", "lane", "attempt", "outcome", "code", "arrived_s", "submitted_s", "eligible_s", "launched_s", "now"),
        *("reserve", "charged", "output", "retry_after_s", "waits_s"),
    )

    code: int
    now: float

    def __init__(self, values: Iterable[Any]) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            setattr(self, name, value)


class Batch:
    """A case made ready: what its runs share. Runs of one batch may go on in several threads."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.p, self.pp = array_of(case.params), array_of(case.provider)
        s, ps = law.State(), prov.ProviderState()
        tokens, requests = case.grant.day_tokens_used, case.grant.day_requests_used
        law.day_started(case.params, s, tokens, requests, 0.0)
        prov.day_started(ps, tokens, requests)
        self.s, self.ps = array_of(s), array_of(ps)
        columns = case.columns
        self.requests = len(columns)
        self.order = arrival_order(columns) if case.from_trace else batch_order(columns, case.params)
        self.first = self.rows(0)

    def rows(self, start: int) -> NDArray[Any]:
        """A chunk of the requests in order of launch or of arrival, from the `start`-th on."""
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


class Running:
    """One run of a batch: its own state and buffers. Make it, call `run()` once."""

    def __init__(self, batch: Batch, seed: int, on_attempt: AttemptSink | None = None) -> None:
        case = batch.case
        self.batch = batch
        self.on_attempt = on_attempt
        self.s, self.ps = batch.s.copy(), batch.ps.copy()
        self.rows = batch.first
        self.state = BEGINNING.copy()
        run = self.state[0]
        run["seed"] = seed
        run["requests"] = batch.requests
        run["finalize_max_tokens"] = case.finalize_max_tokens
        run["from_trace"] = case.from_trace
        run["recording"] = on_attempt is not None
        run["rows_until"] = len(self.rows)
        self.jobs = np.zeros(SLOTS, JOB)
        self.calendar = np.zeros(2 * SLOTS, EVENT)
        self.queue = np.zeros(SLOTS, ENTRY_OF_QUEUE)
        self.answers = np.zeros(min(BUFFER, batch.requests + 1), ANSWERS)
        self.attempts = np.zeros(BUFFER if on_attempt is not None else 1, ENDED)
        self.tally = Tally()

    def run(self) -> Tally:
        """Runs to the end of the last request. Every request has then ended exactly once (asserted)."""
        proceed = _proceed()
        batch, run = self.batch, self.state[0]
        while proceed(
            *(batch.p, self.s, batch.pp, self.ps, self.state, self.rows),
            *(self.jobs, self.calendar, self.queue, self.answers, self.attempts),
        ):
            self._emptied()
            self._read_on()
            self._enlarged()
        self._emptied()
        requests, ended = batch.requests, int(run["ended"])
        assert ended == requests, f"{requests - ended} of {requests} requests never ended"
        assert self.s[0]["in_flight"] == 0, f"{self.s[0]['in_flight']} permits leaked"
        assert self.s[0]["finalize_open"] == 0, f"{self.s[0]['finalize_open']} finalize passes never closed"
        return self._tallied()

    def _emptied(self) -> None:
        """What has come out goes into the tally, and attempts to whoever asked for them."""
        run, tally = self.state[0], self.tally
        answers = self.answers
        tally.latencies_s.extend(answers["latency_s"][: run["latencies_size"]])
        late = answers[: run["answered_size"]]
        if len(late):
            work = tally.work
            work.arrivals_s.frombytes(late["arrived_s"].tobytes())
            work.charges.frombytes(late["charge"].tobytes())
            work.counts.frombytes(late["counted"].tobytes())
            work.services_s.frombytes(late["service_s"].tobytes())
        run["latencies_size"] = run["answered_size"] = 0
        if self.on_attempt is not None:
            for values in self.attempts[: run["attempts_size"]].tolist():
                ended = EndedAttempt(values)
                self.on_attempt(ended, ended.now, CODES[ended.code] if ended.code > 0 else "")
            run["attempts_size"] = 0

    def _read_on(self) -> None:
        run = self.state[0]
        if run["row"] == run["rows_until"] < run["requests"]:
            self.rows = self.batch.rows(int(run["row"]))
            run["rows_from"] = run["row"]
            run["rows_until"] += len(self.rows)

    def _enlarged(self) -> None:
        """Twice the room wherever half of it is used."""
        run = self.state[0]
        if 2 * run["jobs_made"] >= len(self.jobs):
            self.jobs = _twice(self.jobs)
        if 2 * run["calendar_size"] >= len(self.calendar):
            self.calendar = _twice(self.calendar)
        if 2 * run["queue_size"] >= len(self.queue):
            self.queue = _twice(self.queue)

    def _tallied(self) -> Tally:
        run, tally, work = self.state[0], self.tally, self.tally.work
        tally.requests = int(run["ended"])
        for name in ("completed", "failed", "attempts", "throttled", "peak_in_flight", "finalize_passes"):
            setattr(tally, name, int(run[name]))
        for name in (
            *("last_s", "reserved_tokens", "charged_tokens", "used_tokens"),
            *("extra_prompt_tokens", "extra_output_tokens"),
        ):
            setattr(tally, name, float(run[name]))
        tally.waits_s = run["waits_s"].tolist()
        tally.deferrals = [int(count) for count in run["deferrals"]]
        for code, count in zip(CODES, run["failures"].tolist(), strict=True):
            if count:
                tally.failures[code] = tally.failures.get(code, 0) + int(count)
        work.requests = int(run["work_requests"])
        for name in ("charged", "counted", "returned", "shortest_s", "latest_s"):
            setattr(work, name, float(run[f"work_{name}"]))
        return tally


def _twice(array: NDArray[Any]) -> NDArray[Any]:
    larger = np.zeros(2 * len(array), array.dtype)
    larger[: len(array)] = array
    return larger


def simulated(case: Case, seed: int, on_attempt: AttemptSink | None = None) -> Tally:
    """One run of the case, as the SimPy driver would have it, to the bit."""
    return Running(Batch(case), seed, on_attempt).run()


def simulations(case: Case, seeds: Iterable[int]) -> Iterator[Tally]:
    """Runs of the case under these seeds, one after the other."""
    batch = Batch(case)
    for seed in seeds:
        yield Running(batch, seed).run()

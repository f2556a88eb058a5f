"""Choice of engine: SimPy's, event by event in Python, or the compiled one.

Theory of operation. Both give the same run, to the bit, so the choice affects only time. Machine code simulates a
hundred times as many requests per second, but must be loaded first, and compiled on first use. `auto` begins with SimPy
and switches as soon as the work done, plus the work known to come, would have paid for loading: as in the ski rental
problem, the user never waits for more than twice the shorter of the two. Without numba it stays with SimPy.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import numpy as np

from governor.forecast.summary import WorkDone
from governor.model.errors import BadInput
from sim.des.machine import BESIDE, SOURCES, has_code
from sim.des.run import AttemptSink, Tally
from sim.model.workload import Columns

if TYPE_CHECKING:
    from sim.experiment.experiment import Case

Engine = Literal["auto", "compiled", "simpy"]
Chosen = Literal["compiled", "simpy"]

# Seconds: SimPy's per request; the compiled engine's before its first request, with and without cached machine code
# (`benchmarks/bench_engine.py` measures all three).
SIMPY_S = 20e-6
LOADS_S = 0.8
COMPILES_S = 15.0

NO_NUMBA = "numba is not installed: pip install 'paceline[sim]'"


class _Simulated:
    """Count of requests that SimPy has simulated in this process because they were too few for the compiled engine."""

    requests = 0.0


def is_available() -> bool:
    """Return whether the compiled engine can work here at all."""
    return find_spec("numba") is not None


def is_kept() -> bool:
    """Return whether machine code is on the disk: then it is loaded in a moment instead of being compiled."""
    return has_code((*SOURCES, *BESIDE))


def checked(wanted: Engine, *, learns: bool = False) -> tuple[str, ...]:
    """Return notes for a user who asks for this engine: none, or one line. Raise BadInput if it is unavailable.

    `learns`: the policy's estimates learn (OPENAI_CHARGE_RULE=learned), which only SimPy simulates.
    """
    if learns and wanted == "compiled":
        raise BadInput("--engine compiled: estimates that learn are simulated with SimPy only: leave the option out")
    if learns and wanted == "auto":
        return ("simulated with SimPy, which takes longer: the compiled engine has no estimates that learn",)
    if wanted == "simpy" or is_available():
        return ()
    if wanted == "compiled":
        raise BadInput(f"--engine compiled: {NO_NUMBA}, or leave the option out to simulate with SimPy")
    return (f"simulated with SimPy, which takes longer: {NO_NUMBA}",)


def chosen(wanted: Engine, requests: float) -> Chosen:
    """Return the engine for this many simulated requests, now and soon after. Raise BadInput as `checked` does."""
    checked(wanted)
    if wanted != "auto" or not is_available():
        return "compiled" if wanted == "compiled" else "simpy"
    compiled = sys.modules.get("sim.des.compiled")
    if compiled is not None and compiled.is_loaded():
        return "compiled"
    waited_s = (_Simulated.requests + requests) * SIMPY_S
    if waited_s <= LOADS_S:
        return "simpy"
    return "compiled" if waited_s > COMPILES_S or is_kept() else "simpy"


def simulated(case: Case, seed: int, on_attempt: AttemptSink | None = None, *, engine: Engine = "auto") -> Tally:
    """Return the tally of one run of the case, the same with either engine."""
    requests = len(case.columns)
    if case.columns.kind is None and chosen(engine, requests) == "compiled":
        from sim.des import compiled

        return _with_lost_work(compiled.simulated(case, seed, on_attempt), case.columns)
    from sim.des.driver import Simulation

    _Simulated.requests += requests
    run = Simulation(
        case.columns,
        case.params,
        case.provider,
        seed=seed,
        day_tokens_used=case.grant.day_tokens_used,
        day_requests_used=case.grant.day_requests_used,
        finalize_max_tokens=case.finalize_max_tokens,
        from_trace=case.from_trace,
        on_attempt=on_attempt,
    )
    return _with_lost_work(run.run(), case.columns)


def _with_lost_work(tally: Tally, columns: Columns) -> Tally:
    """Return the tally with the bound's input covering all requests: a run that loses requests does less in less time.

    A lost request counts with what it would have been charged and used; its answer's duration is unknown.
    """
    if not tally.failed:
        return tally
    output = np.where(columns.cap > 0, np.minimum(columns.output_tokens, columns.cap), columns.output_tokens)
    counted = np.minimum(columns.charge, (columns.prompt_tokens + output).astype(np.float64))
    late = columns.arrival_s > 0.0
    asked = tally.work = WorkDone(
        requests=int((~late).sum()),
        charged=float(columns.charge[~late].sum()),
        counted=float(counted[~late].sum()),
        shortest_s=0.0,
        latest_s=tally.work.latest_s,
        returned=tally.work.returned,
        inputs=float(np.minimum(columns.prompt_tokens, columns.charge)[~late].sum()),
    )
    parts = (columns.arrival_s, columns.charge, counted, np.zeros(len(late)))
    for values, part in zip((asked.arrivals_s, asked.charges, asked.counts, asked.services_s), parts, strict=True):
        values.frombytes(part[late].astype(np.float64).tobytes())
    return tally


def simulations(case: Case, seeds: Iterable[int], *, engine: Chosen) -> Iterator[Tally]:
    """Yield runs of the case under these seeds, one after the other; shared data is prepared once."""
    if engine == "compiled" and case.columns.kind is None:
        from sim.des import compiled

        return (_with_lost_work(tally, case.columns) for tally in compiled.simulations(case, seeds))
    return (simulated(case, seed, engine="simpy") for seed in seeds)


# ---------------------------------------------------------------- preparation in the background

_is_begun = threading.Lock()
_is_ready = threading.Event()


def engine_at_hand() -> Engine:
    """Return the engine that is ready right now; the first call begins to prepare the compiled one."""
    begin()
    return "auto" if _is_ready.is_set() else "simpy"


def begin() -> None:
    """Begin to prepare the compiled engine, unless that has begun already."""
    if _is_begun.acquire(blocking=False):
        threading.Thread(target=_make_ready, name="compile", daemon=True).start()


def _make_ready() -> None:
    if is_available():
        if not is_kept():
            # Compiling takes many seconds, and would block everything else in this process.
            command = [sys.executable, "-c", "from sim.des import compiled; compiled.load()"]
            with contextlib.suppress(OSError):
                subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        from sim.des import compiled  # numba is an extra

        compiled.load()
    _is_ready.set()

"""Speed, start-up and memory of the compiled engine, beside the SimPy driver in the same run.

    python -m benchmarks.bench_engine [--short]

Loads as in `bench_driver`: `light`, where tokens bind and nobody is refused; `refused`, where three tenths less is
reserved than charged and a co-tenant takes a tenth of the limit, so that requests draw 429s and come again. Both
engines run the same requests in turn, without attempts, and must come to the same figures. Seconds are CPU seconds of
the one thread that simulates; each figure is the median of five.

Then: the time per request from 10^4 to 10^7 requests in one run; the peak memory of 10^7 in a process of their own;
`paceline simulate` of 1,000 requests in processes of their own, first with an empty cache, then with a full one; and
one what-if, 50 runs of 1,000 requests through the pool that `plan` uses.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.bench_driver import PACED, REFUSED, REPEATS, SEED, Load, held_mb, params, provider, requests
from governor.forecast.summary import Grant
from sim.des import compiled, engines
from sim.des.run import Tally, quantiles
from sim.experiment.experiment import Case, Pool, figures_of

ROOT = Path(__file__).resolve().parent.parent
COTENANT_SHARE = 0.1
WHAT_IF = (1_000, 50)
STARTED = 1_000


def case(load: Load, count: int, cotenant_share: float = 0.0) -> Case:
    """The load as the engines take it."""
    theirs = provider(load)
    theirs.cotenant_share = cotenant_share
    grant = Grant(tpm_limit=load.tpm, rpm_limit=load.rpm)
    return Case(requests(load, count), params(load), theirs, grant, from_trace=False, finalize_max_tokens=0)


def timed(run: Callable[[], Tally]) -> tuple[float, Tally]:
    """CPU seconds of this thread, and what the run came to."""
    gc.collect()
    begun = time.thread_time()
    tally = run()
    return time.thread_time() - begun, tally


def against_simpy(name: str, work: Case, repeats: int) -> None:
    """One line of the table: both engines in turn."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(repeats):
        taken, a = timed(lambda: engines.simulated(work, SEED, engine="compiled"))
        ours.append(taken)
        taken, b = timed(lambda: engines.simulated(work, SEED, engine="simpy"))
        theirs.append(taken)
        assert repr(figures_of(a, work.grant, SEED)) == repr(figures_of(b, work.grant, SEED))
    count = len(work.columns)
    refused = 100.0 * a.throttled / a.attempts
    fast, slow = count / median(ours), count / median(theirs)
    print(f"{name:8} {count:>9,} {fast:>12,.0f} {slow:>9,.0f} {fast / slow:>6.1f} {refused:>8.1f}", flush=True)


def flat(counts: list[int]) -> None:
    """Nanoseconds per request by the size of one run."""
    found = {}
    for count in counts:
        work = case(PACED, count)
        repeats = REPEATS if count < 10**7 else 1
        found[count] = median(timed(lambda: compiled.simulated(work, SEED))[0] for _ in range(repeats)) / count  # noqa: B023
        print(f"one run of {count:>10,}: {1e9 * found[count]:,.0f} ns per request", flush=True)
    print(f"time per request, largest against smallest: {found[counts[-1]] / found[counts[0]]:.2f} times")


# ---------------------------------------------------------------- memory


def memory(count: int) -> dict[str, float]:
    """One run of `count` requests in this process, in MB: after the imports, and the peaks."""
    compiled.simulated(case(PACED, 10), SEED)
    imported = held_mb(peak=False)
    work = case(PACED, count)
    drawn, drawn_peak = held_mb(peak=False), held_mb(peak=True)
    taken, tally = timed(lambda: compiled.simulated(work, SEED))
    assert tally.completed == count, tally
    p50, p95 = quantiles(tally.latencies_s, (0.5, 0.95))
    assert p50 < p95
    return {
        "imported": imported,
        "drawn": drawn,
        "drawn_peak": drawn_peak,
        "peak": held_mb(peak=True),
        "after": held_mb(peak=False),
        "taken_s": taken,
    }


def memory_apart(count: int) -> None:
    """The same in a process of its own, printed."""
    command = [sys.executable, "-m", "benchmarks.bench_engine", "--memory", str(count)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    print(
        f"memory of {count:,} requests in one run: peak {found['peak']:.0f} MB, {found['imported']:.0f} MB of it "
        f"after the imports and {found['drawn']:.0f} MB once the requests are drawn; the run itself adds "
        f"{found['after'] - found['drawn']:.0f} MB"
    )


# ---------------------------------------------------------------- start-up


def started(cache: str, batch: Path, engine: str) -> tuple[float, float]:
    """Wall and CPU seconds of `paceline simulate` in a process of its own."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    before, begun = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "sim.app.cli", "simulate", str(batch), "--tpm", "2M", "--engine", engine]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begun, cpu_s


def start_up(repeats: int) -> None:
    """The first use after installation, and later ones."""
    lines = (ROOT / "examples" / "batch.jsonl").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder) / "batch.jsonl"
        rows = [json.loads(lines[n % len(lines)]) | {"custom_id": f"row-{n}"} for n in range(STARTED)]
        batch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        cache = str(Path(folder) / "cache")
        wall_s, cpu_s = started(cache, batch, "compiled")
        print(f"simulate of {STARTED:,} requests, empty cache: {wall_s:.1f} s, {cpu_s:.1f} s of CPU")
        for engine in ("auto", "compiled"):
            taken = [started(cache, batch, engine) for _ in range(repeats)]
            wall_s, cpu_s = (median(column) for column in zip(*taken, strict=True))
            print(f"  later, --engine {engine}: {wall_s:.2f} s, {cpu_s:.2f} s of CPU", flush=True)


def what_if(repeats: int) -> None:
    """Replications through the pool, in this process."""
    count, runs = WHAT_IF
    work = case(PACED, count)
    for workers in (1, 0):
        pool = Pool(workers, engine="compiled")
        taken = []
        for _ in range(4 * repeats):
            begun = time.perf_counter(), time.process_time()
            pool.run([(work, range(SEED, SEED + runs))])
            taken.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        wall_s, cpu_s = (median(column) for column in zip(*taken, strict=True))
        who = "one thread" if workers else f"{pool.workers} threads"
        print(f"{runs} runs of {count:,} requests, {who}: {1e3 * wall_s:.0f} ms, {1e3 * cpu_s:.0f} ms of CPU")


def main() -> None:
    """The figures on standard output."""
    if "--memory" in sys.argv:
        print(json.dumps(memory(int(sys.argv[sys.argv.index("--memory") + 1]))))
        return
    short = "--short" in sys.argv
    compiled.simulated(case(PACED, 10), SEED)
    print(f"simulated requests per CPU second, median of {REPEATS}; Python {sys.version.split()[0]}, {sys.platform}")
    print(f"{'load':8} {'requests':>9} {'compiled':>12} {'SimPy':>9} {'ratio':>6} {'429s, %':>8}")
    count = 20_000 if short else 100_000
    against_simpy("light", case(PACED, count), REPEATS)
    against_simpy("refused", case(REFUSED, count, COTENANT_SHARE), REPEATS)
    what_if(REPEATS)
    start_up(REPEATS)
    flat([10**4, 10**5, 10**6] if short else [10**4, 10**5, 10**6, 10**7])
    memory_apart(10**6 if short else 10**7)


if __name__ == "__main__":
    main()

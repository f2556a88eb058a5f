"""How a sweep scales over cores, and what Ray takes of that: beside two loops that only spin, in the same run.

    python -m benchmarks.bench_spread [--short]

A sweep over many seeds is run by one worker and by two: 20,000 requests by local threads (compiled engine), the example
batch by local processes (SimPy) and by a Ray cluster of two nodes with one worker each on this machine. What two cores
are worth here, at this moment, is measured by two processes that spin, against one. All are rates (work per second), so
that long and short measurements compare; a round measures each of them once, every ratio is one of the same round, and
medians and extremes over the rounds are printed, with a verdict for each promise: sweeps at 0.9 of what the cores give,
and on Ray, in sweeps of over 30 s, at 0.9 of what local processes do just before and after. Workers, engines and the
cluster are there before anything is measured. It takes some four minutes; with --short the sweeps are too short for a
verdict.

On a machine that does other things at the same time the two spinning loops are worth less than two, or more in one
moment than in the next: then there is no verdict, and the last line says so.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path

from sim.des.engines import Engine
from sim.experiment import parallel
from sim.experiment.experiment import Case, Pool, case_of
from sim.experiment.parallel import Backend
from sim.model.synthetic import parametric
from sim.scenario.scenario import Scenario

ROOT = Path(__file__).resolve().parents[1]
BATCH = ROOT / "examples" / "batch.jsonl"
SPINS = 30_000_000
# Of what two spinning loops do, and of what local processes do.
PROMISED = 0.9
# Two loops on two cores that nobody else uses do so much of the work of one.
QUIET = 1.8


def spin(count: int) -> None:
    """A loop in one process."""
    while count:
        count -= 1


def spinning_rate(processes: int, count: int) -> float:
    """Loops of `count` per second, so many at once."""
    workers = [Process(target=spin, args=(count,)) for _ in range(processes)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return processes / (time.perf_counter() - start)


def sweep_rate(case: Case, runs: int, workers: int, engine: Engine, backend: Backend = "local") -> float:
    """Runs per second, in a sweep of so many."""
    pool = Pool(workers, engine=engine, backend=backend)
    start = time.perf_counter()
    pool.run([(case, range(runs))])
    return runs / (time.perf_counter() - start)


@dataclass
class Round:
    """Ratios of one round: what two workers do of one, and Ray of two local processes. `ray_s`: that sweep's length."""

    cores: float
    threads: float
    processes: float
    ray: float
    ray_s: float


def measured(case: Case, large: Case, spins: int, seconds: float, ray_seconds: float) -> Round:
    """One round. Sweeps of two workers take about `seconds`, the one on Ray `ray_seconds`."""
    cores = spinning_rate(2, spins) / spinning_rate(1, spins)
    runs = max(8, int(seconds * sweep_rate(large, 8, 1, "compiled")))
    alone = sweep_rate(large, runs, 1, "compiled")
    threads = sweep_rate(large, 2 * runs, 2, "compiled") / alone
    runs = max(80, int(seconds * sweep_rate(case, 80, 1, "simpy")))
    alone = sweep_rate(case, runs, 1, "simpy")
    before = sweep_rate(case, 2 * runs, 2, "simpy")
    on_ray = max(2 * runs, int(ray_seconds * before))
    ray = sweep_rate(case, on_ray, 0, "simpy", "ray")
    after = sweep_rate(case, 2 * runs, 2, "simpy")
    both = (before + after) / 2.0
    # And what the cores were worth is asked again, for the work that came last.
    cores = (cores + spinning_rate(2, spins) / spinning_rate(1, spins)) / 2.0
    return Round(cores, threads, both / alone, ray / both, on_ray / ray)


def verdict(what: str, values: Sequence[float], wanted: float, judged: bool) -> str:
    """A line with median, extremes and what became of the promise."""
    middle = statistics.median(values)
    said = "no verdict" if not judged else "kept" if middle >= wanted else "MISSED"
    return f"{what}: {middle:.2f} ({min(values):.2f} to {max(values):.2f}); promised {wanted:.2f}: {said}"


def main() -> None:
    """Prints the table."""
    short = "--short" in sys.argv
    rounds, seconds, ray_seconds, spins = (1, 1.5, 3.0, SPINS // 10) if short else (3, 6.0, 34.0, SPINS)
    case = case_of(Scenario.of(BATCH))
    drawn = parametric(20_000, prompt_tokens=(600, 1_500), output_tokens=(80, 300), max_tokens=400, seed=1)
    large = case_of(Scenario.of(BATCH).with_(workload=drawn))
    cluster = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "sim" / "ray_cluster.py"), "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found: list[Round] = []
    try:
        assert cluster.stdout is not None
        os.environ["RAY_ADDRESS"] = cluster.stdout.readline().strip()
        assert os.environ["RAY_ADDRESS"], "no Ray cluster came up"
        # Engines, workers and the connection are there before anything is measured.
        sweep_rate(large, 4, 2, "compiled")
        sweep_rate(case, 400, 2, "simpy")
        sweep_rate(case, 400, 0, "simpy", "ray")
        for _ in range(rounds):
            found.append(measured(case, large, spins, seconds, ray_seconds))
    finally:
        parallel.disconnect()
        cluster.communicate()
    cores = [each.cores for each in found]
    quiet = min(cores) >= QUIET
    judged = quiet and not short
    print(f"two spinning loops do {statistics.median(cores):.2f} times the work of one (median of {rounds})")
    for name, engine in (("threads", "compiled engine"), ("processes", "SimPy")):
        times = [getattr(each, name) for each in found]
        shares = [a / b for a, b in zip(times, cores, strict=True)]
        what = f"sweep by two {name}, {engine}: {statistics.median(times):.2f} times one; of what the cores give"
        print(verdict(what, shares, PROMISED, judged))
    length = min(each.ray_s for each in found)
    what = f"sweeps of {length:.0f} s and more on Ray, two nodes, of the local speed"
    print(verdict(what, [each.ray for each in found], PROMISED, judged and length >= 30.0))
    print(
        f"the machine was {'quiet' if quiet else 'NOT quiet, these figures say little'}: {min(cores):.2f} at the least"
    )


if __name__ == "__main__":
    main()

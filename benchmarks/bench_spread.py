"""How a sweep scales over cores, and what Ray takes of that: beside two loops that only spin, in the same run.

    python -m benchmarks.bench_spread [--short]

A sweep over many seeds is run by one worker and by two: 20,000 requests by local threads (compiled engine), the example
batch by local processes (SimPy) and by a Ray cluster of two nodes with one worker each on this machine. What two cores
are worth here, at this moment, is measured by two processes that spin, against one; all measurements alternate, and
medians of ratios are printed. The sweep by Ray takes over 30 s, unless --short; the cluster's start is not counted.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path

from sim import spread
from sim.engines import Engine
from sim.experiment import Case, Pool, case_of
from sim.scenario import Scenario
from sim.spread import Backend
from sim.workload import parametric

ROOT = Path(__file__).resolve().parents[1]
BATCH = ROOT / "examples" / "batch.jsonl"
SPINS = 30_000_000


def spin(count: int) -> None:
    """A loop in one process."""
    while count:
        count -= 1


def spinning_s(processes: int, count: int) -> float:
    """Seconds that so many loops at once take."""
    workers = [Process(target=spin, args=(count,)) for _ in range(processes)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def sweep_s(case: Case, runs: int, workers: int, engine: Engine, backend: Backend) -> float:
    """Seconds of so many runs."""
    pool = Pool(workers, engine=engine, backend=backend)
    start = time.perf_counter()
    pool.run([(case, range(runs))])
    return time.perf_counter() - start


def sized(case: Case, engine: Engine, seconds: float) -> int:
    """How many runs two workers are busy with for about so long."""
    few = 40
    sweep_s(case, few, 2, engine, "local")
    return max(few, int(2.0 * few * seconds / sweep_s(case, few, 1, engine, "local")))


def medians(rounds: int, measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Each measure so many times, in turn."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """The median, over rounds, of one measure's time over the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def main() -> None:
    """Prints the table."""
    short = "--short" in sys.argv
    rounds, seconds = (1, 4.0) if short else (5, 35.0)
    case = case_of(Scenario.of(BATCH))
    drawn = parametric(20_000, prompt_tokens=(600, 1_500), output_tokens=(80, 300), max_tokens=400, seed=1)
    large = case_of(Scenario.of(BATCH).with_(workload=drawn))
    spins = SPINS // 10 if short else SPINS
    cluster = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "sim" / "ray_cluster.py"), "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert cluster.stdout is not None
        os.environ["RAY_ADDRESS"] = cluster.stdout.readline().strip()
        # Engines, workers and the connection are there before anything is measured.
        sweep_s(large, 4, 2, "compiled", "local")
        sweep_s(case, 400, 2, "simpy", "local")
        sweep_s(case, 400, 0, "simpy", "ray")
        simpy, compiled = sized(case, "simpy", seconds), sized(large, "compiled", seconds / 4.0)
        times = medians(
            rounds,
            {
                "spin 1": lambda: spinning_s(1, spins),
                "spin 2": lambda: spinning_s(2, spins),
                "threads 1": lambda: sweep_s(large, compiled, 1, "compiled", "local"),
                "threads 2": lambda: sweep_s(large, compiled, 2, "compiled", "local"),
                "processes 1": lambda: sweep_s(case, simpy // 2, 1, "simpy", "local"),
                "processes 2": lambda: sweep_s(case, simpy, 2, "simpy", "local"),
                "ray": lambda: sweep_s(case, simpy, 0, "simpy", "ray"),
            },
        )
    finally:
        spread.disconnect()
        cluster.communicate()
    cores = 2.0 * ratio(times, "spin 1", "spin 2")
    threads = ratio(times, "threads 1", "threads 2")
    processes = 2.0 * ratio(times, "processes 1", "processes 2")
    over_ray = ratio(times, "processes 2", "ray")
    print(f"two spinning loops do {cores:.2f} times the work of one (median of {rounds})")
    print(f"sweep, compiled engine, two threads: {threads:.2f} times one, {threads / cores:.2f} of what the cores give")
    print(f"sweep, SimPy, two processes: {processes:.2f} times one, {processes / cores:.2f} of what the cores give")
    print(
        f"the same sweep of {simpy:,} runs on Ray, two nodes: {statistics.median(times['ray']):.1f} s, "
        f"{over_ray:.2f} of the local speed"
    )


if __name__ == "__main__":
    main()

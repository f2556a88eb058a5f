"""Speed and memory of the SimPy driver, beside an idiomatic SimPy model of the same rules.

    python -m benchmarks.bench_driver [--short]

The peer (`benchmarks/peer_simpy.py`) starts a process per request. Both sides get the same requests and the same
rules, those of the peer's docstring, and keep totals only, no row per attempt. They run in turn in one process and are
timed in CPU seconds of that process, so that a busy machine disturbs both alike; each figure is the median. Our time
includes reading the columns; the peer gets its lists ready made. Draws differ, so that makespans agree about, not
exactly.

Two loads. `paced`: tokens bind, hundreds in flight, a spacing with jitter, noisy answers. `refused`: three tenths less
reserved than charged, so that requests draw 429s and come again.

Memory: a million requests in a process of their own, its peak less what it held after the imports.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import peer_simpy
from governor.law import MINUTE_S, RPM, Params
from governor.model.needs import amounts
from governor.model.policy import Policy
from sim.des.driver import Simulation
from sim.model.provider import ProviderParams
from sim.model.synthetic import parametric
from sim.model.workload import Columns, columns

REPEATS = 5
SEED = 1
LIMIT_MB = 200


@dataclass(frozen=True)
class Load:
    """One arrangement. `reserved_ratio`: our reservation as a share of the provider's charge."""

    name: str
    tpm: int = 2_000_000
    rpm: int = 10_000
    concurrency: int = 400
    stagger_s: float = 0.01
    jitter_ratio: float = 0.2
    headroom: float = 0.01
    first_token_s: float = 0.359
    per_token_s: float = 0.0136
    sigma: float = 0.25
    reserved_ratio: float = 1.0


PACED = Load("paced")
REFUSED = Load("refused", reserved_ratio=0.7)


@dataclass(frozen=True)
class Outcome:
    """What a run came to, to see that both sides did the same work."""

    ended: int
    throttled: int
    makespan_s: float


def requests(load: Load, count: int) -> Columns:
    """Prompts as in vidur's arXiv trace (P50 2,730, P95 3,813), answers P50 167, P95 736, charged by their prompts."""
    workload = parametric(count, prompt_tokens=(2_730, 3_813), output_tokens=(167, 736), max_tokens=4_096, seed=SEED)
    rule = {"reserve_rule": "prompt_chars4", "charge_rule": "prompt_chars4"}
    made = columns(workload, est_tokens_per_run=1, **rule)
    if load.reserved_ratio == 1.0:
        return made
    return replace(made, reserve=np.floor(made.reserve * load.reserved_ratio))


def params(load: Load) -> Params:
    """The peer's rules as ours. Its requests per minute know no headroom."""
    policy = Policy(
        max_concurrency=load.concurrency,
        stagger_seconds=load.stagger_s,
        jitter_ratio=load.jitter_ratio,
        tpm_limit=load.tpm,
        tpm_headroom=load.headroom,
        rpm_limit=load.rpm,
        tpm_window="bucket",
        launch_order="fifo",
        settle=False,
        backoff_keeps_permit=True,
        hold_on_throttle=False,
        sync_headers=False,
        refund_throttled=False,
        request_timeout_seconds=86_400.0,
    )
    made = policy.params()
    made.budget[RPM] = float(load.rpm)
    made.rate_per_s[RPM] = load.rpm / MINUTE_S
    return made


def provider(load: Load) -> ProviderParams:
    """The peer's provider as ours."""
    return ProviderParams(
        limit=list(amounts(load.tpm, load.rpm)),
        first_token_s=load.first_token_s,
        per_token_s=load.per_token_s,
        sigma=load.sigma,
        refusal_s=0.0,
    )


def ours(load: Load, work: Columns) -> Callable[[], Outcome]:
    """A run of our driver."""

    def run() -> Outcome:
        tally = Simulation(work, params(load), provider(load), seed=SEED).run()
        return Outcome(tally.requests, tally.throttled, tally.last_s)

    return run


def peers(load: Load, work: Columns) -> Callable[[], Outcome]:
    """A run of the peer, whose lists are made here and not in its time."""
    prompt, output = work.prompt_tokens.tolist(), np.minimum(work.output_tokens, work.cap).tolist()
    reserve, charge = work.reserve.astype(np.int64).tolist(), work.charge.astype(np.int64).tolist()

    def run() -> Outcome:
        totals = peer_simpy.run(
            prompt,
            output,
            reserve=reserve,
            charge=charge,
            concurrency=load.concurrency,
            stagger_s=load.stagger_s,
            jitter_ratio=load.jitter_ratio,
            tpm_limit=load.tpm,
            rpm_limit=load.rpm,
            headroom=load.headroom,
            base_latency_s=load.first_token_s,
            per_token_s=load.per_token_s,
            sigma=load.sigma,
            seed=SEED,
        )
        return Outcome(totals.completed + totals.failed, totals.throttled, totals.makespan_s)

    return run


def timed(run: Callable[[], Outcome]) -> tuple[float, Outcome]:
    """CPU seconds of one run, and what it came to."""
    gc.collect()
    begun = time.process_time()
    outcome = run()
    return time.process_time() - begun, outcome


def in_turn(runs: list[Callable[[], Outcome]], repeats: int) -> list[tuple[float, Outcome]]:
    """Median CPU seconds of each run, taken in turn."""
    times: list[list[float]] = [[] for _ in runs]
    outcomes = [Outcome(0, 0, 0.0) for _ in runs]
    for _ in range(repeats):
        for i, run in enumerate(runs):
            taken_s, outcomes[i] = timed(run)
            times[i].append(taken_s)
    return [(median(taken), outcome) for taken, outcome in zip(times, outcomes, strict=True)]


# ---------------------------------------------------------------- memory


def held_mb(peak: bool) -> float:
    """Memory of this process in MB (10^6 bytes), now or at its peak."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux starts at what the parent held when it forked.
        name = "VmHWM:" if peak else "VmRSS:"
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024 / 1e6
    if not peak:
        import psutil

        return psutil.Process().memory_info().rss / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def memory(count: int) -> dict[str, float]:
    """One run of `count` requests in this process: MB after the imports, and the peaks above that."""
    imported = held_mb(peak=False)
    work = requests(PACED, count)
    drawn = held_mb(peak=True) - imported
    taken_s, outcome = timed(ours(PACED, work))
    assert outcome.ended == count, outcome
    return {"imported": imported, "drawn": drawn, "run": held_mb(peak=True) - imported, "taken_s": taken_s}


def memory_apart(count: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_driver", "--memory", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


# ---------------------------------------------------------------- the table


def compare(load: Load, count: int, repeats: int) -> float:
    """One line of the table; our CPU microseconds per request."""
    work = requests(load, count)
    (ours_s, our), (peer_s, peer) = in_turn([ours(load, work), peers(load, work)], repeats)
    assert our.ended == peer.ended == count, (our, peer)
    per_request = 1e6 * ours_s / count
    rates = f"{count / ours_s:>12,.0f} {count / peer_s:>12,.0f} {peer_s / ours_s:>7.2f} {per_request:>9.1f}"
    ends = f"{our.makespan_s:>11,.1f} {peer.makespan_s:>11,.1f} {our.throttled:>7,} {peer.throttled:>7,}"
    print(f"{load.name:8} {count:>9,} {rates} {ends}", flush=True)
    return per_request


def main() -> None:
    """The table on standard output."""
    if "--memory" in sys.argv:
        print(json.dumps(memory(int(sys.argv[sys.argv.index("--memory") + 1]))))
        return
    short = "--short" in sys.argv
    many = 100_000 if short else 1_000_000
    print(f"requests per CPU second, median of {REPEATS}; Python {sys.version.split()[0]}, {sys.platform}")
    print(
        f"{'load':8} {'requests':>9} {'ours':>12} {'peer':>12} {'ratio':>7} {'us each':>9}"
        f" {'makespan s':>11} {'peer':>11} {'429s':>7} {'peer':>7}"
    )
    first = compare(PACED, 1_000, 5 * REPEATS)
    compare(PACED, 10_000, REPEATS)
    if not short:
        compare(PACED, 100_000, REPEATS)
    compare(REFUSED, 10_000, REPEATS)
    work = requests(PACED, many)
    ((taken_s, outcome),) = in_turn([ours(PACED, work)], REPEATS)
    each = 1e6 * taken_s / many
    print(
        f"{PACED.name:8} {many:>9,} {many / taken_s:>12,.0f} {'':>12} {'':>7} {each:>9.1f} {outcome.makespan_s:>11,.1f}"
    )
    print(f"cost per request, {many:,} against 1,000: {each / first:.2f} times")
    held = memory_apart(many)
    print(
        f"peak memory of {many:,} requests above the imports' {held['imported']:.0f} MB: {held['run']:.0f} MB "
        f"({held['drawn']:.0f} MB for drawing them); the limit for a million is {LIMIT_MB} MB"
    )


if __name__ == "__main__":
    main()

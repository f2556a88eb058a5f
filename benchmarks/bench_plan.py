"""`plan` for 400 requests: how long it takes, all in, and whether its front is as good as that of a search with SimPy.

    python -m benchmarks.bench_plan [--short] [--seed N]

Times: the commands themselves in processes of their own, warm (the machine code is in its cache), wall and processor
time of all their processes, median and extremes: `plan` of 400 requests with its report, `simulate` of 1,000, and one
what-if of 1,000 requests in 50 runs within a process. What is promised for a quiet machine of two cores stands beside.

Fronts, both sides in the same run, on scenarios drawn as for a new user (a quota of 30,000 or 60,000 tokens per
minute, today's guardrails): the same search on SimPy at the effort `quick` (what SimPy can do in some ten seconds), and
Optuna's NSGA-II (ask and tell, its own constraints) with as many simulated requests as our search asked for. The
settings of every front are estimated again under the same fresh seeds; a front is judged by its fastest setting that
loses nothing and keeps the throttle limit there, with the paired difference to ours and its 95 % interval.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import numpy as np

from governor.model.policy import Policy
from sim.experiment.experiment import Pool, replicate
from sim.experiment.results import Estimate, Forecast, Plan, estimate, forecast_of
from sim.experiment.runs import Runs
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import ModelSource, Scenario
from sim.scenario.stress import Condition
from sim.selection.planner import FRESH_SEEDS, plan
from sim.selection.search import Goal
from sim.selection.space import full_space

ROWS = 400
FRESH_RUNS = 20


def scenario_of(seed: int) -> Scenario:
    """400 drawn requests, today's guardrails."""
    rng = np.random.default_rng(seed)
    tpm = int(rng.choice([30_000, 60_000]))
    p50 = float(rng.integers(500, 1_500))
    source = ModelSource(
        requests=ROWS, prompt_tokens=(p50, 3.0 * p50), output_tokens=(150.0, 700.0), max_tokens=1_000, seed=seed
    )
    rule = str(rng.choice(["prompt_chars4", "max_of", "prompt_plus_max"]))
    provider = ProviderConfig.model_validate({"tpm": tpm, "rpm": 500, "charge_rule": rule})
    return Scenario.of(source, provider=provider, policy=Policy(tpm_limit=tpm, rpm_limit=500), seed=seed)


# ---------------------------------------------------------------- times


def started(command: Sequence[str], runs: int) -> tuple[list[float], list[float]]:
    """Wall and processor seconds of the command in a process of its own, several times; a first one is not counted."""
    walls, cpus = [], []
    for i in range(runs + 1):
        begun, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, "-m", "sim.app.cli", *command], check=True, stdout=DEVNULL, stderr=DEVNULL)
        after = os.times()
        if i:  # the first one may have to compile
            walls.append(time.perf_counter() - begun)
            cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return walls, cpus


def what_if(runs: int) -> tuple[list[float], list[float]]:
    """The same of 50 runs of 1,000 requests within this process."""
    source = ModelSource(requests=1_000, prompt_tokens=(800.0, 2_400.0), output_tokens=(150.0, 700.0), seed=1)
    policy = Policy.preset("paceline").with_(tpm_limit=300_000, max_concurrency=50, stagger_seconds=0.1)
    scenario = Scenario.of(source, provider=ProviderConfig(tpm=300_000), policy=policy)
    pool = Pool(engine="compiled")
    walls, cpus = [], []
    for i in range(4 * runs + 1):
        begun, before = time.perf_counter(), time.process_time()
        replicate(scenario, 50, pool=pool)
        if i:
            walls.append(time.perf_counter() - begun)
            cpus.append(time.process_time() - before)
    return walls, cpus


def _told(name: str, promised_s: float, walls: Sequence[float], cpus: Sequence[float]) -> None:
    digits = 2 if promised_s >= 1.0 else 3
    print(
        f"{name}: {statistics.median(walls):.{digits}f} s wall ({min(walls):.{digits}f} to {max(walls):.{digits}f}), "
        f"{statistics.median(cpus):.{digits}f} s processor time, {len(walls)} runs; promised: under {promised_s:g} s "
        f"(load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)",
        flush=True,
    )


def timed(runs: int) -> None:
    """The commands, several times each."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(1)
        paths = []
        for count in (ROWS, 1_000):
            lengths = rng.lognormal(6.8, 0.7, count).astype(int), rng.lognormal(5.2, 0.8, count).astype(int)
            paths.append(Path(folder) / f"trace-{count}.csv")
            rows = "".join(f"{p},{o}\n" for p, o in zip(*lengths, strict=True))
            paths[-1].write_text(f"prompt_tokens,output_tokens\n{rows}")
        columns = ("--columns", "prompt=prompt_tokens,output=output_tokens")
        plan_of = ["plan", str(paths[0]), *columns, "--out", str(Path(folder) / "out")]
        _told(f"plan of {ROWS} requests, effort normal, report included", 5.0, *started(plan_of, runs))
        _told("simulate of 1,000 requests", 1.0, *started(["simulate", str(paths[1]), *columns], runs))
    _told("what-if of 1,000 requests, 50 runs, in process", 0.05, *what_if(runs))


# ---------------------------------------------------------------- fronts


def front_of(found: Plan) -> list[Policy]:
    """The settings on a plan's front, and its recommendation."""
    return [found.full.policy, *(point.policy for point in found.points if point.on_front)]


def nsga2(scenario: Scenario, requests: int, seed: int, pool: Pool) -> list[Policy]:
    """Optuna's NSGA-II over the same values: makespan and throttles, losses as its constraint, one run a trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ladders = full_space(scenario).ladders
    sampler = optuna.samplers.NSGAIISampler(seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    study.enqueue_trial({name: ladder.index(getattr(scenario.policy, name)) for name, ladder in ladders.items()})
    runs, condition = Runs(pool), Condition("", scenario)
    trials = max(1, requests // len(scenario.workload))
    policies: dict[int, Policy] = {}
    while trials > 0:
        # A generation at a time, so that it has the cores as we have.
        asked = [study.ask() for _ in range(min(50, trials))]
        for trial in asked:
            rungs = {name: ladder[trial.suggest_int(name, 0, len(ladder) - 1)] for name, ladder in ladders.items()}
            policies[trial.number] = scenario.policy.with_(**rungs)
        runs.require((condition, policies[t.number], [scenario.seed + t.number % 3]) for t in asked)
        for trial in asked:
            (run,) = runs.figures(condition, policies[trial.number], [scenario.seed + trial.number % 3])
            trial.set_constraint("lost", run["failed"])
            study.tell(trial, [run["makespan_s"], run["throttled_per_100"]])
        trials -= len(asked)
    return [policies[trial.number] for trial in study.best_trials]


def best_of(scenario: Scenario, policies: Sequence[Policy], pool: Pool) -> Forecast | None:
    """The fastest of the settings that keeps the limits on fresh seeds; None if none does."""
    runs, condition = Runs(pool), Condition("", scenario)
    first = scenario.seed + 2 * FRESH_SEEDS
    unique = {repr(policy): policy for policy in policies}.values()
    runs.require((condition, policy, range(first, first + FRESH_RUNS)) for policy in unique)
    found = [forecast_of(p, runs.figures(condition, p, range(first, first + FRESH_RUNS))) for p in unique]
    kept = [f for f in found if f.lost == 0 and f["throttled_per_100"].mean <= Goal().max_throttled_per_100]
    return min(kept, key=lambda f: f["makespan_s"].mean, default=None)


def _line(name: str, best: Forecast | None, ours: Forecast, seconds: float, requests: int) -> Estimate | None:
    if best is None:
        print(f"  {name:22s} nothing that keeps the limits    {requests:9,d} requests {seconds:6.1f} s", flush=True)
        return None
    pairs = zip(best.runs, ours.runs, strict=True)
    ahead = estimate([(a["makespan_s"] - b["makespan_s"]) / ours["makespan_s"].mean for a, b in pairs])
    print(
        f"  {name:22s} {best['makespan_s'].mean:9.1f} s  ({100.0 * ahead.mean:+6.2f} % [{100.0 * ahead.low:+.2f}, "
        f"{100.0 * ahead.high:+.2f}]) {requests:9,d} requests {seconds:6.1f} s",
        flush=True,
    )
    return ahead


def compared(seed: int, peers: dict[str, list[Estimate | None]]) -> None:
    """One scenario: ours, the same search on SimPy, Optuna."""
    scenario, fast = scenario_of(seed), Pool(engine="compiled")

    def searched(effort: str, pool: Pool) -> tuple[Plan, float]:
        begun = time.perf_counter()
        found = plan(scenario, effort=effort, pool=pool)
        return found, time.perf_counter() - begun

    mine, seconds = searched("normal", fast)
    provider = scenario.provider
    print(f"scenario {seed}: {provider.tpm:,} tokens per minute, charged by {provider.charge_rule}", flush=True)
    ours = best_of(scenario, front_of(mine), fast)
    if ours is None:
        print("  ours: nothing that keeps the limits", flush=True)
        return
    _line("compiled, normal", ours, ours, seconds, mine.requests_simulated)
    theirs, seconds = searched("quick", Pool(engine="simpy"))
    requests = theirs.requests_simulated
    peers["SimPy, quick"].append(
        _line("SimPy, quick", best_of(scenario, front_of(theirs), fast), ours, seconds, requests)
    )
    begun = time.perf_counter()
    found = nsga2(scenario, mine.requests_simulated, seed, fast)
    seconds = time.perf_counter() - begun
    best = best_of(scenario, found, fast)
    peers["Optuna NSGA-II"].append(_line("Optuna NSGA-II", best, ours, seconds, mine.requests_simulated))


def main() -> None:
    """Prints times, then fronts, then who was ahead how often."""
    short = "--short" in sys.argv
    seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
    timed(1 if short else 5)
    print(
        "fastest setting on the front that keeps the limits, mean of fresh seeds (+ = slower than ours, paired, 95 %)"
    )
    peers: dict[str, list[Any]] = {"SimPy, quick": [], "Optuna NSGA-II": []}
    for i in range(1 if short else 6):
        compared(100 * seed + i, peers)
    for name, found in peers.items():
        known = [each for each in found if each is not None]
        ahead = sum(each.high < -0.003 for each in known)
        print(f"{name}: faster than ours by more than 0.3 % in {ahead} of {len(found)} scenarios, "
              f"nothing valid in {len(found) - len(known)}")  # fmt: skip


if __name__ == "__main__":
    main()

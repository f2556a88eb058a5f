"""How often a plan's published limits hold: percentiles and means of runs, the loss bound, against very many runs.

    python -m benchmarks.bench_percentiles [--short] [--seed N] [--write]

Scenarios are drawn (limits, neighbours, stalls, faults, settings). Of each one very many runs are made: all of them
together are the truth, and blocks of 100, as many as a plan publishes, each give the figures as the plan would. Counted
is how often the limits contain the truth, and how often the run after a block ends before the P95 that the block says.
Each line has the interval (95 %, Clopper and Pearson) of its own coverage; blocks of one scenario share its truth,
whose own error is a tenth of theirs.
"""

from __future__ import annotations

import sys

import numpy as np

from benchmarks.page import publish, rows, told
from governor.model.policy import Policy
from sim.experiment.experiment import Pool, case_of
from sim.experiment.results import at_most, estimate, percentile
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import ModelSource, Scenario

BLOCK = 100


def scenario_of(seed: int) -> Scenario:
    """A small batch against a drawn provider, under drawn settings."""
    rng = np.random.default_rng(seed)
    tpm = int(rng.choice([30_000, 100_000, 1_000_000]))
    source = ModelSource(
        requests=int(rng.integers(20, 60)), prompt_tokens=(500, 1_500), output_tokens=(150, 700), max_tokens=1_000,
        seed=seed,
    )  # fmt: skip
    late = {"first_token_s": 0.6, "per_token_s": 0.02, "sigma": float(rng.uniform(0.1, 0.6)),
            "stall_ratio": float(rng.choice([0.0, 0.005, 0.02])), "stall_min_s": 10.0, "stall_max_s": 60.0}  # fmt: skip
    provider = {
        "tpm": tpm,
        "latency": late,
        "faults": {"error_ratio": float(rng.choice([0.0, 0.05, 0.2]))},
        "cotenant": {"share": float(rng.choice([0.1, 0.25])), "burst_s": 15.0, "period_s": 60.0},
    }
    policy = Policy(
        tpm_limit=tpm, tpm_window="bucket", charge_rule="auto", stagger_seconds=float(rng.choice([0.1, 1.0])),
        max_concurrency=int(rng.choice([3, 20])), retry_max_attempts=int(rng.choice([3, 5])),
    )  # fmt: skip
    return Scenario.of(source, provider=ProviderConfig.model_validate(provider), policy=policy, seed=seed)


def main() -> None:
    """Prints one line for each kind of limit."""
    short = "--short" in sys.argv
    begun = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
    scenarios, blocks = (5, 20) if short else (25, 100)
    held: dict[str, list[bool]] = {}
    pool = Pool(engine="compiled")
    for seed in range(begun, begun + scenarios):
        scenario = scenario_of(seed)
        (runs,) = pool.run([(case_of(scenario), range(first := 1_000_000 * seed, first + BLOCK * blocks))])
        times = np.array([run["makespan_s"] for run in runs])
        lost, requests = sum(run["failed"] for run in runs), len(scenario.workload)
        truth = {ratio: float(np.quantile(times, ratio)) for ratio in (0.5, 0.95)}
        for i in range(0, len(times), BLOCK):
            mine = times[i : i + BLOCK]
            for ratio, true in truth.items():
                p = percentile(mine, ratio)
                held.setdefault(f"P{100 * ratio:g}, limits", []).append(p.low <= true <= p.high)
                after = float(times[(i + BLOCK) % len(times)])
                held.setdefault(f"P{100 * ratio:g}, next run below", []).append(after <= p.value)
            mean = estimate(mine)
            held.setdefault("mean, interval", []).append(mean.low <= times.mean() <= mean.high)
            gone = sum(run["failed"] for run in runs[i : i + BLOCK])
            if lost:
                bound = at_most(int(gone), BLOCK * requests)
                held.setdefault("loss, upper bound", []).append(lost / (len(runs) * requests) <= bound)
    what = f"{scenarios} scenarios (seed {begun}), each {blocks} blocks of {BLOCK} runs"
    lines = [[name, told(sum(found), len(found))] for name, found in held.items()]
    print(what, *(f"  {name:22s} {coverage}" for name, coverage in lines), sep="\n")
    if "--write" in sys.argv:
        publish("percentiles", rows([what, "holds"], lines), "python -m benchmarks.bench_percentiles --write")


if __name__ == "__main__":
    main()

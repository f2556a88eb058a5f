"""Whether plans of random small scenarios end within their bound, and keep their word on a plain mirrored window.

`python -m benchmarks.bench_scenarios [--scenarios 1000] [--seed 1] [--bimodal 4]`. Each scenario is planned at effort
quick. Counted: plans beyond the bound that the help of `--effort` names, or stopped by the clock; and recommendations
that are slower than a plain mirrored window by more than 1 % as assumed, on 200 seeds of their own, while the report
shows no condition that forbids it. `--bimodal`: of so many of them the workload is 300 requests of two kinds at 30,000
tokens per minute. Exit 1 where any of them fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import numpy as np

from governor.model.policy import Policy
from sim.experiment.experiment import Pool, replicate
from sim.experiment.results import Plan, paired_difference
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import ModelSource, Scenario
from sim.selection.planner import most_requests, plan
from sim.selection.space import plain_mirror

# Seeds that no plan uses.
OWN_SEEDS, RUNS = 5_000_000, 200
AHEAD = 0.01


def drawn_scenario(seed: int, requests: int = 0) -> Scenario:
    """A batch against a drawn provider: limits, neighbours, stalls, settings."""
    rng = np.random.default_rng(seed)
    prompt = float(rng.integers(200, 3_000))
    source = ModelSource(
        requests=requests or int(rng.integers(1, 120)),
        prompt_tokens=(prompt, prompt * float(rng.uniform(1.2, 4.0))),
        output_tokens=(100.0, float(rng.integers(150, 1_200))),
        max_tokens=int(rng.choice([800, 1_500, 4_000])),
        seed=seed,
    )
    tpm = int(rng.choice([20_000, 60_000, 500_000]))
    late = {"first_token_s": float(rng.uniform(0.2, 2.0)), "per_token_s": 0.02, "sigma": float(rng.uniform(0.1, 0.6)),
            "stall_ratio": float(rng.choice([0.0, 0.02])), "stall_min_s": 10.0, "stall_max_s": 60.0}  # fmt: skip
    provider = {
        "tpm": tpm,
        "rpm": int(rng.choice([60, 500])),
        "charge_rule": str(rng.choice(["auto", "max_of", "prompt_plus_max", "prompt_chars4"])),
        "settles": bool(rng.integers(2)),
        "latency": late,
        "faults": {"error_ratio": float(rng.choice([0.0, 0.05]))},
    }
    if rng.integers(2):
        provider["cotenant"] = {"share": 0.25, "burst_s": 15.0, "period_s": 60.0}
    policy = Policy(tpm_limit=tpm, stagger_seconds=float(rng.choice([0.0, 2.0, 15.0])), max_concurrency=3)
    scenario = Scenario.of(source, provider=ProviderConfig.model_validate(provider), policy=policy, seed=seed)
    return scenario.fitted(skip_oversized=True)


def bimodal_scenario(seed: int) -> Scenario:
    """300 requests, four in five short, the others long, at 30,000 tokens per minute."""
    rng = np.random.default_rng(seed)
    source = ModelSource(
        requests=300, prompt_tokens=(1_000, 2_000), output_tokens=(200, 400), max_tokens=2_000, seed=seed
    )
    scenario = Scenario.of(source, provider=ProviderConfig().with_(tpm=30_000, rpm=500), policy=Policy(), seed=seed)
    is_long = rng.random(300) < 0.2
    prompt = np.where(is_long, rng.integers(3_500, 5_000, 300), rng.integers(150, 350, 300)).astype(np.int64)
    output = np.where(is_long, rng.integers(700, 1_200, 300), rng.integers(30, 80, 300)).astype(np.int64)
    return scenario.with_(workload=scenario.workload.with_(prompt_tokens=prompt, output_tokens=output))


def is_unsaid(scenario: Scenario, found: Plan) -> float:
    """By which share a plain mirrored window is faster as assumed, where the report shows no condition; else 0."""
    if any(each.name == "a plain mirrored window" for each in found.full.passed_over):
        return 0.0
    own = replace(scenario, seed=scenario.seed + OWN_SEEDS)
    pool = Pool(1, engine="compiled")
    mine, plain = (
        replicate(own, RUNS, policy=policy, pool=pool) for policy in (found.full.policy, plain_mirror(scenario))
    )
    gain = paired_difference(mine, plain, "makespan_s")
    ratio = gain.mean / mine["makespan_s"].mean
    return ratio if ratio > AHEAD and gain.low > 0.0 else 0.0


def main() -> None:
    """Plan them all and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bimodal", type=int, default=4)
    asked = parser.parse_args()
    worst_s, most, endless, unsaid, shown, asks = 0.0, 0, 0, 0, 0, 0
    for i in range(asked.scenarios):
        seed = 10_000 * asked.seed + i
        scenario = bimodal_scenario(seed) if i < asked.bimodal else drawn_scenario(seed)
        begun_s = time.process_time()
        found = plan(scenario, effort="quick", pool=Pool(1, engine="compiled"))
        took_s = time.process_time() - begun_s
        worst_s, most = max(worst_s, took_s), max(most, found.requests_simulated)
        if found.out_of_time or found.requests_simulated > most_requests("quick", len(scenario.workload)):
            endless += 1
            print(f"seed {seed}: {found.requests_simulated:,} requests simulated, {took_s:.1f} s of CPU", flush=True)
        ratio = is_unsaid(scenario, found)
        if ratio:
            unsaid += 1
            print(f"seed {seed}: a plain mirrored window is {ratio:.1%} faster, and the report is silent", flush=True)
        shown += bool(found.full.passed_over)
        asks += bool(found.find_out)
        if (i + 1) % 20 == 0:
            print(
                f"{i + 1:,} planned: {endless} beyond the bound, {unsaid} slower than the plain bucket unsaid; {shown} "
                f"show what robustness costs, {asks} what to find out; worst {worst_s:.1f} s of CPU, {most:,} requests",
                flush=True,
            )
    sys.exit(bool(endless or unsaid))


if __name__ == "__main__":
    main()

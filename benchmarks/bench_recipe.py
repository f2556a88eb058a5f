"""The recommendation against a fixed recipe that needs no search, over drawn scenarios.

    python -m benchmarks.bench_recipe [--short] [--seed N]

The recipe (`sim.selection.space.recipe`): the provider's bucket mirrored, 1 % headroom, first in first out, 1,000 in
flight, the documented charge rule or, where the operator knows it, the provider's. The kinds of scenario: a bursty
co-tenant, a charge rule that is not the documented one, RPM-bound, slow latency, few requests, many requests. For each:
makespan of both under the same fresh seeds, their paired difference with its 95 % interval, and whether each keeps the
limits (no request lost, at most 1 throttle per 100, or 1 in a batch of fewer). The headline is over the scenarios in
which both keep them.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from governor.model.policy import Policy
from sim.experiment.experiment import Pool, replicate
from sim.experiment.results import Forecast, paired_difference
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.scenario.scenario import ModelSource, Scenario
from sim.selection.planner import FRESH_SEEDS, plan
from sim.selection.space import recipe

KINDS = ("co-tenant", "wrong rule", "RPM-bound", "slow latency", "few", "many")
CAPS = np.array([128, 256, 512, 1024, 2048, 4096])


def drawn(kind: str, seed: int) -> tuple[Scenario, Policy]:
    """A scenario of that kind, and the recipe as an operator would set it there."""
    rng = np.random.default_rng(seed)
    rows = {"few": rng.integers(8, 40), "many": rng.integers(2_000, 4_000)}.get(kind, rng.integers(100, 400))
    rows = int(rows)
    prompts = np.clip(rng.lognormal(6.8, 0.8, rows), 20, 7_000).astype(np.int64)
    caps = rng.choice(CAPS, rows)
    answers = np.clip(caps * 0.25 * rng.lognormal(0.0, 0.8, rows), 1, 20_000).astype(np.int64)
    rule = str(rng.choice(["prompt_chars4", "max_of", "prompt_plus_max"]))
    tpm = int(rng.choice([30_000, 60_000, 200_000]))
    changes: dict[str, object] = {"tpm": tpm, "rpm": 500, "charge_rule": rule}
    if kind == "many":
        changes |= {"tpm": 2_000_000, "rpm": 5_000}
    if kind == "co-tenant":
        share = float(np.round(rng.uniform(0.1, 0.35), 2))
        changes["cotenant"] = {"share": share, "burst_s": float(rng.integers(5, 25)), "period_s": 60.0}
    if kind == "wrong rule":
        changes["charge_rule"] = str(rng.choice(["prompt_chars4", "prompt_plus_max"]))
    if kind == "RPM-bound":
        changes |= {"tpm": 2_000_000, "rpm": int(rng.integers(20, 120))}
    if kind == "slow latency":
        changes["latency"] = {"preset": "gpt-4o", "scale": float(np.round(rng.uniform(2.0, 5.0), 1))}
    provider = ProviderConfig.model_validate(changes)
    # The source only stands in: the rows are drawn here, with a declared cap of their own each.
    source = ModelSource(requests=rows, prompt_tokens=(900, 3_000), output_tokens=(200, 900), seed=seed)
    scenario = Scenario.of(source, provider=provider, policy=Policy(tpm_limit=provider.tpm, rpm_limit=provider.rpm))
    scenario = replace(scenario, workload=from_tokens(prompts, answers, max_tokens=caps)).fitted(skip_oversized=True)
    fixed = recipe(scenario)
    return scenario, fixed.with_(charge_rule="max_of") if kind == "wrong rule" else fixed


def keeps(found: Forecast) -> bool:
    """Whether nothing was lost and at most 1 of 100 requests throttled."""
    return found.lost == 0 and found["throttled_per_100"].mean <= max(1.0, 100.0 / found.requests)


def main() -> None:
    """Prints the table and the headline."""
    short = "--short" in sys.argv
    seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
    each = 1 if short else 5
    print(f"seed {seed}; makespan in seconds, mean over fresh seeds; difference = recipe - recommended, paired, 95 %")
    print(f"{'kind':13s} {'n':>5s} {'rule':16s} {'recipe':>9s} {'thr/100':>8s} {'lost':>5s} {'recommended':>12s}"
          f" {'thr/100':>8s} {'lost':>5s} {'ratio':>6s}  difference")  # fmt: skip
    ratios, worse, recipe_breaks, ours_break = [], 0, 0, 0
    pool = Pool()
    for kind in KINDS:
        for i in range(each):
            scenario, fixed = drawn(kind, 1_000 * seed + 10 * KINDS.index(kind) + i)
            found = plan(scenario, effort="quick", pool=pool).full.forecast
            runs = len(found.runs)
            base = replicate(scenario.with_(seed=scenario.seed + FRESH_SEEDS), runs, policy=fixed, pool=pool)
            gain = paired_difference(base, found, "makespan_s")
            ratio = base["makespan_s"].mean / found["makespan_s"].mean
            recipe_breaks += not keeps(base)
            ours_break += not keeps(found)
            if keeps(base) and keeps(found):
                ratios.append(ratio)
                worse += gain.high < 0.0
            print(
                f"{kind:13s} {len(scenario.workload):5d} {scenario.provider.charge_rule:16s}"
                f" {base['makespan_s'].mean:9.1f} {base['throttled_per_100'].mean:8.2f} {base.lost:5d}"
                f" {found['makespan_s'].mean:12.1f} {found['throttled_per_100'].mean:8.2f} {found.lost:5d}"
                f" {ratio:6.3f}  {gain.mean:.1f} [{gain.low:.1f}, {gain.high:.1f}]",
                flush=True,
            )
    print(f"limits broken: by the recipe in {recipe_breaks}, by the recommendation in {ours_break} of {6 * each}")
    if ratios:
        print(
            f"where both keep them ({len(ratios)}): recipe / recommended {np.median(ratios):.3f} in the median "
            f"(min {min(ratios):.3f}, max {max(ratios):.3f}); recommendation worse beyond the interval in {worse}"
        )


if __name__ == "__main__":
    main()

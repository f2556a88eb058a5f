"""Does `auto` decide well? Drawn cases, each run in simulation, against a bound that no mix can go below.

A case draws the deadline, how much of it live calls alone would need, the provider's turnaround, how wrong the belief
of it is, the queue's limit and the sizes of requests. The run is the twin's: law, scheduler and synthetic provider for
live calls, the synthetic Batch API beside them, and `governor.forecast.mixes.decide` between them.

The clairvoyant knows how long each batch will take. Its bound is generous: live calls take no time, a batch may be cut
off at any moment and keeps what is done, and a queue is filled to the last token at all times. So `auto` cannot be
expected to reach it, and being within so much of it is being within less of the best real mix.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.batchapi.limits import EXPIRES_S, FILE_LINES
from governor.forecast.mixes import batch_lines, live_rate, turnaround_of
from governor.model.keyed import BATCH_TURNAROUND, keyed_uniform, normal_quantile
from governor.model.policy import Policy
from sim.des.mixed import BATCH, Mix, MixedSimulation
from sim.experiment.experiment import case_of
from sim.model.batches import BatchApi
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens, sigma_of
from sim.model.workload import Columns
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource

CASES, COST_RATIO, IN_TIME = 200, 1.05, 0.95
BATCH_FACTOR, CAP = 0.5, 1_000
# Of an answer of 180 tokens, by the measured line.
SERVICE_S = 0.214 + 0.0193 * 180.0


@dataclass(frozen=True, slots=True)
class Case:
    """One drawn case; `live_ratio`: what live calls alone would need, as a share of the time there is."""

    seed: int
    scenario: Scenario
    horizon_s: float
    live_ratio: float
    turnaround_s: tuple[float, float]
    believed_s: tuple[float, float]
    queue_tokens: int
    file_requests: int


@dataclass(frozen=True, slots=True)
class Result:
    """How a case went. Costs in units of all live; `bound`: what no mix can go below, inf = none is in time."""

    case: Case
    cost: float
    bound: float
    finish_s: float
    lost: int
    by_batch: float
    decisions: int

    @property
    def is_in_time(self) -> bool:
        """Return whether everything was answered by the deadline."""
        return not self.lost and self.finish_s <= self.case.horizon_s


def drawn(seed: int) -> Case:
    """Return a case."""
    rng = random.Random(seed)

    def between(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    count = rng.randint(150, 500)
    horizon_s = between(3_600.0, 86_400.0)
    live_ratio = between(0.03, 1.5)
    sizes = np.random.default_rng(seed)
    prompt = np.maximum(20, sizes.lognormal(math.log(800.0), 0.6, count)).astype(np.int64)
    output = np.maximum(5, sizes.lognormal(math.log(150.0), 0.6, count)).astype(np.int64)
    workload = from_tokens(prompt, output, max_tokens=CAP).with_(models="m")
    policy = Policy.preset("paceline").with_(max_concurrency=64, stagger_seconds=0.0)
    scenario = Scenario.of(
        ModelSource(requests=1, prompt_tokens=(800, 2_000), output_tokens=(150, 400), seed=seed),
        policy=policy,
        seed=seed,
    ).with_(workload=workload)
    charge = scenario.columns().charge
    tpm = max(int(float(charge.sum()) / (live_ratio * horizon_s / 60.0)), int(2.5 * charge.max()))
    scenario = scenario.with_(provider=ProviderConfig(tpm=tpm, rpm=0), policy=policy.with_(tpm_limit=tpm, rpm_limit=0))
    p50 = between(900.0, 8 * 3_600.0)
    p95 = p50 * rng.uniform(1.5, 6.0)
    wrong = math.exp(math.log(1.5) * rng.gauss(0.0, 1.0))
    queue = 0 if rng.random() < 0.3 else int(max(between(0.1, 3.0) * float(prompt.sum()), 2 * prompt.max()))
    return Case(
        seed,
        scenario,
        horizon_s,
        live_ratio,
        (p50, p95),
        (p50 * wrong, p95 * wrong),
        queue,
        batch_lines(count, FILE_LINES),
    )


def price_of(columns: Columns) -> NDArray[np.float64]:
    """Return what each request costs live, in any unit: an output token costs as much as four of the prompt."""
    found: NDArray[np.float64] = columns.prompt_tokens + 4.0 * np.minimum(columns.output_tokens, CAP)
    return found


def mix_of(case: Case, **changes: Any) -> Mix:
    """Return what a run of this case is told."""
    columns = case.scenario.columns()
    given: dict[str, Any] = {
        "models": ["m"] * len(columns),
        "saving_usd": (price_of(columns) * (1.0 - BATCH_FACTOR)).tolist(),
        "flex": [False] * len(columns),
        "batch_api": BatchApi(queue_tokens=case.queue_tokens, turnaround_s=case.turnaround_s),
        "queue_tokens": float(case.queue_tokens) if case.queue_tokens else math.inf,
        "file_requests": case.file_requests,
        "horizon_s": case.horizon_s,
        "turnaround": turnaround_of(*case.believed_s, expires_s=EXPIRES_S),
        "live": live_rate(case.scenario.policy, SERVICE_S),
    }
    return Mix(**given | changes)


def ran(case: Case) -> Result:
    """Run a case in simulation."""
    ready = case_of(case.scenario)
    price = price_of(ready.columns)
    run = MixedSimulation(ready.columns, ready.params, ready.provider, seed=case.seed, mix=mix_of(case))
    tally = run.run()
    by_batch = np.array([place == BATCH for place in run.place])
    cost = float((price * np.where(by_batch, BATCH_FACTOR, 1.0)).sum() / price.sum())
    least = bound(case, ready.columns, price)
    return Result(case, cost, least, tally.last_s, tally.failed, float(by_batch.mean()), run.decisions)


def bound(case: Case, columns: Columns, price: NDArray[np.float64]) -> float:
    """Return the cost below which no mix can be, with every request answered by the deadline."""
    prompt = np.asarray(columns.prompt_tokens, float)
    p50, p95 = case.turnaround_s
    horizon = case.horizon_s
    batches = []
    # The batches into which all requests go, in their order, each with the turnaround that its number draws.
    for number, start in enumerate(range(0, len(prompt), case.file_requests), 1):
        rows = slice(start, start + case.file_requests)
        score = normal_quantile(keyed_uniform(case.seed, number, 0, BATCH_TURNAROUND))
        batches.append(
            (p50 * math.exp(sigma_of(p50, p95) * score), float(prompt[rows].sum()), float(price[rows].sum()))
        )
    room = case.queue_tokens * horizon if case.queue_tokens else math.inf
    done_usd = 0.0
    for turnaround_s, tokens, usd in sorted(batches):
        held_s = min(turnaround_s, horizon, EXPIRES_S)
        taken = min(1.0, room / (tokens * held_s)) if tokens * held_s else 1.0
        room -= taken * tokens * held_s
        done_usd += taken * usd * held_s / turnaround_s
    live = 1.0 - done_usd / float(price.sum())
    # A full bucket is there at the start.
    charge = float(columns.charge.sum())
    tpm = case.scenario.provider.tpm
    is_possible = live * charge <= tpm * (horizon / 60.0 + 1.0)
    return live + (1.0 - live) * BATCH_FACTOR if is_possible else math.inf


def main() -> int:
    """Run the cases and print what was found; 1 if a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="One line per case.")
    given = parser.parse_args()
    began = time.process_time()
    count = given.cases or (20 if given.short else CASES)
    results = [ran(drawn(given.seed + i)) for i in range(count)]
    possible = [r for r in results if math.isfinite(r.bound)]
    ratios = sorted(r.cost / r.bound for r in possible)
    on_time = sum(r.is_in_time for r in possible)
    if given.list:
        for r in sorted(possible, key=lambda r: r.cost / r.bound):
            c = r.case
            queue = c.queue_tokens / float(c.scenario.workload.prompt_tokens.sum())
            late = "" if r.is_in_time else ", LATE"
            p50_h, p95_h, believed_h = c.turnaround_s[0] / 3600, c.turnaround_s[1] / 3600, c.believed_s[0] / 3600
            print(
                f"seed {c.seed}: {c.horizon_s / 3600:.1f} h, live {c.live_ratio:.2f} of it, turnaround {p50_h:.1f} to "
                f"{p95_h:.1f} h (believed {believed_h:.1f} h), queue {queue:.2f}; cost {r.cost:.3f}, bound "
                f"{r.bound:.3f}, {r.by_batch:.0%} by batch, done at {r.finish_s / c.horizon_s:.3f}, {r.decisions} "
                f"decisions{late}"
            )
    median = statistics.median(ratios)
    print(f"{count} cases, {len(possible)} that some mix finishes in time; {time.process_time() - began:.0f} s of CPU")
    print(f"cost over the clairvoyant's bound: median {median:.3f}, P95 {ratios[int(0.95 * len(ratios))]:.3f}")
    print(
        f"in time: {on_time} of {len(possible)} ({on_time / len(possible):.1%}); lost: {sum(r.lost for r in results)}"
    )
    saved = 1.0 - statistics.fmean(r.cost for r in possible)
    print(f"saved against live: {saved:.1%} in the mean")
    return 0 if median <= COST_RATIO and on_time >= IN_TIME * len(possible) else 1


if __name__ == "__main__":
    sys.exit(main())

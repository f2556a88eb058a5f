"""How often the best setting is picked, and what it costs: sequential halving against equal allocation.

    python -m benchmarks.bench_selection [--short] [--seed N]

Landscapes with a known optimum. Analytic ones: a bowl over two knobs under normal and under skewed noise; slippage, a
row in which every other setting is just beyond the indifference, the hardest case there is; settings that are a little
faster but 30 % slower in one run of 20, alone or a whole cluster under the same seeds. Their noise has a part that all
settings share, as keyed chance gives it. Simulated ones: very many runs of each setting are made by the engine, and a
trial draws its replications from them, the same ones for all settings, so that their means are the truth. A choice is
correct if its true mean is within the indifference of the best.

Equal allocation: so many replications for each setting, under common seeds, then the best mean; `n95` is the smallest
number from which on it is correct in 95 % of the same trials (isotonic regression over the numbers takes the trials'
noise out). Nobody knows n95 of his own landscape beforehand: whoever wants to be right on all of them gives each
setting the largest, which is what `equal` costs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from governor.model.policy import Policy
from sim.experiment.experiment import Pool, case_of
from sim.experiment.results import at_most
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import ModelSource, Scenario
from sim.selection.search import CLOSE, sequential_halving

Real = NDArray[np.float64]

INDIFFERENCE = 0.01
FINE = 0.003
MOST = 400
SKEW = 0.9
PROMISED = 0.95
# Rare long runs: so much slower, in this share of the runs.
LONG, RARE = 0.3, 0.05
ORDERS = ("fifo", "longest_first")


@dataclass(frozen=True)
class Landscape:
    """Settings with known means; `shared`, `own`: standard deviations of the noise.

    `rare`: settings that take 30 % longer in one run of 20; `together`: under the same seeds.
    `runs`: where the landscape is simulated, many runs of every setting, shape (settings, replications).
    """

    name: str
    means: Real
    shared: float
    own: float
    skewed: bool = False
    indifference: float = INDIFFERENCE
    rare: tuple[int, ...] = ()
    together: bool = False
    runs: Real | None = None

    def draw(self, rng: np.random.Generator, n: int) -> Real:
        """`n` replications of every setting under one chance, shape (settings, n)."""
        if self.runs is not None:
            return self.runs[:, rng.integers(0, self.runs.shape[1], n)]
        k = len(self.means)
        own = rng.standard_normal((k, n))
        if self.skewed:
            # Log-normal with mean 0 and standard deviation 1: rare long runs, as stalls make them.
            own = np.exp(SKEW * own)
            own = (own - np.exp(SKEW**2 / 2.0)) / np.sqrt((np.exp(SKEW**2) - 1.0) * np.exp(SKEW**2))
        found = self.means[:, None] + self.shared * rng.standard_normal(n) + self.own * own
        if self.rare:
            late = rng.random((1 if self.together else len(self.rare), n)) < RARE
            # `means` are the true ones: what the rare runs add is taken from the others.
            found[list(self.rare)] += 100.0 * LONG * (late - RARE)
        return found

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which settings count as correct."""
        best = float(self.means.min())
        return self.means <= best * (1.0 + self.indifference) + 1e-9 * best


def bowl(name: str, *, own: float, skewed: bool = False) -> Landscape:
    """A bowl over 8 x 6 settings whose best is 100, and its neighbours 1.5 to 4 worse."""
    x, y = np.meshgrid(np.arange(8), np.arange(6), indexing="ij")
    means = 100.0 + 1.6 * (x - 5) ** 2 + 2.4 * (y - 2) ** 2 + 0.9 * (x - 5) * (y - 2)
    return Landscape(name, means.ravel(), shared=12.0, own=own, skewed=skewed)


def slippage(settings: int = 24, *, own: float) -> Landscape:
    """One best, all others just beyond the indifference: no early stop can save much here."""
    means = np.full(settings, 100.0 * (1.0 + INDIFFERENCE) + 0.01)
    means[settings // 3] = 100.0
    return Landscape("slippage", means, shared=12.0, own=own)


def treacherous(name: str, rare: int, *, together: bool = False) -> Landscape:
    """The best and a row of settings 1 to 6 % worse, of which the first few look 0.5 % better in 19 runs of 20."""
    means = 100.0 + np.concatenate([[0.0], np.full(rare, 1.0), np.linspace(2.0, 6.0, 40 - rare)])
    return Landscape(
        name, means, shared=12.0, own=0.1, indifference=FINE, rare=tuple(range(1, rare + 1)), together=together
    )


Knobs = list[dict[str, object]]


def simulated(
    name: str,
    replications: int,
    grid: tuple[Knobs, Knobs],
    *,
    rows: int = 60,
    tpm: int,
    figure: str = "makespan_s",
    **provider: object,
) -> Landscape:
    """Two groups of knobs in a simulated scenario; the means are those of all `replications`."""
    source = ModelSource(requests=rows, prompt_tokens=(700, 2_000), output_tokens=(150, 600), max_tokens=800, seed=5)
    late = {"preset": "gpt-4o", "scale": 2.0, "stall_ratio": 0.002}
    config = {"tpm": tpm, "charge_rule": "max_of", "latency": late, **provider}
    scenario = Scenario.of(source, provider=ProviderConfig.model_validate(config), policy=Policy(tpm_limit=tpm))
    base = scenario.policy.with_(
        charge_rule="max_of", tpm_window="bucket", tpm_headroom=0.0, stagger_seconds=0.0, retry_max_attempts=15
    )
    policies = [base.with_(**x, **y) for x in grid[0] for y in grid[1]]
    found = Pool().run([(case_of(scenario, policy), range(replications)) for policy in policies])
    runs = np.array([[f[figure] for f in figures] for figures in found])
    return Landscape(name, runs.mean(axis=1), 0.0, 0.0, indifference=FINE, runs=runs)


def landscapes(brute: int) -> Iterator[Landscape]:
    """All of them, quiet and noisy; `brute`: runs of each simulated setting."""
    yield bowl("bowl", own=3.0)
    yield bowl("bowl, skewed", own=3.0, skewed=True)
    yield slippage(own=2.0)
    yield treacherous("rare long runs", 1)
    yield treacherous("rare, a cluster", 12, together=True)
    yield treacherous("rare, each its own", 12)
    places: Knobs = [{"max_concurrency": c, "stagger_seconds": 0.3} for c in (11, 12, 13, 14, 15, 16)]
    backoffs: Knobs = [{"backoff_base_seconds": b} for b in (0.8, 1.0, 1.3, 1.6, 2.0)]
    few, many = {"error_ratio": 0.08}, {"error_ratio": 0.2}
    calm = {"share": 0.2, "burst_s": 10.0, "period_s": 60.0}
    yield simulated("makespan, errors", brute, (places, backoffs), tpm=2_000_000, faults=few)
    yield simulated(
        "makespan, neighbour", brute, (places, backoffs), tpm=60_000, faults=few, cotenant=calm, retry_after="absent"
    )
    places = [{"max_concurrency": c} for c in (8, 10, 12, 14, 16)]
    orders: Knobs = [{"launch_order": o, "backoff_base_seconds": b} for o in ORDERS for b in (0.5, 1.0, 2.0)]
    yield simulated(
        "p95, errors", brute, (places, orders), rows=100, tpm=2_000_000, figure="latency_p95_s", faults=many
    )
    loud = {"share": 0.3, "burst_s": 10.0, "period_s": 60.0}
    places = [{"max_concurrency": c} for c in (5, 8, 12, 20, 40)]
    reactions: Knobs = [
        {"hold_on_throttle": hold, "sync_headers": sync, "tpm_headroom": room}
        for hold in (False, True)
        for sync in (False, True)
        for room in (0.0, 0.05)
    ]
    yield simulated(
        "switches, 429s", brute, (places, reactions), rows=200, tpm=60_000, cotenant=loud, retry_after="absent"
    )
    rooms: Knobs = [{"tpm_headroom": room, "max_concurrency": 60} for room in (0.0, 0.01, 0.02, 0.05, 0.08, 0.12)]
    backoffs = [{"backoff_base_seconds": b} for b in (0.5, 1.0, 2.0, 4.0, 8.0)]
    yield simulated(
        "headroom, 429s", brute, (rooms, backoffs), rows=200, tpm=60_000, cotenant=loud, retry_after="absent"
    )


# ---------------------------------------------------------------- the contestants


def halved(runs: Real, most: int) -> tuple[int, int]:
    """(choice, replications in all) of sequential halving."""

    def rank(alive: list[int], n: int) -> tuple[list[int], int]:
        means = runs[alive, :n].mean(axis=1)
        close = int((means <= means.min() * (1.0 + CLOSE)).sum())
        return [alive[i] for i in np.argsort(means, kind="stable")], close

    ranking, had = sequential_halving(len(runs), rank, most)
    return ranking[0], sum(had)


def equal_right(land: Landscape, trials: int, seed: int) -> Real:
    """How often equal allocation is right, by replications per setting, shape (MOST,)."""
    right = np.zeros(MOST)
    for trial in range(trials):
        runs = land.draw(np.random.default_rng((seed, trial)), MOST)
        means = np.cumsum(runs, axis=1) / np.arange(1, MOST + 1)
        right += land.correct[means.argmin(axis=0)]
    return right / trials


def n95(right: Real) -> int:
    """The smallest number of replications per setting that is right in 95 % of the trials; MOST = none was enough."""
    enough = np.flatnonzero(isotonic_regression(right).x >= PROMISED)
    return int(enough[0]) + 1 if len(enough) else MOST


def main() -> None:
    """Prints the table and the verdict."""
    short = "--short" in sys.argv
    seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
    trials, brute = (60, 200) if short else (500, 2_000)
    lands = list(landscapes(brute))
    begun = time.process_time()
    curves = {land.name: equal_right(land, trials, seed) for land in lands}
    needed = {name: n95(right) for name, right in curves.items()}
    equal = max(needed.values())
    # A quarter more: at n95 itself half of all draws of trials would be below 95 %.
    most = round(1.25 * equal)
    print(
        f"seed {seed}; {trials} trials a line; correct = true mean within {INDIFFERENCE:.1%} of the best, {FINE:.1%} "
        f"where rare or simulated; k settings, c of them correct; halving up to {most} replications"
    )
    print(f"{'landscape':20s} {'k':>3s} {'c':>3s} {'halving: right':>22s} {'runs':>6s} {'n95':>4s} {'equal':>6s} "
          f"{'equal right at 10':>17s}")  # fmt: skip
    lowest = 1.0
    for land in lands:
        found = [halved(land.draw(np.random.default_rng((seed, t)), MOST), most) for t in range(trials)]
        right = sum(bool(land.correct[choice]) for choice, _ in found)
        runs = round(float(np.mean([used for _, used in found])))
        k = len(land.means)
        lowest = min(lowest, right / trials)
        span = f"[{1.0 - at_most(trials - right, trials):.3f}, {at_most(right, trials):.3f}]"
        print(
            f"{land.name:20s} {k:3d} {int(land.correct.sum()):3d} {right / trials:7.3f} {span:>14s} {runs:6d} "
            f"{needed[land.name]:4d} {k * equal:6d} {curves[land.name][9]:17.3f}",
            flush=True,
        )
    print(f"correct in at least {lowest:.3f} of the trials on every landscape ({PROMISED:g} is promised); "
          f"{time.process_time() - begun:.0f} s processor time")  # fmt: skip


if __name__ == "__main__":
    main()

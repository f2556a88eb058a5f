"""How often the best setting is picked, and what it costs: racing against equal allocation, single runs and Optuna.

    python -m benchmarks.bench_selection [--short] [--seed N]

Landscapes with a known optimum: analytic ones (a bowl over two knobs under normal and under skewed noise; a row in
which every other setting is just beyond the indifference, the hardest case there is), whose noise has a part that all
settings share, as keyed chance gives it; and simulated scenarios, whose true means are found by brute force with very
many replications. A choice is correct if its true mean is within the indifference of the best.

Equal allocation: so many replications for each setting, under common seeds, then the best mean; `n95` is the smallest
number at which it is correct in 95 % of the trials. Optuna gets as many replications as the race used on average, one
per trial (TPE, ask and tell), and names the setting with the best mean.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.racing import Finish, Rule, race
from sim.results import at_most

Real = NDArray[np.float64]

INDIFFERENCE = 0.01
FINE = 0.003
MOST = 400
SKEW = 0.9
# Below so many replications per setting equal allocation is cheap: nothing is to be saved there.
NOISY = 8


@dataclass(frozen=True)
class Landscape:
    """Settings on a grid with known means; `shared`, `own`: standard deviations of the noise.

    `runs`: where the landscape is simulated, many runs of every setting, shape (settings, replications).
    """

    name: str
    grid: tuple[int, int]
    means: Real
    shared: float
    own: float
    skewed: bool = False
    indifference: float = INDIFFERENCE
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
        return self.means[:, None] + self.shared * rng.standard_normal(n) + self.own * own

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which settings count as correct."""
        best = float(self.means.min())
        return self.means <= best * (1.0 + self.indifference) + 1e-9 * best


def bowl(name: str, *, own: float, skewed: bool = False) -> Landscape:
    """A bowl over 8 x 6 settings whose best is 100, and its neighbours 1.5 to 4 worse."""
    x, y = np.meshgrid(np.arange(8), np.arange(6), indexing="ij")
    means = 100.0 + 1.6 * (x - 5) ** 2 + 2.4 * (y - 2) ** 2 + 0.9 * (x - 5) * (y - 2)
    return Landscape(name, (8, 6), means.ravel(), shared=12.0, own=own, skewed=skewed)


def slippage(settings: int = 24, *, own: float) -> Landscape:
    """One best, all others just beyond the indifference: no early stop can save much here."""
    means = np.full(settings, 100.0 * (1.0 + INDIFFERENCE) + 0.01)
    means[settings // 3] = 100.0
    return Landscape("slippage", (settings, 1), means, shared=12.0, own=own)


def simulated(name: str, replications: int, *, rows: int = 60, tpm: int, **provider: object) -> Landscape:
    """Concurrency x backoff in a simulated scenario with faults; the means are those of all `replications`."""
    from governor.policy import Policy
    from sim.experiment import Pool, case_of
    from sim.provider_config import ProviderConfig
    from sim.scenario import ModelSource, Scenario

    source = ModelSource(requests=rows, prompt_tokens=(700, 2_000), output_tokens=(150, 600), max_tokens=800, seed=5)
    late = {"preset": "gpt-4o", "scale": 2.0, "stall_ratio": 0.002}
    config = {"tpm": tpm, "charge_rule": "max_of", "latency": late, "faults": {"error_ratio": 0.08}, **provider}
    scenario = Scenario.of(source, provider=ProviderConfig.model_validate(config), policy=Policy(tpm_limit=tpm))
    base = scenario.policy.with_(
        charge_rule="max_of", tpm_window="bucket", tpm_headroom=0.0, stagger_seconds=0.3, retry_max_attempts=15
    )
    places, backoffs = (11, 12, 13, 14, 15, 16), (0.8, 1.0, 1.3, 1.6, 2.0)
    policies = [base.with_(max_concurrency=c, backoff_base_seconds=b) for c in places for b in backoffs]
    found = Pool().run([(case_of(scenario, policy), range(replications)) for policy in policies])
    runs = np.array([[f["makespan_s"] for f in figures] for figures in found])
    return Landscape(name, (len(places), len(backoffs)), runs.mean(axis=1), 0.0, 0.0, indifference=FINE, runs=runs)


# ---------------------------------------------------------------- the contestants


def raced(runs: Real, indifference: float) -> Finish:
    """The race on these runs."""
    rule = Rule(most=runs.shape[1], indifference=indifference)
    return race(len(runs), lambda wanted: {i: runs[i, :n, None] for i, n in wanted.items()}, rule)


def n95(right: Real) -> int:
    """The smallest number of replications per setting that is right in 95 % of the trials; 0 = none was enough."""
    enough = np.flatnonzero(right >= 0.95)
    return int(enough[0]) + 1 if len(enough) else 0


def optuna_choice(land: Landscape, rng: np.random.Generator, replications: int, seed: int) -> int:
    """What Optuna's TPE names after so many single runs."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=False))
    seen: dict[int, list[float]] = {}
    runs = land.draw(rng, replications)
    for n in range(replications):
        trial = study.ask()
        i = trial.suggest_int("x", 0, land.grid[0] - 1) * land.grid[1] + trial.suggest_int("y", 0, land.grid[1] - 1)
        study.tell(trial, float(runs[i, n]))
        seen.setdefault(i, []).append(float(runs[i, n]))
    # A single lucky run names nobody, as long as others have several.
    several = {i: values for i, values in seen.items() if len(values) >= 3} or seen
    return min(several, key=lambda i: float(np.mean(several[i])))


# ---------------------------------------------------------------- the table


@dataclass
class Line:
    """One landscape's results."""

    land: Landscape
    race_right: int
    race_runs: float
    undecided: int
    equal: int
    one: float
    three: float
    optuna_right: int
    optuna_trials: int
    trials: int


def measured(land: Landscape, trials: int, optuna_trials: int, seed: int) -> Line:
    """All contestants on one landscape. Every trial has its own chance, the same for race and equal allocation."""
    correct = land.correct
    right, used, undecided = 0, 0, 0
    equal = np.zeros(MOST)
    for trial in range(trials):
        runs = land.draw(np.random.default_rng((seed, trial)), MOST)
        finish = raced(runs, land.indifference)
        right += bool(correct[finish.best])
        used += sum(finish.replications)
        undecided += not finish.decided
        means = np.cumsum(runs, axis=1) / np.arange(1, MOST + 1)
        equal += correct[means.argmin(axis=0)]
    equal /= trials
    mean = used / trials
    hits = sum(
        bool(correct[optuna_choice(land, np.random.default_rng((seed, 10**6 + t)), round(mean), t)])
        for t in range(optuna_trials)
    )
    return Line(land, right, mean, undecided, n95(equal), equal[0], equal[2], hits, optuna_trials, trials)


def main() -> None:
    """Prints the table and the headline."""
    short = "--short" in sys.argv
    seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
    trials, optuna_trials, brute = (100, 4, 300) if short else (1_000, 20, 3_000)
    lands = [bowl("bowl", own=3.0), bowl("bowl, skewed", own=3.0, skewed=True), slippage(own=2.0)]
    neighbour = {"share": 0.2, "burst_s": 10.0, "period_s": 60.0}
    lands += [
        simulated("simulated, errors", brute, tpm=2_000_000),
        simulated("simulated, neighbour", brute, tpm=60_000, cotenant=neighbour, retry_after="absent"),
    ]
    print(
        f"seed {seed}; {trials} trials a line; correct = true mean within {INDIFFERENCE:.1%} of the best, "
        f"{FINE:.1%} where simulated"
    )
    print(f"{'landscape':20s} {'settings':>8s} {'correct':>8s} {'race: right':>12s} {'[95 %]':>8s} {'runs':>8s}"
          f" {'undecided':>10s} {'n95':>5s} {'equal: runs':>12s} {'race/equal':>11s} {'1 run':>6s} {'3 runs':>7s}"
          f" {'optuna':>7s}")  # fmt: skip
    ratios, lowest = [], 1.0
    for land in lands:
        begun = time.perf_counter()
        line = measured(land, trials, optuna_trials, seed)
        k = len(land.means)
        share = line.race_right / line.trials
        surely = 1.0 - at_most(line.trials - line.race_right, line.trials)
        equal = f"{k * line.equal:12,d}" if line.equal else f"{'> ' + format(k * MOST, ','):>12s}"
        ratio = line.race_runs / (k * (line.equal or MOST))
        if line.equal >= NOISY or not line.equal:
            ratios.append(ratio)
        lowest = min(lowest, share)
        print(
            f"{land.name:20s} {k:8d} {int(land.correct.sum()):8d} {share:12.3f} {surely:8.3f} {line.race_runs:8.0f}"
            f" {line.undecided:10d} {line.equal:5d} {equal} {ratio:11.3f} {line.one:6.2f} {line.three:7.2f}"
            f" {line.optuna_right}/{line.optuna_trials:<4d} {time.perf_counter() - begun:5.1f} s",
            flush=True,
        )
    print(
        f"probability of correct selection: at least {lowest:.3f} on every landscape, with {np.median(ratios):.2f} of "
        f"equal allocation's replications in the median ({min(ratios):.2f} to {max(ratios):.2f}) where that needs "
        f"{NOISY} or more per setting"
    )


if __name__ == "__main__":
    main()

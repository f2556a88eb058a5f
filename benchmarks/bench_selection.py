"""How often the best setting is picked, and what it costs: racing against equal allocation, BIZ, single runs, Optuna.

    python -m benchmarks.bench_selection [--short] [--seed N]

Landscapes with a known optimum: analytic ones (a bowl over two knobs under normal and under skewed noise; slippage, a
row in which every other setting is just beyond the indifference, the hardest case there is), whose noise has a part
that all settings share, as keyed chance gives it; and simulated scenarios: very many runs of each setting are made by
the engine, and a trial draws its replications from them, the same ones for all settings, so that their means are the
truth. A choice is correct if its true mean is within the indifference of the best.

Equal allocation: so many replications for each setting, under common seeds, then the best mean; `n95` is the smallest
number from which on it is correct in 95 % of the same trials (isotonic regression over the numbers takes the trials'
noise out, which would else call a lucky number the smallest). Nobody knows n95 beforehand: it is what equal allocation
would need if it were told. The promise is a third of it; where n95 is below 3, a third is less than one run per
setting, out of reach for whoever runs every setting once.

BIZ: Frazier's procedure (Operations Research 62, 2014), made for slippage, told the true variances, on the analytic
landscapes. Optuna gets as many replications as the race used on average, one per trial (TPE, ask and tell), and names
the setting with the best mean; where that would be very many it is left out, for its time.
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
from sim.selection.racing import Finish, Rule, race

Real = NDArray[np.float64]

INDIFFERENCE = 0.01
FINE = 0.003
MOST = 400
SKEW = 0.9
PROMISED, SHARE = 0.95, 1.0 / 3.0
# TPE takes longer for each trial the more there were: half a minute for a thousand.
OPTUNA_RUNS = 500
ORDERS = ("fifo", "longest_first")


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
    shape = len(grid[0]), len(grid[1])
    return Landscape(name, shape, runs.mean(axis=1), 0.0, 0.0, indifference=FINE, runs=runs)


def landscapes(brute: int) -> Iterator[Landscape]:
    """All of them, quiet and noisy; `brute`: runs of each simulated setting."""
    yield bowl("bowl", own=3.0)
    yield bowl("bowl, skewed", own=3.0, skewed=True)
    yield slippage(own=2.0)
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


def raced(runs: Real, indifference: float) -> Finish:
    """The race on these runs."""
    rule = Rule(most=runs.shape[1], indifference=indifference)
    return race(len(runs), lambda wanted: {i: runs[i, :n, None] for i, n in wanted.items()}, rule)


def n95(right: Real) -> int:
    """The smallest number of replications per setting that is right in 95 % of the trials; 0 = none was enough."""
    enough = np.flatnonzero(isotonic_regression(right).x >= PROMISED)
    return int(enough[0]) + 1 if len(enough) else 0


def biz(runs: Real, own: float, indifference: float) -> tuple[int, int]:
    """(choice, replications) of Frazier's BIZ with a common known variance and its largest elimination parameter.

    The posterior is that of slippage: of all settings in the race, i is the best with a probability in proportion to
    exp(-zone / own^2 * its sum). Whoever falls to `out` leaves, and what it had of it is taken from the confidence.
    """
    k = len(runs)
    zone, wanted = indifference * float(runs[:, 0].min()), PROMISED
    out = 1.0 - PROMISED ** (1.0 / (k - 1))
    alive, used = np.arange(k), 0
    sums = np.cumsum(runs, axis=1)
    for n in range(runs.shape[1]):
        used += len(alive)
        weights = np.exp(-zone / own**2 * (sums[alive, n] - sums[alive, n].min()))
        while len(alive) > 1:
            q = weights / weights.sum()
            if q.max() >= wanted or q.min() > out:
                break
            wanted /= 1.0 - q.min()
            stays = np.arange(len(alive)) != q.argmin()
            alive, weights = alive[stays], weights[stays]
        if len(alive) == 1 or weights.max() / weights.sum() >= wanted:
            break
    return int(alive[weights.argmax()]), used


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
    """One landscape's results. `biz`: its share of right choices and its replications; nan where it was not run."""

    land: Landscape
    race_right: int
    race_runs: float
    undecided: int
    equal: int
    one: float
    three: float
    biz: tuple[float, float]
    optuna_right: int
    optuna_trials: int
    trials: int

    @property
    def ratio(self) -> float:
        """The race's replications over those of equal allocation; over its most where that was not enough."""
        return self.race_runs / (len(self.land.means) * (self.equal or MOST))


def measured(land: Landscape, trials: int, optuna_trials: int, seed: int) -> Line:
    """All contestants on one landscape. Every trial has its own chance, the same for race, BIZ and equal allocation."""
    correct = land.correct
    right, used, undecided = 0, 0, 0
    equal, frazier = np.zeros(MOST), np.full((trials, 2), np.nan)
    for trial in range(trials):
        runs = land.draw(np.random.default_rng((seed, trial)), MOST)
        finish = raced(runs, land.indifference)
        right += bool(correct[finish.best])
        used += sum(finish.replications)
        undecided += not finish.decided
        means = np.cumsum(runs, axis=1) / np.arange(1, MOST + 1)
        equal += correct[means.argmin(axis=0)]
        if land.runs is None:
            choice, cost = biz(runs, land.own, land.indifference)
            frazier[trial] = correct[choice], cost
    equal /= trials
    mean = used / trials
    optuna_trials *= mean <= OPTUNA_RUNS
    hits = sum(
        bool(correct[optuna_choice(land, np.random.default_rng((seed, 10**6 + t)), round(mean), t)])
        for t in range(optuna_trials)
    )
    peer = (float(frazier[:, 0].mean()), float(frazier[:, 1].mean()))
    return Line(land, right, mean, undecided, n95(equal), equal[0], equal[2], peer, hits, optuna_trials, trials)


def shown(line: Line, took_s: float) -> str:
    """One line of the table."""
    k = len(line.land.means)
    surely = 1.0 - at_most(line.trials - line.race_right, line.trials)
    most = at_most(line.race_right, line.trials)
    equal = f"{k * line.equal:6,d}" if line.equal else f">{k * MOST:6,d}"
    right, runs = line.biz
    peer = "" if np.isnan(right) else f"{right:.3f} {runs / (k * (line.equal or MOST)):.2f}"
    return (
        f"{line.land.name:20s} {k:3d} {int(line.land.correct.sum()):3d} {line.race_right / line.trials:7.3f}"
        f" [{surely:.3f}, {most:.3f}] {line.race_runs:6.0f} {line.undecided:5d} {line.equal:5d} {equal:>8s}"
        f" {line.ratio:10.2f} {line.one:6.2f} {line.three:6.2f} {peer:>11s}"
        f" {line.optuna_right:3d}/{line.optuna_trials:<3d} {took_s:6.1f} s"
    )


def main() -> None:
    """Prints the table and the verdict."""
    short = "--short" in sys.argv
    seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 1
    trials, optuna_trials, brute = (60, 2, 200) if short else (500, 5, 2_000)
    print(
        f"seed {seed}; {trials} trials a line; correct = true mean within {INDIFFERENCE:.1%} of the best, "
        f"{FINE:.1%} where simulated; k settings, c of them correct; [95 % limits, one-sided]"
    )
    print(
        f"{'landscape':20s} {'k':>3s} {'c':>3s} {'race: right':>22s} {'runs':>6s} {'undec':>5s} {'n95':>5s}"
        f" {'equal':>8s} {'race/equal':>10s} {'1 run':>6s} {'3 runs':>6s} {'BIZ /equal':>11s} {'optuna':>7s}"
    )
    lines = []
    for land in landscapes(brute):
        begun = time.perf_counter()
        lines.append(measured(land, trials, optuna_trials, seed))
        print(shown(lines[-1], time.perf_counter() - begun), flush=True)
    lowest = min(line.race_right / line.trials for line in lines)
    print(f"probability of correct selection: at least {lowest:.3f} on every landscape ({PROMISED:g} is promised)")
    kept = [line for line in lines if line.ratio <= SHARE]
    print(f"at most a third of equal allocation's replications: {_names(kept)}")
    print(f"more, where a third is a run per setting or more: {_names(_missed(lines, reachable=True))}")
    print(f"more, where a third is less than one run per setting: {_names(_missed(lines, reachable=False))}")


def _missed(lines: list[Line], *, reachable: bool) -> list[Line]:
    return [
        line for line in lines if line.ratio > SHARE and (line.equal == 0 or line.equal * SHARE >= 1.0) == reachable
    ]


def _names(lines: list[Line]) -> str:
    return ", ".join(f"{line.land.name} {line.ratio:.2f}" for line in lines) or "none"


if __name__ == "__main__":
    main()

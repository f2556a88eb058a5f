"""Results of `simulate` and `plan`: figures of single runs, estimates over replications, and a plan's evidence.

The module holds frozen values, the statistics that turn runs into estimates, and their JSON form.

Statistics. Replications are independent draws under keyed seeds, so a mean has a Student-t interval. The difference of
two policies is taken seed by seed (common random numbers) and has the interval of the paired differences. A percentile
is the value below which the next run stays with that probability (Weibull's plotting positions, k / (n + 1)); its
limits are order statistics, which hold for any distribution (David and Nagaraja, Order Statistics, 2003, section 7.1).
An event that was never seen in n trials has the upper limit 1 - 0.05^(1/n) at 95 % (Clopper and Pearson 1934,
one-sided): "0 of N, below x at 95 % confidence".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governor.model.policy import Policy
from governor.model.requests import Attempt
from sim.experiment.effects import Sensitivity
from sim.experiment.information import Finding
from sim.experiment.robustness import DrawnConditions

# The figures of a run that are estimated, in the order in which they are shown.
FIGURES = (
    "makespan_s",
    "efficiency",
    "throttled",
    "throttled_per_100",
    "failed",
    "attempts",
    "latency_p50_s",
    "latency_p95_s",
    "bound_s",
    "reserved_tokens",
    "charged_tokens",
    "used_tokens",
    "peak_in_flight",
    "stagger_delays",
    "tpm_deferrals",
    "finalize_passes",
)
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one run: a `Summary` as numbers. `efficiency` is nan if the run lost a request."""

    seed: int
    requests: int
    completed: int
    values: Mapping[str, float]
    waits_s: Mapping[str, float]
    failures: Mapping[str, int]

    def __getitem__(self, name: str) -> float:
        return self.values[name]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure over replications: its mean with a 95 % interval of the mean, and the spread of single runs.

    `low`, `high`: Student-t interval of the mean, equal to the mean for a single run (`n` = 1: the interval is
    unknown). `p5`, `p50`, `p95`: the next run stays below with that probability; fewer than 19 runs cannot bound `p95`
    (their largest value is given instead), see `percentile`.
    """

    mean: float
    low: float
    high: float
    p5: float
    p50: float
    p95: float
    n: int

    @property
    def half_width(self) -> float:
        """Return half the width of the interval of the mean."""
        return (self.high - self.low) / 2.0


def estimate(values: Sequence[float] | NDArray[Any]) -> Estimate:
    """Return the estimate of a figure from its values over replications; nan is left out (`n` counts the rest)."""
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    n = len(x)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(x.mean())
    half = 0.0
    if n > 1:
        # scipy.stats has the same function, but takes half a second longer to import.
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2.0) * x.std(ddof=1) / math.sqrt(n))
    p5, p50, p95 = _next_below(x, (0.05, 0.5, 0.95))
    return Estimate(mean, mean - half, mean + half, p5, p50, p95, n)


def _next_below(x: NDArray[np.float64], ratios: Sequence[float]) -> list[float]:
    # "weibull" interpolates, which is undefined between two infinities.
    with np.errstate(invalid="ignore"):
        found: list[float] = np.quantile(x, ratios, method="weibull").tolist()
    return [math.inf if math.isnan(each) else each for each in found]


@dataclass(frozen=True, slots=True)
class Percentile:
    """A percentile of single runs, from `n` of them, with its 95 % limits.

    `value`: the next run stays below it with probability `ratio`. `low`, `high`: order statistics; -inf or inf if `n`
    runs cannot bound the percentile on that side.
    """

    ratio: float
    value: float
    low: float
    high: float
    n: int

    @property
    def bounded(self) -> bool:
        """Return whether there are enough runs to bound it from above."""
        return math.isfinite(self.high)

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain numbers; an unbounded side is null."""
        return {"value": _plain(self.value), "low": _plain(self.low), "high": _plain(self.high), "n": self.n}


def percentile(values: Sequence[float] | NDArray[Any], ratio: float) -> Percentile:
    """Return the percentile of a figure from its values over replications, at least one.

    Limits: the closest pair of ranks l < u between which a binomial count of n trials puts the percentile with
    probability at least 95 %; a rank of 0 or n + 1, beyond all runs, is used only if no pair within them suffices.
    """
    from scipy.special import bdtr

    x = np.sort(np.asarray(values, dtype=np.float64))
    n = len(x)
    below = np.concatenate([[0.0], bdtr(np.arange(n + 1.0), n, ratio)])  # P(fewer than k values lie below), k = 0..n+1
    found = None
    for inside in (True, False):
        ranks = range(1, n + 1) if inside else range(n + 2)
        pairs = []
        for low in ranks:
            # The first rank above `low` that closes the interval.
            high = int(np.searchsorted(below, below[low] + CONFIDENCE))
            if low < high <= ranks[-1]:
                pairs.append((high - low, below[high] - below[low], low, high))
        if pairs:
            found = min(pairs)[2:]
            break
    low, high = found or (0, n + 1)
    edges = np.concatenate([[-math.inf], x, [math.inf]])
    return Percentile(ratio, _next_below(x, (ratio,))[0], float(edges[low]), float(edges[high]), n)


def at_most(seen: int, trials: int) -> float:
    """Return the upper 95 % limit of a probability, `seen` events in `trials` (Clopper and Pearson, one-sided)."""
    if trials <= 0 or seen >= trials:
        return 1.0
    if seen == 0:
        return float(1.0 - (1.0 - CONFIDENCE) ** (1.0 / trials))
    from scipy.special import betaincinv

    return float(betaincinv(seen + 1, trials - seen, CONFIDENCE))


@dataclass(frozen=True, slots=True)
class Forecast:
    """The outcome of one policy in one scenario, over replications: an `Estimate` per name of FIGURES, and mean waits.

    `requests`: per run. `failures`: requests lost per run, by code.
    """

    policy: Policy
    requests: int
    estimates: Mapping[str, Estimate]
    waits_s: Mapping[str, float]
    failures: Mapping[str, float]
    runs: tuple[Figures, ...] = field(repr=False)

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def percentile(self, name: str, ratio: float) -> Percentile:
        """Return a percentile of single runs in one figure, with its limits."""
        return percentile([run[name] for run in self.runs], ratio)

    @property
    def lost(self) -> int:
        """Return the number of requests lost in all runs together."""
        return int(sum(run["failed"] for run in self.runs))

    @property
    def trials(self) -> int:
        """Return the number of requests in all runs together."""
        return self.requests * len(self.runs)

    @property
    def lost_at_most(self) -> float:
        """Return the upper 95 % limit of the probability that a request is lost."""
        return at_most(self.lost, self.trials)

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain numbers; nan becomes null."""
        return {
            "settings": settings_of(self.policy),
            "requests": self.requests,
            "replications": len(self.runs),
            "figures": {name: _plain(asdict(e)) for name, e in self.estimates.items()},
            "finish_time": {
                f"p{100.0 * ratio:g}_s": self.percentile("makespan_s", ratio).to_json_dict() for ratio in (0.5, 0.95)
            },
            "waits_s": dict(self.waits_s),
            "failures": dict(self.failures),
            "lost": self.lost,
            "lost_of": self.trials,
            "lost_probability_at_most": self.lost_at_most,
        }


def forecast_of(policy: Policy, runs: Sequence[Figures]) -> Forecast:
    """Return the forecast from these runs, at least one, all of the same policy and workload."""
    names = FIGURES if "extra_usd" not in runs[0].values else (*FIGURES, "extra_usd")
    estimates = {name: estimate([run[name] for run in runs]) for name in names}
    causes = runs[0].waits_s
    codes = sorted({code for run in runs for code in run.failures})
    return Forecast(
        policy=policy,
        requests=runs[0].requests,
        estimates=estimates,
        waits_s={cause: float(np.mean([run.waits_s[cause] for run in runs])) for cause in causes},
        failures={code: float(np.mean([run.failures.get(code, 0) for run in runs])) for code in codes},
        runs=tuple(runs),
    )


def paired_difference(a: Forecast, b: Forecast, name: str) -> Estimate:
    """Return `a` - `b` in one figure, paired by seed: both must have run under the same seeds."""
    of_b = {run.seed: run[name] for run in b.runs}
    return estimate([run[name] - of_b[run.seed] for run in a.runs if run.seed in of_b])


def settings_of(policy: Policy) -> dict[str, Any]:
    """Return a policy as env name -> value."""
    from governor.model.policy import KNOBS

    return {knob.env: getattr(policy, knob.name) for knob in KNOBS}


def _plain(value: Any) -> Any:
    """Return the value with nan replaced by None, since JSON has no nan."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------- results of a plan


@dataclass(frozen=True, slots=True)
class Point:
    """One setting that was tried: its mean makespan (or p95 latency), throttles per 100 requests and lost per run.

    `origin`: `now`, `guardrails` (only the eight guardrail knobs changed) or `paceline`. `on_front`: no other setting
    that loses as little is at least as good in every figure and better in one. `extra_usd`: cost per run beyond the
    answers (time-outs, re-sends, finalize passes), None if prices are unknown.
    """

    policy: Policy
    origin: str
    objective_s: float
    throttled_per_100: float
    lost: float
    replications: int
    on_front: bool
    extra_usd: float | None = None

    def to_json_dict(self, objective: str) -> dict[str, Any]:
        """Plain values."""
        return {
            "settings": settings_of(self.policy),
            "origin": self.origin,
            f"{objective}_s": _plain(self.objective_s),
            "throttled_per_100": self.throttled_per_100,
            "lost": self.lost,
            "extra_usd": self.extra_usd,
            "replications": self.replications,
        }


@dataclass(frozen=True, slots=True)
class StressRow:
    """One condition of the stress set, and the outcome of each of the plan's policies under it, by policy name."""

    name: str
    forecasts: Mapping[str, Forecast]


@dataclass(frozen=True, slots=True)
class Step:
    """One changed knob, and the gain of the change with all other knobs as recommended.

    `worth_s`: how much longer the objective takes if this knob alone keeps its old value, paired by seed; negative if
    the change costs time. `stress_worth_s`: the mean of that over the stress set. `throttled_per_100`, `lost`: 429s per
    100 requests and losses per run with the old value. `breaks`: the condition in which the old value breaks the limits
    worst while the recommendation does not, with its figures; "" = none.
    """

    env: str
    old: Any
    new: Any
    worth_s: Estimate
    stress_worth_s: float
    throttled_per_100: float
    lost: float
    breaks: str
    reason: str


@dataclass(frozen=True, slots=True)
class Heat:
    """A map over two knobs around the recommendation. Matrices have shape (len(y_values), len(x_values))."""

    x_env: str
    y_env: str
    x_values: tuple[float, ...]
    y_values: tuple[float, ...]
    objective_s: NDArray[np.float64]
    throttled_per_100: NDArray[np.float64]
    lost: NDArray[np.float64]
    now: tuple[float, float]
    recommended: tuple[float, float]


@dataclass(frozen=True, slots=True)
class RejectedSetting:
    """A setting that is faster under the assumptions but was not recommended.

    `price_s`: by how much it is faster, paired by seed: the cost of being safe from the condition in `reason`.
    """

    name: str
    forecast: Forecast
    price_s: Estimate
    reason: str

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        price = _plain(asdict(self.price_s))
        return {"name": self.name, **self.forecast.to_json_dict(), "price_s": price, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A policy, its forecast on new seeds, the knobs that it changes, and its paired gain over today's settings.

    `passed_over`: faster settings of the same knobs that break the limits under the stress set.
    """

    forecast: Forecast
    steps: tuple[Step, ...]
    gain_s: Estimate
    passed_over: tuple[RejectedSetting, ...] = ()

    @property
    def policy(self) -> Policy:
        """Return the recommended settings."""
        return self.forecast.policy


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `paceline plan` found. Forecasts of `now`, both recommendations and the runner-up share seeds.

    `guardrails`: only the eight guardrail knobs changed; `full`: every knob of the law may change. `limits`: the
    constraints that the user set; `broken`: where a recommendation breaks them, as assumed or under a condition in
    which another of the plan's settings keeps them, in words. `already_good`: today's settings are within the
    indifference zone of the best. `timelines`: attempts of one run each, by name, for curves over time. `drawn`: the
    plan's policies under conditions drawn from ranges; `sensitivity`: which knob matters around the recommendation;
    `answers_usd`: the cost of all answers, each paid once (None: no prices); costs beyond that are the figure
    `extra_usd` of the forecasts. `out_of_time`: the search ended by the clock. `find_out`: what to find out first.
    """

    objective: str
    now: Forecast
    guardrails: Recommendation
    full: Recommendation
    runner_up: Forecast
    points: tuple[Point, ...]
    stress: tuple[StressRow, ...]
    heats: tuple[Heat, ...]
    timelines: Mapping[str, Sequence[Attempt]]
    limits: Mapping[str, float]
    already_good: bool
    broken: tuple[str, ...]
    settings_tried: int
    runs_simulated: int
    requests_simulated: int
    seed: int
    drawn: DrawnConditions | None = None
    sensitivity: Sensitivity | None = None
    answers_usd: float | None = None
    out_of_time: bool = False
    find_out: tuple[Finding, ...] = ()

    @property
    def promise(self) -> Percentile | None:
        """Return the recommendation's finish time that holds in 95 of 100 drawn conditions; None if none were drawn."""
        return None if self.drawn is None else percentile(self.drawn.outcomes["recommended"].makespan_s, 0.95)

    def to_json_dict(self) -> dict[str, Any]:
        """Return the plan without its timelines, as plain values."""
        return {
            "objective": self.objective,
            "promise": {
                "as_assumed_s": _plain(self.full.forecast["makespan_s"].p50),
                "in_95_of_100_conditions_s": None if self.promise is None else self.promise.to_json_dict(),
            },
            "now": self.now.to_json_dict(),
            "guardrails_only": _recommendation_json(self.guardrails),
            "recommended": _recommendation_json(self.full),
            "runner_up": self.runner_up.to_json_dict(),
            "front": [point.to_json_dict(self.objective) for point in self.points if point.on_front],
            "stress": [
                {
                    "name": row.name,
                    "runs": len(next(iter(row.forecasts.values())).runs),
                    **{
                        who: {
                            "makespan_s": _plain(f["makespan_s"].mean),
                            "throttled_per_100": f["throttled_per_100"].mean,
                            "lost": f["failed"].mean,
                        }
                        for who, f in row.forecasts.items()
                    },
                }
                for row in self.stress
            ],
            "find_out_first": [each.to_json_dict() for each in self.find_out],
            "drawn": None if self.drawn is None else self.drawn.to_json_dict(self.objective),
            "sensitivity": None if self.sensitivity is None else self.sensitivity.to_json_dict(),
            "answers_usd": self.answers_usd,
            "constraints": dict(self.limits),
            "constraints_broken": list(self.broken),
            "already_good": self.already_good,
            "settings_tried": self.settings_tried,
            "runs_simulated": self.runs_simulated,
            "requests_simulated": self.requests_simulated,
            "seed": self.seed,
            "validated_against_live_runs": 0,
        }


def _recommendation_json(found: Recommendation) -> dict[str, Any]:
    return {
        **found.forecast.to_json_dict(),
        "changes": [_plain(asdict(step)) for step in found.steps],
        "gain_s": _plain(asdict(found.gain_s)),
        "passed_over": [each.to_json_dict() for each in found.passed_over],
    }

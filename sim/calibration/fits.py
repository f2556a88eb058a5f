"""Estimates, with intervals, of lengths, times and arrivals from a log.

Each interval by itself covers with 95 % (`benchmarks/bench_coverage.py` measures it). Shares have Clopper and Pearson's
interval; quantiles use the exact binomial ranks of the order statistics, without an end if there are too few rows.

Latency follows the provider's model (`sim/model/provider.py`): (first token + per token x output) times noise, and
sometimes a stall on top. It is a mixture, fitted by expectation and maximisation: the line by least squares of the
logarithms, each answer weighted by its chance of not having stalled (Dempster, Laird and Rubin, 1977); the line's
interval is that of the weighted least squares, sigma's that of chi-square corrected for the kurtosis of the noise. The
noise itself is log-normal or resampled from the residuals, with or without groups of answer length: the form that
predicts held-out data best is used (cross-validated log score; a more complex one must be better by two standard
errors). The arrival rate uses batch means, which also hold for bursty arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from sim.model.latency import NOISE_GROUPS, NOISE_KNOTS, NOISE_REACH
from sim.model.provider_tiers import STALL_MAX_S, STALL_MIN_S
from sim.model.workload import Real

EACH = 0.95
ROUNDS = 60
SIGMA_LEAST = 1e-4
# A stall lies at least this many sigmas, and this many seconds, above the line.
STALL_SIGMAS = 5.0
STALL_LEAST_S = 2.0
LEAST_ANSWERS = 20
_BATCHES = 20
_RESAMPLES = 1_000
# Most gaps in one resample, and the largest credible spread of their logarithms.
GAPS_MOST, LOG_SPREAD_MOST = 20_000, 2.5
FOLDS = 5
# Fewest residuals in a group of answer lengths.
GROUP_LEAST = 100
SCORES = np.linspace(-NOISE_REACH, NOISE_REACH, NOISE_KNOTS)
# The flattest allowed shape, in standard deviations per normal score, because recorded times are rounded.
FLATTEST = 0.05


@dataclass(frozen=True, slots=True)
class Figure:
    """One fitted figure. `value` None: the data cannot determine it, and `default` is kept.

    `low`, `high`: both None = no interval; one None = the rows do not bound it on that side. `how`: the source or
    method, or why there is no value, in words.
    """

    name: str
    value: Any
    low: float | None
    high: float | None
    unit: str
    how: str
    default: Any = None

    @property
    def known(self) -> bool:
        """Return whether the data could determine the figure."""
        return self.value is not None

    @property
    def used(self) -> Any:
        """Return the value that goes into the scenario."""
        return self.value if self.value is not None else self.default


def unknown(name: str, default: Any, why: str, unit: str = "") -> Figure:
    """Return a figure that the data cannot determine."""
    return Figure(name, None, None, None, unit, why, default)


def share(name: str, hits: int, of: int, how: str) -> Figure:
    """Return a share with the interval of Clopper and Pearson."""
    low, high = stats.binomtest(hits, of).proportion_ci(EACH, method="exact")
    return Figure(name, hits / of, float(low), float(high), "", how)


def quantile(name: str, values: Real, q: float, unit: str, how: str) -> Figure:
    """Return a quantile with its distribution-free interval: order statistics whose ranks a binomial count covers.

    An end that would lie beyond the values (the upper one of P95 below 72 rows) is None.
    """
    ordered = np.sort(values)
    n = len(ordered)
    low, high = (int(stats.binom.ppf(p, n, q)) for p in (0.5 - EACH / 2.0, 0.5 + EACH / 2.0))
    return Figure(
        name,
        float(np.quantile(ordered, q)),
        float(ordered[low - 1]) if low > 0 else None,
        float(ordered[high]) if high < n else None,
        unit,
        how if low > 0 and high < n else f"{how}; not bounded by {n:,} rows",
    )


def factor(values: Real) -> tuple[float, float]:
    """Return the factors by which the mean of another stretch of as many values may differ, for 95 % of such stretches.

    `values`: above 0, in order of time, shape (values,). By batch means, which slow drift widens: Student's t, in
    logarithms, with the variance of both means.
    """
    batches = min(_BATCHES, len(values) // 5)
    means = np.log(np.maximum([float(part.mean()) for part in np.array_split(values, batches)], 1e-9))
    half = float(stats.t.ppf(0.5 + EACH / 2.0, batches - 1) * means.std(ddof=1) * math.sqrt(2.0 / batches))
    half = min(half, math.log(100.0))
    return float(f"{math.exp(-half):.3g}"), float(f"{math.exp(half):.3g}")


# ---------------------------------------------------------------- lengths


@dataclass(frozen=True, slots=True)
class Family:
    """One parametric family fitted to token counts. `ks`: the largest distance of the two distribution functions."""

    name: str
    parameters: tuple[float, ...]
    ks: float
    aic: float


FAMILIES = {"log-normal": stats.lognorm, "gamma": stats.gamma, "Weibull": stats.weibull_min}


def families(values: NDArray[Any]) -> list[Family]:
    """Return the fitted families, best first by Akaike's criterion. Empty if all values are equal.

    With estimated parameters the KS distance has no simple p-value (Lilliefors), so none is stated.
    """
    values = np.maximum(values.astype(np.float64), 0.5)
    if len(values) < LEAST_ANSWERS or np.ptp(values) == 0.0:
        return []
    found = []
    for name, family in FAMILIES.items():
        parameters = tuple(float(p) for p in family.fit(values, floc=0.0))
        likelihood = float(np.sum(family.logpdf(values, *parameters)))
        if not math.isfinite(likelihood):
            continue
        ks = float(stats.kstest(values, family.cdf, args=parameters).statistic)
        found.append(Family(name, parameters, ks, 4.0 - 2.0 * likelihood))
    return sorted(found, key=lambda family: family.aic)


# ---------------------------------------------------------------- latency

LOG_NORMAL, MEASURED, BY_LENGTH = "log-normal", "as measured", "as measured, by answer length"


@dataclass(frozen=True, slots=True)
class NoiseFit:
    """The shape of the noise that predicts best. `scores`: mean log density of held-out residuals, by shape.

    `groups`: (from how many tokens on, the logarithms at `SCORES`), none for the log-normal shape.
    """

    name: str
    groups: tuple[tuple[float, Real], ...]
    scores: dict[str, float]


def noise(x: Real, r: Real) -> NoiseFit:
    """Return the shape of residuals `r` (logarithms about the line) at lengths `x`, chosen by cross-validation."""
    edges = _edges(x)
    starts = {LOG_NORMAL: None, MEASURED: (0.0,)} | ({BY_LENGTH: edges} if len(edges) > 1 else {})
    held = {name: np.empty(len(r)) for name in starts}
    fold = np.arange(len(r)) % FOLDS
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        for name, begins in starts.items():
            held[name][test] = _log_density(x[train], r[train], x[test], r[test], begins)
    chosen = LOG_NORMAL
    for name in starts:
        gain = held[name] - held[chosen]
        if gain.mean() > 2.0 * gain.std(ddof=1) / math.sqrt(len(gain)):
            chosen = name
    begins = starts[chosen] or ()
    groups = tuple((begin, _shape(part)) for begin, part in _parts(x, r, begins))
    return NoiseFit(chosen, groups, {name: float(values.mean()) for name, values in held.items()})


def _edges(x: Real) -> tuple[float, ...]:
    """Return where groups of answer lengths begin: about equal in size, with at least GROUP_LEAST answers each."""
    count = min(NOISE_GROUPS, len(x) // GROUP_LEAST)
    inner = np.unique(np.quantile(x, np.arange(1, count) / count)) if count > 1 else np.empty(0)
    return (0.0, *(float(edge) for edge in inner if (x < edge).sum() >= GROUP_LEAST / 2))


def _parts(x: Real, r: Real, begins: tuple[float, ...]) -> list[tuple[float, Real]]:
    """Return the residuals of each non-empty group."""
    group = np.searchsorted(begins, x, side="right") - 1
    return [(begin, r[group == i]) for i, begin in enumerate(begins)]


def _shape(r: Real) -> Real:
    """Return logarithms of the noise at `SCORES`: the residuals' quantiles, extrapolated as a normal shape."""
    ordered, spread = np.sort(r), max(SIGMA_LEAST, float(r.std()))
    at = stats.norm.ppf((np.arange(len(r)) + 0.5) / len(r))
    beyond = spread * (np.minimum(0.0, SCORES - at[0]) + np.maximum(0.0, SCORES - at[-1]))
    shape = np.interp(SCORES, at, ordered) + beyond
    steps = np.maximum(np.diff(shape), FLATTEST * spread * (SCORES[1] - SCORES[0]))
    middle = NOISE_KNOTS // 2
    rising = np.concatenate([[0.0], np.cumsum(steps)])
    return np.asarray(rising - rising[middle] + shape[middle])


def _log_density(x: Real, r: Real, at_x: Real, at_r: Real, begins: tuple[float, ...] | None) -> Real:
    """Return the log density that residuals `r` at lengths `x` predict for residuals `at_r` at `at_x`."""
    if begins is None:
        return np.asarray(stats.norm.logpdf(at_r, 0.0, max(SIGMA_LEAST, math.sqrt(float((r * r).mean())))))
    found = np.empty(len(at_r))
    group = np.searchsorted(begins, at_x, side="right") - 1
    for i, (_, part) in enumerate(_parts(x, r, begins)):
        shape, here = _shape(part), group == i
        knot = np.clip(np.searchsorted(shape, at_r[here]) - 1, 0, NOISE_KNOTS - 2)
        slope = (np.diff(shape) / np.diff(SCORES))[knot]
        score = SCORES[knot] + (at_r[here] - shape[knot]) / slope
        found[here] = stats.norm.logpdf(score) - np.log(slope)
    return found


@dataclass(frozen=True, slots=True)
class LatencyFit:
    """Fitted figures of the provider's latency model. `stall`: each answer's probability of having stalled."""

    first_token_s: Figure
    per_token_s: Figure
    sigma: Figure
    stall_ratio: Figure
    stall_min_s: float
    stall_max_s: float
    stall: Real
    noise: NoiseFit

    def line(self, output: Real) -> Real:
        """Return the median time of answers of these lengths, in seconds."""
        found: Real = self.first_token_s.used + self.per_token_s.used * output
        return found


def latency(output: Real, took_s: Real, first_s: Real) -> LatencyFit | None:
    """Return the latency model of answered attempts; None for fewer than LEAST_ANSWERS times.

    `first_s`: measured times of first tokens, -1 = not measured. All arrays have shape (answers,).
    """
    usable = took_s > 0.0
    if usable.sum() < LEAST_ANSWERS:
        return None
    x, y = output[usable].astype(np.float64), took_s[usable]
    tied = bool(np.ptp(x) == 0.0)
    line = _start(x, y, tied)
    weight = np.ones(len(x))
    sigma, q, low_s, high_s = _spread(x, y, line, weight), 0.0, STALL_MIN_S, STALL_MAX_S
    for _ in range(ROUNDS):
        mu = line[0] + line[1] * x
        sure = y - mu > np.maximum(STALL_LEAST_S, mu * math.expm1(min(3.0, STALL_SIGMAS * sigma)))
        low_s, high_s = _ends(y[sure] - mu[sure])
        before = (*line, sigma, q)
        q = max(q, float(sure.mean()))
        weight = _body_chance(y, mu, sigma, q, low_s, high_s)
        weight[sure] = 0.0
        line = _weighted_line(x, y, weight, line, tied)
        sigma = _spread(x, y, line, weight)
        q = float(1.0 - weight.mean())
        if np.allclose(before, (*line, sigma, q), rtol=1e-6, atol=1e-9):
            break
    return _figures(x, y, first_s[usable], line, sigma, weight, (low_s, high_s), tied, usable)


def _start(x: Real, y: Real, tied: bool) -> tuple[float, float]:
    """Return a line that a few stalls do not move: a robust fit of the logarithms."""
    if tied:
        return float(np.median(y)), 0.0
    scale = max(1.0, float(np.median(x)))

    def residuals(p: Real) -> Real:
        return np.log(np.maximum(p[0] + p[1] * x / scale, 1e-9)) - np.log(y)

    middle = float(np.median(y)) / 2.0
    found = optimize.least_squares(residuals, [middle, middle], bounds=(1e-9, np.inf), loss="soft_l1", f_scale=0.1)
    return float(found.x[0]), float(found.x[1] / scale)


def _weighted_line(x: Real, y: Real, w: Real, line: tuple[float, float], tied: bool) -> tuple[float, float]:
    root = np.sqrt(w)
    if tied:
        return float(np.exp(np.sum(w * np.log(y)) / np.sum(w))), 0.0
    scale = max(1.0, float(np.median(x)))

    def residuals(p: Real) -> Real:
        return root * (np.log(np.maximum(p[0] + p[1] * x / scale, 1e-9)) - np.log(y))

    start = [max(line[0], 1e-6), max(line[1] * scale, 1e-6)]
    found = optimize.least_squares(residuals, start, bounds=(1e-9, np.inf), x_scale=start)
    return float(found.x[0]), float(found.x[1] / scale)


def _spread(x: Real, y: Real, line: tuple[float, float], w: Real) -> float:
    """Return the standard deviation of the logarithms about the line."""
    r = np.log(y) - np.log(np.maximum(line[0] + line[1] * x, 1e-9))
    if (w == 1.0).all():
        return max(SIGMA_LEAST, 1.4826 * float(np.median(np.abs(r - np.median(r)))))
    return max(SIGMA_LEAST, math.sqrt(float(np.sum(w * r * r)) / max(1.0, float(w.sum()) - 2.0)))


def _ends(stalls: Real) -> tuple[float, float]:
    """Return the shortest and longest stall, a little beyond those seen; the defaults if fewer than three were seen."""
    if len(stalls) < 3:
        return STALL_MIN_S, STALL_MAX_S
    step = float(np.ptp(stalls)) / (len(stalls) - 1)
    return max(0.0, float(stalls.min()) - step), float(stalls.max()) + step


def _body_chance(y: Real, mu: Real, sigma: float, q: float, low_s: float, high_s: float) -> Real:
    """Return the probability that each answer did not stall."""
    if q <= 0.0:
        return np.ones(len(y))
    body = (1.0 - q) * stats.norm.pdf(np.log(y), np.log(np.maximum(mu, 1e-9)), sigma) / y
    over = y - mu
    stalled = q * ((over >= low_s) & (over <= high_s)) / max(1e-9, high_s - low_s)
    total = body + stalled
    return np.where(total > 0.0, body / np.maximum(total, 1e-300), (over < low_s).astype(np.float64))


def _figures(
    x: Real,
    y: Real,
    first_s: Real,
    line: tuple[float, float],
    sigma: float,
    weight: Real,
    ends: tuple[float, float],
    tied: bool,
    usable: NDArray[np.bool_],
) -> LatencyFit:
    n = float(weight.sum())
    free = max(1.0, n - (1.0 if tied else 2.0))
    mu = np.maximum(line[0] + line[1] * x, 1e-9)
    r = np.log(y) - np.log(mu)
    spread = math.sqrt(float(np.sum(weight * r * r)) / free)
    jacobian = np.column_stack([1.0 / mu, x / mu])[:, : 1 if tied else 2]
    covariance = spread**2 * np.linalg.pinv(jacobian.T @ (weight[:, None] * jacobian))
    half = float(stats.t.ppf(0.5 + EACH / 2.0, free)) * np.sqrt(np.maximum(0.0, np.diag(covariance)))
    how = f"{len(x):,} answered attempts, by output length"
    first = Figure("first token", line[0], max(0.0, line[0] - half[0]), line[0] + half[0], "s", how)
    if (first_s > 0.0).sum() >= LEAST_ANSWERS:
        first = _first_token(first_s[first_s > 0.0])
    if tied:
        per_token = unknown(
            "per output token", 0.0, "all answers have one length: their time is the first token's", "s"
        )
    else:
        per_token = Figure("per output token", line[1], max(0.0, line[1] - half[1]), line[1] + half[1], "s", how)
    body = weight > 0.5
    shape = noise(x[body], r[body])
    # The variance of a variance grows with the kurtosis: this is the equivalent number of normal residuals.
    like = free / max(1.0, 1.0 + float(stats.kurtosis(r[body])) / 2.0)
    low, high = (
        spread * math.sqrt(like / float(stats.chi2.ppf(p, like))) for p in (0.5 + EACH / 2.0, 0.5 - EACH / 2.0)
    )
    sigma_figure = Figure("noise (sigma)", spread, low, high, "", f"{how}, about the line; {shape.name}")
    stall = np.zeros(len(usable))
    stall[usable] = 1.0 - weight
    return LatencyFit(
        first_token_s=first,
        per_token_s=per_token,
        sigma=sigma_figure,
        stall_ratio=share("stalls", round(len(x) - n), len(x), f"{how}: beyond the noise"),
        stall_min_s=ends[0],
        stall_max_s=ends[1],
        stall=stall,
        noise=shape,
    )


def _first_token(first_s: Real) -> Figure:
    """Return the time to the first token, if measured: the geometric mean, which is the median of log-normal times."""
    logs = np.log(first_s)
    half = float(stats.t.ppf(0.5 + EACH / 2.0, len(logs) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    middle = float(logs.mean())
    how = f"{len(logs):,} measured times to the first token"
    return Figure("first token", math.exp(middle), math.exp(middle - half), math.exp(middle + half), "s", how)


# ---------------------------------------------------------------- arrivals


@dataclass(frozen=True, slots=True)
class ArrivalFit:
    """Arrivals: `rate_per_s`, `cv` (of gaps: 1 = Poisson), `dispersion` (variance over mean of counts per minute)."""

    rate_per_s: Figure
    cv: Figure
    dispersion: float
    block_s: float


def arrivals(at_s: Real) -> ArrivalFit | None:
    """Return rate and burstiness of arrivals; None if they are fewer than LEAST_ANSWERS or all at one moment."""
    at_s = np.sort(at_s[at_s >= 0.0])
    span = float(np.ptp(at_s)) if len(at_s) else 0.0
    if len(at_s) < LEAST_ANSWERS or span <= 0.0:
        return None
    batches = min(_BATCHES, len(at_s) // 5)
    counts = np.histogram(at_s, batches)[0] / (span / batches)
    half = float(stats.t.ppf(0.5 + EACH / 2.0, batches - 1)) * float(counts.std(ddof=1)) / math.sqrt(batches)
    rate = len(at_s) / span
    gaps = np.diff(at_s)
    per_minute = np.bincount((at_s / 60.0).astype(np.int64))
    how = f"{len(at_s):,} arrivals in {span:,.0f} s"
    return ArrivalFit(
        rate_per_s=Figure("arrivals", rate, max(0.0, rate - half), rate + half, "per s", f"{how}, batch means"),
        cv=_burstiness(gaps, how),
        dispersion=float(per_minute.var() / max(1e-9, per_minute.mean())),
        block_s=block_s(at_s, np.ones(len(at_s))),
    )


def _burstiness(gaps: Real, how: str) -> Figure:
    """Return the coefficient of variation of gaps, by the wider of two bootstraps of its studentized logarithm.

    A few long gaps determine both the figure and its standard error. Resampling accounts for the gaps in the log; draws
    from the likelier of a gamma and a log-normal distribution account for those that it happens to lack.
    """
    value, error = _log_cv(gaps)
    rng = np.random.default_rng(0)
    draw, centre = _gaps_like(gaps)
    # After studentizing, a larger sample spreads no wider.
    n = min(len(gaps), GAPS_MOST)
    low, high = value, value
    for sample, around in ((lambda: rng.choice(gaps, n), value), (lambda: draw(rng, n), centre)):
        again = (_log_cv(sample()) for _ in range(_RESAMPLES))
        scores = [(drawn - around) / spread for drawn, spread in again]
        most, least = np.quantile(scores, [0.5 + EACH / 2.0, 0.5 - EACH / 2.0])
        low, high = min(low, value - float(most) * error), max(high, value - float(least) * error)
    return Figure("burstiness (CV of gaps)", math.exp(value), math.exp(low), math.exp(high), "", how)


def _log_cv(values: Real) -> tuple[float, float]:
    """Return the logarithm of the coefficient of variation, and its standard error by influence functions."""
    mean, spread = float(values.mean()), max(1e-12, float(values.std()))
    z = (values - mean) / spread
    influence = (z * z - 1.0) / 2.0 - z * spread / mean
    return math.log(spread / mean), max(1e-12, float(influence.std())) / math.sqrt(len(values))


def _gaps_like(gaps: Real) -> tuple[Callable[[np.random.Generator, int], Real], float]:
    """Return a sampler of the likelier of two families, and the logarithm of its coefficient of variation.

    The gamma's shape is Minka's closed form ("Estimating a gamma distribution", 2002).
    """
    mean = float(gaps.mean())
    logs = np.log(np.maximum(gaps, 1e-9 * mean))
    middle, sigma = float(logs.mean()), min(LOG_SPREAD_MOST, max(1e-6, float(logs.std())))
    s = max(1e-9, math.log(mean) - middle)
    shape = (3.0 - s + math.sqrt((s - 3.0) ** 2 + 24.0 * s)) / (12.0 * s)
    gamma = (shape - 1.0) * middle - shape - shape * math.log(mean / shape) - math.lgamma(shape)
    log_normal = -middle - 0.5 * float(logs.var()) / sigma**2 - math.log(sigma * math.sqrt(2.0 * math.pi))
    if gamma >= log_normal:
        return lambda rng, n: rng.gamma(shape, size=n), -0.5 * math.log(shape)
    return lambda rng, n: np.exp(sigma * rng.standard_normal(n)), 0.5 * math.log(math.expm1(sigma * sigma))


def block_s(at_s: Real, tokens: Real) -> float:
    """Return the block length for resampling, in seconds: the one at which the mean's estimated variance is largest.

    Shorter blocks cut through dependent data (bursts, slow drift) and underestimate the variance; longer ones are too
    few to estimate it. Candidates are halvings of a quarter of the log down to 15 s.
    """
    span = float(np.ptp(at_s))
    best, widest = max(1.0, span / 4.0), -1.0
    length = best
    while length >= min(15.0, span / 4.0):
        parts = max(2, int(span // length))
        sums = np.histogram(at_s - at_s.min(), parts, weights=tokens)[0]
        variance = float(sums.var(ddof=1)) / parts * (parts / max(1.0, float(sums.sum()))) ** 2
        if variance > widest:
            best, widest = length, variance
        length /= 2.0
    return best

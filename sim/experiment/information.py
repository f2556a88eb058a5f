"""The value of information: what it is worth to find something out, and the statistics behind it.

The expected value of perfect information about one unknown (Howard 1966; "partial" if others stay unknown: Brennan et
al. 2007) is the mean, over its values, of the gain of the best decision for that value over the best decision without
it. The promise is a percentile over all unknowns; with one of them known, it is the percentile over the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1_000
# With fewer draws than this, a 95th percentile lies beyond all of them.
_DRAWS_LEAST = 19


@dataclass(frozen=True, slots=True)
class Gain:
    """A mean gain in seconds with its standard error and 95 % interval."""

    mean_s: float
    se_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class Finding:
    """The value of knowing one unknown, and the command that would reveal it.

    `unknown`: the unknown, as the continuation of "Knowing ...". `sooner`: how much the objective would shorten if it
    were known beforehand; `narrower`: how much the promise would. Either is None if noise alone could explain it or it
    is too small. `if_so`: the condition under which the gain holds, whose odds are unknown. `command`: how to find out,
    at `cost_usd` (None = unknown) within `takes_s` (least, most). `requests`: number of the batch's own requests whose
    answers reveal it if there is no older log; 0 = other calls reveal it.
    """

    unknown: str
    sooner: Gain | None
    narrower: Gain | None
    if_so: bool
    command: str
    requests: int = 0
    cost_usd: float | None = None
    takes_s: tuple[float, float] | None = None

    @property
    def worth_s(self) -> float:
        """Return both gains together, in seconds, by which findings are ranked."""
        return sum(gain.mean_s for gain in (self.sooner, self.narrower) if gain is not None)

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def mean_gain(gains: NDArray[np.float64], level: float) -> Gain | None:
    """Return the mean of paired gains, shape (draws,).

    None if a true mean of 0 would show as much with probability `level`.
    """
    from scipy.special import stdtrit

    n = len(gains)
    if n < 2 or not np.isfinite(gains).all():
        return None
    mean, se = float(gains.mean()), float(gains.std(ddof=1)) / n**0.5
    if mean <= stdtrit(n - 1, 1.0 - level) * se:
        return None
    half = float(stdtrit(n - 1, 0.975)) * se
    return Gain(mean, se, mean - half, mean + half)


def narrowing(
    before: NDArray[np.float64], after: NDArray[np.float64], values: Sequence[Any], level: float, seed: int
) -> Gain | None:
    """Return how much the 95th percentile of `before` exceeds the mean of those of `after` with the unknown known.

    All have shape (draws,); `values`: the unknown in each draw, numbers or labels. None as in `mean_gain`, by a
    bootstrap over draws; also if a time is not finite or there are too few draws.
    """
    n = len(before)
    design = _design(values)
    if n < max(_DRAWS_LEAST, 4 * design.shape[1]) or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return None
    picks = np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))
    found = _promises(before[picks]) - _known(after[picks], design[picks])
    mean = float((_promises(before) - _known(after, design)).item())
    low, high, least = (float(q) for q in np.quantile(found, [0.025, 0.975, level]))
    if min(mean, least) <= 0.0:
        return None
    return Gain(mean, float(found.std(ddof=1)), low, high)


def _promises(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the 95th percentiles of times of shape (..., draws)."""
    return np.asarray(np.quantile(times, 0.95, axis=-1, method="weibull"))


def _known(times: NDArray[np.float64], design: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over draws of the 95th percentile that remains once the unknown has the draw's value.

    `times`: shape (..., draws); `design`: (..., draws, columns). The logarithm of a time is modelled as a function of
    the unknown plus the effect of the others, taken to be alike at all its values. Residuals come from a fit that
    leaves the draw out; otherwise any knowledge at all would seem to narrow the promise.
    """
    logs = np.log(times)[..., None]
    q, r = np.linalg.qr(design)
    # A label missing from a resample has no column.
    size = np.abs(np.diagonal(r, axis1=-2, axis2=-1))
    q = q * (size > 1e-9 * size.max(axis=-1, keepdims=True))[..., None, :]
    fitted = q @ (np.swapaxes(q, -1, -2) @ logs)
    rest = (logs - fitted)[..., 0] / (1.0 - np.minimum(0.9, (q * q).sum(axis=-1)))
    return np.exp(fitted[..., 0]).mean(axis=-1) * _promises(np.exp(rest))


def _design(values: Sequence[Any]) -> NDArray[np.float64]:
    """Return the design matrix, shape (draws, columns): a column per label, or a parabola for numbers."""
    if isinstance(values[0], float):
        x = np.asarray(values, dtype=np.float64)
        x = (x - x.mean()) / (x.std() or 1.0)
        return np.stack([np.ones_like(x), x, x * x], axis=1)
    labels = sorted(set(values), key=str)
    return np.array([[1.0 if value == label else 0.0 for label in labels] for value in values])

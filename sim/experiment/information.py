"""What it is worth to find something out: the values, and the statistics behind them.

The expected value of perfect information about one unknown (Howard 1966; "partial" where others stay unknown: Brennan
et al. 2007) is the mean over its values of what the best decision for that value gains over the best without it. The
promise is a percentile over all unknowns; with one of them known it is that of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1_000
# Below so many draws a 95th percentile is beyond all of them.
DRAWS_LEAST = 19


@dataclass(frozen=True, slots=True)
class Gain:
    """A mean gain in seconds with its standard error and 95 % interval."""

    mean_s: float
    se_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class Finding:
    """What it would be worth to know one thing, and what would tell it.

    `unknown`: the thing, as "Knowing ..." goes on. `sooner`: by how much the objective would shorten if it were known
    beforehand; `narrower`: by how much the promise would. Either is None where noise alone could have made it or it is
    too small. `if_so`: the gain holds if the thing turns out to be as it says, for which there are no odds. `command`:
    what tells it, at `cost_usd` (None = not known) in `takes_s` (least, most). `requests`: of the batch itself, whose
    answers tell it where there is no log of older ones; 0 = other calls do.
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
        """What findings are ranked by: both gains together."""
        return sum(gain.mean_s for gain in (self.sooner, self.narrower) if gain is not None)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def mean_gain(gains: NDArray[np.float64], level: float) -> Gain | None:
    """The mean of paired gains, shape (draws,); None where a mean of 0 would show as much with probability `level`."""
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
    """By how much the 95th percentile of `before` exceeds the mean of those of `after` with the unknown known.

    All of shape (draws,); `values`: the unknown in each draw, numbers or labels. None as in `mean_gain`, by a bootstrap
    over draws; also where a time is not finite, or there are too few draws.
    """
    n = len(before)
    design = _design(values)
    if n < max(DRAWS_LEAST, 4 * design.shape[1]) or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return None
    picks = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    found = _promises(before[picks]) - _known(after[picks], design[picks])
    mean = float((_promises(before) - _known(after, design)).item())
    low, high, least = (float(q) for q in np.quantile(found, [0.025, 0.975, level]))
    if min(mean, least) <= 0.0:
        return None
    return Gain(mean, float(found.std(ddof=1)), low, high)


def _promises(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 95th percentiles of times, shape (..., draws)."""
    return np.asarray(np.quantile(times, 0.95, axis=-1, method="weibull"))


def _known(times: NDArray[np.float64], design: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over draws of the 95th percentile that is left where the unknown has the draw's value.

    `times`: shape (..., draws); `design`: (..., draws, columns). The logarithm of a time is a function of the unknown
    plus what the others do, taken to be alike at all its values. Residuals are those of a fit that leaves the draw out:
    else knowing anything at all would seem to narrow.
    """
    logs = np.log(times)[..., None]
    q, r = np.linalg.qr(design)
    # A label that a resample lacks has no column.
    size = np.abs(np.diagonal(r, axis1=-2, axis2=-1))
    q = q * (size > 1e-9 * size.max(axis=-1, keepdims=True))[..., None, :]
    fitted = q @ (np.swapaxes(q, -1, -2) @ logs)
    rest = (logs - fitted)[..., 0] / (1.0 - np.minimum(0.9, (q * q).sum(axis=-1)))
    return np.exp(fitted[..., 0]).mean(axis=-1) * _promises(np.exp(rest))


def _design(values: Sequence[Any]) -> NDArray[np.float64]:
    """A column per label, or a parabola through numbers; shape (draws, columns)."""
    if isinstance(values[0], float):
        x = np.asarray(values, dtype=np.float64)
        x = (x - x.mean()) / (x.std() or 1.0)
        return np.stack([np.ones_like(x), x, x * x], axis=1)
    labels = sorted(set(values), key=str)
    return np.array([[1.0 if value == label else 0.0 for label in labels] for value in values])

"""What a run leaves: the quantiles of its latencies."""

from __future__ import annotations

import math
from array import array

import numpy as np

from sim.des.run import quantiles

SHARES = (0.05, 0.5, 0.95, 0.99)


def test_quantiles_are_numpys_to_the_bit(seed: int) -> None:
    x = np.random.default_rng(seed).lognormal(size=10_001)
    assert quantiles(array("d", x), SHARES) == np.quantile(x, SHARES).tolist()
    assert quantiles(array("d", x[:1]), SHARES) == [x[0]] * 4
    assert all(map(math.isnan, quantiles(array("d"), SHARES)))

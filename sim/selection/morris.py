"""Morris' elementary effects: which inputs matter, from few runs, in the outputs' own unit.

What lives here: the design and its evaluation, on arrays. What must not: knobs, policies, running (`sensitivity`).

Theory of operation (Morris, Technometrics 33, 1991). Each of k inputs lies on a grid of p levels from 0 to 1. A
trajectory begins at a random point of the grid and moves one input after the other, in random order, by
Delta = p / (2 (p - 1)), half of the levels, up or down: k + 1 points, one elementary effect per input. Over many
trajectories the mean absolute effect (mu*, Campolongo, Cariboni and Saltelli, Environmental Modelling & Software 22,
2007) says how much an input matters, and the spread of the effects (sigma) how much that depends on the others.

SALib has this too, and the tests hold these forty lines to it; but to import it takes a plan as long as its search.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Design = NDArray[np.float64]


def move_of(levels: int) -> float:
    """Delta: how far one step of a trajectory goes, as a share of the range."""
    return levels / (2.0 * (levels - 1.0))


def trajectories(inputs: int, count: int, *, levels: int, seed: int) -> Design:
    """The points of so many trajectories, one after the other. Shape (count * (inputs + 1), inputs), from 0 to 1."""
    rng = np.random.default_rng(seed)
    half = levels // 2
    # The lower end of each move: from there one half of the levels up is still on the grid.
    low = rng.integers(0, half, (count, inputs)) / (levels - 1.0)
    up = rng.integers(0, 2, (count, inputs)).astype(bool)
    order = rng.permuted(np.tile(np.arange(inputs), (count, 1)), axis=1)
    first = np.where(up, low, low + move_of(levels))
    last = np.where(up, low + move_of(levels), low)
    # Input i has moved at point t where its place in the order is before t.
    place = np.argsort(order, axis=1)
    moved = place[:, None, :] < np.arange(inputs + 1)[None, :, None]
    return np.where(moved, last[:, None, :], first[:, None, :]).reshape(-1, inputs)


def elementary_effects(design: Design, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The effect of each input in each trajectory, per whole range. Shape (trajectories, inputs)."""
    inputs = design.shape[1]
    x = design.reshape(-1, inputs + 1, inputs)
    steps = np.diff(x, axis=1)
    changes = np.diff(outputs.reshape(-1, inputs + 1), axis=1)
    which = np.argmax(np.abs(steps), axis=2)
    found = np.empty((len(x), inputs))
    np.put_along_axis(found, which, changes / np.take_along_axis(steps, which[:, :, None], axis=2)[:, :, 0], axis=1)
    return found


def mean_effects(
    effects: NDArray[np.float64], *, resamples: int, seed: int, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(mu*, half width of its interval, sigma) of each input: the interval by bootstrap over trajectories."""
    count = len(effects)
    size = np.abs(effects)
    rows = np.random.default_rng(seed).integers(0, count, (resamples, count))
    # One input at a time: all resamples of all inputs would be a large array for nothing.
    spread = np.array([column[rows].mean(axis=1).std(ddof=1) for column in size.T])
    sigma = effects.std(axis=0, ddof=1) if count > 1 else np.zeros(effects.shape[1])
    return size.mean(axis=0), NormalDist().inv_cdf(0.5 + confidence / 2.0) * spread, sigma

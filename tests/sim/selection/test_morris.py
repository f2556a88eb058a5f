"""Elementary effects against SALib's, on the same points and outputs, and against functions whose effects are known."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from sim.selection.morris import elementary_effects, mean_effects, move_of, trajectories

LEVELS = 4


def test_the_indices_are_those_of_salib(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from SALib.analyze import morris as peer
    rng = np.random.default_rng(seed)
    inputs, count = int(rng.integers(2, 12)), int(rng.integers(8, 60))
    design = trajectories(inputs, count, levels=LEVELS, seed=seed)
    weights = rng.normal(size=inputs)
    outputs = design @ weights + np.sin(5.0 * design[:, 0]) * design[:, 1] + 0.1 * rng.normal(size=len(design))
    effects = elementary_effects(design, outputs)
    size, half_width, sigma = mean_effects(effects, resamples=2_000, seed=seed)
    problem = {"num_vars": inputs, "names": [f"x{i}" for i in range(inputs)], "bounds": [[0.0, 1.0]] * inputs}
    theirs = peer.analyze(problem, design, outputs, num_levels=LEVELS, num_resamples=2_000, seed=seed)
    assert size == pytest.approx(np.asarray(theirs["mu_star"], float))
    assert sigma == pytest.approx(np.asarray(theirs["sigma"], float))
    # A bootstrap of 2,000 resamples each: 1.6 % standard error of either half width.
    assert half_width == pytest.approx(np.asarray(theirs["mu_star_conf"], float), rel=0.12)


def test_every_point_is_on_the_grid_and_every_step_moves_one_input_by_delta(seed: int) -> None:
    inputs, count = 5, 200
    design = trajectories(inputs, count, levels=LEVELS, seed=seed)
    assert design.shape == (count * (inputs + 1), inputs)
    assert set(np.round(3.0 * design, 9).ravel().tolist()) == {0.0, 1.0, 2.0, 3.0}
    steps = np.diff(design.reshape(count, inputs + 1, inputs), axis=1)
    moved = np.abs(steps) > 1e-9
    assert (moved.sum(axis=2) == 1).all()
    assert (moved.sum(axis=1) == 1).all()
    assert np.abs(steps)[moved] == pytest.approx(move_of(LEVELS))
    # Ups and downs, and each input at each place of the order, about equally often (5 standard deviations).
    ups = int((steps > 0.0).sum())
    assert abs(ups - inputs * count / 2.0) < 5.0 * (inputs * count / 4.0) ** 0.5
    assert np.abs(moved.sum(axis=0) - count / inputs).max() < 5.0 * (count * 0.2 * 0.8) ** 0.5


def test_linear_functions_have_their_slopes_as_effects(seed: int) -> None:
    design = trajectories(3, 10, levels=LEVELS, seed=seed)
    size, half_width, sigma = mean_effects(
        elementary_effects(design, design @ np.array([2.0, -3.0, 0.0])), resamples=50, seed=seed
    )
    assert size == pytest.approx([2.0, 3.0, 0.0])
    assert half_width == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)
    assert sigma == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)

"""The race: when the best is found, how often it is right, and what it costs, on landscapes whose answer is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from scipy.special import polygamma

from sim.selection import racing
from sim.selection.racing import PILOTS, TIES, Finish, Rule, looks_to, race


def raced(values: np.ndarray, **rule: object) -> Finish:
    """The race on these runs, shape (contestants, replications) or (contestants, replications, criteria)."""
    runs = values if values.ndim == 3 else values[:, :, None]
    asked: dict[int, int] = {}

    def sample(wanted: Mapping[int, int]) -> dict[int, np.ndarray]:
        for i, n in wanted.items():
            assert n > asked.get(i, 0), "nothing is asked for twice"
            asked[i] = n
        return {i: runs[i, :n] for i, n in wanted.items()}

    finish = race(len(runs), sample, Rule(most=runs.shape[1], **rule))  # type: ignore[arg-type]
    assert sorted(finish.ranking) == list(range(len(runs)))
    assert finish.replications == tuple(asked[i] for i in range(len(runs)))
    return finish


def test_looks_grow_to_the_last() -> None:
    assert looks_to(1) == (1,)
    assert looks_to(3) == (1, 2, 3)
    looks = looks_to(100)
    assert (looks[0], looks[-1]) == (1, 100)
    assert all(a < b <= max(a + 1, 1.5 * a) for a, b in itertools.pairwise(looks))


def test_without_noise_two_runs_decide() -> None:
    finish = raced(np.array([[5.0], [3.0], [4.0]]) * np.ones((3, 50)))
    assert finish == Finish((1, 2, 0), (2, 3, 2), True)
    assert raced(np.ones((1, 50))) == Finish((0,), (3,), True)


def test_equals_are_equal_after_a_few_runs() -> None:
    """What never differs is not run on; what differs in every other run only is not taken for equal."""
    assert raced(np.ones((4, 50))) == Finish((0, 1, 2, 3), (TIES,) * 4, True)
    first, second = np.full(60, 10.0), np.tile([10.0, 10.0, 4.0, 4.0], 15)
    assert raced(np.stack([first, second])).best == 1


def test_one_run_is_enough_for_who_is_far_off(seed: int) -> None:
    """Of forty, ten are near: most others are out by what the differences of a few lead to expect."""
    rng = np.random.default_rng(seed)
    means = np.concatenate([100.0 + 0.5 * np.arange(10), 200.0 + np.arange(30)])
    far = np.zeros((25, 30))
    for trial in range(len(far)):
        values = means[:, None] + rng.standard_normal(200) * 10.0 + rng.standard_normal((40, 200))
        finish = raced(values, indifference=0.005)
        assert finish.best < 10
        far[trial] = finish.replications[10:]
    assert far.max() <= 4
    # At most six of the thirty are asked to run twice in any case, to show how much differences scatter.
    assert far.mean() <= 1.0 + 3.0 * PILOTS / 30


def test_with_a_single_run_each_the_means_rank_and_nothing_is_decided() -> None:
    assert raced(np.array([[5.0], [3.0], [4.0]])) == Finish((1, 2, 0), (1, 1, 1), False)


def test_who_is_clearly_worse_gets_no_more_runs(seed: int) -> None:
    """Three near ones among fifteen far ones: the runs go to the near, and the choice is right as often as stated."""
    rng = np.random.default_rng(seed)
    means = np.array([100.0, 101.5, 102.0, *range(140, 200, 4)])
    right, near, far, trials = 0, 0, 0, 60
    for _ in range(trials):
        values = means[:, None] + rng.standard_normal(400) * 10.0 + rng.standard_normal((len(means), 400)) * 2.0
        finish = raced(values, indifference=0.005)
        right += finish.best == 0
        near += sum(finish.replications[:3])
        far += sum(finish.replications[3:])
    assert right >= trials * 0.95 - 4.0 * (trials * 0.95 * 0.05) ** 0.5
    assert far / trials / 15 <= 3.5
    assert near / trials / 3 >= 8.0


def test_it_is_right_as_often_as_it_says(seed: int) -> None:
    """250 races with the best ahead by twice the indifference: binomial limit (4 sigma) below the stated 95 %."""
    rng = np.random.default_rng(seed)
    right, trials = 0, 250
    for _ in range(trials):
        means = 100.0 + np.array([0.0, 2.0, 2.0, 2.5, 3.0, 3.0, 4.0, 5.0, 7.0, 9.0, 12.0, 15.0])
        order = rng.permutation(len(means))
        noise = rng.standard_normal(200) * 8.0 + rng.standard_normal((len(means), 200)) * 3.0
        finish = raced(means[order][:, None] + noise, indifference=0.01)
        right += bool(means[order][finish.best] <= 101.0)
    assert right >= trials * 0.95 - 4.0 * (trials * 0.95 * 0.05) ** 0.5


def test_the_shared_part_of_the_noise_costs_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    means = 100.0 + np.arange(10.0)
    own = rng.standard_normal((10, 300))
    shared = rng.standard_normal(300)
    # The zone is a share of the leader's own mean, which the shared part moves: without a zone nothing may differ.
    quiet = raced(means[:, None] + own, indifference=0.0)
    loud = raced(means[:, None] + own + 1_000.0 * shared, indifference=0.0)
    assert quiet == loud
    assert quiet.best == 0


def test_a_new_leader_brings_back_who_rested() -> None:
    # 0 leads at first and 2 rests behind it; 0 turns out bad, and then 2 is to be told from 1.
    n = 60
    zero = np.concatenate([np.full(3, 98.0), np.full(n - 3, 150.0)])
    one = 100.0 + np.tile([3.0, -3.0, 0.0], n // 3)
    two = 99.5 + np.tile([-3.0, 3.0, 0.0], n // 3)
    finish = raced(np.stack([zero, one, two]), indifference=0.001)
    assert finish.ranking[-1] == 0
    assert finish.replications[2] > 3


# ---------------------------------------------------------------- constraints


def criteria(*rows: tuple[float, float, float], n: int = 40, noise: float = 0.0, seed: int = 1) -> np.ndarray:
    """Contestants with these means of loss, throttles and objective, shape (contestants, n, 3)."""
    rng = np.random.default_rng(seed)
    values = np.repeat(np.array(rows)[:, None, :], n, axis=1)
    return values + noise * rng.standard_normal(values.shape) * np.array([0.0, 0.1, 1.0])


def test_limits_come_before_the_objective() -> None:
    runs = criteria((0.1, 0.0, 10.0), (0.0, 5.0, 20.0), (0.0, 0.5, 40.0), (0.0, 0.9, 30.0))
    finish = raced(runs, allowed=(0.0, 1.0))
    assert finish.ranking == (3, 2, 1, 0)
    assert finish.decided
    # Where none keeps the limits, the one that exceeds them least leads, whatever its objective.
    assert raced(runs[:2], allowed=(0.0, 1.0)).ranking == (1, 0)
    assert raced(runs, allowed=(0.2, 10.0)).ranking == (0, 1, 3, 2)


def test_a_doubt_about_a_limit_is_run_on() -> None:
    fast = criteria((0.0, 1.0, 10.0), n=200, noise=1.0)
    fast[0, :, 1] = np.tile([0.0, 2.2], 100)  # mean 1.1: over the limit, but hardly
    slow = criteria((0.0, 0.0, 12.0), n=200)
    finish = raced(np.concatenate([fast, slow]), allowed=(0.0, 1.0))
    # Its first three runs seem to be within.
    assert finish.best == 1
    assert finish.replications[0] > 20


def test_who_answers_nothing_is_last() -> None:
    runs = np.array([[np.inf] * 20, [5.0] * 20, [4.0] * 20])
    assert raced(runs).ranking == (2, 1, 0)
    assert raced(runs[:1].repeat(2, axis=0)).decided


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("y", [1e-4, 0.01, 0.5, 1.6449, 30.0, 1e4, 1e9])
def test_the_inverse_of_trigamma(y: float) -> None:
    assert polygamma(1, racing._inverse_trigamma(y)) == pytest.approx(y, rel=1e-6)


def test_variances_are_moderated_as_far_as_peers_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs, near = np.full(200, 4), np.zeros(200)
    everybody = np.ones(200, dtype=bool)
    # All have variance 4: 3 degrees of freedom each scatter widely, the moderated ones hardly.
    alike = 4.0 * rng.chisquare(3.0, 200) / 3.0
    moderated, worth = racing._moderated(near, alike, runs, everybody)
    assert moderated.std() < 0.5 * alike.std()
    assert 3.0 + 4.0 < worth[0] <= 3.0 + racing.PEERS_WORTH
    # Variances that differ by orders of magnitude say little about one another.
    apart = np.exp(3.0 * rng.standard_normal(200)) * alike
    moderated, worth = racing._moderated(near, apart, runs, everybody)
    assert worth[0] < 4.0
    # Few peers: left as they are.
    same, freedom = racing._moderated(near[:5], alike[:5], runs[:5], everybody[:5])
    assert (same == alike[:5]).all()
    assert (freedom == 3.0).all()


def test_who_ran_once_scatters_as_peers_at_its_distance_do(seed: int) -> None:
    """Standard deviations of 1 near the leader, of a tenth of the distance far from it."""
    rng = np.random.default_rng(seed)
    distance = np.linspace(0.0, 100.0, 400)
    true = 1.0 + (0.1 * distance) ** 2
    runs = np.where(np.arange(400) % 2, 1, 6)
    variance = np.where(runs > 1, true * rng.chisquare(5.0, 400) / 5.0, 0.0)
    moderated, worth = racing._moderated(distance, variance, runs, np.ones(400, dtype=bool))
    once = runs == 1
    assert (worth[once] > 0.0).all()
    # 200 sample variances with 5 degrees of freedom each, for two parameters: 4 standard errors, and what weights cost.
    assert np.log(moderated[once] / true[once]) == pytest.approx(0.0, abs=4.0 * (2.0 * 2.0 / 1_000.0) ** 0.5 + 0.05)
    # Where all are alike, distance tells nothing.
    flat = racing._trend(distance, np.full(400, 7.0), np.full(400, 5.0), np.ones(400, dtype=bool))
    assert flat == pytest.approx(7.0, rel=1e-6)

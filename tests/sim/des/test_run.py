"""What a run leaves: the quantiles of its latencies, and no request behind where its limit is set too high."""

from __future__ import annotations

import math
from array import array

import numpy as np
import pytest

from governor.model.policy import Policy
from sim.des.run import quantiles
from tests.scenarios import batch, run, scenario_of

SHARES = (0.05, 0.5, 0.95, 0.99)


def test_quantiles_are_numpys_to_the_bit(seed: int) -> None:
    x = np.random.default_rng(seed).lognormal(size=10_001)
    assert quantiles(array("d", x), SHARES) == np.quantile(x, SHARES).tolist()
    assert quantiles(array("d", x[:1]), SHARES) == [x[0]] * 4
    assert all(map(math.isnan, quantiles(array("d"), SHARES)))


@pytest.mark.parametrize("claimed", [1.3, 2.0])
@pytest.mark.parametrize("others", [0.0, 0.25, 0.5])
def test_a_limit_set_too_high_loses_no_request_where_refusals_count(claimed: float, others: float) -> None:
    """Retries as fast as the claimed limit refills would use up the real one, and be refused for ever."""
    policy = Policy.preset("paceline").with_(
        tpm_limit=round(30_000 * claimed), rpm_limit=0, charge_rule="prompt_plus_max", sync_headers=False
    )
    provider = {"tpm": 30_000, "failed_requests_count": True, "cotenant": {"share": others}}
    done = run(scenario_of(batch([1_500] * 60), policy, provider=provider))
    assert done.tally.throttled > 0
    assert len(done.tally.latencies_s) == 60

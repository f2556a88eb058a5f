"""Outages of the synthetic provider, met by the same circuit breaker in the SimPy driver and the compiled engine."""

from __future__ import annotations

from typing import Any

import pytest

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from sim.base.arguments import checked
from sim.experiment.experiment import simulated
from sim.model.provider_config import ProviderConfig
from tests.scenarios import batch, run, scenario_of

FREE = Policy(
    tpm_limit=1_000_000_000,
    stagger_seconds=0.0,
    max_concurrency=20,
    backoff_base_seconds=0.5,
    request_timeout_seconds=20.0,
)


def outage(at_s: float, length_s: float, kind: str) -> dict[str, Any]:
    return {"outages": [{"at_s": at_s, "length_s": length_s, "kind": kind}]}


@pytest.mark.parametrize("kind", ["drops", "5xx", "hang"])
def test_a_minute_without_answers_loses_nothing_in_either_engine(kind: str) -> None:
    scenario = scenario_of(batch([100] * 300, 0.5), FREE, provider=outage(2.25, 60.0, kind))
    done = run(scenario)
    assert (done.tally.completed, done.tally.failed) == (300, 0)
    assert sum(2.25 <= a.launched_s < 62.25 for a in done.rows) <= 60
    assert {a.attempt for a in done.rows if a.launched_s >= 62.25} == {1}
    assert repr(simulated(done.case, scenario.seed, engine="compiled")) == repr(done.tally)


@pytest.mark.parametrize("kind", ["drops", "5xx", "hang"])
def test_thirteen_minutes_with_default_backoff_cost_about_a_probe_a_minute(kind: str) -> None:
    policy = FREE.with_(backoff_base_seconds=2.0)
    scenario = scenario_of(batch([100] * 1_500, 0.5), policy, provider=outage(10.25, 780.0, kind))
    done = run(scenario)
    assert (done.tally.completed, done.tally.failed) == (1_500, 0)
    assert sum(160.0 <= a.launched_s < 790.0 for a in done.rows) <= 11
    assert repr(simulated(done.case, scenario.seed, engine="compiled")) == repr(done.tally)


def test_outages_that_overlap_are_refused_in_one_line() -> None:
    both = [{"at_s": 0.0, "length_s": 10.0}, {"at_s": 5.0, "length_s": 10.0}]
    with pytest.raises(BadSetting, match="outages must be in order of time"):
        checked(ProviderConfig, {"outages": both}, "provider")

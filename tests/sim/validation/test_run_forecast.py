"""The forecast of a live run: against closed forms, and true to what it says of its interval."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from governor.forecast.forecast import Demand, Outlook, fluid
from governor.forecast.preflight import InUse
from governor.model.errors import BadInput
from governor.model.estimate import CHAT, Sizes
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.work import reserve_of
from governor.run.intake import read_demands
from sim.experiment.experiment import replicate
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens, with_outputs_assumed
from sim.scenario.scenario import Scenario
from sim.validation import run_forecast
from sim.validation.assumptions import Assumptions, believed_provider
from sim.validation.run_forecast import foresee

FREE = Policy(stagger_seconds=0.0, max_concurrency=1_000, tpm_limit=10**9, charge_rule="auto", tpm_window="bucket")


def outlook(
    count: int, policy: Policy, models: tuple[str, ...] = ("gpt-4o",), cap: int = 400, **how: object
) -> Outlook:
    demand = Demand()
    sizes = Sizes(CHAT, 100, 400, 4, 1, 0, 0, 1, cap)
    for _, model in zip(range(count), itertools.cycle(models), strict=False):
        demand.add(model, sizes, reserve_of(policy, sizes))
    return Outlook(pool=Pool(policy=policy), demand=demand, **how)  # type: ignore[arg-type]


def test_a_stagger_alone_has_a_closed_form() -> None:
    policy = FREE.with_(stagger_seconds=10.0, jitter_ratio=0.0)
    e = foresee(outlook(31, policy))
    assert (e.by, e.runs, e.requests, e.bound) == ("simulation", 39, 31, "stagger")
    # 30 gaps of 10 s and one answer of a few seconds.
    assert 300.0 < e.finish_s < 310.0
    assert e.low_s <= e.finish_s <= e.high_s
    assert (e.throttled, e.attempts) == (0.0, 31.0)
    shares = [share for share, _, _ in e.milestones]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    for share, earliest, latest in e.milestones[1:]:
        assert earliest <= latest
        assert 300.0 * share - 15.0 <= earliest
        assert latest <= e.high_s


def test_tokens_of_a_bucket_have_one_too() -> None:
    policy = FREE.with_(tpm_limit=30_000, tpm_headroom=0.0, charge_rule="prompt_plus_max")
    # 101 + 400 tokens each: 240 of them are 120,240, of which the first 30,000 go at once.
    e = foresee(outlook(240, policy))
    assert e.bound == "tpm"
    assert e.low_s == pytest.approx((240 * 501 - 30_000) / 500.0, rel=0.05)


def test_answers_are_told_apart_by_model() -> None:
    e = foresee(outlook(3_000, FREE, ("gpt-4o", "gpt-4o", "gpt-4.1")))
    assert set(e.answer_tokens) == {"gpt-4o", "gpt-4.1"}
    # Drawn from one log-normal: twice as many requests, about twice the tokens.
    assert e.answer_tokens["gpt-4o"] / e.answer_tokens["gpt-4.1"] == pytest.approx(2.0, rel=0.1)


def test_the_same_seed_gives_the_same_forecast() -> None:
    assert foresee(outlook(50, FREE, seed=4)) == foresee(outlook(50, FREE, seed=4))
    assert foresee(outlook(50, FREE, seed=4)) != foresee(outlook(50, FREE, seed=5))


def test_a_batch_too_long_to_simulate_gets_the_fluid_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_forecast, "REQUESTS_MOST", 99)
    long = outlook(100, FREE)
    assert foresee(long) == fluid(long)
    assert foresee(outlook(0, FREE)).by == "fluid"


def test_the_next_run_falls_into_the_interval_as_often_as_stated(seed: int) -> None:
    policy = FREE.with_(max_concurrency=4)
    asked = outlook(20, policy)
    workload, models = run_forecast.workload_of(asked)
    provider = believed_provider(policy, models)
    inside = 0
    trials = 200
    for i in range(trials):
        e = foresee(outlook(20, policy, seed=seed + 1_000 * i))
        other = seed + 1_000 * i + 500
        drawn = with_outputs_assumed(workload, other)
        fresh = run_forecast.run_once(drawn, policy, provider, finalize=False, seed=other)
        inside += e.low_s <= fresh.finish_s <= e.high_s
    # 95 % of 200 are 190; below 178 or above 199 is chance in less than one of a thousand.
    assert 178 <= inside <= 199


def test_a_scenario_says_what_the_provider_is_and_its_forecast_is_that_of_the_plan(tmp_path: Path) -> None:
    """One batch, one forecast: settings that reserve more than is charged do not make the run seem longer."""
    path = tmp_path / "batch.jsonl"
    body = {"model": "gpt-4o", "max_tokens": 800, "messages": [{"role": "user", "content": "x" * 2_000}]}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    path.write_text("".join(json.dumps({"custom_id": f"r{i}", **line}) + "\n" for i in range(150)))
    provider = ProviderConfig(tpm=40_000, charge_rule="prompt_chars4", latency="gpt-4o-mini")
    policy = FREE.with_(tpm_limit=40_000, tpm_headroom=0.0, charge_rule="prompt_plus_max", sync_headers=True)
    Scenario.of(str(path), provider=provider, policy=policy).write(tmp_path / "scenario.yaml")
    demand = read_demands(path, [Pool(policy=policy)])["default"]
    told = foresee(Outlook(pool=Pool(policy=policy, scenario=str(tmp_path / "scenario.yaml")), demand=demand))
    untold = foresee(Outlook(pool=Pool(policy=policy), demand=demand))
    assert untold.assumed is None
    assert told.finish_s < 0.7 * untold.finish_s
    # The plan's own figure for these settings: the same provider, the same rows.
    scenario = Scenario.read(tmp_path / "scenario.yaml")
    planned = replicate(scenario, 12)["makespan_s"].p50
    assert abs(told.finish_s - planned) <= 0.03 * planned
    # What a journal keeps of it is enough to say the same again, and without the file the provider is still known.
    later = Outlook(
        pool=Pool(policy=policy), demand=demand, assumed=json.loads(json.dumps(told.to_json_dict()))["assumed"]
    )
    assert foresee(later).finish_s == told.finish_s
    (tmp_path / "scenario.yaml").unlink()
    assert abs(foresee(later).finish_s - told.finish_s) <= 0.1 * told.finish_s


def test_answers_that_the_scenario_knows_are_taken_as_they_were(tmp_path: Path) -> None:
    sizes = [Sizes(CHAT, 100 + 10 * i, 400 + 40 * i, 4, 1, 0, 0, 1, 900) for i in range(20)]
    known = from_tokens(
        np.array([each.prompt_tokens for each in sizes]),
        np.arange(20) * 7 + 1,
        max_tokens=900,
        recorded_s=np.linspace(1.0, 3.0, 20),
    )
    asked = from_tokens(np.array([290, 100, 123, 100]), np.zeros(4, np.int64), max_tokens=900)
    drawn = Assumptions(provider=ProviderConfig(), rows=known).answered(asked, 3)
    assert drawn.output_tokens.tolist()[:2] == [19 * 7 + 1, 1]
    assert drawn.output_tokens[3] == 1
    assert drawn.output_tokens[2] in (np.arange(20) * 7 + 1).tolist()
    assert drawn.recorded_s.tolist()[:2] == [3.0, 1.0]
    assert drawn.recorded_s[2] == -1.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a,b\n1,2\n", "not a scenario"), ("provider: {tpm: -3}\n", "provider.tpm"), ("workload: [\n", "not YAML")],
)
def test_a_wrong_scenario_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / ("s.yaml" if ":" in text else "s.csv")
    path.write_text(text)
    asked = outlook(5, FREE)
    with pytest.raises(BadInput, match=complaint):
        foresee(replace(asked, pool=replace(asked.pool, scenario=str(path))))


def test_what_is_booked_already_puts_the_finish_off_by_the_time_that_it_needs_to_flow_back() -> None:
    policy = FREE.with_(tpm_limit=30_000, tpm_headroom=0.0, charge_rule="prompt_plus_max")
    idle = outlook(240, policy)
    # 20,000 tokens at 500 a second.
    busy = replace(idle, booked=InUse(20_000.0, 40.0, continuous=True))
    first, then = foresee(idle), foresee(busy)
    assert then.finish_s - first.finish_s == pytest.approx(40.0)
    assert fluid(busy).finish_s - fluid(idle).finish_s == pytest.approx(40.0)
    assert then.milestones[-1][2] - first.milestones[-1][2] == pytest.approx(40.0)
    # Where something else holds it back longer, the tokens have flowed back by then.
    slow = outlook(31, FREE.with_(stagger_seconds=10.0, jitter_ratio=0.0))
    assert foresee(replace(slow, booked=InUse(20_000.0, 1e-3, continuous=True))) == foresee(slow)

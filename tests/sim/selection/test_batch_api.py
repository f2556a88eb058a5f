"""Live, flex, the Batch API and mixes: probabilities against the log-normal's own, waves against `split`'s, money."""

from __future__ import annotations

import json
import math
from datetime import date
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from governor.model.policy import Policy
from governor.model.prices import Price, Prices
from sim.app.cli import main
from sim.des.mixed import BATCH, FLEX, LIVE
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import Z95, from_tokens
from sim.reporting.capacity_text import ways_text
from sim.scenario.scenario import Scenario
from sim.selection import batch_api
from sim.selection.batch_api import AUTO, Terms, Way, cheapest, ways

EXAMPLE = "examples/batch.jsonl"
HOUR = 3_600.0
PRICES = Prices({"m": (Price(date.min, 2.0, 1.0, 8.0),), "f": (Price(date.min, 2.0, 1.0, 8.0, flex=0.5),)})
FAST = Policy(
    max_concurrency=500, stagger_seconds=0.0, tpm_headroom=0.0, tpm_window="bucket", charge_rule="prompt_plus_max"
)


def scenario(root: Path, monkeypatch, count: int, tokens: int = 1_000, tpm: int = 30_000, model: str = "m") -> Scenario:
    monkeypatch.chdir(root)
    ones = np.ones(count, np.int64)
    workload = from_tokens((tokens - 10) * ones, 10 * ones, max_tokens=10).with_(models=model)
    still = {"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    provider = ProviderConfig(charge_rule="prompt_plus_max").with_(latency=still, tpm=tpm)
    policy = FAST.with_(tpm_limit=tpm)
    return Scenario.of(EXAMPLE).with_(workload=workload, policy=policy, provider=provider, seed=3)


def by_name(found: tuple[Way, ...]) -> dict[str, Way]:
    """By name; of mixes the one for the deadline, 6 h in these tests."""
    return {way.name: way for way in found if way.deadline_s in (None, 6.0 * HOUR)}


def within(seconds: float, terms: Terms) -> float:
    """The probability that one batch is done by then: its own spread, and what is not known of its median."""
    p50, p95 = terms.turnaround_s
    spread = math.hypot(math.log(p95 / p50) / Z95, math.log(terms.factor))
    return NormalDist().cdf(math.log(seconds / p50) / spread)


def test_one_batch_is_done_as_the_lognormal_says(root: Path, monkeypatch) -> None:
    """One request, so one batch; 60 runs whose medians are spread evenly."""
    terms = Terms(0)
    found = by_name(ways(scenario(root, monkeypatch, 1), terms, PRICES, 6.0 * HOUR))
    expected = within(6.0 * HOUR, terms)
    batch = found[BATCH]
    assert batch.done_probability == pytest.approx(expected, abs=4.0 * 0.5 / math.sqrt(batch.runs))
    assert (found[LIVE].done_probability, found[AUTO].done_probability) == (1.0, 1.0)


def test_waves_follow_one_another(root: Path, monkeypatch) -> None:
    """Batches of one hour, known exactly: a third of the requests fits into the queue, so one batch of 20."""
    terms = Terms(100 * 990 * 100 // 85 // 3, turnaround_s=(HOUR, HOUR * 1.0001), factor=1.0001)
    found = by_name(ways(scenario(root, monkeypatch, 100), terms, PRICES, 6.0 * HOUR))
    assert found[BATCH].finish_s == pytest.approx(5.0 * HOUR, rel=0.01)
    endless = Terms(0, terms.turnaround_s, factor=1.0001)
    free = by_name(ways(scenario(root, monkeypatch, 100), endless, PRICES, 6.0 * HOUR))
    assert free[BATCH].finish_s == pytest.approx(HOUR, rel=0.01)


def test_what_no_queue_holds_is_never_done_there_but_by_a_mix(root: Path, monkeypatch) -> None:
    found = by_name(ways(scenario(root, monkeypatch, 20), Terms(1_000, turnaround_s=(60.0, 90.0)), PRICES, 6.0 * HOUR))
    assert (found[BATCH].done_probability, found[BATCH].promise_s) == (0.0, math.inf)
    assert found[AUTO].done_probability == 1.0
    assert json.dumps(found[BATCH].to_json_dict())


def test_money(root: Path, monkeypatch) -> None:
    s = scenario(root, monkeypatch, 100, tpm=300_000)
    sure = Terms(0, turnaround_s=(600.0, 700.0), factor=1.01)
    full = 100 * (990 * 2.0 + 10 * 8.0) / 1e6
    found = by_name(ways(s, sure, PRICES, 6.0 * HOUR))
    assert {name: way.cost_usd for name, way in found.items()} == pytest.approx(
        {LIVE: full, BATCH: full / 2.0, AUTO: full / 2.0}
    )
    cached = by_name(ways(s, Terms(0, sure.turnaround_s, discount=0.25, cached_share=0.5), PRICES, 6.0 * HOUR))
    assert cached[LIVE].cost_usd == pytest.approx(full - 100 * 990 * 0.5 * 1.0 / 1e6)
    assert cached[BATCH].cost_usd == pytest.approx(0.75 * full)
    assert by_name(ways(s, sure, Prices({}), 6.0 * HOUR))[LIVE].cost_usd is None


def test_flex_is_a_way_where_its_price_is_known(root: Path, monkeypatch) -> None:
    found = by_name(ways(scenario(root, monkeypatch, 50, model="f"), Terms(0), PRICES, 6.0 * HOUR))
    assert found[FLEX].cost_usd == pytest.approx(0.5 * (found[LIVE].cost_usd or 0.0))
    # Half the price and in time: the mix needs nothing else.
    assert found[AUTO].cost_usd == pytest.approx(found[FLEX].cost_usd or 0.0)


def test_a_mix_where_neither_way_alone_is_in_time(root: Path, monkeypatch) -> None:
    """70 min of live calls, and a queue that lets most of it through in an hour: both together finish in one."""
    monkeypatch.setattr(batch_api, "RUNS_MOST", 20)
    s = scenario(root, monkeypatch, 400, tpm=5_700)
    terms = Terms(120_000, turnaround_s=(900.0, 1_350.0), factor=1.1)
    found = ways(s, terms, PRICES, HOUR)
    named = {way.name: way for way in found if way.deadline_s in (None, HOUR)}
    assert named[LIVE].done_probability == 0.0
    assert named[AUTO].done_probability >= 0.95
    assert (named[AUTO].cost_usd or 0.0) < (named[LIVE].cost_usd or 0.0)
    assert cheapest(found, 0.95) is not None
    front = sorted((way.promise_s, way.cost_usd or 0.0) for way in found if way.on_front)
    assert [cost for _, cost in front] == sorted((cost for _, cost in front), reverse=True)
    text = ways_text(found, terms, HOUR, 0.95, 110)
    assert "if the Batch API's turnaround is as assumed" in " ".join(text.split())


def test_a_large_workload_is_thinned_with_its_limits(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(batch_api, "RUNS_MOST", 20)
    s = scenario(root, monkeypatch, 400, tpm=60_000)
    terms = Terms(0, turnaround_s=(1_000.0, 1_500.0), factor=1.01)
    whole = by_name(ways(s, terms, PRICES, 6.0 * HOUR))
    monkeypatch.setattr(batch_api, "REQUESTS_MOST", 100)
    part = by_name(ways(s, terms, PRICES, 6.0 * HOUR))
    for name in (LIVE, BATCH, AUTO):
        assert part[name].cost_usd == pytest.approx(whole[name].cost_usd or 0.0, rel=0.01)
        assert part[name].finish_s == pytest.approx(whole[name].finish_s, rel=0.15)


def test_the_command(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(batch_api, "RUNS_MOST", 20)
    words = ["capacity", EXAMPLE, "--first", "30", "--finish-by", "30h", "--replications", "2", "--workers", "1"]
    words += ["--keep-settings", "--batch-queue", "1M", "--batch-turnaround", "1h,2h"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [way["name"] for way in found["ways"]][:3] == ["live", "batch", "auto"]
    assert found["ways"][1]["cost_usd"] == pytest.approx(found["ways"][0]["cost_usd"] / 2.0)
    assert main(words) == 0
    assert "Live, Batch API or both? The cheapest way" in " ".join(capsys.readouterr().out.split())
    assert main(["capacity", EXAMPLE, "--finish-by", "1h", "--batch-queue", "1M", "--batch-turnaround", "2h,1h"]) == 2
    assert "--batch-turnaround '2h,1h' is not P50,P95" in capsys.readouterr().err

"""Money: what is forecast, what our own account says, and the provider's bill, counted by it and priced by hand."""

from __future__ import annotations

import json
import random
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from governor.forecast.forecast import Demand, cost_forecast
from governor.model.estimate import CHAT
from governor.model.prices import Price, Prices, Spending, usage_in
from governor.model.requests import STANDARD, Attempt, Outcome, read_requests
from sim.des.mixed import BATCH, FLEX, LIVE
from sim.model.batches import ServiceTiers
from sim.model.provider_config import ProviderConfig
from sim.scenario.scenario import Scenario
from sim.selection import batch_api
from sim.selection.batch_api import Terms, ways
from sim.serving.replies import Desk

PRIORITY = "priority"
DAY = date(2026, 7, 1)
PRICES = Prices({"m": (Price(date.min, 2.0, 0.5, 8.0, flex=0.5, priority=1.7),)})
# The same by hand: dollars per million tokens of fresh input, cached input and output.
RATES = {
    "default": (2.0, 0.5, 8.0),
    "flex": (1.0, 0.25, 4.0),
    "priority": (3.4, 0.85, 13.6),
    "batch": (1.0, 0.25, 4.0),
}
ASKED = {STANDARD: None, FLEX: "flex", PRIORITY: "priority"}


def batch(path: Path, seed: int, tier: str) -> tuple[list[dict[str, Any]], np.ndarray[Any, Any]]:
    """300 requests, half of them long enough for the cache, whose answers have known lengths."""
    rng = random.Random(seed)
    bodies, outputs = [], []
    for _ in range(300):
        words = "word " * int(rng.lognormvariate(6.5, 0.8))
        outputs.append(rng.randint(5, 900))
        body = {"model": "m", "messages": [{"role": "user", "content": words}], "max_tokens": 1_000}
        body["metadata"] = {"paceline_output_tokens": str(outputs[-1])}
        bodies.append(body | ({"service_tier": ASKED[tier]} if ASKED.get(tier) else {}))
    lines = [{"custom_id": str(i), "url": "/v1/chat/completions", "body": body} for i, body in enumerate(bodies)]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return bodies, np.array(outputs)


def bill_usd(desk: Desk) -> float:
    """The provider's own bill: its counts at the prices above."""
    total = 0.0
    for name, sums in desk.count.billed.items():
        fresh, cached, output = RATES[name.split()[1]]
        total += (sums["prompt"] - sums["cached"]) * fresh + sums["cached"] * cached + sums["output"] * output
    return total / 1e6


def attempt(lane: str, answer: dict[str, Any]) -> Attempt:
    row = dict.fromkeys(Attempt._fields, 0) | {"lane": lane, "model": "m", "outcome": Outcome.OK}
    return Attempt(**row)


@pytest.mark.parametrize("tier", [STANDARD, BATCH, FLEX, PRIORITY])
@pytest.mark.parametrize("cached_share", [0.0, 0.6])
def test_forecast_account_and_bill_agree(
    tmp_path: Path, monkeypatch, seed: int, tier: str, cached_share: float
) -> None:
    """Forecasts within 1 % of what is billed; our account to the cent. No cache in the Batch API."""
    path = tmp_path / "requests.jsonl"
    bodies, outputs = batch(path, seed, tier)
    tiers = ServiceTiers(cached_share=cached_share)
    desk = Desk(ProviderConfig().with_(tpm=0, rpm=0, tiers=tiers.model_dump()))
    spent = Spending(PRICES, DAY)
    for now, body in enumerate(bodies):
        if tier == BATCH:
            reply, _ = desk.batch_reply(CHAT, body)
            assert reply.written is not None
            desk.count.bill(reply.written, "batch")
        else:
            reply = desk.decided(CHAT, {}, json.dumps(body).encode(), float(now))
            desk.ended(reply, False, float(now))
        stated = json.loads(reply.whole_body())
        spent.attempted(attempt("batch" if tier == BATCH else "main", stated), usage_in(stated))
    billed = bill_usd(desk)
    assert spent.total_usd() == pytest.approx(billed, rel=1e-9)

    demand = Demand()
    for request in read_requests(path.read_text().splitlines(), "requests.jsonl"):
        demand.add(request.model, request.sizes, 0, request.tier)
    prompts = [sizes.prompt_tokens for _, sizes in demand.rows()]
    share = 0.0 if tier == BATCH else tiers.share_of(prompts)
    foreseen = cost_forecast(
        demand, {"m": float(outputs.sum())}, PRICES, DAY, BATCH if tier == BATCH else None, cached_share=share
    )
    assert foreseen.expected == pytest.approx(billed, rel=0.01)

    if tier == PRIORITY:
        return
    monkeypatch.setattr(batch_api, "RUNS_LEAST", 1)
    monkeypatch.setattr(batch_api, "RUNS_MOST", 1)
    scenario = Scenario.of(path)
    workload = scenario.workload.with_(output_tokens=outputs)
    provider = scenario.provider.with_(tpm=10**8, tiers=tiers.model_dump())
    terms = Terms(0, turnaround_s=(600.0, 700.0), factor=1.01)
    policy = scenario.policy.with_(tpm_limit=10**8, stagger_seconds=0.0, max_concurrency=300)
    found = ways(scenario.with_(workload=workload, provider=provider, policy=policy), terms, PRICES, 7_200.0)
    by_name = {way.name: way.cost_usd for way in found}
    assert by_name[{STANDARD: LIVE}.get(tier, tier)] == pytest.approx(billed, rel=0.01)


def test_flex_without_capacity_is_refused_and_not_billed(tmp_path: Path) -> None:
    bodies, _ = batch(tmp_path / "requests.jsonl", 1, FLEX)
    desk = Desk(ProviderConfig().with_(tpm=0, rpm=0, tiers={"flex_refused_ratio": 0.5}))
    replies = [desk.decided(CHAT, {}, json.dumps(body).encode(), float(i)) for i, body in enumerate(bodies)]
    for i, reply in enumerate(replies):
        desk.ended(reply, False, float(i))
    refused = [reply for reply in replies if reply.status == 429]
    assert 100 < len(refused) < 200
    assert json.loads(refused[0].body)["error"]["code"] == "resource_unavailable"
    assert desk.count.billed["m flex"]["answers"] == 300 - len(refused)

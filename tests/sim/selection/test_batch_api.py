"""Live, Batch or split: probabilities against the log-normal's own, waves against those that `split` writes, money."""

from __future__ import annotations

import json
import math
import random
from datetime import date
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from governor.model.policy import Policy
from governor.model.prices import Price, Prices
from sim.app.cli import main
from sim.experiment.experiment import Pool
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import Z95, from_tokens
from sim.reporting.capacity_text import ways_text
from sim.scenario.scenario import Scenario
from sim.selection import split as split_module
from sim.selection.batch_api import DISCOUNT, Terms, batch_finish_s, cost_usd, files_per_wave, ways
from sim.selection.capacity import Search
from sim.selection.split import split

BATCH = "examples/batch.jsonl"
HOUR = 3_600.0
PRICES = Prices({"m": (Price(date.min, 2.0, 1.0, 8.0),)})
FAST = Policy(
    max_concurrency=500, stagger_seconds=0.0, tpm_headroom=0.0, tpm_window="bucket", charge_rule="prompt_plus_max"
)


def scenario(root: Path, monkeypatch, count: int, tokens: int = 1_000, tpm: int = 30_000) -> Scenario:
    monkeypatch.chdir(root)
    ones = np.ones(count, np.int64)
    workload = from_tokens((tokens - 10) * ones, 10 * ones, max_tokens=10).with_(models="m")
    still = {"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    provider = ProviderConfig(charge_rule="prompt_plus_max").with_(latency=still, tpm=tpm)
    policy = FAST.with_(tpm_limit=tpm)
    return Scenario.of(BATCH).with_(workload=workload, policy=policy, provider=provider, seed=3)


def within(seconds: float, terms: Terms) -> float:
    """The log-normal's probability that one file is done by then."""
    p50, p95 = terms.turnaround_s
    return NormalDist().cdf(math.log(seconds / p50) / (math.log(p95 / p50) / Z95))


@pytest.mark.parametrize("hours", [2.0, 6.0, 23.9, 100.0])
def test_one_file_is_done_as_the_lognormal_says(root: Path, monkeypatch, hours: float) -> None:
    """After 24 h a file has expired: more time than that adds nothing."""
    terms = Terms(0)
    s = scenario(root, monkeypatch, 20)
    finish_s, waves = batch_finish_s(s, np.ones(20, bool), terms)
    expected = within(min(hours, 24.0) * HOUR, terms)
    assert waves == 1
    assert (finish_s <= hours * HOUR).mean() == pytest.approx(expected, abs=4.0 * 0.5 / math.sqrt(len(finish_s)))


def test_waves_follow_one_another_and_files_of_one_go_together(root: Path, monkeypatch) -> None:
    s = scenario(root, monkeypatch, 40)
    rows = np.ones(40, bool)
    # 990 input tokens each: 8 fit into 85 % of 10,000, so five waves of one file each.
    serial, waves = batch_finish_s(s, rows, Terms(10_000))
    assert waves == 5
    one, _ = batch_finish_s(s, rows, Terms(0))
    known = np.isfinite(serial)
    expired = 1.0 - within(24.0 * HOUR, Terms(0))
    assert 1.0 - known.mean() == pytest.approx(1.0 - (1.0 - expired) ** 5, abs=0.015)
    assert serial[known].mean() == pytest.approx(5.0 * one[np.isfinite(one)].mean(), rel=0.03)
    monkeypatch.setattr("sim.selection.batch_api.FILE_LINES", 10)
    assert files_per_wave([990] * 40, 0) == [4]
    side_by_side, _ = batch_finish_s(s, rows, Terms(0))
    p = within(6.0 * HOUR, Terms(0))
    assert (side_by_side <= 6.0 * HOUR).mean() == pytest.approx(p**4, abs=0.015)


def test_waves_are_those_that_split_writes(tmp_path: Path, monkeypatch, seed: int) -> None:
    monkeypatch.setattr(split_module, "FILE_LINES", 7)
    monkeypatch.setattr("sim.selection.batch_api.FILE_LINES", 7)
    rng = random.Random(seed)
    rows = [
        {"model": "m", "messages": [{"role": "user", "content": "word " * rng.randint(1, 300)}]} for _ in range(100)
    ]
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body})
        for i, body in enumerate(rows)
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    queue = rng.randint(1_000, 20_000)
    found = split(source, tmp_path / "out", queue_tokens=queue)
    tokens = Scenario.of(source).workload.prompt_tokens.tolist()
    waves = [part.wave for part in found.parts]
    assert files_per_wave(tokens, queue) == [waves.count(wave + 1) for wave in range(max(waves))]


def test_what_no_queue_holds_is_never_done_there(root: Path, monkeypatch) -> None:
    """`split` refuses such a request; nothing may be promised for it."""
    s = scenario(root, monkeypatch, 20)
    rows, tokens = np.ones(20, bool), int(s.workload.prompt_tokens.max())
    for queue, done in ((tokens, False), (2 * tokens, True)):
        finish_s, _ = batch_finish_s(s, rows, Terms(queue, turnaround_s=(1.0, 2.0)))
        assert bool(np.isfinite(finish_s).all()) == done


def test_money(root: Path, monkeypatch) -> None:
    s = scenario(root, monkeypatch, 100)
    live, batch = np.ones(100, bool), np.zeros(100, bool)
    full = 100 * (990 * 2.0 + 10 * 8.0) / 1e6
    assert cost_usd(s, live, Terms(0), PRICES) == pytest.approx(full)
    assert cost_usd(s, batch, Terms(0), PRICES) == pytest.approx(full * (1.0 - DISCOUNT))
    assert cost_usd(s, live, Terms(0, cached_share=0.5), PRICES) == pytest.approx(full - 100 * 990 * 0.5 * 1.0 / 1e6)
    assert cost_usd(s, live, Terms(0), Prices({})) is None
    assert cost_usd(s, live, Terms(0), None) is None


def test_a_split_where_neither_way_alone_is_in_time(root: Path, monkeypatch) -> None:
    """400,000 tokens at 30,000 a minute take 12.4 minutes live, and several waves of Batch files as long: not in ten.

    Half of it does: that is one wave of at most six minutes.
    """
    s = scenario(root, monkeypatch, 400)
    terms = Terms(int(400_000 * 0.6), turnaround_s=(240.0, 300.0))
    search = Search(s, 500.0, replications=2, retune=False, pool=Pool(1))
    live, batch, mixed = ways(search, terms, PRICES)
    assert (live.done_probability, batch.done_probability < 0.95) == (0.0, True)
    assert (live.waves, batch.waves, mixed.waves) == (0, 2, 1)
    # One wave holds 51 % of the tokens; of the rest 30,000 x (1 + 500 / 60) go through in time.
    assert mixed.live_share == 0.5
    assert mixed.done_probability >= 0.95
    assert live.cost_usd is not None
    assert mixed.cost_usd == pytest.approx(0.75 * live.cost_usd)
    text = ways_text((live, batch, mixed), terms, 0.95, 110)
    assert "a split with 50 % live" in text
    assert "assumed" in text


def test_the_command(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    words = ["capacity", BATCH, "--first", "30", "--finish-by", "30h", "--replications", "2", "--workers", "1"]
    words += ["--keep-settings", "--batch-queue", "1M", "--batch-turnaround", "1h,2h"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [way["name"] for way in found["ways"]] == ["live", "batch"]
    assert found["ways"][1]["cost_usd"] == pytest.approx(found["ways"][0]["cost_usd"] / 2.0)
    assert main(words) == 0
    assert "Live, Batch or split? The cheapest way" in capsys.readouterr().out
    assert main(["capacity", BATCH, "--finish-by", "1h", "--batch-queue", "1M", "--batch-turnaround", "2h,1h"]) == 2
    assert "--batch-turnaround '2h,1h' is not P50,P95" in capsys.readouterr().err

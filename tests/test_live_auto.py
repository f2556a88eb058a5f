"""`paceline run --via auto` as a command against the synthetic provider over HTTP: mixes, moves, kills, flex."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from governor.journal.journal import Journal
from tests.live import Cli, batch, check_whole, line, provider, run_args, shared_cli, write_batch

REQUESTS = 48
SCALE = 200.0
QUICK = {"queue_tokens": 0, "turnaround_s": [100.0, 120.0]}
SLOW = {"queue_tokens": 0, "turnaround_s": [30_000.0, 40_000.0]}


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def args_of(tmp_path: Path, base_url: str, finish_by: str, scale: float = SCALE) -> list[Any]:
    return run_args(tmp_path, base_url, "--via", "auto", "--finish-by", finish_by, "--time-scale", scale, "--json")


def lanes(tmp_path: Path) -> Counter[str]:
    with Journal.open(tmp_path / "results.journal.db") as journal:
        return Counter(attempt.lane for attempt in journal.attempts() if attempt.outcome == "ok")


def test_with_time_enough_everything_goes_by_the_batch_api(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", REQUESTS)
    with provider(time_scale=SCALE, stated_time="provider", batch_api=QUICK) as served:
        ran = cli.run(*args_of(tmp_path, served.base_url, "6h"))
        assert ran.code == 0, ran.err
        seen = served.stats()
    check_whole(tmp_path, REQUESTS)
    assert "the Batch API's turnaround is assumed" in ran.err
    assert lanes(tmp_path) == {"batch": REQUESTS}
    assert (seen["files"], set(seen["batches"])) == (0, {"completed"})
    assert ran.json["completed"] == REQUESTS
    # What the run has seen of the turnaround is learnt, and no longer assumed.
    ran = cli.run("calibrate", tmp_path / "results.journal.db", "--out", tmp_path / "mine.yaml")
    assert ran.code == 0, ran.err
    assert "batch turnaround P50" in ran.out
    api = yaml.safe_load((tmp_path / "mine.yaml").read_text())["provider"]["batch_api"]
    assert api["measured"] == 3
    assert 90.0 < api["turnaround_s"][0] < 130.0


def test_what_the_batch_api_has_not_done_when_the_slack_is_gone_goes_live(cli: Cli, tmp_path: Path) -> None:
    batch(tmp_path / "requests.jsonl", REQUESTS)
    with provider(time_scale=SCALE, batch_api=SLOW) as served:
        ran = cli.run(*args_of(tmp_path, served.base_url, "30m"))
        assert ran.code == 0, ran.err
        seen = served.stats()
    check_whole(tmp_path, REQUESTS)
    assert "the slack is gone" in ran.err
    found = lanes(tmp_path)
    assert found["main"] + found["batch"] == REQUESTS
    assert found["main"] >= REQUESTS / 2
    assert (set(seen["batches"]), seen["files"]) == ({"cancelled"}, 0)
    assert seen["outcomes"].get("ok", 0) == found["main"]


def test_kill_9_at_random_moments_with_moves(cli: Cli, tmp_path: Path, seed: int) -> None:
    """No request is lost or answered twice, and no batch is submitted twice."""
    rng = random.Random(seed)
    batch(tmp_path / "requests.jsonl", REQUESTS, seed=rng.randrange(10**6))
    kills = 0
    with provider(time_scale=SCALE, batch_api=SLOW) as served:
        args = args_of(tmp_path, served.base_url, "35m")
        for _ in range(3):
            ran = cli.start(*args, dies_after=rng.randint(4, 14)).wait()
            assert "Traceback" not in ran.err, ran.err
            if ran.code != 128 + signal.SIGKILL:
                break
            kills += 1
        ran = cli.run(*args)
        assert ran.code == 0, ran.err
        seen = served.stats()
    assert kills
    check_whole(tmp_path, REQUESTS)
    with Journal.open(tmp_path / "results.journal.db") as journal:
        ends = Counter(attempt.request for attempt in journal.attempts() if attempt.outcome == "ok")
        assert set(ends.values()) == {1}
        assert len(ends) == REQUESTS
        assert sum(seen["batches"].values()) == len([row for row in journal.waves() if row.batch_id])
    assert seen["files"] == 0


def test_flex_falls_back_to_standard_when_it_is_out_of_capacity(cli: Cli, tmp_path: Path) -> None:
    lines = [line(f"q-{i}", model="gpt-5-mini") for i in range(20)]
    write_batch(tmp_path / "requests.jsonl", lines)
    with provider(time_scale=100.0, batch_api=SLOW, tiers={"flex_refused_ratio": 0.2}) as served:
        ran = cli.run(*args_of(tmp_path, served.base_url, "1h", 100.0))
        assert ran.code == 0, ran.err
        billed = served.stats()["billed"]
    check_whole(tmp_path, 20)
    assert "flex is out of capacity" in ran.err
    assert billed["gpt-5-mini flex"]["answers"] + billed["gpt-5-mini default"]["answers"] == 20
    # Our account is the provider's bill at the list's prices: half of $0.25 and $2 for flex.
    usd = 0.0
    for name, factor in (("flex", 0.5), ("default", 1.0)):
        sums = billed[f"gpt-5-mini {name}"]
        usd += factor * (0.25 * sums["prompt"] + 2.0 * sums["output"]) / 1e6
    assert ran.json["cost_usd"] == pytest.approx(usd)


def test_an_account_without_the_batch_api_is_done_live(cli: Cli, tmp_path: Path) -> None:
    """Whatever the Batch API refuses, live calls do."""
    batch(tmp_path / "requests.jsonl", 10)
    tiny = {"queue_tokens": 1, "turnaround_s": [100.0, 120.0]}
    with provider(time_scale=SCALE, batch_api=tiny) as served:
        ran = cli.run(*args_of(tmp_path, served.base_url, "25m"))
        assert ran.code == 0, ran.err
    check_whole(tmp_path, 10)
    assert json.dumps(dict(lanes(tmp_path))) == json.dumps({"main": 10})

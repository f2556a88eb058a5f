"""`paceline simulate` and `plan` with `--pools`: a batch over the quotas of a pools file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from governor.model.policy import KNOBS
from sim import Scenario, simulate_pools
from sim.app.cli import main

POOLS = """
pools:
  - {name: large, group: chat, models: ["gpt*"], limits: {tpm: 60000}}
  - {name: small, group: chat, models: ["gpt*"], limits: {tpm: 30000}}
  - {name: other, models: ["o4*"], limits: {tpm: 20000}}
"""
SETTINGS = "OPENAI_TPM_WINDOW=bucket", "OPENAI_STAGGER_SECONDS=0.1", "OPENAI_MAX_CONCURRENCY=30"
SET = [word for setting in SETTINGS for word in ("--set", setting)]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    for knob in KNOBS:
        monkeypatch.delenv(knob.env, raising=False)

    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def pools(tmp_path: Path) -> Path:
    (tmp_path / "pools.yaml").write_text(POOLS)
    return tmp_path / "pools.yaml"


def batch(path: Path, **counts: int) -> Path:
    """Write so many requests to each model, of 1,000 tokens and 500 to answer at most."""
    with path.open("w") as file:
        for model, count in counts.items():
            body: dict[str, Any] = {"model": model.replace("_", "-"), "max_tokens": 500}
            body["messages"] = [{"role": "user", "content": "word " * 800}]
            for i in range(count):
                line = {"custom_id": f"{model}-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(line) + "\n")
    return path


def found(run: Run, *args: object) -> dict[str, Any]:
    code, out, err = run(*args, "--json")
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


def test_a_batch_is_simulated_as_simulate_pools_does_and_without_a_pool_as_the_others_alone(
    run: Run, pools: Path, tmp_path: Path
) -> None:
    requests = batch(tmp_path / "requests.jsonl", gpt_4o=40)
    both = found(run, "simulate", requests, "--pools", pools, *SET)
    assert (both["requests"], both["failed"], both["throttled"]) == (40, 0, 0)
    assert sum(pool["requests"] for pool in both["pools"].values()) == 40
    assert list(both["pools"]) == ["large", "small"]
    assert len(both["finishes_s"]) == 3

    policy = {"tpm_window": "bucket", "stagger_seconds": 0.1, "max_concurrency": 30}
    large = Scenario(str(requests), tpm=60_000, policy=policy)
    expected = simulate_pools({"large": large, "small": large.with_(tpm=30_000)}, replications=3)
    assert both["finishes_s"] == [each.makespan_s for each in expected.runs]
    # A group of two, without one of them, is the other one alone.
    for name, other in (("large", 30_000), ("small", 60_000)):
        alone = found(run, "simulate", requests, "--tpm", other, *SET)
        assert both["pools"][name]["without_it_s"] == alone["makespan_s"] > both["makespan_s"]
    # With many requests the tokens bind, and the bound is that of one quota with both limits.
    many = batch(tmp_path / "many.jsonl", gpt_4o=200)
    both = found(run, "simulate", many, "--pools", pools, "--replications", 1, *SET)
    whole = found(run, "simulate", many, "--tpm", 90_000, *SET)
    assert both["bound_s"] == pytest.approx(whole["bound_s"], abs=2.0)


def test_text_names_the_pool_that_matters_and_a_pool_by_itself_ends_with_the_others(
    run: Run, pools: Path, tmp_path: Path
) -> None:
    requests = batch(tmp_path / "requests.jsonl", gpt_4o=20, o4_mini=8)
    code, out, _ = run("simulate", requests, "--pools", pools, "--replications", 1, *SET)
    assert code == 0
    assert "Pool large matters most" in out
    content = found(run, "simulate", requests, "--pools", pools, "--replications", 1, *SET)
    assert content["pools"]["other"]["requests"] == 8
    assert content["pools"]["other"]["without_it_s"] is None
    assert content["makespan_s"] == max(pool["makespan_s"] for pool in content["pools"].values())


def test_what_a_pool_states_itself_is_refused(run: Run, pools: Path, tmp_path: Path) -> None:
    requests = batch(tmp_path / "requests.jsonl", gpt_4o=2)
    code, _, err = run("simulate", requests, "--pools", pools, "--tpm", 5)
    assert (code, err) == (2, "--tpm is for one quota: state it in the pools file\n")
    code, _, err = run("capacity", requests, "--pools", pools, "--finish-by", "1h")
    assert (code, "--pools is for simulate and plan" in err) == (2, True)
    code, _, err = run("simulate", batch(tmp_path / "odd.jsonl", llama=1), "--pools", pools)
    assert (code, "request 0 asks for model 'llama', which no pool takes" in err) == (2, True)


def test_plan_sets_each_pool_and_says_what_they_make_together(run: Run, pools: Path, tmp_path: Path) -> None:
    requests = batch(tmp_path / "requests.jsonl", gpt_4o=24)
    content = found(
        run, "plan", requests, "--pools", pools, "--effort", "quick", "--replications", 2, "--out", tmp_path / "out"
    )
    now, recommended = content["now"], content["recommended"]
    assert recommended["failed"] == 0
    assert recommended["makespan_s"] < 0.5 * now["makespan_s"]
    for name in ("large", "small"):
        rows = (tmp_path / "out" / name / "scenario.workload.csv").read_text().splitlines()
        assert (tmp_path / "out" / name / "recommended.env").exists()
        assert 1 < len(rows) < 25

"""The inverse question, against closed forms and against plain trial of every limit."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from sim.app.cli import main
from sim.experiment.experiment import Pool, case_of, replicate, summary_of
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens, parametric
from sim.scenario.scenario import Scenario
from sim.selection import capacity as module
from sim.selection.capacity import RESOLUTION, at_limits, model_of, rounded_up, runs_of
from sim.selection.capacity_results import BOUND, LARGEST, TAIL, Capacity

BATCH = "examples/batch.jsonl"
# Closed forms are for one policy: what it gains by being tuned is tested apart.
capacity = partial(module.capacity, retune=False)
# Everything that the law can do, so that tokens per minute alone decide.
FAST = Policy(
    max_concurrency=500, stagger_seconds=0.0, tpm_headroom=0.0, tpm_window="bucket", charge_rule="prompt_plus_max"
)


def scenario(workload, policy: Policy = FAST, **provider: object) -> Scenario:
    """Charged prompt + cap, answered in one second, no noise and no stall: a fluid in all but name."""
    still = {"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    config = ProviderConfig(charge_rule="prompt_plus_max").with_(latency=still, **provider)
    base = Scenario.of(BATCH)
    return base.with_(workload=workload, policy=policy, provider=config, seed=3)


def equal_requests(count: int, tokens: int):
    """Requests that are charged so many tokens each."""
    ones = np.ones(count, np.int64)
    return from_tokens((tokens - 10) * ones, 10 * ones, max_tokens=10)


@pytest.mark.parametrize(("minutes", "count", "tokens"), [(2.0, 100, 1_000), (10.0, 300, 2_000), (0.5, 64, 5_000)])
def test_the_closed_form_of_a_bucket(root: Path, monkeypatch, minutes: float, count: int, tokens: int) -> None:
    """A full bucket of L tokens that refills by L per minute lets n c tokens through after (n c - L) / L minutes.

    With one second of service: L = n c / (1 + minutes - 1/60), found to the resolution and rounded up to three digits.
    """
    monkeypatch.chdir(root)
    found = capacity(
        scenario(equal_requests(count, tokens)), 60.0 * minutes, replications=2, pool=Pool(1, foreseen=1e7)
    )
    assert found.smallest is not None
    needed = count * tokens / (1.0 + minutes - 1.0 / 60.0)
    assert needed <= found.smallest.tpm <= needed * (1.0 + 2.0 * RESOLUTION)
    assert found.smallest.on_time == found.smallest.runs == runs_of(count)
    assert found.decided is not None
    assert found.decided.bound_tpm == pytest.approx(count * tokens / (1.0 + minutes), rel=0.002)
    assert found.decided.by == BOUND
    # What misses lies below what is enough, and there is nothing of any size between them.
    assert found.below is None or needed * (1.0 - 2.0 * RESOLUTION) < found.below.tpm < found.smallest.tpm
    for probe in found.probes:
        assert probe.meets == (probe.tpm >= needed * (1.0 - 1e-9))


def test_it_is_what_plain_trial_finds(root: Path, monkeypatch, seed: int) -> None:
    """Every limit on a fine grid, tried one by one: none of those clearly below the answer is in time."""
    monkeypatch.chdir(root)
    workload = parametric(60, prompt_tokens=(600, 1_500), output_tokens=(80, 300), max_tokens=400, seed=seed)
    s = scenario(workload, FAST.with_(max_concurrency=8)).with_(seed=seed % 1_000)
    late = s.provider.with_(latency={"first_token_s": 0.5, "per_token_s": 0.01, "sigma": 0.25, "stall_ratio": 0.0})
    s = s.with_(provider=late)
    finish_by_s = 240.0
    found = capacity(s, finish_by_s, replications=8, pool=Pool(1))
    assert found.smallest is not None
    for tpm in np.geomspace(found.smallest.tpm / 3.0, found.smallest.tpm * 0.96, 12).astype(int).tolist():
        if tpm < s.charges().max():
            continue
        runs = replicate(at_limits(s, tpm, 0), 8, pool=Pool(1)).runs
        assert sum(run["makespan_s"] > finish_by_s or run["failed"] > 0 for run in runs) > 0, tpm
    # Published figures come from seeds that nothing was chosen by: not even the limits that were not confirmed.
    seeds = {run.seed for run in found.smallest.forecast.runs}
    assert len(seeds) == found.replications
    assert min(seeds) >= s.seed + 1_000_000
    for probe in (*found.probes, found.unlimited, *found.tiers):
        assert not seeds & {run.seed for run in probe.forecast.runs}
    assert found.smallest.forecast["makespan_s"].p95 <= finish_by_s


def test_the_policy_follows_the_limit(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    s = scenario(equal_requests(10, 1_000), FAST.with_(tpm_limit=20_000))
    changed = at_limits(s, 90_000, 60)
    assert (changed.provider.tpm, changed.provider.rpm) == (90_000, 60)
    assert (changed.policy.tpm_limit, changed.policy.rpm_limit) == (90_000, 60)
    # Else the old limit of the policy would hold it back here: 200,000 tokens in a minute.
    found = capacity(
        scenario(equal_requests(200, 1_000), FAST.with_(tpm_limit=20_000)), 62.0, replications=2, pool=Pool(1)
    )
    assert found.smallest is not None
    assert found.smallest.tpm == pytest.approx(200_000 / (1.0 + 61.0 / 60.0), rel=0.02)


def test_where_no_limit_is_enough_the_binding_knob_is_named(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    for name in ("OPENAI_STAGGER_SECONDS", "OPENAI_TPM_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    # 199 staggers of 15 s, 20 % jitter at the most: 200 requests cannot start within half an hour.
    code = main(["capacity", BATCH, "--finish-by", "30m", "--replications", "2", "--workers", "1", "--keep-settings"])
    out = capsys.readouterr().out
    assert code == 3
    assert "No limit of tokens per minute is enough" in out
    assert "OPENAI_STAGGER_SECONDS=15" in out
    code = main(
        ["capacity", BATCH, "--finish-by", "30m", "--replications", "2", "--workers", "1", "--keep-settings", "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert (code, found["smallest_tpm"], found["smallest"], found["smallest_tier"]) == (3, None, None, None)
    assert found["unlimited"]["makespan_s"]["p50"] > 1_800.0
    assert [tier["name"] for tier in found["tiers"]] == [f"gpt-4o-tier{i}" for i in range(1, 6)]


def test_the_smallest_tier(root: Path, monkeypatch) -> None:
    """Tiers 1 to 3 of gpt-4o grant 30k, 450k and 800k tokens per minute: what each needs is the closed form."""
    monkeypatch.chdir(root)
    s = scenario(equal_requests(900, 1_000))
    for minutes, name in ((29.2, "gpt-4o-tier1"), (1.2, "gpt-4o-tier2"), (0.3, "gpt-4o-tier3")):
        found = capacity(s, 60.0 * minutes, replications=2, pool=Pool(1))
        assert found.tier is not None
        assert found.tier.name == name
        assert [probe.meets for probe in found.tiers] == [False] * (len(found.tiers) - 1) + [True]


def test_a_request_above_a_tier_rules_it_out(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    found = capacity(scenario(equal_requests(3, 50_000)), 3_600.0, replications=1, pool=Pool(1))
    assert found.too_small_tiers == ("gpt-4o-tier1",)
    assert found.tier is not None
    assert found.tier.name == "gpt-4o-tier2"
    assert found.smallest is not None
    assert found.smallest.tpm >= 50_000
    assert found.decided is not None
    assert found.decided.by == LARGEST


def test_requests_per_minute_that_bind_are_no_matter_of_tokens(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    # 60 at once, then 60 per minute: 300 requests need four minutes, whatever the tokens.
    s = scenario(equal_requests(300, 100), rpm=60)
    assert capacity(s, 200.0, replications=1, pool=Pool(1)).smallest is None
    assert capacity(s, 260.0, replications=1, pool=Pool(1)).smallest is not None


def test_confidence_allows_so_many_late_runs(root: Path, monkeypatch) -> None:
    """At 0.5 half of the runs may be late: the answer lies near the median finish time of that limit, not its tail."""
    monkeypatch.chdir(root)
    workload = parametric(40, prompt_tokens=(600, 1_500), output_tokens=(80, 300), max_tokens=400, seed=1)
    s = scenario(workload)
    noisy = s.provider.with_(latency={"first_token_s": 20.0, "per_token_s": 0.0, "sigma": 0.6, "stall_ratio": 0.0})
    s = s.with_(provider=noisy)

    def smallest(confidence: float) -> Capacity:
        return capacity(s, 90.0, confidence=confidence, replications=16, pool=Pool(1))

    half, most = smallest(0.5), smallest(0.9)
    assert half.smallest is not None
    assert most.smallest is None or most.smallest.tpm > half.smallest.tpm
    # The lower limit is that of Clopper and Pearson, by an independent calculation.
    on_time, runs = half.smallest.on_time, half.smallest.runs
    exact = stats.binomtest(on_time, runs).proportion_ci(0.9, method="exact").low
    assert half.smallest.on_time_at_least == pytest.approx(exact)
    assert 0.5 <= exact < on_time / runs


def test_a_tail_that_decides_is_named(root: Path, monkeypatch) -> None:
    """Answers of 20 s, some of them much longer: what half of the runs need is far from what 95 % of them do."""
    monkeypatch.chdir(root)
    s = scenario(equal_requests(60, 1_000))
    late = {"first_token_s": 10.0, "per_token_s": 0.0, "sigma": 0.5, "stall_ratio": 0.0}
    found = capacity(s.with_(provider=s.provider.with_(latency=late)), 60.0, pool=Pool(1))
    assert found.decided is not None
    assert found.decided.by == TAIL
    assert found.decided.p50_s < 0.95 * 60.0


def test_runs_that_lose_requests_are_never_enough(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    # One attempt each, and every tenth answer is a server error.
    s = scenario(equal_requests(40, 1_000), FAST.with_(retry_max_attempts=1), faults={"error_ratio": 0.1})
    found = capacity(s, 1e6, replications=4, pool=Pool(1))
    assert found.unlimited.forecast.lost > 0
    assert found.smallest is None


def test_the_bracket_holds_where_tokens_come_back(root: Path, monkeypatch) -> None:
    """A provider that settles lets more through than the charges say: the answer lies below their closed form."""
    monkeypatch.chdir(root)
    ones = np.ones(100, np.int64)
    workload = from_tokens(500 * ones, 10 * ones, max_tokens=1_500)
    policy = FAST.with_(settle=True)
    keeps = capacity(scenario(workload, policy.with_(settle=False)), 300.0, replications=1, pool=Pool(1)).smallest
    settles = capacity(scenario(workload, policy, settles=True), 300.0, replications=1, pool=Pool(1)).smallest
    assert keeps is not None
    assert settles is not None
    assert settles.tpm < 0.6 * keeps.tpm


def test_one_probe_is_one_forecast(root: Path, monkeypatch) -> None:
    """A probe's runs are plain runs of the scenario at that limit, under seed + 1,000,000 and on."""
    monkeypatch.chdir(root)
    found = capacity(scenario(equal_requests(50, 1_000)), 120.0, replications=2, pool=Pool(1))
    assert found.smallest is not None
    changed = at_limits(scenario(equal_requests(50, 1_000)), found.smallest.tpm, 0)
    first = found.smallest.forecast.runs[0]
    assert summary_of(case_of(changed), first.seed).makespan_s == first["makespan_s"]


def test_whose_tiers(root: Path, monkeypatch) -> None:
    monkeypatch.chdir(root)
    s = scenario(equal_requests(1, 100))
    assert model_of(s) == "gpt-4o"
    assert model_of(s.with_(workload=s.workload.with_(models="gpt-4o-mini"))) == "gpt-4o-mini"
    assert model_of(s.with_(provider=ProviderConfig.of("gpt-5.5-tier2"))) == "gpt-5.5"
    assert model_of(s, "gpt-4-turbo") == "gpt-4-turbo"
    with pytest.raises(BadSetting, match="there are no published tiers of 'gpt-1'"):
        model_of(s, "gpt-1")


def test_rounding_up_and_runs() -> None:
    assert [rounded_up(x) for x in (1, 999, 1_001, 41_237, 123_456_789)] == [1, 999, 1_010, 41_300, 124_000_000]
    for value in np.geomspace(1, 1e9, 200).tolist():
        assert value <= rounded_up(value) <= math.ceil(value * 1.01)
    assert (runs_of(10), runs_of(500), runs_of(10**6), runs_of(10, least=250)) == (200, 120, 59, 250)
    assert (runs_of(10**6, 0.9), runs_of(10**6, 0.99), runs_of(10, 1.0)) == (29, 299, 3_000)
    # 59 runs without a late one are enough to say "at least 95 %, at 95 % confidence"; 58 are not.
    assert 0.05 ** (1 / 59) > 0.95 > 0.05 ** (1 / 58)


def test_the_command(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    monkeypatch.delenv("OPENAI_TPM_LIMIT", raising=False)
    words = ["capacity", BATCH, "--first", "40", "--finish-by", "20m", "--replications", "4", "--workers", "1"]
    words += ["--keep-settings"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "To finish within 20 min: " in captured.out
    assert "Smallest published tier: gpt-4o-tier" in " ".join(captured.out.split())
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finish_by_s"] == 1_200.0
    assert found["smallest"]["tpm"] == found["smallest_tpm"]
    assert found["smallest"]["makespan_s"]["p95"] <= 1_200.0
    assert found["smallest"]["runs"] == found["replications"] == 200
    assert found["smallest"]["on_time_probability_at_least"] >= 0.95
    assert found["decided"]["by"] in captured.out

"""The other questions of capacity: settings tuned at each limit, how many requests fit, waits in steady traffic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from governor.model.errors import BadInput
from governor.model.policy import Policy
from sim.app.cli import main
from sim.base.style import png_of
from sim.experiment.experiment import Pool, replicate
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens, parametric
from sim.reporting.figures_compare import capacity_figure
from sim.scenario.scenario import Scenario
from sim.selection import capacity as module
from sim.selection.capacity import capacity, how_many, tuned
from sim.selection.search import Goal
from sim.selection.steady import load_tpm, steady_capacity, truncation, waits_of

BATCH = "examples/batch.jsonl"
FAST = Policy(
    max_concurrency=500, stagger_seconds=0.0, tpm_headroom=0.0, tpm_window="bucket", charge_rule="prompt_plus_max"
)


def scenario(root: Path, monkeypatch, workload, policy: Policy = FAST, **provider: object) -> Scenario:
    """Charged prompt + cap, answered in one second, no noise and no stall: a fluid in all but name."""
    monkeypatch.chdir(root)
    still = {"first_token_s": 1.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0}
    config = ProviderConfig(charge_rule="prompt_plus_max").with_(latency=still, **provider)
    return Scenario.of(BATCH).with_(workload=workload, policy=policy, provider=config, seed=3)


def equal_requests(count: int, tokens: int, arrival_s: np.ndarray | None = None):
    ones = np.ones(count, np.int64)
    return from_tokens((tokens - 10) * ones, 10 * ones, max_tokens=10, arrival_s=arrival_s)


# ---------------------------------------------------------------- settings tuned at each limit


def test_tuned_settings_reach_the_closed_form_where_todays_cannot(root: Path, monkeypatch) -> None:
    """Under the guardrails 15 s of stagger hold 40 requests for ten minutes, whatever the limit: tuning undoes that."""
    s = scenario(root, monkeypatch, equal_requests(40, 1_000), Policy())
    assert capacity(s, 120.0, replications=1, retune=False, pool=Pool(1)).smallest is None
    found = capacity(s, 120.0, replications=1, pool=Pool(1))
    assert found.tuned
    assert found.smallest is not None
    needed = 40_000 / (1.0 + 2.0 - 1.0 / 60.0)
    assert needed <= found.smallest.tpm <= 1.05 * needed
    # The published run is one of these settings at this limit.
    policy = found.smallest.forecast.policy
    assert policy.tpm_limit == found.smallest.tpm
    first = found.smallest.forecast.runs[0]
    again = replicate(module.at_limits(s, found.smallest.tpm, 0).with_(policy=policy, seed=first.seed), 1, pool=Pool(1))
    assert again.runs[0]["makespan_s"] == first["makespan_s"]


def test_tuning_is_never_worse_than_what_it_began_with(root: Path, monkeypatch) -> None:
    s = scenario(root, monkeypatch, equal_requests(60, 1_000), Policy(tpm_limit=30_000), tpm=30_000)
    other = FAST.with_(tpm_limit=30_000)
    found = tuned(s, Goal(), pool=Pool(1), first=[other])[0]
    times = [replicate(s, 3, policy=p, pool=Pool(1))["makespan_s"].mean for p in (found, s.policy, other)]
    assert times[0] <= 1.003 * min(times[1:])


def test_settings_that_rarely_lose_are_no_limit_s_fault(root: Path, monkeypatch) -> None:
    """Of the settings found, the first that loses nothing answers for the limit, and is asked first from then on."""
    s = scenario(root, monkeypatch, equal_requests(40, 1_000), FAST, tpm=30_000)
    reckless = FAST.with_(charge_rule="fixed", est_tokens_per_run=100, retry_max_attempts=1)
    late = FAST.with_(stagger_seconds=10.0)
    search = module.Search(s, 60.0, replications=2, pool=Pool(1))
    policies = [reckless, late, FAST]
    probe = search.best_tried(s, policies)
    assert probe.meets
    assert probe.forecast.policy == policies[0] == FAST
    # One that is only late says something of the limit: no other is tried.
    assert not search.best_tried(s, [late, FAST]).meets
    assert search.best_tried(s, [reckless, late]).forecast.policy == reckless


def test_a_provider_that_settles_needs_no_more_than_what_is_used(root: Path, monkeypatch) -> None:
    """Charges come back: settings that leave room for what is rarely lost must not be all that is tried."""
    w = parametric(80, prompt_tokens=(1_000, 4_000), output_tokens=(130, 450), max_tokens=4_096, seed=2)
    s = scenario(root, monkeypatch, w, Policy()).with_(provider=ProviderConfig(settles=True))
    found = capacity(s, 120.0, replications=20, pool=Pool(1))
    assert found.smallest is not None
    used = float((w.prompt_tokens + w.output_tokens).sum()) / 3.0
    # A refusal now and then makes a tail: 95 of 100 runs need more than the usual one does.
    assert used <= found.smallest.tpm <= 1.2 * used


# ---------------------------------------------------------------- how many requests fit


@pytest.mark.parametrize(("tpm", "rpm", "minutes"), [(30_000, 0, 5.0), (0, 20, 3.0), (60_000, 30, 4.0)])
def test_how_many_fit_is_the_closed_form_of_the_bucket(root, monkeypatch, tpm: int, rpm: int, minutes: float) -> None:
    """A full bucket and its refill until one second before the end; the tighter of tokens and requests decides."""
    policy = FAST.with_(tpm_limit=tpm or 10**9, rpm_limit=rpm)
    s = scenario(root, monkeypatch, equal_requests(7, 1_000), policy, tpm=tpm, rpm=rpm)
    found = how_many(s, 60.0 * minutes, replications=1, retune=False, pool=Pool(1))
    fluid = 1.0 + minutes - 1.0 / 60.0
    most = min([tpm / 1_000 * fluid] * (tpm > 0) + [rpm * fluid] * (rpm > 0))
    assert found.most is not None
    # To the resolution of 1 %, and whole requests.
    assert 0.985 * most - 1 <= found.requests <= most + 1e-9
    assert found.above is not None
    assert found.requests < found.above.forecast.requests <= 1.015 * most + 2


def test_not_even_one_fits(root: Path, monkeypatch) -> None:
    s = scenario(root, monkeypatch, equal_requests(3, 1_000), FAST, tpm=30_000)
    found = how_many(s, 0.5, replications=1, retune=False, pool=Pool(1))
    assert (found.requests, found.most) == (0, None)
    assert found.to_json_dict()["most"] is None


def test_how_many_on_the_command_line(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(root)
    words = ["capacity", BATCH, "--finish-by", "10m", "--how-many", "--replications", "2", "--workers", "1"]
    assert main([*words, "--keep-settings", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Today's settings: launches at 0, 15, ... s, 20 % jitter at the most.
    assert 600 / 18 * 0.9 - 2 <= found["requests"] <= 600 / 12 + 1
    assert found["most"]["settings"]["OPENAI_STAGGER_SECONDS"] == 15
    assert main(["capacity", BATCH, "--finish-by", "1s", "--how-many", "--keep-settings", "--workers", "1"]) == 3
    assert "Not even one request" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --finish-by"),
        (["--finish-by", "1h", "--p95-wait", "3s"], "give one of --finish-by"),
        (["--p95-wait", "3s"], "add --arrivals trace"),
        (["--p95-wait", "3s", "--how-many"], "--how-many is for a batch"),
        (["--p95-wait", "soon"], "is not a duration"),
        (["--finish-by", "1h", "--out", "a.pdf"], "--out writes .png"),
        (["--finish-by", "1h", "--how-many", "--tiers", "gpt-4o"], "leave one of them out"),
        (["--finish-by", "1h", "--confidence", "0"], "--confidence 0 is always met"),
        (["--finish-by", "1h", "--prices", "none.yaml"], "--prices is for --batch-queue"),
        (["--finish-by", "1h", "--batch-discount", "30%"], "--batch-discount is for --batch-queue"),
        (["--finish-by", "1h", "--cached-share", "30%"], "--cached-share is for --batch-queue"),
    ],
)
def test_questions_that_do_not_go_together(root: Path, monkeypatch, capsys, words: list[str], message: str) -> None:
    monkeypatch.chdir(root)
    assert main(["capacity", BATCH, *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


# ---------------------------------------------------------------- steady traffic


def test_a_full_limit_on_steady_traffic(root: Path, monkeypatch) -> None:
    """60 requests of 1,000 tokens a minute, equally spaced, and no wait allowed: the load is what is needed."""
    arrivals = np.arange(600.0)
    s = scenario(root, monkeypatch, equal_requests(600, 1_000, arrivals), FAST).with_(arrivals="trace")
    load = 60.0 * float(s.charges().sum()) / 599.0
    assert load_tpm(s) == pytest.approx(load)
    found = steady_capacity(s, 0.5, replications=1, retune=False, pool=Pool(1, foreseen=1e7))
    assert found.smallest is not None
    # The full bucket would carry a smaller limit through these ten minutes: it is no answer all the same.
    assert load <= found.smallest.tpm <= 1.03 * load
    assert found.to_json_dict()["finish_by_s"] is None


def test_waits_are_those_of_a_queue_behind_a_rate(root: Path, monkeypatch) -> None:
    """Two arrivals a second through 60 requests per minute: the burst passes, then request k waits k - 60 - k / 2 s."""
    arrivals = np.arange(400) / 2.0
    s = scenario(root, monkeypatch, equal_requests(400, 100, arrivals), FAST.with_(rpm_limit=60), rpm=60)
    s = s.with_(arrivals="trace")
    figures, waits = waits_of(module.case_of(s), s.seed, "simpy")
    k = np.arange(400.0)
    expected = np.maximum(0.0, (k + 1.0 - 60.0) - arrivals)
    assert figures["failed"] == 0
    assert np.abs(waits - expected).max() < 0.1


def test_mser_cuts_a_ramp_and_leaves_noise_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ramp = np.concatenate([np.linspace(50.0, 0.0, 100), np.zeros(900)]) + rng.normal(0.0, 0.5, 1_000)
    assert 80 <= truncation(ramp) <= 200
    # By hand: of every cut up to the half, the one with the least variance of the mean.
    means = ramp.reshape(200, 5).mean(axis=1)
    criterion = [means[cut:].var() / (200 - cut) for cut in range(101)]
    assert truncation(ramp) == 5 * int(np.argmin(criterion))
    assert truncation(np.zeros(1_000)) == 0
    assert truncation(np.ones(7)) == 0


def test_too_few_arrivals_say_nothing(root: Path, monkeypatch) -> None:
    s = scenario(root, monkeypatch, equal_requests(20, 100, np.arange(20.0))).with_(arrivals="trace")
    with pytest.raises(BadInput, match="at least 100 arrivals, this one has 20"):
        steady_capacity(s, 1.0, pool=Pool(1))


# ---------------------------------------------------------------- the picture


def test_the_picture_shows_the_answer(root: Path, monkeypatch) -> None:
    s = scenario(root, monkeypatch, equal_requests(50, 1_000))
    found = capacity(s, 60.0, replications=2, retune=False, grid=True, pool=Pool(1))
    assert found.smallest is not None
    whole = [p.tpm for p in found.probes if p.runs == found.replications]
    assert min(whole) < found.smallest.tpm < max(whole)
    figure = capacity_figure(found)
    (ax,) = figure.axes
    told = [line for line in ax.lines if line.get_label().startswith("smallest")]
    assert told[0].get_xdata()[0] == found.smallest.tpm
    assert png_of(figure).startswith(b"\x89PNG")

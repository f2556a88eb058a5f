"""From logs to scenarios: what was put into a simulation comes out of its log, live runs and spans are read alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_calibrate import DATA, drawn, halves, misses, round_trips, write_log
from governor.model.errors import BadInput
from sim.app.calibrate_command import text_of
from sim.app.cli import main
from sim.app.inputs import _stated
from sim.calibration import fits
from sim.calibration.calibrate import LEARNT, calibrate, outlook, read_sources
from sim.calibration.logs import of_log
from sim.calibration.observed import Observed
from sim.model.draws import first_latencies_s
from sim.model.synthetic import from_tokens, parametric, redrawn
from sim.scenario.columns import ANSWERED, REFUSED
from sim.scenario.readers import Source
from sim.scenario.scenario import Scenario
from sim.scenario.unknowns import Unknowns
from sim.scenario.unknowns import drawn as conditions_drawn
from tests import live

# ---------------------------------------------------------------- the round trip


def test_known_scenarios_are_recovered(tmp_path: Path) -> None:
    told, missed = round_trips(5, tmp_path, requests=400, first_seed=101)
    assert len(missed) <= _at_most(told), missed
    assert told > 5 * 12, "most figures can be told"


def _at_most(told: int) -> float:
    """How many of so many intervals of 95 % may miss, at four standard errors."""
    return told * (1.0 - fits.EACH) + 4.0 * (told * fits.EACH * (1.0 - fits.EACH)) ** 0.5


@pytest.mark.long
def test_fifty_known_scenarios_are_recovered(tmp_path: Path) -> None:
    told, missed = round_trips(50, tmp_path)
    assert len(missed) <= _at_most(told), missed


@pytest.mark.parametrize("name", ["code", "conv"])
def test_second_half_of_a_real_trace_is_in_the_forecast_of_the_first(name: str) -> None:
    if not DATA.is_dir():
        pytest.skip("the public traces are not beside this repository")
    for figure, (low, high, outcome) in halves(name, 2_000_000, draws=10).items():
        assert low <= outcome <= high, figure
        # An interval that covers anything would show nothing.
        assert high < 5.0 * low, figure


def test_a_wrong_scenario_is_not_recovered(tmp_path: Path) -> None:
    known = drawn(101, 400)
    found = calibrate(read_sources([str(write_log(known.scenario, tmp_path / "log.csv"))], {}))
    wrong = {**known.truth, "first token": 2.0 * known.truth["first token"]}
    (one,) = set(misses(found, wrong)) - set(misses(found, known.truth))
    assert one.startswith("first token")


@pytest.mark.parametrize(
    ("window", "phase_s"), [("bucket", 0.0), ("clock", 37.0), ("clock", 3.0), ("anchored", 0.0), ("sliding", 0.0)]
)
def test_counts_in_headers_tell_the_window_and_what_others_take(window: str, phase_s: float, tmp_path: Path) -> None:
    """Nothing of a counter drains between two counts: it is no bucket of which others take what it refills."""
    for number in (203, 205, 206):
        known = drawn(number, 200)
        provider = known.scenario.provider.with_(
            window=window, phase_s=phase_s, cotenant={"share": 0.0, "burst_s": 0.0, "period_s": 0.0}
        )
        log = write_log(known.scenario.with_(provider=provider), tmp_path / f"{number}.csv")
        found = calibrate(read_sources([str(log)], {}))
        assert found["window"].value in (None, window), (number, found["window"].how)
        assert not found.unknowns.windows
        assert (found["window"].used == "bucket") == (window == "bucket"), number
        assert found["share of others"].value in (None, 0.0), (number, found["share of others"].how)
        phase = found["phase"]
        if phase.low is not None and phase.high is not None:
            assert (phase_s - phase.low) % 60.0 <= phase.high - phase.low + 0.5, number


# ---------------------------------------------------------------- fits


def test_intervals_hold_as_often_as_they_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = {"first_token_s": 0.5, "per_token_s": 0.02, "sigma": 0.2}
    trials, inside, stalled = 200, dict.fromkeys(truth, 0), 0
    for _ in range(trials):
        x = rng.lognormal(5.0, 0.8, 150)
        fit = fits.latency(x, (0.5 + 0.02 * x) * rng.lognormal(0.0, 0.2, 150), np.full(150, -1.0))
        assert fit is not None
        stalled += fit.stall_ratio.value > 0.0
        for name, true in truth.items():
            inside[name] += getattr(fit, name).low <= true <= getattr(fit, name).high
    # Noise alone passes for a stall in about 1 of 1,000 such logs (2 of 2,000 measured): more than 3 of 200 is a fault.
    assert stalled <= 3
    # Four standard errors about what is stated, on either side: too wide is wrong as well.
    for name, hits in inside.items():
        assert abs(hits / trials - fits.EACH) <= 4.0 * (fits.EACH * (1.0 - fits.EACH) / trials) ** 0.5 + 0.01, name


@pytest.mark.parametrize("n", [20, 71, 72, 500])
def test_percentiles_are_bounded_by_as_many_rows_as_it_takes(n: int, seed: int) -> None:
    """0.95^72 < 2.5 %: from 72 rows on the largest bounds P95 from above; below that nothing does."""
    rng = np.random.default_rng(seed)
    hits, trials = 0, 1_000
    for _ in range(trials):
        found = fits.quantile("x", rng.random(n), 0.95, "", "rows")
        assert (found.high is None) == (n < 72)
        assert found.how.endswith("not bounded by 20 rows") == (n == 20) or n == 71
        hits += (found.low or 0.0) <= 0.95 <= (1.0 if found.high is None else found.high)
    assert hits / trials >= 0.95 - 4.0 * (0.05 * 0.95 / trials) ** 0.5


@pytest.mark.parametrize("n", [100, 3_000])
def test_noise_is_log_normal_unless_another_shape_predicts_better(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.lognormal(5.0, 0.8, n)
    assert fits.noise(x, rng.normal(0.0, 0.2, n)).name == fits.LOG_NORMAL
    two = np.where(rng.random(n) < 0.5, -0.6, 0.6) + rng.normal(0.0, 0.05, n)
    found = fits.noise(x, two)
    assert found.name in (fits.MEASURED, fits.BY_LENGTH)
    assert found.scores[fits.MEASURED] > found.scores[fits.LOG_NORMAL]
    # What is drawn from the shape is spread as the residuals are.
    score = rng.standard_normal(20_000)
    drawn_ = np.interp(score, fits.SCORES, found.groups[0][1])
    assert np.quantile(drawn_, [0.05, 0.25, 0.75, 0.95]) == pytest.approx([-0.66, -0.6, 0.6, 0.66], abs=0.06)


def test_noise_that_differs_by_answer_length_is_kept_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.lognormal(5.0, 0.8, 2_000)
    long = x > np.median(x)
    found = fits.noise(x, rng.normal(0.0, np.where(long, 0.4, 0.05)))
    assert found.name == fits.BY_LENGTH
    assert found.groups[0][0] == 0.0
    spreads = [float(np.ptp(np.interp([-1.0, 1.0], fits.SCORES, shape))) / 2.0 for _, shape in found.groups]
    assert spreads == pytest.approx([0.05, 0.05, 0.4, 0.4], rel=0.2)


def test_stalls_are_told_from_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.lognormal(4.5, 0.8, 2_000)
    stalled = rng.random(2_000) < 0.03
    y = (0.5 + 0.01 * x) * rng.lognormal(0.0, 0.25, 2_000) + stalled * rng.uniform(10.0, 60.0, 2_000)
    fit = fits.latency(x, y, np.full(2_000, -1.0))
    assert fit is not None
    assert ((fit.stall > 0.5) != stalled).mean() < 0.002
    # Any seed must pass: more than twice the half-width of a 95 % interval is above four standard errors.
    assert abs(0.25 - fit.sigma.value) <= 2.2 * (fit.sigma.high - fit.sigma.low) / 2.0
    assert 8.0 <= fit.stall_min_s <= 13.0
    assert 55.0 <= fit.stall_max_s <= 65.0


def test_runs_of_a_calibrated_log_differ_whatever_the_shape_of_its_times(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    took = np.where(rng.random(300) < 0.5, 1.0, 4.0) * rng.lognormal(0.0, 0.02, 300)
    rows = "".join(
        f"100,{o},{1000 + 5 * i},{t}\n" for i, (o, t) in enumerate(zip(rng.integers(5, 60, 300), took, strict=True))
    )
    path = tmp_path / "log.csv"
    path.write_text("prompt_tokens,output_tokens,launched_s,latency_s\n" + rows)
    found = calibrate(read_sources([str(path)], {}))
    assert not found["server errors"].known, "a log without outcomes"
    assert found.latency is not None
    assert found.latency.noise.name != fits.LOG_NORMAL
    written = found.write(tmp_path / "scenario.yaml")
    again = Scenario.read(tmp_path / "scenario.yaml")
    assert again.provider == written.provider
    low, high = outlook(again).makespan_s[1:]
    assert low < high
    # Drawn answers take about 1 s or about 4 s, as the log's do.
    c = again.columns()
    assert (c.recorded_s < 0.0).all()
    times = np.array(
        first_latencies_s(again.provider_params(), 1, np.arange(len(c)), c.output_tokens.astype(float), c.recorded_s)
    )
    assert ((times > 2.0) & (times < 3.3)).mean() < 0.15
    assert 0.4 < (times > 2.6).mean() < 0.6


def test_what_a_log_has_narrowed_is_drawn_from_narrower_ranges(tmp_path: Path) -> None:
    known = drawn(101, 400)
    found = calibrate(read_sources([str(write_log(known.scenario, tmp_path / "log.csv"))], {}))
    usual = Unknowns()
    for name in ("latency_factor", "output_factor"):
        (low, high), (least, most) = getattr(found.unknowns, name), getattr(usual, name)
        assert least < low < 1.0 < high < most
    assert not found.unknowns.charge_rules
    assert found.unknowns.settles == float(found["settles"].value)
    found.write(tmp_path / "scenario.yaml")
    _, plan_options = _stated(Source.open(tmp_path / "scenario.yaml"))
    assert plan_options.unknowns == found.unknowns
    low, high = found.unknowns.latency_factor
    assert f"latency x {low:g} to {high:g} (in place of 0.7 to 2.5)" in text_of(found, None)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_the_share_of_others_is_drawn_from_its_interval(share: float, seed: int) -> None:
    """A learnt share is the middle of its range, not its floor."""
    base = Scenario.of("examples/batch.jsonl").with_(seed=seed % 1_000)
    others = base.provider.with_(cotenant={"share": share, "burst_s": 0.0, "period_s": 0.0})
    learnt = base.with_(provider=others.with_(learnt=("other users of the quota",), learnt_from="log.csv"))
    unknowns = Unknowns(cotenant_share=(0.1, 0.3))
    shares = [each.scenario.provider.cotenant.share for each in conditions_drawn(learnt, unknowns, range(100))]
    assert np.mean(shares) == pytest.approx(0.2, abs=4.0 * 0.2 / 12**0.5 / 10.0)


def test_factors_cover_another_stretch_of_the_same_kind(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inside, trials = 0, 1_000
    for _ in range(trials):
        first, second = rng.lognormal(0.0, 0.7, (2, 300))
        low, high = fits.factor(first)
        inside += low <= second.mean() / first.mean() <= high
    assert inside / trials == pytest.approx(0.95, abs=0.03)


def test_families_name_the_one_that_was_drawn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn_ = {"log-normal": rng.lognormal(5.0, 1.0, 3_000), "gamma": rng.gamma(3.0, 100.0, 3_000)}
    for name, values in drawn_.items():
        assert fits.families(values)[0].name == name


def test_bursts_are_kept_whole_when_rows_are_drawn_again() -> None:
    # Ten requests at once, every hundred seconds.
    at_s = np.repeat(np.arange(50) * 100.0, 10)
    workload = from_tokens(np.arange(500) + 1, np.ones(500, np.int64), arrival_s=at_s)
    again = redrawn(workload, 300, 100.0, seed=4)
    assert len(again) == 300
    assert (np.diff(again.arrival_s) >= 0.0).all()
    gaps = np.diff(again.arrival_s)
    assert (gaps == 0.0).mean() == pytest.approx(0.9, abs=0.05)
    assert 300 / 10 * 100.0 * 0.7 < again.arrival_s[-1] < 300 / 10 * 100.0 * 1.4
    other = redrawn(workload, 300, 100.0, seed=5)
    assert (again.prompt_tokens != other.prompt_tokens).any()
    still = redrawn(parametric(64, prompt_tokens=(100, 200), output_tokens=(10, 20)), 200, 60.0)
    assert len(still) == 200
    assert not still.has_arrivals


# ---------------------------------------------------------------- sources


def test_journal_of_a_live_run_teaches_the_providers_rule(tmp_path: Path) -> None:
    live.batch(tmp_path / "requests.jsonl", 60, cap=60)
    habits = {
        "tpm": 30_000,
        "charge_rule": "prompt_plus_max",
        "latency": {"first_token_s": 0.05, "per_token_s": 0.0},
    }
    env = {"OPENAI_TPM_LIMIT": "60000", "OPENAI_CHARGE_RULE": "prompt_plus_max", "OPENAI_MAX_CONCURRENCY": "4"}
    with live.provider(**habits) as served:
        ran = live.shared_cli().run(
            *live.run_args(tmp_path, served.base_url, "--yes"), env={**env, "OPENAI_TPM_LIMIT": "3000000"}
        )
        assert ran.code in (0, 1), ran.err
    observed = read_sources([str(tmp_path / "results.journal.db")], {})
    found = calibrate(observed)
    assert len(found.scenario.workload) == 60
    assert found["charge rule"].value == "prompt_plus_max", found["charge rule"].how
    assert found["settles"].value is False, found["settles"].how
    assert found["tokens per minute"].value == 30_000
    assert found.scenario.policy.tpm_limit == 3_000_000, "the run's own settings"
    path = tmp_path / "scenario.yaml"
    found.write(path)
    assert len(Scenario.read(path).workload) == 60


def test_pools_of_a_run_have_a_quota_each(tmp_path: Path) -> None:
    """A journal of several pools is learnt from pool by pool: requests of one group roam, quotas do not."""
    live.batch(tmp_path / "requests.jsonl", 24)
    latency = {"first_token_s": 0.05, "per_token_s": 0.0}
    with live.provider(tpm=600_000, latency=latency) as small, live.provider(tpm=900_000, latency=latency) as large:
        pools = [
            f"  - {{name: {name}, group: chat, models: ['gpt*'], base_url: '{served.base_url}', key: KEY}}"
            for name, served in (("small", small), ("large", large))
        ]
        (tmp_path / "pools.yaml").write_text("\n".join(["pools:", *pools]))
        env = {"KEY": "k", "OPENAI_TPM_LIMIT": "600000", "OPENAI_STAGGER_SECONDS": "0.01"}
        args = ["run", tmp_path / "requests.jsonl", "--out", tmp_path / "results.jsonl", "--yes", "--quiet"]
        ran = live.shared_cli().run(*args, "--pools", tmp_path / "pools.yaml", env=env)
        assert ran.code == 0, ran.err
    path = str(tmp_path / "results.journal.db")
    with pytest.raises(BadInput, match="2 pools, each with a quota of its own: large, small: name one with --pool"):
        read_sources([path], {})
    with pytest.raises(BadInput, match="--pool other: the journal has large, small"):
        read_sources([path], {}, "other")
    learnt = {name: calibrate(read_sources([path], {}, name)) for name in ("small", "large")}
    assert {name: found["tokens per minute"].value for name, found in learnt.items()} == {
        "small": 600_000,
        "large": 900_000,
    }
    assert sum(len(found.scenario.workload) for found in learnt.values()) == 24


def otlp(**changes: object) -> dict[str, object]:
    given = {"input": 120, "output": 30, "start": 1_700_000_000_000_000_000, "took_s": 1.5, "id": "a1", **changes}
    attributes = [
        {"key": "gen_ai.request.model", "value": {"stringValue": "gpt-4o"}},
        {"key": "gen_ai.usage.input_tokens", "value": {"intValue": str(given["input"])}},
        {"key": "gen_ai.usage.output_tokens", "value": {"intValue": str(given["output"])}},
    ]
    end = int(given["start"]) + int(float(given["took_s"]) * 1e9)  # type: ignore[call-overload, arg-type]
    return {
        "spanId": given["id"],
        "startTimeUnixNano": str(given["start"]),
        "endTimeUnixNano": str(end),
        "attributes": attributes,
    }


def test_spans_of_both_kinds_are_read(tmp_path: Path) -> None:
    other = {"spanId": "zz", "startTimeUnixNano": "1", "endTimeUnixNano": "2", "attributes": []}
    spans = [otlp(), otlp(id="a2", start=1_700_000_004_000_000_000, output=60), other]
    path = tmp_path / "otlp.json"
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}))
    found = of_log(Source.open(path), {})
    assert found.tries.prompt_tokens.tolist() == [120, 120]
    assert found.tries.output_tokens.tolist() == [30, 60]
    assert found.launched_s.tolist() == pytest.approx([0.0, 4.0])
    assert found.took_s.tolist() == pytest.approx([1.5, 1.5])
    assert "1 spans" in found.notes[0]
    call = {
        "id": "c1",
        "call_type": "acompletion",
        "status": "success",
        "startTime": 1_700_000_000.0,
        "endTime": 1_700_000_002.0,
        "completionStartTime": 1_700_000_000.5,
        "stream": True,
        "prompt_tokens": 50,
        "completion_tokens": 20,
        "model": "gpt-4o",
        "model_parameters": {"max_tokens": 99},
        "hidden_params": {
            "additional_headers": {"x_ratelimit_limit_tokens": 30_000, "x_ratelimit_remaining_tokens": 29_000}
        },
    }
    failed = {**call, "id": "c2", "status": "failure", "error_information": {"error_code": "429"}}
    path = tmp_path / "litellm.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (call, failed)))
    found = of_log(Source.open(path), {})
    assert found.answered.tolist() == [True, False]
    assert found.first_s[0] == pytest.approx(0.5)
    assert found.stated[0].tolist() == [30_000.0, 29_000.0, -1.0, -1.0]
    assert found.tries.max_tokens[0] == 99


def test_spans_as_their_tools_write_them(tmp_path: Path) -> None:
    """An agent's span sums up its calls; LiteLLM writes dates, answers of its cache, and errors as text in metadata."""

    def read(document: object) -> Observed:
        path = tmp_path / "export.json"
        path.write_text(json.dumps(document))
        return of_log(Source.open(path), {})

    def attribute(key: str, value: str) -> dict[str, object]:
        return {"key": key, "value": {"stringValue": value}}

    agent = otlp(id="b1")
    agent["attributes"] = [*agent["attributes"], attribute("gen_ai.operation.name", "invoke_agent")]
    silent = otlp(id="b2", start=1_700_000_009_000_000_000)
    silent["attributes"] = [each for each in silent["attributes"] if "usage" not in each["key"]]
    found = read({"batches": [{"scopeSpans": [{"spans": [otlp(), agent, silent]}]}]})
    assert (len(found), found.answered.tolist()) == (2, [True, False])
    assert [note.split(": ")[1][:7] for note in found.notes] == ["1 spans", "1 calls"]

    row = {
        "request_id": "r1",
        "call_type": "acompletion",
        "status": "success",
        "cache_hit": "False",
        "startTime": "2025-01-24 09:20:46.000000",
        "completionStartTime": "2025-01-24 09:20:46.400000",
        "endTime": "2025-01-24 09:20:48.000000",
        "prompt_tokens": 50,
        "completion_tokens": 20,
        "metadata": "{}",
    }
    refused = {**row, "request_id": "r2", "status": "failure", "prompt_tokens": 0, "completion_tokens": 0}
    refused["metadata"] = json.dumps({"error_information": {"error_code": "429"}})
    found = read({"data": [row, refused, {**row, "request_id": "r3", "cache_hit": "True"}]})
    assert found.kind.tolist() == [ANSWERED, REFUSED]
    assert found.first_s[0] == pytest.approx(0.4)
    assert found.tries.prompt_tokens.tolist() == [50, 50]
    assert "1 calls were answered from a cache" in found.notes[0]


def bucket_log(path: Path, *, headers: bool, limit: int = 22_000) -> None:
    """Requests through a bucket that is written out here, at one moment each, in a log with or without headers."""
    rng = np.random.default_rng(5)
    lines = ["timestamp,prompt_tokens,output_tokens,latency_s,status,limit_tokens,remaining_tokens"]
    at_s = used = 0.0
    for _ in range(300):
        wait_s = rng.exponential(2.0)
        at_s, used = at_s + wait_s, max(0.0, used - wait_s * limit / 60.0)
        prompt = int(rng.lognormal(6.7, 0.6))
        let_in = used + prompt <= limit
        used += prompt * let_in
        end = f"50,{2 * np.exp(0.2 * rng.normal()):.3f},200" if let_in else ",0.05,429"
        lines.append(f"{1_700_000_000 + at_s:.3f},{prompt},{end},{f'{limit},{limit - used:.0f}' if headers else ','}")
    path.write_text("\n".join(lines) + "\n")


def test_a_log_of_one_moment_per_attempt_tells_of_the_quota(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    bucket_log(path, headers=True)
    found = calibrate(read_sources([str(path)], {}))
    assert found["tokens per minute"].value == 22_000
    assert found["charge rule"].known
    assert "only moments" in found.notes[0]
    bucket_log(path, headers=False)
    limit = calibrate(read_sources([str(path)], {}))["tokens per minute"]
    assert limit.value == pytest.approx(22_000, rel=0.05)
    # Where hardly more attempts come out otherwise is no interval, and is not printed as one.
    assert limit.low is limit.high is None
    low, high = (float(text.replace(",", "")) for text in limit.how.rpartition(" at ")[2].split(" to "))
    assert low < 22_000 < high < 1.2 * low


def test_batch_output_teaches_lengths_and_says_what_it_cannot(tmp_path: Path) -> None:
    def line(i: int) -> str:
        body = {"usage": {"prompt_tokens": 100 + i, "completion_tokens": 10 + i}}
        return json.dumps({"custom_id": f"r{i}", "response": {"status_code": 200, "body": body}, "error": None}) + "\n"

    path = tmp_path / "output.jsonl"
    path.write_text("".join(line(i) for i in range(40)))
    found = calibrate(read_sources([str(path)], {}))
    assert sorted(found.scenario.workload.prompt_tokens.tolist()) == list(range(100, 140))
    assert not found["first token"].known
    assert not found["charge rule"].known
    text = text_of(found, None)
    assert "cannot be told" in text
    assert "fewer than 20 answers have a time" in text
    assert found.unknowns.windows
    assert "learnt nothing about the window" in text


def test_command_writes_a_scenario_that_simulate_takes(tmp_path: Path, capsys) -> None:
    known = drawn(102, 200)
    log, out = write_log(known.scenario, tmp_path / "log.csv"), tmp_path / "scenario.yaml"
    assert main(["calibrate", str(log), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {figure["name"] for figure in found["figures"]}
    assert set(known.truth) - {"output tokens P95"} <= names
    assert found["outlook"]["makespan_s"]["low"] <= found["outlook"]["makespan_s"]["high"]
    assert (tmp_path / "scenario.png").stat().st_size > 20_000
    assert main(["simulate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 200


def test_plan_of_a_calibrated_scenario_says_what_was_learnt(tmp_path: Path, capsys) -> None:
    known = drawn(102, 60)
    log, out = write_log(known.scenario, tmp_path / "log.csv"), tmp_path / "scenario.yaml"
    assert main(["calibrate", str(log), "--out", str(out), "--json"]) == 0
    figures = {figure["name"]: figure for figure in json.loads(capsys.readouterr().out)["figures"]}
    words = ["plan", str(out), "--effort", "quick", "--workers", "1", "--out", str(tmp_path / "plan"), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["now"]["requests"] == 60
    for name, figure in LEARNT.items():
        learnt = figures[figure]["value"] is not None
        assert told["inputs"][name]["text"].startswith("learnt from log.csv: ") == learnt, name
        assert (told["inputs"][name]["label"] == "measured") or not learnt
    latency = told["inputs"]["latency"]
    assert latency["label"] == "measured"
    assert "assumed" not in latency["text"]
    # What the command line says instead is not learnt.
    assert main(["plan", str(out), "--tpm", "99k", *words[2:]]) == 0
    given = json.loads(capsys.readouterr().out)["inputs"]["limits"]
    assert given == {"label": "assumed", "text": given["text"]}
    assert given["text"].startswith("as given: 99,000 tokens")


def test_drawn_workload_survives_the_scenarios_file(tmp_path: Path) -> None:
    known = drawn(102, 200)
    found = calibrate(read_sources([str(write_log(known.scenario, tmp_path / "log.csv"))], {}))
    path = tmp_path / "scenario.yaml"
    found.write(path)
    text = path.read_text().replace("workload:\n", "workload:\n  draw: 321\n  block_s: 30.0\n  seed: 7\n", 1)
    path.write_text(text)
    drawn_again = Scenario.read(path)
    assert len(drawn_again.workload) == 321
    assert drawn_again.to_yaml(tmp_path).count("draw: 321") == 1

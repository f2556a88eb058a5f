"""What the options mean together: precedence, limits that follow one another, scenario files, single values."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer

from governor.model.errors import BadInput, BadSetting, Oversized
from sim.app.cli import main
from sim.app.inputs import PlanOptions, read_inputs, scenario_text
from sim.app.options import Options, count, duration_s, finish_by_s, quantiles, share
from sim.scenario.scenario import Scenario


def batch_line(number: int, *, model: str = "gpt-4o", words: int = 100, max_tokens: int = 50) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "word " * words}], "max_tokens": max_tokens}
    line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line) + "\n"


@pytest.fixture
def batch(tmp_path: Path) -> str:
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(batch_line(i) for i in range(5)))
    return str(path)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text("ts,ctx,gen\n" + "".join(f"{i},{100 + i},{10 + i}\n" for i in range(5)))
    return str(path)


def scenario(workload: str, environment: dict[str, str] | None = None, **options: Any) -> Scenario:
    return read_inputs(Options(workload=workload, **options), environment or {}).scenario


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("options", "environment", "provider", "policy"),
    [
        # Nothing said: what the settings believe is taken for true.
        ({}, {}, (30_000, 0), (30_000, 0)),
        ({}, {"OPENAI_TPM_LIMIT": "90000", "OPENAI_RPM_LIMIT": "60"}, (90_000, 60), (90_000, 60)),
        ({"assignments": ["OPENAI_TPM_LIMIT=50000"]}, {"OPENAI_TPM_LIMIT": "90000"}, (50_000, 0), (50_000, 0)),
        # The settings follow the provider ...
        ({"tpm": 450_000, "rpm": 5_000}, {}, (450_000, 5_000), (450_000, 5_000)),
        ({"provider": "gpt-4o-tier2"}, {}, (450_000, 5_000), (450_000, 5_000)),
        ({"provider": "gpt-4o-tier2", "tpm": 100_000}, {}, (100_000, 5_000), (100_000, 5_000)),
        # ... unless they name others.
        ({"tpm": 450_000}, {"OPENAI_TPM_LIMIT": "90000"}, (450_000, 0), (90_000, 0)),
        ({"tpm": 450_000, "rpm": 9, "assignments": ["OPENAI_RPM_LIMIT=7"]}, {}, (450_000, 9), (450_000, 7)),
        ({"provider": "gpt-4o-tier2"}, {"OPENAI_TPM_LIMIT": "90000"}, (450_000, 5_000), (90_000, 5_000)),
        # The largest that it may be stands for none, unless the settings name another.
        ({"tpm": 0}, {}, (0, 0), (10**12, 0)),
        ({"tpm": 0}, {"OPENAI_TPM_LIMIT": "90000"}, (0, 0), (90_000, 0)),
    ],
)
def test_limits_follow(batch: str, options: Any, environment: Any, provider: Any, policy: Any) -> None:
    s = scenario(batch, environment, **options)
    assert (s.provider.tpm, s.provider.rpm) == provider
    assert (s.policy.tpm_limit, s.policy.rpm_limit) == policy


def test_a_limit_that_nobody_stated_is_labelled_assumed(batch: str) -> None:
    assert scenario(batch).provenance()["limits"][0] == "assumed"
    assert scenario(batch, provider="gpt-4o-tier2").provenance()["limits"][0] == "measured"


def test_limits_that_disagree_are_noted(batch: str) -> None:
    notes = read_inputs(Options(workload=batch, tpm=450_000), {"OPENAI_TPM_LIMIT": "90000"}).notes
    assert any("OPENAI_TPM_LIMIT=90,000" in note and "450,000" in note for note in notes)
    notes = read_inputs(Options(workload=batch, tpm=50_000), {"OPENAI_TPM_LIMIT": "90000"}).notes
    assert any("more than the 50,000 tokens" in note for note in notes)
    assert read_inputs(Options(workload=batch, tpm=50_000), {}).notes == ()


# ---------------------------------------------------------------- provider


def test_latency_is_that_of_the_model_that_the_requests_name(tmp_path: Path) -> None:
    def latency(*models: str, **options: Any) -> tuple[str, float]:
        path = tmp_path / "b.jsonl"
        path.write_text("".join(batch_line(i, model=model) for i, model in enumerate(models)))
        found = scenario(str(path), **options).provider.latency
        return found.preset, found.per_token_s

    assert latency("gpt-4o-mini", "gpt-4o-mini") == ("gpt-4o-mini", 0.0136)
    assert latency("gpt-4.1-2025-04-14") == ("gpt-4.1", 0.023)
    # Several models, or one that was never measured: the default.
    assert latency("gpt-4o-mini", "gpt-4.1")[0] == "gpt-4o"
    assert latency("my-own")[0] == "gpt-4o"
    assert latency("gpt-4o-mini", latency="gpt-4") == ("gpt-4", 0.043)
    assert latency("gpt-4o-mini", provider="gpt-4o-tier2")[0] == "gpt-4o"
    assert latency("gpt-4o-mini", latency="0.6,0.008") == ("", 0.008)
    with pytest.raises(BadSetting, match="neither a measured model nor seconds"):
        latency("gpt-4o", latency="0.6,fast")
    with pytest.raises(BadSetting, match="did you mean gpt-4o-mini"):
        latency("gpt-4o", latency="gpt4o-mini")


def test_a_provider_file(batch: str, tmp_path: Path) -> None:
    path = tmp_path / "azure.yaml"
    path.write_text("tpm: 60000\nminute_reset: true\n")
    s = scenario(batch, provider=str(path), provider_charge="max_of", provider_settles=True)
    assert (s.provider.tpm, s.provider.window, s.policy.tpm_limit) == (60_000, "clock", 60_000)
    assert (s.provider.charge_rule, s.provider.settles) == ("max_of", True)
    # A scenario's provider part serves as well.
    path.write_text("provider:\n  preset: gpt-4o-tier2\n")
    assert scenario(batch, provider=str(path)).provider.tpm == 450_000
    path.write_text("tmp: 60000\n")
    with pytest.raises(BadInput, match=r"azure\.yaml: provider\.tmp is not known: did you mean tpm"):
        scenario(batch, provider=str(path))
    with pytest.raises(BadSetting, match="did you mean gpt-4o-tier2"):
        scenario(batch, provider="gpt-4o-tier-2")
    with pytest.raises(BadInput, match="there is no such file"):
        scenario(batch, provider=str(tmp_path / "none.yaml"))


# ---------------------------------------------------------------- workload


def test_row_options(trace: str, batch: str) -> None:
    s = scenario(trace, columns=["prompt=ctx,output=gen", "arrival=ts:s"], arrivals="trace", first=3, max_tokens=12)
    assert s.workload.prompt_tokens.tolist() == [100, 101, 102]
    assert s.workload.output_tokens.tolist() == [10, 11, 12]
    assert s.columns().cap.tolist() == [12, 12, 12]
    assert s.columns().arrival_s.tolist() == [0.0, 1.0, 2.0]
    drawn = scenario(batch, output_tokens="100,100")
    assert set(drawn.workload.output_tokens.tolist()) == {100}
    with pytest.raises(BadInput, match="no arrival times"):
        scenario(batch, arrivals="trace")
    with pytest.raises(BadSetting, match="did you mean prompt"):
        scenario(trace, columns=["promt=ctx"])


def test_oversized_requests_are_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(batch_line(0) + batch_line(1, words=40_000) + batch_line(2))
    # As measured for chat: 0.2504 per character, 1 per message, 1.7 per request.
    assert round(0.2504 * len("word " * 40_000) + 1.0 + 1.7) == 50_083
    with pytest.raises(Oversized, match=r"request 1 \('r1'\) needs 50,083 tokens, the limit is 30,000"):
        scenario(str(path))
    inputs = read_inputs(Options(workload=str(path), skip_oversized=True), {})
    assert inputs.scenario.workload.custom_ids == ["r0", "r2"]
    assert inputs.notes == ("1 of 3 requests left out: charged more than 30,000 tokens",)
    # Where the limit is what is asked for, they stay.
    assert len(read_inputs(Options(workload=str(path)), {}, fit=False).scenario.workload) == 3


# ---------------------------------------------------------------- scenario files


def test_a_scenario_file_re_runs_as_written(batch: str, tmp_path: Path) -> None:
    first = scenario(batch, tpm=450_000, seed=7, replications=3, finalize=True, provider_settles=True)
    plan_options = PlanOptions(objective="p95_latency", finish_by_s=3_600.0, effort="quick")
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "scenario.yaml"
    path.write_text(scenario_text(first, plan_options, path.parent))
    # Whatever the environment says here: the file has said it all.
    again = read_inputs(Options(workload=str(path)), {"OPENAI_MAX_CONCURRENCY": "50"})
    assert again.plan_options == plan_options
    for name in ("provider", "policy", "seed", "replications", "arrivals", "finalize", "skip_oversized"):
        assert getattr(again.scenario, name) == getattr(first, name), name
    assert again.scenario.columns().charge.tolist() == first.columns().charge.tolist()
    assert again.scenario.workload.provenance == first.workload.provenance
    assert scenario_text(again.scenario, again.plan_options, path.parent) == path.read_text()


def test_wishes_of_the_default_leave_no_trace(batch: str, tmp_path: Path) -> None:
    text = scenario_text(scenario(batch), PlanOptions(), tmp_path)
    assert "plan:" not in text
    Scenario.from_yaml(text, folder=tmp_path)


def test_options_on_top_of_a_scenario_file(batch: str, tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(scenario_text(scenario(batch, tpm=60_000, seed=7), PlanOptions(), tmp_path))

    def on_top(**options: Any) -> Scenario:
        return scenario(str(path), **options)

    # The policy's limit was the provider's, so it goes along; one that is named stays.
    s = on_top(tpm=90_000, first=2, seed=1, replications=4)
    assert (s.provider.tpm, s.policy.tpm_limit, len(s.workload), s.seed, s.replications) == (90_000, 90_000, 2, 1, 4)
    s = on_top(tpm=90_000, assignments=["OPENAI_TPM_LIMIT=60000"])
    assert (s.provider.tpm, s.policy.tpm_limit) == (90_000, 60_000)
    s = on_top(assignments=["OPENAI_MAX_CONCURRENCY=8"])
    assert (s.policy.max_concurrency, s.policy.tpm_limit) == (8, 60_000)


def test_a_drawn_workload_takes_only_what_it_knows(tmp_path: Path) -> None:
    path = tmp_path / "drawn.yaml"
    path.write_text("workload:\n  requests: 50\n  prompt_tokens: [500, 900]\n  output_tokens: [100, 300]\n")
    assert len(scenario(str(path), first=20).workload) == 20
    assert len(scenario(str(path), first=500).workload) == 50
    with pytest.raises(BadSetting, match="--outputs-from is for files"):
        scenario(str(path), outputs_from="old.jsonl")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("{effort: fast}", "plan.effort='fast'"),
        ("{efort: quick}", "plan.efort is not known: did you mean effort"),
        ("{max_lost: 2}", "plan.max_lost=2: must be at most 1"),
        ("[]", "plan is"),
    ],
)
def test_slips_in_the_plan_section(tmp_path: Path, plan: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    workload = "{requests: 5, prompt_tokens: [9, 9], output_tokens: [9, 9]}"
    path.write_text(f"workload: {workload}\nplan: {plan}\n")
    with pytest.raises(BadInput) as caught:
        read_inputs(Options(workload=str(path)), {})
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


# ---------------------------------------------------------------- single values


@pytest.mark.parametrize(
    ("text", "value"), [("450000", 450_000), ("450_000", 450_000), ("450k", 450_000), ("1.5M", 1_500_000), ("0", 0)]
)
def test_counts(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1e6", "1.5", "3x", "2.0001k", "nan", "10000g", "٣"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="whole number"):
        count(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6h", 21_600),
        ("90m", 5_400),
        ("90min", 5_400),
        ("1h30m", 5_400),
        ("1 h 30 min", 5_400),
        ("45s", 45),
        ("2d", 172_800),
        ("1.5h", 5_400),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "6x", "0h", "6h!", "-6h", "6h30"])
def test_bad_durations(text: str) -> None:
    assert duration_s(text) is None
    with pytest.raises(typer.BadParameter, match="neither a duration"):
        finish_by_s(text)


@pytest.mark.parametrize(("clock", "hours"), [("06:00", 7.5), ("22:29", 23 + 59 / 60), ("23:00", 0.5), ("22:30", 24.0)])
def test_the_next_such_time_of_day(clock: str, hours: float) -> None:
    now = datetime(2026, 6, 10, 22, 30)
    assert finish_by_s(clock, now) == pytest.approx(3_600.0 * hours)


def test_a_night_in_which_the_clocks_change_has_its_own_length(monkeypatch) -> None:
    time = pytest.importorskip("time")
    if not hasattr(time, "tzset"):
        pytest.skip("this system cannot change its time zone")
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        # On the last Sunday of March the clock jumps from 2 to 3: one hour less.
        assert finish_by_s("06:00", datetime(2026, 3, 28, 22, 0)) == timedelta(hours=7).total_seconds()
        assert finish_by_s("06:00", datetime(2026, 3, 27, 22, 0)) == timedelta(hours=8).total_seconds()
    finally:
        monkeypatch.undo()
        time.tzset()


def test_quantiles_and_shares() -> None:
    assert quantiles("250,900") == (250.0, 900.0)
    for text in ("250", "900,250", "0,1", "a,b", "1,2,3"):
        with pytest.raises(BadSetting, match="--output-tokens"):
            quantiles(text)
    assert (share("0.01"), share("1%"), share("0")) == (0.01, 0.01, 0.0)
    for text in ("1.1", "-1%", "x", "nan"):
        with pytest.raises(typer.BadParameter, match="share"):
            share(text)


# ---------------------------------------------------------------- what nobody here can count


def test_files_are_assumed_and_told_of(tmp_path: Path) -> None:
    content = [{"type": "input_file", "file_id": "file-abc"}, {"type": "input_text", "text": "Summarise."}]
    body = {"model": "gpt-4o", "input": [{"role": "user", "content": content}], "max_output_tokens": 300}
    lines = [{"custom_id": f"d{i}", "method": "POST", "url": "/v1/responses", "body": body} for i in range(40)]
    path = tmp_path / "files.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines) + batch_line(40))
    note = "40 requests with files whose tokens are unknown: {:,} are assumed for each (--file-tokens)"
    for tokens in (None, 20_000):
        inputs = read_inputs(Options(workload=str(path), tpm=30_000, file_tokens=tokens), {})
        assert note.format(tokens or 5_000) in inputs.notes
        assert int(inputs.scenario.workload.prompt_tokens[0]) == (tokens or 5_000) + 10
        assert inputs.scenario.charges()[0] > (tokens or 5_000)
        # The scenario's file keeps the figure.
        again = Scenario.from_yaml(inputs.scenario.to_yaml(tmp_path), folder=tmp_path)
        assert again.workload.prompt_tokens.tolist() == inputs.scenario.workload.prompt_tokens.tolist()
    assert read_inputs(Options(workload=str(path), first=0, tpm=10**9), {}).scenario.workload.prompt_tokens[40] < 200


def test_people_write_thousands_everywhere(batch: str, trace: str, capsys) -> None:
    words = ["--tpm", "60k", "--first", "0.004k", "--replications", "1", "--set", "OPENAI_TPM_LIMIT=60k", "--json"]
    assert main(["simulate", batch, *words]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 4
    for cap in ("4k", "-1"):
        assert main(["simulate", trace, "--columns", "prompt=ctx,output=gen", "--max-tokens", cap, "--json"]) == 0
        capsys.readouterr()
    for option, value in (("--first", "ten"), ("--replications", "0"), ("--tpm", "-5"), ("--file-tokens", "1.5")):
        assert main(["simulate", batch, option, value]) == 2
        assert "is not a whole number from" in capsys.readouterr().err
    assert quantiles("0.25k,1k") == (250.0, 1_000.0)

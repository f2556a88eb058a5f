"""Scenarios: written and read back they are the same run; the stress set changes one thing at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from governor.model.errors import BadInput, Oversized, PacelineError
from governor.model.policy import KNOBS, Policy
from governor.model.requests import CHAT
from sim.experiment.experiment import case_of, summary_of
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.model.windows import CLOCK
from sim.model.workload import Columns, columns
from sim.scenario.readers import Source
from sim.scenario.scenario import Scenario, following
from sim.scenario.scenario_file import FileSource, ModelSource
from sim.scenario.stress import stress_notes, stress_set

VIDUR = "vidur-arxiv/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
MODEL = ModelSource(requests=60, prompt_tokens=(900.0, 4_000.0), output_tokens=(150.0, 700.0), seed=3)


def trace(*rows: tuple[int, int], **rest: Any) -> Scenario:
    """A scenario of these prompt and output tokens, without a file."""
    tokens = np.array(rows, np.int64).reshape(-1, 2)
    workload = from_tokens(tokens[:, 0].copy(), tokens[:, 1].copy(), **rest)
    return Scenario(source=MODEL, workload=workload)


def assert_same_run(one: Scenario, other: Scenario) -> None:
    """Everything that an engine is given agrees."""
    for f in fields(Columns):
        np.testing.assert_array_equal(getattr(one.columns(), f.name), getattr(other.columns(), f.name), err_msg=f.name)
    assert one.provider_params() == other.provider_params()
    assert one.policy.params() == other.policy.params()
    assert one.policy.model_dump() == other.policy.model_dump()
    assert one.grant() == other.grant()
    for name in ("seed", "replications", "arrivals", "finalize", "skip_oversized", "provider"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.provenance() == other.provenance()


# ---------------------------------------------------------------- in and out of YAML


def test_a_written_scenario_is_the_same_run(tmp_path: Path, data_file: Callable[[str], Path]) -> None:
    source = FileSource(path=str(data_file(VIDUR)), first=400, output_tokens=(170.0, 700.0), seed=11)
    scenario = Scenario.of(
        source,
        provider=ProviderConfig.of("gpt-4o-mini-tier2").with_(settles=True, retry_after="seconds"),
        policy=Policy.preset("paceline").with_(stagger_seconds=0.1, tpm_headroom=0.012345678901234567),
        seed=5,
        replications=20,
        finalize=True,
    )
    scenario.write(tmp_path / "scenario.yaml")
    assert_same_run(Scenario.read(tmp_path / "scenario.yaml"), scenario)
    assert [path.name for path in tmp_path.iterdir()] == ["scenario.yaml"]


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "a.csv").write_text("ContextTokens,GeneratedTokens\n5,6\n")
    monkeypatch.chdir(tmp_path)
    Scenario.of("in/a.csv").write("out/scenario.yaml")
    assert yaml.safe_load(Path("out/scenario.yaml").read_text())["workload"] == {"path": "../in/a.csv"}
    monkeypatch.chdir(tmp_path / "in")
    assert Scenario.read("../out/scenario.yaml").workload.prompt_tokens.tolist() == [5]


def test_rows_from_standard_input_are_kept_beside_the_file(tmp_path: Path) -> None:
    lines = [
        json.dumps(
            {
                "custom_id": f"q,{i}\n",
                "url": "/v1/responses" if i % 2 else "/v1/chat/completions",
                "body": {
                    "model": f"m{i % 2}",
                    "input" if i % 2 else "messages": [{"role": "user", "content": "wört " * (i + 1)}],
                    "max_output_tokens" if i % 2 else "max_tokens": 50 + i,
                },
            }
        )
        for i in range(30)
    ]
    opened = Source.open("-", io.BytesIO("\n".join(lines).encode()))
    scenario = Scenario.of("-", opened=opened)
    with pytest.raises(BadInput, match="standard input"):
        scenario.to_yaml(tmp_path)
    written = scenario.write(tmp_path / "scenario.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenario.workload.csv", "scenario.yaml"]
    again = Scenario.read(tmp_path / "scenario.yaml")
    assert_same_run(again, scenario)
    assert_same_run(written, scenario)
    assert [again.workload.custom_id(i) for i in range(30)] == [scenario.workload.custom_id(i) for i in range(30)]
    assert [again.workload.model(i) for i in range(30)] == [scenario.workload.model(i) for i in range(30)]
    assert again.workload.endpoint[0] == CHAT


def test_drawn_workloads_re_run_whatever_the_seed_of_the_runs() -> None:
    scenario = Scenario.of(MODEL, seed=1)
    again = Scenario.from_yaml(scenario.with_(seed=99).to_yaml())
    np.testing.assert_array_equal(again.workload.output_tokens, scenario.workload.output_tokens)
    assert again.seed == 99


def test_only_our_settings_are_written() -> None:
    environment = {"OPENAI_API_KEY": "sk-secret", "DATABASE_URL": "postgres://secret", "OPENAI_TPM_LIMIT": "41000"}
    text = Scenario.of(MODEL, policy=Policy.from_env(environment)).to_yaml()
    assert "secret" not in text
    assert set(yaml.safe_load(text)["policy"]) == {knob.env for knob in KNOBS}
    assert yaml.safe_load(text)["policy"]["OPENAI_TPM_LIMIT"] == 41_000


def policies() -> st.SearchStrategy[Policy]:
    return st.builds(
        Policy,
        max_concurrency=st.integers(1, 500),
        stagger_seconds=st.floats(0, 3_600),
        tpm_headroom=st.floats(0, 0.99),
        tpm_window=st.sampled_from(["fixed", "sliding", "bucket"]),
        charge_rule=st.sampled_from(["fixed", "auto", "max_of", "responses"]),
        settle=st.booleans(),
        backoff_base_seconds=st.floats(1e-9, 3_600),
    )


def providers() -> st.SearchStrategy[ProviderConfig]:
    times = st.lists(st.floats(0, 1e9), max_size=8, unique=True).map(sorted)
    changes = times.map(lambda found: tuple({"at_s": at_s, "factor": 0.5} for at_s in found))
    return st.builds(
        ProviderConfig,
        tpm=st.integers(0, 10**12),
        rpm=st.integers(0, 10**9),
        charge_rule=st.sampled_from(["auto", "prompt_plus_max", "max_of"]),
        as_of=st.dates().map(lambda day: day.isoformat()),
        settles=st.booleans(),
        retry_after=st.sampled_from(["absent", "ms", "seconds"]),
        limit_changes=changes,
        cotenant=st.builds(dict, share=st.floats(0, 1)),
        latency=st.sampled_from(["gpt-4o", "gpt-4"]) | st.builds(dict, first_token_s=st.floats(0, 86_400)),
    )


@given(policies(), providers(), st.integers(0, 2**63 - 1), st.booleans())
def test_any_scenario_reads_back_as_it_was_written(
    policy: Policy, provider: ProviderConfig, seed: int, finalize: bool
) -> None:
    source = ModelSource(requests=3, prompt_tokens=(1.5, 4.0), output_tokens=(1.0, 1.0), arrival_rate_per_s=0.1)
    scenario = Scenario.of(source, policy=policy, provider=provider, seed=seed, finalize=finalize, arrivals="trace")
    again = Scenario.from_yaml(scenario.to_yaml())
    assert again.source == source
    assert_same_run(again, scenario)


def test_what_a_plan_was_asked_for_changes_no_run() -> None:
    text = "workload: {requests: 3, prompt_tokens: [10, 20], output_tokens: [5, 9]}\n"
    asked = Scenario.from_yaml(text + "plan: {effort: quick}\n")
    assert asked.to_yaml() == Scenario.from_yaml(text).to_yaml()


def test_a_scenario_by_hand_needs_little() -> None:
    text = """
    workload: {requests: 5, prompt_tokens: [100, 200], output_tokens: [10, 20]}
    provider: {preset: gpt-4o-tier2, as_of: 2024-01-01, cotenant: {share: 0.1}}
    policy: {preset: paceline, OPENAI_TPM_LIMIT: 450000, OPENAI_SETTLE: yes}
    """
    scenario = Scenario.from_yaml(text)
    assert (scenario.provider.tpm, scenario.provider.as_of) == (450_000, "2024-01-01")
    assert (scenario.policy.tpm_window, scenario.policy.tpm_limit, scenario.policy.settle) == ("bucket", 450_000, True)
    blank = Scenario.from_yaml("workload: {requests: 5, prompt_tokens: [100, 200], output_tokens: [10, 20]}")
    assert (blank.provider, blank.policy) == (ProviderConfig.of(), Policy())


GOOD = "workload: {requests: 5, prompt_tokens: [100, 200], output_tokens: [10, 20]}\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- 1\n", ["a list", "workload:"]),
        ("{}\n", ["workload is missing"]),
        (GOOD + "provider: {cotenant: {share: 1.5}}\n", ["s.yaml: provider.cotenant.share=1.5: must be at most 1"]),
        (GOOD + "provider: {cotennant: {share: 0.5}}\n", ["provider.cotennant", "did you mean cotenant?"]),
        (GOOD + "provdier: gpt-4o-tier1\n", ["provdier", "did you mean provider?"]),
        (GOOD + "provider: gpt-4o-tier9\n", ["'gpt-4o-tier9'", "did you mean gpt-4o-tier"]),
        (GOOD + "policy: {OPENAI_TPM_LIMITS: 5}\n", ["OPENAI_TPM_LIMITS", "OPENAI_TPM_LIMIT"]),
        (GOOD + "policy: {OPENAI_TPM_LIMIT: -5}\n", ["OPENAI_TPM_LIMIT", "-5"]),
        (GOOD + "policy: {OPENAI_API_KEY: x}\n", ["OPENAI_API_KEY"]),
        (GOOD + "policy: {OPENAI_TPM_LIMIT: [1]}\n", ["policy.OPENAI_TPM_LIMIT is a list"]),
        (GOOD + "policy: best\n", ["'best'", "guardrails"]),
        (GOOD + "arrivals: steady\n", ["arrivals='steady'", "'batch' or 'trace'"]),
        (GOOD + "seed: -1\n", ["seed=-1", "at least 0"]),
        (GOOD + "finalize: maybe\n", ["finalize", "true or false"]),
        (GOOD + "seed: 1\nseed: 2\n", ["s.yaml:3:", "'seed' stands twice"]),
        (GOOD + "seed: [1\n", ["s.yaml:", "not YAML"]),
        (GOOD + "seed: !!python/object/apply:os.system [ls]\n", ["s.yaml:2:", "not YAML"]),
        (GOOD + "provider: {as_of: 2026-13-45}\n", ["s.yaml:2:", "month"]),
        (GOOD + "provider: {as_of: '2026-13-45'}\n", ["provider.as_of", "month"]),
        (GOOD + "3: 4\n", ["3 is not a key"]),
        (GOOD.replace("[10, 20]", "[20, 10]"), ["workload", "P95 not below P50"]),
        (GOOD.replace("requests", "request"), ["workload.requests is missing"]),
        ("workload: {path: ''}\n", ["workload.path"]),
        ("workload: {path: none.csv}\n", ["none.csv", "no such file"]),
        ("workload: {path: a.csv, frist: 3}\n", ["workload.frist", "did you mean first?"]),
    ],
)
def test_what_is_wrong_is_named_by_its_key(text: str, parts: list[str]) -> None:
    with pytest.raises(PacelineError) as caught:
        Scenario.from_yaml(text, name="s.yaml")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in str(caught.value)


def test_files_that_are_no_scenarios(tmp_path: Path) -> None:
    rows = tmp_path / "a.csv"
    rows.write_text("ContextTokens,GeneratedTokens\n5,6\n")
    with pytest.raises(BadInput, match="not a scenario"):
        Scenario.read(rows)
    latin = tmp_path / "s.yaml"
    latin.write_bytes(b"# fine\n# caf\xe9\n")
    with pytest.raises(BadInput, match=r"s\.yaml:2: not UTF-8"):
        Scenario.read(latin)


def from_yaml_or_refused(text: str) -> None:
    try:
        scenario = Scenario.from_yaml(text)
    except PacelineError as error:
        refused = error
    else:
        assert len(scenario.workload)
        return
    assert "\n" not in str(refused)


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    from_yaml_or_refused(text)


@given(st.data())
def test_any_damage_to_a_scenario(data: st.DataObject) -> None:
    good = Scenario.of(MODEL).to_yaml()
    at = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(at, min(len(good), at + 20)))
    from_yaml_or_refused(good[:at] + data.draw(st.text(max_size=6)) + good[end:])


# ---------------------------------------------------------------- what a scenario gives


def test_columns_are_those_of_the_policy_and_the_provider() -> None:
    scenario = Scenario.of(MODEL, provider=ProviderConfig.of().with_(charge_rule="auto", as_of="2024-01-01"))
    policy = Policy(charge_rule="max_of", finalize_max_tokens=123)
    expected = columns(
        scenario.workload,
        reserve_rule="max_of",
        est_tokens_per_run=7_000,
        charge_rule="prompt_plus_max",
        finalize_max_tokens=123,
    )
    found = scenario.columns(policy)
    for f in fields(Columns):
        np.testing.assert_array_equal(getattr(found, f.name), getattr(expected, f.name), err_msg=f.name)


def test_recorded_latencies_follow_the_latency_settings() -> None:
    scenario = trace((5, 6), (5, 6), recorded_s=np.array([1.5, -1.0]))
    late = scenario.provider.latency.model_dump()
    for changes, expected in (({}, [1.5, -1]), ({"scale": 2.0}, [3, -1]), ({"recorded": False}, [-1, -1])):
        changed = scenario.with_(provider=scenario.provider.with_(latency={**late, **changes}))
        assert changed.columns().recorded_s.tolist() == expected


def test_every_input_is_measured_or_assumed(data_file: Callable[[str], Path]) -> None:
    scenario = Scenario.of(FileSource(path=str(data_file(VIDUR)), first=10))
    found = scenario.provenance()
    assert {label for label, _ in found.values()} == {"measured", "assumed"}
    for name, label in {
        "requests": "measured",
        "prompt tokens": "measured",
        "output tokens": "measured",
        "output cap": "assumed",
        "arrivals": "assumed",
        "limits": "measured",
        "charge rule": "measured",
        "latency": "measured",
        "settling": "assumed",
        "refused requests": "assumed",
    }.items():
        assert found[name][0] == label, name


def test_a_policy_follows_the_limits_that_it_does_not_name() -> None:
    provider = ProviderConfig.of("gpt-4o-tier2")
    assert (following(Policy(), provider).tpm_limit, following(Policy(), provider).rpm_limit) == (450_000, 5_000)
    named = following(Policy(tpm_limit=30_000), provider)
    assert (named.tpm_limit, named.rpm_limit) == (30_000, 5_000)


def test_a_policy_follows_to_no_limit_and_back() -> None:
    """Else the default of 30,000 tokens per minute would hold back what no provider does."""
    free = ProviderConfig(tpm=0)
    policy = following(Policy(), free)
    scenario = trace(*[(100, 1)] * 120).with_(provider=free, policy=policy, stagger_s=0.0, max_concurrency=120)
    # 7,000 tokens reserved for each: half an hour at 30,000 per minute; no answer takes more than a stall of a minute.
    assert summary_of(case_of(scenario), 1).makespan_s < 65.0
    granted = scenario.with_(tpm=40_000, rpm=60)
    assert (granted.policy.tpm_limit, granted.policy.rpm_limit) == (40_000, 60)
    assert granted.with_(tpm=0, rpm=0).policy == scenario.policy
    assert following(Policy(tpm_limit=30_000), free).tpm_limit == 30_000


def test_requests_above_the_limit_are_named_or_left_out() -> None:
    scenario = trace((100, 1), (40_000, 1), (200, 1), (50_000, 1))
    with pytest.raises(Oversized, match=r"request 1 \('request-2'\) needs 40,067 tokens, the limit is 30,000"):
        scenario.fitted()
    kept = scenario.fitted(skip_oversized=True)
    assert kept.workload.prompt_tokens.tolist() == [100, 200]
    assert kept.skip_oversized
    assert "2 left out" in kept.provenance()["requests"][1]
    with pytest.raises(Oversized):
        trace((40_000, 1)).fitted(skip_oversized=True)
    assert trace((100, 1)).fitted().workload.prompt_tokens.tolist() == [100]


def test_left_out_requests_are_left_out_again_on_reading(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ContextTokens,GeneratedTokens\n5,6\n40000,7\n8,9\n")
    scenario = Scenario.of(str(tmp_path / "a.csv")).fitted(skip_oversized=True)
    scenario.write(tmp_path / "s.yaml")
    assert_same_run(Scenario.read(tmp_path / "s.yaml"), scenario)


# ---------------------------------------------------------------- the stress set


def changed_fields(scenario: Scenario, base: Scenario) -> set[str]:
    """The provider's fields in which two scenarios differ; nothing else of them does."""
    assert scenario.with_(provider=base.provider) == base
    before, after = base.provider.model_dump(), scenario.provider.model_dump()
    return {name for name in before if before[name] != after[name]}


def test_the_stress_set_changes_one_thing_at_a_time(data_file: Callable[[str], Path]) -> None:
    base = Scenario.of(FileSource(path=str(data_file(VIDUR)), first=400))
    found = {name: changed_fields(scenario, base) for name, scenario in stress_set(base)}
    assert found == {
        "charge rule prompt_plus_max": {"charge_rule"},
        "charge rule max_of": {"charge_rule"},
        "charge rule responses": {"charge_rule"},
        "settles": {"settles"},
        "co-tenant takes 25% in bursts": {"cotenant"},
        "per-second slices": {"slice_s", "slice_tokens"},
        "latency x 2": {"latency"},
        "no Retry-After": {"retry_after"},
        "counts of the answer, in thousands": {"counts", "counts_rounded_to"},
        "limit halved from 120 s to 720 s": {"limit_changes"},
    }
    assert stress_notes(base) == []


def test_the_stressed_numbers() -> None:
    base = trace(*[(3_000, 200)] * 400)
    by_name = {name: scenario.provider_params() for name, scenario in stress_set(base)}
    plain = base.provider_params()
    burst = by_name["co-tenant takes 25% in bursts"]
    assert (burst.cotenant_share, 0 < burst.cotenant_burst_s < burst.cotenant_period_s) == (0.25, True)
    slices = by_name["per-second slices"]
    assert slices.slice_s == 1.0
    assert slices.slice_tokens == base.charges().max()
    slow = by_name["latency x 2"]
    assert (slow.first_token_s, slow.per_token_s) == (2 * plain.first_token_s, 2 * plain.per_token_s)
    halved = by_name["limit halved from 120 s to 720 s"]
    assert list(zip(halved.change_at, halved.change_factor, strict=True))[:2] == [(120.0, 0.5), (720.0, 1.0)]


def test_minutes_of_the_clock_are_stressed_where_no_published_tier_is_named() -> None:
    base = trace((100, 10))
    name = "minutes of the clock, begun in the middle of one"
    unknown = base.with_(provider=base.provider.with_(preset="", burst_s=20.0))
    params = dict(stress_set(unknown))[name].provider_params()
    assert (params.window[0], params.phase_s[0], params.burst_ratio[0]) == (CLOCK, 30.0, 1.0)
    tier = base.with_(provider=base.provider.with_(preset="gpt-4o-tier1"))
    sliding = unknown.with_(provider=unknown.provider.with_(burst_s=60.0, window="sliding"))
    assert name not in dict(stress_set(tier))
    assert name not in dict(stress_set(sliding))


def test_settling_is_stressed_in_either_direction() -> None:
    base = trace((100, 10))
    settling = base.with_(provider=base.provider.with_(settles=True, retry_after="absent"))
    names = [name for name, _ in stress_set(settling)]
    assert "does not settle" in names
    assert "no Retry-After" not in names


def test_a_charge_rule_under_which_a_request_could_never_run_is_left_out_and_said() -> None:
    base = trace(*[(3_000, 200)] * 20, max_tokens=28_000)
    notes = dict(stress_notes(base))
    assert "charge rule prompt_plus_max" not in dict(stress_set(base))
    # 3,000 of the prompt, 1 of the role's name, the cap.
    assert "31,001" in notes["charge rule prompt_plus_max"]
    assert "30,000" in notes["charge rule prompt_plus_max"]
    assert "charge rule max_of" in dict(stress_set(base))


def test_a_limit_is_lowered_only_as_far_as_the_largest_request_allows() -> None:
    base = trace(*[(20_000, 200)] * 20)
    largest = base.charges().max()
    name, scenario = next((n, s) for n, s in stress_set(base) if n.startswith("limit"))
    factor = scenario.provider.limit_changes[0].factor
    assert factor == 0.67
    assert largest <= factor * base.provider.tpm
    assert "20,035" in dict(stress_notes(base))[name]
    hopeless = trace(*[(29_900, 200)] * 20)
    assert not [n for n, _ in stress_set(hopeless) if n.startswith("limit")]
    assert "left out" in " ".join(why for n, why in stress_notes(hopeless) if n.startswith("limit"))


def test_the_limit_falls_inside_a_short_run() -> None:
    # 20 requests of 3,008 tokens at 30,000 a minute: the limits let them through in 120 s.
    (name,) = [n for n, _ in stress_set(trace(*[(3_000, 200)] * 20)) if n.startswith("limit")]
    assert name == "limit halved from 30 s to 630 s"


def test_changes_that_a_scenario_has_already_are_kept_under_the_halving() -> None:
    base = trace(*[(3_000, 200)] * 400)
    own = [{"at_s": 60.0, "factor": 0.8}, {"at_s": 300.0, "factor": 1.5}, {"at_s": 900.0, "factor": 1.0}]
    base = base.with_(provider=base.provider.with_(limit_changes=own))
    (halved,) = [s for n, s in stress_set(base) if n.startswith("limit")]
    found = [(change.at_s, change.factor) for change in halved.provider.limit_changes]
    assert found == [(60.0, 0.8), (120.0, 0.4), (300.0, 0.75), (720.0, 1.5), (900.0, 1.0)]


def test_a_rule_that_charges_the_same_is_no_condition() -> None:
    # Embeddings are charged by their characters under every rule but the one for responses.
    tokens = np.array([40, 80])
    scenario = replace(trace((40, 0), (80, 0)), workload=from_tokens(tokens, 0 * tokens, endpoint=np.array([2, 2])))
    assert [n for n, _ in stress_set(scenario) if n.startswith("charge")] == ["charge rule responses"]


def test_every_condition_can_run_to_its_end() -> None:
    base = trace(*[(3_000, 200)] * 30)
    for name, scenario in stress_set(base):
        pp = scenario.provider_params()
        lowest = min([pp.limit[0], *(pp.limit[0] * f for f in pp.change_factor)])
        assert scenario.columns().charge.max() <= lowest, name


@pytest.mark.parametrize(
    ("models", "provider", "label", "why"),
    [
        ("gpt-4o-2024-08-06", {"latency": "gpt-4o"}, "measured", "recordings, checked 20"),
        ("gpt-5.5", {"latency": "gpt-4o"}, "assumed", "for want of a measurement of gpt-5.5"),
        (["gpt-4o", "gpt-4.1"], {"latency": "gpt-4o"}, "assumed", "for want of a measurement of gpt-4.1"),
        ("", {"latency": "gpt-4o", "tpm": 77_000}, "assumed", "the requests do not name a model"),
        ("", {"preset": "gpt-4o-mini-tier2"}, "measured", "gpt-4o-mini: "),
    ],
)
def test_a_latency_is_measured_for_its_own_model_alone(
    models: str | list[str], provider: dict[str, object], label: str, why: str
) -> None:
    drawn = ModelSource(requests=2, prompt_tokens=(700, 2_000), output_tokens=(150, 600), max_tokens=800)
    scenario = Scenario.of(drawn, provider=ProviderConfig.model_validate(provider))
    found = scenario.with_(workload=scenario.workload.with_(models=models)).provenance()["latency"]
    assert found[0] == label
    assert why in found[1]

"""Presets and the provider's configuration: figures as recorded, one-line complaints, numbers for the engines."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, theilslopes

from governor.model.errors import BadSetting, PacelineError
from sim.base.arguments import checked
from sim.model import provider_tiers
from sim.model.provider import COUNTS_AT_ANSWER, REFUSAL_REQUESTS, SAYS_CONSTANT, ProviderParams
from sim.model.provider_config import Latency, LimitChange, ProviderConfig
from sim.model.windows import CLOCK
from tests.sim.doors import quota

OBSERVED = "openai-observed/ratelimit_header_observations.csv"


def recordings(path: Path, model: str) -> list[dict[str, str]]:
    """The recorded OpenAI responses of one model, dated versions included."""
    with open(path, encoding="utf-8", newline="") as file:
        named = re.compile(re.escape(model) + r"(-\d{4}(-\d\d-\d\d)?)?")
        return [row for row in csv.DictReader(file) if row["provider"] == "openai" and named.fullmatch(row["model"])]


def refusal(data: Any) -> str:
    with pytest.raises(BadSetting) as caught:
        checked(ProviderConfig, data, "provider")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("model", provider_tiers.latency_lines())
def test_latency_lines_fit_the_recordings(data_file: Callable[[str], Path], model: str) -> None:
    rows = [
        (int(row["completion_tokens"]), float(row["openai_processing_ms"]))
        for row in recordings(data_file(OBSERVED), model)
        if row["completion_tokens"] and row["openai_processing_ms"] and row["stream"] != "True"
    ]
    tokens, ms = np.array(rows).T
    line = provider_tiers.latency_lines()[model]
    slope = theilslopes(ms, tokens)
    ms_per_token = 1_000 * line.per_token_s
    # Inside the interval, or near it: which recordings the published fit left out is not known, and for gpt-4o-mini its
    # slope is 18 % below that of all of them.
    assert slope.low_slope <= ms_per_token <= slope.high_slope or abs(ms_per_token / slope.slope - 1) < 0.2
    if line.recordings >= 10:
        off = np.median(ms - 1_000 * (line.first_token_s + line.per_token_s * tokens))
        assert abs(off) < 0.25 * np.median(ms)
    # As many recordings as the table claims, but for a few that the fit may have left out.
    assert len(rows) >= line.recordings


@pytest.mark.parametrize(
    ("model", "limits"), [("gpt-4o", {30_000, 30_000_000}), ("gpt-4o-mini", {200_000, 10_000_000, 150_000_000})]
)
def test_recorded_limits_are_tiers(data_file: Callable[[str], Path], model: str, limits: set[int]) -> None:
    seen = {int(row["limit_tokens"]) for row in recordings(data_file(OBSERVED), model) if row["limit_tokens"]}
    assert limits <= seen
    assert limits <= {tier.limits["TPM"] for tier in provider_tiers.published_tiers().values() if tier.model == model}


def test_tiers_never_fall() -> None:
    models: dict[str, list[Mapping[str, float]]] = {}
    for tier in provider_tiers.published_tiers().values():
        models.setdefault(tier.model, []).append(tier.limits)
    assert len(models["gpt-4o"]) == 5
    for model, tiers in models.items():
        for before, after in pairwise(tiers):
            assert all(after[name] >= limit for name, limit in before.items() if name in after), model


def test_the_assumed_noise_has_the_shape_that_healthy_providers_show() -> None:
    # P99 about twice P50, coefficient of variation 0.2 to 0.3 (docs/explanation/provider.md#latency).
    assert 1.6 < math.exp(provider_tiers.SIGMA * norm.ppf(0.99)) < 2.2
    assert 0.2 < math.sqrt(math.expm1(provider_tiers.SIGMA**2)) < 0.3


@pytest.mark.parametrize(
    "name",
    [name for name, tier in provider_tiers.published_tiers().items() if {*tier.limits} <= {*provider_tiers.SIMULATED}],
)
def test_every_tier_makes_a_provider(name: str) -> None:
    provider = ProviderConfig.of(name)
    assert provider.params().limit[:4] == [provider.tpm, provider.rpm, provider.tpd, provider.rpd]
    assert provider.provenance()["limits"][0] == "measured"
    measured = provider_tiers.tier_of(name).model in provider_tiers.latency_lines()
    assert (provider.provenance()["latency"][0] == "measured") == measured


def test_the_default_is_what_the_guardrails_assume() -> None:
    provider = ProviderConfig.of()
    assert (provider.tpm, provider.rpm, provider.latency.preset) == (30_000, 500, "gpt-4o")
    assert ProviderConfig().tpm == 30_000


def test_unknown_presets_name_the_nearest() -> None:
    assert "did you mean gpt-4o-tier1?" in refusal("gpt-4o-teir1")
    assert "did you mean gpt-4o-mini?" in refusal({"latency": "gpt4o-mini"})
    assert "gpt-4-turbo-tier3" in refusal("zzz")


# ---------------------------------------------------------------- the configuration


def test_a_preset_is_where_the_other_fields_start() -> None:
    provider = checked(
        ProviderConfig, {"preset": "gpt-4o-mini-tier3", "rpm": 60, "latency": {"preset": "gpt-4", "sigma": 0.5}}, "p"
    )
    assert (provider.tpm, provider.rpm) == (4_000_000, 60)
    assert (provider.latency.per_token_s, provider.latency.sigma) == (0.043, 0.5)
    assert provider.provenance()["limits"][0] == "assumed"
    assert provider.provenance()["latency"][0] == "measured"
    assert (
        provider.with_(latency={**provider.latency.model_dump(), "scale": 2.0}).provenance()["latency"][0] == "assumed"
    )


def test_every_field_reaches_the_engines() -> None:
    provider = ProviderConfig(
        tpm=1,
        rpm=2,
        tpd=3,
        rpd=4,
        settles=True,
        failed_requests_count="requests",
        retry_after=30.0,
        window="clock",
        phase_s=5.5,
        charged="answer",
        retry_after_min_s=1.5,
        counts="answer",
        counts_share=0.1,
        counts_rounded_to=1_000,
        counts_negative=True,
        slice_s=5.0,
        slice_tokens=6,
        ramp_tpm=7,
        quota_requests=8,
        limit_changes=(LimitChange(at_s=9.0, factor=0.5), LimitChange(at_s=10.0, factor=2.0)),
        cotenant={"share": 0.11, "burst_s": 12.0, "period_s": 13.0},
        outages=({"at_s": 30.0, "length_s": 5.0, "kind": "hang"},),
        faults={
            "error_ratio": 0.14,
            "drop_ratio": 0.15,
            "hang_ratio": 0.22,
            "empty_cut_ratio": 0.16,
            "refusal_s": 0.17,
        },
        latency={
            "first_token_s": 1.0,
            "per_token_s": 2.0,
            "sigma": 0.18,
            "stall_ratio": 0.19,
            "stall_min_s": 20.0,
            "stall_max_s": 21.0,
            "scale": 3.0,
            "noise": ({"from_tokens": 5.0, "log_ratios": [0.25] * 33},),
        },
    )
    inf = math.inf
    expected = quota(
        1,
        2,
        3,
        4,
        window=CLOCK,
        phase_s=5.5,
        burst_ratio=1.0,
        at_answer=[1.0, 0.0, 1.0, *[0.0] * 5],
        retry_after_s=30.0,
        retry_after_min_s=1.5,
        slice_s=5,
        slice_tokens=6,
        settles=1,
        failed_count=REFUSAL_REQUESTS,
        retry_after=SAYS_CONSTANT,
        ramp_tpm=7,
        change_at=[9, 10, inf, inf, inf, inf, inf, inf],
        change_factor=[0.5, 2, 1, 1, 1, 1, 1, 1],
        cotenant_share=0.11,
        cotenant_burst_s=12,
        cotenant_period_s=13,
        quota_requests=8,
        first_token_s=3,
        per_token_s=6,
        sigma=0.18,
        stall_ratio=0.19,
        stall_min_s=20,
        stall_max_s=21,
        noise=[0.25] * 33 + [0.0] * 99,
        noise_from=[5.0, inf, inf, inf],
        error_ratio=0.14,
        drop_ratio=0.15,
        hang_ratio=0.22,
        outage_at=[30.0, inf, inf, inf],
        outage_until=[35.0, inf, inf, inf],
        outage_kind=[2.0, 0.0, 0.0, 0.0],
        refusal_s=0.17,
        empty_cut_ratio=0.16,
        counts=COUNTS_AT_ANSWER,
        counts_share=0.1,
        counts_rounded_to=1_000.0,
        counts_negative=1,
    )
    assert provider.params() == expected
    # None of them stands at its default, so that none can be forgotten unseen.
    blank = ProviderParams()
    assert [f.name for f in fields(blank) if getattr(blank, f.name) == getattr(expected, f.name)] == [
        *("dimensions", "length_s", "burst_ratio", "per_request", "per_input", "per_output", "header")
    ]
    assert ProviderConfig(burst_s=15.0).params().burst_ratio[:2] == [0.25, 0.25]  # of a bucket, which a clock is not


def test_the_grant_is_what_the_limits_say() -> None:
    provider = ProviderConfig(
        tpm=30_000, rpd=200, day_requests_used=5, settles=True, limit_changes=(LimitChange(at_s=60.0, factor=0.5),)
    )
    grant = provider.grant()
    assert (grant.tpm_limit, grant.rpm_limit, grant.tpd_limit, grant.rpd_limit) == (30_000, 0, 0, 200)
    assert (grant.settles, grant.changes, grant.day_requests_used) == (True, ((60.0, 0.5),), 5)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"cotenant": {"share": 1.5}}, ["provider.cotenant.share=1.5", "at most 1"]),
        ({"cotenant": {"shar": 0.5}}, ["provider.cotenant.shar ", "did you mean share?"]),
        ({"cotenant": {"share": 0.5, "burst_s": 5.0}}, ["provider.cotenant", "period_s"]),
        ({"cotenant": {"burst_s": 9.0, "period_s": 5.0}}, ["burst_s 9", "period_s 5"]),
        ({"cotenant": 3}, ["provider.cotenant is a number"]),
        ({"limit_changes": [{"at": 1, "factor": 1}]}, ["provider.limit_changes.0.at_s is missing"]),
        ({"limit_changes": [{"at_s": 1, "factor": 0}]}, ["provider.limit_changes.0.factor=0", "above 0"]),
        ({"limit_changes": [{"at_s": 5, "factor": 1}, {"at_s": 5, "factor": 1}]}, ["in order of time"]),
        ({"limit_changes": [{"at_s": i, "factor": 1} for i in range(9)]}, ["at most 8"]),
        ({"limit_changes": 3}, ["a list"]),
        ({"tpm": "1e6"}, ["provider.tpm='1e6'", "whole number"]),
        ({"tpm": True}, ["provider.tpm=True", "whole number"]),
        ({"tpm": -1}, ["provider.tpm=-1", "at least 0"]),
        ({"slice_s": math.nan}, ["finite"]),
        ({"settles": "ja"}, ["true or false"]),
        ({"charge_rule": "max"}, ["provider.charge_rule='max'", "'max_of'"]),
        ({"retry_after": "none"}, ["'absent', 'ms', 'seconds' or 'oldest'"]),
        ({"as_of": "2026"}, ["YYYY-MM-DD"]),
        ({"faults": {"error_ratio": 0.6, "drop_ratio": 0.6}}, ["above 1"]),
        ({"latency": {"stall_min_s": 100.0}}, ["stall_min_s 100"]),
        ({"tmp": 3}, ["provider.tmp is not known", "did you mean"]),
        ([], ["provider is a list"]),
    ],
)
def test_complaints_name_path_value_and_range(data: Any, parts: list[str]) -> None:
    message = refusal(data)
    for part in parts:
        assert part in message


def test_changes_are_checked_again() -> None:
    assert ProviderConfig.of().with_(tpm=450_000).tpm == 450_000
    with pytest.raises(BadSetting, match=r"provider\.tpn"):
        ProviderConfig.of().with_(tpn=450_000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from([*ProviderConfig.model_fields, "x"]), JSON)
    | st.fixed_dictionaries({"latency": st.dictionaries(st.sampled_from([*Latency.model_fields]), JSON)})
)
def test_any_data_makes_a_provider_or_one_line(data: dict[str, Any]) -> None:
    try:
        provider = checked(ProviderConfig, data, "provider")
    except PacelineError as error:
        refused = error
    else:
        assert checked(ProviderConfig, provider.model_dump(mode="json"), "provider") == provider
        assert provider.params().limit[0] >= 0
        assert provider.provenance()
        return
    assert "\n" not in str(refused)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"window": "fixed"}, "provider.window='fixed': must be 'bucket', 'clock', 'anchored' or 'sliding'"),
        ({"phase_s": 5.0}, "provider: phase_s 5 needs window: clock"),
        ({"window": "clock", "burst_s": 5.0}, "provider: burst_s 5 needs window: bucket"),
        ({"retry_after": "often"}, "provider.retry_after: 'often' must be 'absent', 'ms', 'seconds' or 'oldest', or"),
        ({"retry_after": -1.0}, "provider.retry_after: -1.0 must be 'absent', 'ms', 'seconds' or 'oldest', or"),
        ({"failed_requests_count": "none"}, "provider.failed_requests_count: 'none' must be true, false, tokens"),
        ({"counts": "never"}, "provider.counts='never': must be 'admission', 'answer', 'refusals' or 'none'"),
        ({"counts_share": 0.0}, "provider.counts_share=0.0: must be above 0"),
    ],
)
def test_what_is_wrong_with_a_habit_is_said_in_one_line(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadSetting) as caught:
        ProviderConfig().with_(**fields)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


def test_a_constant_wait_is_a_number_of_seconds() -> None:
    assert ProviderConfig(retry_after=60).params().retry_after_s == 60.0

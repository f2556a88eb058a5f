"""A profile in a file of one's own, without Python: checked, planned with, run against its provider, and backtested."""

from __future__ import annotations

from pathlib import Path

import pytest

from governor.model.requests import Limit, Outcome
from governor.profiles.loader import read_profile
from governor.provider.answers import classify
from sim.model.provider_config import ProviderConfig
from sim.serving.server import serve
from tests.live import Cli, batch, shared_cli

ACME = """
name: acme
title: Acme
checked: 2026-11-30
key: ACME_API_KEY
dimensions:
  TPM:
    unit: tokens
    weights: {input: 1, cached_input: 1, output: 1}
    headers: {limit: acme-tokens-limit, remaining: acme-tokens-left, reset: acme-tokens-reset, reset_format: seconds}
  RPM:
    unit: requests
    weights: {requests: 1}
    headers: {limit: acme-calls-limit, remaining: acme-calls-left}
charge: {rule: prompt_plus_max}
retry_after: [{header: acme-wait, format: milliseconds}]
errors:
  codes: {throttled: [acme_busy]}
tiers:
  - models: [acme-1]
    source: our contract
    since: 2026-11-01
    limits: {starter: {TPM: 120000, RPM: 600}}
prices:
  acme-1: {input: 1, output: 2}
latency:
  acme-1: {first_token_s: 0.05, per_token_s: 0.0005}
"""


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def test_a_new_provider_needs_no_python(cli: Cli, tmp_path: Path) -> None:
    profile, requests = tmp_path / "acme.yaml", batch(tmp_path / "b.jsonl", 6, model="acme-1")
    profile.write_text(ACME)
    checked = cli.run("profiles", "acme.yaml", cwd=tmp_path)
    assert checked.out.startswith("acme.yaml: sound\nAcme: TPM, RPM, 1 tier,")
    stated = {"PACELINE_PROFILE": "acme.yaml"}
    planned = cli.run(
        *("plan", requests, "--provider", "acme-1-starter", "--effort", "quick", "--workers", "1", "--out", "out"),
        env=stated,
        cwd=tmp_path,
    )
    assert planned.code == 0, planned.err
    assert f"PACELINE_PROFILE={profile}" in (tmp_path / "out" / "recommended.env").read_text()
    assert "tpm: 120000" in (tmp_path / "out" / "scenario.yaml").read_text()
    with serve(ProviderConfig.model_validate({"profile": str(profile), "preset": "acme-1-starter"})) as served:
        # The key is in the profile's own variable; nothing but the profile tells which.
        env = {"OPENAI_API_KEY": "", "ACME_API_KEY": "acme-key-0123456789", "OPENAI_BASE_URL": served.base_url}
        ran = cli.run(
            *("run", requests, "--env-file", "out/recommended.env", "--out", "r.jsonl", "--yes", "--json"),
            env=env,
            cwd=tmp_path,
        )
        assert ran.code == 0, ran.err
        assert ran.json["completed"] == 6
        assert ran.json["cost_usd"] > 0.0
    tested = cli.run("backtest", "r.journal.db", "--json", cwd=tmp_path)
    assert tested.code == 0, tested.err
    assert tested.json["measured_makespan_s"] > 0.0


def test_the_live_half_reads_what_the_synthetic_provider_writes_by_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "acme.yaml"
    path.write_text(ACME)
    profile = read_profile(str(path))
    answer = classify(
        400,
        {"acme-wait": "1500", "acme-tokens-limit": "120000", "acme-tokens-left": "90000", "acme-tokens-reset": "15"},
        {"error": {"code": "acme_busy", "message": "later"}},
        profile=profile,
    )
    assert answer.outcome is Outcome.THROTTLED
    assert answer.retry_after_s == 1.5
    assert answer.limits == (Limit("TPM", 120_000, 90_000),)
    assert classify(400, {}, {"error": {"code": "acme_busy"}}).outcome is Outcome.BAD_REQUEST

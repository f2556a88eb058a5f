"""The limits of a profile over HTTP: sixty requests near the bound, none refused, input and output booked apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.own_time import BASE_URL, OwnTimeLoop, without_threads
from governor.journal.journal import Journal
from governor.model.policy import Policy
from governor.model.pools import default_pools
from governor.model.prices import Prices
from governor.profiles.loader import with_profile
from governor.provider.sending import connect_with
from governor.run.batch import Orders, run_orders
from governor.run.pool_run import RunOptions
from governor.telemetry.progress import Display
from sim.model.provider_config import ProviderConfig
from sim.serving.server import Provider
from tests.live import batch, provider, run_args, shared_cli

REQUESTS = 60
CAP = 1_300
FIRST_TOKEN_S = 0.6
LATENCY = {"first_token_s": FIRST_TOKEN_S, "per_token_s": 0.001, "sigma": 0.0, "stall_ratio": 0.0}
PROVIDERS = {
    "openai": {"tpm": 30_000, "rpm": 500},
    "anthropic": {"rpm": 50, "limits": {"ITPM": 30_000, "OTPM": 8_000}},
}
SETTINGS = {
    "openai": {"OPENAI_TPM_LIMIT": "30000", "OPENAI_RPM_LIMIT": "500"},
    "anthropic": {"PACELINE_LIMITS": "ITPM=30000,OTPM=8000,RPM=50"},
}


def lines() -> list[dict[str, object]]:
    """The requests: 250 to 1,250 tokens of input, and a declared cap."""
    r = np.random.default_rng(7)
    sizes = zip(r.integers(250, 1_250, REQUESTS), r.integers(250, 1_250, REQUESTS), strict=True)
    return [
        {
            "custom_id": f"q-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "claude-sonnet-4",
                "max_tokens": CAP,
                "messages": [{"role": "user", "content": "abc " * int(prompt)}],
                "metadata": {"paceline_output_tokens": str(output)},
            },
        }
        for i, (prompt, output) in enumerate(sizes)
    ]


@pytest.mark.parametrize("name", PROVIDERS)
def test_sixty_requests_over_http_come_near_the_bound_and_none_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "batch.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines()))
    config = ProviderConfig.model_validate(
        {"profile": name, "failed_requests_count": False, "latency": LATENCY, **PROVIDERS[name]}
    )
    environment = {
        "PACELINE_PROFILE": name,
        "OPENAI_BASE_URL": BASE_URL,
        "OPENAI_TPM_HEADROOM": "0.01",
        "OPENAI_STAGGER_SECONDS": "0",
        **SETTINGS[name],
    }
    (pool,) = default_pools(Policy.from_env(environment, Policy.preset("paceline")), environment)
    pool = with_profile(pool, environment)
    provider = Provider(config, seed=3)
    orders = Orders(
        requests=tmp_path / "batch.jsonl",
        out=tmp_path / "results.jsonl",
        journal=tmp_path / "run.db",
        pools=[pool],
        environment=environment,
        prices=Prices({}),
        manner=RunOptions(new_loop=lambda: OwnTimeLoop(provider, counts_work=False)),
        seed=1,
        yes=True,
    )
    with without_threads(), (tmp_path / "said.txt").open("w") as said:
        outcome = run_orders(orders, foresee=None, connect=connect_with(environment), shown=Display(said))
    summary = outcome.summary
    with Journal.open(tmp_path / "run.db") as journal:
        attempts = list(journal.attempts("default"))
        # Verification and resumption know the dimensions, too.
        assert journal.settings()[0].policy.quota == pool.policy.quota
    assert (summary.completed, summary.failed, summary.throttled, len(attempts)) == (REQUESTS, 0, 0, REQUESTS)
    if name == "anthropic":  # real output counts, of which a full bucket is there at once
        ratio = sum(a.output_tokens for a in attempts) / 8_000
    else:
        ratio = sum(a.charged_tokens for a in attempts) / 30_000
    bound_s = 60.0 * (ratio - 1.0) + min(a.finished_s - a.launched_s for a in attempts)
    assert bound_s <= max(a.finished_s for a in attempts) <= 1.06 * bound_s
    assert bound_s == pytest.approx(summary.bound_s, rel=0.01)


def test_the_limit_that_a_run_found_is_told_and_kept(tmp_path: Path) -> None:
    """By a provider that states nothing: in the summary, in the status, and in the run that goes on with it."""
    tpm, scale = 600_000, 20.0
    cli = shared_cli()
    batch(tmp_path / "requests.jsonl", 120, cap=20_000)
    env = {
        "OPENAI_FIND_LIMITS": "tokens",
        "OPENAI_STAGGER_SECONDS": "0",
        "OPENAI_MAX_CONCURRENCY": "30",
        "OPENAI_CHARGE_RULE": "prompt_plus_max",
    }
    habits = {"tpm": tpm, "counts": "none", "charge_rule": "prompt_plus_max", "failed_requests_count": False}
    with provider(time_scale=scale, stated_time="provider", **habits) as served:
        args = run_args(tmp_path, served.base_url, "--yes", "--quiet", "--time-scale", scale)
        part = cli.run(*args, "--stop-after", "2m", "--json", env=env)
        assert part.code == 5, part.err
        found = json.loads(part.out)["limits_found"]["default"]["TPM"]
        assert 0.5 * tpm < found < 1.3 * tpm
        status = cli.run("status", tmp_path / "results.journal.db")
        assert f"{found:,.0f} TPM; once you trust it: OPENAI_TPM_LIMIT={found:.0f}" in status.out
        refused = json.loads(part.out)["throttled"]
        rest = cli.run(*args, "--json", env=env)
        assert rest.code == 0, rest.err
        assert json.loads(rest.out)["throttled"] - refused <= 4, "the search does not begin anew"


def test_the_limits_of_a_profile_go_from_the_plan_into_the_run(tmp_path: Path) -> None:
    """What the provider was planned with is in the env file, in the user's own after `apply`, and paces the run."""
    cli = shared_cli()
    requests = batch(tmp_path / "requests.jsonl", 8, model="claude-sonnet-4")
    config = {"profile": "anthropic", "tpm": 0, "rpm": 50, "limits": {"ITPM": 30_000.0, "OTPM": 8_000.0}}
    (tmp_path / "provider.yaml").write_text(json.dumps(config))
    planning = ("plan", requests, "--provider", "provider.yaml", "--effort", "quick", "--workers", "1", "--out", "out")
    planned = cli.run(*planning, cwd=tmp_path)
    assert planned.code == 0, planned.err
    assert "as given: 50 RPM, 30,000 ITPM, 8,000 OTPM" in planned.out
    (tmp_path / "my.env").write_text("PACELINE_LIMITS=ITPM=10000,OTPM=2000\n")
    applied = cli.run("apply", "out/recommended.env", "my.env", "--force", cwd=tmp_path)
    assert "PACELINE_LIMITS: ITPM=10000,OTPM=2000 -> ITPM=30000,OTPM=8000" in applied.out, applied.err
    with provider(**config) as served:
        args = run_args(tmp_path, served.base_url, "--env-file", "my.env", "--metrics-textfile", "run.prom", "--yes")
        ran = cli.run(*args, cwd=tmp_path)
        assert ran.code == 0, ran.err
    shown = (tmp_path / "run.prom").read_text()
    assert 'paceline_requests_total{pool="default",result="ok"} 8.0' in shown
    assert 'paceline_limit_used{dimension="OTPM",pool="default"}' in shown

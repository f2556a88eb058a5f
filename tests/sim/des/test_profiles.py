"""Sixty requests on the synthetic provider of each profile: close to the bound, none lost, none refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from governor.model.policy import Policy
from sim.des import compiled
from sim.des.driver import Simulation
from sim.experiment.experiment import Case, case_of
from sim.model import provider as prov
from sim.model.provider_config import ProviderConfig
from sim.model.windows import BUCKET
from sim.scenario.scenario import ModelSource, Scenario
from tests.scenarios import batch

REQUESTS = 60
LATENCY = {"first_token_s": 0.6, "per_token_s": 0.008, "sigma": 0.0, "stall_ratio": 0.0}
PROVIDERS: dict[str, dict[str, Any]] = {
    "openai": {"tpm": 30_000, "rpm": 500},
    "azure-openai": {"tpm": 30_000, "rpm": 180},
    "anthropic": {"rpm": 50, "limits": {"ITPM": 30_000, "OTPM": 8_000}},
    "bedrock": {"tpm": 60_000, "rpm": 200, "tpd": 10_000_000},
    "gemini": {
        "tpm": 20_000,
        "rpm": 100,
        "rpd": 1_000,
        "limits": {"SPEND": 1.0},
        "usd_per_million": (1.25, 10.0, 0.3),
    },
    "groq": {"tpm": 12_000, "rpm": 30, "tpd": 100_000, "rpd": 1_000},
}


def case_on(name: str, **settings: Any) -> Case:
    provider = ProviderConfig.model_validate(
        {"profile": name, "failed_requests_count": False, "latency": LATENCY, **PROVIDERS[name]}
    )
    limits = {f"{each}_limit": getattr(provider, each) for each in ("tpm", "rpm", "tpd", "rpd")}
    policy = Policy.preset("paceline").with_(
        max_concurrency=20,
        stagger_seconds=0.0,
        tpm_headroom=0.01,
        charge_rule=provider.charge_rule,
        settle=provider.settles,
        **{each: limit for each, limit in limits.items() if limit},
        **settings,
    )
    r = np.random.default_rng(7)
    sizes = [int(n) for n in r.integers(250, 1_250, REQUESTS)]
    work = batch(sizes, outputs=[int(n) for n in r.integers(250, 1_250, REQUESTS)], cap=1_300)
    source = ModelSource(requests=REQUESTS, prompt_tokens=(1, 1), output_tokens=(1, 1))
    return case_of(Scenario(source=source, workload=work, provider=provider, policy=policy))


def bounds_s(case: Case) -> list[float]:
    """When the last request can be admitted at the soonest, by each limit alone, and a shortest answer later."""
    pp, c = case.provider, case.columns
    found = [0.0]
    for d in range(pp.dimensions):
        if pp.limit[d] > 0.0 and not pp.at_answer[d]:
            counted = np.minimum(c.charge, c.prompt_tokens + c.output_tokens) if pp.settles else c.charge
            total = sum(
                pp.per_request[d] + prov.amount_of(pp, d, float(tokens), float(prompt))
                for tokens, prompt in zip(counted, c.prompt_tokens, strict=True)
            )
            ratio = total / pp.limit[d]
            found.append(pp.length_s[d] * (ratio - 1.0 if pp.window[d] == BUCKET else math.ceil(ratio) - 1))
    return [each + LATENCY["first_token_s"] for each in found]


@pytest.mark.parametrize("name", PROVIDERS)
def test_sixty_requests_on_each_profile_come_near_the_bound_and_none_is_refused(name: str) -> None:
    case = case_on(name)
    tally = Simulation(case.columns, case.params, case.provider, seed=1).run()
    assert (tally.completed, tally.failed, tally.throttled) == (REQUESTS, 0, 0)
    bound_s = max(bounds_s(case))
    assert bound_s > 10.0  # a limit binds
    assert bound_s <= tally.last_s <= 1.05 * bound_s
    # The compiled engine states the same.
    again = compiled.simulated(case, 1)
    assert (again.last_s, again.attempts, again.charged_tokens) == (tally.last_s, tally.attempts, tally.charged_tokens)
    # The bound that reports quote knows the profile's dimensions, and the shortest answer there was.
    summary = tally.summary(case.grant)
    assert again.summary(case.grant).bound_s == summary.bound_s
    assert bound_s <= summary.bound_s <= bound_s + 3.0
    assert summary.efficiency is not None
    assert summary.efficiency >= 1.0 / 1.05


def test_the_limit_that_binds_is_the_profile_s_own() -> None:
    """Anthropic's output limit: nothing of the kind is in the guardrails' four."""
    case = case_on("anthropic")
    assert [n for n in case.params.limit if n] == [50.0, 30_000.0, 8_000.0]
    longest = max(range(1, len(bounds_s(case))), key=bounds_s(case).__getitem__)
    assert longest == 3  # RPM, ITPM, OTPM

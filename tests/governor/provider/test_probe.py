"""The probe against the synthetic provider under each hidden rule, which it must tell apart, and its budget."""

from __future__ import annotations

import asyncio
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from governor.model.errors import PacelineError
from governor.model.policy import Policy
from governor.model.pools import default_pools
from governor.model.prices import Price
from governor.model.requests import Answer, Limit, Outcome
from governor.provider.probe import (
    KNOCKS_MOST,
    PARTS,
    Judge,
    Probe,
    ProbeAnswer,
    foreseen_usd,
    probed,
    provider_text,
    write_provider,
)
from governor.provider.sending import connect_with
from sim.calibration.fits_window import judged
from sim.scenario.scenario_file import named_provider
from tests import live
from tests.virtual_loop import run_virtual

SCALE = 20.0
PRICE = Price(date.min, 0.15, 0.15, 0.60)


def ask(max_cost_usd: float = 1.0, judge: Judge | None = None, **habits: Any) -> tuple[dict[str, ProbeAnswer], Probe]:
    given: dict[str, Any] = {
        "tpm": 30_000,
        "rpm": 300,
        "latency": {"first_token_s": 0.2, "per_token_s": 0.001, "sigma": 0.0, "stall_ratio": 0.0},
        "faults": {"refusal_s": 0.01},
        **habits,
    }
    with live.provider(time_scale=SCALE, **given) as served:
        environment = {"OPENAI_API_KEY": live.KEY}
        pool = default_pools(Policy(), environment, served.base_url)[0]

        async def main() -> tuple[list[ProbeAnswer], Probe]:
            send = connect_with(environment)(pool)
            probe = Probe(send, "gpt-4o-mini", PRICE, max_cost_usd, time_scale=SCALE, believed=(30_000.0, 300.0))
            probe.judge = judge
            try:
                return await probed(probe), probe
            finally:
                await send.aclose()

        found, probe = asyncio.run(main())
    return {told.name: told for told in found}, probe


@pytest.mark.parametrize("window", ["bucket", "clock", "anchored", "sliding"])
def test_windows_are_told_by_refusals_alone_or_not_at_all(window: str, tmp_path: Path) -> None:
    """No header states a count: the limits are those of the settings, and at most a few dozen calls are made."""
    found, probe = ask(judge=judged, counts="none", window=window, charge_rule="prompt_plus_max", retry_after="seconds")
    told = {name: each.value for name, each in found.items()}
    assert told["window"] in (None, window), found["window"].why
    assert told["charged"] in (None, "admission"), found["charged"].why
    assert told["failed_requests_count"] in (None, True), found["failed_requests_count"].why
    assert told["charge_rule"] is None
    assert 0 < probe.calls <= 1 + 2 * len(PARTS) * KNOCKS_MOST
    path = tmp_path / "provider.yaml"
    write_provider(path, provider_text(probe, list(found.values())))
    assert named_provider(str(path)).tpm == 30_000


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("rule", ["auto", "prompt_plus_max", "max_of", "responses"])
def test_hidden_rules_are_told_apart(rule: str, settles: bool, tmp_path: Path) -> None:
    # The other two habits are spread over these, so that each comes with both of its values.
    counts, sliced = settles != (rule in ("auto", "max_of")), rule in ("auto", "responses")
    found, probe = ask(
        charge_rule=rule, settles=settles, failed_requests_count=counts, slice_s=1.0 if sliced else 0.0,
        slice_tokens=30_000 if sliced else 0,
    )  # fmt: skip
    told = {name: each.value for name, each in found.items()}
    why = {name: each.why for name, each in found.items()}
    assert told["charge_rule"] == rule, why
    assert told["settles"] is settles, why
    assert told["failed_requests_count"] is counts, why
    assert told["slice_s"] == (1.0 if sliced else 0.0), why
    assert told["max_tokens_in_gate"] is (rule in ("prompt_plus_max", "max_of")), why
    foreseen = foreseen_usd(PRICE, 30_000, 300, rule)
    # Answers of the simulated provider are shorter than those that fill their cap.
    assert 0.05 * foreseen < probe.spent_usd <= foreseen
    path = tmp_path / "provider.yaml"
    write_provider(path, provider_text(probe, list(found.values())))
    config = named_provider(str(path))
    assert (config.tpm, config.rpm, config.charge_rule, config.settles) == (30_000, 300, rule, settles)
    # What was asked is neither doubted nor drawn in a plan of it.
    assert {"charge rule", "settling", "slices", "refused requests"} <= set(config.learnt)
    assert config.provenance()["charge rule"][1].startswith("learnt from paceline probe: ")
    assert config.failed_requests_count is counts


@pytest.mark.parametrize("settles", [False, True])
def test_settling_is_never_told_wrongly_where_minutes_are_counted(settles: bool) -> None:
    """A counter does not refill: what is left after the call is compared with that, too."""
    told = []
    for window in ("clock", "anchored", "sliding"):
        found, _ = ask(charge_rule="prompt_plus_max", settles=settles, window=window, rpm=0)
        told.append(found["settles"].value)
        assert told[-1] in (settles, None), (window, found["settles"].why)
    # A minute that ends between the two calls is not told.
    assert settles in told


def test_no_call_is_made_that_could_cost_too_much() -> None:
    found, probe = ask(max_cost_usd=0.0002)
    assert probe.spent_usd <= 0.0002
    assert found["failed_requests_count"].value is None
    assert "not asked" in found["failed_requests_count"].why
    with pytest.raises(PacelineError, match="max-cost"):
        ask(max_cost_usd=0.00001)


def test_what_refills_too_fast_is_not_guessed() -> None:
    found, _ = ask(tpm=300_000_000, rpm=0)
    assert found["settles"].value is None
    assert re.search("refills too fast", found["settles"].why)
    assert found["slice_s"].value is None
    assert found["failed_requests_count"].value is None


def test_command_writes_the_provider_it_found(tmp_path: Path) -> None:
    habits = {"tpm": 30_000, "charge_rule": "max_of", "latency": {"first_token_s": 0.2, "per_token_s": 0.001}}
    out = tmp_path / "provider.yaml"
    with live.provider(time_scale=SCALE, **habits) as served:
        args = [
            "probe",
            "--max-cost",
            "1",
            "--base-url",
            served.base_url,
            "--time-scale",
            SCALE,
            "--out",
            out,
            "--json",
        ]
        ran = live.shared_cli().run(*args)
    assert ran.code == 0, ran.err
    assert ran.json["charge_rule"]["value"] == "max_of"
    assert 0.0 < ran.json["cost_usd"] <= 1.0
    assert named_provider(str(out)).charge_rule == "max_of"
    refused = live.shared_cli().run("probe", "--max-cost", "1", "--model", "nobody-knows", "--out", out)
    assert refused.code == 2
    assert "price is not known" in refused.err


class Gated:
    """A provider that charges by characters, but refuses a cap above its limit: what ours does not simulate."""

    async def __call__(self, job: Any, timeout_s: float) -> Answer:
        assert job.work is not None
        sizes = job.work.request.sizes
        if sizes.max_tokens > 30_000:
            return Answer(Outcome.TOO_LARGE, 429, "rate_limit_exceeded", "Request too large")
        limits = (Limit("TPM", 30_000.0, 30_000.0 - round(0.2504 * sizes.chars + 2.7)),)
        return Answer(Outcome.OK, 200, used_prompt_tokens=sizes.prompt_tokens, used_output_tokens=5, limits=limits)

    async def aclose(self) -> None:
        """Nothing is open."""


class Slow:
    """A bucket of 30,000 that charges prompt and cap, 10 ms per token of the answer: all of its cap, or one word."""

    def __init__(self, *, settles: bool) -> None:
        self.settles = settles
        self.used = self.at_s = 0.0

    def _drained(self, more: float) -> None:
        now_s = asyncio.get_running_loop().time()
        self.used = min(30_000.0, max(0.0, self.used - 500.0 * (now_s - self.at_s)) + more)
        self.at_s = now_s

    async def __call__(self, job: Any, timeout_s: float) -> Answer:
        assert job.work is not None
        sizes, body = job.work.request.sizes, job.work.request.body
        charge = sizes.chars / 4 + 1 + sizes.max_tokens
        self._drained(0.0)
        if self.used + charge > 30_000:
            return Answer(Outcome.THROTTLED, 429, limits=(Limit("TPM", 30_000.0, 30_000.0 - round(self.used)),))
        self._drained(charge)
        limits = (Limit("TPM", 30_000.0, 30_000.0 - round(self.used)),)
        output = 5 if "yes" in body["messages"][0]["content"] else sizes.max_tokens
        await asyncio.sleep(output / 100)
        if self.settles:
            self._drained(sizes.prompt_tokens + output - charge)
        return Answer(Outcome.OK, 200, used_prompt_tokens=sizes.prompt_tokens, used_output_tokens=output, limits=limits)

    async def aclose(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("settles", [False, True])
def test_settling_is_seen_where_long_answers_would_hide_it(settles: bool) -> None:
    found = run_virtual(probed(Probe(Slow(settles=settles), "gpt-4o-mini", PRICE, 1.0)))
    told = {each.name: each.value for each in found}
    assert told["charge_rule"] == "prompt_plus_max"
    assert told["settles"] is settles, found


def test_a_gate_that_is_unlike_the_charge_is_seen() -> None:
    found = asyncio.run(probed(Probe(Gated(), "gpt-4o-mini", PRICE, 1.0, time_scale=1_000.0)))
    told = {each.name: each.value for each in found}
    assert told["charge_rule"] == "auto"
    assert told["max_tokens_in_gate"] is True

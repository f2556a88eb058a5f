"""Reserving against paying per token: closed forms of an even load, and what spills of an uneven one."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest

from governor.model.errors import BadSetting
from governor.model.policy import Policy
from governor.model.prices import PER, Price, Prices
from governor.profiles.loader import read_profile
from sim.model.provider_config import ProviderConfig
from sim.model.synthetic import from_tokens
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource
from sim.selection.reserved import HOURLY, compared

PRICES = Prices({"gpt-4.1": (Price(date(2025, 1, 1), 2.0, 0.5, 8.0),)})
OFFER = next(each for each in read_profile("azure-openai").reserved if "gpt-4.1" in each.models)


def traffic(per_minute: list[int]) -> Scenario:
    """So many requests of 1,000 prompt and 250 answer tokens in each minute, all of a minute at its beginning."""
    count = sum(per_minute)
    workload = from_tokens(
        np.full(count, 1_000), np.full(count, 250), arrival_s=np.repeat(60.0 * np.arange(len(per_minute)), per_minute)
    )
    return Scenario(
        source=ModelSource(requests=count, prompt_tokens=(1, 1), output_tokens=(1, 1)),
        workload=workload,
        provider=ProviderConfig(),
        policy=Policy(),
        arrivals="trace",
    )


def test_an_even_load_pays_from_where_its_tokens_cost_what_the_smallest_deployment_does() -> None:
    found = compared(traffic([60] * 10), PRICES, None, "gpt-4.1-2025-04-14")
    usd_per_request = (1_000 * 2.0 + 250 * 8.0) / PER
    assert found.tokens_usd_per_hour == pytest.approx(60 * 60 * usd_per_request)
    assert found.tpm == found.peak_tpm == 60 * 1_250
    for choice in found.choices:
        # A unit that is used to the full carries 3,000 weighted tokens a minute, or 1.5 requests of 2,000.
        worth = 60 * OFFER.tokens_per_minute / 2_000 * usd_per_request
        if choice.unit_usd_per_hour > worth:
            assert choice.pays_from_tpm is None
        else:
            requests = OFFER.minimum * choice.unit_usd_per_hour / (60 * usd_per_request)
            assert choice.pays_from_tpm == pytest.approx(1_250 * requests, rel=1e-9)
    assert {choice.term for choice in found.choices} == {HOURLY, "month", "year"}


def test_what_the_units_do_not_hold_spills_and_is_paid_per_token() -> None:
    found = compared(traffic([20, 20, 20, 100]), PRICES, None, "gpt-4.1")
    usd_per_request = 4_000 / PER
    for choice in found.choices:
        held = choice.units * OFFER.tokens_per_minute / 2_000
        spilled = sum(max(0.0, n - held) for n in (20, 20, 20, 100))
        assert choice.spilled == pytest.approx(spilled / 160)
        assert choice.usd_per_hour == pytest.approx(
            choice.units * choice.unit_usd_per_hour + spilled * usd_per_request * 15
        )
        assert choice.used == pytest.approx((160 - spilled) / (4 * held))
        assert choice.units >= OFFER.minimum
        assert (choice.units - OFFER.minimum) % OFFER.increment == 0


def test_a_model_without_units_or_a_price_is_one_line() -> None:
    with pytest.raises(BadSetting, match=r"no profile states reserved units for 'gpt-9': use one of gpt-4\.1"):
        compared(traffic([10]), PRICES, None, "gpt-9")
    with pytest.raises(BadSetting, match="the price of o3 is not known"):
        compared(traffic([10]), PRICES, None, "o3")

"""Prices and costs: hand-calculated bills, dates, snapshots, and every way to get a price list wrong."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from governor.model.errors import BadInput
from governor.model.estimate import CHAT, EMBEDDINGS, Sizes
from governor.model.prices import LONG_PROMPT, Price, Prices, Spending, Usage, dollars_text, read_prices, usage_in
from governor.profiles.loader import prices_in_force
from sim.model.provider_tiers import latency_lines, published_tiers

DAY = date(2026, 7, 1)
CHEAP = Price(date(2025, 1, 1), 2.0, 0.5, 8.0)


def bill(usage: Usage) -> float:
    return CHEAP.cost_usd(usage)


def test_a_bill_by_hand() -> None:
    # 1,000 of 3,000 prompt tokens from the cache: 2,000 x $2 + 1,000 x $0.50 + 500 x $8 per million.
    assert bill(Usage(3_000, 500, 1_000, 200)) == pytest.approx((4_000 + 500 + 4_000) / 1e6, rel=1e-12)


def test_tokens_written_to_a_cache_cost_their_factor_of_input_in_every_tier() -> None:
    price = CHEAP._replace(cache_write=1.25, flex=0.5)
    used = Usage(3_000, 500, 1_000, written=800)
    # 1,200 x $2 + 800 x $2.50 + 1,000 x $0.50 + 500 x $8 per million.
    expected = (2_400 + 2_000 + 500 + 4_000) / 1e6
    assert price.cost_usd(used) == pytest.approx(expected, rel=1e-12)
    flex = price.at("flex")
    assert flex is not None
    assert flex.cost_usd(used) == pytest.approx(expected / 2, rel=1e-12)
    assert bill(used) == pytest.approx((4_000 + 500 + 4_000) / 1e6, rel=1e-12), "without a price, like other input"


def test_what_is_not_stated_costs_nothing() -> None:
    assert bill(Usage()) == 0.0
    assert bill(Usage(prompt=1_000_000)) == 2.0


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {
                "prompt_tokens": 100,
                "completion_tokens": 30,
                "prompt_tokens_details": {"cached_tokens": 64},
                "completion_tokens_details": {"reasoning_tokens": 20},
            },
            Usage(100, 30, 64, 20),
        ),
        (
            {
                "input_tokens": 7,
                "output_tokens": 9,
                "input_tokens_details": {"cached_tokens": 5},
                "output_tokens_details": {"reasoning_tokens": 9},
            },
            Usage(7, 9, 5, 9),
        ),
        ({"prompt_tokens": 12}, Usage(12, 0, 0, 0)),
        # OpenAI states what was written to a cache among the prompt's details, Anthropic beside the rest of the input.
        (
            {
                "input_tokens": 9,
                "output_tokens": 1,
                "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 4},
            },
            Usage(9, 1, 2, written=4),
        ),
        (
            {
                "input_tokens": 10,
                "output_tokens": 3,
                "cache_creation_input_tokens": 400,
                "cache_read_input_tokens": 50,
                "service_tier": "standard",
            },
            Usage(460, 3, 50, written=400),
        ),
        # A proxy that states them beside OpenAI's figures has them in the prompt already.
        (
            {"prompt_tokens": 460, "completion_tokens": 3, "cache_creation_input_tokens": 400},
            Usage(460, 3, written=400),
        ),
        # More cached than there was, and kinds that are none: never a negative bill, never an exception.
        (
            {"prompt_tokens": 4, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 99}},
            Usage(4, 1, 4, 0),
        ),
        ({"prompt_tokens": 4, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": "x"}}, Usage(4, 1)),
        ({"prompt_tokens": 4, "completion_tokens": 1, "prompt_tokens_details": [1]}, Usage(4, 1)),
        ("none", Usage()),
    ],
)
def test_usage_of_every_endpoint(usage: object, expected: Usage) -> None:
    assert usage_in({"usage": usage}) == expected


def test_no_body_has_no_usage() -> None:
    assert usage_in(None) == Usage()


def test_a_snapshot_has_the_price_of_its_model_and_an_exact_name_wins() -> None:
    special = Price(date(2024, 1, 1), 5.0, 5.0, 15.0)
    prices = Prices({"gpt-x": (CHEAP,), "gpt-x-2024-05-13": (special,), "mine-*": (CHEAP,)})
    assert prices.of("gpt-x-2025-08-06", DAY) is CHEAP
    assert prices.of("gpt-x-2024-05-13", DAY) is special
    assert prices.of("mine-7b", DAY) is CHEAP
    # A prefix is not a snapshot: mini costs something else.
    assert prices.of("gpt-x-mini", DAY) is None
    assert prices.unknown({"a": 1, "gpt-x": 9, "b": 5}, DAY) == ["b", "a"]


def test_the_newest_price_that_has_begun_counts(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(
        "checked: 2026-01-01\n"
        "models:\n"
        "  m:\n"
        "    - {since: 2026-08-01, input: 1, output: 1}\n"
        "    - {since: 2025-01-01, input: 3, output: 6}\n"
        "    - {since: 2026-01-01, input: 2, output: 4}\n"
    )
    prices = read_prices(path)
    costs = {day: prices.of("m", day) for day in (date(2024, 12, 31), date(2025, 6, 1), DAY, date(2026, 8, 1))}
    assert [price and price.input for price in costs.values()] == [None, 3.0, 2.0, 1.0]
    assert prices.checked == "2026-01-01"


def test_spent_adds_up_and_says_when_it_does_not_know() -> None:
    spent = Spending(Prices({"m": (CHEAP,)}), DAY, since_usd=1.0)
    assert spent.answered("m", Usage(1_000_000, 0, 1_000_000)) == 0.5
    assert spent.total_usd() == 1.5
    assert spent.answered("unheard-of", Usage(10, 10, 0, 3)) == -1.0
    assert spent.total_usd() is None
    assert (spent.cost_usd, spent.cached_tokens, spent.reasoning_tokens) == (1.5, 1_000_000, 3)


def test_the_shipped_list_reads_and_is_dated() -> None:
    prices = prices_in_force()
    day = date.fromisoformat(prices.checked)
    tiers = {tier.model for tier in published_tiers().values() if tier.profile == "openai"}
    for model in (tiers | {*latency_lines()}) - {"gpt-5.5-long-context", "gpt-4"}:
        assert prices.of(model, day) is not None, model
        assert prices.of(model, day, "batch") is not None
    assert prices.of("gpt-4o", day, "flex") is None
    for model in ("gpt-4o", "gpt-4o-2024-08-06", "gpt-4.1-mini", "text-embedding-3-small"):
        price = prices.of(model, DAY)
        assert price is not None
        assert 0.0 < price.cached_input <= price.input


def test_a_tier_is_a_factor_on_all_three_prices() -> None:
    price = CHEAP._replace(flex=0.5, priority=1.7)
    usage = Usage(3_000, 500, 1_000)
    for tier, factor in (("", 1.0), ("batch", 0.5), ("flex", 0.5), ("priority", 1.7)):
        found = price.at(tier)
        assert found is not None
        assert found.cost_usd(usage) == pytest.approx(factor * bill(usage))
    assert price.at("ultrafast") is None
    assert CHEAP.at("flex") is None


def test_an_answer_states_its_tier() -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 1}
    stated = {name: usage_in({"usage": usage, "service_tier": name}).tier for name in ("default", "flex", "fast", "x")}
    assert stated == {"default": "", "flex": "flex", "fast": "priority", "x": "x"}
    assert usage_in({"usage": usage | {"service_tier": "batch"}}).tier == "batch"


def test_a_long_prompt_makes_its_request_dearer() -> None:
    price = CHEAP._replace(long=True)
    assert price.cost_usd(Usage(LONG_PROMPT, 100)) == pytest.approx((LONG_PROMPT * 2.0 + 100 * 8.0) / 1e6)
    assert price.cost_usd(Usage(LONG_PROMPT + 1, 100)) == pytest.approx(((LONG_PROMPT + 1) * 4.0 + 100 * 12.0) / 1e6)


def test_an_answer_of_unknown_usage_counts_at_its_worst() -> None:
    """The declared cap, else the model's own; and the prompt as the worst estimates that were measured."""
    prices = Prices({"m": (CHEAP,), "capped": (CHEAP._replace(output_max=2_000),)})
    declared, open_end = Sizes(CHAT, 1_000, 0, 0, 1, 0, 0, 2, 300), Sizes(CHAT, 1_000, 0, 0, 1, 0, 0, 1, -1)
    spent = Spending(prices, DAY)
    assert spent.answered("m", Usage(), declared) == pytest.approx((2_200 * 2.0 + 600 * 8.0) / 1e6)
    assert spent.answered("capped", Usage(), open_end) == pytest.approx((2_200 * 2.0 + 2_000 * 8.0) / 1e6)
    assert spent.answered("m", Usage(), Sizes(EMBEDDINGS, 1_000, 0, 0, 0, 0, 0, 1, -1)) == pytest.approx(4_400 / 1e6)
    assert spent.assumed_usd == spent.cost_usd == spent.total_usd()
    assert spent.answered("m", Usage(), open_end) == -1.0
    assert spent.total_usd() is None


def test_what_is_in_a_queue_is_committed_until_it_is_answered() -> None:
    spent = Spending(Prices({"m": (CHEAP,)}), DAY, since_usd=1.0)
    spent.committed["wave 1"] = 2.0
    assert (spent.bound_usd, spent.cost_usd) == (3.0, 1.0)
    del spent.committed["wave 1"]
    assert spent.bound_usd == 1.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the file is empty"),
        ("- 1\n", "a list where a mapping should be"),
        ("models: {m: {input: 1, output: 2}\n", "not YAML"),
        ("models: {}\n", "it has no 'models'"),
        ("prices: {}\n", "there is no key 'prices'"),
        ("models: {m: {input: 1, output: 2, out: 3}}\n", "models.m: there is no key 'out'"),
        ("models: {m: {input: 1}}\n", "models.m: output is missing"),
        ("models: {m: {input: -1, output: 1}}\n", "models.m: input is -1"),
        ("models: {m: {input: .nan, output: 1}}\n", "models.m: input is nan"),
        ("models: {m: {input: true, output: 1}}\n", "models.m: input is True"),
        ("models: {m: {input: cheap, output: 1}}\n", "models.m: input is 'cheap'"),
        ("models: {m: {since: soon, input: 1, output: 1}}\n", "models.m: since is 'soon'"),
        ("models: {m: []}\n", "models.m: each price needs its own day"),
        ("models: {m: [{input: 1, output: 1}, {input: 2, output: 2}]}\n", "each price needs its own day"),
        ("models: {m: {input: 1, output: 1, flex: half}}\n", "models.m: flex is 'half': it must be a factor"),
        ("models: {m: {input: 1, output: 1, long: 272000}}\n", "models.m: long is 272000: write true or false"),
        ("models: {m: 3}\n", "models.m: a number where"),
        (
            "models:\n  m: {input: 1, output: 1}\n  m: {input: 2, output: 1}\n",
            "prices.yaml:3: not YAML: 'm' stands twice",
        ),
    ],
)
def test_a_wrong_list_is_one_line_that_names_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        read_prices(path)
    assert complaint in str(caught.value)
    assert "prices.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_list_and_one_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_prices(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_prices(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (None, "not known"),
        (0.0, "$0.00"),
        (1234.5, "$1,234.50"),
        (0.999, "$1.00"),
        (0.31, "$0.31"),
        (0.00312, "$0.0031"),
    ],
)
def test_sums_for_people(cost: float | None, text: str) -> None:
    assert dollars_text(cost) == text

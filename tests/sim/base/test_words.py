"""Figures in words: what a reader takes from them is true."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.base.words import between, duration, number, percent, percent_at_most, seconds_text, time_unit
from sim.experiment.results import Estimate, at_most
from sim.reporting.report_text import interval

SECONDS = {"s": 1.0, "min": 60.0, "h": 3_600.0, "d": 86_400.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.35, "0.35 s"),
        (9.96, "10 s"),
        (59.7, "1 min"),
        (60.0, "1 min"),
        (1450.0, "24 min 10 s"),
        (3_599.6, "1 h"),
        (5_280.0, "1 h 28 min"),
        (86_399.0, "1 d"),
        (187_200.0, "2 d 4 h"),
        (-90.0, "−1 min 30 s"),
        (math.nan, "not known"),
        (math.inf, "never"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0.001, 1e8))
def test_a_duration_reads_back_within_its_rounding(seconds: float) -> None:
    parts = re.findall(r"([\d.,]+) (s|min|h|d)", duration(seconds))
    read = sum(float(n.replace(",", "")) * SECONDS[unit] for n, unit in parts)
    smallest = SECONDS[parts[-1][1]] if len(parts) > 1 else 0.0
    assert read == pytest.approx(seconds, rel=0.06 if seconds < 9.95 else 0.009, abs=smallest / 2.0 + 0.5)
    # No part reaches the unit above it.
    assert all(float(n.replace(",", "")) < 60.0 for n, unit in parts if unit in ("s", "min"))


@given(st.floats(1e-12, 1.0))
def test_an_upper_limit_is_never_rounded_down(ratio: float) -> None:
    shown = float(percent_at_most(ratio).removesuffix(" %")) / 100.0
    assert shown >= ratio * (1.0 - 1e-9)
    assert shown <= min(1.0, 1.11 * ratio)


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_less_than_everything_is_never_100_percent(ratio: float) -> None:
    shown = float(percent(ratio).removesuffix(" %"))
    assert shown < 100.0
    assert shown == pytest.approx(100.0 * ratio, rel=0.052, abs=1e-9)


def test_shares_and_counts() -> None:
    assert [percent(x) for x in (0.0, 0.004, 0.0412, 0.731, 0.999, 1.0, 1.24, -0.021)] == [
        *("0 %", "0.4 %", "4.1 %", "73 %", "99.9 %", "100 %", "124 %", "−2.1 %")
    ]
    assert [number(x) for x in (0.0, 3.0, 0.004, 0.6667, 19.67, 12_345.6, -2.5)] == [
        *("0", "3", "0.004", "0.67", "19.7", "12,346", "−2.50")
    ]
    assert [seconds_text(x) for x in (5_280.4, 12.34, math.nan)] == ["5,280 s", "12.3 s", "not known"]
    # 0 of 12,000: the rule of three (Clopper and Pearson, one-sided) gives 3/n, 0.02496 %.
    assert percent_at_most(at_most(0, 12_000)) == "0.025 %"


def test_an_interval_of_one_run_is_none() -> None:
    one = Estimate(60.0, 60.0, 60.0, 60.0, 60.0, 60.0, 1)
    assert interval(one) == "one run: no interval"
    assert interval(Estimate(60.0, 50.0, 70.0, 1.0, 1.0, 1.0, 5)) == "50 s to 1 min 10 s"
    assert between(60.1, 60.2) == "1 min"
    assert between(0.1, 0.2, "percent") == "10 % to 20 %"


@pytest.mark.parametrize(
    ("span", "unit"), [(100.0, "s"), (200.0, "min"), (10_000.0, "min"), (20_000.0, "h"), (3e5, "days")]
)
def test_an_axis_of_time_has_the_unit_that_gives_few_digits(span: float, unit: str) -> None:
    per, name = time_unit(span)
    assert name == unit
    assert 3.0 <= span / per < 190.0

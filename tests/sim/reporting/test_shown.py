"""Text for people: layout, and the sentence that names what holds a batch back."""

from __future__ import annotations

import math

import pytest

from governor.model.phrases import WAITED_FOR
from governor.model.policy import KNOB_BY_ENV, Policy
from governor.model.requests import CAUSES
from sim.base.layout import facts, table
from sim.reporting.terminal import held_back, inputs_text, plain, waits_text


def waits(**seconds: float) -> dict[str, float]:
    return {cause: seconds.get(cause, 0.0) for cause in CAUSES[1:]}


def test_a_table_is_aligned() -> None:
    text = table([["", "now", "then"], ["finishes after", "1 h", "24 min 10 s"], ["429s", "0", "1,000"]])
    assert text.splitlines() == [
        "                now         then",
        "--------------  ---  -----------",
        "finishes after  1 h  24 min 10 s",
        "429s              0        1,000",
    ]


def test_the_last_column_wraps() -> None:
    text = table([["knob", "why"], ["A", "one two three four five six seven eight nine"]], width=34)
    assert text.splitlines() == [
        "knob  why",
        "----  ----------------------------",
        "A     one two three four five six",
        "      seven eight nine",
    ]
    assert facts([("a", "b"), ("long", "c")], 80) == "a     b\nlong  c"


def test_the_binding_knob_is_named_with_its_value() -> None:
    policy = Policy(max_concurrency=7)
    assert held_back(waits(concurrency=9.0, tpm=1.0), policy, 0.0, 0.0) == (
        "Held back by OPENAI_MAX_CONCURRENCY=7: of all waiting, 90 % for a free place in flight."
    )
    assert held_back(waits(), policy, 0.0, 0.0).startswith("Nothing held it back")
    # Two that hold it about equally are both named; a third never is.
    text = held_back(waits(stagger=50.0, tpm=45.0, rpm=44.0), policy, 0.0, 0.0)
    assert "OPENAI_STAGGER_SECONDS=15 and OPENAI_TPM_LIMIT=30000 (less 15 % headroom)" in text
    assert "RPM" not in text
    assert " and " not in held_back(waits(stagger=50.0, tpm=39.0), policy, 0.0, 0.0)


def test_a_flat_reservation_above_the_charge_is_named_with_the_budget() -> None:
    def reasons(policy: Policy, reserved: float) -> bool:
        return "OPENAI_EST_TOKENS_PER_RUN" in held_back(waits(tpm=1.0), policy, reserved, 1_000.0)

    assert reasons(Policy(), 7_000.0)
    assert not reasons(Policy(), 1_200.0)
    assert not reasons(Policy(charge_rule="max_of"), 7_000.0)


def test_a_day_s_budget_is_the_one_that_is_set() -> None:
    assert "OPENAI_TPD_LIMIT=9" in held_back(waits(day=1.0), Policy(tpd_limit=9, rpd_limit=8), 0.0, 0.0)
    assert "OPENAI_RPD_LIMIT=8" in held_back(waits(day=1.0), Policy(rpd_limit=8), 0.0, 0.0)


def test_every_cause_has_its_words_and_a_knob_that_exists() -> None:
    assert set(WAITED_FOR) == set(CAUSES[1:])
    assert {env for env, _ in WAITED_FOR.values()} - set(KNOB_BY_ENV) == {""}
    for cause in CAUSES[1:]:
        assert WAITED_FOR[cause][1] in held_back(waits(**{cause: 1.0}), Policy(), 0.0, 0.0)


def test_shares_of_waiting() -> None:
    assert waits_text(waits(tpm=3.0, stagger=1.0)) == "tpm 75 %, stagger 25 %"
    assert waits_text(waits()) == "no request waited"
    # What is below half a percent is left out.
    assert "rpm" not in waits_text(waits(tpm=1_000.0, rpm=1.0))


def test_inputs_are_grouped_by_label() -> None:
    text = inputs_text({"a": ("assumed", "guess"), "bcd": ("measured", "file"), "e": ("assumed", "guess 2")}, 60)
    assert text.splitlines() == ["measured  bcd  file", "assumed   a    guess", "          e    guess 2"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(value: float) -> None:
    assert plain({"a": [value, 1.5, {"b": (value, "x")}], "c": None}) == {
        "a": [None, 1.5, {"b": [None, "x"]}],
        "c": None,
    }

"""The start guard and the forecast behind it: independent arithmetic, and timetables of runs that fall behind."""

from __future__ import annotations

from datetime import date

import pytest

from governor.forecast.forecast import (
    Demand,
    Expectation,
    Outlook,
    assumed_answer,
    cost_forecast,
    cost_text,
    finish_text,
    fluid,
    held_back_text,
    throttles_text,
    together,
)
from governor.forecast.guard import (
    MeasuredFigures,
    Track,
    canary_note,
    canary_verdict,
    check_finish,
    check_fits,
    check_preflight,
)
from governor.model.errors import Oversized, Refused
from governor.model.estimate import CHAT, EMBEDDINGS, Sizes, charge_of
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Price, Prices
from governor.model.requests import Request
from governor.model.words import duration, knob_text, percent, plural, seconds_of

DAY = date(2026, 1, 1)


def sizes(prompt: int = 100, cap: int = 400, endpoint: int = CHAT, n: int = 1) -> Sizes:
    return Sizes(endpoint, prompt, 4 * prompt, 4, 1, 0, 0, n, cap)


def demand(count: int, policy: Policy, model: str = "m", cap: int = 400) -> Demand:
    found = Demand()
    for _ in range(count):
        found.add(model, sizes(cap=cap), charge_of(policy.charge_rule, sizes(cap=cap), policy.est_tokens_per_run))
    return found


def outlook(count: int, policy: Policy) -> Outlook:
    return Outlook(pool=Pool(policy=policy), demand=demand(count, policy))


def expected(**changes: object) -> Expectation:
    values: dict[str, object] = {
        "by": "simulation",
        "runs": 20,
        "requests": 100,
        "finish_s": 100.0,
        "low_s": 95.0,
        "high_s": 105.0,
        "throttled": 0.0,
        "throttled_low": 0.0,
        "throttled_high": 1.0,
        "attempts": 100.0,
        "attempts_low": 100.0,
        "attempts_high": 101.0,
        "bound": "tpm",
        "service_s": 2.0,
        "answer_tokens": {"m": 10_000.0},
        "milestones": ((0.0, 0.0, 0.0), (0.5, 48.0, 52.0), (1.0, 95.0, 105.0)),
    }
    return Expectation(**(values | changes))  # type: ignore[arg-type]


# ---------------------------------------------------------------- the fluid expectation


def test_the_default_stagger_makes_200_000_lines_take_35_days() -> None:
    e = fluid(outlook(200_000, Policy(charge_rule="auto")))
    assert e.bound == "stagger"
    assert e.finish_s / 86_400.0 == pytest.approx(200_000 * 15 / 86_400.0, rel=1e-3)
    with pytest.raises(Refused, match=r"34 d 17 h from now, more than a day; held back by OPENAI_STAGGER_SECONDS=15"):
        check_finish(e.finish_s, None, held_back_text(e, Pool()))


def test_a_fluid_forecast_says_what_it_is_and_has_no_interval() -> None:
    e = fluid(outlook(10, Policy()))
    assert (e.low_s, e.high_s, e.runs) == (e.finish_s, e.finish_s, 0)
    assert "rough estimate without simulation" in finish_text(e)
    assert throttles_text(e) == "not estimated"


def test_the_assumed_time_of_an_answer() -> None:
    # A quarter of a cap of 400 is 100 tokens: 0.214 s + 100 x 19.3 ms.
    assert fluid(outlook(5, Policy())).service_s == pytest.approx(0.214 + 100 * 0.0193)
    assert fluid(outlook(5, Policy()), service_s=9.0).service_s == 9.0


@pytest.mark.parametrize(
    ("s", "tokens"),
    [(sizes(cap=400), 100.0), (sizes(cap=8_000), 500.0), (sizes(cap=-1), 200.0), (sizes(cap=400, n=3), 300.0)],
)
def test_assumed_answers(s: Sizes, tokens: float) -> None:
    assert assumed_answer(s) == tokens


def test_embeddings_answer_nothing() -> None:
    found = Demand()
    found.add("e", sizes(cap=-1, endpoint=EMBEDDINGS), 10)
    assert (assumed_answer(sizes(endpoint=EMBEDDINGS)), found.uncapped) == (0.0, 0)


def test_a_demand_adds_up() -> None:
    found = Demand()
    for model, reserve in (("a", 30), ("b", 10), ("a", 20)):
        found.add(model, sizes(), reserve)
    load = found.load()
    assert (load.count, load.total, load.largest, load.smallest) == (3, 60, 30, 10)
    assert found.models == {"a": 2, "b": 1}
    assert {model: sums[0] for (model, _, _), sums in found.billed.items()} == {"a": 200.0, "b": 100.0}
    assert list(found.rows()) == [("a", sizes()), ("b", sizes()), ("a", sizes())]
    first = found.first(2, lambda each: each.prompt_tokens)
    assert (first.requests, first.total, first.models) == (2, 200, {"a": 1, "b": 1})


def test_pools_side_by_side_end_with_the_last() -> None:
    slow = expected(finish_s=300.0, low_s=290.0, high_s=310.0, bound="rpm", answer_tokens={"m": 1.0, "n": 2.0})
    both = together([expected(), slow])
    assert both is not None
    assert (both.requests, both.finish_s, both.low_s, both.high_s, both.bound) == (200, 300.0, 290.0, 310.0, "rpm")
    assert (both.throttled_high, both.answer_tokens) == (2.0, {"m": 10_001.0, "n": 2.0})
    assert together([]) is None


# ---------------------------------------------------------------- money


def test_the_forecast_cost_by_hand() -> None:
    prices = Prices({"m": (Price(DAY, 2.0, 1.0, 10.0),)}, checked="2026-01-01")
    d = demand(1_000, Policy())
    cost = cost_forecast(d, {"m": 100_000.0}, prices, DAY)
    # 1,000 x 100 prompt tokens at $2 and 100,000 answered at $10 per million; caps allow 400,000.
    assert (cost.expected, cost.most) == (pytest.approx(0.2 + 1.0), pytest.approx(0.2 + 4.0))
    assert cost_text(cost, prices) == "about $1.20, at most $4.20 by the declared caps (prices of 2026-01-01)"


def test_a_cost_that_is_not_known_says_why() -> None:
    cost = cost_forecast(demand(3, Policy(), model="unheard-of"), {}, Prices({}), DAY)
    assert (cost.expected, cost.most) == (None, None)
    assert cost_text(cost, Prices({})) == "not known: no price for unheard-of (--prices FILE)"


def test_without_a_declared_cap_there_is_no_most() -> None:
    prices = Prices({"m": (Price(DAY, 2.0, 1.0, 10.0),)})
    cost = cost_forecast(demand(3, Policy(), cap=-1), {"m": 600.0}, prices, DAY)
    assert cost.expected is not None
    assert cost.most is None


# ---------------------------------------------------------------- before the start


def test_finish_by_replaces_the_day() -> None:
    check_finish(23 * 3_600.0, None, "x")
    check_finish(50 * 3_600.0, 60 * 3_600.0, "x")
    with pytest.raises(Refused, match=r"2 h from now, --finish-by allows 1 h 30 min; .* --finish-by 2h, .* --yes"):
        check_finish(7_200.0, 5_400.0, "x")


def test_what_can_never_fit_is_named_with_its_figures() -> None:
    request = Request(7, "q-7", "/v1/chat/completions", "m", None, sizes())
    check_fits(request, 30_000, Pool())
    with pytest.raises(Oversized, match=r"request 7 \('q-7'\) needs 30,001 tokens, the limit is 30,000"):
        check_fits(request, 30_001, Pool())
    with pytest.raises(Oversized, match="OPENAI_TPD_LIMIT"):
        check_fits(request, 20_001, Pool(policy=Policy(tpd_limit=20_000)))


def test_strict_preflight_refuses_what_paced_lets_in() -> None:
    ten = demand(10, Policy())
    check_preflight(Pool(), ten)
    with pytest.raises(Refused, match=r"503 BATCH_RATE_LIMITED: 70,000 tokens .*PREFLIGHT_MODE=strict"):
        check_preflight(Pool(policy=Policy(preflight_mode="strict")), ten)


# ---------------------------------------------------------------- while it runs


def seen(ended: int, **changes: object) -> MeasuredFigures:
    values: dict[str, object] = {
        "ended": ended,
        "failed": 0,
        "throttled": 0,
        "attempts": ended,
        "service_s": 2.0,
        "answer_tokens": 100.0,
    }
    return MeasuredFigures(**(values | changes))  # type: ignore[arg-type]


def test_a_run_that_keeps_to_its_forecast_hears_nothing() -> None:
    track = Track(expected())
    # Exactly at the latest times that were forecast.
    for now in range(0, 106):
        share = 0.5 * min(now, 52) / 52.0 + 0.5 * max(0, now - 52) / 53.0
        assert track.look(float(now), seen(int(100 * share)), "tpm") == ""


def test_a_run_that_stalls_is_told_once_with_the_reason_and_when_it_is_back() -> None:
    track = Track(expected())
    assert track.look(50.0, seen(46), "tpm") == ""
    late = track.look(65.0, seen(46, throttled=9, service_s=7.0), "hold")
    assert late.startswith("later than forecast since 1 min 5 s after the start: 46 done where 56 should be; ")
    assert "9 429s (0 to 1 expected in all)" in late
    assert "answers take 7 s (2 s expected)" in late
    assert track.late_since_s == 65.0
    assert track.look(70.0, seen(47), "hold") == ""
    assert track.look(75.0, seen(90), "") == "back within the forecast, after 10 s"
    assert track.late_since_s == -1.0


def test_the_reason_of_last_resort_is_what_it_waits_for() -> None:
    assert "it waits for day" in Track(expected()).look(90.0, seen(10), "day")
    assert "the run is paused" in Track(expected()).look(90.0, seen(10, paused=True), "paused")


def test_a_fluid_forecast_is_given_half_its_time_more() -> None:
    e = expected(by="fluid", milestones=((0.0, 0.0, 0.0), (1.0, 100.0, 100.0)))
    assert Track(e).look(60.0, seen(10), "tpm") == ""
    assert Track(e).look(80.0, seen(10), "tpm").startswith("later than forecast")


def test_a_canary_that_is_as_expected_says_nothing() -> None:
    assert canary_verdict(expected(), seen(100), 104.0) == []
    assert canary_note(expected(), seen(100)) == ""


def test_longer_answers_than_assumed_are_noted() -> None:
    assert canary_note(expected(), seen(100, answer_tokens=500.0)) == "answers have 500 tokens where 100 were assumed"


def test_a_canary_lists_everything_that_is_worse() -> None:
    found = canary_verdict(expected(), seen(100, failed=3, throttled=9, answer_tokens=500.0), 400.0)
    assert found == [
        "3 of 100 failed (3 %)",
        "9 429s where 0 to 1 were expected",
        "it took 6 min 40 s where 1 min 40 s was expected",
    ]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.35, "0.35 s"),
        (59.7, "1 min"),
        (61.0, "1 min 1 s"),
        (5_280.0, "1 h 28 min"),
        (1e9, "11,574 d 2 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert duration(float("inf")) == "never"
    assert duration(1e308) == "centuries"


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5_400.0), ("1h30m", 5_400.0), ("2 d", 172_800.0), ("1.5s", 1.5)])
def test_durations_as_people_write_them(text: str, seconds: float) -> None:
    assert seconds_of(text, "--grace") == seconds


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "1x", "0s", "1e9d"])
def test_what_is_no_duration(text: str) -> None:
    from governor.model.errors import BadSetting

    with pytest.raises(BadSetting, match="--grace"):
        seconds_of(text, "--grace")


def test_knobs_in_words() -> None:
    assert knob_text("tpm", Policy()) == "OPENAI_TPM_LIMIT=30000 (less 15 % headroom)"
    assert knob_text("day", Policy(rpd_limit=200, tpm_headroom=0.0)) == "OPENAI_RPD_LIMIT=200"
    assert knob_text("", Policy()) == "the answers' own time"
    assert (percent(0.0041), percent(1.0), plural(1, "request"), plural(2_000, "request")) == (
        "0.41 %",
        "100 %",
        "1 request",
        "2,000 requests",
    )

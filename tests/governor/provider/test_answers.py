"""What providers say, against what they were recorded saying, as docs/explanation/provider.md has it."""

from __future__ import annotations

import csv
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.model.requests import Limit, Outcome
from governor.provider import answers
from governor.provider import rate_limit_headers as stated

PHRASES = {"TPM": "tokens per min", "RPM": "requests per min", "TPD": "tokens per day", "RPD": "requests per day"}
VISIT = "Visit https://platform.openai.com/account/rate-limits to learn more."


def error_body(message: str, kind: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def rate_message(dimension: str, limit: int, used: int, requested: int, wait: str, model: str = "gpt-4o") -> str:
    return (
        f"Rate limit reached for {model} in organization org-X on {PHRASES[dimension]} ({dimension}): "
        f"Limit {limit}, Used {used}, Requested {requested}. Please try again in {wait}. {VISIT}"
    )


def chat_body(content: str | None = "hello", finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15},
    }


def response_body(text: str | None, status: str = "completed", reason: str | None = None) -> dict[str, Any]:
    output: list[dict[str, Any]] = [{"type": "reasoning", "summary": []}]
    if text is not None:
        output.append({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]})
    return {
        "object": "response",
        "status": status,
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "output": output,
        "usage": {"input_tokens": 22, "output_tokens": 50, "total_tokens": 72},
    }


# ---------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("0", 0),
        ("2ms", 0.002),
        ("120ms", 0.12),
        ("1.198s", 1.198),
        ("6m0s", 360),
        ("1m13.588s", 73.588),
        ("20m52.666s", 1252.666),
        ("23h18m29.144s", 83909.144),
        ("17.399999999s", 17.399999999),
        ("1h", 3600),
        ("114h18m0s", 411480),
        ("15µs", 15e-6),
        ("15μs", 15e-6),
        ("15us", 15e-6),
        ("3ns", 3e-9),
        (".5s", 0.5),
        ("5.s", 5),
        ("+2s", 2),
        (" 2s ", 2),
        ("1h1ms", 3600.001),
    ],
)
def test_go_durations(text: str, seconds: float) -> None:
    assert stated.duration_s(text) == pytest.approx(seconds, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    "text", ["", "s", "5", "-1s", "1.2.3s", "1d", "5 s", "soon", "1s2", "NaN", "９s", "9" * 70 + "s"]
)
def test_what_is_no_duration(text: str) -> None:
    assert stated.duration_s(text) == -1.0


@given(st.integers(0, 10**10))
def test_durations_are_printed_as_they_are_read(ms: int) -> None:
    text = stated.duration_text(ms / 1000)
    assert round(stated.duration_s(text) * 1000) == ms
    assert text.endswith("s")
    assert "e" not in text


@pytest.mark.timeout(5)
def test_a_long_run_of_digits_is_given_up_at_once() -> None:
    assert stated.duration_s("1" * 64) == -1.0
    assert stated.stated_wait_s("try again in " + "1" * 1_000_000) == -1.0
    assert stated.stated_wait_s("try again in " * 100_000) == -1.0
    assert stated.quoted_numbers("Limit " + "1," * 1_000_000).limit > 0


# ---------------------------------------------------------------- waits


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Please try again in 7m12s. Visit https://x", 432),
        ("Please try again in 644ms. Visit", 0.644),
        ("Please try again in 1.574s.", 1.574),
        ("Please try again in 114h18m0s.", 411480),
        ("Please try again in 20s", 20),
        ("Please retry after 86400 seconds.", 86400),
        ("Please retry after 86,400 seconds.", 86400),
        ("please TRY AGAIN IN 1 minute and 5 seconds", 65),
        ("Try again in 2 hours, 30 min.", 9000),
        ("retry after 250 milliseconds", 0.25),
        ("try again in 1 day", 86400),
        ("Please try again later.", -1),
        ("Please try again in 30", -1),
        ("You used 20s. Try again in a moment", -1),
        ("try again in 5 stars", -1),
        ("", -1),
    ],
)
def test_waits_stated_in_messages(message: str, seconds: float) -> None:
    assert stated.stated_wait_s(message) == pytest.approx(seconds)


NOW = 1_445_412_480.0  # Wed, 21 Oct 2015 07:28:00 GMT


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"Retry-After": "56"}, "", 56),
        ({"retry-after": "1.5"}, "Please try again in 9s.", 1.5),
        ({"retry-after": "3", "Retry-After-Ms": "250"}, "", 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, "", 3),
        ({b"retry-after": b"7"}, "", 7),
        ({"retry-after": "20s"}, "", 20),
        ({"retry-after": "Wed, 21 Oct 2015 07:29:30 GMT"}, "", 90),
        ({"retry-after": "Wed, 21 Oct 2015 07:29:30 -0000"}, "", 90),
        ({"retry-after": "Wed, 21 Oct 2015 07:27:00 GMT"}, "", -1),
        ({"retry-after": "Wed, 99 Oct 2015 07:27:00 GMT"}, "", -1),
        ({"retry-after": "0"}, "", -1),
        ({"retry-after": "0"}, "Please try again in 9s.", 9),
        ({"retry-after": "-5"}, "", -1),
        ({"retry-after": "nan"}, "", -1),
        ({"retry-after": "inf"}, "", -1),
        ({"retry-after": "9" * 400}, "", -1),
        ({}, "Please retry after 86400 seconds.", 86400),
        (None, "", -1),
    ],
)
def test_retry_after(headers: dict[Any, Any] | None, message: str, seconds: float) -> None:
    assert stated.retry_after_s(headers, message, now_epoch=NOW) == pytest.approx(seconds)


def test_a_date_without_a_zone_is_not_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        wait_s = stated.retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:29:30 -0000"}, now_epoch=NOW)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert wait_s == 90.0


def test_a_date_means_nothing_without_a_clock() -> None:
    assert stated.retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:29:30 GMT"}) == -1.0


# ---------------------------------------------------------------- the recorded messages


@pytest.fixture(scope="module")
def messages(data_file: Callable[[str], Path]) -> list[dict[str, str]]:
    with data_file("openai-observed/http429_messages.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def window_s(dimension: str) -> float:
    return 86_400.0 if dimension.endswith("D") else 60.0


def test_the_wait_formula_prints_the_recorded_waits(messages: list[dict[str, str]]) -> None:
    """All log-quoted messages to the ms but one, a free account's, which is the same formula over 30 days."""
    logs = [row for row in messages if row["provenance"] == "log"]
    assert len(logs) == 32
    others = []
    for row in logs:
        limit, used, requested = (int(row[name]) for name in ("limit", "used", "requested"))
        wait_s = stated.refill_wait_s(limit, used, requested, window_s(row["dimension"]))
        if stated.duration_text(wait_s) != row["try_again_in"]:
            others.append(
                (row["source"], row["try_again_in"], stated.refill_wait_s(limit, used, requested, 30 * 86_400))
            )
    assert others == [("openai/openai-dotnet#404", "114h18m0s", 411_480.0)]


def test_recorded_messages_are_read_whole(messages: list[dict[str, str]]) -> None:
    """All 39 rows, in the recorded wording: dimension, three figures, the wait, and what kind of refusal it is."""
    assert len(messages) == 39
    for row in messages:
        limit, used, requested = (int(row[name]) for name in ("limit", "used", "requested"))
        message = rate_message(row["dimension"], limit, used, requested, row["try_again_in"], row["model"])
        kind = "tokens" if row["dimension"].startswith("T") else "requests"
        answer = answers.classify(429, {}, error_body(message, kind, "rate_limit_exceeded"))
        assert stated.quoted_numbers(message) == stated.QuotedLimit(row["dimension"], limit, used, requested)
        assert answer.outcome is Outcome.THROTTLED
        assert answer.retry_after_s == pytest.approx(float(row["wait_s"]), abs=1e-9)


@given(st.integers(1, 10**8), st.data(), st.sampled_from([60.0, 86_400.0]))
def test_the_two_formulas_agree_and_floor(limit: int, data: st.DataObject, length_s: float) -> None:
    used = data.draw(st.integers(0, limit))
    requested = data.draw(st.integers(0, limit))
    wait_s = stated.refill_wait_s(limit, used, requested, length_s)
    exact_ms = max(Fraction(0), Fraction(used + requested - limit, limit) * int(length_s * 1000))
    assert wait_s * 1000 == pytest.approx(round(wait_s * 1000), abs=1e-6)
    # Floored; where the exact value is a whole ms, floating point may lose it.
    assert -1e-6 <= float(exact_ms) - wait_s * 1000 <= 1 + 1e-6
    # What a whole limit's request waits for is what was used: the bucket must be full again.
    assert stated.refill_reset_s(limit, limit - used, length_s) == stated.refill_wait_s(limit, used, limit, length_s)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Rate limit reached for default-gpt-3.5-turbo in organization org-x on requests per min. "
            "Limit: 3 / min. Please try again in 20s.",
            stated.QuotedLimit("RPM", 3),
        ),
        (
            "on tokens per min. Limit: 10,000 / min. Current: 9,820.5 / min.",
            stated.QuotedLimit("TPM", 10_000, 9_820.5),
        ),
        ("on tokens per day (TPD): Limit 5, Used 4, Requested 2.", stated.QuotedLimit("TPD", 5, 4, 2)),
        ("Limitless, used to it", stated.QuotedLimit()),
        ("", stated.QuotedLimit()),
    ],
)
def test_figures_in_other_wordings(message: str, expected: stated.QuotedLimit) -> None:
    assert stated.quoted_numbers(message) == expected


# ---------------------------------------------------------------- the recorded headers


@pytest.fixture(scope="module")
def responses(data_file: Callable[[str], Path]) -> list[dict[str, str]]:
    with data_file("openai-observed/ratelimit_header_observations.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 709
    return rows


def headers_of(row: dict[str, str]) -> dict[str, str]:
    return {
        f"X-RateLimit-{part.capitalize()}-{kind.capitalize()}": row[f"{part}_{kind}"]
        for kind in ("requests", "tokens")
        for part in ("limit", "remaining", "reset")
        if row[f"{part}_{kind}"]
    }


def test_recorded_durations_are_printed_as_recorded(responses: list[dict[str, str]]) -> None:
    texts = {
        row[name] for row in responses for name in ("reset_requests", "reset_tokens") if row["provider"] == "openai"
    }
    texts.discard("")
    assert len(texts) > 50
    for text in texts:
        assert stated.duration_text(stated.duration_s(text)) == text


def reset_kind(row: dict[str, str], kind: str) -> str:
    """How a recorded reset relates to the formula over a minute, or over a day.

    `exact` to the ms; `near` within 1 ms; `fraction`: less, by up to one unit's refill, because the bucket holds part
    of a unit that `remaining` rounds away; `day`: either of these over 86,400 s.
    """
    limit, remaining = int(row[f"limit_{kind}"]), int(row[f"remaining_{kind}"])
    reset_ms = round(stated.duration_s(row[f"reset_{kind}"]) * 1000)

    def span_ms(length_s: float) -> tuple[int, int]:
        low, high = (stated.refill_reset_s(limit, remaining + less, length_s) for less in (1, 0))
        return round(low * 1000), round(high * 1000)

    low, high = span_ms(60.0)
    if reset_ms == high:
        return "exact"
    if abs(reset_ms - high) <= 1:
        return "near"
    if low <= reset_ms <= high:
        return "fraction"
    low, high = span_ms(86_400.0)
    return "day" if low <= reset_ms <= high else "none"


def test_the_reset_formula_holds_for_requests(responses: list[dict[str, str]]) -> None:
    """docs/explanation/provider.md#buckets: 588 exact, 15 with a fraction of a request, 34 on a day's window, of 637.

    Its `exact` allows the ms that a floored fraction can cost.
    """
    rows = [row for row in responses if row["provider"] == "openai" and row["reset_tokens"]]
    kinds = Counter(reset_kind(row, "requests") for row in rows)
    assert len(rows) == 637
    assert (kinds["exact"] + kinds["near"], kinds["fraction"], kinds["day"]) == (588, 15, 34)


def test_the_reset_formula_holds_for_tokens(responses: list[dict[str, str]]) -> None:
    """docs/explanation/provider.md#buckets: 635 of 637. The others, of 2023, are short: 2 ms for 90 of 1,000,000."""
    rows = [row for row in responses if row["provider"] == "openai" and row["reset_tokens"]]
    kinds = [(reset_kind(row, "tokens"), row) for row in rows]
    others = [
        (row["limit_tokens"], row["remaining_tokens"], row["reset_tokens"]) for kind, row in kinds if kind == "none"
    ]
    assert others == [("1000000", "999910", "2ms")] * 2
    assert Counter(kind for kind, _ in kinds if kind != "none").keys() <= {"exact", "near", "fraction"}
    # Not one reset lies above the formula, not even by a ms: `remaining` is rounded down.
    for _, row in kinds:
        limit, remaining = int(row["limit_tokens"]), int(row["remaining_tokens"])
        assert stated.duration_s(row["reset_tokens"]) <= stated.refill_reset_s(limit, remaining, 60.0)


def test_recorded_headers_become_limits(responses: list[dict[str, str]]) -> None:
    """All 709 rows. Requests are daily in 34 of OpenAI's (section 3) and in all of Groq's: 14,400, one back in 6 s."""
    seen: Counter[tuple[str, str]] = Counter()
    for row in responses:
        found = {limit.dimension: limit for limit in stated.limits_of(headers_of(row))}
        for dimension, limit in found.items():
            kind = "tokens" if dimension.startswith("T") else "requests"
            assert limit == Limit(dimension, float(row[f"limit_{kind}"]), float(row[f"remaining_{kind}"]))
            seen[row["provider"], dimension] += 1
        told = [kind for kind in ("requests", "tokens") if row[f"limit_{kind}"] and row[f"remaining_{kind}"]]
        assert len(found) == len(told)
    assert seen == {
        ("openai", "RPM"): 638 - 34,
        ("openai", "RPD"): 34,
        ("openai", "TPM"): 637,
        ("groq", "RPD"): 13,
        ("groq", "TPM"): 13,
        # The other 6 of Azure's 58 state what remains without the limit.
        ("azure", "RPM"): 52,
        ("azure", "TPM"): 52,
    }


LIMIT, REMAINING, RESET = (f"x-ratelimit-{part}-tokens" for part in ("limit", "remaining", "reset"))


@pytest.mark.parametrize(
    ("limit", "remaining"),
    [
        ("-1", "-1"),
        ("0", "0"),
        ("120000", "120001"),
        ("nan", "nan"),
        ("120000", "nan"),
        ("inf", "5"),
        ("120000", "many"),
        ("", "5"),
        ("120000", ""),
        ("9" * 100, "5"),
    ],
)
def test_implausible_limits_are_ignored(limit: str, remaining: str) -> None:
    assert stated.limits_of({LIMIT: limit, REMAINING: remaining, RESET: "0"}) == ()


def test_a_negative_remaining_is_an_overshoot() -> None:
    assert stated.limits_of({LIMIT: "120000", REMAINING: "-27689", RESET: "64"}) == (Limit("TPM", 120_000, -27_689),)


@pytest.mark.parametrize("reset", ["7", "64", "500", "-1", "", "soon", "2023-01-01T00:00:00Z"])
def test_a_reset_of_unknown_unit_decides_nothing(reset: str) -> None:
    """Azure sends integers, once as ms and once as what may be seconds: not even 500 makes this a daily limit."""
    headers = {"x-ratelimit-limit-requests": "120", "x-ratelimit-remaining-requests": "119"}
    assert stated.limits_of(headers | {"x-ratelimit-reset-requests": reset}) == (Limit("RPM", 120, 119),)
    assert stated.limits_of({LIMIT: "120000", REMAINING: "119986", RESET: reset}) == (Limit("TPM", 120000, 119986),)


@given(st.integers(1, 10**6), st.data(), st.sampled_from(["minute", "day"]))
def test_the_window_is_told_from_the_reset(limit: int, data: st.DataObject, window: str) -> None:
    """Whatever the fraction of a request in the bucket, a reset tells a day from half a request used up."""
    used = data.draw(st.floats(0.1 if window == "minute" else 0.5, limit))
    length_s = {"minute": 60.0, "day": 86_400.0}[window]
    remaining = math.floor(limit - used)
    reset_s = stated.refill_reset_s(limit, limit - used, length_s)
    # Where a day's worth of refill takes less than 100 ms, flooring to ms may cost more than the 1 % that is allowed.
    if window == "day" and used / limit * 86_400 < 0.1:
        return
    assert stated.dimension_of(limit, remaining, reset_s, "minute", "day") == window


@pytest.mark.parametrize(("used", "reset_s"), [(1, 50.0), (2, 59.0), (7, 31.0), (400, 12.0)])
def test_a_counter_emptied_once_a_minute_is_no_daily_limit(used: int, reset_s: float) -> None:
    """Its reset is the rest of the minute, whatever is used: by the bucket's formula anything from 60 s to hours."""
    assert stated.dimension_of(500.0, 500.0 - used, reset_s, "minute", "day") == "minute"


def test_a_projects_smaller_limit_stands_for_its_dimension() -> None:
    headers = {
        "x-ratelimit-limit-tokens": "150000000",
        "x-ratelimit-remaining-tokens": "149999982",
        "x-ratelimit-limit-project-tokens": "60000",
        "x-ratelimit-remaining-project-tokens": "57000",
        "x-ratelimit-reset-project-tokens": "3s",
        "x-ratelimit-limit-requests": "30000",
        "x-ratelimit-remaining-requests": "29999",
        "x-ratelimit-reset-requests": "2ms",
        "x-ratelimit-limit-input-images": "50",
        "x-ratelimit-remaining-input-images": "49",
    }
    assert set(stated.limits_of(headers)) == {Limit("TPM", 60_000, 57_000), Limit("RPM", 30_000, 29_999)}


def test_anthropics_headers() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-requests-reset": "2026-10-04T12:00:01Z",
        "anthropic-ratelimit-input-tokens-limit": "40000",
        "anthropic-ratelimit-input-tokens-remaining": "39000",
    }
    assert set(stated.limits_of(headers)) == {Limit("RPM", 50, 49), Limit("TPM", 40_000, 39_000)}


# ---------------------------------------------------------------- classify

QUOTA = "You exceeded your current quota, please check your plan and billing details."
TOO_LARGE = (
    "Request too large for gpt-4o in organization org-X on tokens per min (TPM): Limit 30000, Requested 31538. "
    f"The input or output tokens must be reduced in order to run successfully. {VISIT}"
)
AZURE = (
    "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2023-05-15 have exceeded token "
    "rate limit of your current AIServices S0 pricing tier. Please retry after 86400 seconds. Please contact Azure"
)
AZURE_NEW = (
    "Your requests to gpt-4o for gpt-4o in East US have exceeded token rate limit. Please retry after 4 seconds."
)
LIMITED = rate_message("TPM", 30000, 29937, 385, "644ms")
FAILED = {"status": "failed", "output": [], "error": {"code": "rate_limit_exceeded", "message": LIMITED}}

REFUSALS: list[tuple[int, object, Outcome]] = [
    (429, error_body(LIMITED, "tokens", "rate_limit_exceeded"), Outcome.THROTTLED),
    (429, error_body(rate_message("RPD", 200, 200, 1, "7m12s"), "requests", "rate_limit_exceeded"), Outcome.THROTTLED),
    (429, error_body(TOO_LARGE, "tokens", "rate_limit_exceeded"), Outcome.TOO_LARGE),
    (429, error_body(rate_message("TPM", 30000, 10, 30001, "20s"), "tokens", "rate_limit_exceeded"), Outcome.TOO_LARGE),
    (429, error_body(rate_message("TPM", 30000, 10, 30000, "20s"), "tokens", "rate_limit_exceeded"), Outcome.THROTTLED),
    (413, error_body("Request exceeds the maximum size", "request_too_large"), Outcome.TOO_LARGE),
    *[
        (429, error_body("You have no credits remaining.", kind, code), Outcome.QUOTA)
        for code in (
            "insufficient_quota",
            "credit_balance_exhausted",
            "organization_spend_limit_exceeded",
            "project_spend_limit_exceeded",
            "organization_usage_limit_exceeded",
            "billing_hard_limit_reached",
            "billing_not_active",
        )
        for kind in ("insufficient_quota", None)
    ],
    (429, error_body("You have no credits remaining.", "insufficient_quota"), Outcome.QUOTA),
    (429, error_body("Add credits", None, "credit_balance_exhausted"), Outcome.QUOTA),
    (403, error_body(QUOTA, "insufficient_quota", "insufficient_quota"), Outcome.QUOTA),
    (429, error_body(QUOTA), Outcome.QUOTA),
    (429, error_body(QUOTA, "RESOURCE_EXHAUSTED", "429"), Outcome.THROTTLED),
    (402, None, Outcome.BAD_REQUEST),
    (429, error_body("You are ramping too fast", "rate_limit_error", "slow_down"), Outcome.SLOW_DOWN),
    (503, error_body("Slow down", "service_unavailable_error", "slow_down"), Outcome.SLOW_DOWN),
    (503, error_body("busy", "service_unavailable_error", "server_is_overloaded"), Outcome.OVERLOADED),
    (503, "<html>Service Unavailable</html>", Outcome.OVERLOADED),
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, Outcome.OVERLOADED),
    (500, error_body("The server had an error while processing your request.", "server_error"), Outcome.SERVER_ERROR),
    (500, None, Outcome.SERVER_ERROR),
    (502, b"\xff\xfe", Outcome.SERVER_ERROR),
    (504, "", Outcome.SERVER_ERROR),
    (409, None, Outcome.SERVER_ERROR),
    (408, None, Outcome.TIMEOUT),
    (400, error_body("too long", "invalid_request_error", "context_length_exceeded"), Outcome.BAD_REQUEST),
    (400, error_body("max_tokens is too large: 50000.", "invalid_request_error", "invalid_value"), Outcome.BAD_REQUEST),
    (422, None, Outcome.BAD_REQUEST),
    (404, error_body("no such route", "invalid_request_error"), Outcome.BAD_REQUEST),
    (404, error_body("The model does not exist", "invalid_request_error", "model_not_found"), Outcome.BAD_REQUEST),
    (404, error_body("The API deployment does not exist", None, "DeploymentNotFound"), Outcome.BAD_REQUEST),
    (401, error_body("Incorrect API key provided", "invalid_request_error", "invalid_api_key"), Outcome.UNAUTHORIZED),
    (403, error_body("Country not supported", "request_forbidden"), Outcome.BAD_REQUEST),
    (429, error_body(AZURE, None, "429"), Outcome.THROTTLED),
    (429, error_body(AZURE_NEW, None, "429"), Outcome.THROTTLED),
    (429, {"error": "Resource Unavailable"}, Outcome.THROTTLED),
    (429, error_body("Resource Unavailable", None, "resource_unavailable"), Outcome.THROTTLED),
    (429, None, Outcome.THROTTLED),
    (429, [error_body(LIMITED, "tokens", "rate_limit_exceeded")], Outcome.THROTTLED),
    (429, {"message": LIMITED, "code": "rate_limit_exceeded"}, Outcome.THROTTLED),
    (200, FAILED, Outcome.THROTTLED),
    (200, {"type": "response.failed", "response": FAILED}, Outcome.THROTTLED),
    (200, {"type": "error", "code": "rate_limit_exceeded", "message": LIMITED}, Outcome.THROTTLED),
    (200, {"status": "failed", "output": [], "error": {"code": "insufficient_quota", "message": ""}}, Outcome.QUOTA),
    (200, {"status": "failed", "output": [], "error": {"code": "server_error", "message": ""}}, Outcome.SERVER_ERROR),
    (200, {"status": "failed", "output": [], "error": {"code": "invalid_prompt", "message": ""}}, Outcome.BAD_REQUEST),
    (200, {"status": "failed", "output": [], "error": {"code": "vector_store_timeout"}}, Outcome.SERVER_ERROR),
    (200, {"status": "failed", "output": [], "error": None}, Outcome.SERVER_ERROR),
    (200, {"status": "queued", "output": [], "error": None}, Outcome.MALFORMED),
    (200, '{"choices": [{"message": {"content": "hel', Outcome.MALFORMED),
    (200, "", Outcome.MALFORMED),
    (200, None, Outcome.MALFORMED),
    (200, {}, Outcome.MALFORMED),
    (200, [], Outcome.MALFORMED),
    (200, {"choices": []}, Outcome.MALFORMED),
    (200, {"choices": [None]}, Outcome.MALFORMED),
    (200, {"choices": "none"}, Outcome.MALFORMED),
    (200, {"type": [], "status": {}}, Outcome.MALFORMED),
    (204, "", Outcome.MALFORMED),
    (302, None, Outcome.BAD_REQUEST),
    (0, None, Outcome.SERVER_ERROR),
    (-7, None, Outcome.SERVER_ERROR),
    (999, None, Outcome.SERVER_ERROR),
]


@pytest.mark.parametrize(("status", "body", "outcome"), REFUSALS)
def test_which_refusal_it_is(status: int, body: object, outcome: Outcome) -> None:
    answer = answers.classify(status, {"x-request-id": "req_1"}, body)
    assert answer.outcome is outcome
    assert (answer.status, answer.request_id) == (status, "req_1")
    assert not answer.has_text
    assert not answer.cut_off
    if isinstance(body, (dict, list)):
        assert answers.classify(status, {"x-request-id": "req_1"}, json.dumps(body)) == answer
        assert answers.classify(status, {"X-Request-Id": "req_1"}, json.dumps(body).encode()) == answer


@pytest.mark.parametrize(
    ("body", "code", "wait_s"),
    [
        (error_body(LIMITED, "tokens", "rate_limit_exceeded"), "rate_limit_exceeded", 0.644),
        (error_body(AZURE, None, "429"), "429", 86_400),
        (error_body(AZURE_NEW, None, "429"), "429", 4),
        (error_body(TOO_LARGE, "tokens", "rate_limit_exceeded"), "rate_limit_exceeded", -1),
        (error_body(QUOTA, "insufficient_quota"), "insufficient_quota", -1),
        (FAILED, "rate_limit_exceeded", 0.644),
    ],
)
def test_code_and_wait_of_a_refusal(body: dict[str, Any], code: str, wait_s: float) -> None:
    answer = answers.classify(429, None, body)
    assert answer.error_code == code
    assert answer.retry_after_s == pytest.approx(wait_s)
    assert answer.message == body["error"]["message"]


def test_a_refusal_carries_limits_and_use() -> None:
    """Failed requests state their headers too; a refused one inside a 200 states its usage."""
    headers = {LIMIT: "30000", REMAINING: "63", RESET: "59.874s", "Retry-After": "2", "apim-request-id": "az-1"}
    answer = answers.classify(429, headers, error_body(LIMITED, "tokens", "rate_limit_exceeded"))
    assert answer.limits == (Limit("TPM", 30_000, 63),)
    assert (answer.retry_after_s, answer.request_id, answer.used_prompt_tokens) == (2.0, "az-1", -1)


@pytest.mark.parametrize(
    ("body", "used", "cut_off", "has_text"),
    [
        (chat_body(), (11, 4), False, True),
        (chat_body(None), (11, 4), False, False),
        (chat_body("", "length"), (11, 4), True, False),
        (chat_body(" \n", "length"), (11, 4), True, False),
        (chat_body("half an ans", "length"), (11, 4), True, True),
        ({"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]}, (-1, -1), False, True),
        ({"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}, (-1, -1), False, True),
        ({"choices": [{"text": "once", "finish_reason": "length"}], "usage": None}, (-1, -1), True, True),
        (response_body("hello"), (22, 50), False, True),
        (response_body(None, "incomplete", "max_output_tokens"), (22, 50), True, False),
        (response_body("half", "incomplete", "max_output_tokens"), (22, 50), True, True),
        (response_body(None, "incomplete", "content_filter"), (22, 50), False, False),
        ({"data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": 8, "total_tokens": 8}}, (8, 0), False, False),
        (chat_body() | {"usage": {"prompt_tokens": -3, "completion_tokens": "4"}}, (-1, -1), False, True),
        (chat_body() | {"usage": {"prompt_tokens": 3, "completion_tokens": True}}, (3, -1), False, True),
    ],
)
def test_what_an_answer_holds(body: dict[str, Any], used: tuple[int, int], cut_off: bool, has_text: bool) -> None:
    answer = answers.classify(200, {"retry-after": "5"}, body)
    assert answer.outcome is Outcome.OK
    assert (answer.used_prompt_tokens, answer.used_output_tokens) == used
    assert (answer.cut_off, answer.has_text) == (cut_off, has_text)
    assert (answer.retry_after_s, answer.message, answer.error_code, answer.body) == (-1.0, "", "", body)


def test_a_streams_last_event_is_the_response() -> None:
    inner = response_body(None, "incomplete", "max_output_tokens")
    event = {"type": "response.incomplete", "sequence_number": 9, "response": inner}
    assert answers.classify(200, {}, event) == answers.classify(200, {}, inner)


def test_recorded_statuses(responses: list[dict[str, str]]) -> None:
    """Every recorded response, with the body that its usage implies: 702 answers, and 7 refused as bad requests."""
    outcomes: Counter[Outcome] = Counter()
    for row in responses:
        usage = {
            "prompt_tokens": int(row["prompt_tokens"] or 0),
            "completion_tokens": int(row["completion_tokens"] or 0),
        }
        good = chat_body() | {"usage": usage}
        body = good if row["status"] == "200" else error_body("bad", "invalid_request_error")
        answer = answers.classify(int(row["status"]), headers_of(row), body)
        outcomes[answer.outcome] += 1
        if answer.outcome is Outcome.OK:
            assert (answer.used_prompt_tokens, answer.used_output_tokens) == tuple(usage.values())
        assert answer.limits == stated.limits_of(headers_of(row))
    assert outcomes == {Outcome.OK: 702, Outcome.BAD_REQUEST: 7}


def test_a_cut_answer_stays_out_of_the_message() -> None:
    answer = answers.classify(200, {}, '{"choices": [{"message": {"content": "the patient is')
    assert "patient" not in answer.message
    assert answer.message


def test_a_key_stays_out_of_the_message() -> None:
    key = "sk-proj-abcDEF123_456-789xyz"
    answer = answers.classify(
        401, {}, error_body(f"Incorrect API key provided: {key}. Find yours.", None, "invalid_api_key")
    )
    assert answer.message == "Incorrect API key provided: sk-*** Find yours."
    assert "sk-" not in answers.classify(401, {}, f"bad {key}").message.replace("sk-***", "")


def test_attempts_without_an_answer() -> None:
    made = [answers.timed_out(), answers.dropped("reset by peer"), answers.malformed("no JSON", 200)]
    assert [answer.outcome for answer in made] == [Outcome.TIMEOUT, Outcome.DROPPED, Outcome.MALFORMED]
    assert [answer.status for answer in made] == [0, 0, 200]
    assert made[1].message == "reset by peer"


ANSWER_FIELDS = ["choices", "message", "content", "text", "refusal", "finish_reason", "output", "data", "response"]
ERROR_FIELDS = ["error", "type", "code", "message", "detail", "status", "incomplete_details", "reason"]
USAGE_FIELDS = ["usage", "prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"]
FIELDS = st.sampled_from([*ANSWER_FIELDS, *ERROR_FIELDS, *USAGE_FIELDS])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=20,
)
NAMES = ["retry-after", "Retry-After-Ms", LIMIT, REMAINING, RESET, "x-request-id", "x-ratelimit-limit-requests"]
VALUES = st.text() | st.binary() | st.integers() | st.floats() | st.none()
HEADERS = st.none() | st.dictionaries(st.sampled_from(NAMES) | st.text() | st.binary(), VALUES, max_size=6)
WORDS = st.sampled_from(
    ["Limit", "Used", "Requested", "try again in", "retry after", "5", "9s", "1e9", "(TPM)", ":", ","]
)
MESSAGES = st.lists(WORDS | st.text(max_size=5)).map(" ".join)
STATUSES = st.integers() | st.sampled_from([200, 400, 401, 404, 429, 500, 503])


@given(STATUSES, HEADERS, JSON | st.text() | st.binary() | JSON.map(json.dumps) | MESSAGES.map(error_body))
def test_odd_answers_are_classified_and_never_raise(status: int, headers: Any, body: object) -> None:
    answer = answers.classify(status, headers, body, now_epoch=NOW)
    assert answer.retry_after_s == -1.0 or 0.0 < answer.retry_after_s < math.inf
    assert answer.used_prompt_tokens >= -1
    assert answer.used_output_tokens >= -1
    assert all(0.0 <= limit.remaining <= limit.limit < math.inf for limit in answer.limits)
    if answer.outcome is Outcome.OK:
        assert 200 <= status < 300
        assert isinstance(answer.body, dict)
    else:
        assert not answer.cut_off
        assert not answer.has_text


@given(MESSAGES | st.text())
def test_odd_messages_give_plausible_figures(message: str) -> None:
    quoted = stated.quoted_numbers(message)
    assert quoted.dimension in {"", "TPM", "RPM", "TPD", "RPD"}
    assert all(value == -1.0 or 0.0 <= value < math.inf for value in (quoted.limit, quoted.used, quoted.requested))
    assert stated.stated_wait_s(message) >= -1.0
    assert stated.duration_s(message) >= -1.0

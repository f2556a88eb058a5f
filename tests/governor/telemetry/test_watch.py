"""What a live run notices: figures against hand counts, and warnings that come once, with the setting to change."""

from __future__ import annotations

import io
import json
from datetime import date
from types import SimpleNamespace

import pytest

from governor.forecast.forecast import Expectation
from governor.law import State
from governor.model.estimate import CHAT, Sizes
from governor.model.policy import Policy
from governor.model.pools import Pool
from governor.model.prices import Price, Prices, Spending
from governor.model.requests import Answer, Attempt, Limit, Outcome, Request
from governor.model.work import Job, Work
from governor.provider.answers import dropped
from governor.telemetry.eventlog import EventLog
from governor.telemetry.watch import Alarms, Meter, Together, limit_text

SIZES = Sizes(CHAT, 100, 400, 4, 1, 0, 0, 1, 50)
PRICES = Prices({"m": (Price(date(2026, 1, 1), 1.0, 1.0, 2.0),)})
SECRET = "the prompt that nobody may see"


def request(index: int = 0) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
    return Request(index, f"q {index}", "/v1/chat/completions", "m", body, SIZES)


def job(index: int, reserve: float = 100.0) -> Job:
    made = Job(Work(request(index), reserve), index, reserve, 50.0, -1, 0.0)
    made.waits_s = [0.0] * 9
    return made


def attempt(index: int, answer: Answer, at: float = 0.0, took_s: float = 1.0, **changes: object) -> Attempt:
    values: dict[str, object] = {
        "request": index,
        "custom_id": f"q {index}",
        "pool": "default",
        "model": "m",
        "url": "/v1/chat/completions",
        "lane": "main",
        "attempt": 1,
        "submitted_s": 0.0,
        "eligible_s": 0.0,
        "launched_s": at,
        "finished_s": at + took_s,
        "reserved_tokens": 100,
        "charged_tokens": 80,
        "prompt_tokens": answer.used_prompt_tokens,
        "output_tokens": answer.used_output_tokens,
        "outcome": answer.outcome,
        "status": answer.status,
        "error_code": answer.error_code,
        "retry_after_s": answer.retry_after_s,
    }
    return Attempt(**(values | changes))  # type: ignore[arg-type]


OK = Answer(
    Outcome.OK,
    200,
    used_prompt_tokens=100,
    used_output_tokens=20,
    body={"usage": {"prompt_tokens": 100, "completion_tokens": 20}, "choices": [{"message": {"content": SECRET}}]},
    request_id="req_1",
)
BAD = Answer(Outcome.BAD_REQUEST, 400, error_code="invalid_value", message=f"bad: {SECRET}")
BUSY = Answer(Outcome.THROTTLED, 429, error_code="rate_limit_exceeded", retry_after_s=2.0)


# ---------------------------------------------------------------- figures


def test_the_meter_counts_what_a_hand_counts() -> None:
    spent = Spending(PRICES, date(2026, 6, 1))
    meter = Meter(Pool(), spent, left=3, left_tokens=300.0)
    for i in range(3):
        meter.launched(job(i), float(i))
    assert (meter.in_flight, meter.tally.peak_in_flight) == (3, 3)
    meter.attempted(attempt(0, OK, 0.0, 2.0), OK, "")
    meter.ended(request(0), "", OK, 2.0)
    meter.attempted(attempt(1, BUSY, 1.0, waited_tpm_s=4.0), BUSY, "")
    meter.attempted(attempt(2, OK, 2.0, 4.0), OK, "")
    meter.ended(request(2), "", OK, 6.0)
    meter.deferred(3)
    assert (meter.left, meter.left_tokens, meter.in_flight) == (1, 100.0, 0)
    assert (meter.tally.throttled, meter.tally.attempts, meter.tally.completed) == (1, 3, 2)
    assert meter.service_s == 3.0
    assert meter.tally.waits_s[3] == 4.0
    assert meter.tally.deferrals[3] == 1
    # 2 answers of 100 prompt tokens at $1 and 20 output tokens at $2 per million.
    assert spent.total_usd() == pytest.approx(2 * (100 * 1.0 + 20 * 2.0) / 1e6)
    seen = meter.measured()
    assert (seen.ended, seen.throttled, seen.answer_tokens) == (2, 1, 20.0)


def test_a_retried_request_is_left_until_it_ends() -> None:
    meter = Meter(Pool(), Spending(PRICES, date(2026, 6, 1)), left=1, left_tokens=100.0)
    for _ in range(3):
        meter.launched(job(0), 0.0)
        meter.attempted(attempt(0, BUSY), BUSY, "")
    assert (meter.left, meter.left_tokens) == (1, 100.0)
    meter.ended(request(0), "OPENAI_RATE_LIMIT_EXHAUSTED", BUSY, 9.0)
    assert (meter.left, meter.left_tokens) == (0, 0.0)


def test_tokens_of_the_last_minute_against_a_naive_window() -> None:
    meter = Meter(Pool(), Spending(PRICES, date(2026, 6, 1)), left=999, left_tokens=0.0)
    launches = [
        (0.0, 10.0),
        (0.5, 20.0),
        (30.2, 5.0),
        (59.9, 7.0),
        (61.0, 1.0),
        (200.0, 3.0),
        (259.5, 4.0),
        (261.0, 9.0),
    ]
    for now, tokens in launches:
        meter.launched(job(0, tokens), now)
        # A second's resolution: what was launched in the last 60 whole seconds.
        naive = sum(t for at, t in launches if at <= now and int(at) > int(now) - 60)
        assert meter.tokens_per_minute(now) == naive
    assert meter.tokens_per_minute(10_000.0) == 0.0


# ---------------------------------------------------------------- alarms


def alarms(policy: Policy | None = None) -> tuple[Alarms, list[str]]:
    said: list[str] = []
    return Alarms(Pool(policy=policy or Policy()), said.append), said


def with_limits(*limits: Limit) -> Answer:
    return Answer(Outcome.OK, 200, limits=limits)


def test_limits_that_differ_are_told_once_each_with_the_setting() -> None:
    watch, said = alarms()
    for _ in range(3):
        answer = with_limits(Limit("TPM", 20_000.0, 1.0), Limit("RPM", 500.0, 1.0))
        watch.attempted(attempt(0, answer), answer, "")
    assert said == [
        "the account grants 20,000 tokens per minute, OPENAI_TPM_LIMIT=30000 is higher: expect 429s, or set "
        "OPENAI_TPM_LIMIT=20000",
        "the account grants 500 requests per minute, OPENAI_RPM_LIMIT is not set: set OPENAI_RPM_LIMIT=500",
    ]


def test_limits_that_agree_and_those_that_are_larger() -> None:
    assert limit_text("TPM", 30_000.0, Policy()) == ""
    assert limit_text("TPM", 30_100.0, Policy()) == ""
    assert "uses less of it: the run could be faster with OPENAI_TPM_LIMIT=450000" in limit_text(
        "TPM", 450_000.0, Policy()
    )
    assert limit_text("TPD", 90_000.0, Policy()) == ""


def test_after_a_change_of_settings_it_compares_again() -> None:
    watch, said = alarms()
    answer = with_limits(Limit("TPM", 20_000.0, 1.0))
    watch.attempted(attempt(0, answer), answer, "")
    watch.repriced(Policy(tpm_limit=20_000))
    watch.attempted(attempt(0, answer), answer, "")
    watch.repriced(Policy(tpm_limit=90_000))
    watch.attempted(attempt(0, answer), answer, "")
    assert len(said) == 2


def test_a_pool_s_name_stands_in_front() -> None:
    said: list[str] = []
    watch = Alarms(Pool(name="eu"), said.append)
    answer = with_limits(Limit("TPM", 1.0, 1.0))
    watch.attempted(attempt(0, answer), answer, "")
    assert said[0].startswith("pool eu: the account grants 1 tokens")


def test_a_provider_out_of_reach_is_told_once_and_the_first_failure_of_each_kind() -> None:
    watch, said = alarms()
    away = dropped("no answer from http://127.0.0.1:9: ConnectError: all attempts failed")
    slow = Answer(Outcome.TIMEOUT)
    for i in range(3):
        watch.attempted(attempt(i, away), away, "")
        watch.ended(request(i), "OPENAI_CONNECTION_DROPPED", away, 1.0)
        watch.attempted(attempt(i, slow), slow, "" if i == 0 else "OPENAI_TIMEOUT")
        watch.ended(request(i), "" if i == 0 else "OPENAI_TIMEOUT", slow, 1.0)
    assert said == [
        "no answer from http://127.0.0.1:9: ConnectError: all attempts failed",
        "request 'q 0' failed: OPENAI_CONNECTION_DROPPED: no answer from http://127.0.0.1:9: ConnectError: all "
        "attempts failed",
        "request 'q 1' failed: OPENAI_TIMEOUT",
    ]


def test_a_run_that_has_stopped_is_not_said_to_wait() -> None:
    for stopped in ("", "REFUSED"):
        watch, said = alarms()
        state = SimpleNamespace(p=Policy().params(), s=State(), late_s=-1.0, stopped=stopped, now=lambda: 9.0)
        state.s.probe_at, state.s.outage_from = 10.0, 5.0
        watch.began(state)
        answer = Answer(Outcome.SERVER_ERROR, 503, message="down")
        watch.attempted(attempt(0, answer), answer, "")
        assert len(said) == (not stopped)


def test_what_was_never_sent_is_named_too() -> None:
    watch, said = alarms()
    for i in range(2):
        watch.ended(request(i), "REQUEST_TOO_LARGE", None, 1.0)
    assert said == ["request 'q 0' failed: REQUEST_TOO_LARGE: never sent, or not again"]


# ---------------------------------------------------------------- the log


def log_of(form: str) -> list[str]:
    stream = io.StringIO()
    log = EventLog(form, "default", stream)  # type: ignore[arg-type]
    everyone = Together([log])
    everyone.launched(job(4), 1.5)
    everyone.deferred(3)
    everyone.attempted(attempt(4, BUSY, 1.5, waited_tpm_s=0.5), BUSY, "")
    everyone.attempted(attempt(4, OK, 5.0), OK, "")
    everyone.ended(request(4), "", OK, 6.0)
    everyone.attempted(attempt(5, BAD, 6.0), BAD, "BAD_REQUEST")
    everyone.ended(request(5), "BAD_REQUEST", BAD, 7.0)
    return stream.getvalue().splitlines()


def test_the_json_log_has_one_object_per_event() -> None:
    events = [json.loads(line) for line in log_of("json")]
    assert [e["event"] for e in events] == ["launch", "wait", "throttled", "answer", "done", "error", "lost"]
    assert events[0] | {"time": ""} == {
        "time": "",
        "at_s": 1.5,
        "event": "launch",
        "pool": "default",
        "custom_id": "q 4",
        "lane": "main",
        "attempt": 1,
        "reserved_tokens": 100,
    }
    assert (events[1]["cause"], events[2]["waited_s"], events[3]["request_id"]) == ("tpm", {"tpm": 0.5}, "req_1")
    assert events[3]["retry_after_s"] is None
    assert events[6]["code"] == "BAD_REQUEST"


def test_no_log_line_holds_a_prompt_an_answer_or_a_message() -> None:
    for form in ("text", "json"):
        lines = log_of(form)
        assert len(lines) == 7
        assert all(SECRET not in line for line in lines)


def test_the_text_log_keeps_ids_with_spaces_on_one_word() -> None:
    lines = log_of("text")
    assert lines[0].split()[:2] == ["1.500", "launch"]
    assert 'custom_id="q 4"' in lines[0]
    assert "code=BAD_REQUEST" in lines[6]


def test_an_expectation_without_milestones_in_the_journal() -> None:
    names = set(Expectation.__slots__) - {"milestones"}
    values = dict.fromkeys(names, 0.0) | {"by": "fluid", "answer_tokens": {}, "bound": ""}
    assert set(Expectation(**values).to_json_dict()) == names  # type: ignore[arg-type]

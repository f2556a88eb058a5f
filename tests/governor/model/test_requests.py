"""Batch files in and out: every kind of bad line is named by file and line, and what is written can be read again."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.model import requests
from governor.model.errors import BadInput
from governor.model.requests import Answer, Attempt, OldResult, Outcome, Request

# What every run leaves, as users read it.
PROMISED_COLUMNS = """request, custom_id, pool, model, url, lane, attempt, submitted_s, eligible_s, launched_s,
finished_s, reserved_tokens, charged_tokens, prompt_tokens, output_tokens, outcome, status, error_code, retry_after_s,
waited_concurrency_s, waited_stagger_s, waited_tpm_s, waited_rpm_s, waited_day_s, waited_hold_s, waited_paused_s,
waited_backoff_s"""


def a_line(custom_id: str = "q-1", url: str = "/v1/chat/completions", **changes: Any) -> str:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
    return dumped({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | changes)


def with_body(**fields: Any) -> str:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]} | fields
    return a_line(body=json.loads(dumped(body)))


def dumped(record: dict[str, Any]) -> str:
    """`record` without what is `...`."""
    return json.dumps({key: value for key, value in record.items() if value is not ...})


def read(*lines: str | bytes, **options: Any) -> list[Request]:
    return list(requests.read_requests(lines, "in.jsonl", **options))


def complaint(*lines: str | bytes) -> str:
    with pytest.raises(BadInput) as caught:
        read(*lines)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_attempt_has_designs_columns_in_designs_order() -> None:
    assert Attempt.columns() == tuple(PROMISED_COLUMNS.replace("\n", " ").split(", "))


def test_attempt_row_follows_the_columns() -> None:
    values = {name: f"value of {name}" for name in Attempt.columns()}
    attempt = Attempt(**values)  # type: ignore[arg-type]
    assert attempt.row() == tuple(values.values())


@pytest.mark.parametrize("url", requests.URLS)
def test_urls_and_codes_are_one_to_one(url: str) -> None:
    assert requests.url_of(requests.endpoint_of(url)) == url
    assert requests.endpoint_of(url.removeprefix("/v1")) == requests.endpoint_of(url)


@pytest.mark.parametrize("url", ["/v1/moderations", "", "/v2/responses", "/v1/v1/responses", "https://x/v1/responses"])
def test_other_urls_have_no_code(url: str) -> None:
    assert requests.endpoint_of(url) == -1


def test_reads_a_line() -> None:
    (request,) = read(a_line("q-7"), pool="azure-east")
    assert (request.index, request.custom_id, request.url) == (0, "q-7", "/v1/chat/completions")
    assert (request.model, request.pool) == ("gpt-4o", "azure-east")
    assert request.body == {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
    assert (request.sizes.chars, request.sizes.messages, request.sizes.max_tokens) == (5, 1, -1)


def test_blank_lines_count_as_lines_but_not_as_requests() -> None:
    found = read("\ufeff" + a_line("a"), "\n", "   \r\n", a_line("b").encode(), "")
    assert [(request.index, request.custom_id) for request in found] == [(0, "a"), (1, "b")]
    assert complaint(a_line("a"), "", "{").startswith("in.jsonl:3: ")


def test_fields_that_leave_the_answer_as_it_is_are_taken() -> None:
    for field, (served, _) in requests.UNSERVED.items():
        for value in (None, *served):
            (found,) = read(with_body(**{field: value}))
            assert found.body is not None
            assert found.body[field] == value
    (found,) = read(with_body(store=True, previous_response_id="resp_1", metadata={"a": "b"}))
    assert found.body is not None
    assert found.body["store"]


def test_reads_as_a_stream() -> None:
    def endless() -> Iterator[str]:
        number = 0
        while True:
            yield a_line(f"q-{number}")
            number += 1

    stream = requests.read_requests(endless(), "in.jsonl", keep_body=False)
    assert [next(stream).custom_id for _ in range(3)] == ["q-0", "q-1", "q-2"]
    assert next(stream).body is None


BAD_LINES = [
    ("{", "not JSON: Expecting property name"),
    ('{"custom_id": "a"', "not JSON: Expecting ',' delimiter"),
    ('{"n": NaN}', "NaN is not a JSON number"),
    ("[" * 100_000, "not JSON"),
    ('{"n": ' + "9" * 5_000 + "}", "not JSON"),
    ("[1]", "a list where a JSON object should be"),
    ("null", "null where a JSON object should be"),
    ("3", "a number where a JSON object should be"),
    (b'{"custom_id": "\xff"}', "not UTF-8 text"),
    (a_line(custom_id=...), "custom_id is missing"),  # type: ignore[arg-type]
    (a_line(custom_id=""), "custom_id must be non-empty text"),
    (a_line(custom_id=5), "custom_id must be non-empty text"),  # type: ignore[arg-type]
    (a_line(url=...), "url is missing"),  # type: ignore[arg-type]
    (a_line(url=5), "url is a number"),  # type: ignore[arg-type]
    (a_line(url="/v1/moderations"), "'/v1/moderations' is not supported: use one of /v1/chat/completions"),
    (a_line(body=...), "body is missing"),
    (a_line(body=[]), "body is a list, not an object"),
    (a_line(method="GET"), "method is 'GET': only POST"),
    (with_body(stream=True), "body.stream is True: a batch cannot stream"),
    (with_body(stream="yes"), "body.stream is 'yes': a batch cannot stream"),
    (with_body(background=True), "body.background is True: only `paceline run` and /v1/responses know"),
    (with_body(background="false"), "body.background is 'false'"),
    (with_body(conversation="conv_1"), "body.conversation is 'conv_1': each answer would be added"),
    (with_body(conversation={"id": "conv_1"}), "body.conversation is {'id': 'conv_1'}"),
    (with_body(service_tier="cheap"), "body.service_tier is 'cheap': no such tier is known: use one of auto, default"),
    (with_body(service_tier=["flex"]), "body.service_tier is ['flex']"),
    (with_body(model=5), "body.model is a number, not text"),
    (with_body(model="gpt\n\u001b[2J"), "holds control characters"),
    (with_body(messages=...), "body has no 'messages'"),
    (with_body(messages=[]), "body has no 'messages'"),
    (with_body(messages=["hi"]), "body.messages[0] is text, not an object"),
    (with_body(messages=[{"role": "user", "content": {"a": 1}}]), "body.messages[0].content is an object"),
    (with_body(messages=[{"role": "user", "content": [7]}]), "holds a number where a part should be"),
    (with_body(max_tokens="many"), "body.max_tokens is 'many': it must be a whole number from 0 to"),
    (with_body(max_tokens=-1), "body.max_tokens is -1"),
    (with_body(max_tokens=1.5), "body.max_tokens is 1.5"),
    (with_body(max_tokens=True), "body.max_tokens is True"),
    (with_body(max_tokens=2**40), "body.max_tokens is 1099511627776"),
    (with_body(max_completion_tokens=100, max_tokens=-5), "body.max_tokens is -5"),
    (with_body(n=0), "body.n is 0: it must be a whole number from 1"),
    (with_body(n="two"), "body.n is 'two'"),
    (with_body(tools={}, functions={"a": 1}), "body.tools is an object, not a list"),
    (a_line(url="/v1/responses", body={"input": 5}), "body.input is a number, not text or a list of items"),
    (a_line(url="/v1/responses", body={"input": ["a"]}), "body.input[0] is text, not an object"),
    (a_line(url="/v1/responses", body={"max_output_tokens": "x"}), "body.max_output_tokens is 'x'"),
    (a_line(url="/v1/embeddings", body={}), "body has no 'input'"),
    (a_line(url="/v1/embeddings", body={"input": [[1, "a"]]}), "body.input holds a list, not text or tokens"),
    (a_line(url="/v1/completions", body={"prompt": {"a": 1}}), "body.prompt holds an object, not text or tokens"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:40] for _, reason in BAD_LINES])
def test_a_bad_line_is_named_by_file_and_line(line: str | bytes, reason: str) -> None:
    message = complaint(a_line("fine"), "", line)
    assert message.startswith("in.jsonl:3: ")
    assert reason in message
    assert len(message) < 300


def test_a_duplicate_names_both_lines() -> None:
    message = complaint(a_line("a"), a_line("b"), "", a_line("a"))
    assert message == "in.jsonl:4: custom_id 'a' stands on line 1 already"


@pytest.mark.parametrize("lines", [[], ["", "\n"]])
def test_an_empty_file_is_an_error(lines: list[str]) -> None:
    assert complaint(*lines) == "in.jsonl: no requests in it"


def test_a_text_file_of_another_encoding_is_an_error() -> None:
    data = (a_line("a") + "\n").encode() * 2_000 + b'{"custom_id": "\xff"}\n'
    with pytest.raises(BadInput, match=r"in\.jsonl: not UTF-8 text"):
        list(requests.read_results(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"), "in.jsonl"))


def test_memory_stays_with_the_ids() -> None:
    count = 20_000
    lines = (a_line(f"request-{number:07d}", metadata={"note": "x" * 2_000}) for number in range(count))
    stream = requests.read_requests(lines, "in.jsonl", keep_body=False)
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # An entry of a dict, a str of 15 characters and an int: 250 bytes while the dict grows; the lines would be 2,200.
    assert peak < 300 * count


FIELDS = [
    "messages",
    "content",
    "role",
    "type",
    "text",
    "input",
    "prompt",
    "tools",
    "functions",
    "n",
    "suffix",
    "instructions",
    "response_format",
    "format",
    *requests.UNSERVED,
    "max_tokens",
    "output",
    "refusal",
    "arguments",
    "tool_calls",
    "best_of",
    "max_completion_tokens",
    "max_output_tokens",
    "model",
]
BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)
LINES = st.one_of(
    st.text(),
    st.binary(),
    st.dictionaries(st.sampled_from(["custom_id", "url", "body", "method"]), st.just("x")).map(json.dumps),
    st.builds(lambda url, body: a_line(url=url, body=body), st.sampled_from(requests.URLS), BODIES),
)


@given(LINES)
def test_odd_lines_give_requests_or_one_line_errors(line: str | bytes) -> None:
    found, message = [], ""
    try:
        found = read(line)
    except BadInput as error:
        message = str(error)
    assert "\n" not in message
    assert len(found) == (0 if message else 1)
    assert all(request.sizes.chars >= 0 and request.sizes.prompt_tokens >= 0 for request in found)


# ---------------------------------------------------------------- results


REQUEST = read(a_line("q-812"))[0]


def test_a_result_line_is_the_batch_guides() -> None:
    body = {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 4}}
    line = requests.result_line(REQUEST, Answer(Outcome.OK, 200, request_id="req_1", body=body))
    assert json.loads(line) == {
        "id": "batch_req_0",
        "custom_id": "q-812",
        "response": {"status_code": 200, "request_id": "req_1", "body": body},
        "error": None,
    }
    assert list(requests.read_results([line], "out.jsonl")) == [OldResult("q-812", 200, 11, 4, "")]


def test_numbers_that_json_does_not_have_become_null() -> None:
    body = json.loads('{"choices": [{"logprobs": [NaN, 0.5, -Infinity]}], "x": {"y": Infinity}}')
    line = requests.result_line(REQUEST, Answer(Outcome.OK, 200, body=body))
    found = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["response"]["body"] == {"choices": [{"logprobs": [None, 0.5, None]}], "x": {"y": None}}


def test_an_error_line_keeps_the_providers_response() -> None:
    refusal = Answer(Outcome.THROTTLED, 429, "rate_limit_exceeded", body={"error": {"code": "rate_limit_exceeded"}})
    line = requests.error_line(REQUEST, "OPENAI_RATE_LIMIT_EXHAUSTED", "5 attempts\nspent", refusal)
    record = json.loads(line)
    assert "\n" not in line
    assert record["error"] == {"code": "OPENAI_RATE_LIMIT_EXHAUSTED", "message": "5 attempts\nspent"}
    assert record["response"]["status_code"] == 429
    expected = [OldResult("q-812", 429, -1, -1, "OPENAI_RATE_LIMIT_EXHAUSTED")]
    assert list(requests.read_results([line], "errors.jsonl")) == expected


@pytest.mark.parametrize("answer", [None, Answer(Outcome.DROPPED)])
def test_an_error_without_a_response_says_null(answer: Answer | None) -> None:
    record = json.loads(requests.error_line(REQUEST, "OPENAI_CONNECTION_DROPPED", "dropped", answer))
    assert record["response"] is None


def test_reads_the_guides_own_examples() -> None:
    """docs/explanation/provider.md#batch-files, and the responses endpoint's own names of usage."""
    lines = [
        '{"id":"batch_req_123","custom_id":"request-2","response":{"status_code":200,"request_id":"req_123",'
        '"body":{"usage":{"input_tokens":22,"output_tokens":2,"total_tokens":24}}},"error":null}',
        '{"id":"batch_req_124","custom_id":"request-3","response":null,"error":{"code":"batch_expired",'
        '"message":"This request could not be executed before the completion window expired."}}',
        '{"id":"x","custom_id":"e","response":{"status_code":200,"body":{"usage":{"prompt_tokens":8}}},"error":null}',
    ]
    assert list(requests.read_results(lines, "old.jsonl")) == [
        OldResult("request-2", 200, 22, 2, ""),
        OldResult("request-3", 0, -1, -1, "batch_expired"),
        OldResult("e", 200, 8, 0, ""),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{}", "old.jsonl:1: custom_id is missing"),
        ("nonsense", "old.jsonl:1: not JSON"),
        ('{"custom_id":"a","response":{"body":{"usage":{"completion_tokens":-4}}}}', "usage.completion_tokens is -4"),
        ('{"custom_id":"a","response":{"body":{"usage":{"prompt_tokens":"4"}}}}', "usage.prompt_tokens is '4'"),
        ("", "old.jsonl: no results in it"),
    ],
)
def test_bad_results_are_named(line: str, reason: str) -> None:
    with pytest.raises(BadInput) as caught:
        list(requests.read_results([line], "old.jsonl"))
    assert reason in str(caught.value)


@given(st.text(min_size=1), st.text())
def test_any_text_survives_writing_and_reading(custom_id: str, message: str) -> None:
    request = read(a_line(custom_id))[0]
    line = requests.error_line(request, "BAD_REQUEST", message)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    (again,) = requests.read_results([line], "errors.jsonl")
    assert again.custom_id == custom_id

"""The Batch API over HTTP, asked by the official SDK. The clock is moved by hand, so that no test waits for a batch."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from governor.batchapi.limits import FILE_BYTES
from sim.model.batches import CANCELLING_S
from sim.model.provider_config import ProviderConfig
from sim.serving.server import Provider, ProviderThread
from tests.live import KEY, WAIT_S, line

CHAT = "/v1/chat/completions"
QUICK = ProviderConfig().with_(
    tpm=0,
    rpm=0,
    latency={"first_token_s": 0.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    batch_api={"turnaround_s": [100.0, 100.0]},
)


class Bench:
    """A provider, the SDK as its client, and the hands of its clock."""

    def __init__(self, server: ProviderThread, sdk: OpenAI, hands: list[float]) -> None:
        self.server = server
        self.sdk = sdk
        self.hands = hands

    def upload(self, *lines: Any, purpose: Any = "batch") -> str:
        raw = "".join(json.dumps(each) + "\n" for each in lines).encode()
        return self.sdk.files.create(file=("in.jsonl", raw), purpose=purpose).id

    def submit(self, *lines: Any, endpoint: Any = CHAT, **options: Any) -> Batch:
        return self.sdk.batches.create(
            input_file_id=self.upload(*lines), endpoint=endpoint, completion_window="24h", **options
        )

    def later(self, batch: Batch, seconds: float) -> Batch:
        self.hands[0] += seconds
        return self.sdk.batches.retrieve(batch.id)

    def read(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        return [json.loads(each) for each in self.sdk.files.content(file_id).text.splitlines()]


@contextmanager
def bench_of(config: ProviderConfig, **options: Any) -> Iterator[Bench]:
    hands = [0.0]
    with ProviderThread(Provider(config, clock=lambda: hands[0], **options), 0) as server:
        sdk = OpenAI(
            api_key=KEY, base_url=server.base_url, max_retries=0, timeout=WAIT_S, _strict_response_validation=True
        )
        with sdk:
            yield Bench(server, sdk, hands)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with bench_of(QUICK) as made:
        yield made


def test_a_batch_from_upload_to_deletion(bench: Bench) -> None:
    lines = [line(f"q-{i}", text="x" * (50 + i)) for i in range(20)]
    batch = bench.submit(*lines, metadata={"job": "nightly"})
    assert (batch.status, batch.metadata, batch.errors, batch.model) == ("validating", {"job": "nightly"}, None, None)
    assert batch.expires_at == batch.created_at + 86_400
    assert batch.request_counts is not None
    assert batch.request_counts.total == 0
    half = bench.later(batch, 50.0)
    assert half.request_counts is not None
    assert (half.status, half.model, half.output_file_id) == ("in_progress", "gpt-4o-mini", None)
    assert 0 < half.request_counts.completed < half.request_counts.total == 20
    assert bench.later(batch, 49.0).status == "finalizing"
    done = bench.later(batch, 1.0)
    assert done.request_counts is not None
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 20, 0)
    assert done.completed_at == batch.created_at + 100
    assert (done.error_file_id, done.cancelled_at) == (None, None)
    records = bench.read(done.output_file_id)
    ids = [record["custom_id"] for record in records]
    assert sorted(ids) == sorted(each["custom_id"] for each in lines)
    assert ids != [each["custom_id"] for each in lines]
    assert all(record["error"] is None and record["response"]["status_code"] == 200 for record in records)
    usages = [record["response"]["body"]["usage"] for record in records]
    assert done.usage is not None
    assert done.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert done.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages)
    # The generator is the live one: the same request gets the same answer.
    live = bench.sdk.chat.completions.create(**lines[7]["body"]).to_dict()
    (same,) = (record["response"]["body"] for record in records if record["custom_id"] == "q-7")
    assert {**same, "created": 0} == {**live, "created": 0}

    files = {file.id: file for file in bench.sdk.files.list()}
    assert {file.purpose for file in files.values()} == {"batch", "batch_output"}
    assert done.output_file_id is not None
    output = files[done.output_file_id]
    assert output.bytes == len(bench.sdk.files.content(output.id).content)
    for file in files:
        assert bench.sdk.files.delete(file).deleted
    assert list(bench.sdk.files.list()) == []
    with pytest.raises(openai.NotFoundError, match=f"No such File object: {output.id}"):
        bench.sdk.files.content(output.id)


def test_the_other_endpoints_and_lines_that_fail(bench: Bench) -> None:
    prompts = {
        "/v1/responses": {"model": "gpt-4o", "input": "Hello"},
        "/v1/embeddings": {"model": "text-embedding-3-small", "input": ["a", "b"]},
        "/v1/completions": {"model": "gpt-4o", "prompt": "Hello"},
    }
    bad = {"model": "gpt-4o", "messages": "none"}
    batches = [
        bench.submit({"custom_id": "a", "method": "POST", "url": url, "body": body}, endpoint=url)
        for url, body in prompts.items()
    ]
    mixed = bench.submit(line("good", model="gpt-4o"), {**line("bad"), "body": bad})
    kinds = [bench.read(bench.later(each, 100.0).output_file_id)[0]["response"]["body"]["object"] for each in batches]
    assert kinds == ["response", "list", "text_completion"]
    mixed = bench.later(mixed, 0.0)
    assert mixed.request_counts is not None
    assert (mixed.status, mixed.request_counts.completed, mixed.request_counts.failed) == ("completed", 1, 1)
    assert [record["custom_id"] for record in bench.read(mixed.output_file_id)] == ["good"]
    (failed,) = bench.read(mixed.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"], failed["error"]) == ("bad", 400, None)
    assert failed["response"]["body"]["error"]["type"] == "invalid_request_error"


def test_server_errors_strike_lines_as_often_as_live_requests() -> None:
    with bench_of(QUICK.with_(faults={"error_ratio": 0.5})) as bench:
        done = bench.later(bench.submit(*(line(f"q-{i}", text=str(i)) for i in range(100))), 100.0)
        assert done.request_counts is not None
        assert 25 < done.request_counts.failed < 75, "within 5 standard deviations of 50"
        errors = bench.read(done.error_file_id)
        assert {record["response"]["status_code"] for record in errors} == {500}
        assert len(errors) == done.request_counts.failed == 100 - len(bench.read(done.output_file_id))


def test_a_batch_that_expires_and_one_that_is_cancelled() -> None:
    with bench_of(QUICK.with_(batch_api={"turnaround_s": [200_000.0, 200_000.0]})) as bench:
        lines = [line(f"q-{i}") for i in range(60)]
        slow, stopped, early = bench.submit(*lines), bench.submit(*lines), bench.submit(*lines)
        assert bench.sdk.batches.cancel(early.id).status == "cancelling"
        assert bench.later(stopped, 50_000.0).status == "in_progress"
        assert bench.sdk.batches.cancel(stopped.id).status == "cancelling"
        stopped, early = bench.later(stopped, CANCELLING_S), bench.sdk.batches.retrieve(early.id)
        slow = bench.later(slow, 40_000.0)
        assert (early.status, early.output_file_id) == ("cancelled", None)
        for batch, status, code in ((slow, "expired", "batch_expired"), (stopped, "cancelled", "batch_cancelled")):
            assert batch.status == status
            output, errors = bench.read(batch.output_file_id), bench.read(batch.error_file_id)
            assert output
            assert sorted(each["custom_id"] for each in output + errors) == sorted(each["custom_id"] for each in lines)
            assert {(each["response"], each["error"]["code"]) for each in errors} == {(None, code)}
        with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'expired'"):
            bench.sdk.batches.cancel(slow.id)


def test_a_full_queue_fails_the_batch_and_not_the_call() -> None:
    config = QUICK.with_(batch_api={"queue_tokens": 1_000, "turnaround_s": [100.0, 100.0]})
    with bench_of(config) as bench:
        first, second = (bench.submit(line("a", text="x" * 3_000)) for _ in range(2))
        assert second.status == "validating"
        second = bench.later(second, 5.0)
        assert second.status == "failed"
        assert second.errors is not None
        assert second.errors.data is not None
        assert [each.code for each in second.errors.data] == ["token_limit_exceeded"]
        assert "Limit: 1,000 enqueued tokens" in str(second.errors.data[0].message)
        assert bench.later(first, 95.0).status == "completed"
        assert bench.later(bench.submit(line("a", text="x" * 3_000)), 5.0).status == "in_progress"
        bench.hands[0] += 95.0
        stats = bench.server.stats()
        assert stats["batches"] == {"completed": 2, "failed": 1}
        assert stats["enqueued_tokens"] == {"gpt-4o-mini": 0}
        assert 750 < stats["enqueued_tokens_max"]["gpt-4o-mini"] <= 1_000


def test_a_bad_file_fails_the_batch_with_its_lines(bench: Bench) -> None:
    bad = bench.submit(line("a"), line("a"), line("b", model="gpt-4.1"), {**line("c"), "url": "/v1/responses"})
    assert (bad.status, bad.errors) == ("validating", None)
    bad = bench.later(bad, 5.0)
    assert bad.errors is not None
    assert bad.errors.data is not None
    assert [(each.line, each.code) for each in bad.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "mismatched_model"),
        (4, "invalid_url"),
    ]
    assert bad.request_counts is not None
    assert (bad.status, bad.request_counts.total, bad.output_file_id, bad.error_file_id) == ("failed", 0, None, None)


def test_calls_that_are_refused_at_once(bench: Bench) -> None:
    good = bench.upload(line("a"))
    for changes, message in (
        ({"endpoint": "/v1/songs"}, "Invalid value: '/v1/songs'. Supported values are: '/v1/chat/completions'"),
        ({"completion_window": "1h"}, "Invalid value: '1h'. Value must be '24h'."),
        ({"input_file_id": "file-none"}, "No such File object: file-none"),
        ({"input_file_id": bench.upload(line("a"), purpose="user_data")}, "Invalid file purpose: 'user_data'"),
        ({"metadata": {"a": 1}}, "Invalid type for 'metadata'"),
    ):
        asked: dict[str, Any] = {"input_file_id": good, "endpoint": CHAT, "completion_window": "24h", **changes}
        with pytest.raises(openai.BadRequestError) as caught:
            bench.sdk.batches.create(**asked)
        assert message in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="'songs' is not one of"):
        bench.upload(line("a"), purpose="songs")
    for call in (bench.sdk.batches.retrieve, bench.sdk.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="No batch found with id 'batch_none'"):
            call("batch_none")
    with pytest.raises(openai.BadRequestError, match="Invalid 'limit': 101"):
        bench.sdk.batches.list(limit=101)
    assert list(bench.sdk.batches.list()) == []


def test_a_file_above_200_mb_is_refused_before_it_is_read(bench: Bench) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", bench.server.port, timeout=WAIT_S)
    try:
        connection.putrequest("POST", "/v1/files")
        connection.putheader("content-type", "multipart/form-data; boundary=x")
        connection.putheader("content-length", str(FILE_BYTES + 1_000_000))
        connection.endheaders()
        response = connection.getresponse()
        assert (response.status, json.load(response)["error"]["message"]) == (400, "File is too large.")
    finally:
        connection.close()


def test_lists_come_in_pages_newest_first(bench: Bench) -> None:
    batches = [bench.submit(line("a")).id for _ in range(5)]
    assert len(set(batches)) == 5, "the same file twice makes two batches"
    page = bench.sdk.batches.list(limit=2)
    assert ([each.id for each in page.data], page.has_more) == (batches[:2:-1], True)
    assert [each.id for each in bench.sdk.batches.list(limit=2)] == batches[::-1]
    uploaded = [file.id for file in bench.sdk.files.list(order="asc", limit=3)]
    assert uploaded == [file.id for file in bench.sdk.files.list()][::-1]
    assert len(uploaded) == 5
    assert list(bench.sdk.files.list(purpose="batch_output")) == []
    assert bench.sdk.files.retrieve(uploaded[0]).filename == "in.jsonl"


def test_on_a_fast_clock_of_its_own() -> None:
    provider = Provider(QUICK, time_scale=500.0)
    with (
        ProviderThread(provider, 0) as server,
        OpenAI(api_key=KEY, base_url=server.base_url, max_retries=0, timeout=WAIT_S) as sdk,
    ):
        bench = Bench(server, sdk, [0.0])
        batch = bench.submit(line("a"))
        gives_up_at = time.monotonic() + WAIT_S
        while batch.status != "completed" and time.monotonic() < gives_up_at:
            time.sleep(0.05)
            batch = sdk.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert [record["custom_id"] for record in bench.read(batch.output_file_id)] == ["a"]
        # Stated in the client's seconds: a day is 86,400 / 500 of them.
        assert batch.expires_at is not None
        assert batch.expires_at - batch.created_at in (172, 173)

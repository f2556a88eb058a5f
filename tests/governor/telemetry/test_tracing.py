"""Spans and metrics of governed clients, as OpenTelemetry's own SDK gets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from governor import Governor, Policy, governed
from governor.run import governed as module
from governor.telemetry import tracing
from tests.strangers import Stranger, chat, chat_stream, error, stranger

POLICY = Policy().with_(stagger_s=0, tpm_limit=1_000_000, backoff_base_s=0.02, charge_rule="auto")
MESSAGES: Any = [{"role": "user", "content": "How are you?"}]
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


class Collector:
    """What was exported."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()

    @property
    def spans(self) -> list[Any]:
        return list(self.exporter.get_finished_spans())

    def points(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        found = [each for r in data.resource_metrics for scope in r.scope_metrics for each in scope.metrics]
        return [point for each in found if each.name == name for point in each.data.data_points]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector()
    tracers, meters = TracerProvider(), MeterProvider([made.reader])
    tracers.add_span_processor(SimpleSpanProcessor(made.exporter))
    monkeypatch.setattr(trace, "get_tracer", tracers.get_tracer)
    monkeypatch.setattr(metrics, "get_meter", meters.get_meter)
    own = tracing.Traces()
    monkeypatch.setattr(module, "traces", lambda: own)
    yield made
    meters.shutdown()


def client(server: Stranger, governor: Governor) -> OpenAI:
    return governed(OpenAI(api_key="k", base_url=server.base_url), governor)


def test_one_span_per_call_with_a_child_for_each_attempt(collector: Collector) -> None:
    answers = [error(429, "slow down", "rate_limit_exceeded", Retry_After="0.02"), chat()]
    with stranger(lambda body: answers.pop(0)) as server, client(server, Governor(POLICY)) as c:
        c.chat.completions.create(model="gpt-4o", messages=MESSAGES, max_tokens=7)
    first, second, call = collector.spans
    assert (first.name, second.name, call.name) == ("attempt 1", "attempt 2", "chat gpt-4o")
    assert first.parent.span_id == second.parent.span_id == call.context.span_id
    assert call.kind is trace.SpanKind.CLIENT
    assert first.attributes["http.response.status_code"] == 429
    assert first.attributes["error.type"] == "rate_limit_exceeded"
    assert second.attributes["paceline.wait.backoff_s"] >= 0.02
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 3,
        "http.response.status_code": 200,
    }.items() <= call.attributes.items()
    assert call.start_time <= first.start_time <= first.end_time <= second.start_time <= second.end_time
    assert call.status.is_ok
    assert not any("How are you" in str(span.to_json()) for span in collector.spans)


def test_a_stream_is_followed_to_its_end_and_a_refusal_to_its_error(collector: Collector) -> None:
    with stranger(
        lambda body: (200, {}, chat_stream("a", usage=USAGE)) if body.get("stream") else error(404, "no", "no_model")
    ) as server:
        c = client(server, Governor(POLICY))
        stream = c.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        next(stream)
        assert collector.spans == []
        assert len(list(stream)) == 2
        with pytest.raises(openai.NotFoundError):
            c.chat.completions.create(model="m", messages=MESSAGES)
        c.close()
    calls = [span for span in collector.spans if span.name == "chat m"]
    assert [span.attributes.get("gen_ai.usage.output_tokens") for span in calls] == [3, None]
    assert [span.attributes.get("error.type") for span in calls] == [None, "no_model"]
    assert not calls[1].status.is_ok


def test_tokens_durations_and_gauges_are_metrics(collector: Collector) -> None:
    stated = {"x-ratelimit-limit-tokens": "900000", "x-ratelimit-remaining-tokens": "899000"}
    policy = POLICY.with_(sync_headers=True)
    with stranger(lambda body: (200, stated, chat()[2])) as server, client(server, Governor(policy, pool="eu")) as c:
        for _ in range(3):
            c.chat.completions.create(model="m", messages=MESSAGES)
    used = {point.attributes["gen_ai.token.type"]: point.sum for point in collector.points("gen_ai.client.token.usage")}
    assert used == {"input": 27, "output": 9}
    (duration,) = collector.points("gen_ai.client.operation.duration")
    assert duration.count == 3
    gauges = {
        name: [p.value for p in collector.points(f"paceline.{name}") if p.attributes["paceline.dimension"] == "TPM"]
        for name in ("limit", "remaining", "budget_left")
    }
    assert gauges["limit"] == [900_000.0]
    assert gauges["remaining"] == [899_000.0]
    assert 0.0 < gauges["budget_left"][0] <= 900_000.0

"""OpenTelemetry of governed clients: spans by the GenAI conventions, token metrics, and gauges of the limits.

One client span per operation, from the call to its last byte, is named and described by the conventions
(`gen_ai.operation.name`, `gen_ai.request.model`, `gen_ai.usage.input_tokens`, ...). Below it is one span per attempt,
from its launch to its answer, with its preceding wait by cause (`paceline.wait.tpm_s`, ...). Neither holds prompts or
answers. Metrics: `gen_ai.client.token.usage`, `gen_ai.client.operation.duration`, and per pool and dimension
`paceline.limit`, `paceline.remaining` (by the provider's headers) and `paceline.budget_left` (by the law).

Only the API is used. If the program has configured no OpenTelemetry SDK, nothing is recorded; if not even the API is
installed, `traces` returns None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakSet

from governor import law
from governor.model.estimate import COMPLETIONS, EMBEDDINGS
from governor.model.needs import STANDARD
from governor.model.requests import CAUSES, Answer, Outcome
from governor.model.work import Work
from governor.scheduler.driver import Governor

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, Observation
except ImportError:  # an optional extra
    metrics = trace = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_NAME = "paceline"
_PROVIDERS = (("openai.azure.com", "azure.ai.openai"), ("openai", "openai"), ("anthropic", "anthropic"))
# The bucket edges that the conventions advise.
_TOKENS = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216, 67_108_864)
_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


@cache
def traces() -> Traces | None:
    """Return the process's traces, created on first use; None if OpenTelemetry is not installed."""
    return None if trace is None else Traces()


class Traces:
    """Spans and metrics of all governed clients of this process."""

    def __init__(self) -> None:
        self._tracer = trace.get_tracer(_NAME)
        meter = metrics.get_meter(_NAME)
        self.tokens = meter.create_histogram(
            "gen_ai.client.token.usage", "{token}", "Tokens used", explicit_bucket_boundaries_advisory=_TOKENS
        )
        self.seconds = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "From the call to its last byte",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._governors: WeakSet[Governor] = WeakSet()
        for name, words, value in (
            ("limit", "What the provider grants per minute or day, else what is configured", _limit),
            ("remaining", "What is left of it, by the provider's newest count", _remaining),
            ("budget_left", "What the law would still admit at once", _budget_left),
        ):
            meter.create_observable_gauge(f"paceline.{name}", [self._reader(value)], description=words)

    def watch(self, governor: Governor) -> None:
        """Include this governor in the gauges from now on."""
        self._governors.add(governor)

    def _reader(self, value: Callable[[Governor, int], float]) -> Any:
        def read(options: CallbackOptions) -> Iterable[Observation]:
            for governor in tuple(self._governors):
                for name, d in STANDARD.items():
                    found = value(governor, d)
                    if found < inf:
                        yield Observation(found, {"paceline.pool": governor.pool, "paceline.dimension": name})

        return read

    def operation(self, work: Work, url: str) -> Operation:
        """Begin the span of an incoming call."""
        request = work.request
        known = _known(request.sizes.endpoint, url, request.model)
        name = f"{known['gen_ai.operation.name']} {request.model}".rstrip()
        span = self._tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=known)
        if span.is_recording():
            span.set_attribute("paceline.reserved_tokens", work.reserve)
            if request.sizes.max_tokens >= 0:
                span.set_attribute("gen_ai.request.max_tokens", request.sizes.max_tokens)
        return Operation(self, self._tracer, span, known)


class Operation:
    """The span of one call, and those of its attempts."""

    def __init__(self, owner: Traces, tracer: Any, span: Span, known: dict[str, str | int]) -> None:
        self._owner = owner
        self._tracer = tracer
        self._span = span
        self._known = known
        self._begun = perf_counter()
        self._attempts = 0
        self._attempt: Span | None = None

    def sends(self, waits_s: Sequence[float]) -> AbstractContextManager[object]:
        """Span one attempt for the duration of the block; `waits_s`: its preceding waits for each of `CAUSES`."""
        self._attempts += 1
        within = trace.set_span_in_context(self._span)
        self._attempt = span = self._tracer.start_span(f"attempt {self._attempts}", within)
        if span.is_recording():
            span.set_attribute("paceline.attempt", self._attempts)
            for cause, wait_s in zip(CAUSES, waits_s, strict=False):
                if wait_s > 0.0:
                    span.set_attribute(f"paceline.wait.{cause}_s", wait_s)
        return trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False)

    def answered(self, answer: Answer) -> None:
        """Record the answer of the attempt."""
        span, self._attempt = self._attempt, None
        if span is not None:
            _describe(span, answer)
            span.end()

    def over(self, answer: Answer | None, error: BaseException | None = None) -> None:
        """End the call, with that answer or, if there is none, with that exception."""
        if answer is None:
            kind = type(error).__name__ if error is not None else "abandoned"
            answer = Answer(Outcome.DROPPED, error_code=kind, message=kind)
        self.answered(answer)
        _describe(self._span, answer)
        self._span.end()
        known = self._known
        used = {"input": answer.used_prompt_tokens, "output": answer.used_output_tokens}
        for kind, count in used.items():
            if count >= 0:
                self._owner.tokens.record(count, {**known, "gen_ai.token.type": kind})
        failed = {} if answer.outcome is Outcome.OK else {"error.type": answer.error_code or answer.outcome.value}
        self._owner.seconds.record(perf_counter() - self._begun, {**known, **failed})


def _describe(span: Span, answer: Answer) -> None:
    if not span.is_recording():
        return
    span.set_attribute("paceline.outcome", answer.outcome.value)
    if answer.status:
        span.set_attribute("http.response.status_code", answer.status)
    if answer.used_prompt_tokens >= 0:
        span.set_attribute("gen_ai.usage.input_tokens", answer.used_prompt_tokens)
    if answer.used_output_tokens >= 0:
        span.set_attribute("gen_ai.usage.output_tokens", answer.used_output_tokens)
    if answer.outcome is not Outcome.OK:
        span.set_attribute("error.type", answer.error_code or answer.outcome.value)
        span.set_status(trace.StatusCode.ERROR, answer.message[:200])


@lru_cache(1_024)
def _known(endpoint: int, url: str, model: str) -> dict[str, str | int]:
    """Return the attributes that all calls of this kind share."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    known: dict[str, str | int] = {
        "gen_ai.operation.name": _operation(endpoint, parts.path),
        "gen_ai.provider.name": next((name for part, name in _PROVIDERS if part in host), "openai"),
        "server.address": host,
        "server.port": parts.port or (443 if parts.scheme == "https" else 80),
    }
    return known | {"gen_ai.request.model": model} if model else known


def _operation(endpoint: int, path: str) -> str:
    if endpoint == EMBEDDINGS:
        return "embeddings"
    if endpoint == COMPLETIONS:
        return "text_completion"
    return "chat" if endpoint >= 0 else path.rpartition("/")[2] or "request"


def _limit(governor: Governor, d: int) -> float:
    return governor.s.granted[d] or law.limit_found(governor.p, governor.s, d) or inf


def _remaining(governor: Governor, d: int) -> float:
    return governor.s.left[d] if governor.s.granted[d] else inf


def _budget_left(governor: Governor, d: int) -> float:
    p, s = governor.p, governor.s
    if p.limit[d] <= 0.0:
        return inf
    return max(0.0, p.budget[d] * s.scale[d] - law.used_in(p, s, d, governor.now()))

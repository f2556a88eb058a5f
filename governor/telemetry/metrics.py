"""Prometheus metrics of a run, fed by the same events as its journal, and the webhook that reports its end.

The five `contestra_*` names are those of the guardrails' dashboards: totals over all pools, without a pool label; our
own metrics have one.

    contestra_openai_active_concurrency          permits taken right now; 0 when idle
    contestra_openai_next_slot_epoch             when the stagger allows the next launch, earliest pool; 0 = none yet
    contestra_openai_stagger_delays_total        requests that waited for a launch slot, each counted once
    contestra_openai_tpm_window_deferrals_total  the same for the tokens per minute
    contestra_llm_rate_limit_events_total        429s that ask to slow down, by vendor
    paceline_in_flight                           permits taken, by pool
    paceline_limit_granted                       the limit, by pool and dimension: as set, stated or found; 0 = not yet
    paceline_limit_budget                        what of it this run may use: less the headroom
    paceline_limit_used                          what counts against that budget now
    paceline_outage_since_epoch                  since when nothing is answered, by pool; 0 = no outage
    paceline_attempts_total                      attempts that ended, by pool and outcome
    paceline_requests_total                      requests that ended, by pool and result (ok, or the failure code)
    paceline_deferrals_total                     requests deferred at the head of the queue, by pool and cause
    paceline_tokens_total                        tokens, by pool and kind: reserved, charged, prompt, output
    paceline_waves_open                          files at the Batch API, by pool
    paceline_wave_moved_epoch                    when one of them last came further, by pool; 0 = none is open
    paceline_batch_queue_tokens                  estimated input tokens in the Batch API's queue, by pool and model
    paceline_wait_seconds                        histogram of how long attempts waited, by pool and cause
    paceline_answer_seconds                      histogram of launch to answer, by pool

The gauges of permits, slots and limits are read from the law's state at the moment of a scrape, so no lost event can
leave them wrong. Labels are names of pools, dimensions, causes and outcomes: no request, prompt or key is ever in them.

A run has a registry of its own. Governed clients (`process_metrics`) count in the process's default registry, together
with the program's own metrics; if PROMETHEUS_MULTIPROC_DIR is set (several workers of gunicorn or uvicorn) the gauges
are also written whenever they change (`refresh`), since other processes read files and cannot call functions.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, Self
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener
from weakref import WeakSet

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
    write_to_textfile,
)
from prometheus_client.metrics_core import Metric

from governor import law
from governor.model import requests
from governor.model.errors import BadInput, BadSetting
from governor.model.requests import CAUSES, Answer, Attempt
from governor.model.work import THROTTLES, Observer, PoolState
from governor.telemetry.watch import OutageWatch

_HOST = "127.0.0.1"
_LOG = logging.getLogger("governor")
VENDOR = "openai"
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3_600.0, 14_400.0)
NOTIFY_S = 10.0
_NO_LIMIT = (0.0, 0.0, 0.0)


class LiveMetrics(Protocol):
    """The fields of a governor that the gauges read."""

    @property
    def in_flight(self) -> int:
        """Return the permits taken."""

    @property
    def next_slot_epoch(self) -> float:
        """Return when the stagger allows the next launch, seconds since 1970; 0 = no launch yet."""

    def limits(self) -> Mapping[str, tuple[float, float, float]]:
        """Return the limit, the budget and what counts against it now, by dimension."""


class _Registry(CollectorRegistry):
    """A registry without the `_created` series, which are not used and would double the number of names."""

    def collect(self) -> Iterable[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """All metrics of this process. One `observer` for each pool; `watch` its governor while it runs."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        r = self.registry = registry or _Registry()
        self._live: dict[str, WeakSet[LiveMetrics]] = {}
        self._active = Gauge(
            "contestra_openai_active_concurrency",
            "Requests in flight, all pools",
            registry=r,
            multiprocess_mode="livesum",
        )
        self._active.set_function(lambda: float(sum(live.in_flight for live in self._all_live())))
        self._slot = Gauge(
            "contestra_openai_next_slot_epoch",
            "Next launch slot, seconds since 1970",
            registry=r,
            multiprocess_mode="livemax",
        )
        self._slot.set_function(self._next_slot_epoch)
        # The client adds `_total` to the names of counters.
        self.stagger_delays = Counter(
            "contestra_openai_stagger_delays", "Requests that waited for a launch slot", registry=r
        )
        self.tpm_deferrals = Counter(
            "contestra_openai_tpm_window_deferrals", "Requests that waited for tokens per minute", registry=r
        )
        self.rate_limit_events = Counter(
            "contestra_llm_rate_limit_events", "429s that ask to slow down", ["vendor"], registry=r
        )
        # Shown from the start, as 0: a dashboard cannot tell a missing name from one that never counted.
        self.rate_limit_events.labels(VENDOR)
        self.in_flight = Gauge(
            "paceline_in_flight", "Requests in flight", ["pool"], registry=r, multiprocess_mode="livesum"
        )
        self.limits = tuple(
            Gauge(f"paceline_limit_{name}", text, ["pool", "dimension"], registry=r, multiprocess_mode="livemax")
            for name, text in (
                ("granted", "The limit: as set, stated or found; 0 = not found yet"),
                ("budget", "What of the limit may be used"),
                ("used", "What counts against the budget now"),
            )
        )
        self.outage_since = Gauge(
            "paceline_outage_since_epoch",
            "Time since which nothing has been answered, 0 = no outage",
            ["pool"],
            registry=r,
            multiprocess_mode="livemax",
        )
        self.waves_open = Gauge("paceline_waves_open", "Files at the Batch API", ["pool"], registry=r)
        self.wave_moved = Gauge(
            "paceline_wave_moved_epoch",
            "When a wave last came further, 0 = none is open",
            ["pool"],
            registry=r,
        )
        self.queue_tokens = Gauge(
            "paceline_batch_queue_tokens", "Tokens in the Batch API's queue", ["pool", "model"], registry=r
        )
        self.attempts = Counter("paceline_attempts", "Attempts that ended", ["pool", "outcome"], registry=r)
        self.requests = Counter("paceline_requests", "Requests that ended", ["pool", "result"], registry=r)
        self.deferrals = Counter(
            "paceline_deferrals", "Requests deferred, once per cause", ["pool", "cause"], registry=r
        )
        self.tokens = Counter("paceline_tokens", "Tokens of attempts that ended", ["pool", "kind"], registry=r)
        self.waits = Histogram(
            "paceline_wait_seconds", "Waiting before a launch", ["pool", "cause"], buckets=SECONDS, registry=r
        )
        self.answers = Histogram("paceline_answer_seconds", "Launch to answer", ["pool"], buckets=SECONDS, registry=r)

    def _all_live(self) -> tuple[LiveMetrics, ...]:
        # A copy: a scrape runs in a thread of its own.
        return tuple(live for pool in tuple(self._live.values()) for live in tuple(pool))

    def _next_slot_epoch(self) -> float:
        return min((live.next_slot_epoch for live in self._all_live() if live.next_slot_epoch > 0.0), default=0.0)

    def observer(self, pool: str = "default", vendor: str = VENDOR) -> PoolMetrics:
        """Return the observer that counts the events of one pool."""
        return PoolMetrics(self, pool, vendor)

    def watch(self, pool: str, governor: LiveMetrics) -> None:
        """Include this governor in the gauges from now on; call `unwatch` when its run is over."""
        self._live.setdefault(pool, WeakSet()).add(governor)
        for dimension in governor.limits():
            for i, gauge in enumerate(self.limits):
                gauge.labels(pool, dimension).set_function(partial(self._limit, pool, dimension, i))

    def waves(self, pool: str, is_open: int, moved_epoch: float, tokens: Mapping[str, float]) -> None:
        """Show the waves of a pool: how many are open, when one last came further, and the queue by model."""
        self.waves_open.labels(pool).set(is_open)
        self.wave_moved.labels(pool).set(moved_epoch if is_open else 0.0)
        for model, enqueued in tokens.items():
            self.queue_tokens.labels(pool, model).set(enqueued)

    def shown(self, pool: str) -> None:
        """Give the pool a separate gauge of requests in flight from now on: 0 while no governor is watched."""
        self.in_flight.labels(pool).set_function(lambda: self._in_flight(pool))

    def _in_flight(self, pool: str) -> float:
        return float(sum(live.in_flight for live in tuple(self._live.get(pool, ()))))

    def _limit(self, pool: str, dimension: str, i: int) -> float:
        # Governors of one pool that do not share a state each use a quota of their own.
        return max(
            (live.limits().get(dimension, _NO_LIMIT)[i] for live in tuple(self._live.get(pool, ()))), default=0.0
        )

    def refresh(self, pool: str) -> None:
        """Write the gauges, for other processes to read."""
        for dimension in {name for live in tuple(self._live.get(pool, ())) for name in live.limits()}:
            for i, gauge in enumerate(self.limits):
                gauge.labels(pool, dimension).set(self._limit(pool, dimension, i))
        self._active.set(sum(live.in_flight for live in self._all_live()))
        self._slot.set(self._next_slot_epoch())
        self.in_flight.labels(pool).set(self._in_flight(pool))

    def unwatch(self, pool: str) -> None:
        """Show the pool as idle: nothing in flight, no slot booked."""
        self._live.pop(pool, None)

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def serve(self, port: int, host: str = _HOST) -> Endpoint:
        """Serve `/metrics` from a thread; port 0 takes a free one. Raise BadSetting if the port is not available."""
        try:
            server, thread = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadSetting(
                f"--metrics-port {port} cannot be used on {host}: {reason}: name another", "--metrics-port"
            ) from None
        return Endpoint(server, thread, host)

    def write_textfile(self, path: str | os.PathLike[str]) -> None:
        """Write all metrics for node_exporter's textfile collector, which never sees half a file (atomic rename).

        Raise BadInput if it cannot be written. (The collector only reads names that end in `.prom`.)
        """
        name = os.fspath(path)
        try:
            write_to_textfile(name, self.registry)
        except OSError as error:
            raise BadInput(f"the metrics cannot be written: {error.strerror or error}", name) from None


_process: Metrics | None = None
_process_lock = threading.Lock()


def process_metrics() -> Metrics:
    """Return the metrics in the process's default registry, created on first use.

    If the program already has metrics of these names, they are in a separate registry, and the log says so.
    """
    global _process
    with _process_lock:
        if _process is None:
            try:
                _process = Metrics(REGISTRY)
            except ValueError as error:
                _LOG.warning("the metrics of governed clients are not in the default registry: %s", error)
                _process = Metrics()
        return _process


class Endpoint:
    """The metrics' HTTP port; close it at the end."""

    def __init__(self, server: Any, thread: threading.Thread, host: str) -> None:
        self._server = server
        self._thread = thread
        self.port: int = server.server_port
        self.url = f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PoolMetrics(Observer):
    """Counts the events of one pool. A labelled child is looked up once and kept: an event costs microseconds."""

    def __init__(self, metrics: Metrics, pool: str, vendor: str = VENDOR) -> None:
        self.metrics = metrics
        self.pool = pool
        metrics.shown(pool)
        self._throttles = metrics.rate_limit_events.labels(vendor)
        self._answers = metrics.answers.labels(pool)
        self._tokens = {kind: metrics.tokens.labels(pool, kind) for kind in ("reserved", "charged", "prompt", "output")}
        self._waits = [(f"waited_{cause}_s", metrics.waits.labels(pool, cause)) for cause in CAUSES[1:]]
        self._deferrals = {cause: metrics.deferrals.labels(pool, CAUSES[cause]) for cause in range(1, law.PAUSED + 1)}
        self._attempts = _Children(lambda outcome: metrics.attempts.labels(pool, outcome))
        self._outage = OutageWatch()
        self._outage_since = metrics.outage_since.labels(pool)
        self._requests = _Children(lambda result: metrics.requests.labels(pool, result))

    def began(self, governor: PoolState) -> None:
        """Show this governor's circuit breaker."""
        self._outage.state = governor

    def attempted(self, attempt: Attempt, answer: Answer, failure: str) -> None:
        """Count an attempt that is over."""
        if self._outage.changed():
            self._outage_since.set(time.time() if self._outage.since_s >= 0.0 else 0.0)
        self._attempts[attempt.outcome].inc()
        if attempt.outcome in THROTTLES:
            self._throttles.inc()
        self._answers.observe(max(0.0, attempt.finished_s - attempt.launched_s))
        tokens = self._tokens
        tokens["reserved"].inc(attempt.reserved_tokens)
        for kind, count in (
            ("charged", attempt.charged_tokens),
            ("prompt", attempt.prompt_tokens),
            ("output", attempt.output_tokens),
        ):
            if count > 0:
                tokens[kind].inc(count)
        for name, histogram in self._waits:
            waited_s = getattr(attempt, name)
            if waited_s > 0.0:
                histogram.observe(waited_s)

    def ended(self, request: requests.Request, failure: str, answer: Answer | None, now: float) -> None:
        """Count a request that is over."""
        self._requests[failure or "ok"].inc()

    def deferred(self, cause: int) -> None:
        """Count a request at the head that has to wait."""
        self._deferrals[cause].inc()
        if cause == law.STAGGER:
            self.metrics.stagger_delays.inc()
        elif cause == law.BY_TPM:
            self.metrics.tpm_deferrals.inc()


class _Children(dict[str, Any]):
    """Labelled children by name, each created on first use."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        self.make = make

    def __missing__(self, name: str) -> Any:
        self[name] = child = self.make(str(name))
        return child


# ---------------------------------------------------------------- the webhook


class _NoRedirect(HTTPRedirectHandler):
    """Refuses redirects: one would turn the POST into a GET without its content, so failing is better."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


class Notice:
    """An event (finished, late, stopped ...) on its way to a webhook as JSON, from a thread. Never raises or blocks.

    `event`: plain values; the caller's choice, never a prompt or a key. `wait` before the process ends; `error` says
    what went wrong, "" if it arrived.
    """

    def __init__(self, url: str, event: Mapping[str, Any], timeout_s: float = NOTIFY_S) -> None:
        self.error = "no answer in time"
        self.timeout_s = timeout_s
        # The path of a hook is its secret: only the host is ever named.
        self.host = urlsplit(url).hostname or ""
        self._thread = threading.Thread(target=self._run, args=(url, dict(event)), name="webhook", daemon=True)
        self._thread.start()

    def wait(self) -> bool:
        """Wait until it has arrived or failed, at most for its time-out; return whether it arrived."""
        self._thread.join(self.timeout_s)
        return not self._thread.is_alive() and not self.error

    def _run(self, url: str, event: dict[str, Any]) -> None:
        try:
            body = json.dumps(event, default=str).encode()
            headers = {"Content-Type": "application/json", "User-Agent": "paceline"}
            request = Request(url, data=body, headers=headers, method="POST")
            with build_opener(_NoRedirect).open(request, timeout=self.timeout_s):
                self.error = ""
        except HTTPError as error:
            self.error = f"status {error.code}"
            error.close()
        except Exception as error:
            reason = getattr(error, "reason", None)
            self.error = type(reason if isinstance(reason, BaseException) else error).__name__


def checked_hook(url: str) -> str:
    """Return the address of a webhook. Raise BadSetting, without repeating it, if it is not an http(s) address."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise BadSetting("--notify is not an address: write https://HOST/...", "--notify")
    return url

"""Prometheus gauges of the service, besides the metrics of its pools: readiness, batches, lateness.

Gauges are read from the worker at the moment of a scrape.

    paceline_ready               1 while this replica takes batches
    paceline_batches             batches that it works on, by state
    paceline_batch_late_seconds  how far after its deadline the latest of them is forecast to end; 0 = none is late
    paceline_pool_blocked        1 if a pool launches nothing because the provider refuses the account
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from governor.service.store.store import ACTIVE, BatchRow
from governor.service.worker.worker import Worker


def late_s(row: BatchRow, now: float) -> float:
    """Return how far after its deadline a batch is forecast to end, 0 = it is not, or has none. `now`: since 1970."""
    if row.deadline_s < 0.0:
        return 0.0
    left_s = row.eta_s if row.eta_s > 0.0 else 0.0
    return max(0.0, now + left_s - row.created_at - row.deadline_s)


class Gauges(Collector):
    """The service's gauges; registers itself."""

    def __init__(self, worker: Worker, registry: CollectorRegistry) -> None:
        self._worker = worker
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        worker = self._worker
        yield GaugeMetricFamily("paceline_ready", "Whether this replica takes batches", float(worker.ready))
        rows = [batch.now() for batch in list(worker.batches.values())]
        states = GaugeMetricFamily("paceline_batches", "Batches that this replica works on", labels=["state"])
        for state in ACTIVE:
            states.add_metric([state], float(sum(row.state == state for row in rows)))
        yield states
        late = max((late_s(row, time.time()) for row in rows), default=0.0)
        yield GaugeMetricFamily("paceline_batch_late_seconds", "Forecast end after the deadline, at most", late)
        blocked = GaugeMetricFamily("paceline_pool_blocked", "The provider refuses the account", labels=["pool"])
        for pool in worker.config.pools:
            lane = worker.lanes.get(pool.name)
            blocked.add_metric([pool.name], float(lane is not None and bool(lane.blocked)))
        yield blocked

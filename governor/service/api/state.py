"""The parts of the running service, as every route reaches them."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from governor.service.api.auth import Authority
from governor.service.api.events import Events, RemoteBatches
from governor.service.config import ServiceConfig
from governor.service.store.store import Store
from governor.service.worker.worker import Worker
from governor.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Service:
    """The service's parts, created together in `app`."""

    config: ServiceConfig
    store: Store
    worker: Worker
    authority: Authority
    elsewhere: RemoteBatches
    events: Events
    metrics: Metrics


def service_of(request: Request) -> Service:
    """Return the service, as the dependency of a route."""
    found: Service = request.app.state.service
    return found

"""The live state as plain values: batches as the API shows them, pools as a page shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from governor.service.store.store import ENDED, PAUSED, QUEUED, RUNNING, STOPPED, BatchRow
from governor.service.worker.worker import Worker


def batch_json(row: BatchRow) -> dict[str, Any]:
    """Return the present state of a batch; see `bodies.BatchOut`."""
    details = row.details
    over = row.state in ENDED
    return {
        "batch_id": row.batch_id,
        "name": row.name,
        "state": row.state,
        "reason": row.reason,
        "requests": row.requests,
        "done": row.done,
        "failed": row.failed,
        "in_flight": 0 if over else row.in_flight,
        "pending": max(0, row.requests - row.done - row.failed - row.in_flight),
        "attempts": row.attempts,
        "throttled": row.throttled,
        "resent": row.resent,
        "eta_s": 0.0 if over else row.eta_s if 0.0 <= row.eta_s < 1e9 else None,
        "forecast_finish_s": details.get("forecast", {}).get("finish_s"),
        "created_at": row.created_at,
        "ended_at": row.ended_at if row.ended_at >= 0.0 else None,
        "created_by": row.who,
        "template_id": row.template_id or None,
        "template_version": row.template_version or None,
        "deadline_s": row.deadline_s if row.deadline_s >= 0.0 else None,
        "finalize": bool(row.finalize),
        "via": row.via,
        "finish_by": row.finish_by if row.finish_by >= 0.0 else None,
        "waves": row.waves,
        "settings": details.get("settings", {}),
        "pools": details.get("pools", []),
    }


def accepted_json(row: BatchRow) -> dict[str, Any]:
    """Return the answer to the client that posted a batch; see `bodies.Accepted`."""
    forecast = row.details["forecast"]
    return {
        "batch_id": row.batch_id,
        "state": row.state,
        "requests": row.requests,
        "forecast_finish_s": forecast["finish_s"],
        "forecast_by": forecast["by"],
        "forecast_bound": forecast["bound"],
    }


def queue_of(rows: Iterable[BatchRow], pool: str, head: str) -> dict[str, int]:
    """Return a pool's waiting requests, by cause: their batch's hold, else the cause at the head of the queue."""
    found: dict[str, int] = {}
    for row in rows:
        if pool not in row.details.get("pools", ()) or row.state not in (QUEUED, RUNNING, PAUSED, STOPPED):
            continue
        waiting = row.requests - row.done - row.failed - row.in_flight
        cause = row.state if row.state in (PAUSED, STOPPED) else head or "launching"
        if waiting > 0:
            found[cause] = found.get(cause, 0) + waiting
    return found


def live_json(worker: Worker, *, series: bool) -> dict[str, Any]:
    """Return this replica's pools and the batches that it works on; see `bodies.Live`.

    `series`: with the last 15 minutes.
    """
    rows = [batch.now() for batch in worker.batches.values()]
    pools = []
    for lane in worker.lanes.values():
        found = lane.to_json_dict(series=series)
        found["queue"] = queue_of(rows, lane.name, found["waiting_for"])
        pools.append(found)
    return {
        "at": time.time(),
        "pools": pools,
        "batches": [batch_json(row) for row in rows],
        "replicas": 1 + worker.neighbours,
    }

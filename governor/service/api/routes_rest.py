"""All other paths: settings, what-if, live state, metrics, health."""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from governor.model.errors import BadSetting
from governor.service.api import bodies
from governor.service.api.auth import Caller, needs
from governor.service.api.incoming import QUERY, described, json_body
from governor.service.api.routes_batches import Here, Reader, found
from governor.service.api.state import Service
from governor.service.api.whatif import question_of
from governor.service.errors import NO_SIMULATOR, NOT_FOUND, ApiError
from governor.service.store.store import Change
from governor.service.worker.live import live_json
from governor.service.worker.policies import values_of

Admin = Annotated[Caller, Depends(needs("admin"))]
# Changes that are shown with the settings.
SHOWN_CHANGES = 50

router = APIRouter(dependencies=QUERY)


# ---------------------------------------------------------------- settings


def _pool(service: Service, name: str) -> str:
    return name or service.config.pools[0].name


def _change(change: Change) -> dict[str, Any]:
    changes = {name: list(pair) for name, pair in change.changes.items()}
    return {"at": change.at, "who": change.who, "pool": change.pool, "changes": changes}


async def _settings(service: Service, pool: str) -> Response:
    policies = service.worker.policies.in_force()
    if pool not in policies:
        raise ApiError(404, NOT_FOUND, f"there is no pool {pool!r}: {', '.join(policies)}")
    latest = await anyio.to_thread.run_sync(lambda: service.store.changes(0, SHOWN_CHANGES, newest=True))
    return JSONResponse(
        {
            "pool": pool,
            "settings": values_of(policies[pool]),
            "pools": {name: values_of(policy) for name, policy in policies.items()},
            "changes": [_change(change) for change in latest],
        }
    )


@router.get("/settings", response_model=bodies.SettingsOut, tags=["settings"])
async def get_settings(
    caller: Reader,
    service: Here,
    pool: Annotated[str, Query(pattern=r"^[A-Za-z0-9_.-]{0,64}$")] = "",
) -> Response:
    """Show the policy in force, and its latest changes."""
    return await _settings(service, _pool(service, pool))


@router.put(
    "/settings", response_model=bodies.SettingsOut, tags=["settings"], openapi_extra=described(bodies.SettingsChange)
)
async def put_settings(
    body: Annotated[bodies.SettingsChange, json_body(bodies.SettingsChange)], caller: Admin, service: Here
) -> Response:
    """Change settings without a restart, recorded with author and time. Settings not named stay as they are."""
    pool = _pool(service, body.pool)
    worker = service.worker
    if pool not in worker.policies.in_force():
        raise BadSetting(f"there is no pool {pool!r}: {', '.join(worker.policies.in_force())}")
    await anyio.to_thread.run_sync(worker.policies.change, caller.name, pool, body.settings)
    worker.apply_policies()
    return await _settings(service, pool)


# ---------------------------------------------------------------- what-if


@router.post("/what-if", response_model=bodies.WhatIfOut, tags=["what-if"], openapi_extra=described(bodies.WhatIf))
async def what_if(body: Annotated[bodies.WhatIf, json_body(bodies.WhatIf)], caller: Reader, service: Here) -> Response:
    """Simulate the same batch under other settings and under today's: summary and bands."""
    simulate = service.config.what_if
    if simulate is None:
        raise ApiError(501, NO_SIMULATOR, "no simulator is installed: pip install 'paceline[sim]' beside the service")
    row = await found(body.batch_id, service) if body.batch_id is not None else None
    question = await anyio.to_thread.run_sync(question_of, body, row, service)
    return JSONResponse(await anyio.to_thread.run_sync(simulate, question))


# ---------------------------------------------------------------- live state


@router.get("/live", response_model=bodies.Live, tags=["live"])
async def get_live(
    caller: Reader, service: Here, series: Annotated[bool, Query(description="With the last 15 minutes.")] = True
) -> Response:
    """Show slots, token window, queue by cause, batches with ETA, and launches and 429s over time, of this replica."""
    return JSONResponse(live_json(service.worker, series=series))


@router.get(
    "/live/events",
    response_class=StreamingResponse,
    tags=["live"],
    responses={
        200: {
            "description": "Server-sent events: `live`, twice a second.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def get_live_events(caller: Reader, service: Here) -> Response:
    """Stream the same without the series, as it changes."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(service.events.live(caller), 200, headers, media_type="text/event-stream")


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    tags=["operations"],
    responses={200: {"description": "Prometheus' text format."}},
)
async def metrics(caller: Reader, service: Here) -> Response:
    """Show Prometheus metrics of this replica."""
    return PlainTextResponse(service.metrics.text())


@router.get("/healthz", response_model=bodies.Health, tags=["operations"])
async def healthz() -> Response:
    """Report whether the process answers."""
    return JSONResponse({"status": "ok", "detail": ""})


@router.get(
    "/readyz",
    response_model=bodies.Health,
    tags=["operations"],
    responses={503: {"model": bodies.Health, "description": "It takes no batches right now."}},
)
async def readyz(service: Here) -> Response:
    """Report whether it takes batches, and if not, why."""
    worker = service.worker
    if not worker.ready:
        return JSONResponse({"status": "not ready", "detail": worker.trouble}, 503)
    notes = [f"pool {lane.name}: {note}" for lane in worker.lanes.values() for note in lane.notes]
    if worker.neighbours and not service.config.redis:
        notes.append(f"{worker.neighbours} other replicas, and no PACELINE_REDIS_URL: each takes the whole quota")
    return JSONResponse({"status": "ok", "detail": "; ".join(notes)})

"""The paths of batches: post, show, fetch results, follow events, pause, resume and cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import IO, Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from governor.journal.schema import to_json
from governor.run.account import line_of
from governor.service.api.accept import BatchSpec, Incoming
from governor.service.api.auth import Caller, needs
from governor.service.api.bodies import Accepted, BatchList, BatchName, BatchOut, ErrorOut, FinishByText, Via
from governor.service.api.events import END
from governor.service.api.incoming import QUERY, fingerprint_of, key_of, spooled, takes_lines
from governor.service.api.state import Service, service_of
from governor.service.errors import CONFLICT, KEY_REUSED, NOT_FOUND, ApiError
from governor.service.store.store import CANCEL, ENDED, PAUSE, RUN, BatchRow, Key, KeyTakenError
from governor.service.worker.live import accepted_json, batch_json

# Approximate bytes of results sent at a time.
PIECE = 64 * 1024
ID = r"^[A-Za-z0-9_-]{1,64}$"
BatchId = Annotated[str, Path(pattern=ID, description="As it was answered when the batch was posted.")]
Reader = Annotated[Caller, Depends(needs("read"))]
Runner = Annotated[Caller, Depends(needs("run"))]
Here = Annotated[Service, Depends(service_of)]
IDEMPOTENT = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The same key with the same request again is answered as before, and nothing is done twice.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,200}$"},
}
REFUSED: dict[int | str, dict[str, Any]] = {
    503: {
        "model": ErrorOut,
        "description": "BATCH_RATE_LIMITED with projected_tokens, budget_tokens, in_use_tokens, suggested_wait_s, "
        "retryable and max_runs_now; or NOT_READY, DATABASE_UNAVAILABLE.",
        "headers": {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds, where waiting helps."}},
    }
}

REPLAYED = {"Idempotency-Replayed": "true"}

router = APIRouter(tags=["batches"], dependencies=QUERY)


# ---------------------------------------------------------------- posting


async def replayed(service: Service, key: Key | None) -> Response | None:
    """Return the earlier answer to the same request, if there was one."""
    if key is None:
        return None
    kept = await anyio.to_thread.run_sync(service.store.kept, key)
    if kept is None:
        return None
    if kept.fingerprint != key.fingerprint:
        text = f"Idempotency-Key {key.key!r} was used for another request: take a new one"
        raise ApiError(409, KEY_REUSED, text)
    return Response(kept.answer, kept.status, REPLAYED, media_type="application/json")


async def while_there(request: Request, incoming: Incoming, read: Callable[[], None]) -> None:
    """Read a batch in a thread, for as long as its client waits for the answer."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        incoming.left.set()

    watching = asyncio.create_task(watch())
    try:
        await anyio.to_thread.run_sync(read)
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def accepted(
    request: Request, incoming: Incoming, service: Service, key: Key | None, read: Callable[[], None]
) -> Response:
    """Read, judge and accept a batch: 202, or the earlier answer. Raise ApiError 503 if it is refused."""
    before = await replayed(service, key)
    if before is not None:
        return before
    row: BatchRow | None = None
    try:
        await while_there(request, incoming, read)
        judged = await incoming.judge()
        if not judged.verdict.ok:
            raise judged.refusal()
        row = await incoming.accept(judged, key, accepted_json)
    except KeyTakenError:
        again = await replayed(service, key)
        assert again is not None
        return again
    finally:
        if row is None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(incoming.discard)
    headers = {"Location": f"/batches/{row.batch_id}"}
    return JSONResponse(accepted_json(row), 202, headers)


@router.post(
    "/batches",
    status_code=202,
    dependencies=[Depends(takes_lines)],
    response_model=Accepted,
    responses=REFUSED,
    openapi_extra={
        "parameters": [IDEMPOTENT],
        "requestBody": {
            "required": True,
            "description": "Requests in OpenAI's batch format, one JSON object per line.",
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                "application/jsonl": {"schema": {"type": "string"}},
            },
        },
    },
)
async def post_batch(
    request: Request,
    caller: Runner,
    service: Here,
    deadline_s: Annotated[
        float | None,
        Query(gt=0, le=1e9, allow_inf_nan=False, description="Seconds until the last answer."),
    ] = None,
    finalize: Annotated[bool, Query(description="Finish cut answers by one more call.")] = False,
    settings: Annotated[
        list[Annotated[str, Query(pattern=r"^[A-Z0-9_]{1,64}=[!-~]{1,64}$")]] | None,
        Query(max_length=20, description="NAME=VALUE, of this batch alone; may be repeated."),
    ] = None,
    name: Annotated[BatchName, Query()] = "",
    via: Annotated[Via, Query()] = "live",
    finish_by: Annotated[FinishByText, Query()] = "",
) -> Response:
    """Run a batch of raw lines. It streams in; 202 when all of it is durable."""
    own = dict(each.split("=", 1) for each in settings or ())
    upload = await spooled(request)
    try:
        way = [via, finish_by] if via != "live" else []
        fingerprint = fingerprint_of(upload.sha256, deadline_s, finalize, own, name, *way)
        key = key_of(request, caller.name, fingerprint)
        incoming = Incoming(
            service.worker,
            BatchSpec(
                who=caller.name,
                deadline_s=deadline_s,
                finalize=finalize,
                settings=own,
                name=name,
                via=via,
                finish_by=finish_by,
            ),
        )
        return await accepted(
            request, incoming, service, key, lambda: incoming.read(lambda: _from_start(upload.file), "batch")
        )
    finally:
        upload.file.close()


def _from_start(file: IO[bytes]) -> IO[bytes]:
    file.seek(0)
    return file


# ---------------------------------------------------------------- looking


async def found(batch_id: str, service: Service) -> BatchRow:
    """Return the present state of the batch of that id. Raise `ApiError` 404 if there is none."""
    row = service.worker.batch(batch_id)
    if row is None:
        row = await anyio.to_thread.run_sync(service.store.batch, batch_id)
    if row is None:
        raise ApiError(404, NOT_FOUND, f"there is no batch {batch_id!r}")
    return row


@router.get("/batches", response_model=BatchList)
async def get_batches(
    caller: Reader,
    service: Here,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[int, Query(ge=0, le=2**53, description="`next` of the page before.")] = 0,
) -> Response:
    """List batches, newest first."""
    rows = await anyio.to_thread.run_sync(service.store.batches, limit, before)
    shown = [batch_json(service.worker.batch(row.batch_id) or row) for row in rows]
    return JSONResponse({"batches": shown, "next": rows[-1].number if len(rows) == limit else None})


@router.get("/batches/{batch_id}", response_model=BatchOut)
async def get_batch(batch_id: BatchId, caller: Reader, service: Here) -> Response:
    """Show a batch with its progress and ETA."""
    return JSONResponse(batch_json(await found(batch_id, service)))


def _pieces(service: Service, row: BatchRow, *, good: bool) -> Iterator[bytes]:
    """Yield the lines of results or errors so far, many at a time."""
    parts: list[str] = []
    size = 0
    for result in service.worker.ledger.records(row.number).results():
        succeeded, line = line_of(result)
        if succeeded is good:
            parts.append(line)
            size += len(line)
            if size >= PIECE:
                yield ("\n".join(parts) + "\n").encode()
                parts, size = [], 0
    if parts:
        yield ("\n".join(parts) + "\n").encode()


_LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Lines of OpenAI's batch output format, in the order of the input.",
        "content": {"application/jsonl": {"schema": {"type": "string"}}},
    }
}


async def _lines(batch_id: str, service: Service, *, good: bool) -> Response:
    row = await found(batch_id, service)
    headers = {"X-Batch-State": row.state}
    return StreamingResponse(_pieces(service, row, good=good), 200, headers, media_type="application/jsonl")


@router.get("/batches/{batch_id}/results", response_class=StreamingResponse, responses=_LINES)
async def get_results(batch_id: BatchId, caller: Reader, service: Here) -> Response:
    """Stream the results so far as JSONL."""
    return await _lines(batch_id, service, good=True)


@router.get("/batches/{batch_id}/errors", response_class=StreamingResponse, responses=_LINES)
async def get_errors(batch_id: BatchId, caller: Reader, service: Here) -> Response:
    """Stream the failures so far as JSONL."""
    return await _lines(batch_id, service, good=False)


@router.get(
    "/batches/{batch_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events: `progress` with the batch as it stands, `end` when it is over.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "The Last-Event-ID says that the end was heard: a browser stops asking."},
    },
)
async def get_events(batch_id: BatchId, request: Request, caller: Reader, service: Here) -> Response:
    """Stream the batch's changes as server-sent events."""
    row = await found(batch_id, service)
    if row.state in ENDED and request.headers.get("last-event-id") == END:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(service.events.batch(batch_id, caller), 200, headers, media_type="text/event-stream")


# ---------------------------------------------------------------- steering


async def _asked(request: Request, batch_id: str, wanted: str, who: str, service: Service) -> Response:
    row = await found(batch_id, service)
    key = key_of(request, who, fingerprint_of(batch_id, wanted))
    before = await replayed(service, key)
    if before is not None:
        # A command whose answer was never kept, since its process died, has been recorded all the same.
        return before if before.body else JSONResponse(batch_json(row), headers=REPLAYED)
    if row.state in ENDED or (row.wanted == CANCEL and wanted != CANCEL):
        raise ApiError(409, CONFLICT, f"batch {batch_id} is {row.state}: it takes no more commands")
    try:
        await service.worker.ask(row, wanted, key)
    except KeyTakenError:
        return JSONResponse(batch_json(await found(batch_id, service)), headers=REPLAYED)
    answer = batch_json(await found(batch_id, service))
    if key is not None:
        await anyio.to_thread.run_sync(service.store.answered, key, to_json(answer))
    return JSONResponse(answer)


_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorOut, "description": "It is over; or the Idempotency-Key was used for another request."}
}
_STEER: dict[str, Any] = {
    "response_model": BatchOut,
    "responses": _CONFLICT,
    "openapi_extra": {"parameters": [IDEMPOTENT]},
}


@router.post("/batches/{batch_id}/cancel", **_STEER)
async def cancel(batch_id: BatchId, request: Request, caller: Runner, service: Here) -> Response:
    """Cancel the batch: launch nothing more, let requests in flight end, record the rest as BATCH_CANCELLED."""
    return await _asked(request, batch_id, CANCEL, caller.name, service)


@router.post("/batches/{batch_id}/pause", **_STEER)
async def pause(batch_id: BatchId, request: Request, caller: Runner, service: Here) -> Response:
    """Pause the batch: launch none of its lines until `resume`; other batches go on."""
    return await _asked(request, batch_id, PAUSE, caller.name, service)


@router.post("/batches/{batch_id}/resume", **_STEER)
async def resume(batch_id: BatchId, request: Request, caller: Runner, service: Here) -> Response:
    """Resume a batch that was paused, or that has stopped."""
    return await _asked(request, batch_id, RUN, caller.name, service)

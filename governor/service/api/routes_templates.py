"""The paths of templates, and of the batches made from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from governor.journal.schema import to_json
from governor.service.api.accept import BatchSpec, Incoming
from governor.service.api.bodies import (
    Accepted,
    BatchRun,
    Template,
    TemplateList,
    TemplateOut,
    TemplateVersions,
    VerdictOut,
)
from governor.service.api.incoming import QUERY, RunBody, described, fingerprint_of, json_body, key_of, run_body
from governor.service.api.routes_batches import (
    ID,
    IDEMPOTENT,
    REFUSED,
    Here,
    Reader,
    Runner,
    accepted,
    replayed,
    while_there,
)
from governor.service.api.state import Service
from governor.service.api.templates import checked, lines_of
from governor.service.errors import NOT_FOUND, ApiError
from governor.service.store.store import KeyTakenError, TemplateRow

TemplateId = Annotated[str, Path(pattern=ID)]
Posted = Annotated[Template, json_body(Template)]
router = APIRouter(tags=["templates"], dependencies=QUERY)

_RUN_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/BatchRun"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "Inputs as JSONL or CSV."},
                        "runs": {"type": "integer", "minimum": 1, "maximum": 100_000},
                        "deadline_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e9},
                        "finalize": {"type": "boolean"},
                        "settings": {"type": "string", "description": "A JSON object."},
                        "name": {"type": "string", "description": "A JSON text of up to 100 characters."},
                    },
                }
            },
        },
    },
}


def shown(row: TemplateRow) -> dict[str, Any]:
    """Return a version of a template; see `bodies.TemplateOut`."""
    rest = {"version": row.version, "created_at": row.created_at, "created_by": row.who}
    return {"template_id": row.template_id} | row.content | rest


async def found(template_id: str, service: Service, version: int | None = None) -> TemplateRow:
    """Return the template. Raise `ApiError` 404 if there is none."""
    row = await anyio.to_thread.run_sync(service.store.template, template_id, version)
    if row is None:
        of = "" if version is None else f" in version {version}"
        raise ApiError(404, NOT_FOUND, f"there is no template {template_id!r}{of}")
    return row


# ---------------------------------------------------------------- templates


@router.post(
    "/templates",
    status_code=201,
    response_model=TemplateOut,
    openapi_extra={"parameters": [IDEMPOTENT], **described(Template)},
)
async def post_template(body: Posted, request: Request, caller: Runner, service: Here) -> Response:
    """Create a template."""
    await anyio.to_thread.run_sync(checked, body)
    key = key_of(request, caller.name, fingerprint_of(body.model_dump()))
    before = await replayed(service, key)
    if before is not None:
        return before

    def add() -> TemplateRow:
        return service.store.add_template(body.model_dump(), caller.name, key, lambda row: to_json(shown(row)))

    try:
        row = await anyio.to_thread.run_sync(add)
    except KeyTakenError:
        again = await replayed(service, key)
        assert again is not None
        return again
    return JSONResponse(shown(row), 201, {"Location": f"/templates/{row.template_id}"})


@router.get("/templates", response_model=TemplateList)
async def get_templates(
    caller: Reader,
    service: Here,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    after: Annotated[str, Query(pattern=r"^[A-Za-z0-9_-]{0,64}$", description="`next` of the page before.")] = "",
) -> Response:
    """List templates, by id."""
    rows = await anyio.to_thread.run_sync(service.store.templates, limit, after)
    following = rows[-1].template_id if len(rows) == limit else None
    return JSONResponse({"templates": [shown(row) for row in rows], "next": following})


@router.get("/templates/{template_id}", response_model=TemplateOut)
async def get_template(
    template_id: TemplateId,
    caller: Reader,
    service: Here,
    version: Annotated[int | None, Query(ge=1, le=2**31, description="An older one; else the newest.")] = None,
) -> Response:
    """Show a template."""
    return JSONResponse(shown(await found(template_id, service, version)))


@router.get("/templates/{template_id}/versions", response_model=TemplateVersions)
async def get_versions(template_id: TemplateId, caller: Reader, service: Here) -> Response:
    """List every version of a template."""
    await found(template_id, service)
    rows = await anyio.to_thread.run_sync(service.store.template_versions, template_id)
    return JSONResponse({"versions": [shown(row) for row in rows]})


@router.put("/templates/{template_id}", response_model=TemplateOut, openapi_extra=described(Template))
async def put_template(template_id: TemplateId, body: Posted, caller: Runner, service: Here) -> Response:
    """Create a new version of a template; running batches continue with theirs."""
    await anyio.to_thread.run_sync(checked, body)
    row = await anyio.to_thread.run_sync(service.store.change_template, template_id, body.model_dump(), caller.name)
    if row is None:
        raise ApiError(404, NOT_FOUND, f"there is no template {template_id!r}")
    return JSONResponse(shown(row))


@router.delete("/templates/{template_id}", status_code=204, response_class=Response)
async def delete_template(template_id: TemplateId, caller: Runner, service: Here) -> Response:
    """Delete a template. Batches made from it go on."""
    if not await anyio.to_thread.run_sync(service.store.delete_template, template_id):
        raise ApiError(404, NOT_FOUND, f"there is no template {template_id!r}")
    return Response(status_code=204)


# ---------------------------------------------------------------- batches of templates


def _incoming(service: Service, body: BatchRun, who: str, row: TemplateRow, *, stores: bool) -> Incoming:
    spec = BatchSpec(
        who=who,
        deadline_s=body.deadline_s,
        finalize=body.finalize,
        settings=body.settings,
        template=(row.template_id, row.version),
        name=body.name,
        via=body.via,
        finish_by=body.finish_by,
    )
    return Incoming(service.worker, spec, stores=stores)


def _reader(incoming: Incoming, row: TemplateRow, run: RunBody) -> Callable[[], None]:
    template = Template.model_validate(row.content)
    return lambda: incoming.read(lambda: lines_of(template, run.inputs()), "inputs", run.body.runs)


@router.post(
    "/templates/{template_id}/preflight", response_model=VerdictOut, responses=REFUSED, openapi_extra=_RUN_BODY
)
async def preflight(template_id: TemplateId, request: Request, caller: Runner, service: Here) -> Response:
    """Return only the verdict: whether such a batch may start now. Nothing is kept."""
    row = await found(template_id, service)
    run = await run_body(request)
    try:
        incoming = _incoming(service, run.body, caller.name, row, stores=False)
        await while_there(request, incoming, _reader(incoming, row, run))
        judged = await incoming.judge()
    finally:
        run.close()
    return JSONResponse(judged.to_json_dict())


@router.post(
    "/templates/{template_id}/batch-run",
    status_code=202,
    response_model=Accepted,
    responses=REFUSED,
    openapi_extra={"parameters": [IDEMPOTENT], **_RUN_BODY},
)
async def batch_run(template_id: TemplateId, request: Request, caller: Runner, service: Here) -> Response:
    """Run a template on inputs: 202 with the forecast finish, or 503 if it may not start."""
    row = await found(template_id, service)
    run = await run_body(request)
    try:
        key = key_of(request, caller.name, run.fingerprint)
        incoming = _incoming(service, run.body, caller.name, row, stores=True)
        return await accepted(request, incoming, service, key, _reader(incoming, row, run))
    finally:
        run.close()

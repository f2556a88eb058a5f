"""The application: its assembly, its lifetime, its OpenAPI."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from governor import __version__
from governor.service.api import routes_batches, routes_rest, routes_templates
from governor.service.api.auth import Authority, RequestGuard
from governor.service.api.bodies import ErrorOut
from governor.service.api.events import Events, RemoteBatches
from governor.service.api.gauges import Gauges
from governor.service.api.incoming import MODELS
from governor.service.api.quick import ProgressRoute
from governor.service.api.state import Service
from governor.service.config import ServiceConfig
from governor.service.errors import HANDLERS
from governor.service.store.base import ServiceDatabase
from governor.service.store.ledger import Ledger
from governor.service.store.store import Store
from governor.service.worker.worker import Worker
from governor.telemetry.metrics import Metrics

# Threads that wait for the database or read uploads.
THREADS = 32
DESCRIPTION = (
    "Runs batches of LLM calls within one quota: templates, guarded batches, what-if. Errors are "
    '`{"error": {"code", "message", "details"}}`; codes do not change.'
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut, "description": text}
    for status, text in (
        (400, "It cannot be read."),
        (401, "A bearer token is needed, or is not known."),
        (403, "The token's scope does not include this."),
        (404, "There is no such thing."),
        (405, "Not with this method."),
        (409, "It contradicts what was asked before, or what is already over."),
        (413, "The body is too large."),
        (415, "Not this kind of body."),
        (422, "It has not the shape that it must have, or a value that is not allowed."),
        (500, "A bug in the service."),
        (501, "What it needs is not installed."),
        (503, "Not right now."),
    )
}


def service_of(config: ServiceConfig) -> Service:
    """Return the parts. Open, lock and migrate the database; raise JournalError if that fails."""
    database = ServiceDatabase(config.database)
    try:
        database.prepared()
        store = Store(database)
        metrics = Metrics()
        worker, authority = Worker(config, store, Ledger(store), metrics), Authority(config, store)
        elsewhere = RemoteBatches(store)
        Gauges(worker, metrics.registry)
    except BaseException:
        database.closed()
        raise
    return Service(config, store, worker, authority, elsewhere, Events(worker, elsewhere, authority), metrics)


def app_of(service: Service) -> FastAPI:
    """Return the application over these parts; its worker lives as long as it does."""
    app = FastAPI(
        title="Paceline",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan,
        responses=_ERRORS,
        exception_handlers=HANDLERS,
        separate_input_output_schemas=False,
        strict_content_type=False,  # a stated type is checked, by `takes_json`
        docs_url=None,  # FastAPI's own load their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.state.authority = service.authority
    for router in (routes_templates.router, routes_batches.router, routes_rest.router):
        app.include_router(router)
    add_page(app)
    app.add_middleware(RequestGuard, config=service.config, authority=app.state.authority)
    _described(app)
    return app


def served(service: Service) -> ProgressRoute:
    """Return the application as it is served."""
    return ProgressRoute(app_of(service), service.worker, service.elsewhere, service.authority)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    work = asyncio.create_task(service.worker.run())
    try:
        yield
    finally:
        service.events.close()
        service.worker.stop()
        with suppress(asyncio.CancelledError):
            await work
        service.store.database.closed()


def _described(app: FastAPI) -> None:
    """Extend FastAPI's OpenAPI with what it cannot see: bodies that a route reads by itself."""
    made = app.openapi

    def described() -> dict[str, Any]:
        fresh = app.openapi_schema is None
        found = made()
        if fresh:
            schemas = found["components"]["schemas"]
            for name, model in MODELS.items():
                stated = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(stated.pop("$defs", {}))
                schemas[name] = stated
            if app.state.authority.open:
                # On loopback no token is needed.
                for operations in found["paths"].values():
                    for operation in operations.values():
                        if "security" in operation:
                            operation["security"] = [*operation["security"], {}]
        return found

    app.openapi = described  # type: ignore[method-assign]


# ---------------------------------------------------------------- the page


STATIC = Path(str(files("governor.service"))) / "static"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Requested again each time, and answered "not modified": after an upgrade the page never mixes two versions.
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """Files below `static/`, with the page's headers."""

    def file_response(self, full_path: str | os.PathLike[str], *args: Any, **rest: Any) -> Response:
        """Return Starlette's response with the page's headers."""
        response = super().file_response(full_path, *args, **rest)
        response.headers.update(HEADERS)
        return response


async def index() -> FileResponse:
    """The page."""
    return FileResponse(STATIC / "index.html", headers=HEADERS)


async def docs() -> FileResponse:
    """Show the interface, to be read and tried: Swagger UI, from this package's own files."""
    # Its pictures are in its style sheet.
    policy = HEADERS["Content-Security-Policy"].replace("img-src 'self'", "img-src 'self' data:")
    return FileResponse(STATIC / "docs.html", headers=HEADERS | {"Content-Security-Policy": policy})


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`, the interface's at `/docs`, and the files of both below `/static`."""
    app.add_api_route("/", index, include_in_schema=False, response_class=FileResponse)
    app.add_api_route("/docs", docs, include_in_schema=False, response_class=FileResponse)
    app.mount("/static", PageFiles(directory=STATIC), name="static")

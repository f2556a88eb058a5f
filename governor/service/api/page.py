"""The page: its files, and the headers that keep everything else away from it.

The files are served as they lie in the package: no build step, nothing from elsewhere. The Content-Security-Policy lets
the browser load and ask this origin alone, run no inline script and no inline style, and be framed by nobody. The page
itself needs no token; what it asks for may, and it has a field for one.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

STATIC = Path(str(files("governor.service"))) / "static"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked again each time, and answered "not modified": after an upgrade no part of the page is of the day before.
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """Files below `static/`, with the page's headers."""

    def file_response(self, full_path: str | os.PathLike[str], *args: Any, **rest: Any) -> Response:
        """As Starlette's, with the page's headers."""
        response = super().file_response(full_path, *args, **rest)
        response.headers.update(HEADERS)
        return response


async def index() -> FileResponse:
    """The page."""
    return FileResponse(STATIC / "index.html", headers=HEADERS)


async def docs() -> FileResponse:
    """The interface, to be read and tried: Swagger UI, of this package's own files."""
    # Its pictures stand in its style sheet.
    policy = HEADERS["Content-Security-Policy"].replace("img-src 'self'", "img-src 'self' data:")
    return FileResponse(STATIC / "docs.html", headers=HEADERS | {"Content-Security-Policy": policy})


def add_page(app: FastAPI) -> None:
    """Serves the page at `/`, the interface's at `/docs`, and what both load below `/static`."""
    app.add_api_route("/", index, include_in_schema=False, response_class=FileResponse)
    app.add_api_route("/docs", docs, include_in_schema=False, response_class=FileResponse)
    app.mount("/static", PageFiles(directory=STATIC), name="static")

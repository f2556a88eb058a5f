"""The service's error answers: one shape, and codes that stay as they are.

    {"error": {"code": "BATCH_RATE_LIMITED", "message": "one line with the figures and the remedy", "details": {...}}}

An answer or a log repeats nothing of a request except names of fields and settings: the rest may be a prompt.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from governor.journal.database import JournalError
from governor.model.errors import BadInput, BadSetting, FailureCode, PacelineError
from governor.service.store.base import NoRoomError

log = logging.getLogger("paceline.service")

INVALID_REQUEST, _BAD_INPUT, BAD_SETTING, BAD_TEMPLATE = "INVALID_REQUEST", "BAD_INPUT", "BAD_SETTING", "BAD_TEMPLATE"
NOT_FOUND, METHOD_NOT_ALLOWED, CONFLICT = "NOT_FOUND", "METHOD_NOT_ALLOWED", "CONFLICT"
UNAUTHENTICATED, FORBIDDEN, BODY_TOO_LARGE = "UNAUTHENTICATED", "FORBIDDEN", "BODY_TOO_LARGE"
KEY_REUSED, NOT_READY, DATABASE_UNAVAILABLE = "IDEMPOTENCY_KEY_REUSED", "NOT_READY", "DATABASE_UNAVAILABLE"
NO_ROOM = "NO_ROOM"
NO_SIMULATOR, INTERNAL_ERROR, UNSUPPORTED_MEDIA = "NO_SIMULATOR", "INTERNAL_ERROR", "UNSUPPORTED_MEDIA_TYPE"
RATE_LIMITED = FailureCode.BATCH_RATE_LIMITED.value
EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_BY_STATUS = {
    400: INVALID_REQUEST,
    404: NOT_FOUND,
    405: METHOD_NOT_ALLOWED,
    413: BODY_TOO_LARGE,
    415: UNSUPPORTED_MEDIA,
}


class ApiError(Exception):
    """Raised to answer with an error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.details = details or {}
        self.headers = headers or {}


def content_of(code: str, message: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"code": code, "message": message, "details": details or {}}}


def answer_of(error: ApiError) -> JSONResponse:
    """Return the response for an error."""
    content = jsonable_encoder(content_of(error.code, str(error), error.details))
    return JSONResponse(content, error.status, error.headers)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an `ApiError`."""
    assert isinstance(error, ApiError)
    return answer_of(error)


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer a request of an invalid shape; its content is not repeated."""
    assert isinstance(error, RequestValidationError)
    found = [_complaint(each) for each in error.errors()]
    first = found[0] if found else {"where": "body", "what": "it cannot be read"}
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    message = f"{first['where']}: {first['what']}{more}"
    return answer_of(ApiError(422, INVALID_REQUEST, message, {"errors": found[:20]}))


def _complaint(each: Mapping[str, Any]) -> dict[str, str]:
    """Return one of pydantic's complaints; if the body is not JSON, it names a character instead of a field."""
    *where, last = each["loc"] or ("body",)
    if each["type"] == "json_invalid" and isinstance(last, int):
        what = f"not JSON at character {last}: {each.get('ctx', {}).get('error', each['msg'])}"
    else:
        where, what = [*where, last], str(each["msg"])
    return {"where": ".".join(map(str, where)), "what": what[:200]}


async def on_http(request: Request, error: Exception) -> JSONResponse:
    """Answer what the framework itself refuses: no such path, no such method, a body that is not a form."""
    assert isinstance(error, HTTPException)
    code = _BY_STATUS.get(error.status_code, INVALID_REQUEST if error.status_code < 500 else INTERNAL_ERROR)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    headers = dict(error.headers or {})
    if error.status_code == 405 and (methods := _methods(request)):
        headers["Allow"] = methods
    return answer_of(ApiError(error.status_code, code, message, headers=headers))


def _methods(request: Request) -> str:
    """Return the methods allowed at a path, "" = no such path: the router names those of its first route alone."""
    found: set[str] = set()
    for path, operations in request.app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), request.url.path):
            found |= {name.upper() for name in operations}
    return ", ".join(sorted(found))


async def on_paceline(request: Request, error: Exception) -> JSONResponse:
    """Answer a `PacelineError` of the rest of Paceline."""
    assert isinstance(error, PacelineError)
    return answer_of(api_error(error))


def api_error(error: PacelineError) -> ApiError:
    """Return the error as an `ApiError`."""
    if isinstance(error, NoRoomError):
        log.error("%s", error)
        return ApiError(503, NO_ROOM, f"the service has no room: {error}", {"retryable": True}, {"Retry-After": "60"})
    if isinstance(error, JournalError):
        log.error("%s", error)
        text = "the database cannot be used right now: try again in a moment; what was accepted is not lost"
        return ApiError(503, DATABASE_UNAVAILABLE, text, {"retryable": True}, {"Retry-After": "2"})
    if isinstance(error, BadSetting):
        return ApiError(422, BAD_SETTING, str(error))
    if isinstance(error, BadInput):
        return ApiError(422, _BAD_INPUT, str(error), {"line": error.line} if error.line else {})
    if error.retryable:
        return ApiError(503, NOT_READY, str(error), {"retryable": True}, {"Retry-After": "2"})
    return ApiError(422, _BAD_INPUT, str(error))


async def on_os_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of this machine: a full disk during uploads, no more descriptors."""
    assert isinstance(error, OSError)
    if error.errno not in EXHAUSTED:
        return await on_bug(request, error)
    log.error("%s %s: %s", request.method, request.url.path, error.strerror)
    text = f"the service's machine has run out of something ({error.strerror}): try again in a moment"
    return answer_of(ApiError(503, NO_ROOM, text, {"retryable": True}, {"Retry-After": "10"}))


async def on_left(request: Request, error: Exception) -> JSONResponse:
    """Answer a client that left before its body was complete, which is no fault of ours: no one reads this."""
    log.debug("%s %s: the client has left", request.method, request.url.path)
    return answer_of(ApiError(400, INVALID_REQUEST, "the client has left"))


async def on_bug(request: Request, error: Exception) -> JSONResponse:
    """Answer a bug of ours."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return answer_of(ApiError(500, INTERNAL_ERROR, "something went wrong inside the service; its log says what"))


HANDLERS: dict[Any, Any] = {
    ApiError: on_api_error,
    RequestValidationError: on_invalid,
    HTTPException: on_http,
    PacelineError: on_paceline,
    OSError: on_os_error,
    ClientDisconnect: on_left,
    Exception: on_bug,
}

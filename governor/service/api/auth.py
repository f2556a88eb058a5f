"""Access control: bearer tokens with a scope, and the guard that every request passes first.

The guard checks address, origin and the size of the body; routes state the scope that they need (`needs`).

A token has 256 random bits, so its SHA-256 is as good as a slow hash, and that alone is stored. Scopes include each
other: admin may run, run may read. On loopback without tokens every user of this machine is admin; then a browser must
not be a way in from elsewhere, so the Host must be this machine's own name (no DNS rebinding), and a request that
changes something must not come from another origin's page.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import urlsplit

import anyio.to_thread
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from governor.journal.database import JournalError
from governor.model.errors import PacelineError
from governor.service.config import SCOPES, ServiceConfig, is_local_host
from governor.service.errors import BODY_TOO_LARGE, FORBIDDEN, UNAUTHENTICATED, ApiError, answer_of, api_error
from governor.service.store.store import Store

PREFIX = "pcl_"
_REFRESH_S = 2.0
SAFE = ("GET", "HEAD", "OPTIONS")
UPLOADS = ("/batches",)
# The largest body without inputs: a template, settings.
SMALL_BYTES = 2 * 2**20
PUBLIC = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")
_bearer = HTTPBearer(auto_error=False, description="A token of `paceline token add`.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True, slots=True)
class Caller:
    """The author of a request.

    `name`: as it is recorded; `scope`: the widest granted; `sha256`: of the token, "" = none.
    """

    name: str
    scope: str
    sha256: str = field(default="", repr=False)

    def may(self, scope: str) -> bool:
        """Return whether the caller's scope includes that one."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


LOCAL = Caller("local", "admin")


def new_token() -> str:
    """Return a token that cannot be guessed."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(token: str) -> str:
    """Return the stored form of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


class Authority:
    """Knows the tokens, with a delay of a few seconds at most."""

    def __init__(self, config: ServiceConfig, store: Store) -> None:
        self.open = config.is_local and not config.require_token
        self._store = store
        self._known: dict[str, tuple[str, str]] = {}
        self._read_at = -_REFRESH_S
        self._turn = asyncio.Lock()

    @property
    def is_fresh(self) -> bool:
        """Return whether the known tokens were read a moment ago."""
        return time.monotonic() - self._read_at < _REFRESH_S

    def knows(self, token: str) -> bool:
        """Return whether the token is among those known."""
        return hash_of(token) in self._known

    async def caller(self, token: str) -> Caller:
        """Return the caller that presents that token, "" = none. Raise `ApiError` 401 for an unknown one."""
        if not token:
            if self.open:
                return LOCAL
            raise _unknown("a bearer token is needed: send `Authorization: Bearer TOKEN`")
        await self._refresh()
        # Looked up by its hash, so the time that it takes reveals nothing of the token.
        sha256 = hash_of(token)
        found = self._known.get(sha256)
        if found is None:
            raise _unknown("that token is not known here: `paceline token add NAME` makes one")
        return Caller(*found, sha256)

    async def still_knows(self, caller: Caller) -> bool:
        """Return whether the token of an earlier caller is still valid; True while that cannot be read."""
        if caller.sha256:
            with suppress(JournalError):
                await self._refresh()
        return not caller.sha256 or caller.sha256 in self._known

    async def _refresh(self) -> None:
        if not self.is_fresh:
            async with self._turn:  # the first caller to find it old reads for all
                if not self.is_fresh:
                    begun_at = time.monotonic()
                    self._known = await anyio.to_thread.run_sync(self._store.tokens)
                    self._read_at = begun_at


def _unknown(message: str) -> ApiError:
    return ApiError(401, UNAUTHENTICATED, message, headers={"WWW-Authenticate": "Bearer"})


def needs(scope: str) -> Callable[..., Any]:
    """Return the dependency of a route that needs a scope; it provides the `Caller`."""

    async def checked(request: Request, credentials: Credentials) -> Caller:
        authority: Authority = request.app.state.authority
        if credentials is None and request.headers.get("authorization"):
            raise _unknown("the Authorization header is not `Bearer TOKEN`")
        caller = await authority.caller(credentials.credentials if credentials else "")
        if not caller.may(scope):
            raise ApiError(403, FORBIDDEN, f"token {caller.name!r} has scope {caller.scope}, this needs {scope}")
        return caller

    return checked


class RequestGuard:
    """Checks each request first: where it comes from, and how much it brings."""

    def __init__(self, app: ASGIApp, config: ServiceConfig, authority: Authority) -> None:
        self._app = app
        self._config = config
        self._authority = authority
        self._guards = config.is_local and not config.require_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            if self._guards:
                _check_origin(scope["method"], headers)
            limit = self._limit(scope["path"], headers.get(b"content-type", ""))
            stated = headers.get(b"content-length", "")
            if not (self._authority.open or _is_public(scope["path"])):
                # Nothing of a stranger's body is read, however small.
                await self._authority.caller(_token_in(headers.get(b"authorization", "")))
            if stated.isdecimal() and int(stated) > limit:
                raise _too_large(limit)
        except PacelineError as error:
            await answer_of(api_error(error))(scope, receive, send)
            return
        except ApiError as error:
            await answer_of(error)(scope, receive, send)
            return
        body = _Body(receive, limit)

        async def sent(message: Message) -> None:
            # The reader of a body may take its early end for a failure of its own.
            if not body.is_too_large:
                await send(message)

        await self._app(scope, body.receive, sent)
        if body.is_too_large:
            await answer_of(_too_large(limit))(scope, receive, send)

    def _limit(self, path: str, content_type: str) -> int:
        """Return a body's limit: it may be long if it streams to the disk, not if it is held in memory."""
        if path in UPLOADS:
            return self._config.upload_bytes
        if path.endswith(("/batch-run", "/preflight")) and content_type.lower().startswith("multipart/form-data"):
            return self._config.upload_bytes
        if path.endswith(("/batch-run", "/preflight", "/what-if")):
            return self._config.body_bytes
        return min(self._config.body_bytes, SMALL_BYTES)


def _is_public(path: str) -> bool:
    """Return whether a path is open to every client: the page's files, the interface's description, the health."""
    return path in PUBLIC or path.startswith("/static/")


def _token_in(stated: str) -> str:
    """Return the token of an Authorization header, "" = there is none. Raise `ApiError` 401 for another kind."""
    kind, _, token = stated.partition(" ")
    if stated and (kind.lower() != "bearer" or not token):
        raise _unknown("the Authorization header is not `Bearer TOKEN`")
    return token.strip()


class _Body:
    """Return the same body; `receive` raises `ApiError` once it turns out to be too long."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self.is_too_large = False
        self._receive = receive
        self._limit = limit
        self._seen = 0

    async def receive(self) -> Message:
        """Return the next piece."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._limit:
                self.is_too_large = True
                raise _too_large(self._limit)
        return message


def _too_large(limit: int) -> ApiError:
    text = f"the body is larger than {limit:,} bytes, which is the limit here: send it in parts"
    return ApiError(413, BODY_TOO_LARGE, text, {"limit_bytes": limit})


@lru_cache(256)
def is_ours(host: str) -> bool:
    """Return whether a Host header names this machine, or nothing."""
    try:
        return not host or is_local_host(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _check_origin(method: str, headers: dict[bytes, str]) -> None:
    host = headers.get(b"host", "")
    try:
        origin = urlsplit(headers.get(b"origin", "")).netloc
    except ValueError:
        origin = "?"
    if not is_ours(host):
        raise ApiError(403, FORBIDDEN, "without tokens only this machine is served: use http://127.0.0.1")
    if method not in SAFE and b"origin" in headers and origin != host:
        raise ApiError(403, FORBIDDEN, "another site's page may not change anything here")

"""Background responses of the synthetic provider: created at once, answered by the live path, asked for until they end.

A request with `background: true` is the same attempt as without it: it is charged, refused and answered alike. Refusals
come on the spot; anything else is queued first. Responses are kept until the provider is reset.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from governor.model.requests import RESPONSES

_ONE = re.compile(r"/v1/responses/([^/]+)(/cancel)?")
# Marks an attempt whose answer is kept in the background.
_QUEUED = "paceline.queued"
# What refuses a request does so at once; the machine's seconds until it counts as queued.
_SOON_S = 0.01

Serve = Callable[[int, Any, Any, Any], Awaitable[None]]
Sent = Callable[[Any, int, bytes], Awaitable[None]]


@dataclass(slots=True, eq=False)
class BackgroundResponse:
    """A response in the background. `status`: of the HTTP answer that ends it, 0 = not yet."""

    id: str
    model: str
    task: asyncio.Task[None]
    status: int = 0
    body: bytes = b""
    is_cancelled: bool = False

    def state(self) -> dict[str, Any]:
        """Return the response as it is now."""
        if self.is_cancelled or not self.status:
            found = {"id": self.id, "object": "response", "background": True, "model": self.model, "output": []}
            return {**found, "status": "cancelled" if self.is_cancelled else "in_progress", "error": None}
        ended: dict[str, Any] = json.loads(self.body)
        if self.status != 200:
            error = ended.get("error") or {}
            ended = {"object": "response", "status": "failed", "model": self.model, "output": [], "error": error}
        return {**ended, "id": self.id, "background": True}


class BackgroundDesk:
    """The background responses of one provider. `serve`: serves an attempt; `sent`: sends an answer."""

    def __init__(self, serve: Serve, sent: Sent) -> None:
        self.kept: dict[str, BackgroundResponse] = {}
        self._serve = serve
        self._sent = sent
        self._numbers = count()

    async def took(self, endpoint: int, raw: bytes, scope: Any, send: Any) -> bool:
        """Answer a request that asks for a background response; return whether it does."""
        if endpoint != RESPONSES or _QUEUED in scope or not _is_background(raw):
            return False
        # Without the client's connection, which may break without harm.
        await self._create(raw, {**scope, _QUEUED: True, "state": {}}, send)
        return True

    async def _create(self, raw: bytes, scope: Any, send: Any) -> None:
        parts: list[dict[str, Any]] = []

        async def received() -> dict[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def kept(message: dict[str, Any]) -> None:
            parts.append(message)

        async def served() -> None:
            await self._serve(RESPONSES, scope, received, kept)
            made.body = b"".join(part.get("body", b"") for part in parts[1:])
            made.status = parts[0]["status"]

        model = str(json.loads(raw).get("model"))
        made = BackgroundResponse(f"resp_bg{next(self._numbers):014x}", model, asyncio.create_task(served()))
        await asyncio.wait({made.task}, timeout=_SOON_S)
        if made.status not in (0, 200):
            await self._sent(send, made.status, made.body)
            return
        self.kept[made.id] = made
        first = {**made.state(), "status": "queued", "output": [], "usage": None}
        await self._sent(send, 200, json.dumps(first).encode())

    async def answer(self, method: str, path: str, send: Any) -> bool:
        """Answer a look at a response, or its cancellation; return whether the path is one of these."""
        found = _ONE.fullmatch(path)
        if found is None or method != ("POST" if found[2] else "GET"):
            return False
        response = self.kept.get(found[1])
        if response is None:
            error = {"message": f"Response with id '{found[1]}' not found.", "type": "invalid_request_error"}
            await self._sent(send, 404, json.dumps({"error": error}).encode())
            return True
        if found[2] and not response.status:
            response.is_cancelled = True
            response.task.cancel()
        await self._sent(send, 200, json.dumps(response.state()).encode())
        return True


def _is_background(raw: bytes) -> bool:
    """Return whether a request's body asks for a background response."""
    if b"background" not in raw:
        return False
    try:
        body = json.loads(raw)
    except ValueError:
        return False
    return isinstance(body, dict) and body.get("background") is True

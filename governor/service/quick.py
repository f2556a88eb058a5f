"""The one path that is asked all the time, answered with as little as can be: the progress of a batch.

What lives here: `GET /batches/{id}` for a batch that this replica works on, as an ASGI middleware. What must not: any
answer that `routes_batches.get_batch` would not give: whatever is not plainly this case goes on to it.

Hundreds of clients ask for progress several times a second, and all of them are told the same: the answer is made once
for each state of the batch, and FastAPI's routing, dependencies and validation, five times as much work as the rest,
are spared.
"""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Receive, Scope, Send

from governor.service.auth import Authority
from governor.service.live import batch_json
from governor.service.store import BatchRow
from governor.service.worker import Worker

PREFIX = "/batches/"
KEPT = 1_000


class Quick:
    """See the module."""

    def __init__(self, app: ASGIApp, worker: Worker, authority: Authority) -> None:
        self._app = app
        self._worker = worker
        self._authority = authority
        self._made: dict[str, tuple[BatchRow, bytes]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = self._body(scope) if scope["type"] == "http" else None
        if body is None:
            await self._app(scope, receive, send)
            return
        headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _body(self, scope: Scope) -> bytes | None:
        path: str = scope["path"]
        if scope["method"] != "GET" or not path.startswith(PREFIX) or scope["query_string"]:
            return None
        row = self._worker.batch(path[len(PREFIX) :])
        if row is None or not self._may_read(scope):
            return None
        known = self._made.get(row.batch_id)
        if known is None or known[0] != row:
            if len(self._made) >= KEPT:
                self._made.clear()
            body = json.dumps(batch_json(row), separators=(",", ":")).encode()
            known = self._made[row.batch_id] = (row, body)
        return known[1]

    def _may_read(self, scope: Scope) -> bool:
        """Whether that is known without asking anybody: any scope may read."""
        stated = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not stated:
            return self._authority.open
        kind, _, token = stated.decode("latin-1").partition(" ")
        return kind.lower() == "bearer" and self._authority.is_fresh and self._authority.knows(token)

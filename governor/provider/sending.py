"""Turns a job of the driver into a call of the adapter: body, id and time-out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from governor.law import FINALIZE
from governor.model.keyed import attempt_key
from governor.model.pools import Connect, Pool
from governor.model.requests import Answer, Outcome
from governor.model.work import Job, Sender
from governor.provider.answers import malformed
from governor.provider.openai_adapter import Adapter, capped

# Between two looks at a background response: from the first, growing with its age, to the last.
_POLL_MIN_S, _POLL_MAX_S, _POLL_SHARE = 1.0, 15.0, 0.05
# An attempt whose response is still in progress ends itself, shortly before the driver would cancel it: the provider
# answers, so this is no outage.
_TIMEOUT_SHARE = 0.98
_UNDER_WAY = ("queued", "in_progress")
_GONE = (404, 410)
_PASSING = (Outcome.THROTTLED, Outcome.SLOW_DOWN, Outcome.OVERLOADED, Outcome.SERVER_ERROR, Outcome.LOCAL)


class Backgrounds(Protocol):
    """Remembers the background responses of a run. `ids`: by request, those that have not ended."""

    ids: dict[int, str]

    async def created(self, request: int, response_id: str) -> None:
        """Remember a response, durably."""

    def over(self, request: int) -> None:
        """Forget the response of a request."""


class PoolSender:
    """Sends the attempts of one pool through the official SDK."""

    def __init__(self, pool: Pool, environment: Mapping[str, str]) -> None:
        self._adapter = Adapter(pool, environment)
        self._finalize_max_tokens = pool.policy.finalize_max_tokens
        self.backgrounds: Backgrounds | None = None

    async def __call__(self, job: Job, timeout_s: float) -> Answer:
        """Send one attempt. A finalize pass sends the same request with its own output cap."""
        assert job.work is not None
        request = job.work.request
        overrides = capped(request, self._finalize_max_tokens) if job.lane == FINALIZE else None
        key = attempt_key(job.lane, job.tries)
        if request.body is not None and request.body.get("background") is True and self.backgrounds is not None:
            if job.lane != FINALIZE:
                return await self._in_background(job, key, timeout_s, self.backgrounds)
            overrides = {**(overrides or {}), "background": False}
        return await self._adapter.send(request, attempt=key, body_overrides=overrides, timeout_s=timeout_s)

    async def _in_background(self, job: Job, key: int, timeout_s: float, kept: Backgrounds) -> Answer:
        """Create a background response, once, and poll it until it has ended; a later attempt goes on polling it."""
        assert job.work is not None
        request, loop = job.work.request, asyncio.get_running_loop()
        begin = loop.time()
        if request.index not in kept.ids:
            answer = await self._adapter.send(request, attempt=key, timeout_s=timeout_s)
            response_id = (answer.body or {}).get("id")
            if not _is_under_way(answer) or not isinstance(response_id, str):
                return answer
            await kept.created(request.index, response_id)
        path = f"/responses/{kept.ids[request.index]}"
        while True:
            age_s = loop.time() - begin
            await asyncio.sleep(min(max(_POLL_SHARE * age_s, _POLL_MIN_S), _POLL_MAX_S))
            left_s = _TIMEOUT_SHARE * timeout_s - (loop.time() - begin)
            if left_s <= 0.0:
                text = f"its background response {path[11:]} is still in progress: the next attempt asks for it again"
                return Answer(Outcome.TIMEOUT, 408, message=text)
            answer = await self._adapter.look(path, timeout_s=left_s)
            if _is_under_way(answer) or _passes(answer):
                continue
            if answer.outcome in (Outcome.TIMEOUT, Outcome.DROPPED) or answer.status in (401, 403):
                return answer  # the response goes on without us
            kept.over(request.index)
            if answer.status in _GONE:
                return malformed(f"its background response {path[11:]} is gone, which was paid for")
            return answer

    async def cancel_backgrounds(self) -> int:
        """Cancel the background responses that have not ended, so that they cost no more; return how many were."""
        kept = self.backgrounds
        found = dict(kept.ids) if kept is not None else {}
        cancelled = 0
        for request, response_id in found.items():
            answer = await self._adapter.look(f"/responses/{response_id}/cancel", method="POST", timeout_s=_POLL_MAX_S)
            if kept is not None and (200 <= answer.status < 300 or answer.status in _GONE):
                kept.over(request)
                cancelled += 1
        return cancelled

    async def aclose(self) -> None:
        """Close all connections."""
        await self._adapter.aclose()


def _passes(answer: Answer) -> bool:
    """Return whether a look failed in a way that says nothing of the response."""
    if 200 <= answer.status < 300:
        return answer.outcome is Outcome.MALFORMED and answer.body is None
    return answer.outcome in _PASSING


def _is_under_way(answer: Answer) -> bool:
    """Return whether an answer is a response that has not ended."""
    return 200 <= answer.status < 300 and (answer.body or {}).get("status") in _UNDER_WAY


def connect_with(environment: Mapping[str, str]) -> Connect:
    """Return a function that makes the sender of a pool, with keys from these variables."""

    def connect(pool: Pool) -> Sender:
        return PoolSender(pool, environment)

    return connect

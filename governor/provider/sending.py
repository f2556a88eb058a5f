"""Turns a job of the driver into a call of the adapter: body, id and time-out."""

from __future__ import annotations

from collections.abc import Mapping

from governor.law import FINALIZE
from governor.model.keyed import attempt_key
from governor.model.pools import Connect, Pool
from governor.model.requests import Answer
from governor.model.work import Job, Sender
from governor.provider.openai_adapter import Adapter, capped


class PoolSender:
    """Sends the attempts of one pool through the official SDK."""

    def __init__(self, pool: Pool, environment: Mapping[str, str]) -> None:
        self._adapter = Adapter(pool, environment)
        self._finalize_max_tokens = pool.policy.finalize_max_tokens

    async def __call__(self, job: Job, timeout_s: float) -> Answer:
        """Send one attempt. A finalize pass sends the same request with its own output cap."""
        assert job.work is not None
        request = job.work.request
        overrides = capped(request, self._finalize_max_tokens) if job.lane == FINALIZE else None
        key = attempt_key(job.lane, job.tries)
        return await self._adapter.send(request, attempt=key, body_overrides=overrides, timeout_s=timeout_s)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._adapter.aclose()


def connect_with(environment: Mapping[str, str]) -> Connect:
    """Return a function that makes the sender of a pool, with keys from these variables."""

    def connect(pool: Pool) -> Sender:
        return PoolSender(pool, environment)

    return connect

"""`paceline doctor`: send one tiny call to each pool and report on key, model, limits and settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from governor.model.estimate import CHAT, sizes_of
from governor.model.pools import Connect, Pool, key_of
from governor.model.requests import Answer, Outcome, Request, Scope, url_of
from governor.model.words import duration
from governor.model.work import Job, Work
from governor.provider.account_limits import account_limits, drift
from governor.telemetry.watch import limit_text

_TIMEOUT_S = 30.0
# Newer models reject fewer than 16.
MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The answer of one pool. `disagree`: remarks on settings that differ from the account's grant.

    `endpoint`: the limits that the provider's own endpoint states, by dimension; None if it was not asked.
    """

    pool: str
    address: str
    model: str
    answer: Answer
    took_s: float
    disagree: tuple[str, ...]
    endpoint: Mapping[str, float] | None = None

    @property
    def exit_code(self) -> int:
        """Return 0 if the pool answers, 4 if the account is refused, 1 for anything else."""
        if self.answer.scope is Scope.ACCOUNT:
            return 4
        return 0 if self.answer.outcome is Outcome.OK else 1

    def to_json_dict(self) -> dict[str, Any]:
        """Return plain values."""
        a = self.answer
        return {
            "address": self.address,
            "model": self.model,
            "outcome": str(a.outcome),
            "status": a.status,
            "error_code": a.error_code,
            "message": a.message,
            "took_s": round(self.took_s, 3),
            "limits": {x.dimension: {"limit": x.limit, "remaining": x.remaining} for x in a.limits},
            "endpoint": None if self.endpoint is None else dict(self.endpoint),
            "disagree": list(self.disagree),
        }

    def text(self, *, named: bool) -> str:
        """Return the diagnosis for people."""
        a = self.answer
        lines = [f"{f'pool {self.pool}: ' if named else ''}{self.address}, model {self.model}"]
        if a.outcome is Outcome.OK:
            lines.append(f"  answers in {duration(self.took_s)}: key and model are good")
        else:
            words = " ".join(a.message.split())[:300]
            status = f"{a.status} " if a.status else ""
            lines.append(f"  does not answer: {status}{a.error_code or a.outcome}{f': {words}' if words else ''}")
        for limit in a.limits:
            left = (
                f"{limit.remaining:,.0f} left" if limit.remaining >= 0.0 else f"{-limit.remaining:,.0f} too many used"
            )
            lines.append(f"  {limit.dimension} {limit.limit:,.0f}, {left}")
        if self.endpoint is not None:
            stated = ", ".join(f"{name} {limit:,.0f}" for name, limit in self.endpoint.items())
            lines.append(f"  the provider's endpoint states {stated}")
        if a.outcome is Outcome.OK and not a.limits:
            lines.append("  states no limits in its headers: OPENAI_SYNC_HEADERS will find nothing to go by")
        lines += [f"  {text}" for text in self.disagree]
        if (a.limits or self.endpoint) and not self.disagree:
            lines.append("  the settings agree with what it grants")
        return "\n".join(lines)


def examine(pools: Sequence[Pool], environment: Mapping[str, str], connect: Connect, model: str) -> list[Diagnosis]:
    """Send one call to each pool, one after the other. Raise BadSetting if a key is missing."""
    for pool in pools:
        key_of(pool, environment)

    async def run() -> list[Diagnosis]:
        return [await _examined(pool, environment, connect, model) for pool in pools]

    return asyncio.run(run())


async def _examined(pool: Pool, environment: Mapping[str, str], connect: Connect, model: str) -> Diagnosis:
    named = next((name for name in pool.models if "*" not in name and "?" not in name), model)
    body: dict[str, Any] = {
        "model": named,
        "messages": [{"role": "user", "content": "Say OK."}],
        "max_completion_tokens": MAX_TOKENS,
    }
    request = Request(0, "doctor", url_of(CHAT), named, body, sizes_of(CHAT, body), pool.name)
    limits = account_limits(pool, environment, named)
    send = connect(pool)
    began = time.monotonic()
    try:
        answer = await send(Job(Work(request, 0.0), 0, 0.0, -1.0, -1, 0.0), _TIMEOUT_S)
    finally:
        await send.aclose()
    stated = {limit.dimension: limit.limit for limit in answer.limits}
    # Where both state a limit, the endpoint's is the account's.
    remarks = [limit_text(name, limit, pool.policy) for name, limit in {**stated, **(limits or {})}.items()]
    texts = [*remarks, *drift(limits or {}, stated)]
    address = pool.address or "https://api.openai.com/v1"
    return Diagnosis(pool.name, address, named, answer, time.monotonic() - began, tuple(filter(None, texts)), limits)

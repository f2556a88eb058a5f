"""A LangChain rate limiter backed by a governor.

    model = ChatAnything(rate_limiter=GovernedRateLimiter(tokens_per_call=2_000))

LangChain tells a limiter neither the size of a call nor its end. So each call reserves the same number of tokens, and
neither concurrency nor retries are governed. For a chat model on an SDK that `governed` supports, `governed(model)`
governs both.
"""

from __future__ import annotations

import os
from itertools import count
from math import inf

from langchain_core.rate_limiters import BaseRateLimiter

from governor.model.errors import Refused
from governor.model.policy import Policy
from governor.model.pools import default_pools
from governor.model.requests import Answer, Outcome, Request, Sizes
from governor.model.work import Work
from governor.profiles.loader import with_dimensions
from governor.provider.transport import at_once
from governor.run.governed import portal_of
from governor.scheduler.driver import Governor
from governor.scheduler.portal import Lease, portal_to


class GovernedRateLimiter(BaseRateLimiter):
    """Admits a call when the settings allow it. `tokens_per_call`: the reservation of each call, prompt and answer.

    `governor`: a quota that other callers may share; by default one with the environment's settings, shared with other
    processes if PACELINE_REDIS_URL is set.
    """

    def __init__(self, tokens_per_call: int, governor: Governor | None = None) -> None:
        (pool,) = default_pools(Policy.from_env(os.environ), os.environ)
        self._portal = portal_of(with_dimensions(pool)) if governor is None else portal_to(governor)
        self._tokens = tokens_per_call
        self._count = count(1)

    def acquire(self, *, blocking: bool = True) -> bool:
        """Wait for a place and return True; without `blocking` return at once whether there was one."""
        lease = self._lease(waits=blocking, by_thread=True)
        try:
            at_once(lease.begin())
        except Refused:
            if blocking:
                raise
            return False
        lease.over(Answer(Outcome.OK, 200))
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """Wait for a place in an event loop; otherwise like `acquire`."""
        lease = self._lease(waits=blocking, by_thread=False)
        try:
            await lease.begin()
        except Refused:
            if blocking:
                raise
            return False
        lease.over(Answer(Outcome.OK, 200))
        return True

    def _lease(self, *, waits: bool, by_thread: bool) -> Lease:
        sizes = Sizes(-1, 0, 0, 0, 0, 0, 0, 1, -1)
        work = Work(Request(next(self._count), "", "", "", None, sizes), float(self._tokens))
        return self._portal.lease(work, blocking=by_thread, max_wait_s=inf if waits else 0.0)

"""A batch of via=auto in one pool: the planner of `paceline run --via auto`, with the pool's feed for live calls.

What the planner gives to live calls goes into the feed, where the batch takes turns with the others of the pool. Flex
is not used: its calls would share the pool's sender with batches that did not ask for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any, cast

from governor.batchapi.collect import DriverContext
from governor.batchapi.driver import WaveDriver
from governor.forecast.mixes import Situation
from governor.journal.records import Records
from governor.journal.rows import Pending
from governor.model.policy import Policy
from governor.model.prices import Spending
from governor.model.work import Work
from governor.run.via.auto_run import Mixer
from governor.scheduler.driver import Governor
from governor.service.worker.feed import Cursor
from governor.service.worker.lane import Lane


class GivenCursor(Cursor):
    """The requests that a planner has given to live calls; there may be more at any time."""

    def __init__(self, batch: int, works: deque[Work]) -> None:
        self.batch = batch
        self.served = 0.0
        self.drained = self.closed = False
        self._works = works

    @property
    def has_some(self) -> bool:
        return bool(self._works)

    def next(self) -> Work:
        work = self._works.popleft()
        self.served += work.reserve
        return work

    def wants_more(self) -> bool:
        return False

    def read(self, then: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        asyncio.get_running_loop().call_soon(then)

    async def close(self) -> None:
        self.closed = True
        self._works.clear()


@dataclass(slots=True)
class _Left:
    """What the planner reads of a batch: requests and tokens left, and the mean time of an answer in its pool."""

    batch: Any
    lane: Lane

    @property
    def left(self) -> int:
        return int(self.batch.left)

    @property
    def left_tokens(self) -> float:
        return float(self.batch.left_tokens)

    @property
    def service_s(self) -> float:
        return self.lane.service_s


@dataclass(slots=True)
class _View:
    """The pool as the planner sees it; `PoolRun` in a run of the command line."""

    name: str
    policy: Policy
    governor: Governor
    meter: _Left
    assumed_s: float
    ending: str = ""


@dataclass(slots=True)
class _Source:
    """Records and spending, as the planner reads them."""

    journal: Records
    spent: Spending


class BatchMixer(Mixer):
    """Plans a batch in one pool. `batch`: the `RunningBatch`. `deadline_at`: on the pool's clock."""

    def __init__(
        self, batch: Any, lane: Lane, driver: WaveDriver, around: DriverContext, journal: Records, deadline_at: float
    ) -> None:
        view = _View(lane.name, lane.policy, lane.governor, _Left(batch, lane), lane.assumed_s or 1.0)
        super().__init__(cast(Any, view), driver, around, cast(Any, _Source(journal, lane.meter.spent)), deadline_at)
        self._batch = batch
        self._lane = lane
        self._flex_from = inf
        # Calls of before a pause that are still in flight: they may come back to the queue by themselves.
        self.place.given.update(batch.flying)

    def _has_left(self) -> bool:
        return bool(self._batch.left > 0)

    async def _live(self) -> None:
        number, feed = self._batch.number, self._lane.feed
        while not self._is_over:
            await self._fed.wait()
            self._fed.clear()
            if not self.place.feed:
                continue
            if number in feed.cursors:
                feed.came()
            else:
                feed.add(GivenCursor(number, self.place.feed))

    def _work_of(self, pending: Pending) -> Work:
        return replace(super()._work_of(pending), finalizes=False, begun=self._lane.governor.mark())

    def _situation(self, waiting: list[Pending], now: float) -> Situation:
        found = super()._situation(waiting, now)
        requests, tokens = found.live_left
        left, left_tokens = self._batch.left, self._batch.left_tokens
        # Other batches take turns with this one: what of theirs would go before its end comes on top.
        ahead, ahead_tokens = self._lane.ahead_of(left, left_tokens)
        return replace(found, live_left=(requests + ahead - left, tokens + ahead_tokens - left_tokens))

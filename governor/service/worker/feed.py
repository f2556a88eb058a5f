"""Choose whose line is next in one pool: batches take turns by the tokens that they have had.

Theory of operation. Each cursor counts the tokens it has handed out; the next line comes from the cursor with the least
(start-time fair queueing, Goyal et al. 1996, with whole lines). A cursor that joins starts where the least of the
others stands, so that it neither overtakes for missed turns nor waits for the others to catch up. A governor pulls one
line ahead; an empty feed is not the end: `more` is called when there is something again.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice

from governor.journal.records import Records
from governor.journal.rows import Pending
from governor.model.work import Begun, Work

_CHUNK = 100


class Cursor:
    """The lines of one batch in one pool, as they come to be launched. `is_new`: none of them was launched before.

    `work_of`: returns a pending request as work, under the settings of the moment at which it is handed out. `begun`:
    the moment from which the batch waits. `drained`: every line that was pending has been handed out.
    """

    def __init__(
        self,
        batch: int,
        records: Records,
        pool: str,
        *,
        longest_first: bool,
        is_new: bool,
        work_of: Callable[[Pending, Begun], Work],
        begun: Begun,
    ) -> None:
        self.batch = batch
        self.served = 0.0
        self.drained = False
        self.closed = False
        self._rows = records.pending(pool, longest_first=longest_first, is_new=is_new)
        self._work_of = work_of
        self._begun = begun
        self._ready: deque[Pending] = deque()
        self._reading: asyncio.Task[None] | None = None

    @property
    def has_some(self) -> bool:
        """Return whether a line is at hand."""
        return bool(self._ready)

    def next(self) -> Work:
        """Return the next line; `has_some` must be true."""
        work = self._work_of(self._ready.popleft(), self._begun)
        self.served += work.reserve
        return work

    def wants_more(self) -> bool:
        """Return whether the next chunk is to be read now."""
        return not (self.drained or self.closed) and len(self._ready) < _CHUNK // 2 and self._reading is None

    def read(self, then: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Read the next chunk in a thread, then call `then`, in the event loop; call `failed` with an exception."""
        self._reading = asyncio.create_task(self._read(then, failed))

    async def _read(self, then: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        try:
            rows = await asyncio.to_thread(lambda: list(islice(self._rows, _CHUNK)))
        except BaseException as error:
            self._reading = None
            if not isinstance(error, asyncio.CancelledError):
                failed(error)
            return
        self._reading = None
        if self.closed:
            return
        self.drained = len(rows) < _CHUNK
        self._ready.extend(rows)
        then()

    async def close(self) -> None:
        """Hand out nothing more."""
        self.closed = True
        self._ready.clear()
        if self._reading is not None:
            await asyncio.wait([self._reading])


class Feed(Iterator[Work]):
    """The source of one pool's governor: an iterator that may have more after it had none.

    `more`: called, in the event loop, when there is something again. `failed`: when a cursor cannot be read.
    """

    def __init__(self, more: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        self.cursors: dict[int, Cursor] = {}
        self.filled = asyncio.Event()
        self._more = more
        self._failed = failed

    def add(self, cursor: Cursor) -> None:
        """Add a batch's cursor."""
        cursor.served = min((other.served for other in self.cursors.values()), default=0.0)
        self.cursors[cursor.batch] = cursor
        cursor.read(self.came, self._failed)

    def remove(self, batch: int) -> Cursor | None:
        """Remove a batch, which hands out nothing more, and return its cursor for closing."""
        cursor = self.cursors.pop(batch, None)
        if cursor is not None:
            cursor.closed = True
        return cursor

    def __next__(self) -> Work:
        ready = [cursor for cursor in self.cursors.values() if cursor.has_some]
        if not ready:
            self.filled.clear()
            raise StopIteration
        cursor = min(ready, key=lambda each: each.served)
        work = cursor.next()
        if cursor.drained and not cursor.has_some:
            del self.cursors[cursor.batch]
        elif cursor.wants_more():
            cursor.read(self.came, self._failed)
        return work

    def came(self) -> None:
        """A cursor may have lines again."""
        for cursor in [each for each in self.cursors.values() if each.drained and not each.has_some]:
            del self.cursors[cursor.batch]
        if any(cursor.has_some for cursor in self.cursors.values()):
            self.filled.set()
            self._more()


class RosterLine:
    """Batches that share a pool, as (requests, tokens) that wait: the work that precedes the end of any of them.

    Turns go by tokens: only as much of a longer batch goes first as a shorter one has itself. The sums are made once,
    so that asking for each of a thousand batches does not take a million steps.
    """

    def __init__(self, batches: Iterable[tuple[int, float]]) -> None:
        known = sorted((tokens, float(requests)) for requests, tokens in batches if tokens > 0.0)
        self._tokens = [tokens for tokens, _ in known]
        # Before the i-th: all that shorter batches have. From it on: requests per token, times as much as is asked for.
        self._before = list(accumulate(known, _added, initial=(0.0, 0.0)))
        rates = accumulate((requests / tokens for tokens, requests in reversed(known)), initial=0.0)
        self._rates = list(rates)[::-1]

    def ahead_of(self, requests: int, tokens: float, *, is_in: bool) -> tuple[int, float]:
        """Return requests and tokens launched by the end of a batch of that size, with it; `is_in`: one of these."""
        if is_in and tokens > 0.0:
            requests, own = 0, 0.0  # it is among them
        else:
            own = tokens
        i = bisect_right(self._tokens, tokens)
        sum_tokens, total = self._before[i]
        sum_tokens += own + (len(self._tokens) - i) * tokens
        total += requests + self._rates[i] * tokens
        return round(total), sum_tokens


def _added(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]

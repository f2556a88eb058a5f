"""Batches of other replicas and batches that are over, read once for all clients that ask within a moment."""

from __future__ import annotations

import asyncio
import time

from governor.service.store.store import BatchRow, Store

# Whoever owns a batch writes down where it stands twice a second.
AGE_S = 0.25
KEPT = 1_000


class Elsewhere:
    """See the module. All of it in the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, tuple[float, asyncio.Future[BatchRow | None]]] = {}

    async def batch(self, batch_id: str) -> BatchRow | None:
        """The batch as it is stored, or was up to AGE_S ago: read once for all who ask. May raise `JournalError`."""
        now = time.monotonic()
        known = self._read.get(batch_id)
        if known is None or now - known[0] >= AGE_S:
            if len(self._read) >= KEPT:
                self._read.clear()
            reading = asyncio.ensure_future(asyncio.to_thread(self._store.batch, batch_id))
            known = self._read[batch_id] = (now, reading)
        try:
            # Shielded: one who goes away takes nobody's reading along.
            found = await asyncio.shield(known[1])
        except BaseException:
            if known[1].done():
                self._read.pop(batch_id, None)
            raise
        if found is None:
            self._read.pop(batch_id, None)  # it may be accepted the next moment
        return found

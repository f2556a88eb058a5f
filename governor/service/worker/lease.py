"""This replica's lease, renewed by a separate thread, which no request and no busy event loop can starve.

On SQLite there is nothing to renew: the lock on the file lets one process in at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from governor.journal.database import JournalError
from governor.service.store.base import ServiceDatabase
from governor.service.store.ledger import AGAIN_S, LOST, LeaseLostError
from governor.service.store.store import Store


class ReplicaLease:
    """A lease of `lease_s` seconds that began at `began_at`, on the monotonic clock.

    `told`: called from the thread with each failure to renew, and with None after a success that followed one. After a
    `LeaseLostError` it is not called again.
    """

    def __init__(
        self,
        store: Store,
        replica: int,
        lease_s: float,
        *,
        began_at: float,
        told: Callable[[JournalError | None], None],
    ) -> None:
        self._where = store.database.where
        self._replica = replica
        self._lease_s = lease_s
        self._told = told
        self._ended = threading.Event()
        self._lost = False
        self._until = began_at + lease_s
        self._thread: threading.Thread | None = None
        if store.database.is_sqlite:
            self._until = float("inf")
        else:
            self._thread = threading.Thread(target=self._renew, name="paceline-lease", daemon=True)
            self._thread.start()

    async def held(self) -> None:
        """Return while the lease is this replica's, after a renewal if it has lapsed.

        Raise `LeaseLostError` once it is not. Called before each send: a process that was frozen for longer than its
        lease sends nothing.
        """
        while not self._lost:
            if time.monotonic() < self._until:
                return
            await asyncio.sleep(0.05)
        raise LeaseLostError(LOST)

    def end(self) -> None:
        """Stop renewing it."""
        self._ended.set()

    def _renew(self) -> None:
        # A separate connection: requests may have taken all others.
        database = ServiceDatabase(self._where)
        store = Store(database)
        wait_s = self._lease_s / 3.0
        failed = False
        try:
            while not self._ended.wait(wait_s):
                at = time.monotonic()
                try:
                    is_ours = store.renewed(self._replica, self._lease_s)
                except JournalError as error:
                    failed = True
                    wait_s = min(AGAIN_S, self._lease_s / 3.0)
                    self._told(error)
                    continue
                if not is_ours:
                    self._lost = True
                    self._told(LeaseLostError(LOST))
                    return
                self._until = at + self._lease_s
                wait_s = self._lease_s / 3.0
                if failed:
                    failed = False
                    self._told(None)
        finally:
            database.closed()

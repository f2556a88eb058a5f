"""Background responses in the journal: which request is which response at the provider, until that one has ended."""

from __future__ import annotations

import asyncio

from sqlalchemy import delete, insert, select

from governor.journal.journal import Journal
from governor.journal.schema import background, requests


class BackgroundRecords:
    """The responses under way of one pool of a journal, opened to run.

    A response is on the disk before it is asked for: a process that is killed then goes on to ask for it, and creates
    no other one.
    """

    def __init__(self, journal: Journal, pool: str) -> None:
        self._journal = journal
        query = select(background).join(requests, requests.c.request == background.c.request)
        with journal.writing() as connection:
            rows = connection.execute(query.where(requests.c.pool == pool)).all()
        self.ids = {int(row.request): str(row.response_id) for row in rows}

    async def created(self, request: int, response_id: str) -> None:
        """A response was created for a request; returns when that is durable."""
        self.ids[request] = response_id
        await asyncio.to_thread(self._write, request, response_id)

    def over(self, request: int) -> None:
        """The response has ended, or is gone: the next attempt creates another one."""
        if self.ids.pop(request, None) is not None:
            self._write(request, "")

    def _write(self, request: int, response_id: str) -> None:
        with self._journal.writing() as connection:
            connection.execute(delete(background).where(background.c.request == request))
            if response_id:
                connection.execute(insert(background), {"request": request, "response_id": response_id})

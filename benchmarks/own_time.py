"""Live runs as on an idle machine, as fast as they can be computed: an event loop that counts only its own time.

Client and server share one loop, and speak HTTP through pairs of sockets, in which what is written can be read at once.
The journal is written by no thread, but at once. The loop's clock is the processor time of this process and the time
for which there was nothing to do, which is skipped. What other programs take of processor and disk does not show.
With `counts_work` false each turn of the loop takes `TURN_S` in place of its processor time: a run can be repeated to
the microsecond, on any machine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sim.serving.server import Provider, protocol_of

# No connection is made to it.
BASE_URL = "http://127.0.0.1:9/v1"
# A request takes some 30 turns of the loop from its launch to its answer: 1.5 ms, as much as its work takes.
TURN_S = 5e-5


class AtOnce(concurrent.futures.Executor):
    """Does each piece of work where it is handed in: no clock can jump meanwhile."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """The future is done."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def without_threads() -> Iterator[None]:
    """Thread pools that are made meanwhile work at once."""
    usual = concurrent.futures.ThreadPoolExecutor
    concurrent.futures.ThreadPoolExecutor = AtOnce  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        concurrent.futures.ThreadPoolExecutor = usual  # type: ignore[misc]


class _Skipping(selectors.DefaultSelector):
    skipped_s = 0.0
    turns = 0

    def select(self, timeout: float | None = None) -> Any:
        self.turns += 1
        events = super().select(0.0 if timeout is not None else None)
        if not events and timeout is not None:
            self.skipped_s += max(0.0, timeout)
        return events


class OwnTimeLoop(asyncio.SelectorEventLoop):
    """See the module. Each connection that is made leads to the provider, or to the one of that port."""

    def __init__(self, provider: Provider | Mapping[int, Provider], *, counts_work: bool = True) -> None:
        self._counts_work = counts_work
        self._skipping = _Skipping()
        super().__init__(self._skipping)
        by_port = provider if isinstance(provider, Mapping) else {0: provider}
        for each in by_port.values():
            each.clock = self.time
        self._protocols = {port: protocol_of(each) for port, each in by_port.items()}

    def time(self) -> float:
        """Seconds that it has worked or waited."""
        worked_s = time.process_time() if self._counts_work else TURN_S * self._skipping.turns
        return worked_s + self._skipping.skipped_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """At once and here: the clock should not jump while a thread works."""
        return asyncio.wrap_future(AtOnce().submit(func, *args), loop=self)

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Any, host: Any = None, port: int = 0, *_: Any, **__: Any
    ) -> Any:
        """One end of a pair; the other is the provider's."""
        protocol = self._protocols.get(port) or self._protocols[0]
        mine, theirs = socket.socketpair()
        for end in (mine, theirs):
            end.setblocking(False)
        await self.connect_accepted_socket(protocol, theirs)
        return await super().create_connection(protocol_factory, sock=mine)

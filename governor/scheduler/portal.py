"""Access to a governor from any thread and any event loop, and across a fork.

A governor works in one event loop. A program may have several, or none: threads that call a blocking client, one loop
per `asyncio.run`, a notebook's loop beside a library's. A `Portal` determines the loop in which its governor lives, its
home. This is the first loop that uses it, where a permit costs nothing more. Once a blocking client takes part, it is
the loop of the process's background thread, since a thread that waits for its own loop waits for ever. Calls from other
loops and threads are carried out in the home. When the home has ended, the next caller's loop replaces it, and permits
granted in the old one are given back (`Governor.bind`).

A quota shared through a store has a governor in each loop instead, each with its own connections.

After a fork the child starts with the existing bookings and nothing in flight: the parent keeps its permits.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from math import inf
from typing import Any, TypeVar, cast

from governor.model.errors import PacelineError
from governor.model.requests import Answer, Limit
from governor.model.work import Work
from governor.scheduler.attempts import NoLoop
from governor.scheduler.driver import BATCH, Governor
from governor.scheduler.permits import Permit

_T = TypeVar("_T")
Loop = asyncio.AbstractEventLoop
# Creates the background thread's loop.
new_loop: Callable[[], Loop] = asyncio.new_event_loop
# How often a caller that waits for another loop checks that the loop still runs.
_LOOK_S = 0.5


class Background:
    """The process's background thread with an event loop, started on first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: Loop | None = None

    def loop(self) -> Loop:
        """Return its running event loop."""
        with self._lock:
            if self._loop is None:
                self._loop = new_loop()
                threading.Thread(target=self._loop.run_forever, name="paceline-governor", daemon=True).start()
            return self._loop

    def is_home(self, loop: Loop) -> bool:
        """Return whether `loop` is its loop."""
        return loop is self._loop


_background = Background()


def background_loop() -> Loop:
    """Return the event loop of the process's background thread."""
    return _background.loop()


def _in_child() -> None:
    global _background
    _background = Background()  # the parent's thread does not exist in the child
    for portal in list(_portals):
        portal.forked()


class Portal:
    """Access to one quota, given as one of two arguments.

    `governor`: the governor of this process. `make`: creates a governor for the running loop, if each loop needs its
    own.
    """

    def __init__(self, governor: Governor | None = None, make: Callable[[], Governor] | None = None) -> None:
        assert (governor is None) != (make is None)
        self._one = governor
        self._make = make
        self._made: dict[Loop, Governor] = {}
        self._home: Loop | None = None
        self._lock = threading.Lock()
        self._blocks = False
        # Called in the governor's home when a permit was granted or given back.
        self.heard: Callable[[], None] = lambda: None
        _portals.add(self)

    def forked(self) -> None:
        """Adapt to being in a child process from now on."""
        self._lock = threading.Lock()
        self._made.clear()
        self._home = None
        if self._one is not None:
            self._one.loop = cast(Loop, NoLoop())

    def home(self, running: Loop | None) -> Loop:
        """Return the governor's loop for a caller in the loop `running`; None = a thread that may block."""
        with self._lock:
            if self._one is None:
                return running or _background.loop()
            self._blocks = self._blocks or running is None
            if self._home is None and self._one.loop.is_running():
                self._home = self._one.loop  # it runs a batch in this loop, or its connections belong to it
            before = self._home
            if before is None or not _is_alive(before):
                self._home = _background.loop() if self._blocks else running
            elif running is None and before is running_loop():
                # This thread runs the very loop that would have to answer it.
                self._leave(before)
                self._home = _background.loop()
            assert self._home is not None
            return self._home

    def _leave(self, before: Loop) -> None:
        assert self._one is not None
        if not self._one.may_move:
            raise PacelineError(
                f"a blocking call in the event loop in which the governor of pool '{self._one.pool}' is at work would "
                "wait for ever: await an asynchronous client there, or call this one by asyncio.to_thread"
            )
        self._one.loop = cast(Loop, NoLoop())

    def governor(self) -> Governor:
        """Return the governor at work in the running loop."""
        if self._one is not None:
            return self._one
        assert self._make is not None
        loop = asyncio.get_running_loop()
        if loop not in self._made:
            with self._lock:
                for gone in [each for each in self._made if each.is_closed()]:
                    del self._made[gone]
                self._made[loop] = self._make()
        return self._made[loop]

    def lease(self, work: Work, *, blocking: bool, max_wait_s: float = inf, lane: str = BATCH) -> Lease:
        """Return a permit for that work that has not begun yet. `lane`: as for `Governor.permit`."""
        return Lease(self, work, blocking, max_wait_s, lane)


_portals: weakref.WeakSet[Portal] = weakref.WeakSet()
_portals_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def portal_to(governor: Governor) -> Portal:
    """Return the governor's portal; there is one for each governor."""
    with _portals_lock:
        if governor.portal is None:
            governor.portal = Portal(governor)
        assert isinstance(governor.portal, Portal)
        return governor.portal


def running_loop() -> Loop | None:
    """Return the loop that runs in this thread, None if there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _is_alive(loop: Loop) -> bool:
    return _background.is_home(loop) or loop.is_running()


class Lease:
    """A permit that can be held anywhere: its calls are carried out in the governor's home.

    `blocking`: the holder is a thread, so that the coroutines here block it instead of waiting for a loop of its own.
    """

    def __init__(self, portal: Portal, work: Work, blocking: bool, max_wait_s: float, lane: str) -> None:
        self._portal = portal
        self._work = work
        self._blocking = blocking
        self._max_wait_s = max_wait_s
        self._lane = lane
        self._home: Loop
        self._is_here = False
        self._permit: Permit | None = None

    async def begin(self) -> None:
        """Wait until the request may be sent. Raises as `Governor.permit` does."""
        while True:
            running = None if self._blocking else asyncio.get_running_loop()
            self._home = self._portal.home(running)
            self._is_here = self._home is running
            try:
                return await self._done(self._begun())
            except _Gone:
                continue

    async def _begun(self) -> None:
        work = self._work
        self._permit = self._portal.governor().permit(
            work.reserve,
            expected=work.expected,
            charge=work.charge,
            request=work.request,
            max_wait_s=self._max_wait_s,
            lane=self._lane,
        )
        await self._permit.__aenter__()
        self._portal.heard()

    async def answered(self, answer: Answer) -> bool:
        """Report an answer; return True once the request may be sent again. See `Permit.answered`."""
        assert self._permit is not None
        try:
            return await self._done(self._answered(answer))
        except _Gone:
            return False

    async def _answered(self, answer: Answer) -> bool:
        assert self._permit is not None
        try:
            return await self._permit.answered(answer)
        finally:
            self._portal.heard()

    def over(self, answer: Answer) -> None:
        """Report the last answer."""
        if self._permit is not None:
            self._post(self._over, answer)

    def _over(self, answer: Answer) -> None:
        assert self._permit is not None
        self._permit.over(answer)
        self._portal.heard()

    def stated(self, limits: tuple[Limit, ...]) -> None:
        """Report the header counts of a stream that has begun."""
        if self._permit is not None and limits:
            self._post(self._permit.stated, limits)

    def give_back(self, *, later: bool = False) -> None:
        """End the permit. Does nothing if it is over. `later`: not within this call, which may come at any moment."""
        self._post(self._give_back, later=later)

    def _give_back(self) -> None:
        if self._permit is not None:
            self._permit.give_back()
            self._portal.heard()

    @property
    def waits_s(self) -> list[float]:
        """Return how long the attempt waited, by cause: see `Permit.waits_s`."""
        assert self._permit is not None
        return self._permit.waits_s

    @property
    def attempts_max(self) -> int:
        """Return how often the policy allows a request to be sent."""
        assert self._permit is not None
        return self._permit.attempts_max

    def _post(self, what: Callable[..., None], *arguments: Any, later: bool = False) -> None:
        if self._is_here and not later and self._home is running_loop():
            what(*arguments)
            return
        with suppress(RuntimeError):  # the loop is closed: see `Governor.bind`
            self._home.call_soon_threadsafe(what, *arguments)

    async def _done(self, what: Coroutine[Any, Any, _T]) -> _T:
        """Await `what` in the governor's home, and return its result."""
        if self._is_here:
            return await what
        try:
            future = asyncio.run_coroutine_threadsafe(what, self._home)
        except RuntimeError:
            what.close()
            raise _Gone from None
        answer: Any = future if self._blocking else asyncio.wrap_future(future)
        try:
            while True:
                if self._blocking:
                    with suppress(TimeoutError, CancelledError):
                        future.exception(_LOOK_S)
                else:
                    await asyncio.wait([answer], timeout=_LOOK_S)
                if answer.cancelled() or not (answer.done() or _is_alive(self._home)):
                    raise _Gone
                if answer.done():
                    return cast(_T, answer.result())
        except BaseException:
            # The exception may have come at the moment of the grant.
            future.cancel()
            self.give_back(later=True)
            raise


class _Gone(Exception):  # noqa: N818
    """The loop in which the governor lived does not run any more."""

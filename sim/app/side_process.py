"""The simulator in a process beside the service's: what the service is given in place of `whatif`'s own callables.

Theory of operation. A simulation is Python between compiled stretches: in the service's own process it would keep the
interpreter from everybody who asks for progress, for tens of milliseconds at a time. So one worker of a process pool
answers, one question after another. It is started by the first question, in good time since the service asks for a
forecast of nothing when it starts, and ends with its parent, however that comes to its end. One that dies is replaced:
a question under way is asked once more, after that a forecast is nobody's (the service has a fluid one) and a what-if
is an error.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from functools import partial
from typing import Any

from governor.forecast.forecast import Outlook
from governor.model.errors import PacelineError

# No forecast of more requests is simulated, so none is sent (see `whatif.FORECAST_REQUESTS`).
REQUESTS_MOST = 20_000
# One that ends sooner than this is not replaced for as long: starting costs a second of CPU time.
REST_S = 10.0
ANSWER_S = 30.0

log = logging.getLogger("paceline.service")


class EndedError(PacelineError):
    """The process has ended before it answered, or takes too long."""

    retryable = True


class SideProcess:
    """Both callables of `whatif`, answered by another process, which is replaced when it has ended.

    `rests_until`: when another may be started after an early end.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._begun_at = 0.0
        self._turn = threading.Lock()
        self.rests_until = 0.0

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Submit a call to that process, started if need be. Raise EndedError for a while after an early end."""
        while True:
            with self._turn:
                if self._pool is None:
                    if time.monotonic() < self.rests_until:
                        raise EndedError
                    self._begun_at = time.monotonic()
                    # Spawned, since threads of this process may hold locks in the middle of a fork.
                    self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin)
                pool = self._pool
            try:
                future = pool.submit(function, *arguments)
            except BrokenExecutor:
                self._ended(pool)
                continue
            future.add_done_callback(partial(self._heard, pool))
            return future

    def _heard(self, pool: ProcessPoolExecutor, future: Future[Any]) -> None:
        if not future.cancelled() and isinstance(future.exception(), BrokenExecutor):
            self._ended(pool)

    def _ended(self, pool: ProcessPoolExecutor) -> None:
        with self._turn:
            if self._pool is not pool:
                return
            self._pool, ended_at = None, time.monotonic()
            is_early = ended_at - self._begun_at < REST_S
            if is_early:
                self.rests_until = ended_at + REST_S
        pool.shutdown(wait=False)
        then = f"another is started in {REST_S:g} s" if is_early else "the next question starts another"
        log.warning("the simulator's process has ended: %s; until then forecasts are fluid", then)

    def _asked(self, name: str, question: Any) -> Any:
        for _ in range(2):
            with contextlib.suppress(EndedError, BrokenExecutor):
                future = self.submit(_answer, name, question)
                try:
                    return future.result(ANSWER_S)
                except TimeoutError:
                    future.cancel()
                    raise
        raise EndedError("the simulator's process has ended: see the service's log, or ask again in a moment")

    def forecast(self, outlook: Outlook) -> float | None:
        """See `whatif.quick_forecast`. A forecast of nothing only starts the process."""
        if not 0 < outlook.demand.requests <= REQUESTS_MOST:
            with contextlib.suppress(EndedError):
                self.submit(os.getpid)
            return None
        try:
            found: float | None = self._asked("quick_forecast", outlook)
        except (EndedError, TimeoutError):
            return None
        return found

    def what_if(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """See `whatif.what_if`. Raise EndedError if there is no answer."""
        try:
            found: dict[str, Any] = self._asked("what_if", dict(question))
        except TimeoutError:
            raise EndedError(f"the simulator has not answered for {ANSWER_S:g} s: ask again in a moment") from None
        return found


# ---------------------------------------------------------------- in that process


def _begin() -> None:
    # Ctrl-C goes to all processes of a terminal, a stop to all of a unit: the parent decides, and takes this one along.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    from sim.des import engines  # with all of the simulator: the parent needs none of it

    engines.begin()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _answer(name: str, question: Any) -> Any:
    from sim.app import whatif  # as above

    try:
        return getattr(whatif, name)(question)
    except PacelineError:
        raise
    except Exception as error:
        log.exception("a simulation failed")
        raise RuntimeError(f"{type(error).__name__} in the simulator's process") from None

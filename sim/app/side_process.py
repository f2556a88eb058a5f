"""The simulator in a process beside the service's: what the service is given in place of `whatif`'s own callables.

Theory of operation. A simulation is Python between compiled stretches: in the service's own process it would keep the
interpreter from everybody who asks for progress, for tens of milliseconds at a time. So a question is pickled into the
standard input of a child, and what comes back out of its output belongs to whoever asked under that number; the child
answers two at a time, so that a forecast does not wait for somebody's what-if. It is started by the first question, in
good time since the service asks for a forecast of nothing when it starts, and ends when its input does, however its
parent came to its end. One that dies is replaced: a question under way is asked once more, after that a forecast is
nobody's (the service has a fluid one) and a what-if is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, cast

from governor.forecast.forecast import Outlook
from governor.model.errors import PacelineError

# No forecast of more requests is simulated, so none is sent (see `whatif.FORECAST_REQUESTS`).
REQUESTS_MOST = 20_000
SIDE_BY_SIDE = 2
# One that ends sooner than this is not replaced for as long: starting costs a second of CPU time.
REST_S = 10.0
ANSWER_S = 30.0
FORECAST, WHAT_IF = "quick_forecast", "what_if"

log = logging.getLogger("paceline.service")


class EndedError(PacelineError):
    """The child has ended before it answered, or takes too long."""

    retryable = True


class Child:
    """One process that simulates. `ask` from any thread. `rests_until`: when another may be started after its end."""

    def __init__(self) -> None:
        # A fork costs a second less, and is safe as long as no thread can hold a lock in the middle of it.
        self.pid, self._questions, self._answers, self._end = _forked() if _is_alone() else _started()
        self._numbers = itertools.count()
        self._begun_at = time.monotonic()
        self._asked: dict[int, Future[Any]] = {}
        self._turn = threading.Lock()
        self.has_ended = False
        self.rests_until = 0.0
        threading.Thread(target=self._hear, name="simulator", daemon=True).start()

    def ask(self, what: str, question: Any) -> Any:
        """The answer. `EndedError` if the child ends first; `PacelineError` for what is wrong with the question."""
        content, future = pickle.dumps(question), Future[Any]()
        with self._turn:
            if self.has_ended:
                raise EndedError
            number = next(self._numbers)
            self._asked[number] = future
            try:
                _write(self._questions, (number, what, content))
            except OSError:
                raise EndedError from None
        try:
            return future.result(ANSWER_S)
        except TimeoutError:
            future.cancel()
            raise

    def _hear(self) -> None:
        """Hands out answers until the child has ended."""
        with contextlib.suppress(Exception):  # whatever it is, nothing more is heard
            while True:
                number, is_good, answer = pickle.load(self._answers)
                future = self._asked.pop(number)
                if not future.set_running_or_notify_cancel():
                    continue  # nobody waits for it any more
                if is_good:
                    future.set_result(answer)
                else:
                    future.set_exception(answer)
        with self._turn:
            self.has_ended, ended_at = True, time.monotonic()
            if ended_at - self._begun_at < REST_S:
                self.rests_until = ended_at + REST_S
            for future in self._asked.values():
                if future.set_running_or_notify_cancel():  # else its caller has given up waiting
                    future.set_exception(EndedError())
            self._asked.clear()
        code = self._end()
        for pipe in (self._questions, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()
        then = f"another is started in {REST_S:g} s" if self.rests_until else "the next question starts another"
        log.warning("the simulator's process has ended (%s): %s; until then forecasts are fluid", _why(code), then)


def _is_alone() -> bool:
    """Whether this process has one thread, those of libraries counted."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False  # not Linux


_Ends = tuple[int, IO[bytes], IO[bytes], Callable[[], int]]


def _started() -> _Ends:
    """A new process: its id, both pipes, and what waits for its end."""
    # It finds what this process finds, however that was arranged. Its errors go into the same log.
    path = f"sys.path[:] = {sys.path!r}"
    code = f"import sys; {path}; import sim.app.side_process as b; b.answer(sys.stdin.buffer, b.taken(1))"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process.pid, cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout), process.wait


def _forked() -> _Ends:
    """The same by a fork of this process, which must have no other thread."""
    (asked, to_ask), (told, to_tell) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(to_ask)
        os.close(told)
        try:
            answer(os.fdopen(asked, "rb"), os.fdopen(to_tell, "wb"))
        finally:
            os._exit(1)
    os.close(asked)
    os.close(to_tell)
    return pid, os.fdopen(to_ask, "wb"), os.fdopen(told, "rb"), lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Beside:
    """Both callables of `whatif`, answered by a `Child`, which is replaced when it has ended."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._turn = threading.Lock()

    def child(self) -> Child:
        """The one that answers; started if need be, but not again and again where it ends at once."""
        with self._turn:
            known = self._child
            if known is None or (known.has_ended and time.monotonic() >= known.rests_until):
                known = self._child = Child()
            return known

    def _asked(self, what: str, question: Any) -> Any:
        for _ in range(2):
            with contextlib.suppress(EndedError):
                return self.child().ask(what, question)
        raise EndedError("the simulator's process has ended: see the service's log, or ask again in a moment")

    def forecast(self, outlook: Outlook) -> float | None:
        """See `whatif.quick_forecast`. One of nothing only sees to it that the child is there."""
        if not 0 < outlook.demand.requests <= REQUESTS_MOST:
            self.child()
            return None
        try:
            found: float | None = self._asked(FORECAST, outlook)
        except (EndedError, TimeoutError):
            return None
        return found

    def what_if(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """See `whatif.what_if`. `EndedError` where nobody answers."""
        try:
            found: dict[str, Any] = self._asked(WHAT_IF, dict(question))
        except TimeoutError:
            raise EndedError(f"the simulator has not answered for {ANSWER_S:g} s: ask again in a moment") from None
        return found


def _write(to: IO[bytes], content: Any) -> None:
    to.write(pickle.dumps(content))
    to.flush()


def _why(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


# ---------------------------------------------------------------- in the child


def taken(number: int) -> IO[bytes]:
    """That file descriptor as a file of our own; what is printed there goes where errors go."""
    found = os.fdopen(os.dup(number), "wb")
    os.dup2(2, number)
    return found


def answer(asked: IO[bytes], out: IO[bytes]) -> None:
    """Answers all questions until they end, and never returns."""
    # Ctrl-C goes to all processes of a terminal, a stop to all of a unit: the parent decides, and its end is the end of
    # the questions.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    turn = threading.Lock()
    from sim.app import whatif
    from sim.des import engines

    callables: dict[str, Callable[[Any], Any]] = {FORECAST: whatif.quick_forecast, WHAT_IF: whatif.what_if}
    engines.begin()

    def one(number: int, what: str, content: bytes) -> None:
        try:
            found: Any = callables[what](pickle.loads(content))
            told = number, True, found
        except Exception as error:
            if not isinstance(error, PacelineError):
                log.exception("a simulation failed")
                error = RuntimeError(f"{type(error).__name__} in the simulator's process")
            told = number, False, error
        with turn, contextlib.suppress(BrokenPipeError):
            _write(out, told)

    pool = ThreadPoolExecutor(SIDE_BY_SIDE)
    with contextlib.suppress(EOFError):
        while True:
            pool.submit(one, *pickle.load(asked))
    # Whatever is being simulated or compiled has nobody any more to be told of it.
    os._exit(0)

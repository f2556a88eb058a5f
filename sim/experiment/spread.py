"""Spreading tasks over workers: processes on this machine by joblib, or a Ray cluster.

Theory of operation. A task is (shared, own): `shared` may be the same object in many tasks and travels once where that
pays, `own` says what is to be done with it. Workers hold no state between tasks and no random state at all, so that the
results are the same for any number of workers, on either backend, in whatever order the tasks end.

A worker that dies takes its task with it, which is tried again on what is left; only where the same task costs another
worker is the work given up, as `WorkersLost`. Results that came before stay with the caller, in both cases.

Ray (extra `ray`) is spoken to by a process of its own, a child of this one: where a cluster goes away, Ray ends the
process that is connected to it, without an exception, and nothing that was found must be lost by that. The child dies
with this process, and is ended when a call of `map` is given up: the cluster then stops that call's work.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from governor.model.errors import OPERATOR, BadSetting, PacelineError

Backend = Literal["local", "ray"]
Result = TypeVar("Result")
Shared = TypeVar("Shared")
Own = TypeVar("Own")

RAY_SIDE = "sim.experiment.ray_side"
# How long that process may take to leave a cluster.
ENDS_S = 10.0
# Modules whose source decides what a run gives.
DECIDING = ("governor/**/*.py", "sim/**/*.py")


class WorkersLost(PacelineError):  # noqa: N818  (as in governor/model/errors.py)
    """Workers died, or the cluster went away, and the rest of the work with them. `found`: what had come, if known."""

    exit_code: ClassVar[int] = 1
    fault: ClassVar[str] = OPERATOR
    retryable = True
    found: Any = None


class Crew:
    """The workers of one kind: `size` of them. Made once, used for many calls of `map`."""

    size: int

    def map(self, function: Callable[[Shared, Own], Result], tasks: Sequence[tuple[Shared, Own]]) -> Iterator[Result]:
        """`function` of every task, in the order of the tasks; raises what it raises, and WorkersLost."""
        raise NotImplementedError


def crew_of(backend: Backend = "local", workers: int = 0) -> Crew:
    """The workers of a backend; `workers`: 0 = one per core, here or of the cluster."""
    return OnRay(workers) if backend == "ray" else Local(workers)


# ---------------------------------------------------------------- this machine


class Local(Crew):
    """Processes on this machine; with one worker, this process itself."""

    def __init__(self, workers: int = 0) -> None:
        self.size = workers or os.cpu_count() or 1

    def map(self, function: Callable[[Shared, Own], Result], tasks: Sequence[tuple[Shared, Own]]) -> Iterator[Result]:
        """See `Crew`."""
        if self.size == 1 or len(tasks) < 2:
            yield from (function(shared, own) for shared, own in tasks)
            return
        from concurrent.futures.process import BrokenProcessPool

        done, failed_at = 0, -1
        while done < len(tasks):
            try:
                with _left_quietly(self._parallel(function, tasks[done:])) as results:
                    for result in results:
                        done += 1
                        yield result
            except BrokenProcessPool:
                if failed_at == done:
                    raise WorkersLost(
                        f"a worker process died twice at the same task, with {done:,} of {len(tasks):,} done (killed, "
                        "or out of memory?): use fewer --workers, or --workers 1"
                    ) from None
                failed_at = done

    def _parallel(
        self, function: Callable[[Shared, Own], Result], tasks: Sequence[tuple[Shared, Own]]
    ) -> Generator[Result, None, None]:
        from joblib import Parallel, delayed

        parallel = Parallel(n_jobs=self.size, return_as="generator", batch_size="auto")
        results: Generator[Result, None, None] = parallel(delayed(function)(shared, own) for shared, own in tasks)
        return results


@contextlib.contextmanager
def _left_quietly(results: Generator[Result, None, None]) -> Iterator[Generator[Result, None, None]]:
    """Ends the work where nobody wants the rest of it; joblib would warn that it was done in vain."""
    try:
        yield results
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results.close()


# ---------------------------------------------------------------- Ray


class OnRay(Crew):
    """The workers of a Ray cluster: the one that RAY_ADDRESS names, else one of our own on this machine.

    Connects when it is made; BadSetting, in one line, where there is no such cluster.
    """

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers
        self.size = workers or _side().size

    def map(self, function: Callable[[Shared, Own], Result], tasks: Sequence[tuple[Shared, Own]]) -> Iterator[Result]:
        """See `Crew`."""
        side = _side()
        # By identity: what many tasks share is sent once.
        shared = {id(task[0]): task[0] for task in tasks}
        place = {key: i for i, key in enumerate(shared)}
        rows = [(place[id(task[0])], task[1]) for task in tasks]
        done, at_rest = 0, not tasks
        try:
            side.tell((fingerprint(), function, self.workers, list(shared.values()), rows))
            while done < len(tasks):
                kind, value = side.hear()
                # After anything but a result nothing more of this call will be heard; and said before the last result
                # is handed on, after which nobody may come back here.
                at_rest = kind != "result" or done == len(tasks) - 1
                if kind == "raised":
                    raise value
                if kind != "result":
                    raise WorkersLost(f"{value}; {done:,} of {len(tasks):,} tasks are done")
                done += 1
                yield value
        finally:
            if not at_rest:
                side.end()


class _Side:
    """The child process that speaks to Ray, and the messages that go to and fro."""

    def __init__(self) -> None:
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        self.child = subprocess.Popen(
            [sys.executable, "-m", RAY_SIDE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ray logs and prints a lot; what matters comes as a message.
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C is for this process, which then ends the other.
            start_new_session=True,
        )
        atexit.register(self.end)
        kind, value = self.hear()
        if kind != "ready":
            self.end()
            raise BadSetting(str(value), "RAY_ADDRESS")
        self.size: int = value

    @property
    def alive(self) -> bool:
        """Whether it can still be told anything."""
        return self.child.poll() is None

    def tell(self, message: Any) -> None:
        """Sends a message; that nobody reads it shows when the reply is awaited."""
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(message, self.child.stdin, pickle.HIGHEST_PROTOCOL)
            self.child.stdin.flush()

    def hear(self) -> tuple[str, Any]:
        """The next message: (kind, value)."""
        assert self.child.stdout is not None
        try:
            found: tuple[str, Any] = pickle.load(self.child.stdout)
        except (EOFError, pickle.UnpicklingError):
            return "lost", "the Ray cluster is gone"
        return found

    def end(self) -> None:
        """Ends the child and with it whatever it has under way; from the second time on nothing happens."""
        atexit.unregister(self.end)
        if self.alive:
            self.child.terminate()
            try:
                self.child.wait(ENDS_S)
            except subprocess.TimeoutExpired:
                # Ray's own shutdown may wait for a cluster that is no more.
                self.child.kill()
        with contextlib.suppress(BrokenPipeError), self.child:
            pass


_sides: dict[str, _Side] = {}


def _side() -> _Side:
    """The child for the cluster that RAY_ADDRESS names now: one serves all calls, until it ends."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in _sides and not _sides[address].alive:
        _sides.pop(address).end()
    if address not in _sides:
        _sides[address] = _Side()
    return _sides[address]


def disconnect() -> None:
    """Leaves every cluster."""
    while _sides:
        _sides.popitem()[1].end()


@functools.cache
def fingerprint() -> str:
    """A hash of the sources that decide what a run gives."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for pattern in DECIDING:
        for path in sorted(root.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()

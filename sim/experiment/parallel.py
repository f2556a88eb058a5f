"""Spreading tasks over workers: processes on this machine by joblib, or a Ray cluster.

Theory of operation. A task is (shared, own): `shared` may be the same object in many tasks and is sent once if that
pays; `own` says what to do with it. Workers hold no state between tasks and no random state at all, so the results are
the same for any number of workers, on either backend, in any order of completion.

When a worker dies, its task is retried on the remaining workers; if the same task costs another worker, the work is
given up with `WorkersLost`. In both cases the caller keeps the results that came before.

A child process talks to Ray (extra `ray`): when a cluster goes away, Ray ends the process connected to it, without an
exception, and results must survive that. The child dies with this process, and is ended when a call of `map` is given
up: the cluster then stops that call's work.
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
_Result = TypeVar("_Result")
_Shared = TypeVar("_Shared")
Own = TypeVar("Own")

RAY_SIDE = "sim.experiment.ray_side"
# How long the child process may take to leave a cluster.
ENDS_S = 10.0
# Modules whose source determines the result of a run.
DECIDING = ("governor/**/*.py", "sim/**/*.py")


class WorkersLost(PacelineError):  # noqa: N818  (as in governor/model/errors.py)
    """Workers died or the cluster went away before the work was done. `found`: the results so far, if known."""

    exit_code: ClassVar[int] = 1
    fault: ClassVar[str] = OPERATOR
    retryable = True
    found: Any = None


class Crew:
    """A set of `size` workers of one kind, created once and used for many calls of `map`."""

    size: int

    def map(
        self, function: Callable[[_Shared, Own], _Result], tasks: Sequence[tuple[_Shared, Own]]
    ) -> Iterator[_Result]:
        """Yield `function` of every task, in task order. Raise what `function` raises, or WorkersLost."""
        raise NotImplementedError


def crew_of(backend: Backend = "local", workers: int = 0) -> Crew:
    """Return the workers of a backend; `workers`: 0 = one per core, of this machine or of the cluster."""
    return OnRay(workers) if backend == "ray" else Local(workers)


# ---------------------------------------------------------------- this machine


class Local(Crew):
    """Processes on this machine; with one worker, this process itself."""

    def __init__(self, workers: int = 0) -> None:
        self.size = workers or os.cpu_count() or 1

    def map(
        self, function: Callable[[_Shared, Own], _Result], tasks: Sequence[tuple[_Shared, Own]]
    ) -> Iterator[_Result]:
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
        self, function: Callable[[_Shared, Own], _Result], tasks: Sequence[tuple[_Shared, Own]]
    ) -> Generator[_Result, None, None]:
        from joblib import Parallel, delayed

        parallel = Parallel(n_jobs=self.size, return_as="generator", batch_size="auto")
        results: Generator[_Result, None, None] = parallel(delayed(function)(shared, own) for shared, own in tasks)
        return results


@contextlib.contextmanager
def _left_quietly(results: Generator[_Result, None, None]) -> Iterator[Generator[_Result, None, None]]:
    """End the work if the caller stops reading, without joblib's warning about unused results."""
    try:
        yield results
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results.close()


# ---------------------------------------------------------------- Ray


class OnRay(Crew):
    """The workers of a Ray cluster: the one that RAY_ADDRESS names, else a new one on this machine.

    The constructor connects. Raise BadSetting if there is no such cluster.
    """

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers
        self.size = workers or _side().size

    def map(
        self, function: Callable[[_Shared, Own], _Result], tasks: Sequence[tuple[_Shared, Own]]
    ) -> Iterator[_Result]:
        """See `Crew`."""
        side = _side()
        # By identity: an object that many tasks share is sent once.
        shared = {id(task[0]): task[0] for task in tasks}
        place = {key: i for i, key in enumerate(shared)}
        rows = [(place[id(task[0])], task[1]) for task in tasks]
        done, at_rest = 0, not tasks
        try:
            side.tell((fingerprint(), function, self.workers, list(shared.values()), rows))
            while done < len(tasks):
                kind, value = side.hear()
                # Any message but a result is the last one of this call. This is set before the last result is yielded,
                # because the caller may never resume after it.
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
    """The child process that talks to Ray, and the messages in both directions."""

    def __init__(self) -> None:
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        self.child = subprocess.Popen(
            [sys.executable, "-m", RAY_SIDE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ray logs and prints a lot; anything important comes as a message.
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C is for this process, which then ends the child.
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
        """Return whether the child can still receive messages."""
        return self.child.poll() is None

    def tell(self, message: Any) -> None:
        """Send a message; if the child is gone, waiting for the reply will show it."""
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(message, self.child.stdin, pickle.HIGHEST_PROTOCOL)
            self.child.stdin.flush()

    def hear(self) -> tuple[str, Any]:
        """Return the next message: (kind, value)."""
        assert self.child.stdout is not None
        try:
            found: tuple[str, Any] = pickle.load(self.child.stdout)
        except (EOFError, pickle.UnpicklingError):
            return "lost", "the Ray cluster is gone"
        return found

    def end(self) -> None:
        """End the child and all its work in progress; further calls have no effect."""
        atexit.unregister(self.end)
        if self.alive:
            self.child.terminate()
            try:
                self.child.wait(ENDS_S)
            except subprocess.TimeoutExpired:
                # Ray's own shutdown may wait for a cluster that is gone.
                self.child.kill()
        with contextlib.suppress(BrokenPipeError), self.child:
            pass


_sides: dict[str, _Side] = {}


def _side() -> _Side:
    """Return the child for the cluster that RAY_ADDRESS names now: one child serves all calls until it ends."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in _sides and not _sides[address].alive:
        _sides.pop(address).end()
    if address not in _sides:
        _sides[address] = _Side()
    return _sides[address]


def disconnect() -> None:
    """Leave every cluster."""
    while _sides:
        _sides.popitem()[1].end()


@functools.cache
def fingerprint() -> str:
    """Return a hash of the sources that determine the result of a run."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for pattern in DECIDING:
        for path in sorted(root.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()

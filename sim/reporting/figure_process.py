"""The report's figures, drawn by a second process while the search goes on.

Theory of operation. To import a library that draws takes a second, and to draw takes longer than half of a search. So a
child process imports while this one searches, and draws each figure as soon as its part of the plan is known. Messages
are pickles: (name, plan, grant) goes in, (name, element or None) comes out, one after the other, handed over by a
thread. A child that cannot be started, dies or fails is no loss: what it owes is drawn here, later, and what is wrong
with a figure is then said as if there had been no child.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from governor.forecast.summary import Grant
from sim.experiment.results import Plan

# What each figure needs beside the forecasts: a field of the plan.
PARTS = {
    "waits": "",
    "over_time": "timelines",
    "front": "points",
    "heats": "heats",
    "stress": "stress",
    "drawn": "drawn",
    "sensitivity": "sensitivity",
}
_NOTHING: dict[str, Any] = {
    "timelines": {},
    "points": (),
    "heats": (),
    "stress": (),
    "drawn": None,
    "sensitivity": None,
}


class Drawing:
    """Figures under way: `begin` each when its part of the plan is known, then ask for `figures`. A context."""

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self._asked: dict[str, Future[Any]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self._child: subprocess.Popen[bytes] | None = None
        code = f"import sys; sys.path[:] = {[folder or os.getcwd() for folder in sys.path]!r}; "
        with contextlib.suppress(OSError):
            self._child = subprocess.Popen(
                [sys.executable, "-c", code + "import sim.reporting.figure_process as d; d.serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # What goes wrong there goes wrong here once more, and is said then.
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for this process, which then ends the other.
                start_new_session=True,
            )

    def begin(self, name: str, plan: Plan) -> None:
        """The named figure can be drawn: its part of the plan is there."""
        if self._child is not None:
            self._asked[name] = self._thread.submit(self._from_child, name, plan)

    def figures(self, plan: Plan) -> dict[str, Any]:
        """All figures by name, as `report_figures.drawn` gives them."""
        found = {}
        for name in PARTS:
            with contextlib.suppress(_NotDrawnError):
                if name in self._asked:
                    found[name] = self._asked[name].result()
        if len(found) < len(PARTS):
            from sim.reporting.report_figures import FIGURES

            found |= {name: FIGURES[name](plan, self.grant) for name in PARTS if name not in found}
        return {name: found[name] for name in PARTS}

    def _from_child(self, name: str, plan: Plan) -> Any:
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            pickle.dump((name, _part(plan, name), self.grant), self._child.stdin, pickle.HIGHEST_PROTOCOL)
            self._child.stdin.flush()
            answered, element = pickle.load(self._child.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            raise _NotDrawnError from None
        if answered != name or element is None:
            raise _NotDrawnError
        return element

    def close(self) -> None:
        """Ends the child, whatever it has under way."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._thread.shutdown(cancel_futures=True)
        if self._child is not None:
            for end in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    end.close()  # type: ignore[union-attr]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _NotDrawnError(Exception):
    pass


def _part(plan: Plan, name: str) -> Plan:
    """What the figure needs of the plan: thousands of settings need not travel for a dot each."""
    wanted = PARTS[name]
    part = replace(plan, **{field: nothing for field, nothing in _NOTHING.items() if field != wanted})
    if wanted == "points":
        part = replace(part, points=tuple(replace(point, policy=plan.now.policy) for point in plan.points))
    return part


# ---------------------------------------------------------------- in the child


def serve() -> None:
    """Draws what stands in standard input until it ends."""
    asked, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not stand among the answers
    # A handful of figures and then the end: to look for what is garbage would take a tenth of the time.
    gc.disable()
    from matplotlib.backends import backend_svg  # noqa: F401  (loaded before it is needed)

    from sim.reporting.report_figures import FIGURES

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            name, plan, grant = pickle.load(asked)
            try:
                element = FIGURES[name](plan, grant)
            except Exception:  # the parent draws it again, and says what is wrong
                element = None
            pickle.dump((name, element), out, pickle.HIGHEST_PROTOCOL)
            out.flush()

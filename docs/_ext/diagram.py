"""The state diagram of a request: its states and what moves it, as they are observed while the law runs.

The waiting states are the law's causes (`governor.model.requests.CAUSES`, by the law's numbers); where a cause is never
reached, or a state appears that has no place in the picture, the build fails rather than draw yesterday's law.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from governor import law
from governor.model.errors import FailureCode
from governor.model.policy import Policy
from governor.model.requests import CAUSES
from sim.base.palette import CAUSE_LABELS, INK, MUTED, SURFACE
from sim.base.style import styled
from sim.des.calendar import WAKE, Appointment
from sim.des.driver import Simulation
from sim.des.jobs import Job
from sim.des.run import Tally
from sim.experiment.experiment import case_of
from sim.model import provider as prov
from sim.model.provider_config import ProviderConfig
from sim.reporting.report_figures import inline
from sim.scenario.scenario import Scenario
from sim.scenario.scenario_file import ModelSource

NEW, FLYING, CUT, BACKING_OFF, ANSWERED, LOST = "new", "in flight", "cut off", "backing off", "answered", "lost"
# What a driver asks the law about; the last cause is no rule of admission, but the time that a retry sleeps.
WAITING = CAUSES[1:-1]
AT_ONCE = CAUSES[law.NOTHING]
# The one move that is not the law's: once the account is refused, nothing is asked any more.
STOP = "(scheduler stops)"
Moves = Counter[tuple[str, str, str]]


class Watched(Simulation):
    """A simulation that counts changes of state: (from, to, function of the law) -> how often.

    `paused_s`: from when to when an operator pauses the pool.
    """

    def __init__(self, *given: Any, paused_s: tuple[float, float] | None = None, **named: Any) -> None:
        self.moves: Moves = Counter()
        self.state_of: dict[int, str] = {}
        super().__init__(*given, **named)
        for at, change in zip(paused_s or (), ("paused", "resumed"), strict=False):
            Appointment(self.env, at, WAKE, lambda event, change=change: self.change(change))  # type: ignore[misc]

    def _moved(self, job: Job, state: str, by: str) -> None:
        before = self.state_of.get(job.index, NEW)
        if before in (NEW, CUT, BACKING_OFF) and state not in WAITING and by != STOP:
            # It came to the head, and the law named no cause to wait for.
            self.moves[before, AT_ONCE, "admission"] += 1
            before = AT_ONCE
        if before != state:
            self.moves[before, state, by] += 1
            self.state_of[job.index] = state

    def _settle(self) -> None:
        super()._settle()
        job = self.scheduler.first()
        if job is not None and self.scheduler.cause != law.NOTHING:
            self._moved(job, CAUSES[self.scheduler.cause], "admission")

    def launch(self, job: Job, now: float) -> None:
        """Books the attempt."""
        self._moved(job, FLYING, "launched")
        super().launch(job, now)

    def attempted(self, job: Job, now: float, code: str = "") -> None:
        """Comes first of all that ends an attempt: whose request is neither lost nor answered backs off."""
        if not code and job.outcome != prov.OK:
            self._moved(job, BACKING_OFF, _unanswered(job))
        super().attempted(job, now, code)

    def ended(self, job: Job, now: float, code: str) -> None:
        """The request ends with its attempt."""
        by = "released" if job.outcome == prov.TOO_LARGE else _unanswered(job)
        self._moved(job, LOST if code else ANSWERED, by if code else "settled")
        super().ended(job, now, code or "")

    def suspended(self, job: Job, now: float, code: str) -> None:
        """The request met what may concern all, or what ends the run."""
        self._moved(job, LOST, _unanswered(job) if code else "released")
        super().suspended(job, now, code)

    def given_up(self, job: Job, now: float, code: str) -> None:
        """The request ends in the queue."""
        by = {FailureCode.REQUEST_TOO_LARGE: "never_fits", FailureCode.DEADLINE_EXCEEDED: "deadline_at"}
        self._moved(job, LOST, by[FailureCode(code)])
        super().given_up(job, now, code)

    def finalize(self, job: Job, now: float) -> Job:
        """The answer was cut off without text."""
        self._moved(job, CUT, "finalize_opened")
        return super().finalize(job, now)

    def run(self, start_s: float = 0.0) -> Tally:
        """What a stop leaves pending is lost to this run."""
        tally = super().run(start_s)
        for index in range(len(self.columns)):
            if self.state_of.get(index) not in (ANSWERED, LOST):
                self.moves[self.state_of.get(index, NEW), LOST, STOP] += 1
        return tally


def _unanswered(job: Job) -> str:
    return "throttled" if job.outcome in (prov.THROTTLED, prov.SLOW_DOWN) else "failed"


# ---------------------------------------------------------------- what is simulated

_PLAIN: dict[str, Any] = {"stagger_seconds": 0.0, "max_concurrency": 40, "charge_rule": "auto"}
# Each brings out something that the others do not: settings, habits of the provider, the rest of a scenario.
CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "the guardrails": ({}, {}, {}),
    "places in flight": (_PLAIN | {"max_concurrency": 2}, {}, {}),
    "requests per minute": (_PLAIN | {"rpm_limit": 5}, {}, {}),
    "the budget of a day": (_PLAIN | {"tpd_limit": 40_000}, {"tpd": 40_000}, {}),
    "a limit that is not known": (_PLAIN | {"hold_on_throttle": True, "tpm_window": "bucket"}, {"tpm": 9_000}, {}),
    "few attempts": (
        _PLAIN | {"retry_max_attempts": 2},
        {"tpm": 9_000, "retry_after": "absent", "faults": {"error_ratio": 0.4}},
        {},
    ),
    "faults and a deadline": (_PLAIN | {"deadline_seconds": 30.0}, {"faults": {"error_ratio": 0.4}}, {}),
    "cut answers": (_PLAIN, {"faults": {"empty_cut_ratio": 1.0}}, {"finalize": True}),
    "no credit left": (_PLAIN, {"quota_requests": 20}, {}),
    "requests above the limit": (_PLAIN | {"tpm_limit": 1_500, "charge_rule": "prompt_plus_max"}, {}, {}),
    "a pause": (_PLAIN | {"stagger_seconds": 1.0}, {}, {}),
}


def observed() -> Moves:
    """All changes of state under all conditions. AssertionError where a cause of the law was never reached."""
    moves: Moves = Counter()
    source = ModelSource(requests=60, prompt_tokens=(600, 2_000), output_tokens=(200, 900), max_tokens=500)
    for name, (settings, habits, rest) in CONDITIONS.items():
        policy = Policy().with_(**settings)
        provider = ProviderConfig().with_(**habits)
        case = case_of(Scenario.of(source, provider=provider, policy=policy, **rest))
        run = Watched(
            case.columns,
            case.params,
            case.provider,
            seed=1,
            finalize_max_tokens=case.finalize_max_tokens,
            paused_s=(5.0, 20.0) if name == "a pause" else None,
        )
        run.run()
        moves += run.moves
    missing = set(WAITING) - {to for _, to, _ in moves}
    assert not missing, f"causes of the law that no condition brings out: {sorted(missing)}"
    return moves


# ---------------------------------------------------------------- as tables


def matrix(moves: Moves) -> str:
    """Which cause follows which for a request at the head of the queue: a table in markdown, counts."""
    cells: Counter[tuple[str, str]] = Counter()
    for (a, b, _), count in moves.items():
        if a in WAITING:
            cells[a, b] += count
    to = [*WAITING, FLYING, LOST]
    lines = ["| from \\ to | " + " | ".join(to) + " |", "|---|" + "---:|" * len(to)]
    for a in WAITING:
        lines.append(f"| `{a}` | " + " | ".join(str(cells[a, b] or "") for b in to) + " |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- as a picture

# Centre, width and height of each box; the waiting states stand in one frame.
PLACES = {
    NEW: (0.6, 3.7, 1.1, 0.5),
    FLYING: (6.35, 3.7, 1.3, 0.5),
    BACKING_OFF: (6.35, 2.15, 1.3, 0.5),
    CUT: (6.35, 5.25, 1.3, 0.5),
    ANSWERED: (9.4, 3.7, 1.2, 0.5),
    LOST: (9.4, 0.7, 1.2, 0.5),
}
FRAME = (3.4, 3.0, 2.6, 5.7)
WAITS = "waits"
INSIDE = (AT_ONCE, *WAITING)
ALT = (
    "A new request waits at the head of the queue, by cause, or is launched at once; in flight it is answered, lost, "
    "cut off, or backs off and waits again."
)


def svg(moves: Moves) -> str:
    """The picture, in the colours of the page around it."""
    return inline(_figure(moves), "states", ALT)


@styled
def _figure(moves: Moves) -> Figure:
    figure = Figure(figsize=(8.8, 5.0))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 10.4), ylim=(0.0, 6.0))
    ax.set_axis_off()
    arrows: dict[tuple[str, str], set[str]] = {}
    for a, b, by in moves:
        # Who is stopped unasked was in the queue, behind its head.
        queued = a in INSIDE or by == STOP
        pair = (WAITS if queued else a, WAITS if b in INSIDE else b)
        strange = set(pair) - {WAITS, *PLACES}
        assert not strange, f"states without a place in the picture: {strange}"
        if pair != (WAITS, WAITS):
            arrows.setdefault(pair, set()).add(by)
    for state, (x, y, width, height) in PLACES.items():
        _box(ax, state, x, y, width, height, INK)
    _waiting(ax)
    for ends, functions in sorted(arrows.items()):
        _arrow(ax, ends, sorted(functions))
    return figure


def _box(ax: Axes, text: str, x: float, y: float, width: float, height: float, colour: str, bold: bool = True) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=SURFACE,
            edgecolor=colour,
            linewidth=1.3,
            zorder=3,
        )
    )
    ax.text(x, y, text, ha="center", va="center", weight="bold" if bold else "normal", zorder=4)


def _waiting(ax: Axes) -> None:
    """The frame of the waiting states: one box for each cause, in the law's order."""
    x, y, width, height = FRAME
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor="none",
            edgecolor=MUTED,
            linewidth=1.0,
            linestyle=(0, (4, 3)),
        )
    )
    ax.text(x, y + height / 2 - 0.22, "in the queue; its head waits for", ha="center", va="center", color=MUTED)
    step = (height - 0.5) / len(INSIDE)
    for i, cause in enumerate(INSIDE):
        at = y + height / 2 - 0.42 - step * (i + 0.5)
        colour = MUTED if cause == AT_ONCE else CAUSE_LABELS[cause][1]
        _box(ax, cause, x, at, 1.6, step - 0.16, colour, bold=False)


def _arrow(ax: Axes, pair: tuple[str, str], by: list[str]) -> None:
    """One arrow between the edges of two boxes, with the law's functions that make the move."""
    places = {**PLACES, WAITS: FRAME}
    (x0, y0, w0, h0), (x1, y1, w1, h1) = (places[state] for state in pair)
    start, end = _edge(x0, y0, w0, h0, x1, y1), _edge(x1, y1, w1, h1, x0, y0)
    if WAITS in pair:
        start, end = _level(pair, start, end)
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.1, color=MUTED, zorder=2))
    ax.text(
        (start[0] + end[0]) / 2,
        (start[1] + end[1]) / 2,
        "\n".join(by),
        ha="center",
        va="center",
        size=7.5,
        color=INK,
        linespacing=1.1,
        bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1.2},
        zorder=5,
    )


def _edge(x: float, y: float, width: float, height: float, to_x: float, to_y: float) -> tuple[float, float]:
    """Where the line from a box's centre to another point leaves the box."""
    dx, dy = to_x - x, to_y - y
    share = min(width / 2 / abs(dx) if dx else 9e9, height / 2 / abs(dy) if dy else 9e9)
    return x + dx * share, y + dy * share


def _level(
    pair: tuple[str, str], start: tuple[float, float], end: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Arrows from and to the frame run level with the box at their other end, as far as the frame reaches."""
    x, y, width, height = FRAME
    inside = (y - height / 2 + 0.2, y + height / 2 - 0.2)
    i = pair.index(WAITS)
    other = pair[1 - i]
    ox, oy, owidth, _ = PLACES[other]
    side = x + width / 2 if ox > x else x - width / 2
    at = min(max(oy, inside[0]), inside[1])
    ours, theirs = (side, at), (ox - owidth / 2 if ox > x else ox + owidth / 2, oy)
    return (ours, theirs) if i == 0 else (theirs, ours)


def written(folder: Path) -> None:
    """Writes the picture and the table into `folder`."""
    moves = observed()
    page = f'<div class="wide">\n{svg(moves)}\n</div>\n'
    names = ", ".join(CONDITIONS)
    said = f"Conditions: {names}; {sum(moves.values()):,} moves of {len(moves)} kinds.\n"
    for name, text in (("states.html", page), ("states.md", matrix(moves)), ("conditions.md", said)):
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")

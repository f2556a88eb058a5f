"""Show the progress of a live run: a bar on a terminal, one line every 30 seconds elsewhere, nothing with --quiet.

The ETA comes from the law, not from the average so far: the remaining work, at the settings in force, with the present
bookings (`preflight.fluid_forecast`), and with answers as long as those measured in this run.

All output goes to standard error, so that standard output holds the result alone.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Any, Protocol, TextIO

from governor import law
from governor.forecast.preflight import Load, fluid_forecast, in_use
from governor.law import RPM, TPM, limit_found
from governor.model.words import WAITED_FOR, duration, percent
from governor.scheduler.driver import Governor
from governor.telemetry.watch import Meter, waiting_for

_EVERY_S = 30.0
# The cause of waiting while a pool's circuit breaker is open.
_OUTAGE = "outage"
_REFRESH_S = 0.25


@dataclass(slots=True)
class ProgressLane:
    """One pool under way: its governor, its meter, the mean answer time assumed until one is measured."""

    governor: Governor
    meter: Meter
    assumed_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The progress of a run. `tokens_per_minute`: reserved by the launches of the last minute; `limit`: 0 = none.

    `waiting`: the cause right now, "" = none; `silent_s`: for how long nothing has been answered, -1 = no outage.
    `eta_s`: until the end by the law; inf = not while it is paused.
    """

    total: int
    ended: int
    failed: int
    in_flight: int
    throttled: int
    tokens_per_minute: float
    limit: float
    waiting: str
    eta_s: float
    stopped: str = ""
    silent_s: float = -1.0

    def line(self) -> str:
        """Return one line for a log."""
        share = self.ended / self.total if self.total else 1.0
        parts = [f"{self.ended:,} of {self.total:,} done ({percent(share)})"]
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        parts += [f"{self.in_flight:,} in flight", f"{self.throttled:,} 429s", self.tokens_text()]
        parts.append(self.state_text())
        return ", ".join(parts)

    def short(self) -> str:
        """Return the progress for a bar, the most important first: a narrow terminal cuts it short."""
        share = self.ended / self.total if self.total else 1.0
        failed = f", {self.failed:,} failed" if self.failed else ""
        left = (
            self.state_text() if self.stopped or self.waiting in ("paused", _OUTAGE) else f"{duration(self.eta_s)} left"
        )
        waits = f", waits for {self.waiting}" if self.waiting not in ("", "paused", _OUTAGE) else ""
        rest = f"{self.in_flight:,} in flight, {self.throttled:,} 429s{waits}, {self.tokens_text()}"
        return f"{self.ended:,}/{self.total:,} ({percent(share)}{failed}), {left}, {rest}"

    def tokens_text(self) -> str:
        """Return the token rate against the limit: "24,300 of 30,000 tokens/min"."""
        of = f" of {self.limit:,.0f}" if self.limit else ""
        return f"{self.tokens_per_minute:,.0f}{of} tokens/min"

    def state_text(self) -> str:
        """Return why the run waits right now, and for how long."""
        if self.stopped:
            return "stopping: waiting for requests in flight"
        if self.waiting == "paused":
            return "paused"
        if self.waiting == _OUTAGE:
            return f"no answer for {duration(self.silent_s)}: waits for the provider, attempts do not count"
        waits = f"waits for {WAITED_FOR[self.waiting][1]}, " if self.waiting else ""
        return f"{waits}about {duration(self.eta_s)} left"


def eta_s(lane: ProgressLane) -> float:
    """Return seconds until this pool's last answer, by the law: a fluid estimate at the settings in force."""
    governor, meter = lane.governor, lane.meter
    flying = meter.in_flight
    left = max(0, meter.left - flying)
    service_s = meter.service_s or lane.assumed_s
    if governor.s.paused:
        return float("inf")
    now = governor.now()
    if left == 0:
        return service_s if flying else max(0.0, governor.wake_at - now) if governor.wake_at < 1e18 else 0.0
    load = Load.even(left, meter.left_tokens * left / max(1, meter.left), meter.prompt_ratio)
    p, s = governor.p, governor.s
    policy = meter.policy.believing(limit_found(p, s, TPM), limit_found(p, s, RPM))
    found = fluid_forecast(policy, load, booked=in_use(p, s, now), service_s=service_s)
    held_s = max(0.0, governor.s.hold_until - now, governor.s.next_slot_at - now)
    return max(held_s + found.finish_s, governor.backing_off()[1] - now + service_s)


def snapshot(lanes: Sequence[ProgressLane], total: int, ended_before: int, failed_before: int) -> Snapshot:
    """Return the progress of all pools together. The pool that will end last gives the cause of waiting."""
    etas = [eta_s(lane) for lane in lanes]
    last = max(range(len(lanes)), key=lambda i: etas[i])
    governor = lanes[last].governor
    tallies = [lane.meter.tally for lane in lanes]
    limits = [limit_found(lane.governor.p, lane.governor.s, TPM) for lane in lanes]
    return Snapshot(
        total=total,
        ended=ended_before + sum(t.requests for t in tallies),
        failed=failed_before + sum(t.failed for t in tallies),
        in_flight=sum(lane.meter.in_flight for lane in lanes),
        throttled=sum(t.throttled for t in tallies),
        tokens_per_minute=sum(lane.meter.tokens_per_minute(lane.governor.now()) for lane in lanes),
        limit=sum(limits) if all(limit > 0.0 for limit in limits) else 0.0,
        waiting=_waiting(lanes[last]),
        eta_s=etas[last],
        silent_s=governor.now() - governor.s.outage_from if governor.s.probe_at > -inf else -1.0,
        stopped=governor.stopped if all(lane.governor.stopped for lane in lanes) else "",
    )


def _waiting(lane: ProgressLane) -> str:
    """Return the cause for which a pool waits right now: the law's for the head of the queue, else its backoffs."""
    governor = lane.governor
    if governor.s.paused:
        return "paused"
    if governor.s.probe_at > -inf:
        return _OUTAGE
    if not lane.meter.in_flight and governor.cause in (law.NOTHING, law.CONCURRENCY):
        return "backoff" if governor.backing_off()[0] < inf else ""
    return waiting_for(governor.cause)


# ---------------------------------------------------------------- on the terminal, or not


class Shown(Protocol):
    """A progress that can be shown: requests in all and ended, in a line of a log or short enough for a bar."""

    @property
    def total(self) -> int: ...

    @property
    def ended(self) -> int: ...

    def line(self) -> str:
        """Return one line for a log."""

    def short(self) -> str:
        """Return the progress for a bar, the most important first."""


class Display:
    """Shows a run's progress: this one, of --quiet, warnings alone. `as_json`: as JSON objects, beside a log of these.

    Lines of text go through it, so that a bar is not torn.
    """

    def __init__(self, stream: TextIO | None = None, *, as_json: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.as_json = as_json

    def start(self) -> None:
        """Begin the run."""

    def show(self, now: Shown) -> None:
        """Show the progress; called a few times a second."""

    def say(self, line: str) -> None:
        """Print a lasting line: something that the user should know."""
        if self.as_json:
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = json.dumps({"time": at, "event": "note", "text": line}, separators=(",", ":"))
        # Its reader may be gone (a pipe into `head`), or the log's disk full: no reason to end a paid run.
        with contextlib.suppress(OSError):
            print(line, file=self.stream, flush=True)

    def inform(self, line: str) -> None:
        """Print a line that is only of interest; omitted with --quiet."""

    def stop(self) -> None:
        """End the run."""


class Lines(Display):
    """Not on a terminal: one line every 30 seconds."""

    def __init__(self, stream: TextIO | None = None, every_s: float = _EVERY_S, *, as_json: bool = False) -> None:
        super().__init__(stream, as_json=as_json)
        self.every_s = every_s
        self._shown_at = 0.0

    def start(self) -> None:
        self._shown_at = time.monotonic()

    def inform(self, line: str) -> None:
        self.say(line)

    def show(self, now: Shown) -> None:
        if time.monotonic() - self._shown_at >= self.every_s:
            self._shown_at = time.monotonic()
            self.renew(now)

    def renew(self, now: Shown) -> None:
        """Print the progress."""
        self.say(now.line() if self.as_json else f"{time.strftime('%H:%M:%S')} {now.line()}")


class Bar(Display):
    """On a terminal: a bar that vanishes at the end, and lines above it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self.console = Console(file=stream or sys.stderr, highlight=False, markup=False, soft_wrap=True)
        self._bar: Any = Progress(
            BarColumn(bar_width=16),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("starting", total=None)

    def start(self) -> None:
        self._bar.start()

    def show(self, now: Shown) -> None:
        self._bar.update(self._task, completed=now.ended, total=max(1, now.total), description=now.short())

    def say(self, line: str) -> None:
        self.console.print(line)

    def inform(self, line: str) -> None:
        self.say(line)

    def stop(self) -> None:
        self._bar.stop()


class ScreenCell(Lines):
    """In a notebook: one line that is renewed, and lines above it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream, every_s=1.0)
        self._handle: Any = None

    def renew(self, now: Shown) -> None:
        display: Any = sys.modules["IPython"].display.display
        content = {"text/plain": now.short()}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def shown(*, quiet: bool, logs: str | None = None, stream: TextIO | None = None) -> Display:
    """Return the progress display of a run.

    `logs`: the format of an accompanying log; then lines, not a bar, are shown.
    """
    target, as_json = stream or sys.stderr, logs == "json"
    if quiet:
        return Display(target, as_json=as_json)
    if not as_json and _is_notebook():
        return ScreenCell(target)
    return Bar(target) if target.isatty() and logs is None else Lines(target, as_json=as_json)

"""One time for several processes: the store's clock, each process's estimate of it, a state seen from another zero.

Theory of operation. The store's clock, in microseconds since 1970, becomes seconds since EPOCH_S, times the scale of a
sped-up rehearsal, rounded down to a binary fraction: differences of two such times are exact, so a process may count
from its own zero (a fixed distance away) and lose no bit. Between two answers of the store a process goes by its own
monotonic clock. An answer heard at `heard_at` says that the store's time is at least the time that it states: the
largest such bound is kept, so that no process is ever ahead of the store, and it fades by DRIFT_RATIO, so that a local
clock that runs fast is corrected.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from governor.law import CELLS, CELLS_BEHIND, SLIDING, Params, State, cell_s

# 2026-01-01, so that a time has bits to spare for its fraction.
EPOCH_S = 1_767_225_600
QUANTUM_S = 2.0**-16
# More than the difference between two quartz clocks.
DRIFT_RATIO = 5e-4
_BREAKER_TIMES = ("silent_since", "outage_from", "outage_opened_at", "outage_until", "probe_at")
_TIMES = ("last_launch_at", "next_slot_at", "hold_until", "burst_at", "pace_at", "paced_until", *_BREAKER_TIMES)
# The circuit breaker's fields of a state.
BREAKER = ("unanswered", "failing", "several", "probe_gap_s", *_BREAKER_TIMES)
_FIELDS = tuple(each.name for each in fields(State))


def floored(seconds: float) -> float:
    """Return that time, rounded down to a whole number of quanta."""
    return math.floor(seconds / QUANTUM_S) * QUANTUM_S


def server_s(server_us: int, scale: float) -> float:
    """Return the store's clock (microseconds since 1970) as seconds since EPOCH_S, times `scale`."""
    return floored((server_us - EPOCH_S * 1_000_000) * scale / 1e6)


class ServerClock:
    """A lower bound of the pool's time by a local monotonic clock. `ahead_s`: the pool's time less the local time."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.ahead_s = -math.inf
        self._heard_at = -math.inf

    def heard(self, server_us: int, asked_at: float, heard_at: float) -> float:
        """Record the store's answer, asked and heard at these local times, and return the store's time."""
        at = server_s(server_us, self.scale)
        if self._heard_at > -math.inf:
            self.ahead_s -= DRIFT_RATIO * max(0.0, heard_at - self._heard_at)
        # Not before the question was asked either: follow at once a clock that was set back.
        self.ahead_s = min(max(self.ahead_s, at - heard_at), at - asked_at)
        self._heard_at = heard_at
        return at


def moved(p: Params, s: State, by_s: float) -> State:
    """Return a copy of a state with all its times `by_s` later: the same pool seen from another zero.

    The cells of a sliding window move by whole cells, up to one more: never looser.
    """
    values: list[Any] = [getattr(s, name) for name in _FIELDS]
    copies: list[Any] = [each.copy() if isinstance(each, list) else each for each in values]
    t = State(*copies)
    for name in _TIMES:
        setattr(t, name, getattr(t, name) + by_s)
    for times in (t.full_at, t.window_at, t.mirror_at, t.synced_at):
        times[:] = [at + by_s for at in times]
    t.zero_s -= by_s
    for d in range(p.dimensions):
        if p.window[d] != SLIDING:
            continue
        passed = math.ceil(by_s / cell_s(p, d))
        ring = s.cells[d * CELLS : (d + 1) * CELLS]
        if not any(ring):
            t.cell_at[d] = 0.0
            continue
        newest = int(s.cell_at[d])
        for cell in range(newest - CELLS_BEHIND, newest + 1):
            t.cells[d * CELLS + (cell + passed) % CELLS] = ring[cell % CELLS]
        t.cell_at[d] = float(newest + passed)
    return t

"""Time series from attempt rows: tokens in the last minute, requests in flight, lanes, and causes of waiting.

A step function is a pair (times, values): values[i] holds from times[i] until times[i + 1]. Before the first time it is
0. At one instant only the sum of all changes shows: an answer that frees a place and the launch that takes it leave no
spike.

Causes of waiting. A driver advances one clock per cause, and an attempt's wait is the difference of its readings
between becoming eligible and launching. In order of launch, the readings at each launch can be reconstructed: reading
at launch = reading when eligible + waits. Between two launches the clocks' advance is what the head of the queue waited
for. This is exact for a batch whose requests launch in order. An attempt that became eligible after the last known
reading and overtook others (a retry) does not show what those had waited for until then: that stretch, whose length is
known, is assumed to have the causes of the attempt's own wait.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

import numpy as np

from governor.law import MINUTE_S
from governor.model.requests import BACKOFF, CAUSES, Attempt
from sim.model.workload import Real

Steps = tuple[Real, Real]

# Causes that hold back the head of the queue: all but "nothing" and the backoff of a single request.
HEAD_CAUSES = CAUSES[1:BACKOFF]
_WAITED = tuple(f"waited_{cause}_s" for cause in HEAD_CAUSES)
# Anything shorter is rounding in clock differences, not a wait.
_SHORTEST_S = 1e-6


def steps(at_s: Real, change: Real) -> Steps:
    """Return the running sum of changes, one value per distinct time.

    Both arrays have shape (changes,), in any order.
    """
    order = np.argsort(at_s, kind="stable")
    times, first = np.unique(at_s[order], return_index=True)
    if not len(times):
        return np.zeros(0), np.zeros(0)
    return times, np.cumsum(np.add.reduceat(change[order], first))


def in_flight(attempts: Sequence[Attempt]) -> Steps:
    """Return requests in flight: up at each launch, down at each end."""
    launched = np.array([a.launched_s for a in attempts])
    finished = np.array([a.finished_s for a in attempts])
    ones = np.ones(len(attempts))
    return steps(np.concatenate([launched, finished]), np.concatenate([ones, -ones]))


def charged_per_minute(attempts: Sequence[Attempt], window_s: float = MINUTE_S) -> Steps:
    """Return tokens charged by the provider in the last 60 s, counted at launch; unknown charges count as reserved."""
    let_in = [a for a in attempts if a.charged_tokens != 0]
    launched = np.array([a.launched_s for a in let_in])
    tokens = np.array([float(a.charged_tokens if a.charged_tokens > 0 else a.reserved_tokens) for a in let_in])
    return steps(np.concatenate([launched, launched + window_s]), np.concatenate([tokens, -tokens]))


def envelope(series: Steps, end_s: float, bins: int) -> Steps:
    """Return the series up to `end_s`; if it has more than `bins` steps, its maximum in each of `bins` equal spans.

    The maximum, because a curve compared with a limit must not hide a peak.
    """
    times, values = series
    kept = times <= end_s
    times, values = times[kept], values[kept]
    if len(times) <= bins:
        return times, values
    edges = np.linspace(0.0, end_s, bins + 1)[:-1]
    # The value when the span begins, and every step inside it.
    held = np.searchsorted(times, edges, side="right") - 1
    peaks = np.where(held >= 0, values[np.maximum(held, 0)], 0.0)
    span = np.searchsorted(edges, times, side="right") - 1
    np.maximum.at(peaks, span, values)
    return edges, peaks


def means(series: Steps, end_s: float, spans: int) -> Steps:
    """Return the time-weighted mean of the series in each of `spans` equal spans up to `end_s`."""
    edges = np.linspace(0.0, end_s, spans + 1)
    times, values = series
    if not len(times) or end_s <= 0.0:
        return edges[:-1], np.zeros(spans)
    # The area below the curve up to each edge is linear between the steps.
    at = np.concatenate([[min(0.0, times[0])], times, [max(end_s, times[-1])]])
    area = np.concatenate([[0.0], np.cumsum(np.concatenate([[0.0], values]) * np.diff(at))])
    return edges[:-1], np.diff(np.interp(edges, at, area)) / (end_s / spans)


def lanes(attempts: Sequence[Attempt]) -> list[int]:
    """Return the lane of each attempt, from 0: the lowest one free at its launch, so that lanes are few."""
    found = [0] * len(attempts)
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    opened = 0
    for i in sorted(range(len(attempts)), key=lambda i: (attempts[i].launched_s, attempts[i].finished_s)):
        while busy and busy[0][0] <= attempts[i].launched_s:
            heappush(free, heappop(busy)[1])
        if not free:
            heappush(free, opened)
            opened += 1
        found[i] = heappop(free)
        heappush(busy, (attempts[i].finished_s, found[i]))
    return found


class Wait(NamedTuple):
    """The head of the queue waited from `start_s` to `end_s` for `cause`; `attempt` is the one that then launched.

    If several causes followed one another before a launch, their durations are known but their order is not:
    they are shown in the order of the law's causes.
    """

    start_s: float
    end_s: float
    cause: str
    attempt: Attempt


def head_waits(attempts: Iterable[Attempt]) -> list[Wait]:
    """Return the waits of the head of the queue, in order of time and without overlap. See the module's docstring."""
    ordered = sorted(attempts, key=lambda a: (a.launched_s, a.eligible_s, a.request, a.attempt))
    # From when on some attempt was waiting that launched later than attempt i.
    others_since = [inf] * len(ordered)
    for i in range(len(ordered) - 1, 0, -1):
        others_since[i - 1] = min(others_since[i], ordered[i].eligible_s)
    times = [0.0]
    readings: list[tuple[float, ...]] = [(0.0,) * len(HEAD_CAUSES)]
    waits: list[Wait] = []
    for a, since in zip(ordered, others_since, strict=True):
        waited = [getattr(a, name) for name in _WAITED]
        unknown_s = a.eligible_s - max(times[-1], since)
        if unknown_s > 0.0:
            own = sum(waited)
            if own <= _SHORTEST_S:
                continue
            waited = [seconds * (1.0 + unknown_s / own) for seconds in waited]
        eligible = _reading(times, readings, a.eligible_s)
        now = tuple(before + seconds for before, seconds in zip(eligible, waited, strict=True))
        # A clock never goes back, even if an estimated reading says so.
        passed = [max(0.0, after - before) for after, before in zip(now, readings[-1], strict=True)]
        room = a.launched_s - times[-1]
        if room > 0.0:
            waits += _placed(passed, room, a)
            times.append(a.launched_s)
            readings.append(now)
    return waits


def _placed(passed: Sequence[float], room: float, attempt: Attempt) -> Iterator[Wait]:
    """Yield consecutive waits of these lengths, one per cause, that end at the launch and fit into `room`."""
    total = sum(passed)
    if total <= _SHORTEST_S:
        return
    scale = min(1.0, room / total)
    start = attempt.launched_s - scale * total
    for cause, seconds in zip(HEAD_CAUSES, passed, strict=True):
        if seconds > _SHORTEST_S:
            end = min(start + scale * seconds, attempt.launched_s)
            yield Wait(start, end, cause, attempt)
            start = end


def _reading(times: list[float], readings: list[tuple[float, ...]], at_s: float) -> tuple[float, ...]:
    """Return the clocks at a moment, linear between the readings on either side; the last reading after them."""
    after = bisect_right(times, at_s)
    if after == len(times):
        return readings[-1]
    before, later = readings[after - 1], readings[after]
    share = (at_s - times[after - 1]) / (times[after] - times[after - 1])
    return tuple(b + share * (x - b) for b, x in zip(before, later, strict=True))


def waiting_shares(waits: Sequence[Wait], end_s: float, bins: int) -> tuple[Real, dict[str, Real]]:
    """Return the share of each of `bins` equal spans up to `end_s` in which the head waited for each cause.

    The result is the spans' edges, shape (bins + 1,), and by cause (those that occur) an array of shape (bins,), 0 to
    1.
    """
    edges = np.linspace(0.0, end_s, bins + 1)
    width = end_s / bins
    shares = {}
    for cause in HEAD_CAUSES:
        mine = [w for w in waits if w.cause == cause]
        if mine and width > 0.0:
            start = np.array([w.start_s for w in mine])
            end = np.array([w.end_s for w in mine])
            # Seconds waited up to each edge; starts and ends are sorted because no two waits overlap.
            known = np.concatenate([[0.0], np.cumsum(end - start)])
            index = np.searchsorted(end, edges, side="right")
            begun = np.append(start, np.inf)[index]
            upto = known[index] + np.clip(edges - begun, 0.0, None)
            shares[cause] = np.diff(upto) / width
    return edges, shares

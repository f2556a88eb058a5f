"""Each attempt of a run as it was, for a simulation that meets the same again: `Record`.

An attempt is found in two ways: by its place in its request's history (the third attempt of request 7), and, since
refusals are the limiter's and not the request's, by its place among those of its request that were let in. Under other
settings a request may be refused more or less often; the first attempt that is let in still meets what the first one
met in the run.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from governor.journal.rows import HeardAttempt
from governor.model.needs import STANDARD
from governor.model.requests import CAUSES, LANES, Attempt, Ended, Limit, Outcome
from governor.model.work import STOPPING
from sim.calibration.others import Count
from sim.des.run import TIMEOUT
from sim.model import provider as prov

REFUSED = (Outcome.THROTTLED, Outcome.SLOW_DOWN)
# What the simulation knows it as. A final refusal of the request itself ends it, as one that is too large does.
_SIMULATED = {
    Outcome.OK: prov.OK,
    Outcome.THROTTLED: prov.THROTTLED,
    Outcome.SLOW_DOWN: prov.SLOW_DOWN,
    Outcome.TOO_LARGE: prov.TOO_LARGE,
    Outcome.BAD_REQUEST: prov.TOO_LARGE,
    Outcome.MALFORMED: prov.TOO_LARGE,
    Outcome.SERVER_ERROR: prov.SERVER_ERROR,
    Outcome.OVERLOADED: prov.SERVER_ERROR,
    Outcome.DROPPED: prov.DROPPED,
    Outcome.LOCAL: prov.DROPPED,
    Outcome.TIMEOUT: TIMEOUT,
}
_Stated = Sequence[tuple[int, float, float]]
# Main or finalize pass of a request, by its place in the workload.
RecordedLane = tuple[int, int]


class RecordedAttempt(NamedTuple):
    """One attempt as it was. Times in seconds since the run's first launch; `outcome` is the simulation's number.

    `used`: tokens of the answer, prompt included, -1 = not stated. `retry_after_s`: -1 = none. `stated`: as
    `sim.des.driver.Job.stated`. `way_s`: to the provider, and there and back; None = not known. `eligible_s`: when the
    loop noticed that it could go, -1 = not known.
    """

    launched_s: float
    ended_s: float
    outcome: int
    retry_after_s: float = -1.0
    used: float = -1.0
    stated: _Stated = ()
    way_s: tuple[float, float] | None = None
    eligible_s: float = -1.0

    @property
    def is_refused(self) -> bool:
        """Return whether the limiter refused the attempt."""
        return self.outcome in (prov.THROTTLED, prov.SLOW_DOWN)

    @property
    def took_s(self) -> float:
        """Return seconds until its answer; an attempt that timed out would have taken longer than any time-out."""
        return prov.NEVER_S if self.outcome == TIMEOUT else self.ended_s - self.launched_s


@dataclass(frozen=True, slots=True)
class Record:
    """The attempts and ends of a run. `ended_s`, `is_lost`: shape (requests,). `waits_s`: by cause, nan = not known."""

    tried: dict[tuple[int, int, int], RecordedAttempt]
    ended_s: NDArray[np.float64]
    is_lost: NDArray[np.bool_]
    waits_s: NDArray[np.float64]
    let_in: dict[RecordedLane, list[RecordedAttempt]] = field(default_factory=dict)
    launched_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for (place, lane, _), tried in sorted(self.tried.items()):
            if not tried.is_refused:
                self.let_in.setdefault((place, lane), []).append(tried)
        self.launched_s.extend(sorted(tried.launched_s for tried in self.tried.values()))

    def is_nth(self, n: int, at_s: float, slack_s: float) -> bool:
        """Return whether the run's n-th launch (from 1) was within `slack_s` of that moment."""
        launches = self.launched_s
        return bisect_left(launches, at_s - slack_s) < n <= bisect_right(launches, at_s + slack_s)


def record_of(
    heard: Iterable[HeardAttempt],
    ends: Mapping[int, Ended],
    place: Mapping[int, int],
    clock: Callable[[float], float],
    counts: Iterable[Count],
) -> Record:
    """Return a journal's record of these requests. `place`: request -> row of the workload; `ends` by that row.

    `counts`: the same attempts with the network delays found for them.
    """
    ways_s = {(c.place, c.launched_s): (c.there_s, max(c.there_s, c.round_s)) for c in counts if c.there_s >= 0.0}
    tried: dict[tuple[int, int, int], RecordedAttempt] = {}
    count: dict[RecordedLane, int] = {}
    waits_s = np.zeros(len(CAUSES))
    for a, limits, _ in sorted(heard, key=lambda each: each.attempt.launched_s):
        if a.outcome in STOPPING:
            continue  # it stopped the run; what came of the request stands in a later attempt
        lane = place[a.request], LANES.index(a.lane)
        count[lane] = count.get(lane, 0) + 1
        way_s = ways_s.get((lane[0], clock(a.launched_s)))
        tried[(*lane, count[lane])] = _tried(a, limits, clock)._replace(way_s=way_s, eligible_s=clock(a.eligible_s))
        for cause, name in enumerate(CAUSES[1:], 1):
            waits_s[cause] += getattr(a, f"waited_{name}_s")
    ended_s = np.array([clock(ends[i].ended_s) for i in range(len(ends))])
    is_lost = np.array([bool(ends[i].failure) for i in range(len(ends))])
    return Record(tried, ended_s, is_lost, waits_s)


def _tried(a: Attempt, limits: Iterable[Limit], clock: Callable[[float], float]) -> RecordedAttempt:
    stated = sorted(
        (STANDARD[each.dimension], each.limit, each.remaining) for each in limits if each.dimension in STANDARD
    )
    is_used = a.outcome is Outcome.OK and a.prompt_tokens >= 0 and a.output_tokens >= 0
    return RecordedAttempt(
        clock(a.launched_s),
        clock(a.finished_s),
        _SIMULATED[a.outcome],
        a.retry_after_s,
        float(a.prompt_tokens + a.output_tokens) if is_used else -1.0,
        stated,
    )

"""The start guard: decide whether a run may start, and check whether it keeps to its forecast.

Every check is arithmetic over an `Expectation`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from governor.forecast.forecast import Demand, Expectation, throttles_text
from governor.forecast.preflight import preflight
from governor.law import DAY_S
from governor.model.errors import Oversized, Refused
from governor.model.phrases import limit_name, what_of, whole_if
from governor.model.pools import Pool
from governor.model.requests import Request
from governor.model.words import duration, percent

# A run may be later than its forecast by this share and still keep to it; a fluid forecast is coarser.
LATE_RATIO = {"simulation": 0.05, "fluid": 0.5}
SLACK_S = 1.0
RESUMED_SLACK_S = 60.0
# Below this share of requests, the answers so far say little about the rest: the longest may have gone first.
TELLING_SHARE = 0.3
# A canary that needs so many times its forecast is a warning.
CANARY_RATIO = 1.5

# ---------------------------------------------------------------- before the start


def check_fits(request: Request, reserve: int, pool: Pool) -> None:
    """Raise Oversized for a request that reserves more than a limit: the provider would never admit it."""
    p, policy = pool.policy.params(), pool.policy
    need = policy.weights.of(reserve, request.sizes.prompt_tokens)
    for d in range(p.dimensions):
        if 0.0 < p.limit[d] < need[d]:
            raise Oversized(
                request=request.index,
                custom_id=request.custom_id,
                tokens=whole_if(need[d]),
                limit=whole_if(p.limit[d]),
                what=what_of(policy, d),
                setting=limit_name(policy, d),
            )


def check_preflight(pool: Pool, demand: Demand) -> None:
    """Raise Refused if this pool's preflight fails."""
    verdict = preflight(pool.policy, demand.load(), service_s=demand.assumed_service_s())
    if not verdict.ok:
        strict = (
            " (PREFLIGHT_MODE=strict; paced lets the governor pace it)"
            if pool.policy.preflight_mode == "strict"
            else ""
        )
        wait_s = -1.0 if verdict.suggested_wait_s is None else float(verdict.suggested_wait_s)
        raise Refused(f"503 {verdict.code}: {verdict.reason}{strict}", wait_s)


def check_finish(finish_s: float, allowed_s: float | None, held_back: str) -> None:
    """Raise Refused if the forecast exceeds the time allowed: `allowed_s`, or a day if none was given."""
    limit_s = DAY_S if allowed_s is None else allowed_s
    if finish_s <= limit_s:
        return
    limit = "more than a day" if allowed_s is None else f"--finish-by allows {duration(allowed_s)}"
    hours = math.ceil(finish_s / 3_600.0)
    raise Refused(
        f"the forecast finish is {duration(finish_s)} from now, {limit}; held back by {held_back}: see what would help "
        f"with `paceline plan`, allow it with --finish-by {hours}h, or start it as it is with --yes"
    )


# ---------------------------------------------------------------- while it runs


@dataclass(frozen=True, slots=True)
class MeasuredFigures:
    """The figures that a run has shown so far, for comparison with an expectation."""

    ended: int
    failed: int
    throttled: int
    attempts: int
    service_s: float
    answer_tokens: float
    paused: bool = False


class Track:
    """Compares one pool's run with its forecast. Call `look` now and then; it reports changes only.

    `late_since_s`: when it fell behind, seconds since the start; -1 = it is on time. `slack_s`: a delay that is not
    reported, in addition to a share of the forecast: a resumed leg may find its minute used up, unknown to the
    forecast.
    """

    def __init__(self, expectation: Expectation, slack_s: float = SLACK_S) -> None:
        self.e = expectation
        self._slack_s = slack_s + LATE_RATIO[expectation.by] * expectation.finish_s
        self.late_since_s = -1.0
        self._times = [latest for _, _, latest in expectation.milestones]
        self._shares = [share for share, _, _ in expectation.milestones]

    def share_due(self, now: float) -> float:
        """Return the share of requests that must be done by `now`, after the tolerance."""
        now -= self._slack_s
        i = bisect_right(self._times, now)
        if i == 0:
            return 0.0
        if i == len(self._times):
            return 1.0
        before, after = self._times[i - 1], self._times[i]
        part = (now - before) / (after - before) if after > before else 1.0
        return self._shares[i - 1] + part * (self._shares[i] - self._shares[i - 1])

    def look(self, now: float, seen: MeasuredFigures, cause: str) -> str:
        """Return one line when the run falls behind its forecast or catches up, else "". `cause`: what it waits for."""
        due = math.floor(self.share_due(now) * self.e.requests)
        late = seen.ended < due
        if late and self.late_since_s < 0.0:
            self.late_since_s = now
            behind = f"{seen.ended:,} done where {due:,} should be"
            return f"later than forecast since {duration(now)} after the start: {behind}; {self._why(seen, cause)}"
        if not late and self.late_since_s >= 0.0:
            since_s, self.late_since_s = self.late_since_s, -1.0
            return f"back within the forecast, after {duration(now - since_s)}"
        return ""

    def _why(self, seen: MeasuredFigures, cause: str) -> str:
        """Return how the run differs from its forecast, the plainest difference first."""
        e = self.e
        reasons = []
        share = max(1e-9, seen.ended / max(1, e.requests))
        if seen.paused:
            reasons.append("the run is paused")
        if seen.throttled > 1.0 + e.throttled_high * min(1.0, 2.0 * share):
            reasons.append(f"{seen.throttled:,} 429s ({throttles_text(e)} expected in all)")
        telling = share >= TELLING_SHARE
        if telling and seen.service_s > 1.2 * e.service_s > 0.0:
            reasons.append(f"answers take {duration(seen.service_s)} ({duration(e.service_s)} expected)")
        mean = sum(e.answer_tokens.values()) / max(1, e.requests)
        if telling and seen.answer_tokens > 1.2 * mean > 0.0:
            reasons.append(f"answers have {seen.answer_tokens:,.0f} tokens ({mean:,.0f} expected)")
        if not reasons and cause:
            reasons.append(f"it waits for {cause}")
        return ", ".join(reasons) or "nothing that is measured here explains it"


def canary_verdict(e: Expectation, seen: MeasuredFigures, took_s: float) -> list[str]:
    """Return the ways in which a canary of `e.requests` requests did worse than expected; none = go on."""
    found = []
    if seen.failed:
        found.append(f"{seen.failed:,} of {seen.ended:,} failed ({percent(seen.failed / max(1, seen.ended))})")
    if seen.throttled > e.throttled_high + 1.0:
        found.append(f"{seen.throttled:,} 429s where {throttles_text(e)} were expected")
    if took_s > CANARY_RATIO * max(e.high_s, 1.0):
        found.append(f"it took {duration(took_s)} where {duration(e.finish_s)} was expected")
    return found


def canary_note(e: Expectation, seen: MeasuredFigures) -> str:
    """Return a note if the canary's answers differ in length from the assumption, else "".

    Only time and cost stop a run.
    """
    mean = sum(e.answer_tokens.values()) / max(1, e.requests)
    if seen.ended == seen.failed or mean / CANARY_RATIO <= seen.answer_tokens <= CANARY_RATIO * mean:
        return ""
    return f"answers have {seen.answer_tokens:,.0f} tokens where {mean:,.0f} were assumed"

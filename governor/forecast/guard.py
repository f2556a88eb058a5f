"""The start guard: whether a run may start, and whether it keeps to what was expected of it.

All of it is arithmetic over an `Expectation`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from governor.forecast.forecast import Demand, Expectation, throttles_text
from governor.forecast.preflight import preflight
from governor.law import TPD, TPM
from governor.model.errors import Oversized, Refused
from governor.model.pools import Pool
from governor.model.requests import Request
from governor.model.words import duration, percent

DAY_S = 86_400.0
# A run may be later than its forecast by this share and still keep to it; a fluid forecast is coarser.
LATE_RATIO = {"simulation": 0.05, "fluid": 0.5}
SLACK_S = 1.0
RESUMED_SLACK_S = 60.0
# Before so much is done, the answers so far say little of the rest: the longest may have gone first.
TELLING_SHARE = 0.3
# A canary that needs so many times what was expected of it is a warning.
CANARY_RATIO = 1.5

# ---------------------------------------------------------------- before the start


def check_fits(request: Request, reserve: int, pool: Pool) -> None:
    """Oversized for a request that reserves more than a limit: the provider would never let it in."""
    p = pool.policy.params()
    for d, setting in ((TPM, "OPENAI_TPM_LIMIT"), (TPD, "OPENAI_TPD_LIMIT")):
        if 0.0 < p.limit[d] < reserve:
            raise Oversized(
                request=request.index,
                custom_id=request.custom_id,
                tokens=reserve,
                limit=int(p.limit[d]),
                setting=setting,
            )


def check_preflight(pool: Pool, demand: Demand) -> None:
    """Refused where this pool's preflight says no."""
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
    """Refused where the forecast is past what the caller allows: `allowed_s`, or a day where nothing was said."""
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
class Measured:
    """What a run has shown so far, to be held against an expectation."""

    ended: int
    failed: int
    throttled: int
    attempts: int
    service_s: float
    answer_tokens: float
    paused: bool = False


class Track:
    """Whether one pool's run keeps to its forecast. Ask `look` now and then; it speaks when something has changed.

    `late_since_s`: when it fell behind, seconds since the start; -1 = it keeps to it. `slack_s`: so much later is no
    news, beside a share of the forecast: a resumed leg may find its minute used up, which no forecast knew.
    """

    def __init__(self, expectation: Expectation, slack_s: float = SLACK_S) -> None:
        self.e = expectation
        self._slack_s = slack_s + LATE_RATIO[expectation.by] * expectation.finish_s
        self.late_since_s = -1.0
        self._times = [latest for _, _, latest in expectation.milestones]
        self._shares = [share for share, _, _ in expectation.milestones]

    def share_due(self, now: float) -> float:
        """The share of requests that should be done by `now` at the latest, the tolerance allowed for."""
        now -= self._slack_s
        i = bisect_right(self._times, now)
        if i == 0:
            return 0.0
        if i == len(self._times):
            return 1.0
        before, after = self._times[i - 1], self._times[i]
        part = (now - before) / (after - before) if after > before else 1.0
        return self._shares[i - 1] + part * (self._shares[i] - self._shares[i - 1])

    def look(self, now: float, seen: Measured, cause: str) -> str:
        """One line when the run falls behind its forecast or is back within it, else "". `cause`: what it waits for."""
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

    def _why(self, seen: Measured, cause: str) -> str:
        """What differs from what was expected, the plainest first."""
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


def canary_verdict(e: Expectation, seen: Measured, took_s: float) -> list[str]:
    """What a canary of `e.requests` requests found to be worse than expected; nothing = go on."""
    found = []
    if seen.failed:
        found.append(f"{seen.failed:,} of {seen.ended:,} failed ({percent(seen.failed / max(1, seen.ended))})")
    if seen.throttled > e.throttled_high + 1.0:
        found.append(f"{seen.throttled:,} 429s where {throttles_text(e)} were expected")
    if took_s > CANARY_RATIO * max(e.high_s, 1.0):
        found.append(f"it took {duration(took_s)} where {duration(e.finish_s)} was expected")
    return found


def canary_note(e: Expectation, seen: Measured) -> str:
    """What a canary found of the answers' length; "" where it is as assumed. No reason to stop: time and cost are."""
    mean = sum(e.answer_tokens.values()) / max(1, e.requests)
    if seen.ended == seen.failed or mean / CANARY_RATIO <= seen.answer_tokens <= CANARY_RATIO * mean:
        return ""
    return f"answers have {seen.answer_tokens:,.0f} tokens where {mean:,.0f} were assumed"

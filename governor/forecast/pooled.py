"""Several pools as one run: their figures together, and the bound of quotas that share a batch.

That bound is the one of a single quota with the sum of their limits.
Let each of them admit no more than its limit and what drains from it, used_k(T) <= L_k and so D_k <= L_k + R_k(T) -
used_k(0) for the D_k that it was given (see `summary`). The sum over k is the same inequality with sums for D, L, R and
used, whatever the division: no router is faster than one quota of all of them. So a limit counts only if every one of
them has it, and has it of the same kind; if they differ in kind, it bounds nothing here. A request counts as the quota
that served it charged it, and takes the time that it took there: they are taken to charge and serve alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from governor.forecast.summary import Grant, Summary, WorkDone, bound_s, efficiency_of
from governor.model.needs import Limited
from governor.model.requests import CAUSES


def pooled_bound_s(grants: Sequence[Grant], works: Sequence[WorkDone]) -> float:
    """Return the makespan, in seconds, below which no division of this work over these quotas can go."""
    if len(grants) == 1:
        return bound_s(grants[0], works[0])
    return bound_s(_pooled(grants), _together(works))


def _pooled(grants: Sequence[Grant]) -> Grant:
    first = grants[0]
    if any(grant.changes != first.changes for grant in grants):
        # Their changes cannot be added up: the highest limit of each counts at all times.
        grants = [_highest(grant) for grant in grants]
    alike = len({(grant.minute_reset, grant.phase_s if grant.minute_reset else 0.0) for grant in grants}) == 1
    return replace(
        grants[0],
        tpm_limit=_sum([grant.tpm_limit for grant in grants]) if alike else 0.0,
        rpm_limit=_sum([grant.rpm_limit for grant in grants]) if alike else 0.0,
        tpd_limit=_sum([grant.tpd_limit for grant in grants]),
        rpd_limit=_sum([grant.rpd_limit for grant in grants]),
        settles=any(grant.settles for grant in grants),
        burst_ratio=max(grant.burst_ratio for grant in grants),
        day_tokens_used=math.fsum(grant.day_tokens_used for grant in grants),
        day_requests_used=math.fsum(grant.day_requests_used for grant in grants),
        quota=tuple(_dimensions(grants)),
    )


def _highest(grant: Grant) -> Grant:
    factor = max(1.0, *(factor for _, factor in grant.changes), 1.0)
    quota = tuple(replace(each, limit=each.limit * factor) for each in grant.quota)
    return replace(
        grant, tpm_limit=grant.tpm_limit * factor, rpm_limit=grant.rpm_limit * factor, quota=quota, changes=()
    )


def _sum(limits: Sequence[float]) -> float:
    """Return the sum of limits, 0 = none, if one of them is none."""
    return math.fsum(limits) if min(limits) > 0.0 else 0.0


def _dimensions(grants: Sequence[Grant]) -> list[Limited]:
    found = []
    for each in grants[0].quota:
        same = [other for grant in grants for other in grant.quota if replace(other, limit=each.limit) == each]
        if len(same) == len(grants):
            found.append(replace(each, limit=_sum([other.limit for other in same])))
    return found


def _together(works: Sequence[WorkDone]) -> WorkDone:
    whole = WorkDone(
        requests=sum(work.requests for work in works),
        charged=math.fsum(work.charged for work in works),
        counted=math.fsum(work.counted for work in works),
        shortest_s=min(work.shortest_s for work in works),
        latest_s=max(work.latest_s for work in works),
        returned=math.fsum(work.returned for work in works),
        inputs=math.fsum(work.inputs for work in works),
    )
    for work in works:
        whole.arrivals_s.extend(work.arrivals_s)
        whole.charges.extend(work.charges)
        whole.counts.extend(work.counts)
        whole.services_s.extend(work.services_s)
    return whole


def merged(summaries: Sequence[Summary], bound_s: float, cost_usd: float | None) -> Summary:
    """Return several pools side by side as one run, with its bound.

    Their peaks need not coincide: the sum is an upper bound.
    """
    if len(summaries) == 1:
        return replace(summaries[0], cost_usd=cost_usd)
    failures: dict[str, int] = {}
    for s in summaries:
        for code, count in s.failures.items():
            failures[code] = failures.get(code, 0) + count
    counted: tuple[str, ...] = (
        "requests",
        "completed",
        "failed",
        "attempts",
        "throttled",
        "reserved_tokens",
        "charged_tokens",
    )
    counted += ("used_tokens", "peak_in_flight", "stagger_delays", "tpm_deferrals")
    sums = {name: sum(getattr(s, name) for s in summaries) for name in counted}
    makespan_s = max((s.makespan_s for s in summaries), default=0.0)
    return Summary(
        **sums,
        makespan_s=makespan_s,
        bound_s=bound_s,
        efficiency=efficiency_of(bound_s, makespan_s, sums["failed"]),
        waits_s={cause: math.fsum(s.waits_s.get(cause, 0.0) for s in summaries) for cause in CAUSES[1:]},
        failures=dict(sorted(failures.items())),
        cost_usd=cost_usd,
    )

"""A policy as the law's numbers: over the guardrails' four dimensions, or over those of a provider's profile."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from governor.law import (
    BUCKET,
    BY_DAY,
    BY_RPM,
    BY_TPM,
    DAY_S,
    DIMENSIONS,
    FIXED,
    MINUTE_S,
    SLIDING,
    SOUGHT_BURST_S,
    Params,
    budget_of,
    burst_of,
    is_brief,
    rate_of,
)

if TYPE_CHECKING:
    from governor.model.policy import Policy

_WINDOWS = {"fixed": FIXED, "sliding": SLIDING, "bucket": BUCKET}


def params_of(policy: Policy) -> Params:
    """Return the numbers that the law works on. The headroom applies to each known limit, daily ones included."""
    p = _over_quota(policy) if policy.quota else _of_guardrails(policy)
    if policy.find_limits != "none":
        requests = [each.per_request > 0.0 for each in policy.quota] if policy.quota else [False, True, False, True]
        places = [each.place for each in policy.quota] if policy.quota else range(4)
        for d, is_of_requests in zip(places, requests, strict=True):
            if is_brief(p, d) and policy.find_limits in ("both", "requests" if is_of_requests else "tokens"):
                _seek(p, d)
    return p


def _seek(p: Params, d: int) -> None:
    """Let the law find the limit of dimension `d`: see `Params.sought`. No launches while the wait for one lasts."""
    p.seeks = p.hold_on_throttle = 1
    p.limit[d], p.budget[d], p.rate_per_s[d], p.window[d] = 0.0, 1.0, 1.0 / p.length_s[d], float(BUCKET)
    p.burst_ratio[d] = SOUGHT_BURST_S / p.length_s[d]
    p.held[d], p.largest[d], p.shared[d], p.sought[d] = p.burst_ratio[d], math.inf, math.inf, 1.0


def _over_quota(policy: Policy) -> Params:
    """Return the numbers over the dimensions of the profile, each at its place."""
    p = _of_guardrails(policy)
    p.dimensions = 1 + max(each.place for each in policy.quota)
    stated = dict(zip(("TPM", "RPM", "TPD", "RPD"), p.limit, strict=False))
    named = {
        name
        for name, field in zip(stated, ("tpm_limit", "rpm_limit", "tpd_limit", "rpd_limit"), strict=True)
        if field in policy.model_fields_set and stated[name] > 0.0
    }
    p.limit = _each()
    p.settles, p.refunds = _each(), _each()
    for each in policy.quota:
        d = each.place
        p.limit[d] = stated[each.name] if each.name in named else each.limit
        p.length_s[d], p.window[d], p.phase_s[d] = each.length_s, float(each.window), each.phase_s
        p.burst_ratio[d] = 1.0
        p.settles[d] = float(each.settles or each.at_answer)
        p.refunds[d] = float(policy.refund_throttled and each.per_request == 0.0)
        p.cause[d] = float(BY_DAY if each.length_s > 3_600.0 else BY_RPM if each.per_request > 0.0 else BY_TPM)
    p.budget = [budget_of(n, policy.tpm_headroom) for n in p.limit]
    p.rate_per_s = [rate_of(n, policy.tpm_headroom, s) for n, s in zip(p.limit, p.length_s, strict=True)]
    p.held, p.largest = p.budget.copy(), [n or math.inf for n in p.limit]
    p.shared = p.held.copy()
    return p


def _of_guardrails(policy: Policy) -> Params:
    """Return the numbers over the guardrails' four dimensions."""
    limit = _each(policy.tpm_limit, policy.rpm_limit, policy.tpd_limit, policy.rpd_limit)
    length_s = _each(MINUTE_S, MINUTE_S, DAY_S, DAY_S, rest=MINUTE_S)
    window = _WINDOWS[policy.tpm_window]
    burst_ratio = policy.burst_seconds / MINUTE_S if policy.tpm_window == "bucket" else 1.0
    bursts = _each(burst_ratio, burst_ratio, rest=1.0)
    budget = [budget_of(n, policy.tpm_headroom) for n in limit]
    return Params(
        max_concurrency=policy.max_concurrency,
        stagger_s=policy.stagger_seconds,
        jitter_ratio=policy.jitter_ratio,
        jitter_cap_s=policy.jitter_cap_seconds,
        interactive_ratio=policy.interactive_reserve,
        longest_first=int(policy.launch_order == "longest_first"),
        max_attempts=policy.retry_max_attempts,
        backoff_base_s=policy.backoff_base_seconds,
        backoff_cap_s=policy.backoff_cap_seconds,
        retry_after_cap_s=policy.retry_after_cap_seconds,
        backoff_keeps_permit=int(policy.backoff_keeps_permit),
        hold_on_throttle=int(policy.hold_on_throttle),
        sync_headers=int(policy.sync_headers),
        finalize_lowers=int(policy.finalize_lowers_concurrency),
        finalize_max_concurrency=policy.finalize_max_concurrency,
        timeout_s=policy.request_timeout_seconds,
        deadline_s=policy.deadline_seconds,
        seeks=0,
        dimensions=4,
        limit=limit,
        budget=budget,
        rate_per_s=[rate_of(n, policy.tpm_headroom, s) for n, s in zip(limit, length_s, strict=True)],
        length_s=length_s,
        window=_each(window, window, BUCKET, BUCKET),
        phase_s=_each(),
        burst_ratio=bursts,
        held=list(map(burst_of, budget, bursts)),
        shared=list(map(burst_of, budget, bursts)),
        sought=_each(),
        largest=list(map(burst_of, [n or math.inf for n in limit], bursts)),
        settles=_each(policy.settle, 0, policy.settle, 0),
        refunds=_each(policy.refund_throttled, 0, policy.refund_throttled, 0),
        cause=_each(BY_TPM, BY_RPM, BY_DAY, BY_DAY),
    )


def _each(*values: float, rest: float = 0.0) -> list[float]:
    """Return an array with these values for the first dimensions, and `rest` for all others."""
    return [*map(float, values), *[rest] * (DIMENSIONS - len(values))]

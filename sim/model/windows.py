"""The windows over which the synthetic provider's limits count, as plain functions over numbers.

Each is a textbook algorithm. BUCKET: `used` drains at the limit per window length; its capacity is the whole limit, or
`burst_ratio` of it (GCRA with that burst). CLOCK: a counter emptied when a minute of the clock begins; the run begins
`phase_s` into one. ANCHORED: a counter emptied a minute after the attempt that found it expired (Redis' INCR with
EXPIRE). SLIDING: a log of what was taken, each entry counted for a minute. Daily limits are always buckets.

Compiled as it stands, like `provider`, whose `ProviderParams` and `ProviderState` are `pp` and `ps` here.
"""

import math
from typing import Any

# Dimensions, as in the law.
TPM = 0
RPM = 1
TPD = 2
RPD = 3

# Windows of the limits per minute.
BUCKET = 0
CLOCK = 1
ANCHORED = 2
SLIDING = 3

MINUTE_S = 60.0
DAY_S = 86400.0
# Allowance for rounding in sums of drained amounts, far below one token, so that a governor that mirrors the bucket
# exactly is not refused.
ROUNDING = 1e-6

# Entries of the sliding log. Up to half of them are exact; a fuller log rounds times up to whole grains, so that it
# never overflows.
LOG = 1024
GRAIN_S = MINUTE_S / (LOG // 2 - 2)


def limit_now(pp: Any, ps: Any, d: int) -> float:
    """Return the limit of dimension `d` in force at the last advance; daily limits do not change."""
    return pp.limit[d] * ps.factor if d <= RPM else pp.limit[d]


def capacity_of(pp: Any, d: int, limit: float) -> float:
    """Return a window's capacity under that limit; a bucket with a smaller burst still holds at least one request."""
    return max(1.0, limit * pp.burst_ratio) if pp.burst_ratio < 1.0 and d <= RPM else limit


def drained(pp: Any, ps: Any, to: float) -> None:
    """Drain buckets until `to`, and empty counters whose minute is over."""
    passed = to - ps.at
    if passed <= 0.0:
        return
    for d in range(4):
        used = ps.used[d]
        if used > 0.0 and (d >= TPD or pp.window == BUCKET):
            if d >= TPD:
                used -= passed * pp.limit[d] / DAY_S
            else:
                used -= passed * pp.limit[d] * ps.factor / MINUTE_S
            ps.used[d] = used if used > 0.0 else 0.0
    if pp.window == SLIDING:
        _expire(ps, to)
    elif pp.window == ANCHORED:
        if to >= ps.window_until:
            ps.used[TPM] = ps.used[RPM] = 0.0
    elif pp.window == CLOCK and _minute(pp, to) > _minute(pp, ps.at):
        ps.used[TPM] = ps.used[RPM] = 0.0
    if pp.slice_s > 0.0:
        ps.slice_requests = max(0.0, ps.slice_requests - passed * limit_now(pp, ps, RPM) / MINUTE_S)
        ps.slice_used_tokens = max(0.0, ps.slice_used_tokens - passed * limit_now(pp, ps, TPM) / MINUTE_S)
    ps.at = to


def _minute(pp: Any, at: float) -> float:
    return math.floor((at + pp.phase_s) / MINUTE_S)


def opened(pp: Any, ps: Any) -> None:
    """Open an anchored window for an attempt at the last advance if none is open."""
    if pp.window == ANCHORED and ps.at >= ps.window_until:
        ps.window_until = ps.at + MINUTE_S


def empty_at(pp: Any, ps: Any, d: int) -> float:
    """Return when a minute counter will be empty if nothing is added; not for buckets."""
    if pp.window == CLOCK:
        return (_minute(pp, ps.at) + 1.0) * MINUTE_S - pp.phase_s
    if pp.window == ANCHORED:
        return max(ps.at, ps.window_until)
    return _room_at(ps, d, math.inf)


def room_in_ms(pp: Any, ps: Any, d: int, excess: float, limit: float) -> float:
    """Return the time until `excess` of dimension `d` has drained, in milliseconds.

    The order of multiplication matters: rounded this way and then floored, the result equals the printed wait of all
    quoted log messages except the free tier's. Computed through seconds, "Limit 30000, Used 29937, Requested 385" gives
    643 for a printed 644.
    """
    if d >= TPD:
        return excess / limit * (DAY_S * 1000.0)
    if pp.window == BUCKET:
        return excess / limit * (MINUTE_S * 1000.0)
    at = _room_at(ps, d, excess) if pp.window == SLIDING else empty_at(pp, ps, d)
    return (at - ps.at) * 1000.0


def taken(pp: Any, ps: Any, tokens: float, requests: float, is_capped: bool) -> None:
    """Book amounts in every limit at the last advance; negative amounts are returned, as far as there are any.

    `is_capped`: no window is filled beyond its capacity; one that is already fuller keeps its level.
    """
    tokens_before, requests_before = ps.used[TPM], ps.used[RPM]
    for d in range(4):
        if pp.limit[d] > 0.0 and (d >= TPD or ps.factor > 0.0):
            amount = tokens if d & 1 == 0 else requests
            used = ps.used[d] + amount
            if is_capped and amount > 0.0:
                used = min(used, max(ps.used[d], capacity_of(pp, d, limit_now(pp, ps, d))))
            ps.used[d] = used if used > 0.0 else 0.0
    if pp.window == SLIDING:
        logged(ps, ps.used[TPM] - tokens_before, ps.used[RPM] - requests_before)


# ---------------------------------------------------------------- the sliding log


def logged(ps: Any, tokens: float, requests: float) -> None:
    """Add the amounts booked at the last advance to the log. Returned amounts are removed from the newest entries."""
    i = ps.log_size
    while tokens < 0.0 and i > 0:
        i -= 1
        place = (ps.log_first + i) % LOG
        back = min(ps.log_tokens[place], -tokens)
        ps.log_tokens[place] -= back
        tokens += back
    if tokens <= 0.0 and requests == 0.0:
        return
    at = ps.at
    if ps.log_size >= LOG // 2:
        at = GRAIN_S * math.ceil(at / GRAIN_S)
    place = (ps.log_first + ps.log_size - 1) % LOG
    if ps.log_size == 0 or ps.log_at[place] < at:
        ps.log_size += 1
        place = (place + 1) % LOG
        ps.log_at[place] = at
        ps.log_tokens[place] = ps.log_requests[place] = 0.0
    ps.log_tokens[place] += max(0.0, tokens)
    ps.log_requests[place] += requests


def _expire(ps: Any, to: float) -> None:
    """Drop entries that are a minute old."""
    while ps.log_size > 0 and ps.log_at[ps.log_first] + MINUTE_S <= to:
        ps.used[TPM] = max(0.0, ps.used[TPM] - ps.log_tokens[ps.log_first])
        ps.used[RPM] = max(0.0, ps.used[RPM] - ps.log_requests[ps.log_first])
        ps.log_first = (ps.log_first + 1) % LOG
        ps.log_size -= 1
    if ps.log_size == 0:
        ps.used[TPM] = ps.used[RPM] = 0.0


def _room_at(ps: Any, d: int, excess: float) -> float:
    """Return when the oldest entries that make up `excess` will have expired; all entries, if they sum to less."""
    at, gone, i = ps.at, 0.0, 0
    while i < ps.log_size and gone < excess - ROUNDING:
        place = (ps.log_first + i) % LOG
        gone += ps.log_tokens[place] if d == TPM else ps.log_requests[place]
        at = ps.log_at[place] + MINUTE_S
        i += 1
    return at

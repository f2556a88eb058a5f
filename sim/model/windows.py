"""The windows over which the synthetic provider's limits count, as plain functions over numbers.

Each is a textbook algorithm. BUCKET: `used` drains at the limit per window length; its capacity is the whole limit, or
`burst_ratio` of it (GCRA with that burst). CLOCK: a counter emptied when a minute (or a day) of the clock begins; the
run begins `phase_s` into one. ANCHORED: a counter emptied a window's length after the attempt that found it expired
(Redis' INCR with EXPIRE). SLIDING: a log of what was taken, each entry counted for a minute.

Compiled as it stands, like `provider`, whose `ProviderParams` and `ProviderState` are `pp` and `ps` here.
"""

import math
from typing import Any

# Dimensions, as in the law.
DIMENSIONS = 8
TPM = 0
RPM = 1
TPD = 2
RPD = 3

# Kinds of window.
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
_GRAINS = LOG // 2 - 2

# Dimensions in which an amount is booked: all, those charged at admission, those charged at the answer.
ALL = 0
ADMISSION = 1
ANSWER = 2


def limit_now(pp: Any, ps: Any, d: int) -> float:
    """Return the limit of dimension `d` in force at the last advance; limits of more than a minute do not change."""
    return pp.limit[d] * ps.factor if pp.length_s[d] <= MINUTE_S else pp.limit[d]


def capacity_of(pp: Any, d: int, limit: float) -> float:
    """Return a window's capacity under that limit; a bucket with a smaller burst still holds at least one request."""
    return max(1.0, limit * pp.burst_ratio[d]) if pp.burst_ratio[d] < 1.0 else limit


def amount_of(pp: Any, d: int, tokens: float, prompt: float) -> float:
    """Return what so many tokens, of which at most `prompt` are input, take of dimension `d`, without the request."""
    into = prompt if prompt < tokens else tokens
    return float(pp.per_input[d] * into + pp.per_output[d] * (tokens - into))


def drained(pp: Any, ps: Any, to: float) -> None:
    """Drain buckets until `to`, and empty counters whose minute is over."""
    passed = to - ps.at
    if passed <= 0.0:
        return
    slides = False
    for d in range(pp.dimensions):
        used = ps.used[d]
        if pp.window[d] == BUCKET:
            if used > 0.0:
                gone = passed * pp.limit[d]
                if pp.length_s[d] <= MINUTE_S:
                    gone *= ps.factor
                used -= gone / pp.length_s[d]
                ps.used[d] = used if used > 0.0 else 0.0
        elif pp.window[d] == SLIDING:
            slides = True
        elif pp.window[d] == ANCHORED:
            if to >= ps.window_until[d]:
                ps.used[d] = 0.0
        elif _window(pp, d, to) > _window(pp, d, ps.at):
            ps.used[d] = 0.0
    if slides:
        _expire(pp, ps, to)
    if pp.slice_s > 0.0:
        ps.slice_requests = max(0.0, ps.slice_requests - passed * limit_now(pp, ps, RPM) / MINUTE_S)
        ps.slice_used_tokens = max(0.0, ps.slice_used_tokens - passed * limit_now(pp, ps, TPM) / MINUTE_S)
    ps.at = to


def _window(pp: Any, d: int, at: float) -> float:
    """Return the number of the clock's minute or day at that moment."""
    return math.floor((at + pp.phase_s[d]) / pp.length_s[d])


def opened(pp: Any, ps: Any) -> None:
    """Open an anchored window for an attempt at the last advance if none is open."""
    for d in range(pp.dimensions):
        if pp.window[d] == ANCHORED and ps.at >= ps.window_until[d]:
            ps.window_until[d] = ps.at + pp.length_s[d]


def empty_at(pp: Any, ps: Any, d: int) -> float:
    """Return when a counter will be empty if nothing is added; not for buckets."""
    if pp.window[d] == CLOCK:
        return float((_window(pp, d, ps.at) + 1.0) * pp.length_s[d] - pp.phase_s[d])
    if pp.window[d] == ANCHORED:
        return float(max(ps.at, ps.window_until[d]))
    return _room_at(pp, ps, d, math.inf)


def room_in_ms(pp: Any, ps: Any, d: int, excess: float, limit: float) -> float:
    """Return the time until `excess` of dimension `d` has drained, in milliseconds.

    The order of multiplication matters: rounded this way and then floored, the result equals the printed wait of all
    quoted log messages except the free tier's. Computed through seconds, "Limit 30000, Used 29937, Requested 385" gives
    643 for a printed 644.
    """
    if pp.window[d] == BUCKET:
        return excess / limit * (pp.length_s[d] * 1000.0)
    at = _room_at(pp, ps, d, excess) if pp.window[d] == SLIDING else empty_at(pp, ps, d)
    return (at - ps.at) * 1000.0


def taken(
    pp: Any,
    ps: Any,
    tokens: float,
    requests: float,
    is_capped: bool,
    prompt: float = 0.0,
    less: float = 0.0,
    which: int = ALL,
) -> None:
    """Book tokens and requests in these limits at the last advance, less tokens booked before.

    Negative amounts are returned, as far as there are any. `prompt`: the input among the tokens. `is_capped`: no window
    is filled beyond its capacity; one that is already fuller keeps its level.
    """
    for d in range(pp.dimensions):
        is_open = pp.limit[d] > 0.0 and (ps.factor > 0.0 or pp.length_s[d] > MINUTE_S)
        if is_open and (which == ALL or (pp.at_answer[d] > 0.0) == (which == ANSWER)):
            before = ps.used[d]
            amount = pp.per_request[d] * requests + amount_of(pp, d, tokens, prompt)
            if less > 0.0:
                amount -= amount_of(pp, d, less, prompt)
            used = before + amount
            if is_capped and amount > 0.0:
                used = min(used, max(before, capacity_of(pp, d, limit_now(pp, ps, d))))
            ps.used[d] = used if used > 0.0 else 0.0
            if pp.window[d] == SLIDING:
                logged(pp, ps, d, ps.used[d] - before)


# ---------------------------------------------------------------- the sliding log


def _log_s(pp: Any) -> float:
    """Return how long an entry of the log counts: the length of the sliding windows, which is the same for all."""
    length_s = MINUTE_S
    for d in range(pp.dimensions):
        if pp.window[d] == SLIDING:
            length_s = pp.length_s[d]
    return length_s


def logged(pp: Any, ps: Any, d: int, amount: float) -> None:
    """Add the amount booked at the last advance to the log. A returned one is removed from the newest entries."""
    i = ps.log_size
    while amount < 0.0 and i > 0:
        i -= 1
        place = d * LOG + (ps.log_first + i) % LOG
        back = min(ps.log_used[place], -amount)
        ps.log_used[place] -= back
        amount += back
    if amount <= 0.0:
        return
    at = ps.at
    if ps.log_size >= LOG // 2:
        grain_s = _log_s(pp) / _GRAINS
        at = grain_s * math.ceil(at / grain_s)
    place = (ps.log_first + ps.log_size - 1) % LOG
    if ps.log_size == 0 or ps.log_at[place] < at:
        ps.log_size += 1
        place = (place + 1) % LOG
        ps.log_at[place] = at
        for each in range(DIMENSIONS):
            ps.log_used[each * LOG + place] = 0.0
    ps.log_used[d * LOG + place] += amount


def _expire(pp: Any, ps: Any, to: float) -> None:
    """Drop entries that no longer count."""
    length_s = _log_s(pp)
    while ps.log_size > 0 and ps.log_at[ps.log_first] + length_s <= to:
        for d in range(pp.dimensions):
            if pp.window[d] == SLIDING:
                ps.used[d] = max(0.0, ps.used[d] - ps.log_used[d * LOG + ps.log_first])
        ps.log_first = (ps.log_first + 1) % LOG
        ps.log_size -= 1
    if ps.log_size == 0:
        for d in range(pp.dimensions):
            if pp.window[d] == SLIDING:
                ps.used[d] = 0.0


def _room_at(pp: Any, ps: Any, d: int, excess: float) -> float:
    """Return when the oldest entries that make up `excess` will have expired; all entries, if they sum to less."""
    at, gone, i = ps.at, 0.0, 0
    while i < ps.log_size and gone < excess - ROUNDING:
        place = (ps.log_first + i) % LOG
        gone += ps.log_used[d * LOG + place]
        at = ps.log_at[place] + _log_s(pp)
        i += 1
    return at

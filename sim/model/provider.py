"""The synthetic provider, sans I/O: limiter, faults and latency as plain functions over numbers.

It takes OpenAI's place: `answered` takes one attempt at `now` and returns the outcome, when it arrives, and what the
rate-limit headers would state. The SimPy driver, the compiled engine and the HTTP server all call this code, so it
keeps the law's rules for compiling (numbers and fixed-size arrays, `math` only, chance and time passed in).

Theory of operation (docs/explanation/provider.md#buckets). Each dimension is a continuous bucket, or another window of
`windows`: an attempt is admitted iff used + requested <= limit in every dimension, the charge is taken at admission,
and a refusal states how long it takes until it would fit, floored to milliseconds; of a bucket, that is
(used + requested - limit) / limit * length. A charge above the limit never succeeds. Behaviour of the
real provider that is not established is a knob: settling, charges booked after the answer, counted refusals, slices,
windows, the ramp.

A co-tenant acts in ticks of one second: it takes its share of the limit, continuously or in bursts at keyed moments, as
far as there is room. A limit change keeps what is used; any excess over the new limit must drain first.
"""

import math
from dataclasses import dataclass, field

from governor.model.keyed import COTENANT, FAULT, FINALIZE_TEXT, keyed_uniform
from sim.model.latency import NOISE_GROUPS, NOISE_KNOTS, latency_s
from sim.model.windows import (
    ADMISSION,
    ANSWER,
    DAY_S,
    DIMENSIONS,
    LOG,
    MINUTE_S,
    ROUNDING,
    SLIDING,
    capacity_of,
    drained,
    logged,
    opened,
    room_in_ms,
    taken,
)
from sim.model.windows import RPD as RPD
from sim.model.windows import RPM as RPM
from sim.model.windows import TPD as TPD
from sim.model.windows import TPM as TPM
from sim.model.windows import amount_of as amount_of
from sim.model.windows import limit_now as limit_now

# Outcomes of an attempt.
OK = 0
THROTTLED = 1
QUOTA = 2
TOO_LARGE = 3
SLOW_DOWN = 4
SERVER_ERROR = 5
DROPPED = 6

# How a refusal states the wait.
SAYS_NOTHING = 0
SAYS_MILLISECONDS = 1  # "Please try again in 644ms": the wait, floored to ms
SAYS_SECONDS = 2  # Retry-After: whole seconds, rounded up
SAYS_CONSTANT = 3  # Retry-After: the same on every refusal
SAYS_OLDEST = 4  # Retry-After: seconds until a sliding log's oldest entry expires, which need not be enough

# What a refusal counts against, as a sum of flags.
REFUSAL_TOKENS = 1
REFUSAL_REQUESTS = 2

# Which answers state counts in their headers, and for which moment.
COUNTS_NONE = 0
COUNTS_AT_ADMISSION = 1
COUNTS_AT_ANSWER = 2  # as from middleware that adds headers to the outgoing answer
COUNTS_ON_REFUSALS = 3

RAMP_WINDOW_S = 900.0
RAMP_GROWTH = 1.5
_TICK_S = 1.0
CHANGES = 8
OUTAGES = 4
# Kinds of outage: connections drop, every request gets a 5xx, or no request is answered.
DROPS = 0
ERRORS = 1
HANGS = 2
# Time of an answer that never comes: beyond any time-out.
NEVER_S = 1e9


def _none() -> list[float]:
    return [0.0] * DIMENSIONS


def _ones() -> list[float]:
    return [1.0] * DIMENSIONS


def _of_openai(tokens: float, requests: float) -> list[float]:
    return [tokens, requests, tokens, requests] + [0.0] * (DIMENSIONS - 4)


@dataclass(slots=True)
class ProviderParams:
    """One provider quota as numbers. Times are in seconds; 0 = no such limit, fault or behaviour.

    Arrays have one entry per dimension, of which the first `dimensions` are in use: TPM, RPM, TPD and RPD unless a
    profile says otherwise. `length_s`, `window`, `phase_s`, `burst_ratio`: how each limit is counted, see `windows`.
    `per_request`, `per_input`, `per_output`: what a request and its tokens take of each. `header`: the number of the
    header that states the dimension, 0 = none; of several dimensions with one header, the tightest is stated.
    `slice_s`: requests are also limited to their share of that time (1 = per second), and
    tokens to `slice_tokens` per slice.
    `at_answer`: dimensions of which admission takes nothing and only checks that some is left; real use is booked when
    the answer leaves. `failed_count`: what a refusal counts against. `retry_after_s`: the constant stated wait;
    `retry_after_min_s`: the shortest.
    `ramp_tpm`: above it, tokens per minute may grow by half per 15 minutes (`slow_down`). `change_at`, `change_factor`:
    from that moment the minute limits are the original ones times that factor (inf = unused). `cotenant_share` of the
    limit is used by others; in bursts of `cotenant_burst_s` once per `cotenant_period_s` if that is > 0.
    `quota_requests`: number of admitted requests after which the credit is exhausted. Latency of an answer:
    (first_token_s + per_token_s * output) times a log-normal factor of that sigma, and with probability `stall_ratio` a
    stall of `stall_min_s` to `stall_max_s` more. If `noise_from` is set, the factor has a measured shape instead:
    `noise` holds its logarithms at NOISE_KNOTS normal scores from -NOISE_REACH to NOISE_REACH, for each group of
    answers in turn; `noise_from` holds the groups' smallest token counts. From `outage_at` to `outage_until` (inf =
    unused) the provider is out, in that `outage_kind`. `refusal_s`: time until a refusal arrives. `empty_cut_ratio`:
    chance that a cut answer has no usable text. `counts`: which answers state what remains. The stated count is the
    share `counts_share` of it (for headers that describe a slice of the limit), rounded to the nearest multiple of
    `counts_rounded_to`, and below zero only with `counts_negative`.
    """

    dimensions: int = 4
    limit: list[float] = field(default_factory=_none)
    length_s: list[float] = field(default_factory=lambda: [MINUTE_S, MINUTE_S, DAY_S, DAY_S] + [MINUTE_S] * 4)
    window: list[float] = field(default_factory=_none)
    phase_s: list[float] = field(default_factory=_none)
    burst_ratio: list[float] = field(default_factory=_ones)
    per_request: list[float] = field(default_factory=lambda: _of_openai(0.0, 1.0))
    per_input: list[float] = field(default_factory=lambda: _of_openai(1.0, 0.0))
    per_output: list[float] = field(default_factory=lambda: _of_openai(1.0, 0.0))
    header: list[float] = field(default_factory=lambda: [1.0, 2.0, 0.0, 2.0] + [0.0] * 4)
    slice_s: float = 0.0
    slice_tokens: float = 0.0
    settles: int = 0
    at_answer: list[float] = field(default_factory=_none)
    failed_count: int = 0
    retry_after: int = SAYS_MILLISECONDS
    retry_after_s: float = 0.0
    retry_after_min_s: float = 0.0
    ramp_tpm: float = 0.0
    change_at: list[float] = field(default_factory=lambda: [math.inf] * CHANGES)
    change_factor: list[float] = field(default_factory=lambda: [1.0] * CHANGES)
    cotenant_share: float = 0.0
    cotenant_burst_s: float = 0.0
    cotenant_period_s: float = 0.0
    quota_requests: float = 0.0
    first_token_s: float = 0.6
    per_token_s: float = 0.008
    sigma: float = 0.0
    stall_ratio: float = 0.0
    stall_min_s: float = 10.0
    stall_max_s: float = 60.0
    noise: list[float] = field(default_factory=lambda: [0.0] * (NOISE_GROUPS * NOISE_KNOTS))
    noise_from: list[float] = field(default_factory=lambda: [math.inf] * NOISE_GROUPS)
    error_ratio: float = 0.0
    drop_ratio: float = 0.0
    hang_ratio: float = 0.0
    outage_at: list[float] = field(default_factory=lambda: [math.inf] * OUTAGES)
    outage_until: list[float] = field(default_factory=lambda: [math.inf] * OUTAGES)
    outage_kind: list[float] = field(default_factory=lambda: [0.0] * OUTAGES)
    refusal_s: float = 0.05
    empty_cut_ratio: float = 0.5
    counts: int = COUNTS_AT_ADMISSION
    counts_share: float = 1.0
    counts_rounded_to: float = 1.0
    counts_negative: int = 0


@dataclass(slots=True)
class ProviderState:
    """The provider's state: `used` per dimension as of `at`, slices, the ramp, the co-tenant's next tick.

    `window_until`: the end of each anchored window. `log_*`: the sliding log, a ring of `log_size` entries from
    `log_first` on. These fields come last so that a run that begins with an empty log need not write them.
    """

    at: float = 0.0
    used: list[float] = field(default_factory=_none)
    factor: float = 1.0
    next_change: int = 0
    tick: int = 0
    slice_requests: float = 0.0
    slice_used_tokens: float = 0.0
    ramp_minute: float = 0.0
    ramp_tokens: float = 0.0
    ramp_window: float = 0.0
    ramp_peak: float = 0.0
    ramp_peak_before: float = 0.0
    admitted: float = 0.0
    throttled: float = 0.0
    window_until: list[float] = field(default_factory=lambda: [-math.inf] * DIMENSIONS)
    log_first: int = 0
    log_size: int = 0
    log_at: list[float] = field(default_factory=lambda: [0.0] * LOG)
    log_used: list[float] = field(default_factory=lambda: [0.0] * (DIMENSIONS * LOG))


def day_started(ps: ProviderState, tokens_used: float, requests_used: float) -> None:
    """Start the daily buckets with the amounts already used."""
    ps.used[TPD] = tokens_used
    ps.used[RPD] = requests_used


def _drained_over_changes(pp: ProviderParams, ps: ProviderState, to: float) -> None:
    while ps.next_change < CHANGES and pp.change_at[ps.next_change] <= to:
        drained(pp, ps, pp.change_at[ps.next_change])
        ps.factor = pp.change_factor[ps.next_change]
        ps.next_change += 1
    drained(pp, ps, to)


def _others_ask(pp: ProviderParams, seed: int, tick: int) -> tuple[float, int]:
    """Return the share of the limit that others request in this tick, and the next tick in which they may request any.

    A burst requests its whole period's share at once.
    """
    if pp.cotenant_period_s <= 0.0:
        return pp.cotenant_share, tick + 1
    period = math.floor(tick * _TICK_S / pp.cotenant_period_s)
    begins_s = keyed_uniform(seed, int(period), 0, COTENANT) * (pp.cotenant_period_s - pp.cotenant_burst_s)
    into_s = tick * _TICK_S - period * pp.cotenant_period_s
    if into_s < begins_s:
        return 0.0, max(tick + 1, math.floor((period * pp.cotenant_period_s + begins_s) / _TICK_S))
    if into_s < begins_s + pp.cotenant_burst_s:
        return pp.cotenant_share * pp.cotenant_period_s / pp.cotenant_burst_s, tick + 1
    return 0.0, max(tick + 1, math.floor((period + 1) * pp.cotenant_period_s / _TICK_S))


def taken_by_others(pp: ProviderParams, ps: ProviderState, d: int, amount: float) -> None:
    """Book `amount` of a limit per minute as used by others, as far as there is room."""
    limit, used = limit_now(pp, ps, d), ps.used[d]
    if limit > 0.0:
        opened(pp, ps)
        ps.used[d] = max(used, min(limit, used + amount))
        if pp.window[d] == SLIDING:
            logged(pp, ps, d, ps.used[d] - used)


def advanced(pp: ProviderParams, ps: ProviderState, seed: int, now: float) -> None:
    """Advance the provider to `now`: limit changes, co-tenant use and draining, in order of time."""
    if pp.cotenant_share > 0.0:
        while ps.tick * _TICK_S <= now:
            tick = ps.tick
            rate, ps.tick = _others_ask(pp, seed, tick)
            if rate > 0.0:
                _drained_over_changes(pp, ps, tick * _TICK_S)
                for d in range(pp.dimensions):
                    if pp.length_s[d] <= MINUTE_S:
                        taken_by_others(pp, ps, d, rate * limit_now(pp, ps, d) * _TICK_S / pp.length_s[d])
    if pp.change_at[min(ps.next_change, CHANGES - 1)] <= now:
        _drained_over_changes(pp, ps, now)
    else:
        drained(pp, ps, now)


def _slice_wait_ms(pp: ProviderParams, ps: ProviderState, d: int, requested: float) -> float:
    """Return the wait in milliseconds for this slice's share (`slice_s` of the minute's limit).

    -1 = fits or not sliced.
    """
    limit = limit_now(pp, ps, d)
    if limit <= 0.0 or d >= TPD:
        return -1.0
    if d == RPM:
        capacity = max(1.0, limit * pp.slice_s / MINUTE_S)
        excess = ps.slice_requests + requested - capacity
    else:
        if pp.slice_tokens <= 0.0:
            return -1.0
        capacity = max(pp.slice_tokens, limit * pp.slice_s / MINUTE_S)
        excess = ps.slice_used_tokens + min(requested, capacity) - capacity
    return -1.0 if excess <= ROUNDING else excess / limit * (MINUTE_S * 1000.0)


def _ramp_refuses(pp: ProviderParams, ps: ProviderState, charge: float, now: float) -> bool:
    """Return whether usage ramps too fast: above `ramp_tpm` and by more than half over the last quarter hour's peak."""
    minute = math.floor(now / MINUTE_S)
    if minute > ps.ramp_minute:
        ps.ramp_peak = max(ps.ramp_peak, ps.ramp_tokens)
        ps.ramp_tokens = 0.0
        ps.ramp_minute = minute
    window = math.floor(now / RAMP_WINDOW_S)
    if window > ps.ramp_window:
        ps.ramp_peak_before = ps.ramp_peak if window == ps.ramp_window + 1.0 else 0.0
        ps.ramp_peak = 0.0
        ps.ramp_window = window
    return ps.ramp_tokens + charge > max(pp.ramp_tpm, RAMP_GROWTH * ps.ramp_peak_before)


def _booked(pp: ProviderParams, ps: ProviderState, charge: float, prompt: float) -> None:
    """Book the charge and the request in every window."""
    taken(pp, ps, charge, 1.0, False, prompt, 0.0, ADMISSION)
    if pp.slice_s > 0.0:
        ps.slice_requests += 1.0
        ps.slice_used_tokens += 0.0 if pp.at_answer[TPM] else charge


def admitted(
    pp: ProviderParams, ps: ProviderState, seed: int, charge: float, now: float, prompt: float = 0.0
) -> tuple[int, int, float]:
    """Decide one attempt at the door and book it if it is admitted; return (outcome, dimension, wait in milliseconds).

    `charge`: tokens, of which `prompt` are input, which matters where these have a limit of their own. Outcome OK,
    THROTTLED, TOO_LARGE, SLOW_DOWN or QUOTA. The dimension and the wait are those of the limit that takes longest, or
    of the requests' limit where it is checked first; the wait is -1 if waiting does not help or is of unknown length.
    """
    advanced(pp, ps, seed, now)
    if 0.0 < pp.quota_requests <= ps.admitted:
        return QUOTA, -1, -1.0
    opened(pp, ps)
    tightest = -1
    wait_ms = -1.0
    requests_d = -1
    requests_wait_ms = -1.0
    for d in range(pp.dimensions):
        if pp.limit[d] > 0.0:
            limit = limit_now(pp, ps, d)
            # A charge that is not known yet only requires that something is left.
            asked = 1.0 if pp.at_answer[d] else charge
            requested = pp.per_request[d] + amount_of(pp, d, asked, prompt)
            capacity = capacity_of(pp, d, limit)
            if requested > capacity and pp.per_request[d] == 0.0:
                return TOO_LARGE, d, -1.0
            excess = ps.used[d] + requested - capacity
            if excess > ROUNDING:
                needed = 1.0 if pp.retry_after == SAYS_OLDEST and pp.window[d] == SLIDING else excess
                w = room_in_ms(pp, ps, d, min(excess, needed), limit)
                if requests_d < 0 and pp.per_request[d] > 0.0 and pp.length_s[d] <= MINUTE_S:
                    requests_d = d
                    requests_wait_ms = w
                if w > wait_ms:
                    wait_ms = w
                    tightest = d
            if pp.slice_s > 0.0:
                w = _slice_wait_ms(pp, ps, d, requested)
                if w > wait_ms:
                    wait_ms = w
                    tightest = d
    if tightest >= 0:
        ps.throttled += 1.0
        if pp.failed_count == REFUSAL_REQUESTS and requests_d >= 0:
            # Requests are checked before tokens: these were not looked at, and nothing was booked.
            return THROTTLED, requests_d, requests_wait_ms
        if pp.failed_count:
            tokens = charge if pp.failed_count & REFUSAL_TOKENS else 0.0
            taken(pp, ps, tokens, 1.0 if pp.failed_count & REFUSAL_REQUESTS else 0.0, True, prompt, 0.0, ADMISSION)
        return THROTTLED, tightest, wait_ms
    if pp.ramp_tpm > 0.0:
        if _ramp_refuses(pp, ps, charge, now):
            ps.throttled += 1.0
            return SLOW_DOWN, TPM, -1.0
        ps.ramp_tokens += charge
    ps.admitted += 1.0
    _booked(pp, ps, charge, prompt)
    return OK, -1, -1.0


def stated_wait_s(pp: ProviderParams, wait_ms: float) -> float:
    """Return the wait that a refusal states, in seconds; -1 = it states none."""
    if wait_ms < 0.0 or pp.retry_after == SAYS_NOTHING:
        return -1.0
    if pp.retry_after == SAYS_CONSTANT:
        return pp.retry_after_s
    if pp.retry_after == SAYS_SECONDS or pp.retry_after == SAYS_OLDEST:
        return max(pp.retry_after_min_s, math.ceil(wait_ms / 1000.0))
    return max(pp.retry_after_min_s, math.floor(wait_ms) / 1000.0)


def settled(
    pp: ProviderParams, ps: ProviderState, seed: int, charge: float, used: float, now: float, prompt: float = 0.0
) -> None:
    """Book an attempt's real use when its answer is complete, if the provider settles; never beyond its limit.

    A limit that is charged at the answer books the use regardless of what is left.
    """
    is_late = False
    for d in range(pp.dimensions):
        is_late = is_late or pp.at_answer[d] > 0.0
    if is_late or pp.settles:
        advanced(pp, ps, seed, now)
    if is_late:
        taken(pp, ps, used, 0.0, False, prompt, 0.0, ANSWER)
    if pp.settles:
        taken(pp, ps, used, 0.0, True, prompt, charge, ADMISSION)


def answered(
    pp: ProviderParams,
    ps: ProviderState,
    seed: int,
    request: int,
    attempt: int,
    charge: float,
    output_tokens: float,
    recorded_s: float,
    now: float,
    drawn_s: float = -1.0,
    prompt: float = 0.0,
) -> tuple[int, float, int, float]:
    """Process one attempt; return (outcome, seconds until its answer, dimension, stated wait or -1).

    `attempt` is the key of the attempt (unique over lanes), `output_tokens` the answer's length after its cap,
    `drawn_s` its `latency_s` if the caller has drawn it ahead.
    A fault strikes after admission: the charge is taken, and a 5xx arrives at the time of the first token. In an outage
    nothing is admitted, and attempts in flight when it begins die at that moment.
    """
    outage = 0
    while pp.outage_until[outage] <= now and outage < OUTAGES - 1:
        outage += 1
    at = pp.outage_at[outage]
    if at <= now < pp.outage_until[outage]:
        return _died(pp, outage, pp.refusal_s)
    outcome, service_s, dimension, wait_s = _served(
        pp, ps, seed, request, attempt, charge, output_tokens, recorded_s, now, drawn_s, prompt
    )
    if now + service_s > at:
        return _died(pp, outage, at - now)
    return outcome, service_s, dimension, wait_s


def _died(pp: ProviderParams, outage: int, after_s: float) -> tuple[int, float, int, float]:
    """Return the outcome of an attempt that this outage strikes `after_s` seconds after its launch, as `answered`."""
    kind = pp.outage_kind[outage]
    if kind == ERRORS:
        return SERVER_ERROR, after_s, -1, -1.0
    return DROPPED, NEVER_S if kind == HANGS else after_s, -1, -1.0


def _served(
    pp: ProviderParams,
    ps: ProviderState,
    seed: int,
    request: int,
    attempt: int,
    charge: float,
    output_tokens: float,
    recorded_s: float,
    now: float,
    drawn_s: float,
    prompt: float,
) -> tuple[int, float, int, float]:
    """Process one attempt as `answered` does, outside any outage."""
    outcome, dimension, wait_ms = admitted(pp, ps, seed, charge, now, prompt)
    if outcome != OK:
        return outcome, pp.refusal_s, dimension, stated_wait_s(pp, wait_ms)
    service_s = drawn_s
    if drawn_s < 0.0:
        service_s = latency_s(pp, seed, request, attempt, output_tokens, recorded_s)
    if pp.error_ratio > 0.0 or pp.drop_ratio > 0.0 or pp.hang_ratio > 0.0:
        u = keyed_uniform(seed, request, attempt, FAULT)
        if u < pp.error_ratio:
            return SERVER_ERROR, min(service_s, pp.first_token_s), -1, -1.0
        if u < pp.error_ratio + pp.drop_ratio:
            return DROPPED, service_s, -1, -1.0
        if u < pp.error_ratio + pp.drop_ratio + pp.hang_ratio:
            return DROPPED, NEVER_S, -1, -1.0
    return OK, service_s, -1, -1.0


def cut_without_text(pp: ProviderParams, seed: int, request: int) -> bool:
    """Return whether an answer that was cut at its cap has no usable text."""
    return keyed_uniform(seed, request, 1, FINALIZE_TEXT) < pp.empty_cut_ratio


def requests_dimension(pp: ProviderParams, ps: ProviderState) -> int:
    """Return the requests dimension that the headers state: the tighter of RPM and RPD. -1 = there is none."""
    if pp.limit[RPD] <= 0.0:
        return RPM if pp.limit[RPM] > 0.0 else -1
    if pp.limit[RPM] <= 0.0:
        return RPD
    day_left = pp.limit[RPD] - ps.used[RPD]
    return RPD if day_left < limit_now(pp, ps, RPM) - ps.used[RPM] else RPM


def is_stated(pp: ProviderParams, ps: ProviderState, d: int) -> bool:
    """Return whether the headers state dimension `d`: the tightest of those that share a header."""
    if pp.header[d] <= 0.0 or pp.limit[d] <= 0.0:
        return False
    for other in range(pp.dimensions):
        if other != d and pp.header[other] == pp.header[d] and pp.limit[other] > 0.0:
            more = limit_now(pp, ps, other) - ps.used[other] - (limit_now(pp, ps, d) - ps.used[d])
            if more < 0.0 or (more == 0.0 and other < d):
                return False
    return True


def states_counts(pp: ProviderParams, is_refused: bool) -> bool:
    """Return whether the headers of an answer, or of a refusal, state limits and what remains of them."""
    return pp.counts == COUNTS_AT_ADMISSION or pp.counts == COUNTS_AT_ANSWER or (pp.counts > 0 and is_refused)


def remaining(pp: ProviderParams, ps: ProviderState, d: int) -> float:
    """Return the count that the header of dimension `d` states as remaining at the last advance, a whole number."""
    limit = limit_now(pp, ps, d)
    left = pp.counts_share * (capacity_of(pp, d, limit) - ps.used[d]) + ROUNDING
    if pp.counts_rounded_to > 1.0 and pp.per_request[d] == 0.0:
        left = min(limit, pp.counts_rounded_to * math.floor(left / pp.counts_rounded_to + 0.5))
    return math.floor(left) if pp.counts_negative else max(0.0, math.floor(left))

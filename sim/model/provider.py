"""The synthetic provider, sans I/O: limiter, faults and latency as plain functions over numbers.

It stands where OpenAI stands: `answered` takes one attempt at `now` and says what comes back, when, and what the
rate-limit headers would state. The SimPy driver, the compiled engine and the HTTP server call this same code, which is
why it keeps the law's rules for compiling (numbers and fixed-size arrays, `math` only, chance and time from outside).

Theory of operation (docs/explanation/provider.md#buckets). Each dimension is a continuous bucket, or another window of
`windows`: an attempt is admitted iff used + requested <= limit in every dimension, the charge is taken at admission,
and a refusal states how long it takes until it would fit, floored to milliseconds; of a bucket, that is
(used + requested - limit) / limit * length. A charge above the limit never succeeds. What is not settled about the real
one is a knob: settling, charges booked after the answer, counted refusals, slices, windows, the ramp.

A co-tenant is drained in ticks of one second: it takes its share of the limit, all the time or in bursts at keyed
moments, as far as there is room. A limit that changes keeps what is used; what is above the new limit must drain first.
"""

import math
from dataclasses import dataclass, field

from governor.model.keyed import (
    COTENANT,
    FAULT,
    FINALIZE_TEXT,
    LATENCY,
    STALL,
    STALL_LENGTH,
    keyed_uniform,
    normal_quantile,
)
from sim.model.windows import (
    BUCKET,
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
from sim.model.windows import limit_now as limit_now

# Outcomes of an attempt.
OK = 0
THROTTLED = 1
QUOTA = 2
TOO_LARGE = 3
SLOW_DOWN = 4
SERVER_ERROR = 5
DROPPED = 6

# Whether a refusal says how long to wait.
SAYS_NOTHING = 0
SAYS_MILLISECONDS = 1  # "Please try again in 644ms": the wait, floored to ms
SAYS_SECONDS = 2  # Retry-After: whole seconds, rounded up
SAYS_CONSTANT = 3  # Retry-After: the same on every refusal

# What a refusal counts, added up.
REFUSAL_TOKENS = 1
REFUSAL_REQUESTS = 2

# Which answers state the counts in their headers, and of which moment.
COUNTS_NONE = 0
COUNTS_AT_ADMISSION = 1
COUNTS_AT_ANSWER = 2  # as middleware does that adds its headers on the way out
COUNTS_ON_REFUSALS = 3

RAMP_WINDOW_S = 900.0
RAMP_GROWTH = 1.5
TICK_S = 1.0
CHANGES = 8
OUTAGES = 4
# A measured shape of noise: groups of answer lengths, and normal scores from -4 to 4, a quarter apart.
NOISE_GROUPS = 4
NOISE_KNOTS = 33
NOISE_REACH = 4.0
# Kinds of outage: connections are dropped, everything is answered by a 5xx, or nothing is answered at all.
DROPS = 0
ERRORS = 1
HANGS = 2
# An answer that never comes: beyond any time-out.
NEVER_S = 1e9


def _none() -> list[float]:
    return [0.0] * 4


def _empty_log() -> list[float]:
    return [0.0] * LOG


@dataclass(slots=True)
class ProviderParams:
    """One provider quota as numbers. Times in seconds, 0 = no such limit, fault or habit.

    `limit`: TPM, RPM, TPD, RPD. `slice_s`: requests are also limited to their share of that time (1 = per second), and
    tokens to `slice_tokens` per slice. `window`, `phase_s`, `burst_ratio`: how minutes are counted, see `windows`.
    `charged_at_answer`: no tokens are taken at admission, which only asks whether any are left; real use is booked
    when the answer leaves. `failed_count`: what a refusal counts. `retry_after_s`: the constant stated wait;
    `retry_after_min_s`: the shortest.
    `ramp_tpm`: above it, tokens per minute may grow by half per 15 minutes (`slow_down`). `change_at`, `change_factor`:
    from that moment the minute limits are so many times the first ones (inf = unused). `cotenant_share` of the limit is
    used by others; in bursts of `cotenant_burst_s` once per `cotenant_period_s` if that is > 0. `quota_requests`: after
    so many admitted requests the credit is gone. Latency of an answer: (first_token_s + per_token_s * output) times a
    log-normal factor of that sigma, and with probability `stall_ratio` a stall of `stall_min_s` to `stall_max_s` more.
    Where `noise_from` is set, the factor has a measured shape instead: `noise` holds its logarithms at NOISE_KNOTS
    normal scores from -NOISE_REACH to NOISE_REACH, in turn for each group of answers, which begin at that many tokens.
    From `outage_at` to `outage_until` (inf = unused) the provider is out, in that `outage_kind`.
    `refusal_s`: time until a refusal arrives. `empty_cut_ratio`: chance that a cut answer has no usable text.
    `counts`: which answers state what remains; stated is that share of it (`counts_share`: a header that speaks of a
    slice of the limit), rounded to the nearest multiple of `counts_rounded_to`, below zero only with `counts_negative`.
    """

    limit: list[float] = field(default_factory=_none)
    window: int = BUCKET
    phase_s: float = 0.0
    burst_ratio: float = 1.0
    slice_s: float = 0.0
    slice_tokens: float = 0.0
    settles: int = 0
    charged_at_answer: int = 0
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
    """What the provider remembers: `used` per dimension as of `at`, slices, the ramp, the co-tenant's next tick.

    `window_until`: the end of an anchored window. `log_*`: the sliding log, a ring of `log_size` entries from
    `log_first` on; the last fields, so that a run that begins with an empty log need not write them.
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
    window_until: float = -math.inf
    log_first: int = 0
    log_size: int = 0
    log_at: list[float] = field(default_factory=_empty_log)
    log_tokens: list[float] = field(default_factory=_empty_log)
    log_requests: list[float] = field(default_factory=_empty_log)


def day_started(ps: ProviderState, tokens_used: float, requests_used: float) -> None:
    """Starts the daily buckets with what was already used of them."""
    ps.used[TPD] = tokens_used
    ps.used[RPD] = requests_used


def _drained_over_changes(pp: ProviderParams, ps: ProviderState, to: float) -> None:
    while ps.next_change < CHANGES and pp.change_at[ps.next_change] <= to:
        drained(pp, ps, pp.change_at[ps.next_change])
        ps.factor = pp.change_factor[ps.next_change]
        ps.next_change += 1
    drained(pp, ps, to)


def _cotenant_rate(pp: ProviderParams, seed: int, tick: int) -> float:
    """Share of the limit that others ask for in this tick. A burst asks for its whole period's share at once."""
    if pp.cotenant_period_s <= 0.0:
        return pp.cotenant_share
    t = tick * TICK_S
    period = math.floor(t / pp.cotenant_period_s)
    start = keyed_uniform(seed, int(period), 0, COTENANT) * (pp.cotenant_period_s - pp.cotenant_burst_s)
    into = t - period * pp.cotenant_period_s
    if start <= into < start + pp.cotenant_burst_s:
        return pp.cotenant_share * pp.cotenant_period_s / pp.cotenant_burst_s
    return 0.0


def taken_by_others(pp: ProviderParams, ps: ProviderState, d: int, amount: float) -> None:
    """Others on the quota use `amount` of a limit per minute, as far as it goes."""
    limit, used = limit_now(pp, ps, d), ps.used[d]
    if limit > 0.0:
        opened(pp, ps)
        ps.used[d] = max(used, min(limit, used + amount))
        if pp.window == SLIDING:
            logged(ps, ps.used[d] - used if d == TPM else 0.0, ps.used[d] - used if d == RPM else 0.0)


def advanced(pp: ProviderParams, ps: ProviderState, seed: int, now: float) -> None:
    """Brings the provider to `now`: limit changes, the co-tenant's use and the draining, in order of time."""
    if pp.cotenant_share > 0.0:
        last = math.floor(now / TICK_S)
        while ps.tick <= last:
            _drained_over_changes(pp, ps, ps.tick * TICK_S)
            rate = _cotenant_rate(pp, seed, ps.tick)
            if rate > 0.0:
                for d in range(2):
                    taken_by_others(pp, ps, d, rate * limit_now(pp, ps, d) * TICK_S / MINUTE_S)
            ps.tick += 1
    if pp.change_at[min(ps.next_change, CHANGES - 1)] <= now:
        _drained_over_changes(pp, ps, now)
    else:
        drained(pp, ps, now)


def _slice_wait_ms(pp: ProviderParams, ps: ProviderState, d: int, requested: float) -> float:
    """The same for this second's share (`slice_s` of the minute's limit), -1 where it fits or is not sliced."""
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
    """Whether this minute grows too fast: above `ramp_tpm`, by more than half over the last quarter hour's peak."""
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


def _booked(pp: ProviderParams, ps: ProviderState, charge: float) -> None:
    """Takes charge and request out of every window."""
    taken(pp, ps, charge, 1.0, False)
    if pp.slice_s > 0.0:
        ps.slice_requests += 1.0
        ps.slice_used_tokens += charge


def admitted(pp: ProviderParams, ps: ProviderState, seed: int, charge: float, now: float) -> tuple[int, int, float]:
    """One attempt at the door: (outcome, dimension, wait in milliseconds). Books it if it is let in.

    Outcome OK, THROTTLED, TOO_LARGE, SLOW_DOWN or QUOTA. The dimension and the exact wait are those of the limit that
    takes longest; wait is -1 where waiting does not help or nothing is known.
    """
    advanced(pp, ps, seed, now)
    if 0.0 < pp.quota_requests <= ps.admitted:
        return QUOTA, -1, -1.0
    opened(pp, ps)
    # A charge that is not known yet asks for no more than that something be left.
    asked, booked = (1.0, 0.0) if pp.charged_at_answer else (charge, charge)
    tightest = -1
    wait_ms = -1.0
    for d in range(4):
        limit = pp.limit[d]
        if limit > 0.0:
            if d < TPD:
                limit *= ps.factor
            requested = asked if d & 1 == 0 else 1.0
            capacity = capacity_of(pp, d, limit)
            if requested > capacity and d & 1 == 0:
                return TOO_LARGE, d, -1.0
            excess = ps.used[d] + requested - capacity
            if excess > ROUNDING:
                w = room_in_ms(pp, ps, d, excess, limit)
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
        if pp.failed_count:
            tokens = booked if pp.failed_count & REFUSAL_TOKENS else 0.0
            taken(pp, ps, tokens, 1.0 if pp.failed_count & REFUSAL_REQUESTS else 0.0, True)
        return THROTTLED, tightest, wait_ms
    if pp.ramp_tpm > 0.0:
        if _ramp_refuses(pp, ps, charge, now):
            ps.throttled += 1.0
            return SLOW_DOWN, TPM, -1.0
        ps.ramp_tokens += charge
    ps.admitted += 1.0
    _booked(pp, ps, booked)
    return OK, -1, -1.0


def stated_wait_s(pp: ProviderParams, wait_ms: float) -> float:
    """The wait that a refusal states, seconds; -1 = it says nothing."""
    if wait_ms < 0.0 or pp.retry_after == SAYS_NOTHING:
        return -1.0
    if pp.retry_after == SAYS_CONSTANT:
        return pp.retry_after_s
    if pp.retry_after == SAYS_SECONDS:
        return max(pp.retry_after_min_s, math.ceil(wait_ms / 1000.0))
    return max(pp.retry_after_min_s, math.floor(wait_ms) / 1000.0)


def settled(pp: ProviderParams, ps: ProviderState, seed: int, charge: float, used: float, now: float) -> None:
    """The answer is complete: a provider that settles books what was really used, never beyond its limit.

    One that charges at the answer does so whatever there is left.
    """
    if pp.charged_at_answer:
        advanced(pp, ps, seed, now)
        taken(pp, ps, used, 0.0, False)
    elif pp.settles:
        advanced(pp, ps, seed, now)
        taken(pp, ps, used - charge, 0.0, True)


def smooth_latency_s(pp: ProviderParams, output_tokens: float, recorded_s: float, u: float) -> float:
    """Seconds from admission to the whole answer but for a stall; `u` is the uniform number behind its noise.

    A recorded time (>= 0, from a trace) takes the model's place.
    """
    if recorded_s >= 0.0:
        return recorded_s
    service_s = pp.first_token_s + pp.per_token_s * output_tokens
    if pp.sigma > 0.0:
        service_s *= math.exp(_log_noise(pp, output_tokens, normal_quantile(u)))
    return service_s


def _log_noise(pp: ProviderParams, output_tokens: float, score: float) -> float:
    """Logarithm of the noise of an answer's time at a normal score: sigma times it, or the measured shape there."""
    if pp.noise_from[0] == math.inf:
        return pp.sigma * score
    group = 0
    while group < NOISE_GROUPS - 1 and pp.noise_from[group + 1] <= output_tokens:
        group += 1
    place = min(max(score / NOISE_REACH + 1.0, 0.0), 2.0) * (NOISE_KNOTS - 1) / 2.0
    knot = min(int(place), NOISE_KNOTS - 2)
    low = pp.noise[group * NOISE_KNOTS + knot]
    return low + (pp.noise[group * NOISE_KNOTS + knot + 1] - low) * (place - knot)


def stall_s(pp: ProviderParams, seed: int, request: int, attempt: int) -> float:
    """How long an answer that stalls does so, seconds."""
    u = keyed_uniform(seed, request, attempt, STALL_LENGTH)
    return pp.stall_min_s + (pp.stall_max_s - pp.stall_min_s) * u


def latency_s(
    pp: ProviderParams, seed: int, request: int, attempt: int, output_tokens: float, recorded_s: float
) -> float:
    """Seconds from admission to the whole answer."""
    u = 0.5
    if pp.sigma > 0.0 and recorded_s < 0.0:
        u = keyed_uniform(seed, request, attempt, LATENCY)
    service_s = smooth_latency_s(pp, output_tokens, recorded_s, u)
    if pp.stall_ratio > 0.0 and keyed_uniform(seed, request, attempt, STALL) < pp.stall_ratio:
        service_s += stall_s(pp, seed, request, attempt)
    return service_s


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
) -> tuple[int, float, int, float]:
    """Everything that happens to one attempt: (outcome, seconds until its answer, dimension, stated wait or -1).

    `attempt` is the key of the attempt (unique over lanes), `output_tokens` what the answer will have after its cap,
    `drawn_s` its `latency_s` where the caller has drawn it ahead.
    A fault strikes after admission: the charge is taken, and a 5xx arrives at the time of the first token. In an outage
    nothing is admitted, and what was under way as it began dies in that moment.
    """
    outage = 0
    while pp.outage_until[outage] <= now and outage < OUTAGES - 1:
        outage += 1
    at = pp.outage_at[outage]
    if at <= now < pp.outage_until[outage]:
        return _died(pp, outage, pp.refusal_s)
    outcome, service_s, dimension, wait_s = _served(
        pp, ps, seed, request, attempt, charge, output_tokens, recorded_s, now, drawn_s
    )
    if now + service_s > at:
        return _died(pp, outage, at - now)
    return outcome, service_s, dimension, wait_s


def _died(pp: ProviderParams, outage: int, after_s: float) -> tuple[int, float, int, float]:
    """What an attempt meets that this outage strikes so many seconds after its launch."""
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
) -> tuple[int, float, int, float]:
    """The same where there is no outage."""
    outcome, dimension, wait_ms = admitted(pp, ps, seed, charge, now)
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
    """Whether an answer that was cut at its cap came back without usable text."""
    return keyed_uniform(seed, request, 1, FINALIZE_TEXT) < pp.empty_cut_ratio


def requests_dimension(pp: ProviderParams, ps: ProviderState) -> int:
    """Of which requests limit the headers speak: the tighter of RPM and RPD. -1 = there is none."""
    if pp.limit[RPD] <= 0.0:
        return RPM if pp.limit[RPM] > 0.0 else -1
    if pp.limit[RPM] <= 0.0:
        return RPD
    day_left = pp.limit[RPD] - ps.used[RPD]
    return RPD if day_left < limit_now(pp, ps, RPM) - ps.used[RPM] else RPM


def states_counts(pp: ProviderParams, is_refused: bool) -> bool:
    """Whether the headers of an answer, or of a refusal, state limits and what remains of them."""
    return pp.counts == COUNTS_AT_ADMISSION or pp.counts == COUNTS_AT_ANSWER or (pp.counts > 0 and is_refused)


def remaining(pp: ProviderParams, ps: ProviderState, d: int) -> float:
    """What the header of dimension `d` states as remaining at the last advance: whole, as `ProviderParams` says."""
    limit = limit_now(pp, ps, d)
    left = pp.counts_share * (capacity_of(pp, d, limit) - ps.used[d]) + ROUNDING
    if pp.counts_rounded_to > 1.0:
        left = min(limit, pp.counts_rounded_to * math.floor(left / pp.counts_rounded_to + 0.5))
    return math.floor(left) if pp.counts_negative else max(0.0, math.floor(left))

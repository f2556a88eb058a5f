"""The law: the only module that holds rules of admission, pacing and retry.

`now` and the uniform number `u` come in as arguments; absolute times go out. The asyncio driver, the SimPy driver and
the compiled engine all call these functions.

Theory of operation. A driver asks `admit_at` when the head of its queue may launch, waits until then, calls `launched`,
sends the request, and reports its end with exactly one of `settled`, `throttled`, `failed` or `released`. After a
refusal or a failure, the law returns the absolute time of the next attempt; inf means that the request is given up.

Decide by time, never by level. Each budget returns the *moment* at which an amount fits, computed from the state alone
and then raised to `now`. If the driver asks again at that moment, the law admits the request. (Waiting for deficit/rate
until the level suffices livelocks in simulated time: rounding leaves the level a hair short, and the remaining wait
rounds to zero.)

Budgets. A provider limits up to DIMENSIONS quantities: tokens per minute, requests per day, money per ten minutes. The
law knows each dimension by its place alone: `need` and `used` hold what a request takes and took of each, one amount
per place, computed outside from the profile of the provider. Each dimension has a limit, a length and a window:

    `fixed`    lasts a second more than its length, from the first launch after the previous window has expired
    `clock`    begins with the minute or the day of some time zone, and a second later for clocks that differ
    `sliding`  the last length in 120ths: the current cell and the 122 full ones behind it, so that a booking of a
               minute's window counts for 61 to 61.5 s
    `bucket`   refills continuously, and is stored as the moment at which it will be full again (as in GCRA); it holds
               the budget, or less if the provider grants shorter bursts (`burst_ratio`)

The eight guardrails fill the first four places: tokens and requests per minute (TPM, RPM), with the window that the
policy says, and per day (TPD, RPD), which is a bucket: a rolling day, docs/explanation/provider.md#buckets.

Interactive requests, whose user is waiting, go before a batch and take no launch slot. A batch's first attempts leave a
share of each limit free for them (`interactive_ratio`): they do not use that share of a minute, and a bucket must hold
it in addition to the amount that they ask for.

Counts. If the policy syncs, the law keeps an image of the provider's own bucket, and that image binds too. Launches and
settlements move it, counts in headers correct it (`synced`), and a refusal shows what it held (`throttled`). The moment
of a count, the order in which requests had arrived and the rounding are unknown. A count therefore corrects the image
only by as much as two counts in a row agree on, whether each is read as taken at the launch or at the answer.

Unknown limits. A limit of a minute or less that the policy seeks doubles from a small rate until a refusal shows its
edge: about what was accepted in the last length. From then on launches are evenly spaced a margin below the edge, which
is crossed again, faster and faster, when enough requests have passed for the refusal that this may cost. Refusals cut
once per round: those of attempts launched before the cut belong to it, and so do those until another attempt was not
refused. A limit grows only while it is what launches wait for. See docs/how-to/unknown-limits.md.

The module compiles as it stands: it uses numbers, fixed-size float arrays and `math` only. When interpreted, `p` and
`s` are the dataclasses below; when compiled, they are NumPy records with the same field names.
"""

import math
from dataclasses import dataclass, field

# Most dimensions of a quota: the length of every array that has one entry per dimension.
DIMENSIONS = 8
# The places of the dimensions that the guardrails' settings fill.
TPM = 0
RPM = 1
TPD = 2
RPD = 3

# Kinds of window.
FIXED = 0
SLIDING = 1
BUCKET = 2
CLOCK = 3

# The standing of a launch: a first attempt, a retry, or a retry that kept its place in flight. The first attempt of an
# interactive request, whose user is waiting, goes before a batch's.
FIRST = 0
RETRY = 1
HOLDING = 2
INTERACTIVE = 3

# Lanes.
MAIN = 0
FINALIZE = 1

# What makes the head of the queue wait.
NOTHING = 0
CONCURRENCY = 1
STAGGER = 2
BY_TPM = 3
BY_RPM = 4
BY_DAY = 5
HOLD = 6
PAUSED = 7
OUTAGE = HOLD  # waits during an outage are recorded as holds

MINUTE_S = 60.0
DAY_S = 86400.0
# Cells in a length of a sliding window, and how many count: the current one and 122 full ones behind it.
CELLS_IN_LENGTH = 120
CELLS_BEHIND = 122
CELLS = CELLS_BEHIND + 1
# Our minute begins with a launch; the provider's begins when that request arrives, after connection setup and queueing.
# A request that comes back too soon is refused and may wait for another minute. This allowance prevents that.
SLACK_S = 1.0
FIXED_S = MINUTE_S + SLACK_S
# At the end of a window of the clock, computed from seconds since 1970, the next one has begun despite rounding.
CLOCK_ROUNDING = 1e-7
SLIDING_S = CELLS * MINUTE_S / CELLS_IN_LENGTH  # how long a booking at the beginning of a minute's cell counts

# After this many answers in a row without a success, each asking for a longer wait than is obeyed, a batch stops.
OUTWAITED = 3
# Providers round the stated wait down to milliseconds: a sleep of exactly that length ends up to 1 ms early.
RETRY_AFTER_SLACK_S = 0.002
# Counts of about a minute show how much other clients have used. The largest such amount is kept free and is forgotten
# with this time constant. Launches stay evenly spaced for as long after a hidden limit was met.
SURPRISE_FADES_S = 600.0
# Launches within this time may reach the provider in a different order.
BURST_S = 0.1
# After a hold, the gap between launches halves until it is this small.
REOPENED_S = 0.01
# An outage is recognized after this many attempts in a row, of at least two requests, have ended without an answer. The
# first probe goes out after the backoff's base, but not before the minimum gap; the gap doubles up to its maximum. A
# request that has just failed waits PROBE_TURN_S longer, so that another one gets the next probe. After a day, failed
# attempts count again.
OUTAGE_FAILURES = 3
PROBE_GAP_MIN_S = 1.0
PROBE_GAP_MAX_S = 60.0
PROBE_TURN_S = 0.01
OUTAGE_MAX_S = 86400.0
# A request that this many outages have spared may itself be the cause.
FRESH_OUTAGES = 2
# A sought limit begins with a request per START_GAP_S, as large as the largest so far, and doubles in START_DOUBLES_S
# until the first refusal, which shows the edge. A cut goes below SOUGHT_RATIO of the edge, by CUT_RATIO and after a
# rest of CUT_REST_S, which give a window room; the limit doubles in REGROWS_S up to there. CALM_S after the cut it goes
# to the edge and beyond: the excess doubles in EXCESS_DOUBLES_S.
# (2 ** x would be compiled to another function, which may differ in the last bit.)
LN_2 = math.log(2.0)
START_GAP_S = 1.0
START_DOUBLES_S = 5.0
SOUGHT_RATIO = 0.97
CUT_RATIO = 0.9
CUT_REST_S = 4.0
REGROWS_S = 10.0
CALM_S = 20.0
EXCESS_DOUBLES_S = 9.0
# Each launch pays for this share of a refusal; while more refusals came than were paid for, no edge is crossed. The
# start has some free, at most DEBT_MAX are held against the launches, and none if the edge has moved by MOVED_RATIO.
REFUSED_RATIO = 0.015
START_PATIENCE = 5.0
DEBT_MAX = 3.0
MOVED_RATIO = 0.25
# An edge is at least this share of what was accepted, even where the launches had been slower. A wait of DRY_S is one
# for a window's end.
EDGE_RATIO = 0.95
DRY_S = 8.0
# A sought limit's bucket holds the refill of this time, and binds if a launch came no later than this share of it.
SOUGHT_BURST_S = 1.0
BINDS_RATIO = 0.2
# Until the first answer arrives, this share of the limit stays free for surprises (an unknown charge rule, other
# clients); it is also the maximum later on. It costs no throughput: a bucket that is not full refills meanwhile.
UNHEARD_RATIO = 0.5


@dataclass(slots=True)
class Params:
    """A policy as numbers. Times in seconds, limits per length of their window, 0 = no limit. See `Policy`.

    Arrays have one entry per dimension, of which the first `dimensions` are in use. `length_s` and `window` are the
    window's length and kind; a `clock` window's lengths are counted from `phase_s` before 1970 began. `budget` is the
    usable part of `limit` (see `budget_of`) and `rate_per_s` its continuous refill (see `rate_of`). `burst_ratio` is
    the share that a bucket holds at most, 1 for other windows: `held` of the budget and `largest` of the limit, inf
    without one (see `burst_of`); a need above `shared` of the budget runs alone. `settles`: whether real use replaces
    the need. `refunds`: whether a refusal gives the need back. `cause`: what a wait for the dimension is recorded as.
    `sought`: the limit is not known (0), and the law finds it: the budget is 1, in a bucket that holds SOUGHT_BURST_S,
    and `State.scale` is the limit found. `seeks`: whether any is.
    `interactive_ratio` is the share of each budget, and of the places in flight, that a batch's first attempts leave
    free.
    """

    max_concurrency: int
    stagger_s: float
    jitter_ratio: float
    jitter_cap_s: float
    interactive_ratio: float
    longest_first: int
    max_attempts: int
    backoff_base_s: float
    backoff_cap_s: float
    retry_after_cap_s: float
    backoff_keeps_permit: int
    hold_on_throttle: int
    sync_headers: int
    finalize_lowers: int
    finalize_max_concurrency: int
    timeout_s: float
    deadline_s: float
    seeks: int
    dimensions: int
    limit: list[float]
    budget: list[float]
    rate_per_s: list[float]
    length_s: list[float]
    window: list[float]
    phase_s: list[float]
    burst_ratio: list[float]
    held: list[float]
    largest: list[float]
    shared: list[float]
    sought: list[float]
    settles: list[float]
    refunds: list[float]
    cause: list[float]


def _each(value: float) -> list[float]:
    return [value] * DIMENSIONS


@dataclass(slots=True)
class State:
    """The law's memory of one pool. A new state has launched nothing; change it only through the law's functions.

    `zero_s`: the time of day, in seconds since 1970, at which `now` is 0; only windows of the clock need it.

    `full_at`: per dimension, when the bucket is full again. `window_at`, `window_used`: start and content of the fixed
    or clock window; `window_early`: what was booked within SLACK_S of the clock's next window, which the provider may
    have counted there: it counts in both. `cell_at`, `cells`: newest cell and ring of the sliding window (CELLS per
    dimension), whose sum is kept in `window_used` too. `scale`: granted limit over configured limit if the provider
    grants less; of a sought limit, the limit itself, and `cells` hold what was not refused.

    `outwaited`: refusals since the last success that asked for a longer wait than is obeyed.

    `reopening_s`: after a hold, the gap between the next launch and the one after it.

    With header sync, per dimension: `granted`, the limit that the provider stated (0 = not yet); `stated` and `left`,
    the limit and the remaining amount in its newest count; `synced_at`, when the request of that count was launched;
    `mirror_at`, when the provider's own bucket is full again, as far as we know; `doubt`, the part of the newest
    count's correction that was not applied; `booked`, the total ever booked, settlements and refunds included;
    `booked_before`, that total before the burst that began at `burst_at`; `others`, the use beyond our own bookings
    that recent counts show; `surprise`, the largest such use since a refusal. `pace_at`: when evenly spread launches
    would have ended, counted since the hidden limit was met; it binds until `paced_until`.

    Of sought limits: `edge`, what was accepted per length when the limit was last met (0 = not yet); `since`, the
    amount that has been launched since the last cut at `cut_at`, without refusals, and `unrefused`, the number of such
    launches, the first of them at `opened_at`. `sought_from`, `sought_at`: the first and the latest launch of all;
    `refused_at`: the latest refusal. `patience`: how many refusals the launches have paid for, less those that came.

    The circuit breaker: `unanswered` counts the attempts that have failed since the last answer, the first of them at
    `silent_since`; `failing` is the first request among them that is above suspicion; `several`: there are at least
    two. The latest outage lasts from `outage_from`, its first failure, to `outage_until` (inf = it goes on), and was
    recognized at `outage_opened_at`. During an outage nothing is launched before `probe_at` (-inf = no outage), and
    after a probe nothing for another `probe_gap_s`.
    """

    in_flight: int = 0
    finalize_open: int = 0
    alone: int = 0
    paused: int = 0
    last_launch_at: float = -math.inf
    next_slot_at: float = -math.inf
    hold_until: float = -math.inf
    outwaited: int = 0
    reopening_s: float = 0.0
    zero_s: float = 0.0
    full_at: list[float] = field(default_factory=lambda: _each(-math.inf))
    window_at: list[float] = field(default_factory=lambda: _each(-math.inf))
    window_used: list[float] = field(default_factory=lambda: _each(0.0))
    window_early: list[float] = field(default_factory=lambda: _each(0.0))
    cell_at: list[float] = field(default_factory=lambda: _each(0.0))
    cells: list[float] = field(default_factory=lambda: [0.0] * (DIMENSIONS * CELLS))
    scale: list[float] = field(default_factory=lambda: _each(1.0))
    granted: list[float] = field(default_factory=lambda: _each(0.0))
    stated: list[float] = field(default_factory=lambda: _each(0.0))
    left: list[float] = field(default_factory=lambda: _each(math.inf))
    synced_at: list[float] = field(default_factory=lambda: _each(-math.inf))
    mirror_at: list[float] = field(default_factory=lambda: _each(-math.inf))
    doubt: list[float] = field(default_factory=lambda: _each(0.0))
    booked: list[float] = field(default_factory=lambda: _each(0.0))
    booked_before: list[float] = field(default_factory=lambda: _each(0.0))
    burst_at: float = -math.inf
    others: list[float] = field(default_factory=lambda: _each(0.0))
    surprise: list[float] = field(default_factory=lambda: _each(0.0))
    pace_at: float = -math.inf
    paced_until: float = -math.inf
    edge: list[float] = field(default_factory=lambda: _each(0.0))
    since: list[float] = field(default_factory=lambda: _each(0.0))
    unrefused: int = 0
    patience: float = START_PATIENCE
    sought_from: float = -math.inf
    sought_at: float = -math.inf
    opened_at: float = -math.inf
    cut_at: float = -math.inf
    refused_at: float = -math.inf
    unanswered: int = 0
    failing: int = -1
    several: int = 0
    silent_since: float = -math.inf
    outage_from: float = -math.inf
    outage_opened_at: float = -math.inf
    outage_until: float = -math.inf
    probe_at: float = -math.inf
    probe_gap_s: float = 0.0


# ---------------------------------------------------------------- budgets


def budget_of(limit: float, headroom_ratio: float) -> float:
    """Return the whole tokens (or requests) of `limit` that may be used, at least one: floor(limit * (1 - headroom)).

    Without a limit (0): inf. The tiny addition keeps an exact product whole: 30,000 at 15 % is 25,500, not 25,499.
    """
    if limit <= 0.0:
        return math.inf
    return max(1.0, math.floor(limit * (1.0 - headroom_ratio) + 1e-6))


def rate_of(limit: float, headroom_ratio: float, length_s: float) -> float:
    """Return the refill per second of a bucket of that limit: the whole budget once per window length."""
    if limit <= 0.0:
        return math.inf
    return max(limit * (1.0 - headroom_ratio), 1e-9) / length_s


def burst_of(amount: float, burst_ratio: float) -> float:
    """Return how much of `amount` per length a window holds: all of it, or a burst's share."""
    if burst_ratio == 1.0 or amount == math.inf:
        return amount
    return max(1.0, amount * burst_ratio)


def held_of(p: Params, d: int, amount: float) -> float:
    """Return how much of `amount` per length the window of dimension `d` holds."""
    return burst_of(amount, p.burst_ratio[d])


def never_fits(p: Params, need: list[float]) -> bool:
    """Return whether a need exceeds a limit itself, not just the budget: the provider would never admit it."""
    for d in range(p.dimensions):
        if need[d] > p.largest[d]:
            return True
    return False


def _exceeds_budget(p: Params, s: State, need: list[float]) -> bool:
    """Return whether a need exceeds what some budget holds when it is full, so that its request runs alone."""
    for d in range(p.dimensions):
        if need[d] > p.shared[d] * s.scale[d]:
            return True
    return False


def is_brief(p: Params, d: int) -> bool:
    """Return whether dimension `d` limits a minute or less. Waiting for a longer window to refill takes hours."""
    return p.length_s[d] <= MINUTE_S


def cell_s(p: Params, d: int) -> float:
    """Return the length of a cell of dimension `d`'s sliding window: half a second for a minute."""
    return p.length_s[d] / CELLS_IN_LENGTH


def _clock_start(p: Params, s: State, d: int, now: float) -> float:
    """Return when the clock's window that holds `now` began for us: SLACK_S after the provider's."""
    offset_s = s.zero_s + p.phase_s[d] - SLACK_S
    return math.floor((now + offset_s) / p.length_s[d] + CLOCK_ROUNDING) * p.length_s[d] - offset_s


def _window_used(p: Params, s: State, d: int, now: float) -> float:
    """Return the content of dimension `d`'s fixed or clock window at `now`."""
    if p.window[d] == CLOCK:
        # (Half a length apart: the same window's start, computed at another time, may be rounded differently.)
        behind_s = _clock_start(p, s, d, now) - s.window_at[d]
        if behind_s < 0.5 * p.length_s[d]:
            return s.window_used[d]
        return s.window_early[d] if behind_s < 1.5 * p.length_s[d] else 0.0
    return s.window_used[d] if now < s.window_at[d] + (p.length_s[d] + SLACK_S) else 0.0


def _window_ready_at(p: Params, s: State, d: int, amount: float, now: float) -> float:
    """Return when `amount` fits into the fixed or clock window, `now` if it does."""
    budget = p.budget[d] * s.scale[d]
    need = min(amount, budget)
    if _window_used(p, s, d, now) + need <= budget:
        return now
    if p.window[d] != CLOCK:
        return s.window_at[d] + (p.length_s[d] + SLACK_S)
    start = _clock_start(p, s, d, now)
    is_first = start < s.window_at[d] + 0.5 * p.length_s[d] and s.window_early[d] + need > budget
    return start + (2.0 if is_first else 1.0) * p.length_s[d]


def _sliding_used(s: State, d: int, cell: float) -> float:
    """Return the sliding window's content once `cell` is the current one: the stored sum less the expired cells."""
    passed = cell - s.cell_at[d]
    if passed <= 0.0:
        return s.window_used[d]
    if passed > CELLS_BEHIND:
        return 0.0
    used = s.window_used[d]
    oldest = int(s.cell_at[d]) - CELLS_BEHIND
    for j in range(oldest, oldest + int(passed)):
        used -= s.cells[d * CELLS + j % CELLS]
    return used


def _sliding_ready_at(p: Params, s: State, d: int, amount: float, now: float) -> float:
    """Return the moment at which enough old cells have left the sliding window for `amount` to fit."""
    length_s = cell_s(p, d)
    cell = math.floor(now / length_s)
    budget = p.budget[d] * s.scale[d]
    need = min(amount, budget)
    used = _sliding_used(s, d, cell)
    if used + need <= budget:
        return now
    newest = int(s.cell_at[d])
    for j in range(max(int(cell), newest) - CELLS_BEHIND, newest + 1):
        used -= s.cells[d * CELLS + j % CELLS]
        if used + need <= budget:
            return (j + CELLS) * length_s
    return (newest + CELLS) * length_s


def _ready_at(p: Params, s: State, d: int, amount: float, now: float) -> float:
    """Return when dimension `d` has room for `amount`, seconds; may lie in the past.

    An amount above the budget fits when the window is empty. For a bucket, level(t) = capacity - (full_at - t) * rate
    >= amount, solved for t (docs/explanation/provider.md#buckets).
    """
    if p.window[d] == BUCKET:
        scale = s.scale[d]
        spare = p.held[d] * scale - amount
        if spare <= 0.0:
            return s.full_at[d]
        return s.full_at[d] - spare / (p.rate_per_s[d] * scale)
    if p.window[d] == SLIDING:
        return _sliding_ready_at(p, s, d, amount, now)
    return _window_ready_at(p, s, d, amount, now)


def _roll(s: State, d: int, cell: float) -> None:
    """Make `cell` the current one of the sliding window and empty the expired cells."""
    if cell <= s.cell_at[d]:
        return
    s.window_used[d] = _sliding_used(s, d, cell)
    oldest = int(s.cell_at[d]) - CELLS_BEHIND
    for j in range(oldest, oldest + min(CELLS, int(cell - s.cell_at[d]))):
        s.cells[d * CELLS + j % CELLS] = 0.0
    s.cell_at[d] = cell


def _book(p: Params, s: State, d: int, amount: float, now: float) -> None:
    """Book `amount` in dimension `d` at `now`."""
    if p.window[d] == BUCKET:
        full_at = s.full_at[d]
        s.full_at[d] = (full_at if full_at > now else now) + amount / (p.rate_per_s[d] * s.scale[d])
    elif p.window[d] == SLIDING:
        cell = math.floor(now / cell_s(p, d))
        _roll(s, d, cell)
        s.cells[d * CELLS + int(s.cell_at[d]) % CELLS] += amount
        s.window_used[d] += amount
    elif p.window[d] == CLOCK:
        start = _clock_start(p, s, d, now)
        if start >= s.window_at[d] + 0.5 * p.length_s[d]:
            s.window_used[d] = _window_used(p, s, d, now)
            s.window_at[d] = start
            s.window_early[d] = 0.0
        s.window_used[d] += amount
        if now >= start + p.length_s[d] - 2.0 * SLACK_S:
            s.window_early[d] += amount
    elif now >= s.window_at[d] + (p.length_s[d] + SLACK_S):
        s.window_at[d] = now
        s.window_used[d] = amount
    else:
        s.window_used[d] += amount


def _rebook(p: Params, s: State, d: int, change: float, booked_at: float) -> None:
    """Change a booking made at `booked_at` by `change`, if the window (or cell) that holds it still counts."""
    if p.window[d] == BUCKET:
        s.full_at[d] += change / (p.rate_per_s[d] * s.scale[d])
    elif p.window[d] == SLIDING:
        cell = math.floor(booked_at / cell_s(p, d))
        if cell >= s.cell_at[d] - CELLS_BEHIND:
            i = d * CELLS + int(cell) % CELLS
            # A booking carried over from another kind of window is in a later cell, and no cell may become negative.
            change = max(change, -s.cells[i])
            s.cells[i] += change
            s.window_used[d] += change
    elif p.window[d] == CLOCK:
        if booked_at >= s.window_at[d] - 2.0 * SLACK_S:
            s.window_used[d] += change
        if booked_at >= s.window_at[d] + p.length_s[d] - 2.0 * SLACK_S:
            s.window_early[d] += change
    elif booked_at >= s.window_at[d]:
        s.window_used[d] += change


def _changed(p: Params, s: State, d: int, change: float, booked_at: float) -> None:
    """Change a booking in dimension `d` and in the image of the provider's bucket."""
    if p.budget[d] < math.inf:
        _rebook(p, s, d, change, booked_at)
    if p.sought[d]:
        _recount(p, s, d, change, booked_at)
    if p.sync_headers:
        s.booked[d] += change
        _mirror_moved(p, s, d, change)


# ---------------------------------------------------------------- the image of the provider's own bucket


def _stated_limit(p: Params, s: State, d: int) -> float:
    """Return the provider's limit: as its headers state it, else as the policy assumes it. 0 = none known."""
    return s.granted[d] or p.limit[d]


def _mirror_ready_at(p: Params, s: State, d: int, amount: float) -> float:
    """Return when `amount` fits into the provider's bucket, as far as its answers show, with room for a surprise.

    The room keeps a pool free of refusals if others share its quota or its reservations are below the provider's
    charge. It costs one delay, not throughput, since the bucket refills meanwhile. A daily limit keeps nothing free:
    the delay would be hours, the use of earlier runs is no surprise, and a daily count may never arrive.
    """
    limit = _stated_limit(p, s, d)
    if limit <= 0.0:
        return -math.inf
    held = held_of(p, d, limit)
    kept = 0.0
    if is_brief(p, d):
        kept = UNHEARD_RATIO * held
        if s.synced_at[d] > -math.inf:
            kept = min(kept, s.surprise[d])
    return s.mirror_at[d] - max(0.0, held - amount - kept) * p.length_s[d] / limit


def _refill_s(p: Params, s: State, need: list[float], is_refused: int) -> float:
    """Return the time in which the limits per minute refill a need, or what is booked of it after a refusal."""
    refill_s = 0.0
    for d in range(p.dimensions):
        limit = _stated_limit(p, s, d)
        if limit > 0.0 and is_brief(p, d) and not (is_refused and p.refunds[d]):
            refill_s = max(refill_s, need[d] * p.length_s[d] / limit)
    return refill_s


def _mirror_book(p: Params, s: State, need: list[float], now: float) -> None:
    """Book a launch in the image and, while launches are evenly spaced, the time in which the limits refill it."""
    begins = now - s.burst_at > BURST_S
    if begins:
        s.burst_at = now
    for d in range(p.dimensions):
        amount = need[d]
        if begins:
            s.booked_before[d] = s.booked[d]
        s.booked[d] += amount
        limit = s.granted[d] or p.limit[d]
        if limit > 0.0:
            full_at = s.mirror_at[d]
            s.mirror_at[d] = (full_at if full_at > now else now) + amount * p.length_s[d] / limit
    if now < s.paced_until:
        s.pace_at = max(s.pace_at, now) + _refill_s(p, s, need, 0)


def _mirror_moved(p: Params, s: State, d: int, change: float) -> None:
    """Change the content of the image by `change`."""
    limit = _stated_limit(p, s, d)
    if limit > 0.0:
        s.mirror_at[d] += change * p.length_s[d] / limit


def _corrected(p: Params, s: State, d: int, change: float, now: float) -> None:
    """Add `change`, the use that the provider's bucket shows beyond our image, to the image and to our own bucket.

    Our bucket thereby holds the real charge. A fixed or sliding window keeps the reservations.
    """
    s.mirror_at[d] = max(now, s.mirror_at[d])
    _mirror_moved(p, s, d, change)
    s.others[d] = max(0.0, s.others[d] + change)
    if p.limit[d] > 0.0 and p.window[d] == BUCKET:
        s.full_at[d] = max(now, s.full_at[d]) + change / (p.rate_per_s[d] * s.scale[d])


def _refused(
    p: Params, s: State, need: list[float], attempt: int, wait_s: float, launched_at: float, now: float
) -> None:
    """Learn from a refusal: its reservation is not in the provider's bucket, and would fit in `wait_s`.

    The reservation fits no sooner than that in the dimension that is fullest by our image, and no later in any
    dimension, whatever counts have said. From then on the largest use by others is kept free. But if all counts had
    room for the request, it met a limit that headers do not show, such as a share of the minute per second: launches
    are then spread evenly for a while, which costs bursts but no throughput. A fixed or sliding window for which no
    count arrives is its own image: a request's first refusal, or one with a stated wait, changes nothing but the hold.
    """
    fits_at = now + min(max(0.0, wait_s), MINUTE_S)
    fullest = -1
    latest_s = -math.inf
    room = math.inf
    is_heard = False
    is_window = False
    for d in range(p.dimensions):
        amount = need[d]
        if not p.refunds[d]:
            _mirror_moved(p, s, d, -amount)
        limit = _stated_limit(p, s, d)
        if limit > 0.0 and is_brief(p, d):
            is_heard = is_heard or s.stated[d] > 0.0
            is_window = is_window or p.window[d] != BUCKET
            if s.synced_at[d] >= launched_at:
                # If the count was taken at the answer, the bucket has refilled since the launch.
                room = min(room, s.left[d] - (now - launched_at) * limit / p.length_s[d] - amount)
            s.mirror_at[d] = max(now, s.mirror_at[d])
            late_s = _mirror_ready_at(p, s, d, amount) - fits_at
            if late_s > latest_s:
                fullest = d
                latest_s = late_s
    if is_window and not is_heard and (wait_s > 0.0 or attempt == 1):
        return  # the refusal shows only a wait, or that the launch was too early, and a window empties all at once
    if 0.0 <= room < math.inf:
        s.paced_until = now + SURPRISE_FADES_S
    elif fullest >= 0:
        if latest_s < 0.0:
            _corrected(p, s, fullest, -latest_s * _stated_limit(p, s, fullest) / p.length_s[fullest], now)
        s.surprise[fullest] = max(1.0, s.surprise[fullest], s.others[fullest])
    if wait_s > 0.0 and attempt == 1:
        for d in range(p.dimensions):
            late_s = _mirror_ready_at(p, s, d, need[d]) - now - wait_s
            if late_s > 0.0:
                _corrected(p, s, d, -late_s * _stated_limit(p, s, d) / p.length_s[d], now)


def used_in(p: Params, s: State, d: int, now: float) -> float:
    """Return the amount that counts against the budget of dimension `d` at `now`; 0 without a limit.

    Of a sought limit, the amount that was accepted within the last length of its window.
    """
    if p.sought[d]:
        return _accepted(p, s, d, now, CELLS_IN_LENGTH)
    if p.limit[d] <= 0.0:
        return 0.0
    if p.window[d] == BUCKET:
        return max(0.0, s.full_at[d] - now) * p.rate_per_s[d] * s.scale[d]
    if p.window[d] == SLIDING:
        return _sliding_used(s, d, math.floor(now / cell_s(p, d)))
    return _window_used(p, s, d, now)


def started(p: Params, s: State, used: list[float], now: float) -> None:
    """Start the budgets with the amounts that were already used."""
    for d in range(p.dimensions):
        if p.limit[d] > 0.0 and used[d] > 0.0:
            _book(p, s, d, used[d], now)


# ---------------------------------------------------------------- unknown limits


def _accepted(p: Params, s: State, d: int, now: float, cells: int) -> float:
    """Return what was launched within so many cells, CELLS_IN_LENGTH a length, and not refused."""
    return _sliding_used(s, d, math.floor(now / cell_s(p, d)) + CELLS - cells)


def limit_found(p: Params, s: State, d: int) -> float:
    """Return the limit of dimension `d` per length: the policy's, or where it was last met; 0 = none known (yet)."""
    return s.granted[d] or s.edge[d] if p.sought[d] else p.limit[d]


def _recount(p: Params, s: State, d: int, change: float, launched_at: float) -> None:
    """Change what counts as accepted of a launch made at `launched_at`."""
    cell = math.floor(launched_at / cell_s(p, d))
    if cell >= s.cell_at[d] - CELLS_BEHIND:
        s.cells[d * CELLS + int(cell) % CELLS] += change
        s.window_used[d] += change
    if launched_at > s.cut_at:
        s.since[d] += change


def _rescaled(s: State, d: int, scale: float, now: float) -> None:
    """Adopt another scale; what the bucket lacks stays the same amount."""
    s.full_at[d] = now + max(0.0, s.full_at[d] - now) * s.scale[d] / scale
    s.scale[d] = scale


def _grown(p: Params, s: State, d: int, amount: float, passed_s: float, may_exceed: bool, now: float) -> float:
    """Return the sought limit, raised for the last `passed_s` if it is what this launch waited for."""
    scale, edge = s.scale[d], s.edge[d]
    rate_per_s = p.rate_per_s[d] * scale
    held = p.held[d] * scale
    ready_at = s.full_at[d] - max(0.0, held - amount) / rate_per_s
    if ready_at < now - BINDS_RATIO * max(held, amount) / rate_per_s:
        return scale
    known = SOUGHT_RATIO * edge
    if edge == 0.0:
        return scale * math.exp(LN_2 * passed_s / START_DOUBLES_S)
    if scale < known:
        return min(known, scale * math.exp(LN_2 * passed_s / REGROWS_S))
    if may_exceed:
        return known + max(scale - known, edge - known) * math.exp(LN_2 * passed_s / EXCESS_DOUBLES_S)
    return scale


def _seek(p: Params, s: State, need: list[float], now: float) -> None:
    """Raise the sought limits that this launch waited for, and count it. Call it before the launch is booked."""
    if s.sought_from == -math.inf:
        s.sought_from = now
        s.sought_at = now
    passed_s = min(now - s.sought_at, EXCESS_DOUBLES_S)
    s.sought_at = now
    if s.unrefused == 0:
        s.opened_at = now
    s.unrefused += 1
    if s.patience < 1.0:
        s.patience += REFUSED_RATIO
    may_exceed = s.patience >= 0.0 and now - s.cut_at >= CALM_S
    for d in range(p.dimensions):
        if p.sought[d]:
            amount = need[d]
            if s.granted[d] == 0.0:
                scale = _grown(p, s, d, amount, passed_s, may_exceed, now)
                if s.edge[d] == 0.0:
                    scale = max(scale, max(1.0, amount) * p.length_s[d] / START_GAP_S)
                if scale != s.scale[d]:
                    _rescaled(s, d, scale, now)
            cell = math.floor(now / cell_s(p, d))
            _roll(s, d, cell)
            s.cells[d * CELLS + int(s.cell_at[d]) % CELLS] += amount
            s.window_used[d] += amount
            s.since[d] += amount


def _edge(p: Params, s: State, d: int, now: float) -> float:
    """Return the limit that a refusal shows, by what was accepted; 0 = nothing was.

    In the last length: exact for a sliding window, and for a bucket that was empty before, or a window that was full,
    at both of its ends. If launches have not lasted so long, a bucket has refilled meanwhile and a window has not, and
    the estimate is in between. If nothing was admitted for a while before these launches, a window has begun with
    them. If the last cut was recent, the limit has probably fallen, and half a length tells sooner. One that fits the
    launches' own rate is believed, and no limit falls by more than half at once.
    """
    length_s = p.length_s[d]
    accepted = _accepted(p, s, d, now, CELLS_IN_LENGTH)
    lasted = (now - s.sought_from) / length_s
    if lasted < 1.0:
        accepted /= 1.0 + 0.25 * lasted
    if s.opened_at - s.cut_at >= DRY_S and s.unrefused > 4 and now - s.opened_at < length_s:
        accepted = max(s.since[d], 0.5 * accepted)
    elif now - s.cut_at < 0.5 * length_s:
        accepted = min(accepted, max(0.75 * accepted, 2.0 * _accepted(p, s, d, now, CELLS_IN_LENGTH // 2)))
    return max(min(s.scale[d], accepted), EDGE_RATIO * accepted, 0.5 * s.edge[d])


def _met_limit(p: Params, s: State, need: list[float], launched_at: float, now: float) -> None:
    """Learn from a refusal: count it, and cut the sought limits if it begins a round."""
    s.patience = max(-DEBT_MAX, s.patience - 1.0)
    for d in range(p.dimensions):
        if p.sought[d] and not p.refunds[d]:
            _recount(p, s, d, -need[d], launched_at)
    is_new = launched_at > s.cut_at
    if is_new:
        s.unrefused -= 1
    if is_new and s.unrefused > 0:
        passed_s = now - max(s.refused_at, s.sought_from)
        for d in range(p.dimensions):
            edge = _edge(p, s, d, now) if p.sought[d] and s.granted[d] == 0.0 else 0.0
            if edge > 0.0:
                if abs(edge - s.edge[d]) > MOVED_RATIO * s.edge[d]:
                    s.patience = max(s.patience, 0.0)
                recent = s.since[d] * p.length_s[d] / passed_s if passed_s > 0.0 else edge
                s.edge[d] = edge
                s.scale[d] = SOUGHT_RATIO * min(CUT_RATIO * edge, max(recent, 0.5 * edge))
                s.full_at[d] = now + CUT_REST_S
            s.since[d] = 0.0
        s.cut_at = now
        s.unrefused = 0
    s.refused_at = now


def _opens_at(s: State, now: float) -> float:
    """Return when a minute that began with the first launch, or when refusals last ended, has ended again."""
    if s.sought_from + FIXED_S > now:
        return s.sought_from + FIXED_S
    if s.opened_at == -math.inf:
        return math.inf
    return s.opened_at + math.ceil((now - s.opened_at) / MINUTE_S) * MINUTE_S + SLACK_S


# ---------------------------------------------------------------- admission


def answer_may_admit(p: Params, cause: int) -> bool:
    """Return whether an ordinary answer can bring forward a head that waits for `cause`; else no driver need ask again.

    A returned place helps only a head that waits for one; a budget changes only if actual use or counts are booked.
    """
    if cause in (CONCURRENCY, NOTHING) or p.sync_headers:
        return True
    for d in range(p.dimensions):
        if p.settles[d]:
            return True
    return False


def permits(p: Params, s: State) -> int:
    """Return how many requests may be in flight now. An open finalize pass lowers the cap but pre-empts none."""
    if p.finalize_lowers and s.finalize_open > 0 and p.finalize_max_concurrency < p.max_concurrency:
        return p.finalize_max_concurrency
    return p.max_concurrency


def _kept(p: Params, held: float, standing: int) -> float:
    """Return the part of a limit's content that an attempt leaves free: only a batch's first attempts leave any."""
    return held * p.interactive_ratio if standing == FIRST else 0.0


def admission(p: Params, s: State, need: list[float], standing: int, now: float) -> tuple[float, int]:
    """Return when this need may launch, and the setting that delays it longest: the rule of admission."""
    if s.paused:
        return math.inf, PAUSED
    most = permits(p, s)
    if p.interactive_ratio > 0.0 and standing == FIRST:
        most = max(1, most - math.ceil(_kept(p, most, standing)))
    # A need above a budget runs alone: nothing else is in flight, and no other request joins it. A retry that
    # holds its place does not wait for the others in flight: if the limit fell meanwhile, they may all be waiting too.
    joins = standing != HOLDING and s.in_flight > 0
    if joins and (s.alone or s.in_flight >= most):
        return math.inf, CONCURRENCY
    at = now
    cause = NOTHING
    if standing == FIRST and s.next_slot_at > at:
        at = s.next_slot_at
        cause = STAGGER
    for d in range(p.dimensions):
        if p.budget[d] < math.inf:
            amount = need[d]
            if joins and amount > p.shared[d] * s.scale[d]:
                return math.inf, CONCURRENCY
            # (A bucket that will be full by then has room for any amount and need not be asked.)
            if s.full_at[d] > at or p.window[d] != BUCKET:
                if p.interactive_ratio > 0.0:
                    amount += _kept(p, p.held[d] * s.scale[d], standing)
                ready_at = _ready_at(p, s, d, amount, now)
                if ready_at > at:
                    at = ready_at
                    cause = int(p.cause[d])
    if p.sync_headers:
        for d in range(p.dimensions):
            if s.mirror_at[d] > at:
                amount = need[d]
                if p.interactive_ratio > 0.0:
                    amount += _kept(p, held_of(p, d, _stated_limit(p, s, d)), standing)
                ready_at = _mirror_ready_at(p, s, d, amount)
                if ready_at > at:
                    at = ready_at
                    cause = int(p.cause[d])
        paced_at = min(s.pace_at, s.paced_until)
        if paced_at > at:
            at = paced_at
            cause = int(p.cause[0])
    if s.probe_at > at:
        at = s.probe_at
        cause = OUTAGE
    if s.hold_until > at:
        return s.hold_until, HOLD
    return at, cause


def admit_at(p: Params, s: State, need: list[float], standing: int, now: float) -> float:
    """Return the absolute time at which this need may launch, at least `now`; inf = an attempt must end first.

    `standing` is FIRST, RETRY (takes a permit and tokens but no stagger slot), HOLDING (a retry whose permit was kept)
    or INTERACTIVE. Asked again at the time that it returned, with the state unchanged, it returns that same time.
    """
    return admission(p, s, need, standing, now)[0]


def stagger_gap_s(p: Params, u: float) -> float:
    """Return the time from a launch to the next slot: the stagger +-`jitter_ratio` of it, at most `jitter_cap_s`."""
    return p.stagger_s + min(p.stagger_s * p.jitter_ratio, p.jitter_cap_s) * (2.0 * u - 1.0)


def launched(p: Params, s: State, need: list[float], standing: int, now: float, u: float) -> None:
    """Take the permit, book the need in every budget and, on a first attempt, the next launch slot."""
    if standing != HOLDING:
        s.in_flight += 1
    if _exceeds_budget(p, s, need):
        s.alone = 1
    if p.seeks:
        _seek(p, s, need, now)
    for d in range(p.dimensions):
        if p.budget[d] < math.inf:
            _book(p, s, d, need[d], now)
    if p.sync_headers:
        _mirror_book(p, s, need, now)
    if s.reopening_s > 0.0:
        # The first launch after a hold goes alone until its refusal would have arrived; the gaps after it shrink.
        s.hold_until = max(s.hold_until, now + s.reopening_s)
        s.reopening_s = s.reopening_s / 2.0 if s.reopening_s > REOPENED_S else 0.0
    if standing == FIRST:
        s.last_launch_at = now
        s.next_slot_at = now + stagger_gap_s(p, u)
    if s.probe_at > -math.inf:
        s.probe_gap_s = min(2.0 * s.probe_gap_s, PROBE_GAP_MAX_S)
        s.probe_at = now + s.probe_gap_s


# ---------------------------------------------------------------- the end of an attempt


def released(p: Params, s: State) -> None:
    """Give a permit back with nothing learned: a request was cancelled, rejected, or given up during its backoff."""
    s.in_flight -= 1
    if s.in_flight == 0:
        s.alone = 0


def settled(p: Params, s: State, need: list[float], used: list[float], launched_at: float, now: float) -> None:
    """Free the permit of an answered attempt and replace its need by its real use in dimensions that settle."""
    released(p, s)
    answered(p, s, now)
    s.outwaited = 0
    if p.sync_headers:
        for d in range(p.dimensions):
            if s.synced_at[d] == -math.inf:
                s.synced_at[d] = launched_at
    is_changed = False
    for d in range(p.dimensions):
        if p.settles[d] and used[d] != need[d]:
            _changed(p, s, d, used[d] - need[d], launched_at)
            is_changed = True
    if is_changed and now < s.paced_until:
        s.pace_at += _refill_s(p, s, used, 0) - _refill_s(p, s, need, 0)


def answered(p: Params, s: State, now: float) -> None:
    """Note that the provider answered an attempt, even with a refusal: any outage is over.

    The probe was admitted, so the other requests may follow.
    """
    if s.unanswered > 0:
        s.unanswered = 0
        _outage_over(s, now)


def _outage_over(s: State, now: float) -> None:
    if s.probe_at > -math.inf:
        s.outage_until = now
        s.probe_at = -math.inf


def _unanswered(p: Params, s: State, request: int, is_fresh: bool, now: float) -> None:
    """Note that an attempt failed without an answer. If recent attempts ended in nothing else, the breaker opens.

    A single request may itself be at fault (it always times out, or crashes the server), so two requests above
    suspicion must have failed: `is_fresh` means that the request has not failed before while others were answered.
    """
    s.unanswered += 1
    if s.unanswered == 1:
        s.silent_since = now
        s.failing = -1
        s.several = 0
    if is_fresh:
        if s.failing < 0:
            s.failing = request
        elif request != s.failing:
            s.several = 1
    if s.probe_at > -math.inf:
        if now - s.outage_from >= OUTAGE_MAX_S:
            _outage_over(s, now)
    elif s.several and s.unanswered >= OUTAGE_FAILURES and s.outage_from != s.silent_since:
        s.outage_from = s.silent_since
        s.outage_opened_at = now
        s.outage_until = math.inf
        s.probe_gap_s = min(max(p.backoff_base_s, PROBE_GAP_MIN_S), PROBE_GAP_MAX_S)
        s.probe_at = now + s.probe_gap_s


def spared(p: Params, s: State, outages: int, launched_at: float, failed_at: float) -> int:
    """Return the outages that have spared a request, this one included, if its failure at `failed_at` does not count.

    -1 = the attempt counts. `outages`: how many outages have spared the request so far. A probe is always spared. An
    attempt launched before the breaker opened is spared only as often as a request may be tried, since a request that
    is in flight whenever the breaker opens may be the cause.
    """
    if not s.outage_from <= failed_at <= s.outage_until:
        return -1
    if launched_at >= s.outage_opened_at:
        return outages
    return outages + 1 if outages < p.max_attempts else -1


def deadline_at(p: Params, first_launched_at: float) -> float:
    """Return when a request is given up, retries included, counted from its first launch. inf without a deadline."""
    if p.deadline_s <= 0.0:
        return math.inf
    return first_launched_at + p.deadline_s


def expires_at(p: Params, first_launched_at: float, launched_at: float) -> float:
    """Return until when an attempt's answer is awaited: its time-out, or the request's deadline if that is sooner."""
    return min(launched_at + p.timeout_s, deadline_at(p, first_launched_at))


def backoff_s(p: Params, attempt: int) -> float:
    """Return our own wait after a failed attempt (1, 2, ...): base, doubling, at most the cap. Jitter comes on top."""
    # 2**1000 is above any cap, and still a number.
    return min(math.ldexp(p.backoff_base_s, min(attempt - 1, 1000)), p.backoff_cap_s)


def outlasts(p: Params, retry_after_s: float) -> bool:
    """Return whether a stated wait is too long to obey: longer than the cap or than a request may take in all."""
    return retry_after_s > p.retry_after_cap_s or 0.0 < p.deadline_s <= retry_after_s


def is_spent(p: Params, attempt: int, retry_after_s: float) -> bool:
    """Return whether a request that is given up was ended by its attempts or the cap on waits, not by its deadline."""
    return attempt >= p.max_attempts or retry_after_s > p.retry_after_cap_s


def is_shut_out(s: State) -> bool:
    """Return whether a batch should stop because its requests keep meeting waits that are not obeyed."""
    return s.outwaited >= OUTWAITED


def _wait_s(p: Params, attempt: int, retry_after_s: float) -> float:
    """Return the wait after a failed attempt, seconds: the stated one if it is obeyed, else our backoff.

    A stated wait that has proved too short doubles with each attempt, up to our backoff. Providers that count refused
    requests state when the request would fit if it had not been refused; a run that retries faster than its quota
    refills, with a limit set too high or other clients unseen, would be refused for ever.
    """
    if 0.0 < retry_after_s <= p.retry_after_cap_s:
        doubled_s = min(math.ldexp(retry_after_s, min(attempt - 1, 1000)), backoff_s(p, attempt))
        return max(retry_after_s, doubled_s) + RETRY_AFTER_SLACK_S
    return backoff_s(p, attempt)


def keeps_permit(p: Params) -> int:
    """Return the standing in which a request that now backs off will ask again: HOLDING or RETRY."""
    return HOLDING if p.backoff_keeps_permit else RETRY


def _retry_at(p: Params, s: State, at: float, is_last: bool, standing: int, first_launched_at: float) -> float:
    """Return `at`, or inf if attempts or time are exhausted; give the permit back unless it is kept for a retry."""
    if is_last or at >= deadline_at(p, first_launched_at):
        released(p, s)
        return math.inf
    if standing != HOLDING:
        released(p, s)
    return at


def _jittered_at(p: Params, wait_s: float, now: float, u: float) -> float:
    """Return the end of a wait and its jitter. The jitter is positive: retries spread out and are never early."""
    return now + wait_s + min(wait_s * p.jitter_ratio, p.jitter_cap_s) * u


def throttled(
    p: Params,
    s: State,
    need: list[float],
    attempt: int,
    retry_after_s: float,
    first_launched_at: float,
    launched_at: float,
    now: float,
    u: float,
) -> float:
    """Return when to retry after a 429 to attempt 1, 2, ...: absolute time, or inf = attempts or time are exhausted.

    `retry_after_s`: stated, > 0, see `_wait_s`; -1 = absent. One above the cap (114 h has been seen) ends the request,
    and counts for the hold as if it were absent. The need stays booked unless the policy refunds: a provider may count
    refused requests. With hold-on-throttle nothing launches before the retry.
    """
    answered(p, s, now)
    for d in range(p.dimensions):
        if p.refunds[d]:
            _changed(p, s, d, -need[d], launched_at)
    if p.seeks:
        _met_limit(p, s, need, launched_at, now)
    if now < s.paced_until:
        s.pace_at += _refill_s(p, s, need, 1) - _refill_s(p, s, need, 0)
    if p.sync_headers:
        _refused(p, s, need, attempt, retry_after_s, launched_at, now)
    wait_s = _wait_s(p, attempt, retry_after_s)
    if p.seeks and attempt > 1:
        if retry_after_s <= 0.0:
            wait_s = min(wait_s, _opens_at(s, now) - now)
        else:
            # What was too short is the wait that was kept, which the sought rate may have made longer than the stated.
            kept_s = (launched_at - first_launched_at) / (attempt - 1)
            wait_s = max(wait_s, min(2.0 * kept_s, backoff_s(p, attempt)))
    more_s = 0.0
    if retry_after_s <= 0.0 and attempt == p.max_attempts - 1 and deadline_at(p, first_launched_at) == math.inf:
        # No wait was stated: the last attempt comes when a limit per minute must have opened again.
        more_s = max(0.0, first_launched_at + FIXED_S - now - wait_s)
    if outlasts(p, retry_after_s):
        s.outwaited += 1
    at = _jittered_at(p, wait_s + more_s, now, u)
    at = _retry_at(p, s, at, is_spent(p, attempt, retry_after_s), keeps_permit(p), first_launched_at)
    if p.hold_on_throttle:
        # Hold until the retry itself, else its jitter would let newer work take the tokens that it waited for; but no
        # longer than the deadline of a request that is launched now.
        held_until = now + wait_s if at == math.inf or more_s > 0.0 else at
        s.hold_until = max(s.hold_until, min(held_until, deadline_at(p, now)))
        s.reopening_s = now - launched_at
    return at


def failed(
    p: Params,
    s: State,
    request: int,
    attempt: int,
    outages: int,
    is_answer: int,
    retry_after_s: float,
    first_launched_at: float,
    launched_at: float,
    now: float,
    u: float,
) -> tuple[float, int]:
    """Return when to retry after a 5xx, time-out or dropped connection, and with which standing; inf = give up.

    There is no hold and no refund, since the provider charged the attempt. `is_answer`: the failure is a 4xx that may
    be retried, which shows that the provider is up. During an outage no attempt is the last, and `spared` tells
    afterwards whether it counts; nor does a request keep its place while nothing is answered, so that another can be
    tried. A wait above the cap that comes with a 5xx is not obeyed and ends nothing: the end of an outage cannot be
    predicted.
    """
    if is_answer:
        answered(p, s, now)
    else:
        _unanswered(p, s, request, attempt == 1 and outages < FRESH_OUTAGES, now)
    at = _jittered_at(p, _wait_s(p, attempt, retry_after_s), now, u)
    is_last = is_spent(p, attempt, retry_after_s if is_answer else -1.0)
    if s.probe_at > -math.inf:
        at = max(at, s.probe_at + PROBE_TURN_S)
        is_last = is_last and spared(p, s, outages, launched_at, now) < 0
    standing = keeps_permit(p) if s.unanswered < 2 else RETRY
    return _retry_at(p, s, at, is_last, standing, first_launched_at), standing


def finalize_opened(p: Params, s: State) -> None:
    """Open a finalize pass, which a truncated answer asks for: the lower concurrency cap holds until the pass ends."""
    s.finalize_open += 1


def finalize_closed(p: Params, s: State) -> None:
    """Close a finalize pass, however it ended."""
    s.finalize_open -= 1


def paused(p: Params, s: State) -> None:
    """Stop all launches until `resumed`. Requests in flight continue."""
    s.paused = 1


def resumed(p: Params, s: State) -> None:
    """Allow launches again."""
    s.paused = 0


# ---------------------------------------------------------------- the queue's order


def rank(
    p: Params, lane: int, attempt: int, expected: float, size: float, sequence: float, standing: int = FIRST
) -> tuple[float, float, float, float]:
    """Return the sort key of a waiting attempt, smallest first: interactive, retries, finalize passes, new work.

    New work goes in order of arrival, or longest expected answer first, so that a batch does not end on a long tail
    (`expected` is the declared output cap, never the answer itself; ties go to the larger reservation, `size`).
    Works elementwise on arrays of `expected`, `size` and `sequence` too. Retries HOLDING their place go before other
    retries: after a change of settings both kinds wait, and one without a place, interactive or not, would wait for the
    places of those behind it.
    """
    if standing == INTERACTIVE:
        return 0.0, -0.5, 0.0, sequence
    if attempt > 1 or standing != FIRST:
        return 0.0, -1.0 if standing == HOLDING else 0.0, 0.0, sequence
    if lane == FINALIZE:
        return 1.0, 0.0, 0.0, sequence
    if p.longest_first:
        return 2.0, -expected, -size, sequence
    return 2.0, 0.0, 0.0, sequence


# ---------------------------------------------------------------- the provider's own count, and changed settings


def _granted(p: Params, s: State, d: int, limit: float, now: float) -> None:
    """Adopt the limit that the provider states in the image; one below the policy's scales the budget."""
    before = _stated_limit(p, s, d)
    s.granted[d] = limit
    if before != limit and before > 0.0:
        s.mirror_at[d] = now + max(0.0, s.mirror_at[d] - now) * before / limit
    if p.limit[d] > 0.0:
        scale = min(1.0, limit / p.limit[d])
        if scale != s.scale[d]:
            _rescaled(s, d, scale, now)
    elif p.sought[d]:
        _rescaled(s, d, limit, now)


def synced(
    p: Params,
    s: State,
    d: int,
    limit: float,
    remaining: float,
    amount: float,
    is_refused: int,
    booked_since: float,
    launched_at: float,
    now: float,
) -> None:
    """Correct our count in dimension `d` by the provider's. Call it after `settled` and before `throttled`.

    `limit` and `remaining` are the stated figures, valid at some moment between launch and answer; a negative value
    means that more than the limit is used. `amount` is the request's booking, `is_refused` whether it was refused;
    `booked_since` is what this pool has booked in that dimension since before the launch: `booked[d]` now, less
    `booked_before[d]` then.

    The moment of the provider's count is unknown. If the count was taken at the launch, the bucket now holds what was
    used then, less what has refilled, plus what was booked since, including by requests that left a moment before. If
    it was taken at the answer, the bucket holds what was used. Of these two corrections to our image only the part
    common to both is made, and of that only the part that the previous count also asked for: one count never overrules
    all others, and errors of either sign, such as rounding, do not add up. A refusal confirms the count that it states.
    A limit other than the known one is believed when it is stated twice in a row, or by a refusal that it explains.

    Ignored are counts of launches before the last one taken over, counts older than the window, and implausible ones
    (above the limit, below zero by more than the limit, not a number).
    """
    length_s = p.length_s[d]
    if not (p.sync_headers and 0.0 < limit < math.inf and -limit <= remaining <= limit):
        return
    if now - launched_at > length_s or launched_at < s.synced_at[d]:
        return
    passed_s = launched_at - s.synced_at[d]
    is_known = limit == s.stated[d] or limit == _stated_limit(p, s, d)
    s.synced_at[d] = launched_at
    s.left[d] = remaining
    s.stated[d] = limit
    if not is_known and not (is_refused and remaining < amount):
        return
    if limit != s.granted[d]:
        _granted(p, s, d, limit, now)
    s.others[d] *= math.exp(-passed_s / MINUTE_S)
    s.surprise[d] *= math.exp(-passed_s / SURPRISE_FADES_S)
    # A refused request is in our image but not in the provider's bucket.
    ours = max(0.0, s.mirror_at[d] - now) * limit / length_s - (amount if is_refused else 0.0)
    used = max(0.0, held_of(p, d, limit) - remaining)
    refilled = limit / length_s * (now - launched_at)
    change = _nearer(used - ours, max(0.0, used - refilled) + booked_since - amount - ours)
    if remaining == 0.0:
        change = max(0.0, change)  # zero remaining does not show how far the limit is exceeded
    if not (is_refused and remaining < amount):
        doubt = s.doubt[d]
        s.doubt[d] = change
        change = _nearer(change, doubt)
    s.doubt[d] -= change
    _corrected(p, s, d, change, now)
    if s.surprise[d] > 0.0:
        s.surprise[d] = max(s.surprise[d], s.others[d])


def _nearer(a: float, b: float) -> float:
    """Return the smaller in magnitude of two changes of the same sign, else 0."""
    if a > 0.0:
        return max(0.0, min(a, b))
    return min(0.0, max(a, b))


def repriced(p_old: Params, p_new: Params, s: State, now: float) -> None:
    """Carry the state over to settings changed in mid-run: used amounts stay used, and the next slot moves.

    Permits and open finalize passes stay. A hold stays too, but ends no later than the new deadline and cap on waits
    allow, counted from now: an absurd wait must not outlast settings that were made against it. Settings without holds
    end it. If the kind of window changes, its content is carried over as one booking made now, which is never looser
    than before.
    """
    for d in range(DIMENSIONS):
        used = used_in(p_old, s, d, now)
        if p_new.limit[d] != p_old.limit[d]:
            s.scale[d] = 1.0
        if p_new.sought[d] != p_old.sought[d]:
            s.scale[d] = s.granted[d] if p_new.sought[d] and s.granted[d] > 0.0 else 1.0
            s.edge[d] = 0.0
            s.since[d] = 0.0
            s.sought_from = -math.inf
        is_other = p_new.window[d] != p_old.window[d] or p_new.length_s[d] != p_old.length_s[d]
        if is_other or p_new.sought[d] != p_old.sought[d]:
            s.full_at[d] = -math.inf
            s.window_at[d] = -math.inf
            s.window_used[d] = 0.0
            s.window_early[d] = 0.0
            s.cell_at[d] = 0.0
            for j in range(CELLS):
                s.cells[d * CELLS + j] = 0.0
            if p_new.limit[d] > 0.0 and used > 0.0:
                _book(p_new, s, d, used, now)
        elif p_new.limit[d] > 0.0 and p_new.window[d] == BUCKET:
            s.full_at[d] = now + used / (p_new.rate_per_s[d] * s.scale[d])
    if p_old.stagger_s > 0.0:
        gap_s = (s.next_slot_at - s.last_launch_at) * (p_new.stagger_s / p_old.stagger_s)
    else:
        gap_s = p_new.stagger_s
    if s.last_launch_at > -math.inf:
        s.next_slot_at = s.last_launch_at + gap_s
    latest = min(deadline_at(p_new, now), now + p_new.retry_after_cap_s)
    s.hold_until = min(s.hold_until, latest) if p_new.hold_on_throttle else -math.inf

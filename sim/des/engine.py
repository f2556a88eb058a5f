"""The scheduler and one simulated run in numbers alone: the one other statement of `governor/scheduler/scheduler.py`.

`sim/des/compiled.py` loads a second copy of this module with compiled functions, and calls it.

Theory of operation. The objects of the scheduler and its SimPy shell (`sim/des/driver.py`) are slots of arrays here;
functions keep their names from there, and `w`, the `World`, takes the place of `self`. The calendar holds answers,
backoffs and deadlines. The next arrival and the one live timer need no entry: at one instant they come after those, in
this order (`sim/des/calendar.py`), and a superseded timer does nothing in either engine.

Nothing is allocated here, so there is no reference counting or collection. Requests come in by chunks of `rows`, in
order of launch or of arrival; latencies, answered work and attempts go out by buffers. If one of these, or a heap,
might overflow at the next event, `proceed` returns: the caller reads on, empties or enlarges, and calls again. The
arrays hold the whole state of the run, so it continues seamlessly.

The module compiles unmodified: numbers, records and arrays only, no dicts, lists, strings, None or exceptions in the
functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from governor import law
from governor.model import requests
from governor.model.keyed import JITTER_RETRY, JITTER_STAGGER, attempt_key, keyed_uniform
from sim.des.run import CHARGED, TIMEOUT
from sim.model import provider as prov

# Why `proceed` returned.
DONE = 0
FULL = 1

# Order of events at one instant: answers, then retries and deadlines; between equals, the order of scheduling.
ANSWER = 0
RETRY_DUE = 1 << 60

# How a request ended: 0 = answered; the outcome of its last attempt if its attempts are spent; or late, or not sent.
DEADLINE_EXCEEDED = 8
OUTWAITED = 9
ENDS = 10

CAUSES = len(requests.CAUSES)
BACKOFF = requests.BACKOFF
NONE = -1


def _causes() -> list[float]:
    return [0.0] * CAUSES


def _ends() -> list[float]:
    return [0.0] * ENDS


def _amounts() -> list[float]:
    return [0.0] * law.DIMENSIONS


@dataclass(slots=True)
class Row:
    """One request as read: see `Columns`. `output`: output tokens after the cap; `cut`: whether the cap cut them.

    `last_*`: the same fields for its finalize pass.
    """

    index: int = 0
    arrival_s: float = 0.0
    expected: float = 0.0
    reserve: float = 0.0
    charge: float = 0.0
    prompt: float = 0.0
    output: float = 0.0
    recorded_s: float = 0.0
    cut: int = 0
    last_reserve: float = 0.0
    last_charge: float = 0.0
    last_output: float = 0.0


@dataclass(slots=True)
class Job:
    """One request in progress, as in the SimPy driver. `number`: serial number of the job. `next_free`: next free slot.

    `since`: the clock by cause when the job became eligible; from its launch on, its waits by cause. Only used if
    attempts are recorded. `stated_*`: what the answer's headers will state, and `booked`, what the law had booked by
    its launch; only used if the policy reads them. `need`, `used`: what it reserves and will use of each dimension.
    """

    number: int = 0
    next_free: int = 0
    index: int = 0
    lane: int = 0
    attempt: int = 0
    standing: int = 0
    asked: int = 0
    ended: int = 0
    tries: int = 0
    outages: int = 0
    failed_s: float = 0.0
    outcome: int = 0
    cut: int = 0
    expected: float = 0.0
    reserve: float = 0.0
    charge: float = 0.0
    prompt: float = 0.0
    output: float = 0.0
    recorded_s: float = 0.0
    last_reserve: float = 0.0
    last_charge: float = 0.0
    last_output: float = 0.0
    arrived_s: float = 0.0
    submitted_s: float = 0.0
    eligible_s: float = 0.0
    first_launched_s: float = 0.0
    launched_s: float = 0.0
    charged: float = 0.0
    retry_after_s: float = 0.0
    stated_limit: list[float] = field(default_factory=_amounts)
    stated_left: list[float] = field(default_factory=_amounts)
    booked: list[float] = field(default_factory=_amounts)
    need: list[float] = field(default_factory=_amounts)
    used: list[float] = field(default_factory=_amounts)
    since: list[float] = field(default_factory=_causes)


@dataclass(slots=True)
class Event:
    """An entry of the calendar. `order`: rank among events at one instant.

    `number`, `tries`: for a deadline, its job's number and launches so far; NONE for answers and retries.
    """

    at: float = 0.0
    order: int = 0
    slot: int = 0
    number: int = 0
    tries: int = 0


@dataclass(slots=True)
class Entry:
    """An entry of the queue: the law's rank, then the order of queueing. `again`: a retry or a finalize pass."""

    first: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0
    sequence: int = 0
    slot: int = 0
    again: int = 0


@dataclass(slots=True)
class Answers:
    """Output buffers in two groups, each with its own fill level.

    `latency_s`: of answered requests, from arrival to the last answer. The other fields: what the bound needs of
    answered requests that arrived after 0, as in `summary.Work`.
    """

    latency_s: float = 0.0
    arrived_s: float = 0.0
    charge: float = 0.0
    counted: float = 0.0
    service_s: float = 0.0


@dataclass(slots=True)
class Ended:
    """An attempt that ended at `now`; `code`: how its request ended with it, NONE = the request continues."""

    index: int = 0
    lane: int = 0
    attempt: int = 0
    outcome: int = 0
    code: int = 0
    arrived_s: float = 0.0
    submitted_s: float = 0.0
    eligible_s: float = 0.0
    launched_s: float = 0.0
    now: float = 0.0
    reserve: float = 0.0
    charged: float = 0.0
    output: float = 0.0
    retry_after_s: float = 0.0
    waits_s: list[float] = field(default_factory=_causes)


@dataclass(slots=True)
class Run:
    """The run's own numbers: the SimPy driver's attributes, its tally, and how full the arrays are.

    `row`: requests taken from `rows` so far; `rows` holds the requests from `rows_from` to before `rows_until`.
    `urgent`: retries and finalize passes in the queue, including those that have ended there.
    """

    seed: int = 0
    requests: int = 0
    finalize_max_tokens: int = 0
    from_trace: int = 0
    recording: int = 0
    # Progress of the run.
    begun: int = 0
    pumping: int = 1
    now: float = 0.0
    row: int = 0
    rows_from: int = 0
    rows_until: int = 0
    head: int = NONE
    sequence: int = 0
    events: int = 0
    clock_at: float = 0.0
    cause: int = 0
    waiting: int = 0
    flying: int = 0
    # Requests set aside: their number, how many of them by their deadline, and the first and the last moment at which
    # one was set aside.
    aside: int = 0
    aside_late: int = 0
    aside_first_s: float = 0.0
    aside_last_s: float = 0.0
    timer_at: float = inf
    stopped: int = 0
    clock: list[float] = field(default_factory=_causes)
    # How full the arrays are.
    jobs_made: int = 0
    free: int = NONE
    calendar_size: int = 0
    queue_size: int = 0
    urgent: int = 0
    latencies_size: int = 0
    answered_size: int = 0
    attempts_size: int = 0
    # The tally.
    ended: int = 0
    completed: int = 0
    failed: int = 0
    attempts: int = 0
    throttled: int = 0
    finalize_passes: int = 0
    peak_in_flight: int = 0
    last_s: float = 0.0
    reserved_tokens: float = 0.0
    charged_tokens: float = 0.0
    used_tokens: float = 0.0
    extra_prompt_tokens: float = 0.0
    extra_output_tokens: float = 0.0
    work_requests: int = 0
    work_charged: float = 0.0
    work_counted: float = 0.0
    work_returned: float = 0.0
    work_shortest_s: float = inf
    work_latest_s: float = 0.0
    work_inputs: float = 0.0
    waits_s: list[float] = field(default_factory=_causes)
    deferrals: list[float] = field(default_factory=_causes)
    failures: list[float] = field(default_factory=_ends)


class World(NamedTuple):
    """All data of a run: records of law, provider and run, and arrays of the other dataclasses above."""

    p: Any
    s: Any
    pp: Any
    ps: Any
    run: Any
    rows: Any
    jobs: Any
    calendar: Any
    queue: Any
    answers: Any
    attempts: Any


# ---------------------------------------------------------------- the heaps


def _sooner(a: Any, b: Any) -> bool:
    """Return whether event `a` comes before `b`."""
    return a.at < b.at or (a.at == b.at and a.order < b.order)


def _schedule(w: World, at: float, kind: int, slot: int, number: int, tries: int) -> None:
    """Add an answer, a retry or a deadline to the calendar."""
    run, calendar = w.run, w.calendar
    run.events += 1
    order = kind + run.events
    i = run.calendar_size
    run.calendar_size += 1
    while i > 0:
        parent = (i - 1) >> 1
        if calendar[parent].at < at or (calendar[parent].at == at and calendar[parent].order < order):
            break
        calendar[i] = calendar[parent]
        i = parent
    event = calendar[i]
    event.at = at
    event.order = order
    event.slot = slot
    event.number = number
    event.tries = tries


def _drop_soonest(w: World) -> None:
    """Remove the first event of the calendar."""
    run, calendar = w.run, w.calendar
    run.calendar_size -= 1
    size = run.calendar_size
    i, child = 0, 1
    while child < size:
        if child + 1 < size and _sooner(calendar[child + 1], calendar[child]):
            child += 1
        if _sooner(calendar[size], calendar[child]):
            break
        calendar[i] = calendar[child]
        i = child
        child = 2 * i + 1
    calendar[i] = calendar[size]


def _ranks_before(a: Any, b: Any) -> bool:
    """Return whether queue entry `a` comes before `b`."""
    if a.first != b.first:
        return a.first < b.first
    if a.second != b.second:
        return a.second < b.second
    if a.third != b.third:
        return a.third < b.third
    if a.fourth != b.fourth:
        return a.fourth < b.fourth
    return a.sequence < b.sequence


def _queued(w: World, slot: int, again: int) -> None:
    """Add the job to the queue, in the law's order: retries and finalize passes go before new work."""
    run, queue, job = w.run, w.queue, w.jobs[slot]
    run.sequence += 1
    key = law.rank(w.p, job.lane, job.attempt, job.expected, job.reserve, float(run.sequence), job.standing)
    i = run.queue_size
    run.queue_size += 1
    # The entry itself is held behind the last one while it is sifted up.
    entry = queue[run.queue_size]
    entry.first, entry.second, entry.third, entry.fourth = key
    entry.sequence = run.sequence
    entry.slot = slot
    entry.again = again
    run.urgent += again
    while i > 0:
        parent = (i - 1) >> 1
        if not _ranks_before(entry, queue[parent]):
            break
        queue[i] = queue[parent]
        i = parent
    queue[i] = entry


def _drop_first(w: World) -> None:
    """Remove the first entry of the queue."""
    run, queue = w.run, w.queue
    run.urgent -= queue[0].again
    run.queue_size -= 1
    size = run.queue_size
    i, child = 0, 1
    while child < size:
        if child + 1 < size and _ranks_before(queue[child + 1], queue[child]):
            child += 1
        if _ranks_before(queue[size], queue[child]):
            break
        queue[i] = queue[child]
        i = child
        child = 2 * i + 1
    queue[i] = queue[size]


# ---------------------------------------------------------------- the queue


def _new_slot(w: World) -> int:
    """Return a slot for a new job."""
    run = w.run
    slot = run.free
    if slot == NONE:
        slot = run.jobs_made
        run.jobs_made += 1
    else:
        run.free = w.jobs[slot].next_free
    return slot


def _freed(w: World, slot: int) -> None:
    """Free the job's slot; an event made for the job will find another number there, or none."""
    job = w.jobs[slot]
    job.number = NONE
    job.next_free = w.run.free
    w.run.free = slot


def _begun(w: World, slot: int, submitted_s: float) -> None:
    """Initialise a new job's slot."""
    run, job = w.run, w.jobs[slot]
    run.events += 1
    job.number = run.events
    job.attempt = 1
    job.standing = law.FIRST
    job.asked = 0
    job.ended = 0
    job.tries = 0
    job.outages = 0
    job.failed_s = -1.0
    job.submitted_s = submitted_s
    job.eligible_s = submitted_s


def _need(pp: Any, job: Any) -> None:
    """Fill in what the job reserves and what it will use of each dimension."""
    used = job.prompt + job.output
    for d in range(pp.dimensions):
        job.need[d] = pp.per_request[d] + prov.amount_of(pp, d, job.reserve, job.prompt)
        job.used[d] = pp.per_request[d] + prov.amount_of(pp, d, used, job.prompt)


def _next(w: World) -> int:
    """Return the next job in order of launch (a batch) or of arrival (a trace); NONE after the last."""
    run = w.run
    if run.row >= run.requests:
        return NONE
    row = w.rows[run.row - run.rows_from]
    run.row += 1
    slot = _new_slot(w)
    job = w.jobs[slot]
    _begun(w, slot, row.arrival_s)
    job.index = row.index
    job.lane = law.MAIN
    job.expected = row.expected
    job.reserve = row.reserve
    job.charge = row.charge
    job.prompt = row.prompt
    job.output = row.output
    _need(w.pp, job)
    job.recorded_s = row.recorded_s
    job.arrived_s = row.arrival_s
    job.first_launched_s = -1.0
    if run.finalize_max_tokens:
        job.cut = row.cut
        job.last_reserve = row.last_reserve
        job.last_charge = row.last_charge
        job.last_output = row.last_output
    if run.recording:
        for cause in range(CAUSES):
            job.since[cause] = 0.0
    return slot


def _may_go(w: World, slot: int, now: float, again: int) -> None:
    """Make the job eligible: from now on its waiting is counted. `again`: 0 for new work, else 1."""
    run, job = w.run, w.jobs[slot]
    job.eligible_s = now
    job.asked = 0
    job.ended = 0
    if run.recording:
        for cause in range(CAUSES):
            job.since[cause] = run.clock[cause]
    run.waiting += 1
    _queued(w, slot, again)


def _first(w: World) -> int:
    run = w.run
    while run.urgent > 0 and w.jobs[w.queue[0].slot].ended:
        _freed(w, w.queue[0].slot)
        _drop_first(w)
    if run.queue_size > 0:
        return w.queue[0].slot
    return run.head


def _taken(w: World, slot: int) -> None:
    """Remove the head from its queue."""
    run = w.run
    run.waiting -= 1
    if slot == run.head:
        run.head = _next(w)
    else:
        _drop_first(w)


# ---------------------------------------------------------------- time


def _advance(w: World, now: float) -> None:
    """Advance the clocks to `now`, under the cause that has held since the last event."""
    run = w.run
    passed = now - run.clock_at
    if passed > 0.0:
        run.clock[run.cause] += passed
        if not run.stopped:
            run.waits_s[run.cause] += passed * run.waiting
        run.clock_at = now


def _has_room(w: World) -> bool:
    """Return whether the arrays have room for one more event or launch, and the next request has been read."""
    run = w.run
    return (
        (run.row < run.rows_until or run.row == run.requests)
        and run.jobs_made + 2 <= len(w.jobs)
        and run.calendar_size + 3 <= len(w.calendar)
        and run.queue_size + 3 <= len(w.queue)
        and run.latencies_size < len(w.answers)
        and run.answered_size < len(w.answers)
        and run.attempts_size < len(w.attempts)
    )


def _pump(w: World, now: float) -> bool:
    """Launch what the law admits now, and set the timer to the moment at which it will admit the next job.

    Return False if it could not finish for lack of room and must be called again.
    """
    p, s, run = w.p, w.s, w.run
    while _has_room(w):
        slot = NONE if run.stopped else _first(w)
        if slot == NONE:
            run.cause = law.NOTHING
            run.timer_at = inf
            if run.aside and not run.stopped and run.aside == run.requests - run.ended:
                _end_aside(w)  # too few to be sure, and nothing else is left
            return True
        job = w.jobs[slot]
        if law.never_fits(p, job.need):
            _taken(w, slot)
            _give_up(w, slot, now, prov.TOO_LARGE)
            continue
        at, cause = law.admission(p, s, job.need, job.standing, now)
        if at > now:
            run.cause = cause
            bit = 1 << cause
            if not job.asked & bit:
                job.asked |= bit
                run.deferrals[cause] += 1.0
            run.timer_at = at
            return True
        if job.first_launched_s >= 0.0 and law.deadline_at(p, job.first_launched_s) <= now:
            _taken(w, slot)
            _give_up(w, slot, now, DEADLINE_EXCEEDED)
            continue
        _launch(w, slot, now)
    return False


def _launch(w: World, slot: int, now: float) -> None:
    """Launch one attempt: the law books it, the provider answers it, and its answer enters the calendar."""
    p, s, run, job = w.p, w.s, w.run, w.jobs[slot]
    _taken(w, slot)
    if job.failed_s >= 0.0:
        _spare(w, slot)
    job.tries += 1
    key = attempt_key(job.lane, job.tries)
    u = 0.5
    if p.stagger_s > 0.0 and job.standing == law.FIRST:
        u = keyed_uniform(run.seed, job.index, key, JITTER_STAGGER)
    law.launched(p, s, job.need, job.standing, now, u)
    run.attempts += 1
    run.flying += 1
    run.peak_in_flight = max(run.peak_in_flight, run.flying)
    run.reserved_tokens += job.reserve
    job.launched_s = now
    if job.first_launched_s < 0.0:
        job.first_launched_s = now
    outcome, service_s, _, retry_after_s = prov.answered(
        w.pp, w.ps, run.seed, job.index, key, job.charge, job.output, job.recorded_s, now, -1.0, job.prompt
    )
    job.charged = job.charge if outcome in CHARGED else 0.0
    run.charged_tokens += job.charged
    if p.sync_headers:
        for d in range(p.dimensions):
            job.booked[d] = s.booked_before[d]
        _state(w, slot)
    if run.recording:
        for cause in range(CAUSES):
            job.since[cause] = run.clock[cause] - job.since[cause]
    at = now + service_s
    expires_at = law.expires_at(p, job.first_launched_s, now)
    if at > expires_at:
        at = expires_at
        outcome = TIMEOUT
        retry_after_s = -1.0
    job.outcome = outcome
    job.retry_after_s = retry_after_s
    _schedule(w, at, ANSWER, slot, NONE, NONE)


def _spare(w: World, slot: int) -> None:
    """Spare the job's last failed attempt, so that it does not count, if it fell into an outage known by now."""
    job = w.jobs[slot]
    outages = law.spared(w.p, w.s, job.outages, job.launched_s, job.failed_s)
    if outages >= 0:
        job.outages = outages
        job.attempt -= 1
    job.failed_s = -1.0


def _state(w: World, slot: int) -> None:
    """Store what the answer's headers will state: limits and remaining amounts, a limit of 0 = not stated."""
    pp, ps, job = w.pp, w.ps, w.jobs[slot]
    for d in range(pp.dimensions):
        job.stated_limit[d] = 0.0
        if prov.is_stated(pp, ps, d):
            job.stated_limit[d] = prov.limit_now(pp, ps, d)
            job.stated_left[d] = prov.remaining(pp, ps, d)


# ---------------------------------------------------------------- events: true if the head must be reconsidered


def _on_arrival(w: World, now: float) -> bool:
    _advance(w, now)
    _may_go(w, _next(w), now, 0)
    return True


def _on_retry_due(w: World, slot: int, now: float) -> bool:
    _advance(w, now)
    _may_go(w, slot, now, 1)
    _watch_deadline(w, slot)
    return True


def _watch_deadline(w: World, slot: int) -> None:
    job = w.jobs[slot]
    gives_up_at = law.deadline_at(w.p, job.first_launched_s)
    if gives_up_at < inf:
        _schedule(w, gives_up_at, RETRY_DUE, slot, job.number, job.tries)


def _on_deadline(w: World, slot: int, number: int, tries: int, now: float) -> bool:
    """End a retry or finalize pass that still waits for its launch at its request's deadline."""
    job = w.jobs[slot]
    if job.number != number or job.ended or job.tries != tries or job.launched_s >= job.eligible_s:
        return False
    _advance(w, now)
    w.run.waiting -= 1
    job.ended = 1
    _given_up(w, slot, now, DEADLINE_EXCEEDED)
    return True


def _on_wake(w: World, now: float) -> bool:
    w.run.timer_at = inf
    _advance(w, now)
    return True


def _on_answer(w: World, slot: int, now: float) -> bool:
    p, s, run, job = w.p, w.s, w.run, w.jobs[slot]
    _advance(w, now)
    run.flying -= 1
    outcome = job.outcome
    unheard = outcome == TIMEOUT or outcome == prov.DROPPED
    if unheard or (outcome == prov.OK and job.lane == law.FINALIZE):
        run.extra_prompt_tokens += job.prompt
        run.extra_output_tokens += job.output
    if not unheard:
        _left(w, slot, now)
        if outcome != prov.OK:
            _sync(w, slot, now)
    if outcome == prov.OK:
        in_wait = run.cause
        _on_ok(w, slot, now)
        return law.answer_may_admit(p, in_wait) or run.urgent > 0
    if outcome == prov.TOO_LARGE:
        law.released(p, s)
        law.answered(p, s, now)
        _ended(w, slot, now, outcome)
        return True
    if outcome == prov.QUOTA:
        law.released(p, s)
        law.answered(p, s, now)
        if job.lane == law.FINALIZE:
            law.finalize_closed(p, s)
        if run.recording:
            _record(w, slot, now, outcome)
        _freed(w, slot)
        _stop(w, prov.QUOTA)
        return True
    u = keyed_uniform(run.seed, job.index, attempt_key(job.lane, job.tries), JITTER_RETRY)
    if outcome == prov.THROTTLED or outcome == prov.SLOW_DOWN:
        run.throttled += 1
        at = law.throttled(p, s, job.need, job.attempt, job.retry_after_s, job.first_launched_s, job.launched_s, now, u)
        standing = law.keeps_permit(p)
    else:
        at, standing = law.failed(
            p,
            s,
            job.index,
            job.attempt,
            job.outages,
            0,
            job.retry_after_s,
            job.first_launched_s,
            job.launched_s,
            now,
            u,
        )
        job.failed_s = now
    _again(w, slot, now, at, standing)
    return True


def _left(w: World, slot: int, now: float) -> None:
    """Let the answer leave the provider: book real use, then state counts if the provider dates them by the answer."""
    pp, ps, run, job = w.pp, w.ps, w.run, w.jobs[slot]
    if job.outcome == prov.OK:
        prov.settled(pp, ps, run.seed, job.charge, job.prompt + job.output, now, job.prompt)
    if pp.counts == prov.COUNTS_AT_ANSWER:
        prov.advanced(pp, ps, run.seed, now)
        _state(w, slot)


def _sync(w: World, slot: int, now: float) -> None:
    """Synchronise the law with the headers' counts, given what has been booked since the launch."""
    p, s, job = w.p, w.s, w.jobs[slot]
    at, refused = job.launched_s, int(job.outcome not in CHARGED)
    if not (p.sync_headers and prov.states_counts(w.pp, refused > 0)):
        return
    for d in range(p.dimensions):
        if job.stated_limit[d] > 0.0:
            since = s.booked[d] - job.booked[d]
            law.synced(p, s, d, job.stated_limit[d], job.stated_left[d], job.need[d], refused, since, at, now)


def _on_ok(w: World, slot: int, now: float) -> None:
    run, job = w.run, w.jobs[slot]
    used = job.prompt + job.output
    law.settled(w.p, w.s, job.need, job.used, job.launched_s, now)
    if run.aside and not run.stopped and job.launched_s >= run.aside_first_s:
        _end_aside(w)
    _sync(w, slot, now)
    run.used_tokens += used
    if job.lane == law.MAIN:
        _worked(w, slot, used, now - job.launched_s)
    elif job.charge > used:
        run.work_returned += job.charge - used
    if run.finalize_max_tokens and job.lane == law.MAIN and _came_back_empty(w, slot):
        _open_finalize(w, slot, now)
    else:
        _ended(w, slot, now, 0)


def _worked(w: World, slot: int, used: float, service_s: float) -> None:
    """Add to the bound's input, as `Work.add` does."""
    run, job = w.run, w.jobs[slot]
    arrived_s, charge = job.arrived_s, job.charge
    counted = min(charge, used)
    run.work_latest_s = max(run.work_latest_s, arrived_s + service_s)
    if arrived_s <= 0.0:
        run.work_requests += 1
        run.work_charged += charge
        run.work_counted += counted
        run.work_shortest_s = min(run.work_shortest_s, service_s)
        run.work_inputs += min(job.prompt, charge)
    else:
        answered = w.answers[run.answered_size]
        run.answered_size += 1
        answered.arrived_s = arrived_s
        answered.charge = charge
        answered.counted = counted
        answered.service_s = service_s


def _came_back_empty(w: World, slot: int) -> bool:
    job = w.jobs[slot]
    return job.cut > 0 and prov.cut_without_text(w.pp, w.run.seed, job.index)


def _open_finalize(w: World, slot: int, now: float) -> None:
    """Open a finalize pass, before new work, for an answer that was cut off without usable text."""
    run, job = w.run, w.jobs[slot]
    if run.recording:
        _record(w, slot, now, NONE)
    law.finalize_opened(w.p, w.s)
    run.finalize_passes += 1
    # The same slot becomes the finalize pass; it keeps index, prompt, recorded time, arrival and first launch.
    _begun(w, slot, now)
    job.lane = law.FINALIZE
    job.reserve = job.last_reserve
    job.charge = job.last_charge
    job.output = job.last_output
    _need(w.pp, job)
    job.launched_s = -1.0
    _may_go(w, slot, now, 1)
    _watch_deadline(w, slot)


def _again(w: World, slot: int, now: float, at: float, standing: int) -> None:
    """Schedule a retry at `at` after a throttle or a failure; inf = never."""
    run, job = w.run, w.jobs[slot]
    if at == inf:
        code = job.outcome if law.is_spent(w.p, job.attempt, job.retry_after_s) else DEADLINE_EXCEEDED
        is_refused = job.outcome == prov.THROTTLED or job.outcome == prov.SLOW_DOWN
        if is_refused and job.lane == law.MAIN and law.outlasts(w.p, job.retry_after_s):
            if run.recording:
                _record(w, slot, now, code)
            if run.aside == 0:
                run.aside_first_s = now
            run.aside += 1
            run.aside_late += int(code == DEADLINE_EXCEEDED)
            run.aside_last_s = now
            _freed(w, slot)
        else:
            _ended(w, slot, now, code)
        if law.is_shut_out(w.s):
            _stop(w, OUTWAITED)
        return
    if run.recording:
        _record(w, slot, now, NONE)
    run.waits_s[BACKOFF] += at - now
    job.attempt += 1
    if job.failed_s >= 0.0 and w.s.probe_at > -inf:
        _spare(w, slot)
    job.standing = standing
    job.submitted_s = now
    _schedule(w, at, RETRY_DUE, slot, NONE, NONE)


def _give_up(w: World, slot: int, now: float, code: int) -> None:
    """Give up a job that is in no queue and will not be launched again."""
    _given_up(w, slot, now, code)
    _freed(w, slot)


def _given_up(w: World, slot: int, now: float, code: int) -> None:
    if w.jobs[slot].standing == law.HOLDING:
        law.released(w.p, w.s)
    _close(w, slot, now, code)


def _stop(w: World, code: int) -> None:
    """Stop launching (no credit, or only waits that are too long); waiting jobs stay pending."""
    if not w.run.stopped:
        w.run.stopped = code


def _end_aside(w: World) -> None:
    """Count the requests set aside as lost: each ended when it was refused."""
    run = w.run
    run.ended += run.aside
    run.failed += run.aside
    run.failures[DEADLINE_EXCEEDED] += run.aside_late
    run.failures[prov.THROTTLED] += run.aside - run.aside_late
    run.last_s = max(run.last_s, run.aside_last_s)
    run.aside = 0
    run.aside_late = 0


def _closed(w: World) -> None:
    """Close the run: jobs left pending by a stop release what they hold and count as lost."""
    run = w.run
    for i in range(run.calendar_size):
        if w.calendar[i].number == NONE:
            _dropped(w, w.calendar[i].slot)
    for i in range(run.queue_size):
        if not w.jobs[w.queue[i].slot].ended:
            _dropped(w, w.queue[i].slot)
    pending = run.requests - run.ended
    run.ended += pending
    run.failed += pending
    run.failures[run.stopped] += pending
    if pending:
        run.last_s = max(run.last_s, run.clock_at)


def _dropped(w: World, slot: int) -> None:
    job = w.jobs[slot]
    if job.standing == law.HOLDING:
        law.released(w.p, w.s)
    if job.lane == law.FINALIZE:
        law.finalize_closed(w.p, w.s)


def _ended(w: World, slot: int, now: float, code: int) -> None:
    """End the request with this attempt: answered (0) or lost."""
    if w.run.recording:
        _record(w, slot, now, code)
    _close(w, slot, now, code)
    _freed(w, slot)


def _close(w: World, slot: int, now: float, code: int) -> None:
    run, job = w.run, w.jobs[slot]
    if job.lane == law.FINALIZE:
        law.finalize_closed(w.p, w.s)
    run.ended += 1
    if code:
        run.failed += 1
        run.failures[code] += 1.0
    else:
        run.completed += 1
        w.answers[run.latencies_size].latency_s = now - job.arrived_s
        run.latencies_size += 1
    run.last_s = max(run.last_s, now)


def _record(w: World, slot: int, now: float, code: int) -> None:
    run, job = w.run, w.jobs[slot]
    row = w.attempts[run.attempts_size]
    run.attempts_size += 1
    row.index = job.index
    row.lane = job.lane
    row.attempt = job.attempt
    row.outcome = job.outcome
    row.code = code
    row.arrived_s = job.arrived_s
    row.submitted_s = job.submitted_s
    row.eligible_s = job.eligible_s
    row.launched_s = job.launched_s
    row.now = now
    row.reserve = job.reserve
    row.charged = job.charged
    row.output = job.output
    row.retry_after_s = job.retry_after_s
    for cause in range(CAUSES):
        row.waits_s[cause] = job.since[cause]


def _step(w: World) -> bool:
    """Process the next event; return whether the head must be reconsidered after it."""
    run = w.run
    arrives_at = inf
    if run.from_trace and run.row < run.requests and not run.stopped:
        arrives_at = w.rows[run.row - run.rows_from].arrival_s
    event = w.calendar[0]
    if run.calendar_size > 0 and event.at <= arrives_at and event.at <= run.timer_at:
        at, order, slot, number, tries = event.at, event.order, event.slot, event.number, event.tries
        _drop_soonest(w)
        run.now = at
        if order < RETRY_DUE:
            return _on_answer(w, slot, at)
        if run.stopped:
            if number == NONE:
                _dropped(w, slot)
            return False
        if number == NONE:
            return _on_retry_due(w, slot, at)
        return _on_deadline(w, slot, number, tries, at)
    run.now = min(arrives_at, run.timer_at)
    if arrives_at <= run.timer_at:
        return _on_arrival(w, arrives_at)
    return _on_wake(w, run.timer_at)


def proceed(
    p: Any,
    s: Any,
    pp: Any,
    ps: Any,
    run: Any,
    rows: Any,
    jobs: Any,
    calendar: Any,
    queue: Any,
    answers: Any,
    attempts: Any,
) -> int:
    """Continue the run; return DONE after the last event, FULL if the caller must read, empty or enlarge first.

    Arrays as in `World`; the five records are passed as arrays of shape (1,).
    """
    w = World(p[0], s[0], pp[0], ps[0], run[0], rows, jobs, calendar, queue, answers, attempts)
    r = w.run
    if not r.begun:
        r.begun = 1
        if not r.from_trace:
            r.waiting = r.requests
            r.head = _next(w)
    while True:
        if r.pumping:
            if not _pump(w, r.now):
                return FULL
            r.pumping = 0
        if r.flying == 0 and r.stopped:
            _closed(w)
            return DONE
        if r.calendar_size == 0 and r.timer_at == inf and (not r.from_trace or r.row == r.requests):
            return DONE
        if not _has_room(w):
            return FULL
        if _step(w):
            r.pumping = 1


def proceed_all(
    p: Any,
    s: Any,
    pp: Any,
    ps: Any,
    runs: Any,
    rows: Any,
    jobs: Any,
    calendar: Any,
    queue: Any,
    answers: Any,
    attempts: Any,
    s_now: Any,
    s_new: Any,
    ps_now: Any,
    ps_new: Any,
) -> int:
    """Make the runs one after the other, or continue the first; return how many were done before one needs the caller.

    `answers` is shared out evenly. `s_now`, `ps_now`: the states of law and provider as flat numbers, as far as they
    must be reset; `s_new`, `ps_new`: what they are reset to. Several runs end with one that leaks a permit.
    """
    each = len(answers) // len(runs)
    for i in range(len(runs)):
        if not runs[i].begun:
            for at in range(len(s_new)):
                s_now[at] = s_new[at]
            for at in range(len(ps_new)):
                ps_now[at] = ps_new[at]
        mine = answers[i * each : (i + 1) * each]
        if proceed(p, s, pp, ps, runs[i : i + 1], rows, jobs, calendar, queue, mine, attempts) != DONE:
            return i
        if len(runs) > 1 and (s[0].in_flight != 0 or s[0].finalize_open != 0):
            return i
    return len(runs)

"""What the tests of the law share: parameters built by hand, and a driver without a clock.

`Pool` does what every driver does and nothing else: it asks the law about the head of the queue, launches when the law
says now, and reports how attempts end. Its time is the calendar's; its provider is a function of the test. On the way
it holds the law to what each answer promises (see `promised`), so every timetable checks that as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from governor import law
from governor.model.needs import of_tokens

WINDOWS = (law.FIXED, law.SLIDING, law.BUCKET)
INF = math.inf

OK = "ok"
THROTTLED = "throttled"
FAILED = "failed"
GONE = "gone"
EXHAUSTED = "exhausted"


def each(*values: float, rest: float = 0.0) -> list[float]:
    """An array with these values for the first dimensions, and `rest` for the others."""
    return [*map(float, values), *[rest] * (law.DIMENSIONS - len(values))]


def params(
    tpm: float = 30_000, rpm: float = 0, tpd: float = 0, rpd: float = 0, headroom: float = 0.15, **changes: Any
) -> law.Params:
    """The guardrails, as numbers, with what a test changes. Daily limits have no headroom here.

    `window`, `burst_ratio`: of both limits per minute. `settles`, `refunds`: of both limits of tokens.
    """
    limit = each(tpm, rpm, tpd, rpd)
    ratio = each(headroom, headroom)
    length_s = each(60.0, 60.0, 86_400.0, 86_400.0, rest=60.0)
    for name in ("window", "burst_ratio", "settles", "refunds"):
        value = changes.get(name)
        if isinstance(value, int | float):
            changes[name] = {
                "window": each(value, value, law.BUCKET, law.BUCKET),
                "burst_ratio": each(value, value, rest=1.0),
            }.get(name, each(value, 0, value, 0))
    p = law.Params(
        max_concurrency=3,
        stagger_s=15.0,
        jitter_ratio=0.2,
        jitter_cap_s=3.0,
        interactive_ratio=0.0,
        longest_first=0,
        max_attempts=5,
        backoff_base_s=2.0,
        backoff_cap_s=60.0,
        backoff_keeps_permit=1,
        hold_on_throttle=0,
        sync_headers=0,
        finalize_lowers=1,
        finalize_max_concurrency=2,
        retry_after_cap_s=math.inf,
        timeout_s=600.0,
        deadline_s=0.0,
        seeks=0,
        dimensions=4,
        limit=limit,
        budget=list(map(law.budget_of, limit, ratio)),
        rate_per_s=list(map(law.rate_of, limit, ratio, length_s)),
        length_s=length_s,
        window=each(law.FIXED, law.FIXED, law.BUCKET, law.BUCKET),
        phase_s=each(),
        burst_ratio=each(rest=1.0),
        held=each(),
        largest=each(),
        shared=each(),
        sought=each(),
        settles=each(),
        refunds=each(),
        cause=each(law.BY_TPM, law.BY_RPM, law.BY_DAY, law.BY_DAY),
    )
    for name, value in changes.items():
        assert hasattr(p, name), name
        setattr(p, name, value)
    return burst(p)


def burst(p: law.Params) -> law.Params:
    """The same settings, with what follows from the limits and the bursts."""
    p.held = list(map(law.burst_of, p.budget, p.burst_ratio))
    p.shared = p.held.copy()
    p.largest = list(map(law.burst_of, [n or INF for n in p.limit], p.burst_ratio))
    return p


def sought(p: law.Params, d: int) -> law.Params:
    """The same settings, but the law has to find the limit of dimension `d`."""
    p.seeks = p.hold_on_throttle = 1
    p.limit[d], p.budget[d], p.rate_per_s[d], p.window[d] = 0.0, 1.0, 1.0 / p.length_s[d], law.BUCKET
    p.burst_ratio[d] = p.held[d] = law.SOUGHT_BURST_S / p.length_s[d]
    p.largest[d], p.shared[d], p.sought[d] = INF, INF, 1.0
    return p


def free(**changes: Any) -> law.Params:
    """No limit but those that a test sets."""
    return params(**({"tpm": 0, "max_concurrency": 1_000, "stagger_s": 0.0} | changes))


@dataclass(slots=True)
class Job:
    """One request: what it reserves, and where it stands."""

    index: int
    reserve: float
    attempt: int = 1
    standing: int = law.FIRST
    lane: int = law.MAIN
    first_launched_at: float = -1.0
    launched_at: float = -1.0
    asked: set[int] = field(default_factory=set)
    failed_at: float = -1.0
    outages: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """How an attempt ends: after so many seconds, and how."""

    after_s: float
    kind: str = OK
    used: float = 0.0
    retry_after_s: float = -1.0
    u: float = 0.0


def after(seconds: float, **reply: Any) -> Callable[[Job, float], Reply]:
    """Every attempt is answered after so many seconds."""
    return lambda job, now: Reply(seconds, **reply)


def by_attempt(*replies: Reply) -> Callable[[Job, float], Reply]:
    """The first attempt of a request ends like this, the second like that; later ones like the last."""
    return lambda job, now: replies[min(job.attempt, len(replies)) - 1]


@dataclass(frozen=True, slots=True)
class Launch:
    at: float
    index: int
    reserve: float
    attempt: int
    standing: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Booking:
    """A change of what the budgets hold: a launch, or what became of its tokens at a later moment."""

    at: float
    launch: int
    tokens: float
    launches: bool


def promised(p: law.Params, s: law.State, reserve: float, standing: int, now: float) -> tuple[float, int]:
    """The law's answer, which must also be the one between now and then, and at that moment "now"."""
    at, cause = law.admission(p, s, of_tokens(reserve), standing, now)
    assert at == law.admit_at(p, s, of_tokens(reserve), standing, now)
    assert at >= now
    assert (cause == law.NOTHING) == (at == now)
    if now < at < math.inf:
        for share in (1e-9, 0.3, 0.7, 0.9999):
            between = now + share * (at - now)
            if between < at:
                assert law.admission(p, s, of_tokens(reserve), standing, between) == (at, cause)
        assert law.admission(p, s, of_tokens(reserve), standing, at) == (at, law.NOTHING)
    if at == math.inf:
        # A driver with nothing in flight always gets a moment to wake at. And who kept its place in flight always does,
        # since all those in flight may be waiting like itself.
        assert s.paused or (s.in_flight > 0 and standing != law.HOLDING)
        assert cause == (law.PAUSED if s.paused else law.CONCURRENCY)
    return at, cause


class Pool:
    """A virtual driver. `launches`, `bookings` and `ends` tell what happened; `waits` what the law answered."""

    def __init__(
        self, p: law.Params, reserves: list[float], reply: Callable[[Job, float], Reply], u: float = 0.5
    ) -> None:
        self.p = p
        self.s = law.State()
        self.reply = reply
        self.u = u
        self.calendar: list[tuple[float, int, int, Callable[[float], None]]] = []
        self.queue: list[tuple[tuple[float, ...], int, Job]] = []
        self.sequence = 0
        self.wake_at = math.inf
        self.in_air = 0
        self.holding = 0
        self.launches: list[Launch] = []
        self.bookings: list[Booking] = []
        self.ends: list[tuple[float, int, str]] = []
        self.waits: list[tuple[float, int, float, int]] = []
        self.deferrals: dict[int, int] = {}
        for index, reserve in enumerate(reserves):
            self._queued(Job(index, reserve))

    # ---------------------------------------------------------------- time

    def at(self, when: float, what: Callable[[float], None], priority: int = 1) -> None:
        """Has `what` happen at that moment: answers are 0, changes 1, retries 2, wakes 4."""
        self.sequence += 1
        heappush(self.calendar, (when, priority, self.sequence, what))

    def run(self, start: float = 0.0) -> Pool:
        """Until nothing happens any more. Whoever still waits then would wait for ever: a deadlock."""
        self.pump(start)
        now = start
        while self.calendar:
            when, _, _, what = heappop(self.calendar)
            assert when >= now, f"time runs backwards: {when} after {now}"
            now = when
            what(now)
            self.pump(now)
            assert self.s.in_flight == self.in_air + self.holding, "a permit leaked"
        assert not self.queue, f"nothing will ever happen again, and {len(self.queue)} wait"
        return self

    # ---------------------------------------------------------------- the law's answers

    def ask(self, job: Job, now: float) -> tuple[float, int]:
        """The law's answer about the head of the queue, held to its promises."""
        return promised(self.p, self.s, job.reserve, job.standing, now)

    def pump(self, now: float) -> None:
        while self.queue:
            job = self.queue[0][2]
            if law.never_fits(self.p, of_tokens(job.reserve)):
                heappop(self.queue)
                self._give_up(job)
                self.ends.append((now, job.index, GONE))
                continue
            at, cause = self.ask(job, now)
            if at > now:
                self.waits.append((now, job.index, at, cause))
                if cause not in job.asked:
                    job.asked.add(cause)
                    self.deferrals[cause] = self.deferrals.get(cause, 0) + 1
                if at < math.inf and at != self.wake_at:
                    self.wake_at = at  # one wake for a moment: each asks about the head again, and would set another
                    self.at(at, self._woken, 4)
                return
            heappop(self.queue)
            self._launch(job, now)

    def _woken(self, now: float) -> None:
        """A wake does nothing by itself: after every event the head is asked about."""
        if now >= self.wake_at:
            self.wake_at = math.inf

    # ---------------------------------------------------------------- an attempt

    def _launch(self, job: Job, now: float) -> None:
        law.launched(self.p, self.s, of_tokens(job.reserve), job.standing, now, self.u)
        if job.standing == law.HOLDING:
            self.holding -= 1
        self.in_air += 1
        if job.failed_at >= 0.0:
            self._spare(job)
        job.launched_at = now
        if job.first_launched_at < 0.0:
            job.first_launched_at = now
        number = len(self.launches)
        self.launches.append(Launch(now, job.index, job.reserve, job.attempt, job.standing, self.s.in_flight))
        self.bookings.append(Booking(now, number, job.reserve, True))
        reply = self.reply(job, now)
        self.at(now + reply.after_s, lambda then: self._answered(job, number, reply, then), 0)

    def _answered(self, job: Job, number: int, reply: Reply, now: float) -> None:
        p, s = self.p, self.s
        self.in_air -= 1
        if reply.kind == OK:
            law.settled(p, s, of_tokens(job.reserve), of_tokens(reply.used), job.launched_at, now)
            if p.settles[law.TPM]:
                self.bookings.append(Booking(now, number, reply.used, False))
            self.ends.append((now, job.index, OK))
            return
        if reply.kind == GONE:
            law.released(p, s)
            self.ends.append((now, job.index, GONE))
            return
        standing = law.keeps_permit(p)
        if reply.kind == THROTTLED:
            at = law.throttled(
                p,
                s,
                of_tokens(job.reserve),
                job.attempt,
                reply.retry_after_s,
                job.first_launched_at,
                job.launched_at,
                now,
                reply.u,
            )
            if p.refunds[law.TPM]:
                self.bookings.append(Booking(now, number, 0.0, False))
        else:
            history, times = (job.index, job.attempt, job.outages, 0), (job.first_launched_at, job.launched_at, now)
            at, standing = law.failed(p, s, *history, reply.retry_after_s, *times, reply.u)
            job.failed_at = now
        if at == math.inf:
            self.ends.append((now, job.index, EXHAUSTED))
            return
        assert at >= now
        job.attempt += 1
        if job.failed_at >= 0.0 and self.s.probe_at > -math.inf:
            self._spare(job)
        job.standing = standing
        self.holding += job.standing == law.HOLDING
        self.at(at, lambda then: self._queued(job), 2)

    def _spare(self, job: Job) -> None:
        outages = law.spared(self.p, self.s, job.outages, job.launched_at, job.failed_at)
        if outages >= 0:
            job.attempt -= 1
            job.outages = outages
        job.failed_at = -1.0

    def _queued(self, job: Job) -> None:
        self.sequence += 1
        key = law.rank(self.p, job.lane, job.attempt, 0.0, job.reserve, float(self.sequence), job.standing)
        heappush(self.queue, (key, self.sequence, job))

    def _give_up(self, job: Job) -> None:
        if job.standing == law.HOLDING:
            self.holding -= 1
            law.released(self.p, self.s)

    # ---------------------------------------------------------------- what happened

    def times(self, attempt: int = 0) -> list[float]:
        """When attempts were launched (0: all of them, else the first, second ... of each request)."""
        return [launch.at for launch in self.launches if attempt in (0, launch.attempt)]


def replayed(p: law.Params, decisions: list[tuple[str, tuple[Any, ...], Any]]) -> law.State:
    """Every decision again on a fresh state; each must give what it gave."""
    s = law.State()
    for name, arguments, result in decisions:
        if name == "repriced":
            law.repriced(p, arguments[0], s, arguments[1])
            p = arguments[0]
        else:
            assert repr(getattr(law, name)(p, s, *arguments)) == repr(result), (name, arguments)
    return s

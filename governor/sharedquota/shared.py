"""A quota that several processes share through Redis, as used by the scheduler of one of them.

Theory of operation. The law's calls that end an attempt are made twice: here, on a scratch state, since their result
(when to try again) depends on policy and arguments alone, and by the deciding process, on the pool's state. Times here
count from this run's zero, the pool's from another. `_zero_s` is the difference, a binary fraction, so that a launch's
time survives conversion in both directions to the bit.

Up to AHEAD attempts wait in the pool's queue, so that one decision may launch several; retries and finalize passes are
published at once, since they go first. If the pool cannot be reached nothing is launched, and the wait counts as a
pause.

The journal. The process that makes a decision of the pool records it in its own journal, after the changes that other
processes have made since (`patched`); `verify` thus decides it again. Decisions that another process made for this one
are in that process's journal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import fields
from math import inf
from typing import Any

from governor import law
from governor.law import FIRST, HOLDING, NOTHING, Params, State
from governor.model.errors import PacelineError
from governor.model.lawcalls import BREAKER, CALLS, PATCHED, RESTORED, SHARED, Numbers, moved, numbers_of, patch_of
from governor.model.needs import NOTHING_USED
from governor.model.work import Job, Observer
from governor.scheduler.attempts import NoLoop
from governor.scheduler.driver import Governor
from governor.scheduler.interfaces import TAKEN_OVER
from governor.scheduler.scheduler import Scheduler
from governor.sharedquota.image import CALL, WANT, WITHDRAW, Call, Event, Image, Launch, OwnerNews
from governor.sharedquota.interfaces import LEASE_S, QUANTUM_S, MemberState, QuotaStore, ServerClock, floored
from governor.sharedquota.member import RENEW_RATIO, Member

# The number of attempts of one process that may wait in the pool's queue, as long as all are new work.
AHEAD = 8
# Launches are remembered for a window's length, in case the pool must be rebuilt.
REMEMBERED_S = law.MINUTE_S
# If outages follow each other, at most one is reported in this many seconds.
QUIET_S = 10.0
# The arguments of the law's calls that are times.
TIMES = {"now", "launched_at", "first_launched_at", "failed_at"}
_TIMES = {name: tuple(i for i, each in enumerate(call.names) if each in TIMES) for name, call in CALLS.items()}
_PLACES = range(law.DIMENSIONS)
IN_A_LOOP = "a governor that shares its quota works in the event loop that it is made in: make one in each"


class SharedGovernor(Governor):
    """One process's part of a shared pool. Create it inside a running event loop; `aclose` it at the end.

    `store`: where the pool is kept (`redis_store.in_redis(url, sharing.pool_key(pool))`). `say`: called with a line
    when the store is lost, when it is back, and when another process has changed the settings. `time_scale`: of the
    event loop's clock. The settings of the process that entered or was repriced last apply to all. `pause` holds this
    process alone. `in_flight` counts this process's permits; `s` is the pool's newest known state, on this run's
    timeline. Other arguments: as for `Governor`.
    """

    only_loop = IN_A_LOOP

    def __init__(
        self,
        params: Params,
        *,
        store: Callable[[str], QuotaStore],
        say: Callable[[str], None] = lambda line: None,
        time_scale: float = 1.0,
        lease_s: float = LEASE_S,
        seed: int = 0,
        observer: Observer | None = None,
        pool: str = "default",
        state: State | None = None,
        start_s: float = 0.0,
    ) -> None:
        self.shared = SharedQuota(params, state)
        super().__init__(params, seed=seed, observer=observer, pool=pool, start_s=start_s, quota=self.shared)
        if isinstance(self.loop, NoLoop):
            raise PacelineError(IN_A_LOOP)
        self.shared.begin(self, store, say, time_scale, lease_s)

    @property
    def is_connected(self) -> bool:
        """Return whether this process is a member of its pool right now."""
        return self.shared.member.is_in

    @property
    def may_move(self) -> bool:
        """Always False: its connections belong to the loop that it was created in."""
        return False

    async def aclose(self) -> None:
        """Leave the pool and close the connections."""
        await self.shared.member.aclose()


class SharedQuota:
    """A pool's quota as one process's scheduler uses it (`interfaces.Quota`), and the host of its membership.

    `p`, `s`: the newest known settings and state of the pool, on this run's timeline.
    """

    def __init__(self, p: Params, state: State | None) -> None:
        self.p = p
        self.s = state or State()
        # When this process's request may launch (inf = it is not the pool's head), and what the pool's head waits for.
        self.head: tuple[float, int] | None = (inf, NOTHING)
        self._zero_s = 0.0  # the pool's time at this run's zero, once known
        self._is_timed = False
        self._scratch = State()
        self._given = state
        self._chain: Numbers = numbers_of((self.s,))  # the state to which this process's records lead
        self._chain_p = p
        self._ticket = 0
        self._asked: dict[int, Job] = {}
        self._tickets: dict[Job, int] = {}
        self._keys: dict[int, tuple[float, ...]] = {}
        self._withdrawn: dict[int, int] = {}  # standing, by ticket
        self._holds = 0
        self._finalizing = 0
        self._launches: deque[Launch] = deque()
        self._is_held = False
        self._is_told = False  # whether the loss of the store was reported
        self._quiet_until = -inf
        self._heard_version = (0, 0)
        self._offset: list[float] | None = None  # this process's clock of causes, less the pool's

    def begin(
        self,
        governor: SharedGovernor,
        store: Callable[[str], QuotaStore],
        say: Callable[[str], None],
        time_scale: float,
        lease_s: float,
    ) -> None:
        """Enter the pool for this governor. See `SharedGovernor`."""
        self._governor = governor
        self._scheduler: Scheduler[Job] = governor.scheduler
        self._say = say
        self.records = governor.observer.hears("decided")
        self._late_s = RENEW_RATIO * lease_s * time_scale  # a grant that arrives later than this is not used
        self.member = Member(self, store, self.p, clock=ServerClock(time_scale), lease_s=lease_s)
        governor.loop.call_soon(self.member.start)

    @property
    def zero_s(self) -> float:
        """The pool's time at this run's zero, seconds."""
        return self._zero_s

    # ------------------------------------------------------------ reports to the pool

    def _report(self, name: str, *arguments: Any) -> Any:
        """Report a call of the law; its result comes from a scratch state that serves only this purpose."""
        shared = list(arguments)
        for place in _TIMES[name]:
            shared[place] = floored(arguments[place] + self._zero_s)
        frees = 0
        result: Any = None
        if name != "synced":
            s = self._scratch
            flying, finalizing = s.in_flight, s.finalize_open
            result = getattr(law, name)(self.p, s, *shared)
            frees = flying - s.in_flight
            self._holds -= frees
            self._finalizing += s.finalize_open - finalizing
        self.member.post([CALL, name, shared, frees])
        if name == "failed":
            return result[0] - self._zero_s, result[1]
        if isinstance(result, float) and result < inf:
            result -= self._zero_s
        return result

    def settled(self, need: list[float], used: list[float], launched_at: float, now: float) -> None:
        """See `law.settled`."""
        self._report("settled", need, used, launched_at, now)

    def released(self) -> None:
        """See `law.released`."""
        self._report("released")

    def answered(self, now: float) -> None:
        """See `law.answered`."""
        self._report("answered", now)

    def throttled(self, *arguments: Any) -> float:
        """See `law.throttled`."""
        return float(self._report("throttled", *arguments))

    def failed(self, *arguments: Any) -> tuple[float, int]:
        """See `law.failed`."""
        at, standing = self._report("failed", *arguments)
        return at, standing

    def synced(self, *arguments: Any) -> None:
        """See `law.synced`."""
        self._report("synced", *arguments)

    def finalize_opened(self) -> None:
        """See `law.finalize_opened`."""
        self._report("finalize_opened")

    def finalize_closed(self) -> None:
        """See `law.finalize_closed`."""
        self._report("finalize_closed")

    def paused(self) -> None:
        """Launch nothing in this process until `resumed`."""
        self._is_held = True
        self.s.paused = 1

    def resumed(self) -> None:
        """Continue after `paused`."""
        self._is_held = False
        self.s.paused = 0

    def reprice(self, params: Params, now: float) -> None:
        """Adopt changed settings for the whole pool."""
        self.p = params
        self.member.reprice(params)

    def spared(self, job: Job) -> int:
        """Return `law.spared` of the job's last attempt."""
        launched_at, failed_at = (floored(each + self._zero_s) for each in (job.launched_s, job.failed_s))
        return law.spared(self.p, self._scratch, job.outages, launched_at, failed_at)

    @property
    def breaker(self) -> State:
        """The pool's newest known circuit breaker, with this process's failures since."""
        return self._scratch

    @property
    def in_flight(self) -> int:
        """The number of permits that this process holds."""
        return self._holds

    def booked_since(self, job: Job, d: int) -> float:
        """Return the bookings before the launch: the deciding process computes the difference when it decides."""
        return job.booked[d]

    def waited(self, waits_s: list[float]) -> list[float]:
        """Return the waits by cause. Time that corrections have made negative is taken from the longest wait."""
        short_s = -sum(each for each in waits_s if each < 0.0)
        if short_s > 0.0:
            waits_s = [max(0.0, each) for each in waits_s]
            longest = max(range(len(waits_s)), key=waits_s.__getitem__)
            waits_s[longest] = max(0.0, waits_s[longest] - short_s)
        return waits_s

    # ------------------------------------------------------------ requests to the pool

    def ask(self, need: list[float], standing: int, now: float) -> tuple[float, int]:
        """Publish the scheduler's head, unless enough attempts of this process already wait in the pool's queue."""
        if self._is_held:
            return inf, law.PAUSED
        job = self._scheduler.first()
        assert job is not None
        if len(self._asked) < AHEAD or self._goes_first(job):
            self._ask(job)
            return TAKEN_OVER, NOTHING
        return inf, NOTHING

    def launched(self, need: list[float], standing: int, now: float, u: float) -> None:
        """Raise AssertionError: the pool grants launches, the scheduler never books them here."""
        raise AssertionError("a shared quota books nothing here")

    def _goes_first(self, job: Job) -> bool:
        """Return whether the law ranks a job before one of those that already wait in the pool's queue."""
        return job.queued and self._rank(job, self._ticket + 1) < max(self._keys.values())

    def _rank(self, job: Job, ticket: int) -> tuple[float, ...]:
        return law.rank(self.p, job.lane, job.attempt, job.expected, job.reserve, float(ticket), job.standing)

    def _ask(self, job: Job) -> None:
        self._ticket += 1
        self._asked[self._ticket] = job
        self._tickets[job] = self._ticket
        self._keys[self._ticket] = self._rank(job, self._ticket)
        self.member.post(self._want(self._ticket, job))

    def _want(self, ticket: int, job: Job) -> Event:
        sizes = [float(job.expected), float(job.reserve), job.need]
        return [WANT, ticket, job.lane, job.attempt, job.standing, *sizes, self._scheduler.jitter_u(job)]

    def forget(self, job: Job) -> None:
        """Withdraw the job from the pool's queue."""
        ticket = self._tickets.pop(job, 0)
        if ticket:
            del self._asked[ticket], self._keys[ticket]
            self._withdrawn[ticket] = job.standing
            self.member.post([WITHDRAW, ticket])

    def taken_over(self) -> Iterable[Job]:
        """Return the jobs that wait in the pool's queue."""
        return list(self._asked.values())

    def take_back(self, now: float) -> list[tuple[tuple[float, ...], Job]]:
        """Look at the pool's queue if its moment has come, and return the jobs that are to wait here again.

        These are all jobs in the pool's queue if nothing more is to be launched.
        """
        assert self.head is not None
        if self.head[0] <= now:
            self.head = inf, self.head[1]
            self.member.look()
        if not (self._scheduler.stopped or self._is_held):
            return []
        back = []
        for ticket, job in list(self._asked.items()):
            if not self._scheduler.stopped:
                back.append((self._keys[ticket], job))
            self.forget(job)
        if self._is_held:
            self.head = inf, law.PAUSED
        return back

    # ------------------------------------------------------------ news of the pool: the methods of `interfaces.Host`

    def standing(self, known: Image | None) -> MemberState:
        """Return what this process holds and waits for."""
        self._withdrawn.clear()
        now = self._governor.now()
        used = before = tuple(NOTHING_USED)
        if known is not None:
            missing = [launch[2] for launch in self._launches if launch[:2] > known.age]
            at = now + self._zero_s
            used = tuple(law.used_in(known.p, known.s, d, at) + sum(each[d] for each in missing) for d in _PLACES)
        wants = [self._want(ticket, job) for ticket, job in self._asked.items()]
        if self._given is not None:
            before = tuple(law.used_in(self.p, self._given, d, now) for d in _PLACES)
        return MemberState(self._holds, self._finalizing, wants, list(self._launches), used, before)

    def heard(self, image: Image, news: OwnerNews | None = None) -> None:
        """Adopt the pool's present state, and what this process has decided for itself."""
        self._governor.guarded(lambda: self._hear(image, news))

    def _hear(self, image: Image, news: OwnerNews | None) -> None:
        self._tell_time()
        version = self._heard_version = image.age
        self.s = moved(image.p, image.s, -self._zero_s)
        for field in BREAKER:
            setattr(self._scratch, field, getattr(image.s, field))
        self.s.paused = int(self._is_held)
        if image.p is not self.p and image.p != self.p and not self.member.reprices:
            pool, before = self._governor.pool, self.p
            self._say(f"pool {pool} is shared, and another process has changed {_differences(before, image.p)}")
            self.p = image.p
            self._scheduler.repriced(before)
            self._governor.soon()
        self._time_was(image.now, image.clock)
        if news is not None:
            self._take(version, news)
        owner, ticket, at, cause = image.told
        self._time_is(image.cause)
        self._head_is(ticket if owner == self.member.owner else 0, at, cause)
        if news is not None:
            self._scheduler.pump(self._governor.now())
        self._governor.settle()

    def _tell_time(self) -> None:
        """Follow the pool's clock, from which this run's time differs by a constant."""
        governor, ahead_s = self._governor, self.member.clock.ahead_s
        if not self._is_timed:
            self._is_timed = True
            self._zero_s = floored(ahead_s + governor.loop.time() - governor.now())
            if self.records:
                governor.batch.tell_decision(SHARED, (self._zero_s,), None)
        governor.zero = self._zero_s - ahead_s

    def _time_was(self, at: float, clock: list[float]) -> None:
        """Adopt the pool's own count of what its head has waited for, up to the last decision."""
        scheduler, then_s = self._scheduler, at - self._zero_s
        if self._offset is None:
            scheduler.advance(then_s)
            self._offset = [mine - theirs for mine, theirs in zip(scheduler.clock, clock, strict=True)]
        elif not self._is_held:
            scheduler.clock[:] = [offset + theirs for offset, theirs in zip(self._offset, clock, strict=True)]
            scheduler.clock_at = then_s

    def _time_is(self, cause: int) -> None:
        """Count what the head has waited for since."""
        now = self._governor.now()
        if not self._is_held:
            self._waits(inf if self.head is None else self.head[0], cause)
        self._scheduler.advance(now)

    def _waits(self, at: float, cause: int) -> None:
        """Note when this process's request may launch, and the cause for which the pool's head waits."""
        self.head = at, cause
        self._scheduler.head_at, self._scheduler.cause = at, cause

    def _head_is(self, ticket: int, at: float, cause: int) -> None:
        """Note that this ticket's attempt is the pool's head and may launch at `at`; 0 = it is another's."""
        job = self._asked.get(ticket)
        # Two quanta later, so that the pool's time, which is rounded down, has come when the timer rings.
        wake_at = inf if job is None or at == inf else floored(at) + 2.0 * QUANTUM_S - self._zero_s
        self._waits(wake_at, self._scheduler.cause)
        if job is not None and not job.asked & 1 << cause:
            job.asked |= 1 << cause
            self._governor.batch.deferred(cause)

    def news(self, news: OwnerNews) -> None:
        """Adopt what another process has decided for this one."""
        self._governor.guarded(lambda: self._learn(news))

    def _learn(self, news: OwnerNews) -> None:
        version = news.incarnation, news.version
        is_newest = version > self._heard_version and self._offset is not None
        if is_newest:
            self._heard_version = version
            self._time_was(news.now, news.clock)
        self._take(version, news)
        if is_newest:
            self._time_is(news.cause)
            if news.wake is not None:
                self._head_is(*news.wake)
        self._scheduler.pump(self._governor.now())
        self._governor.settle()

    def _take(self, version: tuple[int, int], news: OwnerNews) -> None:
        """Apply grants and refusals."""
        for ticket, booked in news.grants:
            self._granted_by(version, news.now, ticket, booked)
        for ticket in news.refused:
            job = self._asked.get(ticket)
            if job is not None:
                self._scheduler.refused(job, self._governor.now())

    def _granted_by(self, version: tuple[int, int], at: float, ticket: int, booked: list[float]) -> None:
        job = self._asked.pop(ticket, None)
        standing = self._withdrawn.pop(ticket, FIRST) if job is None else job.standing
        self._holds += standing != HOLDING
        if job is None:
            if standing != HOLDING:
                self.released()
            return
        del self._tickets[job], self._keys[ticket]
        if self._governor.now() + self._zero_s - at > self._late_s:
            # This process or its connection was stalled: sent now, the request would add to what others sent since.
            if standing != HOLDING:
                self.released()
            self._ask(job)
            return
        while self._launches and self._launches[0][4] < at - REMEMBERED_S:
            self._launches.popleft()
        self._launches.append((*version, job.need, job.standing, at, self._scheduler.jitter_u(job)))
        self._scheduler.granted(job, at - self._zero_s, booked)

    def decided(self, params: Params, before: Numbers, image: Image, calls: list[Call]) -> None:
        """Record this process's decision: the changes by others since its last decision, then the calls of the law."""
        if not self.records:
            return
        told = self._governor.batch.tell_decision
        if params != self._chain_p:
            told("repriced", (params, floored(self._governor.now() + self._zero_s)), None)
            told(RESTORED, before, None)
        elif before != self._chain:
            told(PATCHED, patch_of(self._chain, before), None)
        for call in calls:
            told(*call)
        self._chain, self._chain_p = numbers_of((image.s,)), image.p

    def missed(self, why: str) -> bool:
        """Note that nothing can be granted: jobs wait until the pool can be reached. Return whether that was reported.

        Soon after another loss it is reported only if it lasts.
        """
        says = self._is_told or self._governor.loop.time() >= self._quiet_until
        self._governor.guarded(lambda: self._miss(why, says))
        return says

    def _miss(self, why: str, says: bool) -> None:
        if says:
            self._is_told, self._quiet_until = True, self._governor.loop.time() + QUIET_S
            self._say(f"{why}: nothing is launched until it is back")
        self._scheduler.advance(self._governor.now())
        self._offset = None
        self._waits(inf, law.PAUSED)
        self._governor.settle()

    def back(self) -> None:
        """Note that the pool is back, where all waiting jobs wait again."""
        if self._is_told:
            self._is_told = False
            self._governor.guarded(lambda: self._say("the store of shared quotas is back"))

    def broke(self, error: PacelineError) -> None:
        """Fail, because the pool cannot be used at all."""
        self._governor.fail(error)


def _differences(before: Params, after: Params) -> str:
    """Return the names of the settings that differ."""
    names = [each.name for each in fields(Params) if getattr(before, each.name) != getattr(after, each.name)]
    return ", ".join(name for name in names if name not in ("budget", "rate_per_s", "held", "largest"))

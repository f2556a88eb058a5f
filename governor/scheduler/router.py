"""One model over several quotas (keys, regions, deployments): which of them serves which request, and when.

Theory of operation. Each quota has a scheduler of its own, whose law says when it may launch what. The router holds
the requests of all of them, reads ahead of the source by one, and shows the first one to every scheduler as its next
new work. So each law computes when it would admit that very request, and the scheduler whose moment comes first
launches it; the others are then shown the next one. At one instant the order of the seats decides: a reserved quota
that comes first is filled first, and the rest spills over. (So a seat that has just launched is not shown the next one
while one before it, which would launch it now, has yet to look.) A request that is too large for a quota is not shown
to it.

Requests that were launched are handed on in three cases. A refusal (429) sends the request to a quota whose law admits
it sooner than the refusing one lets it come again. An attempt that got no answer is followed by one at another quota,
after its backoff. And a quota that stops (its account is refused) or whose circuit breaker opens gives away everything
that waits there. A request is not shown again to a quota that it has tried while another one that is well has not been
tried, so that a dead quota costs at most one attempt each.

Nothing here reads a clock, sleeps or sends: `clock()` is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf
from typing import Any, Generic, TypeVar

from governor import law
from governor.law import RETRY, Params
from governor.model.needs import Scheduled
from governor.scheduler.scheduler import Scheduler

# Requests held here that are too large for a quota whose next one is being looked for.
LOOKAHEAD = 100

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Seat(Generic[T]):
    """One quota at a router: an iterator over what its scheduler may launch next, and the scheduler's `elsewhere`.

    `need_of(item)`: what the request takes of this quota's dimensions. `renew()`: lets the scheduler look at this
    source again (`Scheduler.renewed`), or begin anew if it had found nothing. `stays(job)`: whether a request may not
    be handed on. `own`: requests that only this quota may launch, first of all. `is_due`: it was shown something new
    and has not looked yet.
    """

    router: Router[T]
    number: int
    scheduler: Scheduler[Any]
    need_of: Callable[[T], list[float]]
    renew: Callable[[], None]
    stays: Callable[[Any], bool]
    own: deque[T] = field(default_factory=deque)
    shown: T | None = None
    is_due: bool = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """Return the next request to show; the one shown before has been launched, or has ended."""
        found = self.router.next_for(self)
        if found is None:
            raise StopIteration
        return found

    @property
    def is_open(self) -> bool:
        """Return whether anything is launched here any more."""
        return not self.scheduler.stopped

    def is_well(self, now: float) -> bool:
        """Return whether launches are neither stopped nor paused nor held, and the provider answers."""
        s = self.scheduler.quota.s
        return self.is_open and not s.paused and s.probe_at == -inf and s.hold_until <= now

    def fits(self, item: T) -> bool:
        """Return whether the request is not too large for this quota."""
        return not law.never_fits(self.scheduler.quota.p, self.need_of(item))

    def ready_at(self, item: T, now: float) -> float:
        """Return when the law would admit the request here, after those that wait here already."""
        quota, scheduler = self.scheduler.quota, self.scheduler
        at, _ = law.admission(quota.p, quota.s, self.need_of(item), RETRY, now)
        first = scheduler.first()
        return at if first is None or first is scheduler.new_work else max(at, scheduler.head_at)

    # ------------------------------------------------------------ called by the scheduler

    def may_take(self, job: Scheduled, now: float, by: float) -> bool:
        """Return whether a quota that the request has not tried would launch it by that time; inf = at some time."""
        if job.lane == law.FINALIZE or self.stays(job):
            return False
        item = self.router.item_of(job, self)
        tried = self.router.tried(item) | 1 << self.number
        return any(
            not tried >> each.number & 1
            and each.is_open
            and each.fits(item)
            and (by == inf or each.ready_at(item, now) <= by)
            for each in self.router.seats
        )

    def may_save(self, job: Scheduled, now: float) -> bool:
        """Return whether another quota can serve a request that waits here, where nothing is answered any more."""
        if self.stays(job) or (self.is_open and job.lane == law.FINALIZE):
            return False
        item = self.router.item_of(job, self)
        others = (each for each in self.router.seats if each is not self)
        return any((each.is_well(now) if self.is_open else each.is_open) and each.fits(item) for each in others)

    def take(self, job: Scheduled) -> None:
        """Take over a request that no longer belongs to this quota's scheduler."""
        self.router.handed_on(job, self)

    def looked(self) -> None:
        """Show requests to the quotas that had found none, after a change in the state of this one."""
        self.is_due = False
        self.router.looked()

    def look_again(self) -> None:
        """Let the scheduler look at what is shown, as soon as the caller is done."""
        self.is_due = True
        self.renew()


class Router(Generic[T]):
    """The requests of one model, or of several that share the same quotas: see the module's docstring.

    `source`: the new requests, in order. `index_of`: a request's number. `item_of`: a job of that seat's scheduler as a
    request to be launched at another. `took(item, seat)` is called when a request shown was launched, or has ended.
    """

    def __init__(
        self,
        source: Iterator[T],
        *,
        clock: Callable[[], float],
        index_of: Callable[[T], int],
        item_of: Callable[[Any, Seat[T]], T],
        took: Callable[[T, Seat[T]], None] = lambda item, seat: None,
    ) -> None:
        self.seats: list[Seat[T]] = []
        self.item_of = item_of
        self._source = source
        self._clock = clock
        self._index_of = index_of
        self._took = took
        self._handed_on: list[T] = []  # before the others, in order of their coming
        self._ahead: list[T] = []
        self._tried: dict[int, int] = {}  # a bit for each seat, by the number of a request that was handed on
        self._is_drained = False

    def join(
        self,
        scheduler: Scheduler[Any],
        need_of: Callable[[T], list[float]],
        renew: Callable[[], None],
        stays: Callable[[Any], bool] = lambda job: False,
    ) -> Seat[T]:
        """Return the next seat: the source of this scheduler, which also hands requests on through it."""
        seat = Seat(self, len(self.seats), scheduler, need_of, renew, stays)
        self.seats.append(seat)
        scheduler.elsewhere = seat
        return seat

    def tried(self, item: T) -> int:
        """Return the quotas that the request has tried, a bit for each seat."""
        return self._tried.get(self._index_of(item), 0)

    def next_for(self, seat: Seat[T]) -> T | None:
        """Return what to show to this seat; what was shown to it before is taken from all others."""
        taken, seat.shown = seat.shown, None
        if taken is not None:
            _remove(self._handed_on if _holds(self._handed_on, taken) else self._ahead, taken)
            self._took(taken, seat)
            for other in self.seats:
                if other.shown is taken:
                    other.shown = None
                    other.look_again()
        if seat.own:
            return seat.own.popleft()
        seat.shown = self._first_for(seat) if seat.is_open else None
        return seat.shown

    def handed_on(self, job: Scheduled, seat: Seat[T]) -> None:
        """Take over a request from a seat, and show it to the others."""
        item = self.item_of(job, seat)
        self._tried[job.index] = self.tried(item) | 1 << seat.number
        self._handed_on.append(item)
        self.looked()

    def looked(self) -> None:
        """Let seats to which nothing is shown look again, if there may be something for them by now."""
        if not self._handed_on and not self._ahead:
            return
        for seat in self.seats:
            if seat.shown is None and seat.is_open and self._first_for(seat) is not None:
                seat.look_again()

    def _first_for(self, seat: Seat[T]) -> T | None:
        found = self._allowed(seat)
        before = [each for each in self.seats[: seat.number] if each.is_due and each.shown is found]
        if found is None or not before:
            return found
        now = self._clock()
        return None if any(each.ready_at(found, now) <= now for each in before) else found

    def _allowed(self, seat: Seat[T]) -> T | None:
        for item in chain(self._handed_on, self._ahead):
            if self._may_go(item, seat):
                return item
        while len(self._ahead) < LOOKAHEAD and not self._is_drained:
            found = next(self._source, None)
            if found is None:
                self._is_drained = True
            else:
                self._ahead.append(found)
                if self._may_go(found, seat):
                    return found
        return None

    def _may_go(self, item: T, seat: Seat[T]) -> bool:
        """Return whether the request may be launched there; one that fits nowhere is given up by any."""
        if not seat.fits(item):
            return not any(each.fits(item) for each in self.seats)
        tried = self.tried(item)
        if not tried >> seat.number & 1:
            return True
        now = self._clock()
        return not any(not tried >> each.number & 1 and each.is_well(now) and each.fits(item) for each in self.seats)


def _holds(items: list[T], item: T) -> bool:
    return any(each is item for each in items)


def _remove(items: list[T], item: T) -> None:
    for place, each in enumerate(items):
        if each is item:
            del items[place]
            return


class Spread:
    """Divides requests over quotas in advance, for a forecast: each goes where the work so far would end first.

    The work of a quota ends when its slowest limit has let it all through; the places in flight count as a limit too.
    """

    def __init__(self, quotas: Sequence[Params]) -> None:
        self._quotas = quotas
        self._used = [[0.0] * (law.DIMENSIONS + 1) for _ in quotas]

    def choose(self, needs: Sequence[list[float]], service_s: float) -> int:
        """Return the quota for a request with these needs, one per quota, whose answer takes that long."""
        fitting = [i for i, p in enumerate(self._quotas) if not law.never_fits(p, needs[i])]
        found = min(fitting or range(len(needs)), key=lambda i: self._end_s(i, needs[i], service_s))
        p, used = self._quotas[found], self._used[found]
        for d in range(p.dimensions):
            used[d] += needs[found][d]
        used[-1] += max(p.stagger_s, service_s / p.max_concurrency)
        return found

    def _end_s(self, i: int, need: list[float], service_s: float) -> float:
        p, used = self._quotas[i], self._used[i]
        ends = [(used[d] + need[d]) / p.rate_per_s[d] for d in range(p.dimensions) if p.limit[d] > 0.0]
        return max(*ends, used[-1] + max(p.stagger_s, service_s / p.max_concurrency), 0.0)

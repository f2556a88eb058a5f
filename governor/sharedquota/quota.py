"""Decisions on a shared pool: pure functions, the same in every process that shares the quota.

Theory of operation. Processes append batches of events to an inbox. The deciding process takes the newest image and the
whole inbox, applies the events in order (settlements and the like are calls of the law), drops owners whose lease has
lapsed, and launches heads of the queue as long as the law says "now". The resulting image replaces the previous one
only if no other process was quicker (`head` names the version). `Decided.news` is what each owner must be told.

A dead owner's reservations stay booked and age out: the provider has charged them. For the pool's data see `image`.
"""

from __future__ import annotations

import inspect
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from governor import law
from governor.law import HOLDING, RETRY, Params
from governor.model.lawcalls import params_of
from governor.model.needs import NOTHING_USED, of_amounts
from governor.sharedquota.image import (
    CALL,
    HERE,
    JOIN,
    LEAVE,
    REPRICE,
    UNTOLD,
    WANT,
    WITHDRAW,
    Batch,
    Call,
    Event,
    Image,
    Join,
    Launch,
    Owner,
    OwnerNews,
    Waiter,
)
from governor.sharedquota.interfaces import EPOCH_S

# A dead owner is remembered for this many leases, so that its reports count only once if it comes back.
REMEMBERED_LEASES = 60.0
# An owner that came late may catch up on this many rounds.
CREDIT = 20
# This many earlier incarnations are remembered; launches of older ones count as not booked.
CUTS = 100


@dataclass(slots=True)
class DecisionResult:
    """The outcome of a decision, besides the image: the calls of the law in order, and the news of each owner."""

    calls: list[Call]
    news: dict[str, OwnerNews]


def decide(
    image: Image,
    batches: Iterable[Batch],
    leases: Mapping[str, float],
    now: float,
    lease_s: float,
) -> DecisionResult:
    """Apply these batches of events (owner, number of the first, events) to the image, and launch what the law admits.

    `now`: the store's time, raised to the last decision's. `leases`: until when each owner's lease lasts. The image
    becomes its next version.
    """
    decision = _Decision(image, now, lease_s)
    for owner, first, events in batches:
        for number, event in enumerate(events, first):
            decision.happened(owner, number, event)
    decision.lapse(image.lapsed(leases, decision.now))
    return decision.done()


def rebuilt(
    joins: Mapping[str, Join],
    best: Image,
    server: bytes,
    now: float,
    lease_s: float,
    *,
    by: str,
    chance: int = 0,
    absent: bool = False,
) -> tuple[Image, DecisionResult]:
    """Rebuild the pool from the knowledge of its living processes: the newest of their images, and their actions since.

    `joins`: each owner's entry. An owner in the image but not in `joins` may have made launches that no living process
    knows of (`absent`: so may other processes); the rest of the budget is booked for them. The image becomes the pool's
    next incarnation. `by`: the rebuilding process; the others are granted nothing until they have found the new image.
    `chance`: 32 random bits from the caller.
    """
    image = best
    cuts = image.cuts | {image.incarnation: image.version}
    image.cuts = {number: cuts[number] for number in sorted(cuts)[-CUTS:]}
    newest_known = max(image.incarnation, *(join.seen for join in joins.values()))
    image.server, image.incarnation = server, (newest_known >> 32) + 1 << 32 | chance
    decision = _Decision(image, now, lease_s)
    launches = [(each, name) for name, join in joins.items() for each in decision.unbooked(name, join)]
    decision.booked_again(each for each, _ in sorted(launches, key=lambda pair: pair[0][4]))
    missing = [name for name in image.living() if name not in joins]
    if missing or absent:
        decision.filled()
    decision.lapse(missing)
    for name, join in joins.items():
        join.launches = []
        decision.joins(name, join)
        image.owners[name].silent = name != by
    return image, decision.done()


def begun(joins: Mapping[str, Join], now: float) -> Image:
    """Return the image of a new pool, with the first stated settings and the use of its processes' earlier runs."""
    first = next(join for join in joins.values() if join.params is not None)
    assert first.params is not None
    image = Image(params_of(tuple(first.params)), lineage=first.lineage)
    image.s.zero_s = float(EPOCH_S)
    law.launched(image.p, image.s, _sum(join.before for join in joins.values()), RETRY, now, 0.5)
    law.released(image.p, image.s)
    return image


def _sum(amounts: Iterable[Iterable[float]]) -> list[float]:
    """Return the sum by dimension."""
    return [sum(each) for each in zip(NOTHING_USED, *amounts, strict=True)]


class _Decision:
    """A decision in progress."""

    def __init__(self, image: Image, now: float, lease_s: float) -> None:
        self.image = image
        self.now = max(now, image.now)
        self.lease_s = lease_s
        self.calls: list[Call] = []
        self.news: dict[str, OwnerNews] = {}
        if image.now > -inf:
            image.clock[image.cause] += self.now - image.now
        image.now = self.now

    def law(self, name: str, *arguments: Any, owner: Owner | None = None) -> Any:
        """Call the law; permits and finalize passes that the call moves are credited to `owner`."""
        p, s = self.image.p, self.image.s
        flying, finalizing = s.in_flight, s.finalize_open
        result = getattr(law, name)(p, s, *arguments)
        self.calls.append((name, arguments, result))
        if owner is not None:
            owner.holds += s.in_flight - flying
            owner.finalizes += s.finalize_open - finalizing
        return result

    # ------------------------------------------------------------ events

    def happened(self, name: str, number: int, event: Event) -> None:
        """Apply one event of an owner. From an unknown owner only an entry counts: its turn tells it to enter."""
        kind = event[0]
        if kind == JOIN:
            self.joins(name, Join(*event[1:]))
            return
        owner = self.image.owners.get(name)
        if owner is None or owner.gone_at >= 0.0 or number <= owner.last:
            return
        owner.last, owner.silent = number, False
        if kind == WANT:
            self.wants(name, event)
        elif kind == WITHDRAW:
            self.image.waiters = [w for w in self.image.waiters if (w.owner, w.ticket) != (name, event[1])]
        elif kind == CALL:
            self.called(owner, event)
        elif kind == REPRICE:
            self.repriced(params_of(tuple(event[1])))
        elif kind != HERE:
            assert kind == LEAVE, kind
            self.leaves(name, owner)
            del self.image.owners[name]

    def wants(self, name: str, event: Event, turn: int = 0) -> None:
        """Queue an attempt: in its owner's next turn, or in `turn`, which it had before."""
        image = self.image
        owner = image.owners[name]
        owner.turn = turn or max(image.turn - CREDIT, owner.turn) + 1
        insort(image.waiters, Waiter(*[name, *event[1:], owner.turn]), key=lambda w: w.key(image.p))

    def called(self, owner: Owner, event: Event) -> None:
        """Apply a call of the law that an owner reports. Its report decides whether a permit came back with it."""
        _, name, arguments, frees = event
        if name == "synced":
            arguments[BOOKED_SINCE] = self.image.s.booked[int(arguments[0])] - arguments[BOOKED_SINCE]
        held = owner.holds
        self.law(name, *arguments, owner=owner)
        self.holds(owner, held - frees)

    def holds(self, owner: Owner, count: int) -> None:
        """Set the number of the owner's permits as it reports. A permit taken again books nothing."""
        while owner.holds > count:
            self.law("released", owner=owner)
        while owner.holds < count:
            self.law("launched", NOTHING_USED, RETRY, self.now, 0.5, owner=owner)

    def repriced(self, p: Params) -> None:
        """Adopt other settings for the whole pool."""
        image = self.image
        if p == image.p:
            return
        law.repriced(image.p, p, image.s, self.now)
        self.calls.append(("repriced", (p, self.now), None))
        image.p = p
        image.waiters.sort(key=lambda w: w.key(p))

    # ------------------------------------------------------------ entries and departures

    def joins(self, name: str, join: Join) -> None:
        """Enter a process: its own account replaces what the image knew of it."""
        image = self.image
        owner = image.owners.setdefault(name, Owner(join.number - 1, 0))
        if join.number <= owner.joined:
            return
        self.booked_again(self.unbooked(name, join))
        owner.joined, owner.gone_at, owner.told, owner.since = join.number, -1.0, 0, image.incarnation
        owner.silent = False
        image.told = UNTOLD
        if join.params is not None:
            self.repriced(params_of(tuple(join.params)))
        if join.lineage != image.lineage and any(join.used):
            self.law("launched", list(join.used), RETRY, self.now, 0.5)
            self.law("released")
        calls = [event for number, event in join.calls if number > owner.last]
        self.holds(owner, join.holds + sum(event[3] for event in calls))
        for event in calls:
            self.called(owner, event)
        while owner.finalizes < join.finalizes:
            self.law("finalize_opened", owner=owner)
        while owner.finalizes > join.finalizes:
            self.law("finalize_closed", owner=owner)
        owner.last = join.last
        places = {w.ticket: w.turn for w in image.waiters if w.owner == name}
        image.waiters = [w for w in image.waiters if w.owner != name]
        for event in join.wants:
            self.wants(name, event, places.get(event[1], 0))

    def unbooked(self, name: str, join: Join) -> list[Launch]:
        """Return the launches of an entry that the image lacks."""
        image = self.image
        if join.lineage != image.lineage:
            return []  # `used` includes them
        owner = image.owners.get(name)
        since = owner.since if owner is not None else 0
        return [
            launch
            for launch in join.launches
            if since <= launch[0] < image.incarnation and launch[1] > image.cuts.get(launch[0], -1)
        ]

    def booked_again(self, launches: Iterable[Launch]) -> None:
        """Book launches that the image lacks; their permits are counted elsewhere."""
        for _, _, need, standing, at, u in launches:
            self.law("launched", need, RETRY if standing == HOLDING else standing, at, u)
            self.law("released")

    def filled(self) -> None:
        """Book the rest of each budget per minute."""
        p, s = self.image.p, self.image.s
        rooms = {
            d: max(0.0, law.held_of(p, d, p.budget[d]) * s.scale[d] - law.used_in(p, s, d, self.now))
            for d in range(p.dimensions)
            if p.limit[d] > 0.0 and law.is_brief(p, d)
        }
        if any(rooms.values()):
            self.law("launched", of_amounts(rooms), RETRY, self.now, 0.5)
            self.law("released")

    def leaves(self, name: str, owner: Owner) -> None:
        """Take back what the owner holds, and withdraw its attempts."""
        self.holds(owner, 0)
        while owner.finalizes > 0:
            self.law("finalize_closed", owner=owner)
        self.image.waiters = [w for w in self.image.waiters if w.owner != name]

    def lapse(self, names: Iterable[str]) -> None:
        """Remove owners that have not renewed their lease, and forget those that have been gone for long."""
        owners = self.image.owners
        for name in names:
            self.leaves(name, owners[name])
            owners[name].gone_at = self.now
        forget_s = REMEMBERED_LEASES * self.lease_s
        for name in [name for name, o in owners.items() if 0.0 <= o.gone_at < self.now - forget_s]:
            del owners[name]

    # ------------------------------------------------------------ launches

    def news_of(self, name: str) -> OwnerNews:
        """Return the news for this owner."""
        image = self.image
        if name not in self.news:
            image.owners[name].told += 1
            self.news[name] = OwnerNews(image.incarnation, image.version + 1, self.now, 0, image.clock)
        return self.news[name]

    def done(self) -> DecisionResult:
        """Launch what the law admits now; the owner of the new head is told when it may launch, if that has changed."""
        image, p = self.image, self.image.p
        image.wake_at, image.cause = inf, law.NOTHING
        told = UNTOLD
        waiters: list[Waiter] = []
        for place, w in enumerate(image.waiters):
            if image.owners[w.owner].silent:
                waiters.append(w)
                continue
            if law.never_fits(p, w.need):
                self.news_of(w.owner).refused.append(w.ticket)
                continue
            at, cause = self.law("admission", w.need, w.standing, self.now)
            if at > self.now:
                image.wake_at, image.cause = at, cause
                told = (w.owner, w.ticket, at, cause)
                waiters += image.waiters[place:]
                break
            self.law("launched", w.need, w.standing, self.now, w.u, owner=image.owners[w.owner])
            image.turn = max(image.turn, w.turn)
            self.news_of(w.owner).grants.append((w.ticket, image.s.booked_before.copy() if p.sync_headers else []))
        image.waiters = waiters
        if told != image.told and told[0]:
            self.news_of(told[0]).wake = told[1:]
        image.told = told
        image.version += 1
        for news in self.news.values():
            news.cause = image.cause
        return DecisionResult(self.calls, self.news)


# The position of `synced`'s argument `booked_since`: an owner reports the bookings at its launch, and the deciding
# process computes the difference when it makes the call.
BOOKED_SINCE = tuple(inspect.signature(law.synced).parameters).index("booked_since") - 2

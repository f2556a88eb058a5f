"""The router alone, over schedulers on virtual time: who launches what and when, against independent calculations."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import pytest

from governor import law
from governor.model.errors import FailureCode
from governor.model.needs import Scheduled, of_tokens
from governor.scheduler.quota import LocalQuota
from governor.scheduler.router import Router, Seat
from governor.scheduler.scheduler import Scheduler
from tests.governor.desks import quiet

SERVICE_S = 1.0
OK, THROTTLED, DROPPED, DEAD = "ok", "throttled", "dropped", "dead"
Fate = Callable[[int, float], str]


def bucket(tpm: float, **changes: Any) -> law.Params:
    """A quota that is a full bucket at first, with no other limit."""
    return quiet(tpm=tpm, window=law.BUCKET, max_concurrency=10_000, **changes)


class Member:
    """One quota: writes down its launches as (request, time). `fate(request, time)`: how an attempt ends."""

    def __init__(self, world: World, number: int, p: law.Params, fate: Fate) -> None:
        self.world, self.number, self.fate = world, number, fate
        self.scheduler: Scheduler[Scheduled] = Scheduler(self, LocalQuota(p), seed=number)
        self.seat: Seat[int] = world.router.join(self.scheduler, world.need_of, self.renew)
        self.flying: list[tuple[float, Scheduled]] = []
        self.launches: list[tuple[int, float]] = []
        self.is_renewed = True

    def renew(self) -> None:
        self.scheduler.renewed(self.world.now)
        self.is_renewed = True

    def next_work(self) -> Scheduled | None:
        for item in self.seat:
            job = Scheduled(item, self.world.sizes[item], -1.0, 0.0)
            job.since = self.scheduler.clock.copy()
            return job
        return None

    def launch(self, job: Scheduled, now: float) -> None:
        self.launches.append((job.index, now))
        self.flying.append((now + SERVICE_S, job))

    def answer(self, job: Scheduled, now: float) -> None:
        """Tell the scheduler how an attempt ended."""
        fate = self.fate(job.index, job.launched_s)
        if fate == OK:
            self.scheduler.succeeded(job, job.need, (), now, False)
        elif fate == THROTTLED:
            self.scheduler.throttled(job, 30.0, (), now)
        elif fate == DROPPED:
            self.scheduler.failed(job, -1.0, (), now, FailureCode.CONNECTION_DROPPED)
        else:
            self.scheduler.account_refused(job, (), now, FailureCode.INSUFFICIENT_QUOTA)

    def ended(self, job: Scheduled, now: float, code: str) -> None:
        self.world.ended[job.index] = code

    def given_up(self, job: Scheduled, now: float, code: str) -> None:
        self.world.ended[job.index] = code

    def lost(self, job: Scheduled, at: float, code: str) -> None:
        self.world.ended[job.index] = code

    def finalize(self, job: Scheduled, now: float) -> Scheduled:
        raise AssertionError("no answer is cut off here")

    def nothing(self, *_: Any) -> None:
        pass

    attempted = backed_off = suspended = doubted = deferred = halted = nothing


def always(what: str = OK) -> Fate:
    return lambda request, launched_s: what


class World:
    """Requests of these sizes over quotas, all there at 0, on virtual time. `ended`: failure codes, "" = answered."""

    def __init__(
        self, sizes: Sequence[float], quotas: Sequence[law.Params], fates: dict[int, Fate] | None = None
    ) -> None:
        self.sizes, self.now = list(sizes), 0.0
        self.ended: dict[int, str] = {}
        self.router: Router[int] = Router(
            iter(range(len(sizes))),
            clock=lambda: self.now,
            index_of=lambda item: item,
            item_of=lambda job, seat: job.index,
        )
        self.members = [Member(self, i, p, (fates or {}).get(i, always())) for i, p in enumerate(quotas)]
        for member in self.members:
            member.scheduler.begun(0.0)

    def need_of(self, item: int) -> list[float]:
        return of_tokens(self.sizes[item])

    def run(self, until: float = 1e6) -> World:
        """Run to the end: answers first, then wakes, as all drivers do."""
        for _ in range(100_000):
            while any(member.is_renewed for member in self.members):
                for member in self.members:
                    if member.is_renewed:
                        member.is_renewed = False
                        member.scheduler.changed(self.now)
            for member in self.members:
                member.scheduler.validate(job for _, job in member.flying)
            at = min(min((at for at, _ in m.flying), default=inf) for m in self.members)
            wake = min(m.scheduler.wake_at for m in self.members)
            self.now = max(self.now, min(at, wake))
            if self.now > until or min(at, wake) == inf:
                return self
            member = (
                next(m for m in self.members if at <= wake and any(t == at for t, _ in m.flying))
                if at <= wake
                else (next(m for m in self.members if m.scheduler.wake_at == wake))
            )
            if at <= wake:
                found = next(each for each in member.flying if each[0] == at)
                member.flying.remove(found)
                member.answer(found[1], self.now)
            else:
                member.scheduler.woken(self.now)
        raise AssertionError("the story does not end")

    @property
    def attempts(self) -> Counter[int]:
        """How often each request was launched."""
        return Counter(index for member in self.members for index, _ in member.launches)

    @property
    def last_launch_s(self) -> float:
        return max(at for member in self.members for _, at in member.launches)


def filled(sizes: Sequence[float], limits: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Return (request, time) by quota if each goes, in order, where it may go first: levels of buckets by hand."""
    levels, seen_s = list(limits), [0.0] * len(limits)
    found: list[list[tuple[int, float]]] = [[] for _ in limits]
    now = 0.0
    for index, size in enumerate(sizes):
        for k, limit in enumerate(limits):
            levels[k] = min(limit, levels[k] + (now - seen_s[k]) * limit / 60.0)
            seen_s[k] = now
        ats = [
            inf if size > limit else now + max(0.0, size - level) * 60.0 / limit
            for limit, level in zip(limits, levels, strict=True)
        ]
        k = ats.index(min(ats))
        now = ats[k]
        levels[k] = min(limits[k], levels[k] + (now - seen_s[k]) * limits[k] / 60.0) - size
        seen_s[k] = now
        found[k].append((index, now))
    return found


def best_s(count: int, size: float, limits: Sequence[float]) -> float:
    """Return when the last of `count` equal requests is admitted if they are divided in the best of all ways."""
    least = inf
    for shares in itertools.product(range(count + 1), repeat=len(limits)):
        if sum(shares) == count:
            ends = [max(0.0, (n * size - limit) * 60.0 / limit) for n, limit in zip(shares, limits, strict=True) if n]
            least = min(least, max(ends))
    return least


def of(member: Member) -> list[int]:
    return [index for index, _ in member.launches]


# ---------------------------------------------------------------- where a request goes


def test_each_goes_where_its_moment_comes_first_and_at_one_moment_to_the_first_in_order() -> None:
    world = World([500.0] * 9, [bucket(1_000.0), bucket(2_200.0)]).run()
    # Two fill the first one's bucket, four the other's, which has 200 left and refills 500 in 13.6 s, the first in 30.
    assert [of(member) for member in world.members] == [[0, 1, 8], [2, 3, 4, 5, 6, 7]]
    times = [at for _, at in sorted(launch for member in world.members for launch in member.launches)]
    assert times == pytest.approx([0.0] * 6 + [8.18, 21.82, 30.0], abs=0.01)
    assert world.ended == dict.fromkeys(range(9), "")


def test_water_is_filled_as_by_hand_for_any_limits_and_sizes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        # (Odd limits, lest two moments be equal but for rounding.)
        limits = [float(rng.randint(600, 9_000)) + rng.random() for _ in range(rng.randint(2, 4))]
        sizes = [float(rng.randint(1, int(min(limits)))) for _ in range(rng.randint(1, 40))]
        world = World(sizes, [bucket(limit) for limit in limits]).run()
        expected = filled(sizes, limits)
        for member, by_hand in zip(world.members, expected, strict=True):
            assert of(member) == [index for index, _ in by_hand], (limits, sizes)
            assert [at for _, at in member.launches] == pytest.approx([at for _, at in by_hand], abs=0.05)


def test_no_division_of_equal_requests_is_faster(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        limits = [float(rng.randint(1, 9)) * 500.0 for _ in range(rng.randint(2, 3))]
        count, size = rng.randint(1, 12), float(rng.randint(100, 500))
        world = World([size] * count, [bucket(limit) for limit in limits]).run()
        assert world.last_launch_s == pytest.approx(best_s(count, size, limits), abs=0.05), (limits, count, size)


def test_unequal_requests_end_within_one_request_per_other_quota_of_the_pooled_bound(seed: int) -> None:
    """As for any list schedule on uniform machines: at most (K - 1) times the largest over the sum of the rates."""
    rng = random.Random(seed)
    for _ in range(40):
        limits = [float(rng.randint(1_000, 9_000)) for _ in range(rng.randint(2, 4))]
        sizes = [float(rng.randint(1, 1_000)) for _ in range(rng.randint(30, 60))]
        world = World(sizes, [bucket(limit) for limit in limits]).run()
        rate_per_s = sum(limits) / 60.0
        bound_s = max(0.0, sum(sizes) - sum(limits)) / rate_per_s
        late_s = world.last_launch_s - bound_s
        assert -0.05 <= late_s <= (len(limits) - 1) * max(sizes) / rate_per_s + 0.05, (limits, sizes)


def test_a_reserved_quota_in_front_is_used_alone_until_another_would_be_sooner() -> None:
    world = World([400.0] * 5, [bucket(2_000.0), bucket(9_000.0)]).run()
    assert [of(member) for member in world.members] == [[0, 1, 2, 3, 4], []]
    # The sixth would wait 12 s for it, and spills over. What comes when it has refilled does not.
    world = World([400.0] * 6, [bucket(2_000.0), bucket(9_000.0)]).run()
    assert [of(member) for member in world.members] == [[0, 1, 2, 3, 4], [5]]


def test_too_large_for_one_waits_for_another_and_holds_up_nobody() -> None:
    world = World([3_000.0, 3_000.0, 100.0, 9_999.0], [bucket(1_000.0), bucket(4_000.0)]).run()
    assert [of(member) for member in world.members] == [[2], [0, 1]]
    assert world.members[0].launches == [(2, 0.0)]
    assert world.members[1].launches[1][1] == pytest.approx(30.0, abs=0.01)
    assert world.ended == {0: "", 1: "", 2: "", 3: FailureCode.REQUEST_TOO_LARGE}


# ---------------------------------------------------------------- quotas that refuse, or die


def test_a_refused_request_goes_where_it_is_admitted_sooner_than_it_may_come_again() -> None:
    fates = {0: always(THROTTLED)}
    world = World([400.0] * 3, [bucket(9_000.0, hold_on_throttle=1), bucket(9_000.0)], fates).run()
    assert of(world.members[0]) == [0, 1, 2]
    assert sorted(of(world.members[1])) == [0, 1, 2]
    assert {at for _, at in world.members[1].launches} == {SERVICE_S}
    assert world.ended == dict.fromkeys(range(3), "")


def test_it_stays_if_the_other_one_would_take_longer() -> None:
    def once(request: int, launched_s: float) -> str:
        return THROTTLED if launched_s == 0.0 else OK

    world = World([400.0, 1_000.0, 10.0], [bucket(400.0), bucket(1_000.0)], {0: once}).run()
    # The other has room for 400 at 24 s, and this one lets it come again at 31 s; for 1,000 it is 60 s.
    assert (0, pytest.approx(24.6, abs=0.7)) in [(i, at) for i, at in world.members[1].launches]
    world = World([1_000.0, 1_000.0], [bucket(1_000.0), bucket(1_000.0)], {0: once}).run()
    assert of(world.members[0]) == [0, 0]
    assert world.ended == {0: "", 1: ""}


@pytest.mark.parametrize("death", [DEAD, DROPPED])
def test_one_that_dies_in_mid_run_costs_at_most_one_attempt_each(death: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        limits = [float(rng.randint(1_000, 9_000)) for _ in range(rng.randint(2, 4))]
        sizes = [float(rng.randint(1, 1_000)) for _ in range(40)]
        dead, dies_s = rng.randrange(len(limits)), rng.uniform(0.0, 60.0)

        def fate(request: int, launched_s: float, dies_s: float = dies_s) -> str:
            return death if launched_s >= dies_s else OK

        world = World(sizes, [bucket(limit) for limit in limits], {dead: fate}).run()
        assert world.ended == dict.fromkeys(range(40), ""), (limits, sizes, dead, dies_s)
        late = Counter(index for index, at in world.members[dead].launches if at >= dies_s)
        assert max(late.values(), default=0) <= 1
        assert all(count == 1 + late[index] for index, count in world.attempts.items())


def test_if_all_die_what_is_left_stays_pending() -> None:
    def fate(request: int, launched_s: float) -> str:
        return DEAD if launched_s > 10.0 else OK

    world = World([500.0] * 20, [bucket(1_000.0), bucket(2_000.0)], dict.fromkeys((0, 1), fate)).run()
    assert [member.scheduler.stopped for member in world.members] == [FailureCode.INSUFFICIENT_QUOTA] * 2
    assert world.ended == dict.fromkeys(range(6), "")
    assert max(world.attempts.values()) <= 2


def test_where_each_fails_a_request_it_goes_round_until_its_attempts_are_used_up() -> None:
    """Two quotas at which nothing is answered: the breakers open, and nothing is lost while they are."""
    world = World([10.0] * 4, [bucket(9_000.0), bucket(9_000.0)], dict.fromkeys((0, 1), always(DROPPED))).run(500.0)
    assert not world.ended
    assert all(member.scheduler.quota.s.probe_at > -inf for member in world.members)

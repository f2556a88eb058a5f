"""The shared driver on virtual time: permits and runs are as with a quota of one's own, whatever the store does.

The store is the simulated one; `tests/test_shared_live.py` has the real one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest

from governor import law
from governor.journal.verify import Decision, verify
from governor.law import Params
from governor.model.errors import FailureCode, PacelineError
from governor.model.lawcalls import BEGAN, numbers_of, result_of
from governor.model.work import Observer
from governor.sharedquota import member, recovery
from governor.sharedquota.image import FORMAT_NAME, HEAD, Image
from governor.sharedquota.interfaces import EPOCH_S, LEASE_S, Server, StoreLostError
from governor.sharedquota.shared import AHEAD, SharedGovernor
from sim.des.virtual_loop import run_virtual
from sim.experiment.shared_quota import SimulatedStore, SimulatedStoreClient
from tests.governor.desks import CUT, OK, THROTTLED, Desk, Log, quiet, works

RTT_S = 0.004


class Pool:
    """A shelf and the governors that share it, inside a running loop. `made`: makes a store, given its owner."""

    made: Callable[[str], SimulatedStoreClient] | None = None

    def __init__(self, rtt_s: float = RTT_S) -> None:
        self.shelf = SimulatedStore(rtt_s)
        self.stores: list[SimulatedStoreClient] = []
        self.said: list[str] = []

    def governor(self, p: Params, observer: Observer | None = None, **rest: Any) -> SharedGovernor:
        def store(owner: str) -> SimulatedStoreClient:
            self.stores.append(self.made(owner) if self.made is not None else SimulatedStoreClient(self.shelf, owner))
            return self.stores[-1]

        return SharedGovernor(p, store=store, observer=observer, say=self.said.append, **rest)

    @property
    def image(self) -> Image:
        return Image.decoded(self.shelf.image)

    def nothing_held(self) -> None:
        image = self.image
        assert (image.s.in_flight, image.s.finalize_open, image.waiters) == (0, 0, [])


def shared(main: Callable[[Pool], Awaitable[None]]) -> Pool:
    """Runs a story of a pool to its end, after which nobody holds anything."""
    pools = []

    async def told() -> None:
        pool = Pool()
        pools.append(pool)
        await main(pool)
        pool.nothing_held()

    run_virtual(told())
    return pools[0]


async def ran(governor: SharedGovernor, desk: Desk, count: int, **rest: Any) -> str:
    why = await governor.run(works(count), desk.send, **rest)
    await governor.aclose()
    return why


def test_what_was_decided_is_verified_by_each_process_that_decided_it() -> None:
    logs = [Log(), Log(), Log()]
    p = quiet(max_concurrency=2, stagger_s=0.5, jitter_ratio=0.2)

    async def main(pool: Pool) -> None:
        script = {3: [(0.2, THROTTLED)]}
        await asyncio.gather(*(ran(pool.governor(p, log, seed=i), Desk(1.0, script), 12) for i, log in enumerate(logs)))

    shared(main)
    for log in logs:
        began = [Decision("default", 1, -1, BEGAN, numbers_of((p,)), ())]
        calls = [
            Decision("default", 1, i, name, numbers_of(arguments), result_of(result))
            for i, (name, arguments, result) in enumerate(log.decisions)
        ]
        found = verify(began + calls)
        assert found.difference is None, str(found)
        assert found.checked == len(calls) > 10
        assert sorted(index for index, failure, _ in log.ends if not failure) == list(range(12))
    launched = [sum(name == "launched" for name, _, _ in log.decisions) for log in logs]
    assert sum(launched) == 3 * 12 + 3  # each launch of the pool was decided once, and by whoever it was recorded


def test_waits_add_up_and_each_has_its_cause() -> None:
    logs = [Log(), Log()]
    p = quiet(max_concurrency=3, tpm=6_000, window=law.BUCKET, stagger_s=1.0)

    async def main(pool: Pool) -> None:
        await asyncio.gather(*(ran(pool.governor(p, log), Desk(4.0), 15) for log in logs))

    shared(main)
    for log in logs:
        assert len(log.rows) == 15
        for row in log.rows:
            waits = [
                row.waited_concurrency_s,
                row.waited_stagger_s,
                row.waited_tpm_s,
                row.waited_hold_s,
                row.waited_paused_s,
            ]
            assert all(each >= 0.0 for each in waits)
            # Before a process is a member its requests wait for nothing that the law knows.
            assert sum(waits) == pytest.approx(row.launched_s - row.eligible_s, abs=0.1 + recovery.BEGIN_S)
    assert sum(row.waited_concurrency_s for log in logs for row in log.rows) > 30.0
    assert set(logs[0].deferrals) | set(logs[1].deferrals) == {law.CONCURRENCY, law.STAGGER}


def test_permits_are_granted_in_turn_and_come_back_in_every_way() -> None:
    granted: list[int] = []

    async def call(governor: SharedGovernor, i: int) -> None:
        async with governor.permit(100.0) as permit:
            granted.append(i)
            await asyncio.sleep(1.0)
            if i == 2:
                raise ZeroDivisionError
            if i == 3:
                assert await permit.throttled(0.5)
            if i != 4:
                permit.used(50.0)

    async def main(pool: Pool) -> None:
        governor = pool.governor(quiet(max_concurrency=1))
        tasks = [asyncio.create_task(call(governor, i)) for i in range(3 * AHEAD)]
        await asyncio.sleep(2.5)
        tasks[10].cancel()  # waits in the pool's queue
        tasks[-1].cancel()  # waits here
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in found if each is not None] == [
            ZeroDivisionError,
            asyncio.CancelledError,
            asyncio.CancelledError,
        ]
        assert governor.in_flight == 0
        await governor.aclose()

    shared(main)
    assert granted == [i for i in range(3 * AHEAD - 1) if i != 10]


def test_a_cancelled_waiter_that_was_granted_in_that_moment_gives_it_back() -> None:
    """Whenever the cancellation falls between asking and hearing."""

    async def main(pool: Pool) -> None:
        p = quiet(max_concurrency=1)
        governor, other = pool.governor(p), pool.governor(p)
        await asyncio.sleep(4.0)
        for step in range(12):
            task = asyncio.create_task(governor.permit(1.0).__aenter__())
            await asyncio.sleep(RTT_S * step / 8)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled():
                permit = task.result()
                permit.used(1.0)
                permit.give_back()
            async with other.permit(1.0):
                pass
        for each in (governor, other):
            await each.aclose()

    shared(main)


def test_pause_is_this_process_alone_and_stop_leaves_nothing_waiting() -> None:
    logs = [Log(), Log()]

    async def main(pool: Pool) -> None:
        p = quiet(max_concurrency=1)
        one, two = pool.governor(p, logs[0]), pool.governor(p, logs[1])
        loop = asyncio.get_running_loop()
        loop.call_at(5.0, one.pause)
        loop.call_at(15.0, one.resume)
        loop.call_at(25.0, two.stop, "enough")
        assert await asyncio.gather(ran(one, Desk(1.0), 30), ran(two, Desk(1.0), 60)) == ["", "enough"]

    shared(main)
    one, two = ([at for at, _ in log.launches] for log in logs)
    assert not [at for at in one if 5.0 < at < 15.0]
    assert len([at for at in two if 5.5 < at < 15.0]) == 9  # it has the pool to itself
    assert len(one) == 30
    assert max(two) < 25.1


def test_a_finalize_pass_lowers_the_whole_pool() -> None:
    desk, log = Desk(1.0, {0: [(1.0, CUT), (5.0, OK)]}), Log()

    async def main(pool: Pool) -> None:
        p = quiet(max_concurrency=4, finalize_lowers=1, finalize_max_concurrency=1, stagger_s=0.4)
        one, two = pool.governor(p, log), pool.governor(p)
        other = Desk(1.0)
        await asyncio.gather(ran(one, desk, 4, finalize=True), ran(two, other, 12))
        (pass_at,) = desk.at(0)[1:]
        assert not [at for at, *_ in other.sent if pass_at < at < pass_at + 5.0 - RTT_S]

    shared(main)
    assert [failure for _, failure, _ in log.ends] == [""] * 4


def test_settings_of_one_are_settings_of_all() -> None:
    async def main(pool: Pool) -> None:
        slow, fast = quiet(max_concurrency=1), quiet(max_concurrency=3)
        one, two = pool.governor(slow), pool.governor(slow)
        loop = asyncio.get_running_loop()
        loop.call_at(10.0, two.reprice, fast)
        desks = Desk(1.0), Desk(1.0)
        await asyncio.gather(ran(one, desks[0], 40), ran(two, desks[1], 40))
        assert one.p == two.p == fast
        times = sorted(at for desk in desks for at, *_ in desk.sent)
        # Three in flight at a time once it is decided, at most: none starts before the third before it has ended.
        assert all(b - a >= 1.0 for a, b in zip(times[:-3], times[3:], strict=False))
        assert times[-1] < 10.0 + (80 - 6) / 3 + 3

    pool = shared(main)
    assert pool.said == ["pool default is shared, and another process has changed max_concurrency"]


def test_the_deadline_counts_while_it_waits() -> None:
    log = Log()

    async def main(pool: Pool) -> None:
        p = quiet(max_concurrency=1, backoff_keeps_permit=0, deadline_s=6.0)
        other = pool.governor(p)
        await asyncio.sleep(4.0)
        governor = pool.governor(p, log)
        run = asyncio.create_task(ran(governor, Desk(1.0, {0: [(0.5, THROTTLED)]}), 1))
        await asyncio.sleep(1.0)
        async with other.permit(1.0):
            await asyncio.sleep(20.0)
        await run
        await other.aclose()

    shared(main)
    assert [failure for _, failure, _ in log.ends] == [FailureCode.DEADLINE_EXCEEDED]


# ---------------------------------------------------------------- a store that is away


@pytest.mark.parametrize("away_s", [0.5, 30.0])
def test_nothing_is_launched_while_the_store_is_away_and_nothing_is_lost(away_s: float) -> None:
    logs = [Log(), Log(), Log()]

    async def main(pool: Pool) -> None:
        p = quiet(max_concurrency=2)
        asyncio.get_running_loop().call_at(10.0, pool.shelf.lose, away_s)
        await asyncio.gather(*(ran(pool.governor(p, log), Desk(1.0), 20) for log in logs))
        assert pool.image.incarnation >> 32 == 2

    pool = shared(main)
    times = sorted(at for log in logs for at, _ in log.launches)
    assert not [at for at in times if 10.0 + RTT_S < at < 10.0 + away_s]
    assert len(times) == 60
    assert all(b - a >= 1.0 - 1e-9 for a, b in zip(times[:-2], times[2:], strict=False))
    for log in logs:
        assert sorted(index for index, _, _ in log.ends) == list(range(20))
    assert [line.split(" (")[0] for line in pool.said].count("the store cannot be reached") == 3
    # What was waited for meanwhile is a pause.
    assert sum(row.waited_paused_s for log in logs for row in log.rows) > away_s


def test_a_process_that_was_cut_off_for_longer_than_its_lease_comes_back() -> None:
    log, other = Log(), Log()

    async def main(pool: Pool) -> None:
        p = quiet(max_concurrency=2)
        governor = pool.governor(p, log)
        second = pool.governor(p, other)
        loop = asyncio.get_running_loop()
        runs = asyncio.gather(ran(governor, Desk(30.0), 4), ran(second, Desk(2.0), 30))

        def cut(on: bool) -> None:
            pool.stores[0]._server = b"nobody" if on else pool.shelf.server

        # Every call fails, and so does every attempt to connect anew.
        connect = pool.stores[0].connect

        async def refused() -> Any:
            if 6.0 < loop.time() < 40.0:
                await asyncio.sleep(RTT_S)
                raise StoreLostError("no way through")
            return await connect()

        pool.stores[0].connect = refused  # type: ignore[method-assign]
        loop.call_at(6.0, cut, True)
        await asyncio.sleep(30.0)
        assert pool.image.owners[governor.shared.member.owner].gone_at > 0.0
        await runs

    shared(main)
    assert sorted(index for index, failure, _ in log.ends if not failure) == list(range(4))
    assert sorted(index for index, failure, _ in other.ends if not failure) == list(range(30))
    assert len(log.launches) == 4


def test_a_pool_that_cannot_be_used_ends_the_run() -> None:
    async def main() -> None:
        pool = Pool()
        governor = pool.governor(quiet())

        async def refused() -> Any:
            raise PacelineError("the store refuses us: look at PACELINE_REDIS_URL")

        pool.stores[0].connect = refused  # type: ignore[method-assign]
        with pytest.raises(PacelineError, match="refuses us"):
            await governor.run(works(3), Desk().send)
        with pytest.raises(PacelineError, match="launches nothing more"):
            async with governor.permit(1.0):
                raise AssertionError
        await governor.aclose()

    run_virtual(main())


# ---------------------------------------------------------------- connections that break, memories that fail

TPM = 6_000
# A quota that binds: each request reserves a fifteenth of a minute's.
TIGHT = {"max_concurrency": 20, "tpm": TPM, "window": law.BUCKET, "headroom": 0.05}
RESERVE = 400.0


class Brittle(SimulatedStoreClient):
    """A way to the shelf on which the messages of these numbers are lost, each with its connection."""

    passages = 0
    lost: frozenset[int] = frozenset()

    async def _on_the_way(self) -> None:
        self.passages += 1
        if self.passages in self.lost:
            raise StoreLostError("the connection was reset")
        await super()._on_the_way()


def whole_after(
    processes: int, requests: int, happens: Callable[[Pool, list[SharedGovernor]], Awaitable[None] | None], **rest: Any
) -> Pool:
    """Runs so many processes while something happens: no request is lost or doubled, and the quota never exceeded."""
    logs = [Log() for _ in range(processes)]
    lost = rest.pop("lost", lambda i: frozenset())
    made = rest.pop("made", lambda pool, owner: _brittle(pool, owner, lost(len(pool.stores))))
    limit_s = rest.pop("limit_s", 120.0 + 90.0 * processes * requests * RESERVE / TPM)

    async def main(pool: Pool) -> None:
        pool.made = lambda owner: made(pool, owner)
        governors = [pool.governor(quiet(**TIGHT | rest), log, seed=i) for i, log in enumerate(logs)]
        beside = happens(pool, governors)
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
            spoiler = asyncio.ensure_future(beside) if beside is not None else None
            runs = [
                group.create_task(_whole(governor, Desk(0.5), requests))
                for governor in governors
            ]  # fmt: skip
            for run in runs:
                assert await run == ""
            if spoiler is not None:
                spoiler.cancel()
                await asyncio.gather(spoiler, return_exceptions=True)

    pools = []

    async def told() -> None:
        pool = Pool()
        pools.append(pool)
        await main(pool)

    run_virtual(told())
    for log in logs:
        assert sorted(index for index, failure, _ in log.ends if not failure) == list(range(requests))
        assert len(log.launches) == requests
    times = sorted(at for log in logs for at, _ in log.launches)
    for first, since in enumerate(times):
        for last in range(first, len(times)):
            assert (last - first + 1) * RESERVE <= TPM * (1.0 + (times[last] - since) / 60.0), (since, times[last])
    return pools[0]


async def _whole(governor: SharedGovernor, desk: Desk, requests: int) -> str:
    why = await governor.run(works(requests, RESERVE), desk.send)
    await governor.aclose()
    return why


def _brittle(pool: Pool, owner: str, lost: frozenset[int]) -> Brittle:
    store = Brittle(pool.shelf, owner)
    store.lost = lost
    return store


def nothing(pool: Pool, governors: list[SharedGovernor]) -> None:
    """Happens."""


@pytest.mark.parametrize("processes", [1, 8])
def test_any_message_may_be_lost_with_its_connection(processes: int) -> None:
    """The n-th of one process: on its way there, so that it never came, or on its way back, so that it was obeyed."""
    passages = whole_after(processes, 6, nothing).stores[0].passages
    step = 1 if processes == 1 else 7
    for n in range(1, min(passages, 120), step):
        whole_after(processes, 6, nothing, lost=lambda i, n=n: frozenset([n] if i == 0 else []))


def every(
    period_s: float, spoil: Callable[[SimulatedStore], None]
) -> Callable[[Pool, list[SharedGovernor]], Awaitable[None]]:
    async def spoils(pool: Pool, governors: list[SharedGovernor]) -> None:
        while True:
            await asyncio.sleep(period_s)
            spoil(pool.shelf)

    return spoils


@pytest.mark.parametrize("processes", [1, 8])
def test_a_store_that_is_emptied_twice_a_second_ends_nothing(processes: int) -> None:
    pool = whole_after(processes, 40 // processes, every(0.5, SimulatedStore.flush))
    assert any("has lost the state of this pool" in line for line in pool.said)
    # Said now and then, and not each time.
    assert len(pool.said) < 2 * processes * (2 + asyncio_s(pool) / 10.0)


def asyncio_s(pool: Pool) -> float:
    """How long the story took."""
    return (pool.shelf.now_us() - EPOCH_S * 1_000_000) / 1e6


def _part(shelf: SimulatedStore, rng: random.Random, spoiled: bytes | None) -> None:
    """Evicts a part of what the store holds (None), or puts this in its place."""
    part = rng.choice(["image", "inbox", "leases", "recovery", "lists"])
    if part == "image":
        shelf.image = b"" if spoiled is None else shelf.image[: rng.choice([0, 56])] + spoiled
    elif part == "inbox":
        shelf.inbox = [] if spoiled is None else [*shelf.inbox, spoiled]
    elif part == "leases":
        shelf.leases = {}
    elif part == "recovery":
        shelf.recovery = {} if spoiled is None else shelf.recovery | {"somebody": spoiled} if shelf.recovery else {}
    elif spoiled is None:
        for each in shelf.lists.values():
            each.clear()
    else:
        for key in list(shelf.lists):
            shelf.tell(key, spoiled)


class Haunted(SimulatedStoreClient):
    """A way to the shelf on which any message may be lost with its connection, and anything that is kept be spoilt."""

    rng: random.Random
    loss: float
    spoil: float

    async def _on_the_way(self) -> None:
        await super()._on_the_way()
        if self.rng.random() < self.spoil:
            texts = [None, b"garbage", b"\xc1" * 100, b"", b"\x93\xa1a\x01\x91\x92\x02\x05", self.rng.randbytes(300)]
            _part(self._shelf, self.rng, self.rng.choice(texts))
        if self.rng.random() < self.loss:
            raise StoreLostError("the connection was reset")


@pytest.mark.parametrize(
    ("processes", "loss", "spoil", "rounds"),
    [
        (1, 0.0, 0.5, 3),
        (1, 0.2, 0.3, 3),
        (8, 0.0, 0.05, 1),
        (8, 0.02, 0.02, 1),
        pytest.param(1, 0.2, 0.5, 200, marks=pytest.mark.long),
        pytest.param(2, 0.1, 0.2, 50, marks=pytest.mark.long),
        pytest.param(8, 0.05, 0.1, 10, marks=pytest.mark.long),
        pytest.param(8, 0.1, 0.5, 5, marks=pytest.mark.long),
    ],
)
def test_whatever_is_spoilt_or_lost_at_any_message_every_run_ends(
    processes: int, loss: float, spoil: float, rounds: int, seed: int
) -> None:
    rng = random.Random(seed)

    def made(pool: Pool, owner: str) -> Haunted:
        store = Haunted(pool.shelf, owner)
        store.rng, store.loss, store.spoil = rng, loss, spoil
        return store

    for _ in range(rounds):
        whole_after(processes, 40 // processes, nothing, made=made, limit_s=20_000.0)


@pytest.mark.parametrize("processes", [1, 4])
def test_a_store_that_is_emptied_while_all_connections_break_twice_a_second_ends_nothing(processes: int) -> None:
    """No recovery of one connection lasts as long as others are waited for."""
    broken: set[SimulatedStoreClient] = set()
    stores: list[SimulatedStoreClient] = []

    class Cut(SimulatedStoreClient):
        async def connect(self) -> Server:
            broken.discard(self)
            return await super().connect()

        async def _on_the_way(self) -> None:
            await super()._on_the_way()
            if self in broken:
                raise StoreLostError("the connection was reset")

    def made(pool: Pool, owner: str) -> SimulatedStoreClient:
        stores.append(Cut(pool.shelf, owner))
        return stores[-1]

    def spoil(shelf: SimulatedStore) -> None:
        broken.update(stores)
        shelf.flush()

    whole_after(processes, 40 // processes, every(0.5, spoil), made=made)


def test_an_older_image_is_not_believed() -> None:
    """A failover back to a master that has missed what came since: the same server, an earlier state."""

    async def back(pool: Pool, governors: list[SharedGovernor]) -> None:
        kept = b""
        while True:
            await asyncio.sleep(3.0)
            if kept:
                pool.shelf.image, pool.shelf.inbox = kept, []
            await asyncio.sleep(1.0)
            kept = pool.shelf.image

    pool = whole_after(8, 8, back)
    assert pool.image.incarnation >> 32 > 3


def test_another_version_of_paceline_is_waited_for_and_never_overruled() -> None:
    log = Log()

    async def main() -> None:
        pool = Pool()
        shelf = pool.shelf
        foreign = HEAD.pack(shelf.server, 1, 7) + bytes(msgpack.packb([FORMAT_NAME + "of tomorrow", 1, 2]))
        shelf.image = foreign
        governor = pool.governor(quiet(**TIGHT), log)
        run = asyncio.create_task(_whole(governor, Desk(0.5), 3))
        for _ in range(10):
            shelf.renewed("somebody")
            await asyncio.sleep(3.0)
            assert shelf.image == foreign
        async with asyncio.timeout(60.0 + 3 * LEASE_S):
            assert await run == ""
        assert any("another version of Paceline shares this pool" in line for line in pool.said)

    run_virtual(main())
    # It may have launched up to the end of its lease: its whole budget was booked.
    assert len(log.launches) == 3
    assert log.launches[0][0] >= 27.0 + LEASE_S


def test_a_process_that_stood_still_sends_nothing_on_an_old_grant() -> None:
    """Its grant came while it was stopped: sent now, it would come on top of what the others have sent since."""
    log = Log()

    async def main(pool: Pool) -> None:
        governor = pool.governor(quiet(**TIGHT), log)
        await asyncio.sleep(1.0)
        run = asyncio.create_task(_whole(governor, Desk(0.5), 5))
        await asyncio.sleep(RTT_S / 4)
        heard = governor.shared.member._host.news
        held: list[Any] = []
        governor.shared.member._host.news = held.append  # type: ignore[method-assign]
        hear = governor.shared.heard
        governor.shared.heard = lambda image, news=None: held.append((image, news))  # type: ignore[method-assign, assignment]
        await asyncio.sleep(6.0)
        assert held
        assert not log.launches
        governor.shared.member._host.news = heard  # type: ignore[method-assign]
        governor.shared.heard = hear  # type: ignore[method-assign]
        for each in held:
            hear(*each) if isinstance(each, tuple) else heard(each)
        assert not log.launches
        async with asyncio.timeout(60.0):
            assert await run == ""

    shared(main)
    assert len(log.launches) == 5


def test_the_same_bug_over_and_over_ends_the_run_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("our bug")

    async def main() -> None:
        pool = Pool()
        governor = pool.governor(quiet())
        monkeypatch.setattr(member, "decide", broken)
        monkeypatch.setattr(member, "rebuilt", broken)
        async with asyncio.timeout(60.0):
            with pytest.raises(PacelineError, match=r"internal error in the shared pool, 6 times.*our bug"):
                await governor.run(works(3), Desk().send)
            await governor.aclose()

    run_virtual(main())

"""Permits: when a program's own calls may be sent, and that the permit comes back on every way out of the block."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import pytest

from governor import law
from governor.model.errors import PacelineError, Refused
from governor.model.requests import Limit, Outcome
from governor.scheduler.driver import Governor
from governor.scheduler.permits import Permit
from tests.governor.desks import BROKEN, OK, THROTTLED, Desk, Log, nothing_held, quiet, work, works
from tests.governor.laws import params
from tests.virtual_loop import VirtualLoop, run_virtual


class Bug(Exception):  # noqa: N818
    """Something in the caller's block."""


def test_permits_are_granted_as_a_batch_would_be() -> None:
    granted: list[tuple[int, float]] = []

    async def caller(governor: Governor, i: int) -> None:
        async with governor.permit(7_000.0) as permit:
            granted.append((i, governor.loop.time()))
            assert permit.launched_s == governor.loop.time()
            await asyncio.sleep(20.0)

    async def main() -> None:
        governor = Governor(params(jitter_ratio=0.0))
        await asyncio.gather(*(caller(governor, i) for i in range(5)))
        nothing_held(governor)

    run_virtual(main())
    assert granted == [(0, 0.0), (1, 15.0), (2, 30.0), (3, law.FIXED_S), (4, law.FIXED_S + 15.0)]


def test_a_governor_may_be_made_before_there_is_a_loop_and_serve_one_after_the_other() -> None:
    governor = Governor(quiet(tpm=1_000, window=law.BUCKET))
    governor.pause()
    governor.resume()
    assert governor.now() == 0.0

    async def use() -> float:
        async with governor.permit(600.0) as permit:
            return permit.launched_s

    # Really slept between the two: nothing. What the first has booked goes on counting in the second.
    first = run_virtual(use())
    second = run_virtual(use())
    assert (first, second) == (0.0, pytest.approx(12.0))
    assert governor.in_flight == 0


def test_what_a_loop_that_has_gone_left_behind_holds_nothing_in_the_next() -> None:
    governor = Governor(quiet(max_concurrency=1))

    async def abandoned() -> None:
        holds = asyncio.create_task(permit_for_ever())
        waits = asyncio.create_task(permit_for_ever())
        await asyncio.sleep(1.0)
        assert governor.in_flight == 1
        assert not holds.done()
        assert not waits.done()

    async def permit_for_ever() -> None:
        async with governor.permit(10.0):
            await asyncio.sleep(1e6)

    async def use() -> bool:
        async with governor.permit(10.0):
            return True

    run_virtual(abandoned())
    assert run_virtual(use())
    assert governor.in_flight == 0


def test_two_loops_at_once_are_refused_in_a_sentence() -> None:
    governor = Governor(quiet())

    async def elsewhere() -> str:
        with pytest.raises(PacelineError, match="at work in another event loop: use it in that one") as refused:
            async with governor.permit(1.0):
                pass
        return str(refused.value)

    async def main() -> str:
        async with governor.permit(1.0):
            return await asyncio.to_thread(asyncio.run, elsewhere())

    assert "\n" not in asyncio.run(main())


def test_real_use_is_booked_where_the_policy_settles() -> None:
    async def when(used: float | None, settles: int) -> float:
        governor = Governor(quiet(tpm=1_000, settles=settles, window=law.BUCKET))
        async with governor.permit(1_000.0) as permit:
            if used is not None:
                permit.used(used)
        async with governor.permit(1_000.0):
            return governor.loop.time()

    # 1,000 a minute: what was used must flow back first.
    assert run_virtual(when(100.0, 1)) == pytest.approx(6.0)
    assert run_virtual(when(100.0, 0)) == pytest.approx(60.0)
    assert run_virtual(when(None, 1)) == pytest.approx(60.0)


def test_a_throttled_permit_waits_inside_its_block_and_goes_before_the_others() -> None:
    told: list[tuple[str, float]] = []

    async def caller(governor: Governor) -> None:
        async with governor.permit(100.0) as permit:
            for attempt in (1, 2, 3):
                told.append((f"attempt {attempt}", governor.loop.time()))
                await asyncio.sleep(0.1)
                if attempt < 3:
                    assert await permit.throttled(9.0)
            permit.used(50.0)

    async def other(governor: Governor) -> None:
        await asyncio.sleep(0.05)
        async with governor.permit(100.0):
            told.append(("other", governor.loop.time()))

    async def main(keeps: int) -> None:
        told.clear()
        governor = Governor(quiet(stagger_s=15.0, hold_on_throttle=1, backoff_keeps_permit=keeps))
        tasks = asyncio.gather(caller(governor), other(governor))
        await asyncio.sleep(5.0)
        assert governor.in_flight == keeps
        await tasks
        nothing_held(governor)

    for keeps in (0, 1):
        run_virtual(main(keeps))
        # Retries need no slot. The others wait for them: the slot at 15 is within the second hold, which they leave as
        # long after the retry as its refusal took.
        assert told == [
            ("attempt 1", 0.0),
            ("attempt 2", pytest.approx(9.102)),
            ("attempt 3", pytest.approx(18.204)),
            ("other", pytest.approx(18.304)),
        ]


def test_a_permit_whose_attempts_or_time_are_spent_is_told_so() -> None:
    async def main(**changes: Any) -> tuple[bool, float]:
        governor = Governor(quiet(backoff_keeps_permit=1, **changes))
        async with governor.permit(1.0) as permit:
            attempts = 1
            while await permit.failed():
                attempts += 1
            assert governor.in_flight == 0
        nothing_held(governor)
        return attempts, governor.loop.time()

    assert run_virtual(main(max_attempts=3)) == (3, 6.0)
    # 2 and 4 s of backoff are within 10 s of the first launch, 8 more are not.
    assert run_virtual(main(deadline_s=10.0, max_attempts=9)) == (3, 6.0)


def test_a_permit_that_waits_past_its_deadline_is_told_so() -> None:
    async def main() -> float:
        governor = Governor(quiet(deadline_s=5.0, backoff_keeps_permit=1))
        async with governor.permit(1.0) as permit:
            governor.pause()
            assert not await permit.failed()
            nothing_held(governor)
            return governor.loop.time()

    assert run_virtual(main()) == 5.0


def test_headers_of_a_permits_answer_are_heard() -> None:
    async def main(left: float) -> float:
        governor = Governor(quiet(tpm=1_000, sync_headers=1, window=law.BUCKET))
        for _ in range(3):
            async with governor.permit(100.0) as permit:
                launched_s = permit.launched_s
                permit.used(100.0, (Limit("TPM", 1_000.0, left),))
        return launched_s

    async def refused() -> list[tuple[Any, ...]]:
        log = Log()
        governor = Governor(quiet(tpm=1_000, sync_headers=1, window=law.BUCKET, max_attempts=2), observer=log)
        async with governor.permit(100.0) as permit:
            assert await permit.throttled(1.0, (Limit("TPM", 1_000.0, 50.0),))
            assert not await permit.failed(limits=(Limit("RPM", 60.0, 59.0),))
        return [arguments[:5] for name, arguments, _ in log.decisions if name == "synced"]

    # Dimension, limit, what is left, what it had booked, and whether it was turned away.
    assert run_virtual(refused()) == [(law.TPM, 1_000.0, 50.0, 100.0, 1), (law.RPM, 60.0, 59.0, 1.0, 0)]
    assert run_virtual(main(900.0)) == 0.0
    # Two counts agree that others hold 850 of it: there is room for 50 and for what refills.
    assert run_virtual(main(50.0)) == pytest.approx(3.0)


def test_what_never_fits_is_refused_with_the_figures() -> None:
    async def main() -> None:
        governor = Governor(quiet(tpm=30_000), pool="eu")
        with pytest.raises(PacelineError, match="31,538 tokens never fits: pool 'eu' is limited to 30,000"):
            governor.permit(31_538.0)
        for none in (-1.0, float("nan")):
            with pytest.raises(PacelineError, match=f"a request of {none} tokens: reserve a number"):
                governor.permit(none)
        with pytest.raises(PacelineError, match="an answer that used nan tokens"):
            async with governor.permit(10.0) as permit:
                permit.used(float("nan"))

    run_virtual(main())


def test_permits_go_before_the_batch_they_share_with() -> None:
    log, granted = Log(), []

    async def caller(governor: Governor) -> None:
        await asyncio.sleep(2.5)
        async with governor.permit(100.0):
            granted.append(governor.loop.time())
            await asyncio.sleep(1.0)

    async def main() -> None:
        governor = Governor(quiet(max_concurrency=1), observer=log)
        task = asyncio.create_task(caller(governor))
        await governor.run(works(5), Desk(1.0).send)
        await task
        nothing_held(governor)

    run_virtual(main())
    assert granted == [3.0]
    assert log.launches == [(0.0, 0), (1.0, 1), (2.0, 2), (4.0, 3), (5.0, 4)]


def test_a_batch_ends_although_somebody_waits_for_a_permit() -> None:
    async def main() -> None:
        governor = Governor(quiet(tpm=500))
        holder = governor.permit(400.0)
        await holder.__aenter__()
        waiter = asyncio.create_task(governor.permit(400.0).__aenter__())
        await asyncio.sleep(0.0)
        governor.pause()
        assert await governor.run(works(0), Desk().send) == ""
        governor.resume()
        permit = await waiter
        assert governor.loop.time() == law.FIXED_S
        await permit.__aexit__()
        await holder.__aexit__()
        nothing_held(governor)

    run_virtual(main())


def test_stop_tells_those_who_wait_and_those_who_come() -> None:
    async def main() -> None:
        governor = Governor(quiet(max_concurrency=1), pool="eu")
        async with governor.permit(1.0):
            waiter = asyncio.create_task(governor.permit(1.0).__aenter__())
            await asyncio.sleep(1.0)
            governor.stop("INSUFFICIENT_QUOTA")
            with pytest.raises(PacelineError, match="'eu' launches nothing more: INSUFFICIENT_QUOTA"):
                await waiter
        with pytest.raises(PacelineError, match="launches nothing more"):
            async with governor.permit(1.0):
                pass
        nothing_held(governor)

    run_virtual(main())


@pytest.mark.parametrize("keeps", [0, 1])
def test_after_a_stop_a_permit_is_not_tried_again(keeps: int) -> None:
    async def main() -> None:
        governor = Governor(quiet(backoff_keeps_permit=keeps))
        async with governor.permit(1.0) as permit:
            governor.stop("operator")
            with pytest.raises(PacelineError, match="launches nothing more"):
                await permit.failed()
        nothing_held(governor)

    run_virtual(main())


@pytest.mark.parametrize("keeps", [0, 1])
@pytest.mark.parametrize("at", [1.0, 2.0, 4.0, 5.0])
def test_a_retry_may_be_cancelled_at_any_moment(keeps: int, at: float) -> None:
    """At 2 it may try again, at 5 it is given up; a real loop may call the timer before the waiter hears."""

    async def call(governor: Governor) -> None:
        async with governor.permit(1.0) as permit:
            governor.pause()
            await permit.failed()

    async def main() -> None:
        governor = Governor(quiet(backoff_keeps_permit=keeps, deadline_s=5.0))
        task = asyncio.create_task(call(governor))

        def cancelled_and_rung() -> None:
            assert governor._timer is not None
            governor._timer.cancel()
            task.cancel()
            governor._ring()

        if at in (2.0, 5.0):
            governor.loop.call_at(at, cancelled_and_rung)
        else:
            governor.loop.call_at(at, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert governor.loop.time() == at
        assert governor.stopped == ""
        nothing_held(governor)

    run_virtual(main())


def test_those_who_gave_up_waiting_are_forgotten() -> None:
    async def main() -> None:
        governor = Governor(quiet(max_concurrency=1))
        async with governor.permit(1.0):
            patient = asyncio.create_task(governor.permit(1.0).__aenter__())
            await asyncio.sleep(0.0)
            for _ in range(5_000):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01), governor.permit(1.0):
                        pass
            assert len(governor.scheduler._queue) < 250
        await (await patient).__aexit__()
        nothing_held(governor)

    run_virtual(main())


def test_a_bug_of_ours_is_told_to_those_who_wait() -> None:
    async def main() -> None:
        governor = Governor(quiet(stagger_s=5.0))
        async with governor.permit(1.0):
            waiter = asyncio.create_task(governor.permit(1.0).__aenter__())
            await asyncio.sleep(1.0)
            governor.s.next_slot_at = "soon"  # type: ignore[assignment]
            with pytest.raises(PacelineError, match="internal error: TypeError"):
                await waiter

    run_virtual(main())


def test_a_waiter_whom_a_lower_limit_shuts_out_is_told() -> None:
    async def main() -> None:
        governor = Governor(quiet(tpm=1_000))
        async with governor.permit(900.0):
            waiter = asyncio.create_task(governor.permit(800.0).__aenter__())
            await asyncio.sleep(1.0)
            governor.reprice(quiet(tpm=500))
            with pytest.raises(PacelineError, match="800 tokens never fits"):
                await waiter
        nothing_held(governor)

    run_virtual(main())


# ---------------------------------------------------------------- permits never leak


async def _cancelled_while_waiting(governor: Governor) -> None:
    async with governor.permit(1.0):
        task = asyncio.create_task(governor.permit(1.0).__aenter__())
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def _cancelled_before_it_began(governor: Governor) -> None:
    task = asyncio.create_task(governor.permit(1.0).__aenter__())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _cancelled_in_the_moment_of_the_grant(governor: Governor) -> None:
    async with governor.permit(1.0):
        task = asyncio.create_task(governor.permit(1.0).__aenter__())
        await asyncio.sleep(1.0)
    # The place was handed on just now; the waiter has not run since.
    assert governor.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _cancelled_just_before_the_grant(governor: Governor) -> None:
    async with governor.permit(1.0):
        task = asyncio.create_task(governor.permit(1.0).__aenter__())
        await asyncio.sleep(1.0)
        task.cancel()
    assert governor.in_flight == 0
    with pytest.raises(asyncio.CancelledError):
        await task


async def _cancelled_in_the_block(governor: Governor) -> None:
    async def block() -> None:
        async with governor.permit(1.0):
            await asyncio.sleep(1e6)

    task = asyncio.create_task(block())
    await asyncio.sleep(1.0)
    assert governor.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _an_exception_in_the_block(governor: Governor) -> None:
    with pytest.raises(Bug):
        async with governor.permit(1.0):
            raise Bug


async def _a_time_out_in_the_block(governor: Governor) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0), governor.permit(1.0):
            await asyncio.sleep(1e6)


async def _a_time_out_while_waiting(governor: Governor) -> None:
    async with governor.permit(1.0):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0), governor.permit(1.0):
                raise AssertionError("granted although the place was taken")


WAYS_OUT: list[Callable[[Governor], Coroutine[Any, Any, None]]] = [
    _cancelled_while_waiting,
    _cancelled_before_it_began,
    _cancelled_in_the_moment_of_the_grant,
    _cancelled_just_before_the_grant,
    _cancelled_in_the_block,
    _an_exception_in_the_block,
    _a_time_out_in_the_block,
    _a_time_out_while_waiting,
]


@pytest.mark.parametrize("way_out", WAYS_OUT, ids=lambda way: way.__name__.strip("_"))
@pytest.mark.parametrize("keeps", [0, 1])
def test_on_every_way_out_the_permit_comes_back(way_out: Callable[[Governor], Awaitable[None]], keeps: int) -> None:
    async def main() -> None:
        governor = Governor(quiet(max_concurrency=1, backoff_keeps_permit=keeps))
        await way_out(governor)
        assert governor.in_flight == 0
        # And the next one gets it at once.
        before = governor.loop.time()
        async with governor.permit(1.0):
            assert (governor.in_flight, governor.loop.time()) == (1, before)
        nothing_held(governor)

    run_virtual(main())


def test_a_storm_of_cancellations_leaks_nothing(seed: int) -> None:
    rng = random.Random(seed)
    most = [0]

    async def caller(governor: Governor) -> None:
        await asyncio.sleep(rng.uniform(0.0, 60.0))
        async with governor.permit(rng.uniform(1.0, 200.0)) as permit:
            most[0] = max(most[0], governor.in_flight)
            await asyncio.sleep(rng.uniform(0.0, 5.0))
            way = rng.random()
            if way < 0.2:
                raise Bug
            if way < 0.4:
                await permit.throttled(rng.choice([-1.0, 2.0]))
            elif way < 0.5:
                await permit.failed()
            elif way < 0.8:
                permit.used(10.0)

    async def main(p: law.Params) -> None:
        governor = Governor(p)
        tasks = [asyncio.create_task(caller(governor)) for _ in range(400)]
        for task in tasks:
            if rng.random() < 0.5:
                # Whole quarters of a second meet other events exactly.
                governor.loop.call_at(rng.randint(0, 400) / 4.0, task.cancel)
        if rng.random() < 0.3:
            governor.loop.call_at(40.0, governor.stop, "operator")
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, Bug | asyncio.CancelledError | PacelineError) for end in ends)
        nothing_held(governor)
        assert governor.scheduler._queue == [] or all(job.ended for _, _, job in governor.scheduler._queue)

    for _ in range(20):
        cap, keeps, hold = rng.randint(1, 9), rng.randint(0, 1), rng.randint(0, 1)
        tpm, window = rng.choice([0, 5_000]), rng.randint(0, 2)
        p = quiet(max_concurrency=cap, backoff_keeps_permit=keeps, hold_on_throttle=hold, tpm=tpm, window=window)
        most[0] = 0
        run_virtual(main(p))
        assert 0 < most[0] <= cap


class Counted:
    """An awaitable that counts how often whoever awaits it is woken."""

    def __init__(self, awaited: Coroutine[Any, Any, Any], wakes: list[int]) -> None:
        self.awaited = awaited
        self.wakes = wakes

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self.awaited.__await__()
        value = None
        while True:
            try:
                waits_for = steps.send(value)
            except StopIteration as end:
                return end.value
            value = yield waits_for
            self.wakes[0] += 1


def test_ten_thousand_waiting_tasks_are_woken_once_each() -> None:
    count = 10_000
    wakes = [0]
    timers: list[int] = []

    async def caller(governor: Governor) -> None:
        permit: Permit = await Counted(governor.permit(100.0).__aenter__(), wakes)
        loop = governor.loop
        assert isinstance(loop, VirtualLoop)
        if len(timers) < 200:  # looking at them all each time would be quadratic
            timers.append(sum(callback == governor._ring for _, callback in loop.timers()))
        await permit.__aexit__()

    async def main() -> None:
        governor = Governor(quiet(stagger_s=1.0, max_concurrency=3))
        await asyncio.gather(*(caller(governor) for _ in range(count)))
        loop = governor.loop
        assert isinstance(loop, VirtualLoop)
        # One timer rang for each but the first, and each of those who waited was woken by its own.
        assert loop.timers_rung == count - 1
        nothing_held(governor)
        assert loop.time() == count - 1.0

    run_virtual(main())
    assert wakes[0] == count - 1  # the first need not wait
    assert set(timers) <= {0, 1}
    assert max(timers) == 1


# ---------------------------------------------------------------- callers that would rather not wait


def test_how_long_it_would_wait_is_how_long_it_waits() -> None:
    """Equal answers, each request with its own reservation: the law asked ahead says what the law then does."""
    rng = random.Random(seed := random.randrange(1_000_000))
    print(f"seed {seed}")
    told: list[tuple[float, float]] = []

    async def caller(governor: Governor) -> None:
        reserve = float(rng.randint(1, 900))
        wait_s, asked_at = governor.wait_s(reserve), governor.loop.time()
        async with governor.permit(reserve) as permit:
            told.append((wait_s, governor.loop.time() - asked_at))
            await asyncio.sleep(2.0)
            await permit.answered(OK)

    async def main(**settings: Any) -> None:
        governor = Governor(quiet(tpm=3_000, max_concurrency=3, settles=0, **settings))
        await caller(governor)
        tasks = []
        for _ in range(40):
            tasks.append(asyncio.create_task(caller(governor)))
            await asyncio.sleep(rng.expovariate(0.5))
        await asyncio.gather(*tasks)

    for settings in ({"window": law.BUCKET}, {"window": law.FIXED, "stagger_s": 1.5}):
        told.clear()
        run_virtual(main(**settings))
        assert max(wait for wait, _ in told) > 10.0
        for wait_s, waited_s in told:
            assert wait_s == pytest.approx(waited_s, abs=1e-6)


def test_nobody_can_say_how_long_a_pause_lasts_and_to_ask_changes_nothing() -> None:
    async def main() -> None:
        governor = Governor(quiet(tpm=1_000, window=law.BUCKET))
        before = repr(governor.s)
        assert governor.wait_s(1_000.0) == 0.0
        assert repr(governor.s) == before
        governor.pause()
        assert governor.wait_s(1.0) == math.inf
        with pytest.raises(PacelineError, match="never fits"):
            governor.wait_s(1_001.0)

    run_virtual(main())


def test_a_permit_is_refused_after_its_longest_wait_and_leaves_nothing() -> None:
    async def main() -> None:
        governor = Governor(quiet(tpm=1_000, window=law.BUCKET))
        async with governor.permit(1_000.0, max_wait_s=0.0):
            pass
        with pytest.raises(Refused, match="'default' cannot send a request within 5 s") as refused:
            async with governor.permit(500.0, max_wait_s=5.0):
                pass
        assert governor.loop.time() == 5.0
        assert refused.value.retryable
        async with governor.permit(500.0, max_wait_s=60.0):
            assert governor.loop.time() == pytest.approx(30.0)
        nothing_held(governor)

    run_virtual(main())


def test_a_permit_is_tried_without_waiting() -> None:
    async def main() -> None:
        governor = Governor(quiet(max_concurrency=1))
        permit = governor.try_permit(10.0)
        assert permit is not None
        assert governor.try_permit(10.0) is None
        async with permit:
            assert governor.in_flight == 1
        again = governor.try_permit(10.0)
        assert again is not None
        again.give_back()
        again.give_back()
        nothing_held(governor)

    run_virtual(main())


def test_a_permit_that_is_told_whole_answers_shows_its_attempts() -> None:
    log = Log()
    request = work(7).request

    async def main() -> None:
        governor = Governor(quiet(), observer=log)
        async with governor.permit(100.0, request=request, charge=80) as permit:
            assert await permit.answered(THROTTLED)
            assert await permit.answered(BROKEN)
            assert not await permit.answered(OK)
        async with governor.permit(100.0, request=request) as permit:
            permit.over(BROKEN)
        nothing_held(governor)

    run_virtual(main())
    assert [row.outcome for row in log.rows] == [
        Outcome.THROTTLED,
        Outcome.SERVER_ERROR,
        Outcome.OK,
        Outcome.SERVER_ERROR,
    ]
    assert [row.attempt for row in log.rows] == [1, 2, 3, 1]
    assert [code for _, code, _ in log.ends] == ["", "OPENAI_SERVER_ERROR"]


def test_an_interactive_permit_goes_before_the_batch_and_finds_its_share_free() -> None:
    granted: list[tuple[str, float]] = []

    async def caller(governor: Governor, lane: str, tokens: float) -> None:
        async with governor.permit(tokens, lane=lane) as permit:
            granted.append((lane, governor.loop.time()))
            await asyncio.sleep(1.0)
            permit.used(tokens)

    async def main() -> None:
        governor = Governor(quiet(tpm=6_000, window=law.BUCKET, interactive_ratio=0.2, settles=0, stagger_s=0.0))
        batch = [asyncio.create_task(caller(governor, "batch", 1_000.0)) for _ in range(8)]
        await asyncio.sleep(0.5)
        assert governor.wait_s(1_000.0, lane="interactive") == 0.0
        assert governor.wait_s(1_000.0) > 30.0
        await caller(governor, "interactive", 1_000.0)
        await asyncio.gather(*batch)
        with pytest.raises(PacelineError, match="lane 'urgent' does not exist: use batch or interactive"):
            governor.permit(1.0, lane="urgent")
        nothing_held(governor)

    run_virtual(main())
    assert [at for lane, at in granted if lane == "interactive"] == [0.5]
    # 4,800 for the batch at once, and 100 a second from then on, of which the interactive request took 1,000.
    assert [at for lane, at in granted if lane == "batch"] == pytest.approx([0, 0, 0, 0, 12, 22, 32, 42])

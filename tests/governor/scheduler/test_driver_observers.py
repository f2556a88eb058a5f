"""The driver and its observers: what it tells, what an observer may do meanwhile, and bugs in what it is given."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from governor import law
from governor.model.errors import PacelineError
from governor.model.requests import Answer, Limit, Outcome, Request
from governor.model.work import Job, Observer, Work
from governor.scheduler.driver import Governor
from tests.governor.desks import (
    BROKEN,
    CUT,
    OK,
    THROTTLED,
    Desk,
    Log,
    Ran,
    nothing_held,
    quiet,
    work,
    works,
)
from tests.governor.laws import replayed
from tests.virtual_loop import run_virtual

# ---------------------------------------------------------------- observers


def test_a_launch_is_told_and_flushed_before_it_is_sent() -> None:
    told: list[str] = []

    class Durable(Observer):
        def launched(self, job: Job, now: float) -> None:
            told.append(f"{now:g} launched {job.index}")

        async def flushed(self) -> None:
            await asyncio.sleep(0.5)
            told.append(f"{asyncio.get_running_loop().time():g} flushed")

        def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
            told.append(f"{now:g} ended {request.index}")

    class Telling(Desk):
        async def send(self, job: Job, timeout_s: float) -> Answer:
            told.append(f"{asyncio.get_running_loop().time():g} sent {job.index}, {timeout_s:g} s left")
            return await super().send(job, timeout_s)

    Ran(quiet(max_concurrency=1, timeout_s=60.0), Telling(2.0), works(2), log=Durable())
    assert told == [
        "0 launched 0",
        "0.5 flushed",
        "0.5 sent 0, 60 s left",
        "2.5 ended 0",
        "2.5 launched 1",
        "3 flushed",
        "3 sent 1, 60 s left",
        "5 ended 1",
    ]


def test_a_deferral_counts_once_per_request_and_cause() -> None:
    # Request 1 waits for its slot, is asked about at 1 and at 2 when others end, and for its minute after that.
    p = quiet(stagger_s=5.0, tpm=150, max_concurrency=10)
    ran = Ran(p, Desk(1.0), works(2))
    assert ran.sent == [(0.0, 0), (law.FIXED_S, 1)]
    assert ran.log.deferrals == [law.BY_TPM]
    steps = [(float(at), Governor.pause if at % 2 else Governor.resume) for at in range(1, 20)]
    steps.append((20.0, Governor.resume))
    ran = Ran(p, Desk(1.0), works(2), steps=steps)
    assert sorted(ran.log.deferrals) == [law.BY_TPM, law.PAUSED]


def test_decisions_replay_to_the_bit(seed: int) -> None:
    rng = random.Random(seed)
    ways = [
        OK,
        THROTTLED,
        BROKEN,
        CUT,
        Answer(Outcome.OK, 200, limits=(Limit("TPM", 900.0, 300.0), Limit("RPM", 60.0, 3.0))),
    ]
    script = {i: [(rng.uniform(0.1, 9.0), rng.choice(ways)) for _ in range(4)] for i in range(60)}
    busy: dict[str, Any] = {"tpm": 1_000, "rpm": 60, "sync_headers": 1, "settles": 1, "hold_on_throttle": 1}
    steps: list[tuple[float, Callable[[Governor], Any]]] = [
        (20.0, lambda governor: governor.reprice(quiet(**busy, window=law.SLIDING, stagger_s=0.3, jitter_ratio=0.2))),
        (33.0, Governor.pause),
        (40.0, Governor.resume),
    ]
    p = quiet(**busy, window=law.BUCKET, jitter_ratio=0.2, max_attempts=9)
    ran = Ran(
        p, Desk(script=script), iter([work(i, finalize_reserve=40.0) for i in range(60)]), steps=steps, finalize=True
    )
    names = {name for name, _, _ in ran.log.decisions}
    assert names >= {"admission", "launched", "settled", "throttled", "failed", "synced", "finalize_opened"}
    assert names >= {"finalize_closed", "paused", "resumed", "repriced"}
    again = replayed(p, ran.log.decisions)
    assert repr(again) == repr(ran.governor.s)


def test_an_observer_may_stop_the_run_in_the_middle_of_a_launch() -> None:
    class Stopping(Log):
        governor: Governor

        def launched(self, job: Job, now: float) -> None:
            super().launched(job, now)
            if job.index == 2:
                self.governor.stop("enough")

    log = Stopping()
    steps = [(0.0, lambda governor: setattr(log, "governor", governor))]
    ran = Ran(quiet(stagger_s=1.0), Desk(), works(50), log=log, steps=steps)
    assert ran.why == "enough"
    assert [i for _, i in log.launches] == [0, 1, 2]
    assert log.ends == [(0, "", 1.0), (1, "", 2.0), (2, "", 3.0)]


def test_an_observer_may_pause_and_reprice_in_the_middle_of_a_launch() -> None:
    class Changing(Log):
        governor: Governor

        def launched(self, job: Job, now: float) -> None:
            super().launched(job, now)
            if job.index == 1:
                self.governor.pause()
                self.governor.reprice(quiet(stagger_s=5.0))
                self.governor.loop.call_later(20.0, self.governor.resume)

    log = Changing()
    steps = [(0.0, lambda governor: setattr(log, "governor", governor))]
    ran = Ran(quiet(stagger_s=1.0), Desk(), works(4), log=log, steps=steps)
    assert ran.sent == [(0.0, 0), (1.0, 1), (21.0, 2), (26.0, 3)]


# ---------------------------------------------------------------- bugs in what it is given


class Bug(Exception):  # noqa: N818
    pass


async def raises_bug(p: law.Params, desk: Desk, source: Iterator[Work], log: Observer) -> Governor:
    governor = Governor(p, observer=log)
    with pytest.raises(Bug):
        await governor.run(source, desk.send)
    nothing_held(governor)
    assert "Bug" in governor.stopped
    return governor


def test_a_send_that_raises_stops_the_run_when_those_in_flight_have_ended() -> None:
    class Faulty(Desk):
        async def send(self, job: Job, timeout_s: float) -> Answer:
            answer = await super().send(job, timeout_s)
            if job.index == 1:
                raise Bug
            return answer

    log, desk = Log(), Faulty(script={0: [(5.0, OK)], 1: [(2.0, OK)], 2: [(1.0, OK)]})
    run_virtual(raises_bug(quiet(max_concurrency=3), desk, works(50), log))
    # 3 takes the place of 2 at 1; nobody that of 1 at 2. What was paid for is kept.
    assert desk.sent == [(0.0, 0, 1), (0.0, 1, 1), (0.0, 2, 1), (1.0, 3, 1)]
    assert log.ends == [(2, "", 1.0), (3, "", 2.0), (0, "", 5.0)]


def test_a_send_that_is_cancelled_from_inside_stops_the_run() -> None:
    class Faulty(Desk):
        async def send(self, job: Job, timeout_s: float) -> Answer:
            raise asyncio.CancelledError

    async def main() -> None:
        governor = Governor(quiet())
        with pytest.raises(PacelineError, match="cancelled by something inside"):
            await governor.run(works(3), Faulty().send)
        nothing_held(governor)

    run_virtual(main())


def test_a_time_out_error_of_the_sends_own_is_a_bug_too() -> None:
    class Faulty(Desk):
        async def send(self, job: Job, timeout_s: float) -> Answer:
            raise TimeoutError("not ours")

    async def main() -> None:
        governor = Governor(quiet())
        with pytest.raises(TimeoutError, match="not ours"):
            await governor.run(works(3), Faulty().send)
        nothing_held(governor)

    run_virtual(main())


def faulty_observer(method: str, at: int) -> Log:
    """A log that fails at the `at`-th call of that method."""
    log, calls = Log(), [0]

    def count() -> None:
        calls[0] += 1
        if calls[0] == at:
            raise Bug

    async def flushed() -> None:
        count()

    def other(*arguments: Any) -> None:
        getattr(Log, method)(log, *arguments)
        count()

    setattr(log, method, flushed if method == "flushed" else other)
    return log


@pytest.mark.parametrize("method", ["launched", "flushed", "attempted", "ended", "deferred", "decided"])
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("keeps", [0, 1])
def test_an_observer_that_raises_stops_the_run(method: str, at: int, keeps: int) -> None:
    log = faulty_observer(method, at)
    desk = Desk(script={i: [(1.0 + 0.1 * i, THROTTLED)] for i in range(9)})
    p = quiet(max_concurrency=3, backoff_keeps_permit=keeps, tpm=500)
    run_virtual(raises_bug(p, desk, works(20), log))
    if method in ("launched", "flushed"):
        # A launch that no record knows of for sure is not sent.
        assert len(desk.sent) == len(log.launches) - 1


def test_a_source_that_raises_stops_the_run() -> None:
    def source() -> Iterator[Work]:
        yield from works(3)
        raise Bug

    log = Log()
    run_virtual(raises_bug(quiet(max_concurrency=1), Desk(), source(), log))
    assert [end[:2] for end in log.ends] == [(0, ""), (1, ""), (2, "")]


def test_a_bug_of_ours_in_a_callback_of_the_loop_is_heard() -> None:
    async def main() -> None:
        desk = Desk(100.0)
        governor = Governor(quiet(stagger_s=5.0))
        governor.loop.call_at(1.0, setattr, governor.s, "next_slot_at", "soon")
        with pytest.raises(TypeError, match="str"):
            await governor.run(works(9), desk.send)
        # At once, with what is in flight: of such a state nobody knows what comes next.
        assert governor.loop.time() == 5.0
        assert desk.cancelled == [0]
        assert "internal error" in governor.stopped

    run_virtual(main())


@pytest.mark.parametrize("at", [0.0, 0.25, 0.5, 1.0, 2.5, 30.0])
@pytest.mark.parametrize("keeps", [0, 1])
def test_cancelling_the_run_cancels_what_is_in_flight(at: float, keeps: int) -> None:
    desk, log = Desk(100.0, script={0: [(0.5, THROTTLED)], 1: [(0.5, CUT)]}), Log()

    async def main() -> None:
        governor = Governor(quiet(max_concurrency=8, backoff_keeps_permit=keeps), observer=log)
        run = asyncio.create_task(governor.run(works(30), desk.send, finalize=True))
        await asyncio.sleep(at)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        nothing_held(governor)

    run_virtual(main())
    # In flight was what had been sent and not answered; it leaves no row and no end, so that it is sent again.
    assert len(desk.cancelled) == len(desk.sent) - len(log.rows) > 0
    assert log.ends == []

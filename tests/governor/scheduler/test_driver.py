"""The asyncio driver, read as timetables on a virtual clock: a batch is sent when it should be, and nothing leaks.

Nothing sleeps and nothing is mocked: a `Desk` answers as a test's script says, on the same virtual loop. That the
driver decides as the simulation does, on any scenario, is `test_two_worlds`' matter; here stands what only the live
half has: terminal answers, observers, changes by hand, cancellation, and bugs in what it is given. Permits have a
file of their own.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from governor import law
from governor.model.errors import FailureCode
from governor.model.requests import Answer, Limit, Outcome, Request
from governor.model.work import Job, Observer, Work
from governor.scheduler.driver import Governor
from tests.governor.desks import (
    BROKEN,
    CUT,
    OK,
    REFUSAL_S,
    THROTTLED,
    Desk,
    Log,
    Ran,
    quiet,
    work,
    works,
)
from tests.governor.laws import params, replayed
from tests.virtual_loop import VirtualLoop, run_virtual

# ---------------------------------------------------------------- a batch


def test_ten_runs_of_7000_tokens_keep_the_guardrails() -> None:
    ran = Ran(params(jitter_ratio=0.0), Desk(20.0), works(10, 7_000.0))
    # Three of 7,000 fit into 25,500; each minute is anchored by its first launch, and two launches are 15 s apart.
    minutes = [i * law.FIXED_S for i in range(4)]
    assert [at for at, _ in ran.sent] == pytest.approx([m + s for m in minutes for s in (0.0, 15.0, 30.0)][:10])
    assert ran.log.ends == [(i, "", at + 20.0) for at, i in ran.sent]
    assert sorted(ran.log.deferrals) == [law.STAGGER] * 6 + [law.BY_TPM] * 3
    fourth = next(a for a in ran.log.rows if a.request == 3)
    # Its own cause each moment: the slot until 45, then the minute.
    assert (fourth.waited_stagger_s, fourth.waited_tpm_s) == pytest.approx((30.0, law.FIXED_S - 30.0))
    assert ran.desk.timeouts == [600.0] * 10


def test_what_this_machine_could_not_send_is_no_attempt() -> None:
    """Twenty times without descriptors, then a failure, then an answer, with two attempts in all."""
    none_left = Answer(Outcome.LOCAL, message="this machine could not send it: [Errno 24] Too many open files")
    desk = Desk(script={0: [(0.0, none_left)] * 20 + [(0.0, BROKEN), (0.0, none_left), (1.0, OK)]})
    ran = Ran(quiet(max_attempts=2), desk, works(1))
    assert [(index, failure) for index, failure, _ in ran.log.ends] == [(0, "")]
    assert [a.attempt for a in ran.log.rows] == [1] * 21 + [2, 2]
    assert sum(a.charged_tokens for a in ran.log.rows) == 160, "the provider saw two"
    # Half the base of the backoff each time, since it passes as soon as something else is closed.
    assert desk.at(0)[1:21] == pytest.approx([float(n) for n in range(1, 21)])


def test_five_throttles_end_a_request() -> None:
    desk = Desk(script={0: [(REFUSAL_S, THROTTLED)] * 5})
    ran = Ran(quiet(), desk, works(2))
    waits = [2.0, 4.0, 8.0, law.FIXED_S - 14.0 - 4 * REFUSAL_S]
    assert desk.at(0) == pytest.approx([sum(waits[:n]) + n * REFUSAL_S for n in range(5)])
    assert [a.waited_backoff_s for a in ran.log.rows if a.request == 0] == pytest.approx([0.0, *waits])
    assert ran.log.ends == [(1, "", 1.0), (0, FailureCode.RATE_LIMIT_EXHAUSTED, desk.at(0)[-1] + REFUSAL_S)]
    assert [a.charged_tokens for a in ran.log.rows if a.request == 0] == [0] * 5


def test_a_stated_wait_wins_and_failures_cost_their_charge() -> None:
    says = Answer(Outcome.THROTTLED, 429, retry_after_s=7.0)
    desk = Desk(script={0: [(1.0, says), (1.0, BROKEN), (1.0, Answer(Outcome.DROPPED)), (1.0, OK)]})
    ran = Ran(quiet(), desk, works(1))
    assert desk.at(0) == pytest.approx([0.0, 8.002, 13.002, 22.002])
    assert [a.charged_tokens for a in ran.log.rows] == [0, 80, 80, 80]
    assert [a.outcome for a in ran.log.rows] == ["throttled", "server_error", "dropped", "ok"]


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome.SERVER_ERROR, "OPENAI_SERVER_ERROR"),
        (Outcome.OVERLOADED, "OPENAI_SERVER_ERROR"),
        (Outcome.DROPPED, "OPENAI_CONNECTION_DROPPED"),
        (Outcome.SLOW_DOWN, "OPENAI_RATE_LIMIT_EXHAUSTED"),
    ],
)
def test_the_last_failure_names_the_code(outcome: Outcome, code: str) -> None:
    desk = Desk(script={0: [(1.0, BROKEN), (1.0, Answer(outcome))]})
    ran = Ran(quiet(max_attempts=2), desk, works(1))
    assert [(index, failure) for index, failure, _ in ran.log.ends] == [(0, code)]


@pytest.mark.parametrize(
    ("answer", "code", "charged"),
    [
        (Answer(Outcome.BAD_REQUEST, 400), FailureCode.BAD_REQUEST, 80),
        (Answer(Outcome.TOO_LARGE, 429), FailureCode.REQUEST_TOO_LARGE, 0),
        (Answer(Outcome.MALFORMED, 200), FailureCode.UNREADABLE_ANSWER, 80),
    ],
)
def test_what_can_never_succeed_is_tried_once(answer: Answer, code: str, charged: int) -> None:
    ran = Ran(quiet(max_concurrency=1), Desk(script={0: [(1.0, answer)]}), works(2))
    assert ran.sent == [(0.0, 0), (1.0, 1)]
    assert ran.log.ends == [(0, code, 1.0), (1, "", 2.0)]
    assert ran.log.rows[0].charged_tokens == charged


def test_a_cut_answer_is_finished_before_new_work_and_under_the_lower_cap() -> None:
    p = quiet(max_concurrency=3, finalize_max_concurrency=2)
    long = [work(i, finalize_reserve=50.0) for i in range(5)]
    desk = Desk(4.0, script={0: [(1.0, CUT), (2.0, OK)]})
    ran = Ran(p, desk, iter(long), finalize=True)
    # 0, 1, 2 start; at 1 the pass waits since two are in flight, from 4 on it runs alone with one of the new ones.
    assert ran.sent == [(0.0, 0), (0.0, 1), (0.0, 2), (4.0, 0), (4.0, 3), (6.0, 4)]
    assert [(a.lane, a.attempt, a.submitted_s, a.reserved_tokens) for a in ran.log.rows if a.request == 0] == [
        ("main", 1, 0.0, 100),
        ("finalize", 1, 1.0, 50),
    ]
    assert ran.log.ends[0] == (1, "", 4.0)
    assert (0, "", 6.0) in ran.log.ends


def test_without_finalize_a_cut_answer_is_an_answer() -> None:
    ran = Ran(quiet(), Desk(script={0: [(1.0, CUT)]}), works(1))
    assert ran.log.ends == [(0, "", 1.0)]


def test_usage_that_is_not_stated_leaves_the_reservation_booked() -> None:
    half = Answer(Outcome.OK, 200, used_prompt_tokens=10, has_text=True)
    p = quiet(tpm=200, settles=1, window=law.BUCKET)
    ran = Ran(p, Desk(script={0: [(1.0, half)]}), works(3))
    # 0 and 1 take the 200 of a minute. At 1 the first gives nothing back, the second 85 of 100: 15 are still to come at
    # 200 a minute, less what came in the second before.
    assert ran.sent == [(0.0, 0), (0.0, 1), (pytest.approx(15.0 / (200.0 / 60.0)), 2)]


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(Outcome.QUOTA, FailureCode.INSUFFICIENT_QUOTA), (Outcome.UNAUTHORIZED, FailureCode.UNAUTHORIZED)],
)
def test_when_the_account_is_at_fault_nothing_more_is_sent(outcome: Outcome, code: str) -> None:
    script = {0: [(2.0, THROTTLED)], 1: [(3.0, Answer(outcome, 429))], 2: [(9.0, THROTTLED)], 3: [(5.0, CUT)]}
    ran = Ran(quiet(max_concurrency=4, backoff_keeps_permit=1), Desk(script=script), works(1_000), finalize=True)
    assert ran.why == code
    assert ran.governor.stopped == code
    # 0 backs off until 4 when the account fails at 3; 2 and 3 end as they may, and then nobody waits for anything.
    assert ran.sent == [(0.0, 0), (0.0, 1), (0.0, 2), (0.0, 3)]
    assert ran.over_s == 9.0
    # All of them stay pending: none was lost, none was answered for good.
    assert ran.log.ends == []
    assert [a.error_code for a in ran.log.rows] == [""] * len(ran.log.rows)


def test_who_does_not_answer_is_cut_off_at_the_time_out() -> None:
    desk = Desk(script={0: [(1e9, OK), (2.0, OK)]})
    ran = Ran(quiet(timeout_s=30.0), desk, works(1))
    assert desk.cancelled == [0]
    assert [(a.outcome, a.finished_s) for a in ran.log.rows] == [("timeout", 30.0), ("ok", 34.0)]


def test_the_deadline_ends_those_in_flight_and_those_that_wait() -> None:
    says = Answer(Outcome.THROTTLED, 429, retry_after_s=20.0)
    desk = Desk(script={0: [(1.0, BROKEN)], 1: [(2.0, says)], 2: [(1e9, OK)]})
    ran = Ran(quiet(deadline_s=10.0, hold_on_throttle=1, backoff_keeps_permit=1), desk, works(3))
    code = FailureCode.DEADLINE_EXCEEDED
    # 1's wait reaches past its deadline: given up at once. The hold ends 10 s after 2, so that 0 is given up at 10.
    assert sorted(ran.log.ends, key=lambda end: end[2]) == [(1, code, 2.0), (2, code, 10.0), (0, code, 10.0)]
    assert ran.desk.timeouts == [10.0] * 3


def test_what_never_fits_is_never_sent() -> None:
    source = iter([work(0), work(1, 2_000.0), work(2)])
    ran = Ran(quiet(tpm=1_000), Desk(), source)
    assert ran.sent == [(0.0, 0), (0.0, 2)]
    assert ran.log.ends[0] == (1, FailureCode.REQUEST_TOO_LARGE, 0.0)
    assert len(ran.log.rows) == 2


def test_an_empty_batch_ends_at_once() -> None:
    ran = Ran(quiet(), Desk(), works(0))
    assert (ran.why, ran.over_s, ran.log.ends) == ("", 0.0, [])


def test_the_source_is_read_one_request_ahead() -> None:
    read: list[int] = []
    ahead: list[int] = []

    def source() -> Iterator[Work]:
        for i in range(50):
            read.append(i)
            yield work(i)

    class Watching(Log):
        def launched(self, job: Job, now: float) -> None:
            super().launched(job, now)
            ahead.append(len(read) - len(self.launches))

    ran = Ran(quiet(max_concurrency=3, stagger_s=1.0), Desk(7.0), source(), log=Watching())
    assert len(ran.log.ends) == 50
    assert set(ahead[:-1]) == {1}
    assert ahead[-1] == 0


def test_headers_are_told_beside_what_was_booked_since_the_launch() -> None:
    limits = (Limit("TPM", 1_000.0, 200.0), Limit("RPM", 60.0, 59.0))
    stated = Answer(Outcome.OK, 200, limits=limits)
    log = Log()
    Ran(quiet(tpm=1_000, sync_headers=1, window=law.BUCKET), Desk(script={0: [(6.0, stated)]}), works(1), log=log)
    calls = [arguments for name, arguments, _ in log.decisions if name == "synced"]
    #        dimension, limit, remaining, booked by itself, refused, booked since, launched, now
    assert calls == [
        (law.TPM, 1_000.0, 200.0, 100.0, 0, 100.0, 0.0, 6.0),
        (law.RPM, 60.0, 59.0, 1.0, 0, 1.0, 0.0, 6.0),
    ]


def test_who_was_turned_away_had_nothing_booked_there() -> None:
    limits = (Limit("TPM", 1_000.0, 50.0), Limit("RPD", 60.0, 59.0))
    too_large = Answer(Outcome.TOO_LARGE, 429, limits=limits)
    bad = Answer(Outcome.BAD_REQUEST, 400, limits=limits)
    script = {0: [(1.0, too_large)], 1: [(2.0, bad)]}
    log = Log()
    Ran(quiet(tpm=1_000, sync_headers=1, window=law.BUCKET), Desk(script=script), works(2), log=log)
    refused = [arguments[3:5] for name, arguments, _ in log.decisions if name == "synced"]
    assert refused == [(100.0, 1), (1.0, 1), (100.0, 0), (1.0, 0)]


# ---------------------------------------------------------------- changes by hand


def test_pause_and_resume() -> None:
    steps = [(2.5, Governor.pause), (10.0, Governor.resume)]
    ran = Ran(quiet(max_concurrency=1), Desk(1.0), works(4), steps=steps)
    assert ran.sent == [(0.0, 0), (1.0, 1), (2.0, 2), (10.0, 3)]
    last = ran.log.rows[-1]
    # Its own cause: concurrency from 0 to 2.5, then the pause.
    assert (last.waited_concurrency_s, last.waited_paused_s) == (2.5, 7.5)
    assert ran.log.deferrals == [law.CONCURRENCY] * 3 + [law.PAUSED]


def test_pausing_before_the_run_holds_it() -> None:
    log = Log()

    async def main() -> None:
        governor = Governor(quiet(), observer=log)
        governor.pause()
        asyncio.get_running_loop().call_at(5.0, governor.resume)
        await governor.run(works(1), Desk().send)

    run_virtual(main())
    assert log.launches == [(5.0, 0)]


def test_a_longer_stagger_moves_the_next_slot() -> None:
    steps = [(12.0, lambda governor: governor.reprice(quiet(stagger_s=25.0)))]
    ran = Ran(quiet(stagger_s=10.0), Desk(1.0), works(4), steps=steps)
    assert ran.sent == [(0.0, 0), (10.0, 1), (35.0, 2), (60.0, 3)]
    steps = [(12.0, lambda governor: governor.reprice(quiet(stagger_s=1.0)))]
    ran = Ran(quiet(stagger_s=10.0), Desk(1.0), works(4), steps=steps)
    assert ran.sent == [(0.0, 0), (10.0, 1), (12.0, 2), (13.0, 3)]


def test_a_lower_limit_refuses_what_no_longer_fits_and_frees_its_place() -> None:
    says = Answer(Outcome.THROTTLED, 429, retry_after_s=5.0)
    keeps = {"backoff_keeps_permit": 1, "window": law.BUCKET, "max_concurrency": 2}
    steps = [(3.0, lambda governor: governor.reprice(quiet(tpm=600, **keeps)))]
    source = iter([work(0, 900.0), work(1, 100.0), work(2, 800.0), work(3, 100.0)])
    ran = Ran(quiet(tpm=1_000, **keeps), Desk(30.0, script={0: [(1.0, says)]}), source, steps=steps)
    # 2 is at the head at 3; 0 comes back with its place at 6.002, is refused, and 3 takes the place.
    assert ran.log.ends[:2] == [
        (2, FailureCode.REQUEST_TOO_LARGE, 3.0),
        (0, FailureCode.REQUEST_TOO_LARGE, 6.002),
    ]
    assert {index for index, failure, _ in ran.log.ends if not failure} == {1, 3}


def test_a_deadline_may_come_and_go_in_mid_run() -> None:
    says = Answer(Outcome.THROTTLED, 429, retry_after_s=4.0)
    held = {"hold_on_throttle": 1, "max_concurrency": 10}
    steps = [(6.0, lambda governor: governor.reprice(quiet(deadline_s=9.0, **held)))]
    # 0 may try again from 5 on but waits for the hold that 1 draws; a deadline of 9 s from its launch is set at 6.
    script = {0: [(1.0, BROKEN)], 1: [(2.0, Answer(Outcome.THROTTLED, 429, retry_after_s=50.0))]}
    ran = Ran(quiet(**held), Desk(script=script), works(2), steps=steps)
    assert (0, FailureCode.DEADLINE_EXCEEDED, 9.0) in ran.log.ends
    # And the other way round: set at first, taken away while they wait.
    steps = [(6.0, lambda governor: governor.reprice(quiet(**held)))]
    script = {0: [(1.0, BROKEN)], 1: [(2.0, says)]}
    ran = Ran(quiet(deadline_s=12.5, **held), Desk(script=script), works(2), steps=[])
    assert [failure for _, failure, _ in ran.log.ends] == ["", ""]
    # 1 is given up at once, and holds the pool until a deadline from then on, 9.5. 0 would have been given up at 7.5.
    later = {0: [(1.0, BROKEN)], 1: [(2.0, Answer(Outcome.THROTTLED, 429, retry_after_s=50.0))]}
    ran = Ran(quiet(deadline_s=7.5, **held), Desk(script=later), works(2), steps=steps)
    assert ran.log.ends == [(1, FailureCode.DEADLINE_EXCEEDED, 2.0), (0, "", 10.5)]


def test_keeping_places_from_now_on_blocks_nobody() -> None:
    # 0 backs off without its place. From 1.5 on places are kept; 1 and 2 then hold both of them while 0 comes first.
    p, keeps = quiet(max_concurrency=2), quiet(max_concurrency=2, backoff_keeps_permit=1)
    script = {0: [(1.0, THROTTLED)], 1: [(2.0, THROTTLED)], 2: [(1.0, THROTTLED)]}
    ran = Ran(p, Desk(5.0, script=script), works(3), steps=[(1.5, lambda governor: governor.reprice(keeps))])
    assert sorted(end[:2] for end in ran.log.ends) == [(0, ""), (1, ""), (2, "")]


def test_stop_lets_those_in_flight_end_and_waits_for_nobody_else() -> None:
    script = {0: [(1.0, Answer(Outcome.THROTTLED, 429, retry_after_s=500.0))], 1: [(6.0, CUT)]}
    steps = [(4.0, lambda governor: governor.stop("operator"))]
    p = quiet(max_concurrency=3, backoff_keeps_permit=1)
    ran = Ran(p, Desk(9.0, script=script), works(100), steps=steps, finalize=True)
    assert (ran.why, ran.over_s) == ("operator", 9.0)
    assert ran.log.ends == [(2, "", 9.0)]
    assert [i for _, i in ran.sent] == [0, 1, 2]


def test_after_a_stop_nobody_is_given_up_either() -> None:
    # 0 may try again from 4 on, but there is a pause, and from 5 on a stop. Its deadline is 6; 1 is in flight until 7.
    script = {0: [(1.0, Answer(Outcome.SERVER_ERROR, 500, retry_after_s=3.0))], 1: [(4.0, OK)]}
    steps = [(3.5, Governor.pause), (5.0, lambda governor: governor.stop("operator"))]
    ran = Ran(quiet(deadline_s=6.0, stagger_s=3.0), Desk(script=script), works(2), steps=steps)
    assert ran.log.ends == [(1, "", 7.0)]
    assert ran.over_s == 7.0


def test_a_stop_ends_a_run_in_which_nothing_moves() -> None:
    steps = [(0.5, Governor.pause), (7.0, lambda governor: governor.stop("operator"))]
    ran = Ran(quiet(max_concurrency=1), Desk(1.0), works(9), steps=steps)
    assert (ran.why, ran.over_s) == ("operator", 7.0)


# ---------------------------------------------------------------- several pools, and what a metric reads


def test_pools_do_not_wait_for_each_other() -> None:
    logs = [Log(), Log()]

    async def main() -> None:
        slow = Governor(quiet(stagger_s=10.0), observer=logs[0], pool="slow")
        fast = Governor(quiet(stagger_s=1.0), observer=logs[1], pool="fast")
        await asyncio.gather(slow.run(works(4), Desk().send), fast.run(works(4), Desk().send))

    run_virtual(main())
    assert [at for at, _ in logs[0].launches] == [0.0, 10.0, 20.0, 30.0]
    assert [at for at, _ in logs[1].launches] == [0.0, 1.0, 2.0, 3.0]
    assert {a.pool for a in logs[0].rows} == {"slow"}


def test_what_metrics_and_progress_read() -> None:
    seen: list[tuple[float, int, int, float, float]] = []

    async def main() -> None:
        governor = Governor(quiet(stagger_s=10.0, max_concurrency=2))
        assert governor.next_slot_at == -math.inf
        assert governor.next_slot_epoch == 0.0
        begun = time.time()
        for at in (1.0, 11.0, 21.0, 26.0):
            governor.loop.call_at(
                at,
                lambda: seen.append(
                    (governor.now(), governor.in_flight, governor.cause, governor.next_slot_at, governor.wake_at)
                ),
            )
        await governor.run(works(3), Desk(25.0).send)
        assert governor.next_slot_epoch - governor.next_slot_at == pytest.approx(begun, abs=5.0)

    run_virtual(main())
    assert seen == [
        (1.0, 1, law.STAGGER, 10.0, 10.0),
        (11.0, 2, law.CONCURRENCY, 20.0, math.inf),
        (21.0, 2, law.CONCURRENCY, 20.0, math.inf),
        (26.0, 2, law.NOTHING, 35.0, math.inf),
    ]


def test_a_day_that_was_begun() -> None:
    log = Log()

    async def main() -> None:
        # 1,000 tokens and 20 requests a day, of which all but 100 and all but one are used.
        p = quiet(tpd=1_000, rpd=20)
        governor = Governor(p, observer=log, day_tokens_used=900.0, day_requests_used=19.0)
        await governor.run(works(2), Desk().send)
        replayed(p, log.decisions)

    run_virtual(main())
    assert log.launches == [(0.0, 0), (8_640.0, 1)]


def test_an_earlier_run_is_continued() -> None:
    p = quiet(tpm=1_000)
    first, second = Log(), Log()

    async def begin() -> law.State:
        governor = Governor(p, observer=first)
        await governor.run(works(10), Desk().send)
        return governor.s

    async def resume(state: law.State) -> None:
        await asyncio.sleep(77.0)  # whatever the clock says by then
        governor = Governor(p, observer=second, state=state, start_s=20.0)
        assert governor.now() == 20.0
        await governor.run(works(1), Desk().send)

    run_virtual(resume(run_virtual(begin())))
    # The minute that began at 0 is used up; its clock went on.
    assert second.launches == [(law.FIXED_S, 0)]
    assert second.rows[0].submitted_s == 20.0
    assert second.rows[0].waited_tpm_s == law.FIXED_S - 20.0
    assert second.ends == [(0, "", law.FIXED_S + 1.0)]


# ---------------------------------------------------------------- the clock


def test_a_timer_that_rings_early_counts_as_its_own_time() -> None:
    """A real loop may call back up to its clock's resolution too early; the law is asked about its own moment even so.

    Asked about the clock's, it would name the same moment again, and the clock stands still until then.
    """

    class Early(VirtualLoop):
        def call_at(self, when: float, *arguments: Any, **rest: Any) -> asyncio.TimerHandle:
            return super().call_at(when - 1e-9, *arguments, **rest)

    async def main() -> list[tuple[float, int]]:
        log = Log()
        governor = Governor(quiet(stagger_s=0.7), observer=log)
        await governor.run(works(20), Desk(0.1).send)
        return log.launches

    launches = run_virtual(main(), kind=Early)
    at = 0.0
    for when, _ in launches:
        assert when == at
        at += 0.7


def test_on_a_real_clock_waits_are_kept() -> None:
    log = Log()

    async def send(job: Job, timeout_s: float) -> Answer:
        return OK

    async def main() -> float:
        governor = Governor(quiet(stagger_s=0.02), observer=log)
        begun = time.monotonic()
        await governor.run(works(8), send)
        return time.monotonic() - begun

    taken_s = asyncio.run(main())
    at = [when for when, _ in log.launches]
    assert all(b - a >= 0.02 - 1e-9 for a, b in pairwise(at))
    assert taken_s >= 7 * 0.02 - 1e-3


def test_memory_stays_flat() -> None:
    """What a run holds does not grow with the batch: jobs that are over are let go."""
    alive: list[int] = []

    class Watching(Observer):
        def ended(self, request: Request, failure: str, answer: Answer | None, now: float) -> None:
            if request.index % 1_000 == 999:
                gc.collect()
                alive.append(sum(isinstance(each, Job) for each in gc.get_objects()))

    async def main() -> None:
        governor = Governor(quiet(max_concurrency=10, deadline_s=1e6), observer=Watching())
        await governor.run(works(5_000), Desk(0.5, script={i: [(0.1, BROKEN)] for i in range(0, 5_000, 7)}).send)

    run_virtual(main())
    assert len(alive) == 5
    assert max(alive) < 200, alive

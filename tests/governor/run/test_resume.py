"""A request's history over the legs of a run: attempts go on counting, deadlines go on running, a finalize pass stays.

Timetables on the virtual clock for the driver; then whole runs on a real journal, stopped or killed at random moments.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from governor import law
from governor.journal.journal import Journal
from governor.journal.verify import verify
from governor.model.errors import FailureCode
from governor.model.policy import Policy
from governor.model.requests import Answer, Attempt, Outcome
from governor.model.work import Job, Work, work_of
from governor.scheduler.driver import Governor
from tests.governor import journals
from tests.governor.desks import BROKEN, OK, REFUSAL_S, THROTTLED, Desk, Log, nothing_held, quiet, work, works
from tests.virtual_loop import run_virtual

START_S = 1_000.0


def resumed(p: law.Params, desk: Desk, source: Iterator[Work], *, finalize: bool = False) -> Log:
    """A leg that begins at START_S; times in the log count from then."""
    log = Log()

    async def main() -> None:
        governor = Governor(p, observer=log, start_s=START_S)
        assert await governor.run(source, desk.send, finalize=finalize) == ""
        nothing_held(governor)

    run_virtual(main())
    return log


def left(index: int, attempt: int, *, first_s: float = -10.0, retry_s: float = -1.0, **rest: Any) -> Work:
    """A request that an earlier leg had launched; times count from the beginning of this leg."""
    return work(index, attempt=attempt, first_launched_s=START_S + first_s, retry_at_s=START_S + retry_s, **rest)


# ---------------------------------------------------------------- the driver


def test_attempts_go_on_counting() -> None:
    desk = Desk(script={0: [(REFUSAL_S, THROTTLED)] * 5})
    log = resumed(quiet(), desk, iter([left(0, 4)]))
    # The fourth at once, since its backoff is over; the last one a minute after the first, 10 s before this leg.
    assert [(round(at, 9), attempt) for at, _, attempt in desk.sent] == [(0.0, 4), (law.FIXED_S - 10.0, 5)]
    assert [end[:2] for end in log.ends] == [(0, FailureCode.RATE_LIMIT_EXHAUSTED)]
    assert [row.attempt for row in log.rows] == [4, 5]


def test_a_backoff_goes_on_to_its_end() -> None:
    desk = Desk()
    log = resumed(quiet(), desk, iter([left(0, 2, retry_s=7.0), work(1)]))
    assert [(at, index) for at, index, _ in desk.sent] == [(0.0, 1), (7.0, 0)]
    # Waited for in this leg: not the time in which no process ran.
    assert [(row.request, row.waited_backoff_s) for row in log.rows] == [(1, 0.0), (0, 7.0)]


def test_what_was_launched_before_goes_first_and_retries_need_no_slot() -> None:
    p = quiet(stagger_s=10.0)
    desk = Desk()
    resumed(p, desk, iter([left(1, 2), left(3, 1), work(0), work(2)]))
    # 1 is a retry; 3 was lost in flight, so its first attempt is made again, in a slot like any other.
    assert [(at, index) for at, index, _ in desk.sent] == [(0.0, 1), (0.0, 3), (10.0, 0), (20.0, 2)]


def test_a_deadline_goes_on_running() -> None:
    p = quiet(deadline_s=60.0)
    source = [
        left(0, 2, first_s=-61.0),  # over before the leg began
        left(1, 2, first_s=-50.0, retry_s=30.0),  # over while it backs off
        left(2, 2, first_s=-55.0),  # over while it is in flight
        left(3, 1, first_s=-58.0),  # lost in flight, and answered in time
        work(4),
    ]
    desk = Desk(script={2: [(9.0, OK)], 3: [(1.5, OK)]})
    log = resumed(p, desk, iter(source))
    late = FailureCode.DEADLINE_EXCEEDED
    ends = sorted((index, failure, at - START_S) for index, failure, at in log.ends)
    assert ends == [(0, late, 0.0), (1, late, 10.0), (2, late, 5.0), (3, "", 1.5), (4, "", 1.0)]
    assert sorted(index for _, index, _ in desk.sent) == [2, 3, 4]
    assert [timeout for timeout in desk.timeouts if timeout < 10.0] == [5.0, 2.0]


def test_an_open_finalize_pass_is_opened_again() -> None:
    p = quiet(max_concurrency=3, finalize_max_concurrency=2)
    desk = Desk(1.0)
    passes = [left(1, 1, lane=law.FINALIZE, finalize_reserve=50.0)]
    log = resumed(p, desk, iter([*passes, *works(1), *(work(i) for i in (2, 3, 4))]), finalize=True)
    # Two at a time until it is over, then three.
    assert [(at, index) for at, index, _ in desk.sent] == [(0.0, 1), (0.0, 0), (1.0, 2), (1.0, 3), (1.0, 4)]
    row = log.rows[0]
    assert (row.request, row.lane, row.attempt, row.reserved_tokens) == (1, "finalize", 1, 50)
    assert [name for name, _, _ in log.decisions if name.startswith("finalize")] == [
        "finalize_opened",
        "finalize_closed",
    ]


@pytest.mark.parametrize("retry_s", [-1.0, 20.0])
def test_a_finalize_pass_whose_time_is_over_is_closed(retry_s: float) -> None:
    desk = Desk()
    source = iter([left(0, 2, lane=law.FINALIZE, first_s=-20.0, retry_s=retry_s), work(1)])
    log = resumed(quiet(deadline_s=10.0), desk, source)
    assert log.ends[0] == (0, FailureCode.DEADLINE_EXCEEDED, START_S)
    assert [index for _, index, _ in desk.sent] == [1]


@pytest.mark.parametrize("keeps", [0, 1])
def test_a_new_deadline_counts_for_those_that_back_off(keeps: int) -> None:
    """`paceline set OPENAI_DEADLINE_SECONDS=...` ends a wait of days."""
    p = quiet(backoff_keeps_permit=keeps, max_concurrency=1)
    hours = Answer(Outcome.THROTTLED, 429, retry_after_s=411_480.0)
    desk, log = Desk(script={0: [(1.0, hours)]}), Log()

    async def main() -> float:
        governor = Governor(p, observer=log)
        loop = asyncio.get_running_loop()
        changed = quiet(backoff_keeps_permit=keeps, max_concurrency=1, deadline_s=30.0)
        loop.call_at(5.0, governor.reprice, changed)
        await governor.run(works(2), desk.send)
        nothing_held(governor)
        return loop.time()

    assert run_virtual(main()) == (31.0 if keeps else 30.0)
    assert [end for end in log.ends if end[0] == 0] == [(0, FailureCode.DEADLINE_EXCEEDED, 30.0)]


# ---------------------------------------------------------------- with a journal, over several legs


class Legs:
    """A batch that is run in legs, each stopped, cancelled or killed at a random moment, to its end.

    Every request has a script by its number: how many of its attempts fail, and whether its answer comes back cut off.
    """

    def __init__(self, path: Path, policy: Policy, r: random.Random, count: int) -> None:
        self.path, self.policy, self.r = path, policy, r
        self.bad = [r.choice([0, 0, 1, 2, 3, 9]) for _ in range(count)]
        self.cut = [r.random() < 0.3 for _ in range(count)]
        self.answered: dict[int, int] = defaultdict(int)  # main attempts whose answer got back
        self.sent: list[tuple[int, int, int, float]] = []
        journals.created(path, count).close()
        self.at_s = 0.0

    def leg(self, last: bool) -> None:
        with Journal.open(self.path, to_run=True) as journal:
            self.at_s = max(self.at_s, journal.last_s())
            recorder = journal.begin({"default": self.policy}, self.at_s).recorders["default"]
            asyncio.run(self._run(journal, recorder, last))

    async def _run(self, journal: Journal, recorder: Any, last: bool) -> None:
        governor = Governor(self.policy.params(), seed=1, observer=recorder, state=recorder.state, start_s=self.at_s)
        # A wait is stated: without one, the last attempt would come a minute after the first.
        soon = Answer(Outcome.THROTTLED, 429, retry_after_s=0.01)

        async def send(job: Job, timeout_s: float) -> Answer:
            self.sent.append((job.index, job.lane, job.attempt, job.launched_s))
            await asyncio.sleep(0.002)
            if job.lane == law.MAIN and job.attempt <= self.bad[job.index]:
                return soon if job.index % 2 else BROKEN
            if job.lane == law.MAIN and self.cut[job.index]:
                return journals.answer(job.index).__class__(Outcome.OK, 200, cut_off=True, body={"usage": {}})
            return journals.answer(job.index)

        source = (work_of(each.work.request, self.policy, before=each.work) for each in journal.pending())
        main = asyncio.create_task(governor.run(source, send, finalize=True))
        if not last:
            kind = self.r.choice(["stop", "cancel"])
            asyncio.get_running_loop().call_later(
                self.r.uniform(0.0, 0.06), (lambda: governor.stop("x")) if kind == "stop" else main.cancel
            )
        await asyncio.gather(main, return_exceptions=True)
        await recorder.flushed()
        self.at_s = governor.now()
        if last or self.r.random() < 0.5:
            journal.finish(self.at_s, "stopped")  # else nobody said goodbye: as after a crash


@pytest.mark.parametrize("deadline_s", [0.0, 0.15])
def test_over_any_legs_budget_and_deadline_hold_and_no_attempt_is_made_twice(
    tmp_path: Path, seed: int, deadline_s: float
) -> None:
    r = random.Random(f"{seed} {deadline_s}")
    policy = journals.FREE.with_(deadline_seconds=deadline_s, max_concurrency=4, retry_max_attempts=4)
    for run in range(3):
        count = 40
        legs = Legs(tmp_path / f"{run}.db", policy, r, count)
        for _ in range(r.randint(1, 6)):
            legs.leg(last=False)
        legs.leg(last=True)
        with Journal.open(legs.path) as journal:
            check(journal, legs, policy, count)


def check(journal: Journal, legs: Legs, policy: Policy, count: int) -> None:
    counts = journal.counts()
    assert (counts.done + counts.failed, counts.pending, counts.in_flight) == (count, 0, 0)
    found: dict[tuple[int, str], list[Attempt]] = defaultdict(list)
    for row in journal.attempts():
        found[row.request, row.lane].append(row)
    first_s: dict[int, float] = {}
    for index, _, _, at_s in legs.sent:
        first_s.setdefault(index, at_s)
    for rows in found.values():
        # Numbered on without a gap and without a second one of any number, over all legs.
        assert [row.attempt for row in rows] == list(range(1, len(rows) + 1))
        assert len(rows) <= policy.retry_max_attempts
    if policy.deadline_seconds > 0.0:
        for index, _, _, at_s in legs.sent:
            assert at_s < first_s[index] + policy.deadline_seconds
    for end in journal.ends():
        main, last = found[end.request, "main"], found[end.request, "finalize"]
        if not end.failure:
            assert main[-1].attempt == legs.bad[end.request] + 1
            # The answer that was cut off was paid for once.
            assert [row.outcome for row in main].count(Outcome.OK) == 1
            assert len(last) == legs.cut[end.request]
        elif end.failure == FailureCode.DEADLINE_EXCEEDED:
            assert policy.deadline_seconds > 0.0
        else:
            assert len(main) == policy.retry_max_attempts
    if policy.deadline_seconds == 0.0:
        lost = sum(bad >= policy.retry_max_attempts for bad in legs.bad)
        assert (counts.done, counts.failed) == (count - lost, lost)
    assert verify(journal.decisions()).difference is None

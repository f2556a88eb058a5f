"""A source that is never at its end, as a service has one: more comes while a run goes on, and some is taken back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from governor import law
from governor.journal.records import Records
from governor.model.requests import Request
from governor.model.work import Work
from governor.scheduler.driver import Governor
from tests.governor.desks import CUT, OK, THROTTLED, Desk, Log, nothing_held, quiet, work
from tests.governor.journals import answer as answer_to
from tests.governor.journals import begun, created, run_through
from tests.governor.journals import work as journal_work
from tests.virtual_loop import run_virtual


class Source(Iterator[Work]):
    """Gives what was put in; empty is not the end."""

    def __init__(self) -> None:
        self.waiting: deque[Work] = deque()

    def __next__(self) -> Work:
        if not self.waiting:
            raise StopIteration
        return self.waiting.popleft()


def odd(request: Request) -> bool:
    return request.index % 2 == 1


def test_what_comes_later_joins_the_run_and_waits_from_its_own_moment() -> None:
    desk, log, source = Desk(5.0), Log(), Source()

    async def main() -> None:
        governor = Governor(quiet(max_concurrency=1), observer=log)
        source.waiting += [work(0), work(1)]
        run = asyncio.create_task(governor.run(source, desk.send))
        await asyncio.sleep(7.0)
        source.waiting.append(work(2, begun=governor.mark()))
        governor.more()  # the head is taken already: nothing happens until it is launched
        await asyncio.sleep(4.0)
        source.waiting.append(work(3, begun=governor.mark()))
        governor.more()
        assert await run == ""
        governor.more()  # nobody runs any more
        nothing_held(governor)

    run_virtual(main())
    assert [(index, at) for at, index, _ in desk.sent] == [(0, 0.0), (1, 5.0), (2, 10.0), (3, 15.0)]
    waited = [(row.submitted_s, row.waited_concurrency_s) for row in log.rows]
    assert waited == [(0.0, 0.0), (0.0, 5.0), (7.0, 3.0), (11.0, 4.0)]


@pytest.mark.parametrize("keeps", [0, 1])
def test_what_is_withdrawn_is_not_launched_and_gives_back_its_place(keeps: int) -> None:
    # 1 backs off when it is withdrawn, 5 is still with the source; 0 is in flight and goes on.
    desk = Desk(30.0, {1: [(1.0, THROTTLED)], 2: [(1.0, OK)]})
    log, source = Log(), Source()

    async def main() -> None:
        governor = Governor(quiet(max_concurrency=2, backoff_keeps_permit=keeps), observer=log)
        source.waiting += [work(i) for i in (0, 1, 2, 3, 5)]
        run = asyncio.create_task(governor.run(source, desk.send))
        await asyncio.sleep(1.5)
        source.waiting = deque(each for each in source.waiting if not odd(each.request))
        # Without its place, 1 lets 2 go at once: then 3 is at the head.
        assert governor.withdraw(odd) == (1 if keeps else 2)
        assert await run == ""
        nothing_held(governor)

    run_virtual(main())
    ended = [index for index, failure, _ in log.ends]
    assert sorted(ended) == [0, 2]
    assert not [index for at, index, _ in desk.sent if index % 2 and at > 1.5]


def test_a_withdrawn_finalize_pass_is_closed() -> None:
    desk = Desk(30.0, {1: [(1.0, CUT)]})

    async def main() -> None:
        governor = Governor(quiet(max_concurrency=1, finalize_max_concurrency=1))
        source = Source()
        source.waiting += [work(1), work(0)]
        governor.pause()
        run = asyncio.create_task(governor.run(source, desk.send, finalize=True))
        governor.resume()
        await asyncio.sleep(0.5)
        governor.pause()
        await asyncio.sleep(1.0)
        assert governor.s.finalize_open == 1
        assert governor.withdraw(odd) == 1
        assert governor.s.finalize_open == 0
        governor.resume()
        assert await run == ""
        nothing_held(governor)

    run_virtual(main())
    assert [index for _, index, _ in desk.sent] == [1, 0]


def test_only_work_that_finalizes_gets_a_finalize_pass() -> None:
    desk, log = Desk(1.0, {0: [(1.0, CUT)], 1: [(1.0, CUT)]}), Log()

    async def main() -> None:
        governor = Governor(quiet(), observer=log)
        await governor.run(iter([work(0), work(1, finalizes=False)]), desk.send, finalize=True)

    run_virtual(main())
    assert sorted((row.request, row.lane) for row in log.rows) == [(0, "finalize"), (0, "main"), (1, "main")]


def test_a_stopped_governor_can_be_opened_again() -> None:
    desk = Desk(1.0)

    async def main() -> None:
        governor = Governor(quiet())
        governor.stop("WHY")
        assert await governor.run(iter([work(0)]), desk.send) == "WHY"
        governor.reopen()
        assert await governor.run(iter([work(0)]), desk.send) == ""
        assert governor.s.in_flight == 0
        assert governor.cause == law.NOTHING

    run_virtual(main())
    assert [index for _, index, _ in desk.sent] == [0]


def test_a_part_of_a_journal_is_read_by_its_numbers(tmp_path: Path) -> None:
    count, part = 250, (40, 199)
    caps = [(7 * i) % 50 for i in range(count)]
    with created(tmp_path / "a.db", [journal_work(i, cap=cap) for i, cap in enumerate(caps)]) as journal:
        some = Records(journal._database, part)
        assert some.counts().pending == part[1] - part[0] + 1
        assert [each.work.request.index for each in some.pending()] == list(range(part[0], part[1] + 1))
        by_length = [each.work.request.index for each in some.pending(longest_first=True)]
        assert by_length == sorted(range(part[0], part[1] + 1), key=lambda i: (-caps[i], -(i % 3), i))
        assert [request.index for request in some.unfinished()] == list(range(part[0], part[1] + 1))
    journal, recorder = begun(tmp_path / "b.db", 20)
    with journal:

        async def send(job, timeout_s):  # type: ignore[no-untyped-def]
            return answer_to(job.index)

        run_through(journal, recorder, send)
        some = Records(journal._database, (5, 9))
        assert [result.request.index for result in some.results()] == [5, 6, 7, 8, 9]
        assert {attempt.request for attempt in some.attempts()} == {5, 6, 7, 8, 9}
        assert [end.request for end in some.ends()] == [5, 6, 7, 8, 9]
        assert some.outcomes() == {"ok": 5}
        assert len(list(some.billed())) == 5

"""The journal's writing half: what goes in is durable before it counts, and each request stands where it stood."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from governor import law
from governor.journal import schema
from governor.journal.journal import Journal
from governor.journal.rows import Counts
from governor.model.errors import FailureCode
from governor.model.requests import LANES, Answer, Outcome
from governor.model.work import Job, Work
from tests.governor.journals import (
    BACKOFF_S,
    FREE,
    again,
    answer,
    begun,
    created,
    ends,
    finalizing,
    job,
    refusal,
    rows,
    run_through,
    work,
)
from tests.live import WAIT_S


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


# ---------------------------------------------------------------- requests in and out


def test_requests_come_back_as_they_went_in(path: Path) -> None:
    before = [
        work(0, text="plain"),
        work(
            1, text='quotes " and \\ and \x00 and 漢字 🙂 and half a pair \udc00', custom_id="half \ud83d, \x00 \\u0041"
        ),
        work(2, cap=7),
    ]
    body = {"model": "m", "input": [1.5e-300, -0.0, 10**30, None, True, {"a": {}}]}
    odd = before[2].request.__class__(5, "odd", "/v1/embeddings", "m\udfff", body, before[2].request.sizes, "default")
    before.append(Work(odd, 1 / 3, -1.0, 0.0, -1, -1))
    with created(path, before) as journal:
        journal.begin({"default": FREE}, 0.0)
        after = list(journal.pending())
    assert [each.work for each in after] == before
    assert {each.resent for each in after} == {0}
    assert json.dumps(after[3].work.request.body) == json.dumps(body), "the sign of a zero, too"


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_survives_in_what_databases_can_hold(text: str) -> None:
    held = schema.escaped(text)
    assert "\x00" not in held
    held.encode("utf-8")
    assert schema.unescaped(held) == text


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 350])
def test_pending_streams_everything_in_order_of_the_input(path: Path, count: int) -> None:
    with created(path, count) as journal:
        journal.begin({"default": FREE}, 0.0)
        assert [each.work.request.index for each in journal.pending()] == list(range(count))
        assert journal.counts().pending == count == journal.run().requests


@pytest.mark.parametrize("caps", [[100], [1, 2, 3], list(range(700)), [-1, 5]])
def test_longest_first_is_the_law_s_own_rank(path: Path, seed: int, caps: list[int]) -> None:
    r = random.Random(seed)
    batch = []
    for index in range(450):
        one = work(index, cap=r.choice(caps))
        batch.append(Work(one.request, float(r.randint(1, 3)), one.expected))
    params = FREE.with_(launch_order="longest_first").params()
    ranks = [law.rank(params, law.MAIN, 1, w.expected, w.reserve, float(i)) for i, w in enumerate(batch)]
    with created(path, batch) as journal:
        journal.begin({"default": FREE}, 0.0)
        order = [each.work for each in journal.pending(longest_first=True)]
    assert order == [one for _, one in sorted(zip(ranks, batch, strict=True), key=lambda pair: pair[0])]


def test_each_pool_reads_its_own(path: Path) -> None:
    batch = [work(index, pool="ab"[index % 2], cap=index) for index in range(300)]
    with created(path, batch) as journal:
        journal.begin({"a": FREE, "b": FREE}, 0.0)
        assert [each.work.request.index for each in journal.pending("a")] == list(range(0, 300, 2))
        longest = [each.work.request.index for each in journal.pending("b", longest_first=True)]
        assert longest == list(range(299, 0, -2))
        assert (journal.counts("a").pending, journal.counts("c").requests) == (150, 0)
        assert [request.index for request in journal.unfinished("b")] == list(range(1, 300, 2))
        assert list(journal.pending("c")) == []


def test_no_chunk_is_sorted_or_found_by_reading_everything(path: Path) -> None:
    """Each chunk starts where the last one ended: on a table without statistics as SQLite first sees it."""
    with created(path, 450) as journal:
        journal.begin({"default": FREE}, 0.0)
        seen: list[tuple[str, Any]] = []
        engine = journal._database.engine
        event.listen(engine, "before_cursor_execute", lambda _c, _u, text, values, *_: seen.append((text, values)))
        streams = (journal.pending(), journal.pending(longest_first=True), journal.results(), journal.attempts())
        for stream in streams:
            list(stream)
        plans = [" ".join(str(row[3]) for row in rows(path, f"EXPLAIN QUERY PLAN {sql}", *v)) for sql, v in seen]
    fresh = [plan for (sql, _), plan in zip(seen, plans, strict=True) if "first_launched_s <" in sql]
    assert len(fresh) >= 10
    assert not [plan for plan in plans if "TEMP B-TREE" in plan]
    # Of the later chunks' ranges every one is a search; only the very first chunk starts at the index's beginning.
    assert len([plan for plan in fresh if "SCAN requests" in plan]) == 2


# ---------------------------------------------------------------- durable before it counts


def test_a_request_is_in_flight_on_the_disk_before_it_is_sent(path: Path) -> None:
    journal, recorder = begun(path, 60)
    sent = []

    async def send(job: Job, timeout_s: float) -> Answer:
        state = rows(path, "SELECT state, attempt FROM requests WHERE request = ?", job.index)
        sent.append((job.index, job.attempt))
        assert state == [("in_flight", job.attempt)]
        await asyncio.sleep(0.001)
        return refusal() if job.index % 5 == 0 and job.attempt == 1 else answer(job.index)

    with journal:
        run_through(journal, recorder, send, policy=FREE.with_(max_concurrency=20))
        assert sorted(sent) == sorted([(i, 1) for i in range(60)] + [(i, 2) for i in range(0, 60, 5)])
        assert journal.counts() == Counts(60, 0, 0, 60, 0, 0, {})


def test_what_was_told_before_a_flush_is_there_after_it_and_nothing_sooner(path: Path) -> None:
    journal, recorder = begun(path, 2)

    async def main() -> None:
        first = job(work(0))
        recorder.launched(first, 1.0)
        assert rows(path, "SELECT state FROM requests") == [("pending",), ("pending",)]
        await recorder.flushed()
        assert rows(path, "SELECT state FROM requests") == [("in_flight",), ("pending",)]
        ends(recorder, first, answer(0), 2.0)
        assert journal.counts().done == 0, "counted before it was durable"
        await recorder.flushed()
        assert rows(path, "SELECT state FROM requests") == [("done",), ("pending",)]
        assert journal.counts().done == 1

    with journal:
        asyncio.run(main())


def test_a_result_that_nobody_waits_for_is_durable_all_the_same(path: Path) -> None:
    journal, recorder = begun(path, 1)

    async def main() -> None:
        ends(recorder, job(work(0)), answer(0), 2.0)
        async with asyncio.timeout(WAIT_S):
            while rows(path, "SELECT count(*) FROM results") != [(1,)]:
                await asyncio.sleep(0.01)

    with journal:
        asyncio.run(main())


def test_tasks_that_wait_together_share_one_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, recorder = begun(path, 500)
    writer = journal._writer
    assert writer is not None
    before, write, all_reported = writer.commits, writer._write, threading.Event()

    def held_up(batch: Any) -> None:
        assert all_reported.wait(WAIT_S)
        write(batch)

    async def launch(index: int) -> None:
        recorder.launched(job(work(index)), float(index))
        await recorder.flushed()
        assert index in {row[0] for row in rows(path, "SELECT request FROM requests WHERE state = 'in_flight'")}

    async def main() -> None:
        tasks = [asyncio.create_task(launch(index)) for index in range(500)]
        await asyncio.sleep(0)
        all_reported.set()
        await asyncio.gather(*tasks)

    monkeypatch.setattr(writer, "_write", held_up)
    with journal:
        asyncio.run(main())
        # The first task's commit is under way when the second one reports; all others go with the next.
        assert writer.commits - before == 2


def test_closed_from_another_thread_while_the_loop_hears_of_a_commit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service closes its writer off the loop. Here the loop always hears of the commit between the two looks."""
    journal, recorder = begun(path, 1)
    writer = journal._writer
    assert writer is not None
    wait, heard = concurrent.futures.wait, threading.Event()

    def late(futures: Any) -> Any:
        found = wait(futures)
        assert heard.wait(WAIT_S)
        return found

    async def main() -> None:
        recorder.launched(job(work(0)), 0.0)
        flushed = asyncio.create_task(recorder.flushed())
        flushed.add_done_callback(lambda _: heard.set())
        await asyncio.sleep(0)
        assert writer._commit is not None
        await asyncio.to_thread(writer.commit)
        await flushed

    monkeypatch.setattr("governor.journal.recorder.concurrent.futures.wait", late)
    with journal:
        asyncio.run(main())
        assert rows(path, "SELECT state FROM requests") == [("in_flight",)]


def test_a_cancelled_wait_takes_nobody_s_commit_with_it(path: Path) -> None:
    journal, recorder = begun(path, 40)
    writer = journal._writer
    assert writer is not None
    let_go = threading.Event()
    writer._thread.submit(let_go.wait, 30.0)  # so that no commit is over before half of those who wait have left

    async def launch(index: int) -> None:
        recorder.launched(job(work(index)), float(index))
        await recorder.flushed()

    async def main() -> None:
        tasks = [asyncio.create_task(launch(index)) for index in range(40)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        let_go.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in done] == [asyncio.CancelledError, type(None)] * 20
        await recorder.flushed()

    with journal:
        asyncio.run(main())
        assert journal.counts().in_flight == 40


def test_the_event_loop_goes_on_while_the_disk_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, recorder = begun(path, 1)
    writer = journal._writer
    assert writer is not None
    turns: list[str] = []

    async def main() -> None:
        loop, let_go = asyncio.get_running_loop(), asyncio.Event()
        write = writer._write

        def slow(batch: Any) -> None:
            asyncio.run_coroutine_threadsafe(let_go.wait(), loop).result()  # only a loop that runs can let it go
            write(batch)
            turns.append("committed")

        monkeypatch.setattr(writer, "_write", slow)
        recorder.launched(job(work(0)), 1.0)
        waits = asyncio.create_task(recorder.flushed())
        await asyncio.sleep(0.05)
        assert not waits.done()
        turns.append("elsewhere")
        let_go.set()
        await waits

    with journal:
        asyncio.run(main())
    assert turns == ["elsewhere", "committed"]


# ---------------------------------------------------------------- where a request stands


def standing(journal: Journal) -> list[tuple[int, str, int, float, float, int]]:
    """What `pending` says of requests that were launched before."""
    return [
        (w.request.index, LANES[w.lane], w.attempt, w.first_launched_s, w.retry_at_s, each.resent)
        for each in journal.pending()
        if (w := each.work).first_launched_s >= 0.0
    ]


def works_left(journal: Journal) -> list[Work]:
    return [each.work for each in journal.pending()]


def reopened(journal: Journal, path: Path, at_s: float) -> tuple[Journal, int]:
    """The journal after its process has died: nobody said goodbye."""
    journal._writer.commit()  # type: ignore[union-attr]
    journal.close()
    again = Journal.open(path, to_run=True)
    return again, again.begin({"default": FREE}, at_s).resent


def test_a_new_leg_takes_up_every_request_where_it_stood(path: Path) -> None:
    journal, recorder = begun(path, 10)
    jobs = [job(work(index), launched_s=1.0 + index) for index in range(10) if index != 8]
    for each in jobs:
        recorder.launched(each, each.launched_s)
    ends(recorder, jobs[0], answer(0), 20.0)  # 0: done
    ends(recorder, jobs[1], refusal(Outcome.BAD_REQUEST, 400), 21.0, FailureCode.BAD_REQUEST)  # 1: failed
    again(recorder, jobs[2], refusal(), 22.0)  # 2: backs off
    again(recorder, jobs[3], refusal(), 23.0)
    recorder.launched(job(work(3), attempt=2, launched_s=30.0, first_s=4.0), 30.0)  # 3: second attempt in flight
    again(recorder, jobs[4], refusal(Outcome.QUOTA, 429), 24.0)  # 4: the account was at fault
    again(recorder, jobs[5], answer(5), 25.0)  # 5: cut off, its finalize pass not yet launched
    again(recorder, jobs[6], answer(6), 26.0)
    recorder.launched(finalizing(work(6), 31.0, 7.0), 31.0)  # 6: its finalize pass in flight
    # 7: in flight, 8: never launched
    again(recorder, jobs[8], refusal(), 27.0)
    second = job(work(9), attempt=2, launched_s=32.0, first_s=10.0)
    recorder.launched(second, 32.0)
    again(recorder, second, refusal(), 33.0)  # 9: backs off for the second time
    journal, resent = reopened(journal, path, 40.0)
    with journal:
        assert resent == 3
        assert journal.counts() == Counts(10, 8, 0, 1, 1, 3, {FailureCode.BAD_REQUEST: 1})
        assert standing(journal) == [
            (2, "main", 2, 3.0, 22.0 + BACKOFF_S, 0),
            (3, "main", 2, 4.0, -1.0, 1),
            (5, "finalize", 1, 6.0, -1.0, 0),
            (6, "finalize", 1, 7.0, -1.0, 1),
            (7, "main", 1, 8.0, -1.0, 1),
            (9, "main", 3, 10.0, 33.0 + BACKOFF_S, 0),
        ]
        # What was refused for the account's sake alone is as new.
        assert [each.work.request.index for each in journal.pending()] == [2, 3, 5, 6, 7, 9, 4, 8]


def test_a_leg_that_ends_in_good_order_leaves_nothing_in_flight(path: Path) -> None:
    journal, recorder = begun(path, 3)
    with journal:
        recorder.launched(job(work(0)), 1.0)
        journal.finish(9.0, "interrupted")
        assert journal.counts() == Counts(3, 3, 0, 0, 0, 1, {})
        assert [(leg.leg, leg.began_s, leg.ended_s, leg.ending) for leg in journal.legs()] == [
            (1, 0.0, 9.0, "interrupted")
        ]
        assert journal.begin({"default": FREE}, 10.0).resent == 0, "counted once"
        assert journal.last_s() == 10.0


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize(("refused", "expected"), [(2, ("in_flight", 3, 1.0, 3.0)), (3, ("pending", 4, 1.0, 3.0))])
def test_the_order_of_reports_decides_whether_or_not_they_share_a_commit(
    path: Path, flushes: bool, refused: int, expected: tuple[str, int, float, float]
) -> None:
    """Launched at 1, 2 and 3 s, and refused every time, or all but the last."""
    journal, recorder = begun(path, 2)
    with journal:
        for number in (1, 2, 3):
            flying = job(work(0), attempt=number, launched_s=float(number), first_s=1.0)
            recorder.launched(flying, flying.launched_s)
            if number <= refused:
                again(recorder, flying, refusal(), number + 0.5)
            if flushes:
                journal._writer.commit()  # type: ignore[union-attr]
        journal._writer.commit()  # type: ignore[union-attr]
        state = rows(path, "SELECT state, attempt, first_launched_s, launched_s FROM requests WHERE request = 0")
        assert state == [expected]


def test_failed_requests_are_tried_again_as_if_they_were_new(path: Path) -> None:
    journal, recorder = begun(path, 4)
    with journal:
        codes = (FailureCode.TIMEOUT, FailureCode.BAD_REQUEST, FailureCode.TIMEOUT)
        for index, code in enumerate(codes):
            flying = job(work(index), attempt=2)
            recorder.launched(flying, 1.0)
            ends(recorder, flying, refusal(Outcome.TIMEOUT, 0), 2.0, code)
        recorder.launched(job(work(3)), 1.0)
        ends(recorder, job(work(3)), answer(3), 2.0)
        journal.finish(3.0, "finished")
        assert journal.counts().failures == {FailureCode.TIMEOUT: 2, FailureCode.BAD_REQUEST: 1}
        left = sum(1 for _ in journal.unfinished())
        assert sum(1 for _ in journal.unfinished(failed=FailureCode.TIMEOUT)) == left + 2
        assert sum(1 for _ in journal.unfinished(failed="")) == left + 3
        assert journal.retry_failed(FailureCode.TIMEOUT) == 2
        assert [each.work.request.index for each in journal.pending()] == [0, 2]
        assert {(w.attempt, w.first_launched_s, w.retry_at_s) for w in works_left(journal)} == {(1, -1.0, -1.0)}
        assert [result.request.index for result in journal.results()] == [1, 3]
        assert journal.retry_failed() == 1
        assert journal.retry_failed() == 0
        recorder = journal.begin({"default": FREE}, 4.0).recorders["default"]
        for index in range(3):
            ends(recorder, job(work(index)), answer(index), 5.0)
        journal.finish(6.0, "finished")
        assert journal.counts() == Counts(4, 0, 0, 4, 0, 0, {})

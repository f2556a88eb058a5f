"""The journal's contents: what goes in comes out, in order, as a whole, and nothing that must not be there.

Journals are real files; another process is a second connection. Crashes, full disks and damage: `test_journal_harm`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import json
import math
import os
import random
import sqlite3
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from governor import law
from governor.forecast.summary import Grant, summarize
from governor.journal import schema
from governor.journal.database import JournalError
from governor.journal.journal import PAUSE, RESUME, SET, Journal, fingerprint_of
from governor.journal.rows import Counts
from governor.journal.verify import verify
from governor.model.errors import FailureCode
from governor.model.policy import Policy
from governor.model.requests import CAUSES, LANES, Answer, Attempt, Limit, Outcome, error_line, result_line
from governor.model.work import Job, Work
from tests.governor.journals import (
    BACKOFF_S,
    EPOCH_S,
    FREE,
    again,
    answer,
    attempt,
    begun,
    created,
    ends,
    finalizing,
    job,
    pool_of,
    refusal,
    run_through,
    work,
    works,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


def rows(path: Path, query: str, *values: Any) -> list[Any]:
    """What another process sees: only what is committed."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()


def bytes_of(path: Path) -> bytes:
    """Everything that the journal has on the disk."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.iterdir()))


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


def test_a_request_is_estimated_anew_after_a_change_of_settings(path: Path) -> None:
    with created(path, 5) as journal:
        recorder = journal.begin({"default": FREE}, 0.0).recorders["default"]
        for index in (0, 1):
            recorder.launched(job(work(index)), 1.0)
        ends(recorder, job(work(0)), answer(0), 2.0)
        journal.finish(2.0, "stopped")
        assert journal.resize(lambda request: Work(request, 9.0, 8.0, 7.0, 6, 5)) == 4
        after = [each.work for each in journal.pending()]
    assert [w.request for w in after] == [work(index).request for index in (1, 2, 3, 4)]
    assert {(w.reserve, w.expected, w.finalize_reserve, w.charge, w.finalize_charge) for w in after} == {
        (9, 8, 7, 6, 5)
    }


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
        async with asyncio.timeout(30.0):
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
        assert all_reported.wait(30.0)
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
        assert heard.wait(30.0)
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


# ---------------------------------------------------------------- what came back


def test_results_come_in_order_of_the_input_and_make_the_same_lines(path: Path, seed: int) -> None:
    count = 250
    batch = [work(index) for index in range(count)]
    journal, recorder = begun(path, batch)
    order = random.Random(seed).sample(range(count), count)
    expected = {}
    for place, index in enumerate(order[:-3]):
        request = batch[index].request
        if index % 7 == 0:
            code, came = FailureCode.RATE_LIMIT_EXHAUSTED, refusal(message=f"no {index}")
            ends(recorder, job(batch[index]), came, float(place), code)
            expected[index] = error_line(request, code, came.message, came)
        else:
            ends(recorder, job(batch[index]), answer(index), float(place))
            expected[index] = result_line(request, answer(index))
    unsent = batch[order[-3]].request
    recorder.ended(unsent, FailureCode.REQUEST_TOO_LARGE, None, 3.0)
    expected[unsent.index] = error_line(unsent, FailureCode.REQUEST_TOO_LARGE, "too large")
    lines = {}
    with journal:
        journal.finish(999.0, "stopped")
        for result in journal.results():
            r, a = result.request, result.answer
            assert r.body is None
            if not result.failure:
                assert a is not None
                lines[r.index] = result_line(r, a)
            else:
                lines[r.index] = error_line(r, result.failure, a.message if a else "too large", a)
    assert list(lines) == sorted(expected)
    assert lines == expected


def test_an_answer_and_its_attempt_come_back_in_every_field(path: Path) -> None:
    journal, recorder = begun(path, 2)
    body = {"x": [1.5, None]}
    cut = Answer(Outcome.OK, 200, "", "mind \udc80", 0.1, 1, 2, True, False, request_id="req \x00", body=body)
    flying = job(work(0), launched_s=0.75)
    ends(recorder, flying, cut, 9.0)
    none = Answer(Outcome.DROPPED)
    ends(recorder, job(work(1), attempt=5), none, 10.0, FailureCode.CONNECTION_DROPPED)
    with journal:
        journal.finish(11.0, "finished")
        assert [result.answer for result in journal.results()] == [cut, none]
        assert [(r.failure, r.ended_s, r.resent) for r in journal.results()] == [
            ("", 9.0, 0),
            ("OPENAI_CONNECTION_DROPPED", 10.0, 0),
        ]
        code = FailureCode.CONNECTION_DROPPED
        assert list(journal.attempts()) == [
            attempt(flying, cut, 9.0),
            attempt(job(work(1), attempt=5), none, 10.0, code),
        ]
        assert journal.outcomes() == {Outcome.DROPPED: 1, Outcome.OK: 1}
        assert journal.last_s() == 11.0


def test_the_attempts_table_has_the_design_s_columns_and_what_the_headers_said(path: Path) -> None:
    journal, recorder = begun(path, 1)
    ends(recorder, job(work(0)), answer(0), 2.0)
    journal.close()
    columns = [row[1] for row in rows(path, "PRAGMA table_info(attempts)")]
    own = ["request_id", "cached_tokens", "reasoning_tokens", "processing_s", "limits"]
    assert columns == ["number", *Attempt.columns(), *own]
    request_id, limits = rows(path, "SELECT request_id, limits FROM attempts")[0]
    assert request_id == "req_0"
    assert json.loads(limits) == [["TPM", 30_000.0, 29_000.5], ["RPM", 500.0, 499.0]]


def test_a_summary_can_be_made_of_the_journal_alone(path: Path) -> None:
    journal, recorder = begun(path, 30)

    async def send(job: Job, timeout_s: float) -> Answer:
        await asyncio.sleep(0.002)
        if job.index == 4:
            return refusal(Outcome.BAD_REQUEST, 400)
        return refusal() if job.index % 3 == 0 and job.attempt == 1 else answer(job.index)

    with journal:
        run_through(journal, recorder, send)
        summary = summarize(
            journal.attempts(), journal.ends(), Grant(), stagger_delays=journal.deferrals()[law.STAGGER]
        )
    assert (summary.requests, summary.completed, summary.failed) == (30, 29, 1)
    assert (summary.attempts, summary.throttled) == (40, 10)
    assert summary.failures == {FailureCode.BAD_REQUEST: 1}
    assert summary.used_tokens == sum(10 + index + 7 for index in range(30) if index != 4)
    assert summary.peak_in_flight == 8


def test_the_bound_is_over_requests_that_were_lost_too(path: Path) -> None:
    """As in a simulation: a run that loses requests does less in less time. What can never succeed does not count."""
    journal, recorder = begun(path, 30)

    async def send(job: Job, timeout_s: float) -> Answer:
        await asyncio.sleep(0.002)
        if job.index == 0:
            return refusal(Outcome.BAD_REQUEST, 400)
        return refusal() if job.index < 10 else answer(job.index)

    with journal:
        run_through(journal, recorder, send, policy=FREE.with_(retry_max_attempts=1))
        lost = list(journal.lost())
        ends = {end.request: end.failure for end in journal.ends()}
        assert [index for index, code in ends.items() if code == FailureCode.RATE_LIMIT_EXHAUSTED] == list(range(1, 10))
        grant = Grant(rpm_limit=20)
        answered, asked = (
            summarize(journal.attempts(), journal.ends(), grant, lost=each).bound_s for each in ((), lost)
        )
    assert len(lost) == 9
    # The limit's bucket is full at first: 20 of them go at once, then one in three seconds.
    assert answered < 3.0
    assert asked == pytest.approx((29 - 20) * 3.0, abs=3.0)


def test_deferrals_are_counted_by_cause_over_all_legs_and_pools(path: Path) -> None:
    with created(path, 1) as journal:
        for at_s in (0.0, 5.0):
            recorders = journal.begin({"a": FREE, "b": FREE}, at_s).recorders
            for _ in range(3):
                recorders["a"].deferred(law.STAGGER)
            recorders["b"].deferred(law.BY_TPM)
            journal.finish(at_s + 1.0, "stopped")
        expected = [0] * len(CAUSES)
        expected[law.STAGGER], expected[law.BY_TPM] = 6, 2
        assert journal.deferrals() == expected
        assert journal.deferrals("b")[law.BY_TPM] == 2
        assert journal.deferrals("b")[law.STAGGER] == 0


# ---------------------------------------------------------------- decisions


def busy(path: Path, count: int = 40) -> Journal:
    """A run with retries, header counts and settings changed in the middle, then a second leg for the rest."""
    policy = FREE.with_(sync_headers=True, hold_on_throttle=True, backoff_keeps_permit=True)
    journal = created(path, count)
    at_s = 0.0
    for leg in (1, 2):
        recorder = journal.begin({"default": policy}, at_s, records=True).recorders["default"]
        assert (recorder.state is None) == (leg == 1)

        async def send(job: Job, timeout_s: float) -> Answer:
            await asyncio.sleep(0.002)
            wide = (Limit("TPM", 1e9, 9.9e8 - job.index),)
            return refusal() if job.index % 4 == 0 and job.attempt == 1 else replace(answer(job.index), limits=wide)

        at_s = run_through(journal, recorder, send, policy=policy, at_s=at_s) + 0.5
        journal.finish(at_s - 0.5, "finished")
        journal.retry_failed()
        policy = policy.with_(tpm_window="sliding", max_concurrency=3)
    return journal


def test_every_decision_of_a_run_is_decided_again_to_the_bit(path: Path) -> None:
    with busy(path) as journal:
        decisions = list(journal.decisions())
        found = verify(decisions)
        assert found.difference is None, str(found)
        assert found.chains == 2
        names = {decision.name for decision in decisions}
        assert {"admission", "launched", "settled", "throttled", "synced", "began", "restored"} <= names
        admissions = [d for d in decisions if d.name == "admission"]
        assert any(math.isinf(d.result[0]) for d in admissions), "inf never came up"
        assert found.checked == sum(count for (count,) in rows(path, "SELECT count FROM decisions"))
        one = list(journal.decisions("default", 2))
        assert one == [d for d in decisions if d.leg == 2]
        assert list(journal.decisions("other")) == []


def test_a_tampered_decision_is_found_and_named(path: Path, seed: int) -> None:
    r = random.Random(seed)
    with busy(path) as journal:
        decisions = list(journal.decisions())
    place, decision = r.choice([(i, d) for i, d in enumerate(decisions) if d.name == "admission" and d.leg == 1])
    connection = sqlite3.connect(path)
    chunk, first, calls = connection.execute(
        "SELECT rowid, first, calls FROM decisions WHERE leg = 1 AND first <= ? ORDER BY first DESC",
        (decision.sequence,),
    ).fetchone()
    # The last byte of a call is the top byte of its result's last number: the cause's.
    data = bytearray(calls)
    offset = -1
    for earlier in decisions[place - (decision.sequence - first) : place + 1]:
        offset += 5 + len(earlier.name) + 8 * (len(earlier.arguments) + len(earlier.result))
    data[offset] ^= 0x40
    connection.execute("UPDATE decisions SET calls = ? WHERE rowid = ?", (bytes(data), chunk))
    connection.commit()
    connection.close()
    with Journal.open(path) as journal:
        found = verify(journal.decisions())
    assert found.difference is not None
    assert (found.difference.decision.leg, found.difference.decision.sequence) == (1, decision.sequence)
    assert found.difference.now == decision.result
    assert found.checked == decision.sequence


def test_settings_changed_in_mid_run_are_recorded_with_their_time(path: Path) -> None:
    first = Policy.preset("paceline").with_(stagger_seconds=2.5, tpm_headroom=0.1)
    second = first.with_(stagger_seconds=25.0)
    with created(path, 1) as journal:
        recorder = journal.begin({"default": first}, 0.25).recorders["default"]
        recorder.policy_changed(second, 17.125)
        journal.finish(20.0, "stopped")
        journal.begin({"default": first, "other": second}, 30.0)
        history = journal.settings()
    assert [(s.leg, s.pool, s.at_s) for s in history] == [
        (1, "default", 0.25),
        (1, "default", 17.125),
        (2, "default", 30.0),
        (2, "other", 30.0),
    ]
    assert [s.policy for s in history] == [first, second, first, second]
    assert history[0].policy.model_fields_set == first.model_fields_set
    assert history[1].policy.to_env() == second.to_env()


def test_a_second_leg_goes_on_in_the_minute_that_the_first_one_used_up(path: Path) -> None:
    policy = Policy(stagger_seconds=0.0, tpm_headroom=0.0, tpm_limit=6_000, tpm_window="fixed", max_concurrency=9)
    with created(path, 3) as journal:
        recorder = journal.begin({"default": policy}, 0.0).recorders["default"]
        pool = pool_of(policy, 10.0)
        recorder.began(pool)
        law.launched(pool.p, pool.s, 5_900.0, law.FIRST, 10.0, 0.5)
        recorder.launched(job(work(0), launched_s=10.0), 10.0)
        # The process dies here, with that request in flight.
        state = journal.begin({"default": policy}, 12.0).recorders["default"].state
        assert state is not None
        assert law.admission(pool.p, state, 500.0, law.FIRST, 12.0) == (10.0 + law.FIXED_S, law.BY_TPM)
        assert state.in_flight == 0
        assert list(journal.decisions()) == []


# ---------------------------------------------------------------- the run itself


def test_the_run_s_own_data_and_legs(path: Path) -> None:
    fingerprint = fingerprint_of(io.BytesIO(b"abc"))
    assert fingerprint == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "FIPS 180-2, example B.1"
    seed = 2**63 - 1
    with Journal.create(path, fingerprint=fingerprint, seed=seed, epoch_s=EPOCH_S + 0.125, version="9.9") as journal:
        run = journal.run()
        assert (run.schema, run.version, run.fingerprint, run.seed) == (schema.SCHEMA, "9.9", fingerprint, seed)
        assert (run.epoch_s, run.requests, run.purged_epoch_s) == (EPOCH_S + 0.125, -1, -1.0)
        with pytest.raises(JournalError, match="never filled"):
            journal.begin({"default": FREE}, 0.0)
        assert journal.ingest(works(2)) == 2
        assert journal.run().requests == 2
    with pytest.raises(JournalError, match="belongs to another input: name another file with --journal"):
        Journal.open(path, fingerprint="0" * 64)
    Journal.open(path, fingerprint=fingerprint).close()


def test_a_forecast_is_one_only_before_the_first_launch(path: Path) -> None:
    journal, recorder = begun(path, 3)
    content = {"makespan_s": [1.0, math.inf, 0.1 + 0.2], "note": "漢\ud800"}
    with journal:
        journal.forecast(content, 0.5)
        recorder.launched(job(work(0)), 1.0)
        journal._writer.commit()  # type: ignore[union-attr]
        journal.forecast({"late": True}, 2.0)
        written = journal.forecasts()
    assert [(f.leg, f.at_s, f.launched_before) for f in written] == [(1, 0.5, 0), (1, 2.0, 1)]
    assert written[0].content == content


def test_another_process_steers_the_run(path: Path) -> None:
    journal, _ = begun(path, 1)
    with journal, Journal.open(path) as other:
        assert journal.asked() == []
        words = ("OPENAI_STAGGER_SECONDS=25", "FINALIZE_MAX_TOKENS=1")
        ids = [other.ask(PAUSE), other.ask(SET, words), other.ask(RESUME)]
        asked = journal.asked()
        assert [(c.id, c.name, c.words, c.taken_s) for c in asked] == [
            (ids[0], "pause", (), -1.0),
            (ids[1], "set", words, -1.0),
            (ids[2], "resume", (), -1.0),
        ]
        assert journal.asked() == [], "each one is handed out once"
        journal.taken(asked[0], 12.5)
        journal.taken(asked[1], 13.0, "no such setting")
        journal._writer.commit()  # type: ignore[union-attr]
        assert [(c.taken_s, c.outcome) for c in other.commands()] == [(12.5, ""), (13.0, "no such setting"), (-1.0, "")]
    with Journal.open(path, to_run=True) as later:
        assert [c.name for c in later.asked()] == ["resume"], "what nobody took up waits for the next process"


def test_what_was_half_filled_is_filled_anew(path: Path) -> None:
    def breaks_off() -> Any:
        yield from works(1_200)
        raise KeyError("the input broke off")

    journal = Journal.create(path, fingerprint="x", seed=1, epoch_s=EPOCH_S)
    with journal, pytest.raises(KeyError):
        journal.ingest(breaks_off())
    assert rows(path, "SELECT count(*) FROM requests") == [(1_000,)], "two transactions of 500"
    with Journal.open(path, to_run=True) as journal:
        assert journal.run().requests == -1
        assert journal.ingest(works(3)) == 3
        assert journal.counts().requests == 3
        assert rows(path, "SELECT count(*) FROM bodies") == [(3,)]


def test_a_journal_that_is_not_wanted_leaves_nothing_behind(path: Path) -> None:
    journal = created(path, 3)
    journal.remove()
    assert list(path.parent.iterdir()) == []
    assert not Journal.exists(path)
    created(path, 3).close()
    assert Journal.exists(path)


# ---------------------------------------------------------------- secrets


def test_only_its_owner_can_read_it(path: Path) -> None:
    path.touch(mode=0o644)  # a file that was made empty before is taken over, and closed to others
    journal, recorder = begun(path, 3)
    with journal:
        recorder.launched(job(work(0)), 1.0)
        journal._writer.commit()  # type: ignore[union-attr]
        files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert files == dict.fromkeys(("run.db", "run.db-wal", "run.db-shm", "run.db-lock"), 384)


def test_a_key_that_a_refusal_quotes_is_blotted_out(path: Path) -> None:
    keys = ("sk-proj-AbCd1234efgh5678", "eyJhbGciOi.Jz-93_x/y+z==")
    message = f"Incorrect API key provided: {keys[0]}. Authorization: Bearer {keys[1]}"
    journal, recorder = begun(path, 2)
    with journal:
        flying = job(work(0))
        recorder.launched(flying, 1.0)
        again(recorder, flying, refusal(Outcome.UNAUTHORIZED, 401, message), 2.0)
        ends(recorder, job(work(1)), refusal(Outcome.BAD_REQUEST, 400, message), 3.0, FailureCode.BAD_REQUEST)
        journal._writer.commit()  # type: ignore[union-attr]
        content = bytes_of(path)
        assert b"Incorrect API key provided: ***" in content, "looked in the wrong place"
        assert [key for key in keys if key.encode() in content] == []
        (result,) = journal.results()
        assert result.answer is not None
        assert result.answer.message == "Incorrect API key provided: *** Authorization: ***"


def test_an_answer_may_speak_of_keys(path: Path) -> None:
    journal, recorder = begun(path, 1)
    came = answer(0, "write sk-1234567890 and Bearer abcdefgh1234")
    ends(recorder, job(work(0)), came, 2.0)
    with journal:
        journal.finish(3.0, "finished")
        (result,) = journal.results()
    assert result.answer == replace(came, limits=()), "limits stand with the attempts"


def test_purging_removes_what_was_sent_and_what_came_back(path: Path) -> None:
    marker, secret = "PROMPT-" * 300, "ANSWER-" * 300
    journal, recorder = begun(path, (work(index, text=f"{marker}{index}") for index in range(50)))
    with journal:
        for index in range(20):
            ends(recorder, job(work(index)), answer(index, f"{secret}{index}"), 2.0)
        ends(recorder, job(work(20)), refusal(Outcome.BAD_REQUEST, 400, "REFUSED-"), 3.0, FailureCode.BAD_REQUEST)
        journal.finish(4.0, "stopped")
        before = bytes_of(path)
        ends(recorder, job(work(21)), answer(21, f"{secret}21"), 3.5)  # told, and not yet on the disk
        assert all(text in before for text in (b"PROMPT-", b"ANSWER-", b"REFUSED-"))
        with Journal.open(path) as other, pytest.raises(JournalError, match="another process is running this journal"):
            other.purge()
        journal.purge()
        counts = journal.counts()
        assert (counts.done, counts.failed, counts.pending) == (21, 1, 28)
        assert len(list(journal.attempts())) == 22
        assert journal.run().purged_epoch_s > EPOCH_S
        for stream in (journal.pending(), journal.results()):
            with pytest.raises(JournalError, match="purged"):
                next(stream)
        after = bytes_of(path)
        assert [text for text in (b"PROMPT-", b"ANSWER-", b"REFUSED-") if text in after] == []
        assert journal.complaints() == []
        assert path.stat().st_size < len(before) / 2
    assert b"ANSWER-" not in bytes_of(path)


def test_what_is_purged_is_overwritten_before_its_room_is_given_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebuilding the file would only cut its end off: on the disk, the old content would still stand there."""
    shrink = Journal._shrink
    monkeypatch.setattr(Journal, "_shrink", lambda journal, *first: shrink(journal))
    with created(path, (work(index, text="PROMPT-" * 300) for index in range(50))) as journal:
        size = path.stat().st_size
        journal.purge()
        assert path.stat().st_size >= size, "it was rebuilt"
        assert b"PROMPT-" not in bytes_of(path)


# ---------------------------------------------------------------- other databases


@pytest.mark.parametrize("dialect", [postgresql.dialect(), mysql.dialect()], ids=["postgresql", "mysql"])
def test_other_databases_have_all_the_types_that_the_tables_need(dialect: Any) -> None:
    text = ""
    for table in schema.metadata.sorted_tables:
        text += str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            text += str(CreateIndex(index).compile(dialect=dialect))
    long, double = {"postgresql": ("body TEXT", "DOUBLE PRECISION"), "mysql": ("body LONGTEXT", "DOUBLE")}[dialect.name]
    assert long in text
    assert f"epoch_s {double}" in text
    assert "BIGINT" in text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://user:hunter2@host/db", "no driver for nosuch is installed"),
        ("oracle+nosuch://user:hunter2@host/db", "no driver for oracle"),
        ("sqlite://", "a journal in memory would not outlive its process: name a file"),
        ("sqlite:///:memory:", "a journal in memory would not outlive its process: name a file"),
        ("://hunter2", "the journal's URL cannot be read: write dialect://user@host/database, or a path"),
        ("post gres://user:hunter2@host", "the journal's URL cannot be read"),
        ("postgresql://user:hunter2@host:port/db", "the journal's URL cannot be read"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line_without_the_password(url: str, message: str) -> None:
    with pytest.raises(JournalError) as caught:
        Journal.open(url)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_url_of_a_file_is_a_path(path: Path) -> None:
    journal, recorder = begun(f"sqlite:///{path}", 3)
    with journal:
        ends(recorder, job(work(0)), answer(0), 2.0)
        with pytest.raises(JournalError, match=f"^{path}: another process is running this journal"):
            Journal.open(f"sqlite:///{path}", to_run=True)
    with Journal.open(path) as journal:
        assert journal.counts().done == 1
        assert journal.name == str(path)


def test_a_run_on_another_database(request: pytest.FixtureRequest) -> None:
    """The same on a server: PostgreSQL, or the empty database that PACELINE_TEST_DATABASE names and gets back so."""
    url = os.environ.get("PACELINE_TEST_DATABASE", "")
    if not url:
        url = request.getfixturevalue("postgres").database("a_run").replace("postgresql://", "postgresql+psycopg://")
    assert not Journal.exists(url)
    with pytest.raises(JournalError, match="this database holds no Paceline journal"):
        Journal.open(url)
    policy = FREE.with_(launch_order="longest_first")
    batch = [work(0, text="\x00 \ud83d \\"), *(work(index, cap=index % 5) for index in range(1, 250))]
    journal = created(url, batch, seed=2**63 - 1)
    try:
        with pytest.raises(JournalError, match="another process is running this journal"):
            Journal.create(url, fingerprint="x", seed=1, epoch_s=EPOCH_S)

        async def send(job: Job, timeout_s: float) -> Answer:
            return refusal() if job.index % 7 == 0 and job.attempt == 1 else answer(job.index)

        recorder = journal.begin({"default": policy}, 0.0).recorders["default"]
        order = [each.work for each in journal.pending(longest_first=True)]
        assert order == sorted(batch, key=lambda one: (-one.expected, -one.reserve, one.request.index))
        at_s = run_through(journal, recorder, send, policy=policy)
        journal.taken(journal.commands(journal.ask(PAUSE) - 1)[0], at_s)
        journal.finish(at_s, "finished")
        assert journal.counts() == Counts(250, 0, 0, 250, 0, 0, {})
        assert [r.answer.body for r in journal.results() if r.answer] == [answer(index).body for index in range(250)]
        assert verify(journal.decisions()).difference is None
        assert journal.begin({"default": policy}, at_s).leg == 2
        journal.purge()
        assert journal.counts().done == 250
    finally:
        journal.remove()
    assert not Journal.exists(url)

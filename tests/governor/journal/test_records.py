"""The journal's reading half: answers, attempts, summaries and decisions come back in every field."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from governor import law
from governor.forecast.summary import Grant, tallied
from governor.journal.journal import Journal
from governor.journal.schema import TIER_COLUMNS
from governor.journal.verify import verify
from governor.model.errors import FailureCode
from governor.model.needs import of_tokens
from governor.model.policy import Policy
from governor.model.requests import CAUSES, Answer, Attempt, Limit, Outcome, error_line, result_line
from governor.model.work import Job
from tests.governor.journals import (
    FREE,
    answer,
    attempt,
    begun,
    created,
    ends,
    job,
    pool_of,
    refusal,
    rows,
    run_through,
    work,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


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
    own = ["request_id", "cached_tokens", "reasoning_tokens", "processing_s", "limits", *TIER_COLUMNS]
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
        tally = tallied(journal.attempts(), journal.ends(), stagger_delays=journal.deferrals()[law.STAGGER])
        summary = tally.summary(Grant())
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
            tallied(journal.attempts(), journal.ends(), lost=each).summary(grant).bound_s for each in ((), lost)
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
        law.launched(pool.p, pool.s, of_tokens(5_900.0), law.FIRST, 10.0, 0.5)
        recorder.launched(job(work(0), launched_s=10.0), 10.0)
        # The process dies here, with that request in flight.
        state = journal.begin({"default": policy}, 12.0).recorders["default"].state
        assert state is not None
        assert law.admission(pool.p, state, of_tokens(500.0), law.FIRST, 12.0) == (10.0 + law.FIXED_S, law.BY_TPM)
        assert state.in_flight == 0
        assert list(journal.decisions()) == []

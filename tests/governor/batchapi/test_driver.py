"""Waves against an account at the synthetic provider, in virtual time: what is lost, doubled, left, and said."""

from __future__ import annotations

import errno
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from governor.batchapi.driver import CANCELLED_THERE, REFUSED, WaveDriver
from governor.journal import database
from governor.journal.journal import Journal
from governor.model.errors import FailureCode
from governor.model.estimate import EMBEDDINGS, sizes_of
from governor.model.pools import Pool
from governor.model.requests import Request, url_of
from governor.model.work import Work, work_of
from sim.model.provider_config import ProviderConfig
from tests.governor.batchapi.accounts import (
    POOL,
    Account,
    Killed,
    Lived,
    check_account,
    dropped_call,
    journal_of,
    live,
    works,
)

CONFIG = ProviderConfig().with_(
    latency={"first_token_s": 0.0, "per_token_s": 0.0, "sigma": 0.0, "stall_ratio": 0.0},
    batch_api={"turnaround_s": [1_000.0, 3_000.0]},
)
QUEUE = 4_000


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it had written: only a power cut asks for more, and that costs time."""
    as_usual = database._on_connect

    def connected(connection: sqlite3.Connection, record: object) -> None:
        as_usual(connection, record)
        connection.execute("PRAGMA synchronous=OFF")

    monkeypatch.setattr(database, "_on_connect", connected)


def config_of(queue_tokens: int = 0, error_ratio: float = 0.0, **batch_api: Any) -> ProviderConfig:
    given = {"turnaround_s": [1_000.0, 3_000.0], "queue_tokens": queue_tokens, **batch_api}
    return CONFIG.with_(batch_api=given, faults={"error_ratio": error_ratio})


def pool_of(queue_tokens: int, **knobs: Any) -> Pool:
    return Pool(policy=POOL.policy.with_(batch_queue_tokens=queue_tokens, **knobs))


def tokens_of(given: list[Work]) -> int:
    return sum(work.request.sizes.prompt_tokens for work in given)


def refused(account: Account) -> int:
    """How many batches the queue has refused."""
    jobs = account.desk.jobs.values()
    return sum(p.code == "token_limit_exceeded" for job in jobs for p in job.batch.problems)


# ---------------------------------------------------------------- the whole way


def test_two_models_are_answered_in_waves_of_their_own(tmp_path: Path) -> None:
    account, given = Account(config_of()), works(30, models=("gpt-4o-mini", "gpt-4o"))
    with journal_of(tmp_path / "j.db", given) as journal:
        assert live(journal, account) == Lived("", [])
        check_account(account, journal, given)
        assert journal.counts().done == 30
        assert {(row.model, row.requests, row.status) for row in journal.waves()} == {
            ("gpt-4o-mini", 15, "completed"),
            ("gpt-4o", 15, "completed"),
        }
        assert {attempt.lane for attempt in journal.attempts()} == {"batch"}
    assert account.calls["upload"] == account.calls["create"] == 2
    assert all(count == 1 for count in account.downloads.values())


def test_files_are_kept_if_asked(tmp_path: Path) -> None:
    account = Account(config_of())
    with journal_of(tmp_path / "j.db", works(3)) as journal:
        live(journal, account, keep_files=True)
    assert sorted(file.purpose for file in account.desk.files.values()) == ["batch", "batch_output"]


# ---------------------------------------------------------------- the queue


def test_ten_times_the_queue_drains_without_a_refusal(tmp_path: Path) -> None:
    given = works(400)
    # The estimate is right: the provider counts what we count, within the headroom.
    account = Account(config_of(tokens_of(given) // 10))
    with journal_of(tmp_path / "j.db", given) as journal:
        assert live(journal, account, pool=pool_of(account.config.batch_api.queue_tokens)).said == []
        check_account(account, journal, given)
        waves = journal.waves()
    assert refused(account) == 0
    assert len(waves) >= 11
    assert max(account.queue.enqueued_max.values()) <= account.config.batch_api.queue_tokens


@pytest.mark.parametrize("known", [True, False])
def test_estimates_that_are_too_low_lose_nothing(tmp_path: Path, known: bool) -> None:
    given = works(400)
    true = tokens_of(given)
    low = [_estimated_at(work, 0.7) for work in given]
    account = Account(config_of(true // 10))
    with journal_of(tmp_path / "j.db", low) as journal:
        live(journal, account, pool=pool_of(true // 10 if known else 0))
        check_account(account, journal, low)
        assert journal.counts().done == 400
        assert max(attempt.attempt for attempt in journal.attempts()) == 1, "a full queue counts as no attempt"
    assert 1 <= refused(account) <= (3 if known else 8)


def _estimated_at(work: Work, ratio: float) -> Work:
    """The same request, whose tokens are taken for so many times as many."""
    from dataclasses import replace

    r = work.request
    sizes = replace(r.sizes, prompt_tokens=round(ratio * r.sizes.prompt_tokens))
    request = Request(r.index, r.custom_id, r.url, r.model, r.body, sizes, r.pool)
    return replace(work, request=request)


def test_a_request_above_the_whole_queue_fails_alone(tmp_path: Path) -> None:
    given = works(5)
    given[2:3] = [
        Work(Request(2, "q-2", w.request.url, w.request.model, w.request.body, w.request.sizes), w.reserve)
        for w in works(3, chars=40_000)[2:]
    ]
    account = Account(config_of(QUEUE))
    with journal_of(tmp_path / "j.db", given) as journal:
        live(journal, account, pool=pool_of(QUEUE))
        check_account(account, journal, given)
        assert journal.counts().failures == {FailureCode.REQUEST_TOO_LARGE: 1}


@pytest.mark.parametrize(
    ("limit", "value", "files"),
    [("FILE_LINES", 7, [7, 7, 6]), ("FILE_BYTES", 4_200, [8, 8, 4]), ("EMBEDDING_INPUTS", 9, [20])],
)
def test_files_keep_within_each_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, files: list[int]
) -> None:
    monkeypatch.setattr(f"governor.batchapi.waves.{limit}", value)
    account, given = Account(config_of()), works(20, chars=360)
    with journal_of(tmp_path / "j.db", given) as journal:
        live(journal, account, keep_files=True)
        assert [row.requests for row in journal.waves()] == files
        sizes = [len(f.content) for f in account.desk.files.values() if f.purpose == "batch"]
        assert sizes == [row.bytes for row in journal.waves()]
        assert limit != "FILE_BYTES" or max(sizes) <= value


def test_embedding_inputs_are_counted_over_the_lines_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("governor.batchapi.waves.EMBEDDING_INPUTS", 5)
    given = []
    for i, content in enumerate(["one", ["a", "b", "c"], [1, 2, 3], ["d", "e"], [[1], [2], [3]]]):
        body = {"model": "text-embedding-3-small", "input": content}
        request = Request(i, f"q-{i}", url_of(EMBEDDINGS), str(body["model"]), body, sizes_of(EMBEDDINGS, body))
        given.append(work_of(request, POOL.policy))
    account = Account(config_of())
    with journal_of(tmp_path / "j.db", given) as journal:
        live(journal, account)
        check_account(account, journal, given)
        # 1 + 3 + 1, then 2 + 3.
        assert [row.requests for row in journal.waves()] == [3, 2]


# ---------------------------------------------------------------- retries


def test_failed_and_expired_lines_go_again_under_the_retry_rules(tmp_path: Path) -> None:
    given = works(40)
    # A batch in three expires, a line in four fails: five attempts are not enough for all.
    account = Account(config_of(error_ratio=0.25, turnaround_s=[60_000.0, 200_000.0]), seed=3)
    with journal_of(tmp_path / "j.db", given) as journal:
        live(journal, account)
        check_account(account, journal, given)
        tries = max(attempt.attempt for attempt in journal.attempts())
        assert 2 <= tries <= 5
        assert "expired" in {row.status for row in journal.waves()}
        # Failures of one wave go again together.
        assert len(journal.waves()) <= 5


# ---------------------------------------------------------------- what others do, and what goes wrong


def test_a_batch_cancelled_in_the_console_stops_and_goes_on_later(tmp_path: Path) -> None:
    account, given = Account(config_of(turnaround_s=[5_000.0, 5_000.0])), works(30)

    async def meanwhile(driver: WaveDriver) -> None:
        import asyncio

        await asyncio.sleep(2_500.0)
        account.now = asyncio.get_running_loop().time()
        account.cancel_there(next(iter(account.desk.jobs)))

    with journal_of(tmp_path / "j.db", given) as journal:
        lived = live(journal, account, meanwhile=meanwhile)
        assert lived.why == CANCELLED_THERE
        assert "was cancelled by another user or program" in lived.said[0]
        counts = journal.counts()
        assert counts.in_flight == 0
        assert 0 < counts.pending < 30
        kept = counts.done
    with journal_of(tmp_path / "j.db", given) as journal:
        live(journal, account)
        check_account(account, journal, given)
        assert journal.counts().done == 30
        assert sum(1 for _ in journal.attempts()) == 30, f"the {kept} that were answered are not asked again"


def test_an_output_file_that_is_gone_is_reported_and_bought_again_on_demand(tmp_path: Path) -> None:
    account, given = Account(config_of()), works(10)

    def gone(when: str, name: str) -> None:
        if (when, name) == ("before", "download"):
            for file in list(account.desk.files.values()):
                if file.purpose == "batch_output":
                    del account.desk.files[file.id]

    account.faults = gone
    with journal_of(tmp_path / "j.db", given) as journal:
        lived = live(journal, account)
        assert len(lived.said) == 1
        assert "10 answers that were paid for" in lived.said[0]
        assert journal.counts().failures == {FailureCode.UNREADABLE_ANSWER: 10}
        account.faults = lambda when, name: None
        journal.retry_failed(FailureCode.UNREADABLE_ANSWER)
        live(journal, account)
        check_account(account, journal, given)
        assert journal.counts().done == 10


@pytest.mark.parametrize(
    ("name", "status", "why", "said"),
    [
        ("upload", 403, REFUSED, "may use the Batch API"),
        ("create", 403, REFUSED, "may use the Batch API"),
        ("create", 400, REFUSED, "create failed (400)"),
        ("files", 404, REFUSED, "may use the Batch API"),
        ("upload", 401, FailureCode.UNAUTHORIZED, "until the key is right"),
        ("retrieve", 404, REFUSED, "account with the Batch API"),
    ],
)
def test_a_refused_call_stops_with_one_line_and_loses_nothing(
    tmp_path: Path, name: str, status: int, why: str, said: str
) -> None:
    from governor.batchapi.client import CallFailed
    from governor.provider.answers import classify

    account, given = Account(config_of()), works(10)

    def fault(when: str, called: str) -> None:
        if (when, called) == ("before", name):
            raise CallFailed(classify(status, None, {"error": {"message": "no", "type": "invalid_request_error"}}))

    account.faults = fault
    with journal_of(tmp_path / "j.db", given) as journal:
        lived = live(journal, account)
        if name != "files":  # which a run that begins does not call
            assert lived.why == why
            assert journal.counts().pending + journal.counts().in_flight == 10
        assert len(lived.said) == 1
        if name != "files":
            assert said in lived.said[0]
    account.faults = lambda when, called: None
    with journal_of(tmp_path / "j.db", given) as journal:
        live(journal, account)
        check_account(account, journal, given)


def test_calls_whose_answers_are_lost_are_not_repeated_blindly(tmp_path: Path, seed: int) -> None:
    account, given, rng = Account(config_of(2_000)), works(60), random.Random(seed)

    def fault(when: str, called: str) -> None:
        if rng.random() < 0.2:
            raise dropped_call()

    account.faults = fault
    with journal_of(tmp_path / "j.db", given) as journal:
        live(journal, account, pool=pool_of(2_000))
        account.faults = lambda when, called: None
        live(journal, account, pool=pool_of(2_000))  # the sweep of the files may have been among them
        check_account(account, journal, given)
        assert journal.counts().done == 60


def test_a_creation_that_takes_effect_after_a_look_is_not_repeated(tmp_path: Path) -> None:
    account, given = Account(config_of()), works(5)
    late: list[Any] = []
    as_usual = account.call

    def call(name: str, method: str, path: str, sent: Any = None, **query: Any) -> Any:
        if name == "create" and not late:
            late.append((account.now + 30.0, sent))
            raise dropped_call()
        if late[0:] and late[0] is not None and account.now >= late[0][0]:
            (_, then), late[0] = late[0], None
            as_usual("create", "POST", "/v1/batches", then)
        return as_usual(name, method, path, sent, **query)

    account.call = call  # type: ignore[method-assign]
    with journal_of(tmp_path / "j.db", given) as journal:
        live(journal, account)
        check_account(account, journal, given)
    assert (len(account.desk.jobs), account.calls["batches"]) == (1, 2)


def test_a_request_that_the_queue_never_takes_alone_ends(tmp_path: Path) -> None:
    """Its estimate fits, the provider's count does not."""
    given = [_estimated_at(work, 0.3) for work in works(1)]
    account = Account(config_of(2 * tokens_of(given)))
    with journal_of(tmp_path / "j.db", given) as journal:
        said = live(journal, account, pool=pool_of(0)).said
        check_account(account, journal, given)
        assert journal.counts().failures == {FailureCode.REQUEST_TOO_LARGE: 1}
        answer = next(journal.results()).answer
        assert answer is not None
        assert "refused it 12 times" in answer.message
        assert sum(1 for _ in journal.attempts()) == 0
    assert "full for it 12 times" in said[-1]
    assert refused(account) == len(said) == 12


def test_the_first_call_that_fails_is_announced_and_the_next_are_not(tmp_path: Path) -> None:
    account, given, left = Account(config_of()), works(5), 4

    def fault(when: str, called: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise dropped_call()

    account.faults = fault
    with journal_of(tmp_path / "j.db", given) as journal:
        said = live(journal, account).said
    assert len(said) == 1
    assert "upload failed: the connection broke; it is tried again until it succeeds" in said[0]


def test_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    account, given, left = Account(config_of()), works(5), 3

    def fault(when: str, called: str) -> None:
        nonlocal left
        left -= called == "download"
        if called == "download" and left >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    account.faults = fault
    with journal_of(tmp_path / "j.db", given) as journal:
        said = live(journal, account).said
        check_account(account, journal, given)
        assert journal.counts().done == 5
    assert [line.partition(": ")[2] for line in said] == [
        "collect failed: [Errno 28] No space left on device; it is tried again until it succeeds"
    ]


# ---------------------------------------------------------------- kills


def killed_runs(folder: Path, rng: random.Random, kills: int) -> int:
    """Runs that are killed at random points until so many kills have struck; each run is then checked. Returns runs."""
    struck = runs = 0
    while struck < kills:
        given = works(rng.randint(5, 40), models=("gpt-4o-mini", "gpt-4o")[: rng.randint(1, 2)])
        queue = rng.choice([0, 1_500, 3_000])
        account = Account(config_of(queue, error_ratio=rng.choice([0.0, 0.2])), seed=rng.randrange(10**6))
        path = folder / f"{runs}.db"
        runs += 1
        for _ in range(rng.randint(2, 9)):
            left = rng.randint(0, 60)

            def point(*_: str) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed

            account.faults = point
            if _dies(path, given, account, queue, point):
                struck += 1
            else:
                break
        account.faults = lambda when, name: None
        with journal_of(path, given) as journal:
            live(journal, account, pool=pool_of(queue))
            check_account(account, journal, given)
            assert journal.counts().resent == 0
            assert set(account.downloads.values()) <= {1}, "a file was downloaded twice"
            assert journal.downloads is not None
            assert not journal.downloads.exists()
        path.unlink()
    return runs


def _dies(path: Path, given: list[Work], account: Account, queue: int, point: Callable[..., None]) -> bool:
    """One life of our process, which ends by a kill or on its own. What it had not committed is gone with it."""
    journal: Journal = journal_of(path, given)
    try:
        live(journal, account, pool=pool_of(queue), committed=lambda when: point())
    except Killed:
        journal._running().abandon()
        journal._writer = None
        return True
    finally:
        journal.close()
    return False


def test_a_kill_at_each_point_in_turn_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    given = works(3)
    struck, k = True, 0
    while struck:
        account = Account(config_of(turnaround_s=[6.0, 6.0]))  # few polls: each life costs
        path, left = tmp_path / f"{k}.db", k

        def point(*_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        account.faults = point
        struck = _dies(path, given, account, 0, point)
        account.faults = lambda when, name: None
        with journal_of(path, given) as journal:
            live(journal, account)
            check_account(account, journal, given)
            assert set(account.downloads.values()) == {1}
        k += 1
    assert k > 30, "there are more points than that"


def test_kills_at_random_points_lose_nothing_and_double_nothing(tmp_path: Path, seed: int) -> None:
    killed_runs(tmp_path, random.Random(seed), 15)


@pytest.mark.long
def test_a_thousand_kills(tmp_path: Path, seed: int) -> None:
    runs = killed_runs(tmp_path, random.Random(seed), 1_000)
    print(f"\n1,000 kills in {runs} runs: no request lost or doubled, no batch twice, no file left")

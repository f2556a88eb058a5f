"""The journal of a whole run: its own data, legs and commands, secrets, and other databases.

Journals are real files; another process is a second connection. Crashes, full disks and damage: `test_journal_harm`.
"""

from __future__ import annotations

import io
import math
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from governor.journal import schema
from governor.journal.database import JournalError
from governor.journal.journal import PAUSE, RESUME, SET, Journal, fingerprint_of
from governor.journal.rows import Counts
from governor.journal.verify import verify
from governor.model.errors import FailureCode
from governor.model.requests import Answer, Outcome
from governor.model.work import Job
from tests.governor.journals import (
    EPOCH_S,
    FREE,
    again,
    answer,
    begun,
    bytes_of,
    created,
    ends,
    job,
    refusal,
    rows,
    run_through,
    work,
    works,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


# ---------------------------------------------------------------- the run itself


def test_the_run_s_own_data_and_legs(path: Path) -> None:
    fingerprint = fingerprint_of(io.BytesIO(b"abc"))
    assert fingerprint == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "FIPS 180-2, example B.1"
    seed = 2**63 - 1
    with Journal.create(path, fingerprint=fingerprint, seed=seed, epoch_s=EPOCH_S + 0.125, version="9.9") as journal:
        run = journal.run()
        assert (run.schema, run.version, run.fingerprint, run.seed) == (schema.SCHEMA, "9.9", fingerprint, seed)
        assert (run.epoch_s, run.requests, run.purged_epoch_s) == (EPOCH_S + 0.125, -1, -1.0)
        with pytest.raises(JournalError, match="ended before the last"):
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
